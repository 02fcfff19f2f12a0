"""What a generation yields and what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeAlias

#: Tokens with their log probabilities, the most probable first.
TopLogprobs: TypeAlias = tuple[tuple[int, float], ...]


class CommittedTokens(tuple[int, ...]):
    """Token ids that are settled, in order. `accepted[i]` tells whether token i had been drafted, `by_alternative[i]` whether
    the draft that had it was an alternative, not the drafter's first choice."""

    accepted: tuple[bool, ...]
    by_alternative: tuple[bool, ...]
    #: The target's log probability of each token, if asked for, else empty.
    logprobs: tuple[float, ...]
    #: For each token the most probable tokens at its position, most probable first, with their log probabilities, if asked for.
    top_logprobs: tuple[TopLogprobs, ...]

    def __new__(
        cls, tokens: Iterable[int], accepted: Iterable[bool], logprobs: Iterable[float] = (),
        by_alternative: Iterable[bool] = (), top_logprobs: Iterable[TopLogprobs] = (),
    ) -> CommittedTokens:  # fmt: skip
        self = super().__new__(cls, tokens)
        self.accepted = tuple(accepted)
        self.logprobs = tuple(logprobs)
        self.top_logprobs = tuple(top_logprobs)
        self.by_alternative = tuple(by_alternative) or (False,) * len(self)
        return self


@dataclass(frozen=True, slots=True)
class TextScores:
    """How probable a text is, as the target has it before any sampling parameter. Of each token but the first."""

    #: The log probability of each token after the tokens before it.
    logprobs: tuple[float, ...] = ()
    #: The most probable tokens in its place, if asked for.
    top_logprobs: tuple[TopLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """What a generation met, in order: what `dsi-actors simulate --trace` replays. Empty: not known."""

    target_ms: Sequence[float] = ()  # of each verification that was not cancelled
    drafter_ms: Sequence[float] = ()  # of each drafted token
    accepted: Sequence[bool] = ()  # of each draft that was compared with the target's own: whether it was equal


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
    #: The drafter, as the configuration calls it: of several the last one, or those that drafted together at the end, the leader
    #: first, with " & " between them. Empty if nothing was drafted.
    drafter: str
    drafted_tokens: int
    #: Corrections: the target's token was neither the drafter's first choice nor an alternative.
    rejections: int
    #: Tokens that came by an alternative; and of rejected first choices with an alternative beside them, the share of these.
    alternatives: int
    alternative_rate: float
    target_forwards: int
    #: Target forwards of verifications that committed nothing: cancelled, outrun or lost. A forward that a server began by
    #: itself behind a stop token is among them.
    wasted_target_forwards: int
    target_busy_ms: float
    drafter_busy_ms: float
    #: Positions of the prompt that the target server did not read again, since an earlier generation had left them there.
    cached_tokens: int = 0
    #: The last few thousand of each.
    trace: Trace = field(default=Trace(), repr=False)

    def as_dict(self) -> dict[str, object]:
        """All but the trace."""
        return {name: value for name, value in asdict(self).items() if name != "trace"}


class Answer(str):
    """The text of an answer, and what is known of it."""

    #: Up to and including the one that completed a stop string, or is a stop token.
    token_ids: tuple[int, ...]
    #: The target's log probability of each token, if asked for, else empty.
    logprobs: tuple[float, ...]
    #: stop, or length if max_tokens ended it.
    finish_reason: str
    report: GenerationReport

    def __new__(
        cls, text: str, token_ids: Iterable[int], logprobs: Iterable[float], finish_reason: str, report: GenerationReport
    ) -> Answer:  # fmt: skip
        self = super().__new__(cls, text)
        self.token_ids, self.logprobs = tuple(token_ids), tuple(logprobs)
        self.finish_reason, self.report = finish_reason, report
        return self
