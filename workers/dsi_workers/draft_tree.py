"""What a drafter has drafted for one generation and not told yet: tokens of the main path and of branches, with their numbers."""

from __future__ import annotations

from collections.abc import Sequence

from dsi_workers.tree import Branch


class DraftTree:
    """Of the drafts behind the prefix that the orchestrator told last. Numbers are those of Drafted in SPEC.md: in a chain
    they are positions. The main path itself stands in the session."""

    def __init__(self) -> None:
        self.branches: list[Branch] = []
        self._main_number = self._next_number = 0
        self._tokens: list[int] = []
        self._parents: list[int] = []
        #: Of these, tokens of the main path.
        self.unsent = 0

    def restart(self, main_path: Sequence[int], start: int) -> None:
        """The orchestrator knows the main path before position `start`. What is beyond is still to be told."""
        self.branches.clear()
        self._tokens, self._parents = list(main_path[start:]), list(range(start - 1, len(main_path) - 1))
        self.unsent = len(self._tokens)
        self._next_number = len(main_path)
        self._main_number = self._next_number - 1

    def leading_to(self, base: int, tokens: Sequence[int], main_path: Sequence[int]) -> Branch | None:
        """A branch whose text begins with the first `base` tokens of the main path and then `tokens`. The work does not grow with
        the length of the main path."""
        for branch in self.branches:
            length = branch.fork - base  # of the main path's own tokens among `tokens`
            if length < 0:
                continue  # it left the main path before `base`
            along, aside = list(tokens[:length]), list(tokens[length:])
            if main_path[base : branch.fork][: len(tokens)] == along and branch.tokens[: len(aside)] == aside:
                return branch
        return None

    def drop_dead_branches(self, committed: int) -> None:
        """Tokens before position `committed` are settled: what left the main path before it is wrong."""
        self.branches = [branch for branch in self.branches if branch.fork >= committed]

    def drop_branches_beyond(self, length: int) -> None:
        """The main path has only `length` tokens: what left it behind them has lost what it stands on."""
        self.branches = [branch for branch in self.branches if branch.fork <= length]

    def add(
        self, position: int, tokens: Sequence[int], alternatives: Sequence[int | None], branches: Sequence[Branch],
        continued: Sequence[int | None],
    ) -> None:  # fmt: skip
        """What a step drafted: `tokens` of the main path from `position` on, `alternatives` to them, and for each of `branches`
        the token that continues it. None stands for no alternative, and for a branch that is not continued."""
        parents = []
        for token in tokens:
            parents.append(self._main_number)
            self._main_number = self._number(token, self._main_number)
        for branch, following in zip(branches, continued, strict=True):
            if following is not None:
                branch.tokens.append(following)
                branch.number = self._number(following, branch.number)
        for place, second in enumerate(alternatives):
            if second is not None:
                self.branches.append(Branch(position + place, None, [second], self._number(second, parents[place])))
        self.unsent += len(tokens)

    def take(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """(the first number, tokens, parents) of what was not told yet. A chain has no parents."""
        tokens, parents = tuple(self._tokens), tuple(self._parents)
        self._tokens, self._parents, self.unsent = [], [], 0
        first = self._next_number - len(tokens)
        chain = parents == tuple(range(first - 1, first - 1 + len(tokens)))
        return first, tokens, () if chain else parents

    def _number(self, token: int, parent: int) -> int:
        self._tokens.append(token)
        self._parents.append(parent)
        self._next_number += 1
        return self._next_number - 1
