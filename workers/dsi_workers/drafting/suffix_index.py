"""Finds earlier occurrences of the last few tokens of a text. The tokens that followed then may follow again.

This is prompt lookup (Saxena 2023). It needs no model, and takes a few microseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from dsi_workers.session import Session

#: Numbers of tokens to look for, longest first. A single token predicts too little.
SUFFIX_LENGTHS = (4, 2)
#: The most occurrences that an index holds.
_MOST_PLACES = 1 << 17
#: The last tokens of a text whose index entries can be removed again. More than can be drafted ahead, and so rejected.
_MOST_REVERSIBLE = 1024
#: Tokens of a new text that are read in one call. This takes about 20 ms, during which no cancel is noticed.
READ_AT_ONCE = 8192
#: The most occurrences of one suffix: what followed the earlier ones are alternatives.
_MOST_OF_ONE = 4

#: The text in which a suffix occurs, and the position after the suffix.
_Occurrence = tuple[list[int], int]
_Occurrences = tuple[_Occurrence, ...]


class SuffixIndex:
    """Maps short sequences of tokens to their latest occurrence. Drops the oldest entries when it is full."""

    def __init__(self, most_places: int = _MOST_PLACES) -> None:
        self._most = most_places
        #: Occurrences by suffix, the latest first, in two halves: when the younger half is full, the older half is dropped.
        self._young: dict[tuple[int, ...], _Occurrences] = {}
        self._old: dict[tuple[int, ...], _Occurrences] = {}

    def add(self, suffix: tuple[int, ...], occurrence: _Occurrence) -> _Occurrences:
        """Add an occurrence of the suffix. Returns the occurrences before."""
        before = self._young.get(suffix, ())
        self._young[suffix] = (occurrence, *before[: _MOST_OF_ONE - 1])
        if len(self._young) > self._most // 2:
            self._old, self._young = self._young, {}
        return before

    def remove(self, suffix: tuple[int, ...], occurrence: _Occurrence, before: _Occurrences) -> None:
        """Undo `add`: remove the occurrence and restore the ones before, as returned by `add`."""
        for half in (self._young, self._old):
            if suffix in half and half[suffix][0] is occurrence:
                if before:
                    half[suffix] = before
                else:
                    del half[suffix]

    def find(self, text: Sequence[int], most: int) -> tuple[list[int], int]:
        """Return up to `most` tokens that may follow `text`, and the length of the suffix that matched.

        Returns ([], 0) if there is no match.
        """
        for length in SUFFIX_LENGTHS:
            for source, position in self._occurrences(text, length)[:1]:
                if follows := source[position : position + most]:
                    return follows, length
        return [], 0

    def find_next(self, text: Sequence[int]) -> list[int]:
        """Return the different tokens that may follow `text`, best first: the first is the one of `find`."""
        found: dict[int, None] = {}
        for length in SUFFIX_LENGTHS:
            for source, position in self._occurrences(text, length):
                found |= dict.fromkeys(source[position : position + 1])
        return list(found)

    def _occurrences(self, text: Sequence[int], length: int) -> list[_Occurrence]:
        """Return where the last `length` tokens of the text occur, the latest first."""
        suffix = tuple(text[-length:])
        # The tokens there may have changed since: entries older than _MOST_REVERSIBLE tokens are not removed.
        return [
            (source, position)
            for source, position in self._young.get(suffix) or self._old.get(suffix) or ()
            if len(suffix) == length and tuple(source[position - length : position]) == suffix
        ]


class Text:
    """The text of a session, whose tokens are in an index. The end of the text may be replaced at any time.

    The text of a drafter contains many drafts that are rejected later. Their entries are removed from the index, because they
    would hide earlier occurrences.
    """

    def __init__(self, index: SuffixIndex, session: Session) -> None:
        self.index = index
        self.session = session
        #: The tokens that are in the index: the session's own, as they were at `_revision`.
        self._tokens: list[int] = []
        self._revision = session.revision
        #: For each of the last tokens: the index entries that it added (suffix, occurrence, occurrences before).
        self._added: deque[list[tuple[tuple[int, ...], _Occurrence, _Occurrences]]] = deque(maxlen=_MOST_REVERSIBLE)

    def read(self) -> bool:
        """Bring the index in line with the session's tokens. The time depends on how many have changed.

        One call reads at most READ_AT_ONCE new tokens. Returns False if there are more: then call again.
        """
        known, tokens = self._tokens, self.session.tokens
        keeps = min(len(known), self.session.unchanged_since(self._revision))
        self._revision = self.session.revision
        while len(known) > keeps:
            known.pop()
            for suffix, occurrence, before in reversed(self._added.pop() if self._added else []):
                self.index.remove(suffix, occurrence, before)
        for token in tokens[keeps : keeps + READ_AT_ONCE]:
            position = len(known)
            added = []
            for length in SUFFIX_LENGTHS:
                if length <= position:
                    suffix, occurrence = tuple(known[position - length :]), (known, position)
                    added.append((suffix, occurrence, self.index.add(suffix, occurrence)))
            self._added.append(added)
            known.append(token)
        return len(known) == len(tokens)


class Texts:
    """The texts of all generations of one worker.

    With `remember`, a generation finds matches in the texts of all generations, including ended ones. Without it, only in its
    own text.
    """

    def __init__(self, *, remember: bool) -> None:
        self._shared = SuffixIndex() if remember else None
        self._texts: dict[int, Text] = {}

    def find(self, session: Session, most: int) -> tuple[list[int], int]:
        """Like SuffixIndex.find, for the session's tokens. Returns ([], 0) while some of the tokens are not read yet."""
        return self._text_of(session).index.find(session.tokens, most) if self.read(session) else ([], 0)

    def find_next(self, session: Session, path: Sequence[int]) -> list[int]:
        """Like SuffixIndex.find_next, for a text that ends with `path`."""
        return self._text_of(session).index.find_next(path)

    def read(self, session: Session) -> bool:
        """Read new tokens of the session. Returns whether all of its tokens are read now."""
        return self._text_of(session).read()

    def _text_of(self, session: Session) -> Text:
        text = self._texts.get(session.generation)
        if text is None or text.session is not session:
            text = self._texts[session.generation] = Text(self._shared or SuffixIndex(), session)
        return text

    def forget(self, session: Session) -> None:
        self._texts.pop(session.generation, None)
