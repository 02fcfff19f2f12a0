"""A worker's state of one generation: its tokens, the checksum of each prefix, and how many positions are computed.

Whoever keeps something that was made of the tokens, such as an index, asks `Session.unchanged_since` how many of them are
still the same. So nobody compares whole texts, and a token costs no more in a long text than in a short one.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from dsi_protocol import Draft, FromWorker, SamplingParameters, prefix_checksum
from dsi_workers.draft_tree import DraftTree

#: The last attempts that are remembered, to detect duplicates. More than can be queued (MAX_QUEUED_REQUESTS in loop.py).
_REMEMBERED_ATTEMPTS = 8192
#: The last replies that are remembered. More than a worker sends before an orchestrator repeats a request.
_REMEMBERED_REPLIES = 1024


class Occurrences:
    """Counts the token ids at positions [begin, length) of a text.

    The cost depends on how much the text changes, not on its length.
    """

    def __init__(self, begin: int = 0) -> None:
        self._begin = begin
        self.length = begin
        self._counts: dict[int, int] = {}
        #: Ids whose count changed since the last call of `changes`.
        self._changed: set[int] = set()

    def move_to(self, tokens: Sequence[int], length: int) -> None:
        """Count the tokens before position `length`. Tokens that are already counted must not have changed."""
        length = max(length, self._begin)
        while self.length < length:
            self._count(tokens[self.length], 1)
            self.length += 1
        while self.length > length:
            self.length -= 1
            self._count(tokens[self.length], -1)

    def changes(self) -> dict[int, int]:
        """How often each id occurs, of the ids whose count changed since the last call."""
        changed, self._changed = self._changed, set()
        return {token: self._counts.get(token, 0) for token in changed}

    def _count(self, token: int, more: int) -> None:
        self._changed.add(token)
        count = self._counts.pop(token, 0) + more
        if count:
            self._counts[token] = count


class Session:
    """The tokens of one generation on this worker. Positions are absolute and begin with the prompt."""

    def __init__(
        self, generation: int, prompt_length: int, correlation: str, sampling: SamplingParameters | None = None
    ) -> None:
        self.sampling = sampling if sampling is not None else SamplingParameters()
        self.generation = generation
        self.prompt_length = prompt_length
        self.correlation = correlation
        self.tokens: list[int] = []
        #: How often tokens were removed.
        self.revision = 0
        #: (revision, number of tokens left) of removals, without those that a later one went below. So both numbers rise.
        self._cuts: list[tuple[int, int]] = []
        #: Counts of the tokens, for samplers with penalties. They are kept up to date when tokens are removed.
        self.counters: list[Occurrences] = []
        #: The engine has computed positions [0, computed). A transformer's KV cache is valid for these.
        self.computed = 0
        #: Positions that were not computed for this session, because the KV cache had them.
        self.reused = 0
        #: On a drafter: drafts that are not sent yet.
        self.drafts = DraftTree()
        #: Requests with this attempt number or a smaller one are cancelled.
        self.cancelled_to = 0
        #: _checksums[n] is the checksum of tokens[:n]. Computed only as far as needed.
        self._checksums = [0]
        #: Attempts that have arrived, in the order of arrival.
        self._seen: dict[int, None] = {}
        #: The last terminal replies by attempt. A repeated request gets its reply again, because the first may be lost.
        self._replies: dict[int, FromWorker] = {}

    def remember(self, attempt: int, reply: FromWorker) -> None:
        """Remember the terminal reply to the request `attempt`."""
        self._replies[attempt] = reply
        if len(self._replies) > _REMEMBERED_REPLIES:
            del self._replies[next(iter(self._replies))]

    def reply_to(self, attempt: int) -> FromWorker | None:
        """The terminal reply to the request `attempt`, or None if it has none or is no longer remembered."""
        return self._replies.get(attempt)

    def is_new(self, attempt: int) -> bool:
        """Return False if this attempt arrived before: a frame may be delivered twice, but its work is done once."""
        if attempt in self._seen:
            return False
        self._seen[attempt] = None
        if len(self._seen) > _REMEMBERED_ATTEMPTS:
            del self._seen[next(iter(self._seen))]
        return True

    def holds(self, length: int, checksum: int) -> bool:
        """True if there are at least `length` tokens, and the first `length` of them have this checksum."""
        return length <= len(self.tokens) and self.checksum(length) == checksum

    def has_drafted(self, request: Draft) -> bool:
        """True if the main path, or a branch of it, holds the tokens of `request` already."""
        if not self.holds(request.base, request.base_crc):
            return False
        tokens, end = list(request.tokens), request.base + len(request.tokens)
        return (
            self.tokens[request.base : end] == tokens
            or self.drafts.leading_to(request.base, tokens, self.tokens) is not None
        )

    def write(self, base: int, tokens: Sequence[int]) -> None:
        """Write `tokens` to positions [base, base + len(tokens)). Later tokens are kept only if no written token differs.

        `base` must be at most the number of tokens.
        """
        assert base <= len(self.tokens)
        for offset, token in enumerate(tokens):
            if base + offset == len(self.tokens) or self.tokens[base + offset] != token:
                self.truncate(base + offset)
                self.tokens.extend(tokens[offset:])
                return

    def truncate(self, length: int) -> None:
        """Remove all tokens from position `length` on."""
        if length < len(self.tokens):
            for counter in self.counters:
                if counter.length > length:
                    counter.move_to(self.tokens, length)
            self.revision += 1
            while self._cuts and self._cuts[-1][1] >= length:
                self._cuts.pop()
            self._cuts.append((self.revision, length))
            del self.tokens[length:]
            del self._checksums[length + 1 :]
            self.computed = min(self.computed, length)

    def unchanged_since(self, revision: int) -> int:
        """How many of the first tokens are the same as when `self.revision` had this value, of those that there were then.

        All tokens that are there now, if none was removed since. The time grows with the logarithm of the number of removals.
        """
        later = bisect.bisect_right(self._cuts, revision, key=_revision_of)
        return self._cuts[later][1] if later < len(self._cuts) else len(self.tokens)

    def checksum(self, length: int) -> int:
        """The checksum of the first `length` tokens, all of which must exist."""
        known = len(self._checksums) - 1
        while known < length:
            self._checksums.append(prefix_checksum((self.tokens[known],), self._checksums[known]))
            known += 1
        return self._checksums[length]


def _revision_of(cut: tuple[int, int]) -> int:
    return cut[0]
