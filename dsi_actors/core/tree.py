"""The tree of drafts behind the committed tokens.

The root is the last committed token. Below it stands what was drafted, by one drafter or by several: a node's first child is
what the drafter thinks most probable there (of several drafters the one that leads), its other children are alternatives.
The *main path* follows first children from the root::

    root ── 7 ── 3 ── 9        main path: 7 3 9
       │     └─── 4 ── 2       4: an alternative to 3, with one token drafted behind it
       └─── 8                  8: an alternative to 7

Where nobody drafts alternatives the tree is a chain, and the main path is all of it. The target's own next token moves the
root to the child that has this token; what was built on its siblings dies with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from enum import Enum


class Step(Enum):
    """How the root came to its new place."""

    #: The first child had the target's token: the draft was accepted.
    ACCEPTED = "accepted"
    #: Another child had it. What was drafted behind that child stays.
    ALTERNATIVE = "alternative"
    #: No child had it, though there were some. Nothing that was drafted stays.
    CORRECTED = "corrected"
    #: Nothing had been drafted there.
    UNDRAFTED = "undrafted"


class Node:
    """A token at a position. `live`: it stands in the tree, or is committed. `drafted_by`: the ranks of its drafters, and
    whether it was their first choice there. What several drafters say at one place is one node."""

    __slots__ = ("children", "drafted_by", "live", "parent", "position", "token")

    def __init__(self, token: int, position: int, parent: Node | None = None, *, live: bool = True) -> None:
        self.token = token
        self.position = position
        self.parent = parent
        self.children: list[Node] = []
        self.drafted_by: dict[int, bool] = {}
        self.live = live


class DraftTree:
    """All drafts that may still become committed tokens."""

    def __init__(self, token: int, position: int) -> None:
        """Of the last committed token."""
        self.root = Node(token, position)
        #: Nodes of the main path, from the root's first child on.
        self.main: list[Node] = []
        #: From this position on `lead` has made it another one. Whoever follows the main path takes note, and resets this.
        self.replaced_from: int | None = None

    @property
    def front(self) -> int:
        """One past the last position of the main path."""
        return self.root.position + 1 + len(self.main)

    @property
    def main_end(self) -> Node:
        """The last node of the main path; the root if nothing is drafted."""
        return self.main[-1] if self.main else self.root

    def add(self, parent: Node, token: int) -> Node:
        """A further child of a live node at or below the root. The same token again is the same node."""
        for child in parent.children:
            if child.token == token:
                return child
        node = Node(token, parent.position + 1, parent)
        parent.children.append(node)
        if len(parent.children) == 1 and parent is self.main_end:
            self.main.append(node)
        return node

    def lead(self, node: Node) -> None:
        """Make a live node the first child of its parent, and if that stands on the main path, have the main path go there."""
        assert node.parent is not None
        siblings = node.parent.children
        if siblings[0] is node:
            return
        siblings.remove(node)
        siblings.insert(0, node)
        place = node.position - self.root.position - 1
        if self.main[place - 1] is node.parent if 0 < place <= len(self.main) else node.parent is self.root:
            self.main[place:] = [node, *_first_children(node)]
            self.replaced_from = min(node.position, self.replaced_from or node.position)

    def advance(self, token: int) -> Step:
        """The target's own token follows the root: the root moves there."""
        before, children = self.root, self.root.children
        found = next((child for child in children if child.token == token), None)
        for child in children:
            if child is not found:
                _drop(child)
        self.root = Node(token, before.position + 1, before) if found is None else found
        self.root.parent = None  # what is committed is kept as tokens, not as nodes
        before.children = [self.root]
        if children and found is children[0]:
            del self.main[0]
            return Step.ACCEPTED
        self.main = list(_first_children(self.root))
        if found is not None:
            return Step.ALTERNATIVE
        return Step.CORRECTED if children else Step.UNDRAFTED

    def clear(self) -> None:
        """Nothing is drafted any more."""
        for child in self.root.children:
            _drop(child)
        self.root.children = []
        self.main = []

    def branches(self, end: int, deepest: int, most: int) -> list[Node]:
        """Nodes beside the main path, at most so many, each after its parent: those at positions before `deepest` on branches
        that leave the main path before `end`. Branches that leave it early come first: they are needed soonest."""
        found: list[Node] = []
        parent = self.root
        for node in self.main:
            if node.position > end or node.position >= deepest or len(found) >= most:
                break
            for sibling in parent.children[1:]:
                found += (below for below in _subtree(sibling) if below.position < deepest)
            parent = node
        return found[:most]

    def path_to(self, node: Node) -> list[Node]:
        """The nodes from the root, which is left out, to a live node below it."""
        path: list[Node] = []
        while node is not self.root:
            path.append(node)
            assert node.parent is not None
            node = node.parent
        return path[::-1]

    def reach(self, held: Collection[Node], path: Sequence[Node]) -> int:
        """One past the last position of a path from the root whose nodes are all in `held`."""
        position = self.root.position
        for node in path:
            if node not in held:
                break
            position = node.position
        return position + 1

    def check(self) -> None:
        """Assert the invariants: called under test."""
        assert self.main == list(_first_children(self.root))
        for node in _subtree(self.root):
            assert node.live
            assert len({child.token for child in node.children}) == len(node.children), "siblings differ"
            for child in node.children:
                assert child.parent is node
                assert child.position == node.position + 1


def main_path_end(base: int, tokens: Sequence[int], parents: Sequence[int]) -> tuple[int, int]:
    """Return one past the last position of the main path, and the number of tokens on branches. The arguments are those of a
    StartVerify."""
    main = next((place for place, parent in enumerate(parents) if parent != place), len(tokens))
    return base + main, len(tokens) - main


def _first_children(node: Node) -> Iterator[Node]:
    while node.children:
        node = node.children[0]
        yield node


def _subtree(node: Node) -> Iterator[Node]:
    """The node and all below it, each after its parent."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += reversed(node.children)


def _drop(node: Node) -> None:
    for each in _subtree(node):
        each.live = False
