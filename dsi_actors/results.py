"""What a generation yields and what it cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass


class CommittedTokens(tuple[int, ...]):
    """Token ids that are settled, in order. `accepted[i]` tells whether token i had been drafted."""

    accepted: tuple[bool, ...]
    #: The target's log probability of each token, if asked for, else empty.
    logprobs: tuple[float, ...]

    def __new__(
        cls, tokens: Iterable[int], accepted: Iterable[bool], logprobs: Iterable[float] = ()
    ) -> CommittedTokens:
        self = super().__new__(cls, tokens)
        self.accepted = tuple(accepted)
        self.logprobs = tuple(logprobs)
        return self


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """One generation after its end. Times are wall clock unless they say busy."""

    algorithm: str
    sp: int  # target servers that it used at most
    lookahead: int
    tokens: int
    finish_reason: str
    #: Per token after the first commit: (end - first commit) / (tokens - tokens of the first commit).
    ms_per_token: float
    first_token_ms: float
    total_ms: float
    #: Of the drafted tokens that were compared with the target's own, the share that was equal.
    acceptance_rate: float
    drafted_tokens: int
    rejections: int
    target_forwards: int
    #: Target forwards of verifications that committed nothing: cancelled, outrun or lost.
    wasted_target_forwards: int
    target_busy_ms: float
    drafter_busy_ms: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)
