"""What the driver shall do (imperative). `GenerationCore.handle` returns them in the order in which they are meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class StartDraft:
    """Have the drafter guess [start, start + count), in blocks of at most `block` tokens.

    It holds the first `base` tokens of the generation already; `tokens` follow them. If start > base + len(tokens)
    the request continues the drafter's own earlier guesses.
    """

    attempt: int
    base: int
    tokens: tuple[int, ...]
    start: int
    count: int
    block: int


@dataclass(frozen=True, slots=True)
class StartVerify:
    """Have `server` give the target's tokens from `start` on, checking [start, base + len(tokens)) on the way."""

    attempt: int
    server: int
    base: int
    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class CancelDrafts:
    """All draft attempts up to `attempt` are dead."""

    attempt: int


@dataclass(frozen=True, slots=True)
class CancelVerify:
    """The attempt on this server is dead. The server is busy until the driver says that it is idle again."""

    attempt: int
    server: int


@dataclass(frozen=True, slots=True)
class EmitTokens:
    """These tokens are committed, from position `start` on. `accepted[i]` tells whether token i had been drafted."""

    start: int
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The generation is over. Reason: stop (a stop token), length (max_tokens), cancelled."""

    reason: str


Action: TypeAlias = StartDraft | StartVerify | CancelDrafts | CancelVerify | EmitTokens | Finish
