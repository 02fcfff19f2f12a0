"""Prompts for a benchmark: a file of lines {"id": ..., "prompt": ...}."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from dsi_actors.errors import ConfigError
from dsi_actors.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    name: str
    ids: list[int]


def add_prompt_options(parser: argparse.ArgumentParser, *, limit: int, max_tokens: int) -> None:
    parser.add_argument("--prompts", required=True, metavar="FILE", help='lines of {"id": ..., "prompt": ...}')
    parser.add_argument("--limit", type=int, default=limit, metavar="N", help="prompts to use (default %(default)s)")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="prompts to leave out before")
    parser.add_argument("--chat", action="store_true", help="give each as a chat message, not as a text to go on with")
    parser.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="M", help="tokens of each (default %(default)s)"
    )


def read_prompts(arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    """Raises ConfigError."""
    file, skip, limit = arguments.prompts, arguments.skip, arguments.limit
    if limit < 1 or skip < 0:
        raise ConfigError("--limit must be at least 1 and --skip at least 0")
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        cases = [json.loads(line) for line in lines[skip : skip + limit]]
        texts = [(str(case.get("id", number)), str(case["prompt"])) for number, case in enumerate(cases)]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f'{file} cannot be read as lines of {{"id": ..., "prompt": ...}}: {error}') from None
    if not texts:
        raise ConfigError(f"{file} has no prompts after the first {skip}")
    if not arguments.chat:
        return [Prompt(name, tokenizer.encode(text)) for name, text in texts]
    return [Prompt(name, tokenizer.encode_chat([{"role": "user", "content": text}])) for name, text in texts]
