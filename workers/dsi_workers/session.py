"""What a worker holds of one generation: its tokens, how to name each prefix of them, and how far they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsi_protocol import FromWorker, prefix_checksum

#: More than can be queued: see loop.py.
_REMEMBERED_ATTEMPTS = 8192
#: As many as come in the time after which an orchestrator asks again, and more.
_REMEMBERED_REPLIES = 1024


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the tokens of a generation are chosen. The meaning of each is transformers'."""

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: bool = False

    @property
    def plain_greedy(self) -> bool:
        """The largest logit, as the model gives it."""
        return self.temperature == 0 and self.repetition_penalty == 1


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
        #: The engine has computed positions [0, computed): for a transformer, its KV cache is right that far.
        self.computed = 0
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
        return length <= len(self.tokens) and self._checksum(length) == checksum

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
            del self.tokens[length:]
            del self._checksums[length + 1 :]
            self.computed = min(self.computed, length)

    def _checksum(self, length: int) -> int:
        known = len(self._checksums) - 1
        while known < length:
            self._checksums.append(prefix_checksum((self.tokens[known],), self._checksums[known]))
            known += 1
        return self._checksums[length]
