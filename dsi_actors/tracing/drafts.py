"""What was drafted in one generation, as a tree: read from the events and actions of its core.

Drafts are numbered in the order in which they are made (DraftsArrived). So whoever wants to know at which position a draft
stands, and whether on the main path or on a branch, has to follow the requests: this module does.
"""

from __future__ import annotations

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
        #: The block of drafts that it came in, counted from 0. None: the drafter was told this token before it guessed it.
        self.block = block
        #: Whether it stood on the drafter's main path when it was made. The others stand on branches.
        self.main = main
        #: How the text came to have it; None: the text does not have it, or not yet.
        self.came: Came | None = None


class Drafts:
    """The tree of all drafts of one generation, those that turned out wrong among them."""

    def __init__(self) -> None:
        #: The last token of the prompt: everything hangs from there. None: nothing was seen yet.
        self.first: Guess | None = None
        #: Blocks that came and fitted.
        self.blocks = 0
        #: The last committed token.
        self._root: Guess | None = None
        self._numbered: list[Guess] = []
        self._first_number = 0
        #: Live draft attempts.
        self._attempts: set[int] = set()
        #: What the drafter's main path is, from `first` on.
        self._path: list[Guess] = []
        #: Numbers behind which the drafter has guessed something.
        self._followed: set[int] = set()

    @property
    def front(self) -> int:
        """One past the last committed position."""
        return 0 if self._root is None else self._root.position + 1

    @property
    def follows(self) -> bool:
        """Whether it is known what the numbers of drafts mean: not before the first request that was seen whole."""
        return bool(self._numbered)

    def requested(self, attempt: int, base: int, tokens: Sequence[int], start: int) -> None:
        """A StartDraft."""
        if start <= base + len(tokens):  # it begins a new numbering, and ends the requests before it
            if self.first is None:
                self._begin(start)
            assert self.first is not None
            behind = self.first.position + 1  # of the prompt
            del self._path[max(0, base - behind) + 1 :]
            for token in tokens[max(0, behind - base) :]:
                self._go_along(token)
            self._numbered, self._first_number = [self._path[-1]], start - 1
            self._followed.clear()
            self._attempts.clear()
        self._attempts.add(attempt)

    def cancelled(self, attempt: int) -> None:
        """A CancelDrafts."""
        self._attempts = {live for live in self._attempts if live > attempt}

    def arrived(self, attempt: int, start: int, tokens: Sequence[int], parents: Sequence[int]) -> list[Guess] | None:
        """A DraftsArrived. Returns the drafts that are new; None if the block came too late or does not fit."""
        if attempt not in self._attempts or start != self._first_number + len(self._numbered):
            return None
        new: list[Guess] = []
        self.blocks += 1
        for number, token in enumerate(tokens, start):
            before = parents[number - start] if parents else number - 1
            if not self._first_number <= before < number:
                break
            parent = self._numbered[before - self._first_number]
            on_main_path = parent is self._path[-1] and before not in self._followed
            self._followed.add(before)
            guess = parent.children.get(token)
            if guess is None:
                guess = Guess(token, parent.position + 1, main=False, block=self.blocks - 1)
                parent.children[token] = guess
                new.append(guess)
            self._numbered.append(guess)
            if on_main_path:
                guess.main = True
                self._path.append(guess)
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
        self._path, self._numbered = [self.first], []
        self._attempts.clear()

    def _go_along(self, token: int) -> None:
        """The drafter's main path goes on with this token."""
        before = self._path[-1]
        guess = before.children.get(token)
        if guess is None:
            guess = before.children[token] = Guess(token, before.position + 1, main=True)
        guess.main = True
        self._path.append(guess)


def main_path_end(base: int, tokens: Sequence[int], parents: Sequence[int]) -> tuple[int, int]:
    """Of a StartVerify: one past the last position of the main path, and how many tokens stand on branches."""
    main = next((place for place, parent in enumerate(parents) if parent != place), len(tokens))
    return base + main, len(tokens) - main
