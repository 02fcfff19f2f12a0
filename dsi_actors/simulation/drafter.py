"""A drafter of drafts that cost nothing to compute: the main path, and branches that leave it where an alternative stands.

The simulator lets it take a step whenever a drafted token's time is over. Alternatives leave the main path only: each token of
the main path gets one. As many branches as a step has rows for are continued, those that left earliest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Guesses(Protocol):
    """What a drafter says. `tokens` is the whole text before; it may be looked at, not kept."""

    def draft(self, tokens: Sequence[int]) -> int:
        """The drafter's first choice after `tokens`."""

    def alternative(self, tokens: Sequence[int]) -> int:
        """Its second choice, another token."""


@dataclass(slots=True)
class _Branch:
    """Tokens that follow the first `fork` tokens of the main path. `number` is that of the last one."""

    fork: int
    tokens: list[int]
    number: int


class SimulatedDrafter:
    """The drafts of one generation, numbered as DraftsArrived has them."""

    def __init__(self, guesses: Guesses) -> None:
        self._guesses = guesses
        #: The main path with everything before it.
        self.tokens: list[int] = []
        self._branches: list[_Branch] = []
        self._main_number = self._next_number = 0
        #: Drafts since the last report: tokens and the numbers of those before them.
        self._fresh: list[int] = []
        self._parents: list[int] = []

    def go_on(self, base: int, tokens: Sequence[int], end: int) -> bool:
        """`tokens` stand behind the first `base` ones. True if they lead down a branch, or along the main path: then what is
        known beyond them, up to position `end`, stays, and is reported first."""
        start = base + len(tokens)
        tail = self._known_behind(base, list(tokens))
        self.tokens[base:] = tokens if tail is None else tail[: max(end, start) - base]
        self._branches.clear()
        self._fresh, self._parents = self.tokens[start:], list(range(start - 1, len(self.tokens) - 1))
        self._next_number = len(self.tokens)
        self._main_number = self._next_number - 1
        return tail is not None

    def step(self, rows: int, committed: int) -> None:
        """One more token of the main path, and of as many branches as `rows` allow besides."""
        if rows > 1:
            self._branches = [branch for branch in self._branches if branch.fork >= committed]
        continued = self._branches[: rows - 1]
        token = self._guesses.draft(self.tokens)
        fork, fork_number = len(self.tokens), self._main_number
        alternative = self._guesses.alternative(self.tokens) if rows > 1 else None
        self._main_number = self._add(token, fork_number)
        for branch in continued:
            tail, self.tokens[branch.fork :] = self.tokens[branch.fork :], branch.tokens
            branch.tokens.append(self._guesses.draft(self.tokens))
            self.tokens[branch.fork :] = tail
            branch.number = self._add(branch.tokens[-1], branch.number)
        self.tokens.append(token)
        if alternative is not None:
            self._branches.append(_Branch(fork, [alternative], self._add(alternative, fork_number)))

    def report(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """(number of the first, tokens, parents) of what is new; a chain has no parents."""
        tokens, parents, self._fresh, self._parents = tuple(self._fresh), tuple(self._parents), [], []
        first = self._next_number - len(tokens)
        chain = parents == tuple(range(first - 1, first - 1 + len(tokens)))
        return first, tokens, () if chain else parents

    def _add(self, token: int, parent: int) -> int:
        self._fresh.append(token)
        self._parents.append(parent)
        self._next_number += 1
        return self._next_number - 1

    def _known_behind(self, base: int, tokens: list[int]) -> list[int] | None:
        """Of a text that begins with the first `base` tokens of the main path and then `tokens`: all behind `base`."""
        branches = (branch for branch in self._branches if branch.fork >= base)
        tails = (self.tokens[base:], *([*self.tokens[base : branch.fork], *branch.tokens] for branch in branches))
        return next((tail for tail in tails if tail[: len(tokens)] == tokens), None)
