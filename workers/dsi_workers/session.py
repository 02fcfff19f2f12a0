"""What a worker holds of one generation: its tokens, how to name each prefix of them, and how far they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsi_protocol import FromWorker, prefix_checksum
from dsi_workers.draft_tree import DraftTree

#: More than can be queued: see loop.py.
_REMEMBERED_ATTEMPTS = 8192
#: As many as come in the time after which an orchestrator asks again, and more.
_REMEMBERED_REPLIES = 1024


#: Below this temperature the most probable token is taken (SPEC.md section 7).
_LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the tokens of a generation are chosen. The meaning of each is transformers'."""

    temperature: float = 0.0  # below 1e-6 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: bool = False

    @property
    def greedy(self) -> bool:
        """The largest logit, after the penalty."""
        return self.temperature < _LEAST_TEMPERATURE

    @property
    def plain_greedy(self) -> bool:
        """The largest logit, as the model gives it."""
        return self.greedy and self.repetition_penalty == 1

    @property
    def problem(self) -> str:
        """Why no token can be chosen like that: a parameter lies outside of its range (SPEC.md section 7). "" if none does."""
        if not 0 <= self.temperature <= 1000:
            return f"temperature must lie in [0, 1000], not {self.temperature}"
        if not 0 < self.top_p <= 1:
            return f"top_p must lie in (0, 1], not {self.top_p}"
        if not 0 <= self.min_p <= 1:
            return f"min_p must lie in [0, 1], not {self.min_p}"
        if not 0.001 <= self.repetition_penalty <= 1000:
            return f"repetition_penalty must lie in [0.001, 1000], not {self.repetition_penalty}"
        return ""


class Occurrences:
    """Which token ids the first `length` tokens of a text have. Costs as much as the text changes, however long it is."""

    def __init__(self) -> None:
        self.length = 0
        self._counts: dict[int, int] = {}
        #: Ids whose count changed since `changes` was last asked.
        self._changed: set[int] = set()

    def move_to(self, tokens: Sequence[int], length: int) -> None:
        """Count the first `length` of these tokens. Those that are counted already must still stand there."""
        while self.length < length:
            self._count(tokens[self.length], 1)
            self.length += 1
        while self.length > length:
            self.length -= 1
            self._count(tokens[self.length], -1)

    def changes(self) -> tuple[list[int], list[int]]:
        """Ids that occur and ids that do not, of those that may have changed since this was last asked."""
        changed, self._changed = self._changed, set()
        return [token for token in changed if token in self._counts], [
            token for token in changed if token not in self._counts
        ]

    def _count(self, token: int, more: int) -> None:
        self._changed.add(token)
        count = self._counts.pop(token, 0) + more
        if count:
            self._counts[token] = count


class Session:
    """Tokens of one generation on this worker. Positions are absolute, the prompt first."""

    def __init__(
        self, generation: int, prompt_length: int, correlation: str, sampling: SamplingParameters | None = None
    ) -> None:
        self.sampling = sampling if sampling is not None else SamplingParameters()
        self.generation = generation
        self.prompt_length = prompt_length
        self.correlation = correlation
        self.tokens: list[int] = []
        #: Of the tokens, as far as whoever needs it has counted.
        self.occurrences: Occurrences | None = None
        #: The engine has computed positions [0, computed): for a transformer, its KV cache is right that far.
        self.computed = 0
        #: Of a drafter: what was drafted and not told yet.
        self.drafts = DraftTree()
        #: Requests of this attempt or an earlier one are not wanted.
        self.cancelled_to = 0
        #: _checksums[n] is the checksum of tokens[:n], as far as it was asked for.
        self._checksums = [0]
        self._seen: dict[int, None] = {}  # in the order of arrival
        #: The last terminal replies: a request that comes again after its reply gets it again, since that may be lost.
        self._replies: dict[int, FromWorker] = {}

    def remember(self, attempt: int, reply: FromWorker) -> None:
        """This was the terminal reply to the request `attempt`."""
        self._replies[attempt] = reply
        if len(self._replies) > _REMEMBERED_REPLIES:
            del self._replies[next(iter(self._replies))]

    def reply_to(self, attempt: int) -> FromWorker | None:
        """The terminal reply that the request `attempt` got, if it is remembered."""
        return self._replies.get(attempt)

    def is_new(self, attempt: int) -> bool:
        """False for a request that came before: a frame may be delivered twice, the work is done once."""
        if attempt in self._seen:
            return False
        self._seen[attempt] = None
        if len(self._seen) > _REMEMBERED_ATTEMPTS:
            del self._seen[next(iter(self._seen))]
        return True

    def holds(self, length: int, checksum: int) -> bool:
        """Whether the first `length` tokens here are those that the peer means."""
        return length <= len(self.tokens) and self.checksum(length) == checksum

    def write(self, base: int, tokens: Sequence[int]) -> None:
        """Let `tokens` stand at [base, base + len(tokens)). What is here beyond stays only if nothing changed before it.

        `base` must not lie beyond what is here."""
        assert base <= len(self.tokens)
        for offset, token in enumerate(tokens):
            if base + offset == len(self.tokens) or self.tokens[base + offset] != token:
                self.truncate(base + offset)
                self.tokens.extend(tokens[offset:])
                return

    def truncate(self, length: int) -> None:
        if length < len(self.tokens):
            if self.occurrences is not None and self.occurrences.length > length:
                self.occurrences.move_to(self.tokens, length)
            del self.tokens[length:]
            del self._checksums[length + 1 :]
            self.computed = min(self.computed, length)

    def checksum(self, length: int) -> int:
        """Of the first `length` tokens, which must be here."""
        known = len(self._checksums) - 1
        while known < length:
            self._checksums.append(prefix_checksum((self.tokens[known],), self._checksums[known]))
            known += 1
        return self._checksums[length]
