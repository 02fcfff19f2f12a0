"""What happened (past tense). The driver feeds each to `GenerationCore.handle`.

A *server* is a target server, named by a small integer that the driver chose. So is a *drafter*, of which there may be several:
events of one that was lost, or never joined, are dropped. Positions are absolute, ranges half-open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dsi_actors.core.policy import UNLIMITED, Policy


@dataclass(frozen=True, slots=True)
class ServerJoined:
    """A target server is idle and may be used by this generation. It holds nothing of it."""

    server: int
    #: The most tokens of one request that is a tree, the main path's among them. 1: chains only.
    rows: int = UNLIMITED


@dataclass(frozen=True, slots=True)
class ServerLost:
    """A target server is gone, with whatever it was doing. Told once; it may join again under a new number."""

    server: int


@dataclass(frozen=True, slots=True)
class DrafterJoined:
    """A drafter may be used by this generation, beside those that are there. It holds nothing of it."""

    drafter: int = 0
    #: Of several drafters the one with the lowest rank leads: where it has drafted, the main path is its own. No two that are
    #: there have the same rank.
    rank: int = 0
    #: The most rows that a step of it may have.
    rows: int = UNLIMITED


@dataclass(frozen=True, slots=True)
class DrafterLost:
    """The drafter is gone. Decoding goes on with the others, or without. What it has drafted stays."""

    drafter: int = 0


@dataclass(frozen=True, slots=True)
class DraftsArrived:
    """The drafter guessed `tokens`. More may follow from the same attempt.

    Drafts are numbered in the order in which they are made; the token before the first one of a request that brings its own
    prefix has its position as its number. `start` is the number of tokens[0], parents[i] that of the token before tokens[i].
    `parents` empty: each follows the one before, and in a chain numbers are positions.
    """

    attempt: int
    start: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...] = ()
    drafter: int = 0


@dataclass(frozen=True, slots=True)
class DraftEnded:
    """The draft attempt is over, for whatever reason. `complete` is false if it stopped before its count.

    `held` is set if it ended because the drafter holds only so many tokens of the prefix that the attempt assumed.
    """

    attempt: int
    complete: bool
    held: int | None = None
    drafter: int = 0


@dataclass(frozen=True, slots=True)
class DraftsLate:
    """What waits for drafts has waited too long: the drafter may hang, or read a long prompt."""


@dataclass(frozen=True, slots=True)
class VerificationFinished:
    """The target's own tokens from `start` on: up to the first that differs from what was verified, or one beyond.

    With `more` the server has not finished: it has begun by itself, as StartVerify allowed, with the token that follows these.
    """

    attempt: int
    server: int
    start: int
    tokens: tuple[int, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class VerificationAbandoned:
    """The verification ended without a result: cancelled, or failed. The server is idle again.

    `held` is set if the server holds only so many tokens of the prefix that the attempt assumed.
    """

    attempt: int
    server: int
    held: int | None = None


@dataclass(frozen=True, slots=True)
class PolicyChanged:
    """From now on plan like this. What runs goes on."""

    policy: Policy


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Nobody wants the rest of this generation."""


Event: TypeAlias = (
    ServerJoined
    | ServerLost
    | DrafterJoined
    | DrafterLost
    | DraftsArrived
    | DraftEnded
    | DraftsLate
    | VerificationFinished
    | VerificationAbandoned
    | PolicyChanged
    | CancelRequested
)
