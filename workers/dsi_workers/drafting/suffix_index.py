"""Where the last few tokens of a text stood before, in it or in a text of earlier: what followed them may follow again
(prompt lookup, Saxena 2023). It needs no model, and no more than a few microseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from dsi_workers.session import Session

#: Lengths of what is looked for, longest first. One token alone says little.
LENGTHS = (4, 2)
_MOST_PLACES = 1 << 17
#: Of one suffix, so many of its places: what followed it at the earlier ones are alternatives.
_PLACES_OF_ONE = 4
#: Tokens at the end of a text that may be rejected: what is drafted ahead, and more.
_MAY_GO = 1024
#: Tokens of a new text that are read at once: 20 ms or so, in which nobody looks for a cancel.
READ_AT_ONCE = 8192

#: The text in which some tokens stood, and the position that followed.
_Place = tuple[list[int], int]
_Places = tuple[_Place, ...]


class SuffixIndex:
    """Of texts that grow, and may lose their end. What was added first is forgotten first."""

    def __init__(self, most_places: int = _MOST_PLACES) -> None:
        self._most = most_places
        #: From the last tokens to where they stood, the latest place first. Two halves: when the younger is full the older is
        #: dropped.
        self._young: dict[tuple[int, ...], _Places] = {}
        self._old: dict[tuple[int, ...], _Places] = {}

    def put(self, suffix: tuple[int, ...], place: _Place) -> _Places:
        """The suffix stands there, too. Returns where it stood before."""
        before = self._young.get(suffix, ())
        self._young[suffix] = (place, *before[: _PLACES_OF_ONE - 1])
        if len(self._young) > self._most // 2:
            self._old, self._young = self._young, {}
        return before

    def take_back(self, suffix: tuple[int, ...], place: _Place, before: _Places) -> None:
        """It does not stand there any more; what stood before is found again."""
        for half in (self._young, self._old):
            if suffix in half and half[suffix][0] is place:
                if before:
                    half[suffix] = before
                else:
                    del half[suffix]

    def find(self, text: Sequence[int], most: int) -> tuple[list[int], int]:
        """Up to `most` tokens that may follow `text`, and how many tokens before them are the same; none: [], 0."""
        for length in LENGTHS:
            for source, position in self._places(text, length)[:1]:
                if follows := source[position : position + most]:
                    return follows, length
        return [], 0

    def find_next(self, text: Sequence[int]) -> list[int]:
        """Different tokens that may follow `text`, best first: the first is the one of `find`."""
        found: dict[int, None] = {}
        for length in LENGTHS:
            for source, position in self._places(text, length):
                found |= dict.fromkeys(source[position : position + 1])
        return list(found)

    def _places(self, text: Sequence[int], length: int) -> list[_Place]:
        """Where the last `length` tokens of the text stood before, the latest place first."""
        suffix = tuple(text[-length:])
        places = self._young.get(suffix) or self._old.get(suffix) or ()
        # What was taken back long ago may still be named: then other tokens stand there.
        return [
            (source, position)
            for source, position in places
            if len(suffix) == length and tuple(source[position - length : position]) == suffix
        ]


class Text:
    """A text as an index knows it. A drafter's texts are full of guesses that were rejected: those leave no trace, or they
    would hide what stood there before."""

    def __init__(self, index: SuffixIndex) -> None:
        self.index = index
        self._tokens: list[int] = []
        #: Of the last tokens: what each of them added.
        self._added: deque[list[tuple[tuple[int, ...], _Place, _Places]]] = deque(maxlen=_MAY_GO)

    def become(self, tokens: Sequence[int]) -> bool:
        """The text is `tokens` now. False if there are so many new ones that only a part of them was read: call again."""
        known = self._tokens
        keeps = _common(known, tokens)
        while len(known) > keeps:
            known.pop()
            for suffix, place, before in reversed(self._added.pop() if self._added else []):
                self.index.take_back(suffix, place, before)
        for token in tokens[keeps : keeps + READ_AT_ONCE]:
            position = len(known)
            added = []
            for length in LENGTHS:
                if length <= position:
                    suffix, place = tuple(known[position - length :]), (known, position)
                    added.append((suffix, place, self.index.put(suffix, place)))
            self._added.append(added)
            known.append(token)
        return len(known) == len(tokens)


class Texts:
    """The texts of the generations of one worker. With `remember` each is looked for in all of them, also in those that are
    over; without it only in itself."""

    def __init__(self, *, remember: bool) -> None:
        self._shared = SuffixIndex() if remember else None
        self._texts: dict[int, Text] = {}

    def find(self, session: Session, most: int) -> tuple[list[int], int]:
        """As SuffixIndex.find, for what may follow the session's tokens. Nothing while they are not all read."""
        return self._text_of(session).index.find(session.tokens, most) if self.read(session) else ([], 0)

    def find_next(self, session: Session, path: Sequence[int]) -> list[int]:
        """As SuffixIndex.find_next, for what may follow `path`, of which the last tokens suffice."""
        return self._text_of(session).index.find_next(path)

    def read(self, session: Session) -> bool:
        """Read what is new of the session's tokens; whether all are read now."""
        return self._text_of(session).become(session.tokens)

    def _text_of(self, session: Session) -> Text:
        text = self._texts.get(session.generation)
        if text is None:
            text = self._texts[session.generation] = Text(self._shared or SuffixIndex())
        return text

    def forget(self, session: Session) -> None:
        self._texts.pop(session.generation, None)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens at the beginning are the same: few comparisons of long pieces, which cost less than one of each."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:  # the first `low` are the same, the first `high` are not
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
