"""What was drafted in one generation, as a tree: read from the events and actions of its core.

Drafts are numbered in the order in which they are made (DraftsArrived). So whoever wants to know at which position a draft
stands, and whether on the main path or on a branch, has to follow the requests: this module does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from enum import Enum


class Came(Enum):
    """How a token of the text came."""

    #: The drafter's first choice was right.
    ACCEPTED = "accepted"
    #: An alternative was right: its branch became the main path.
    ALTERNATIVE = "alternative"
    #: No draft was right, or there was none: the token is the target's own.
    OWN = "own"


class Guess:
    """A token at a position of the text, drafted or not."""

    __slots__ = ("block", "came", "children", "main", "position", "token")

    def __init__(self, token: int, position: int, *, main: bool, block: int | None = None) -> None:
        self.token = token
        self.position = position
        self.children: dict[int, Guess] = {}
        #: The block of drafts that it came in, counted from 0. None: its drafter was told this token before it guessed it.
        self.block = block
        #: Whether it stood on its drafter's own main path when it was made. The others stand on branches.
        self.main = main
        #: How the text came to have it; None: the text does not have it, or not yet.
        self.came: Came | None = None


class _Drafter:
    """What the numbers of one drafter's drafts mean."""

    def __init__(self) -> None:
        self.numbered: list[Guess] = []
        self.first_number = 0
        #: Live draft attempts.
        self.attempts: set[int] = set()
        #: What its main path is, from the last token of the prompt on.
        self.path: list[Guess] = []
        #: Numbers behind which it has guessed something.
        self.followed: set[int] = set()

    def go_along(self, token: int) -> None:
        """Its main path goes on with this token."""
        before = self.path[-1]
        guess = before.children.get(token)
        if guess is None:
            guess = before.children[token] = Guess(token, before.position + 1, main=True)
        guess.main = True
        self.path.append(guess)


class Drafts:
    """The tree of all drafts of one generation, of all drafters, those that turned out wrong among them."""

    def __init__(self) -> None:
        #: The last token of the prompt: everything hangs from there. None: nothing was seen yet.
        self.first: Guess | None = None
        #: Blocks that came and fitted.
        self.blocks = 0
        #: The last committed token.
        self._root: Guess | None = None
        self._drafters: defaultdict[int, _Drafter] = defaultdict(_Drafter)

    @property
    def front(self) -> int:
        """One past the last committed position."""
        return 0 if self._root is None else self._root.position + 1

    def follows(self, drafter: int) -> bool:
        """Whether it is known what the numbers of its drafts mean: not before the first request that was seen whole."""
        return bool(self._drafters[drafter].numbered)

    def requested(self, attempt: int, base: int, tokens: Sequence[int], start: int, drafter: int = 0) -> None:
        """A StartDraft."""
        if self.first is None and start <= base + len(tokens):
            self._begin(start)
        told = self._drafters[drafter]
        if start <= base + len(tokens):  # it begins a new numbering, and ends the requests before it
            assert self.first is not None
            behind = self.first.position + 1  # of the prompt
            if len(told.path) <= max(0, base - behind):  # what it was told before was not seen
                told.path = self._settled()
            del told.path[max(0, base - behind) + 1 :]
            for token in tokens[max(0, behind - base) :]:
                told.go_along(token)
            told.numbered, told.first_number = [told.path[-1]], start - 1
            told.followed.clear()
            told.attempts.clear()
        told.attempts.add(attempt)

    def cancelled(self, attempt: int, drafter: int = 0) -> None:
        """A CancelDrafts."""
        told = self._drafters[drafter]
        told.attempts = {live for live in told.attempts if live > attempt}

    def arrived(
        self, attempt: int, start: int, tokens: Sequence[int], parents: Sequence[int], drafter: int = 0
    ) -> list[Guess] | None:
        """A DraftsArrived. Returns the drafts that are new; None if the block came too late or does not fit."""
        told = self._drafters[drafter]
        if attempt not in told.attempts or start != told.first_number + len(told.numbered):
            return None
        new: list[Guess] = []
        self.blocks += 1
        for number, token in enumerate(tokens, start):
            before = parents[number - start] if parents else number - 1
            if not told.first_number <= before < number:
                break
            parent = told.numbered[before - told.first_number]
            on_main_path = parent is told.path[-1] and before not in told.followed
            told.followed.add(before)
            guess = parent.children.get(token)
            if guess is None:
                guess = Guess(token, parent.position + 1, main=False, block=self.blocks - 1)
                parent.children[token] = guess
                new.append(guess)
            told.numbered.append(guess)
            if on_main_path:
                guess.main = True
                told.path.append(guess)
        return new

    def committed(
        self, start: int, tokens: Sequence[int], accepted: Sequence[bool], alternatives: Collection[int]
    ) -> tuple[list[Guess], bool]:
        """An EmitTokens. Returns the tokens, and whether the last one is a correction: there were drafts, and all were wrong."""
        if self._root is None or self._root.position != start - 1:
            self._begin(start)
        corrected, settled = False, list[Guess]()
        for position, (token, was_drafted) in enumerate(zip(tokens, accepted, strict=True), start):
            assert self._root is not None
            beside = self._root.children
            guess = beside.get(token)
            corrected = not was_drafted and any(each.block is not None for each in beside.values())
            if guess is None:
                guess = beside[token] = Guess(token, position, main=True)
            guess.came = Came.OWN
            if was_drafted:
                guess.came = Came.ALTERNATIVE if position in alternatives else Came.ACCEPTED
            self._root = guess
            settled.append(guess)
        return settled, corrected

    def _begin(self, start: int) -> None:
        """Everything before position `start` is given. What was seen of it is of no use: something was missed."""
        self.first = self._root = Guess(0, start - 1, main=True)
        self._drafters.clear()

    def _settled(self) -> list[Guess]:
        """The last token of the prompt, and the committed tokens behind it."""
        guess, path = self.first, list[Guess]()
        while guess is not None:
            path.append(guess)
            guess = next((child for child in guess.children.values() if child.came is not None), None)
        return path
