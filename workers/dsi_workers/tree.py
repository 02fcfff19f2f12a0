"""Trees of drafts as a worker has them: a main path, and branches that leave it or one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Branch:
    """Tokens from position `fork` on, in place of those of the path that it leaves."""

    fork: int
    #: The branch that it leaves; None: the main path.
    parent: Branch | None = None
    tokens: list[int] = field(default_factory=list)
    #: Of a drafter: the number of the last token.
    number: int = 0

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.fork + len(self.tokens)


def read_tree(base: int, tokens: Sequence[int], parents: Sequence[int]) -> tuple[Sequence[int], list[Branch]]:
    """The main path's tokens from position `base` on, and the branches, each after the one that it leaves (Verify in SPEC.md).

    Raises ValueError if `parents` are not those of a tree whose main path comes first.
    """
    if not parents:
        return tokens, []
    if len(parents) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens with {len(parents)} parents")
    main = next((place for place, parent in enumerate(parents) if parent != place), len(parents))
    branches: list[Branch] = []
    owner: list[tuple[Branch | None, int]] = [(None, base + place) for place in range(main + 1)]
    for place in range(main, len(tokens)):
        if parents[place] > place:
            raise ValueError(f"the token at {place} follows one that comes after it")
        before, position = owner[parents[place]]
        if before is None or position < before.end:
            before = Branch(position, before)
            branches.append(before)
        before.tokens.append(tokens[place])
        owner.append((before, before.end))
    return tokens[:main], branches


class Walk:
    """Follows the model's own tokens along a tree, from position `start` of the main path `tokens` on."""

    def __init__(self, tokens: Sequence[int], branches: Sequence[Branch], start: int) -> None:
        self._tokens = tokens
        self._branches = branches
        self.position = start
        #: The branch that the walk is on; None: the main path.
        self.branch: Branch | None = None

    def takes(self, token: int) -> bool:
        """Whether the tree has `token` here; then the walk goes on behind it."""
        branch, place = self.branch, self.position - (self.branch.fork if self.branch else 0)
        path = self._tokens if branch is None else branch.tokens
        if place < len(path) and path[place] == token:
            self.position += 1
            return True
        for other in self._branches:
            if other.parent is branch and other.fork == self.position and other.tokens[0] == token:
                self.branch = other
                self.position += 1
                return True
        return False

    def ends_with(self, answer: Sequence[int]) -> bool:
        """Whether the tree has nothing where the last token of an answer stands: it has all tokens before, and is at its end."""
        if not all(self.takes(token) for token in answer[:-1]):
            return False
        end = len(self._tokens) if self.branch is None else self.branch.end
        forks = any(other.parent is self.branch and other.fork == self.position for other in self._branches)
        return self.position >= end and not forks
