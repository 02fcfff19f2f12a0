"""Checks of what an embedder gives to `Orchestrator.generate` and `score`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Literal, SupportsIndex

from dsi_actors.config import ALGORITHMS, Algorithm, Sampling
from dsi_actors.errors import ConfigError
from dsi_protocol import MAX_TEXT_BYTES


def check_way(
    algorithm: Algorithm = "dsi", sp: int | None = None, lookahead: int | Literal["auto"] = "auto", rows: int | None = None,
    correlation: str | None = None,
) -> None:  # fmt: skip
    """Raises ConfigError for a way to generate that there is not."""
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm {algorithm!r}: choose one of {', '.join(ALGORITHMS)}")
    if sp is not None and not 1 <= sp <= 1024:
        raise ConfigError(f"sp must lie in [1, 1024], not {sp}")
    if lookahead != "auto" and not 1 <= lookahead <= 1024:
        raise ConfigError(f"lookahead must be auto or lie in [1, 1024], not {lookahead}")
    if rows is not None and not 1 <= rows <= 1024:
        raise ConfigError(f"rows must lie in [1, 1024], not {rows}")
    correlation_of(correlation, "")


def token_ids_of(name: str, given: Iterable[SupportsIndex]) -> list[int]:
    """The ids as plain integers. Raises ConfigError if one cannot be a token id of any model."""
    if isinstance(given, (str, bytes)):
        raise ConfigError(f"{name} must be token ids, not text: encode it with the model's tokenizer first")
    try:
        ids = list(map(operator.index, given))
    except TypeError as error:
        raise ConfigError(f"{name} must be a sequence of token ids, which are whole numbers: {error}") from None
    if ids and not 0 <= min(ids) <= max(ids) < 1 << 32:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ConfigError(f"{name} must be token ids, from 0 to 2**32 - 1: {wrong} is none")
    return ids


def correlation_of(given: str | None, own: str) -> str:
    """What names it in logs. Raises ConfigError."""
    name = own if given is None else given
    if len(name.encode(errors="replace")) > MAX_TEXT_BYTES or not name.isprintable():
        raise ConfigError(f"correlation must be printable text of at most {MAX_TEXT_BYTES} bytes")
    return name


def check_resumed(resumed: Sequence[int], sampling: Sampling) -> None:
    if len(resumed) > sampling.max_tokens:
        raise ConfigError(
            f"{len(resumed)} tokens are resumed, over max_tokens {sampling.max_tokens}, which counts them"
        )
    for token in resumed[:-1]:
        if token in sampling.stop_token_ids:
            raise ConfigError(f"the resumed tokens go on after the stop token {token}: another run gave them")
