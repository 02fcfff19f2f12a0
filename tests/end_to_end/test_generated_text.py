"""`dsi-actors generate` gives the text as it is: on a terminal or in JSON, of tokens that are often no UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from dsi_actors.tokenizer import Tokenizer
from support.engines import make_tiny_model
from support.tokenizers import llama_2, save


def generated(model: Path, *arguments: str) -> bytes:
    """On standard output."""
    command = [sys.executable, "-m", "dsi_actors.cli.main", "generate", "heat flows", "--target", str(model)]
    options = ["--raw", "--ignore-eos", "--gpu", "cpu", "--sp", "1", "--drafter", "none", "--temperature", "1"]
    done = subprocess.run(
        [*command, *options, "--max-tokens", "200", *arguments], capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_a_text_is_printed_as_it_is(tmp_path: Path) -> None:
    library = llama_2()
    library.add_tokens([f":smile:\t{number}\r" for number in range(100)])
    model = make_tiny_model(tmp_path / "model", words=library.get_vocab_size())
    tokenizer = Tokenizer(save(library, model))
    told = json.loads(generated(model, "--json"))
    prompt = tokenizer.encode("heat flows")
    assert tokenizer.decode(prompt) + told["text"] == tokenizer.decode(prompt + told["token_ids"])
    assert "\ufffd" in told["text"]
    assert ":smile:\t" in told["text"]
    assert generated(model).decode().startswith(told["text"])
