"""What the driver shall do (imperative). `GenerationCore.handle` returns them in the order in which they are meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class StartDraft:
    """Have the drafter guess [start, start + count), in blocks of at most `block` tokens.

    It holds the first `base` tokens of the generation already; `tokens` follow them. If start > base + len(tokens)
    the request continues the drafter's own path. Otherwise it ends the requests before it: the drafter goes on behind
    these tokens, from a branch of its own if they lead there.
    """

    attempt: int
    base: int
    tokens: tuple[int, ...]
    start: int
    count: int
    block: int
    #: Rows that a step of the drafter may have: the main path's, and those of branches. 1 drafts a chain.
    rows: int = 1
    #: Tokens before this position are committed: branches that left the main path before it are dead.
    committed: int = 0
    drafter: int = 0


@dataclass(frozen=True, slots=True)
class StartVerify:
    """Have `server` give the target's tokens from `start` on, checking what was drafted on the way.

    `tokens` follow the first `base` ones. `parents` empty: each follows the one before. Else tokens[i] follows
    tokens[parents[i] - 1], or the token at base - 1 where parents[i] is 0; the main path comes first.
    """

    attempt: int
    server: int
    base: int
    tokens: tuple[int, ...]
    start: int
    parents: tuple[int, ...] = ()
    #: So many further answers, of a token each, the server may give by itself, each behind the one before.
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class VerifyGoesOn:
    """What `server` began by itself under this attempt is a verification that is wanted: of no drafts, for the token at `start`.
    There is nothing to tell it."""

    attempt: int
    server: int
    start: int


@dataclass(frozen=True, slots=True)
class CancelDrafts:
    """All draft attempts of this drafter up to `attempt` are dead."""

    attempt: int
    drafter: int = 0


@dataclass(frozen=True, slots=True)
class CancelVerify:
    """The attempt on this server is dead. The server is busy until the driver says that it is idle again."""

    attempt: int
    server: int


@dataclass(frozen=True, slots=True)
class EmitTokens:
    """These tokens are committed, from position `start` on. `accepted[i]` tells whether token i had been drafted; positions
    where an alternative had it, not the main path, are `alternatives`."""

    start: int
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]
    alternatives: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """What an event told about drafts. With an `attempt`: this verification committed tokens; without: it was of no use, or
    drafts came after their positions had been committed."""

    attempt: int | None = None
    #: First choices of the drafter that were compared with the target's own tokens, and those that were equal.
    judged: int = 0
    accepted: int = 0
    #: Of those that differed: those with alternatives beside them, and those where an alternative was right.
    offered: int = 0
    alternatives: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """The generation is over. Reason: stop (a stop token), length (max_tokens), cancelled."""

    reason: str


Action: TypeAlias = StartDraft | StartVerify | VerifyGoesOn | CancelDrafts | CancelVerify | EmitTokens | Judged | Finish
