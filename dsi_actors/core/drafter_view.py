"""What a drafter has told since it was last given a prefix: its drafts by number, and where its main path ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsi_actors.core.tree import DraftTree, Node


class DrafterView:
    """Drafts are numbered in the order in which they are made; the token before the first one has its position as its number
    (DraftsArrived). `on_late` is told whether a first choice was right that came after its position had been committed."""

    def __init__(self, tree: DraftTree, on_late: Callable[[bool], None]) -> None:
        self._tree = tree
        self._on_late = on_late
        #: Where the drafter's main path ends. Not live: the drafter follows a path that is dead.
        self.end = tree.root
        #: The n-th has the number _first + n.
        self._nodes: list[Node] = [tree.root]
        #: The same, to look one up: there may be as many as the text has tokens.
        self._known = {tree.root}
        self._first = tree.root.position
        #: Numbers that have a child: the first child is the main path's.
        self._parents: set[int] = set()

    @property
    def astray(self) -> bool:
        """Whether the drafter follows a path that is dead."""
        return not self.end.live

    @property
    def knows_the_main_path(self) -> bool:
        """Whether the main path ends with a draft of this drafter, so that it can go on from there."""
        return self._tree.main_end in self._known

    def restart(self) -> None:
        """The drafter is told the main path, and goes on behind it."""
        self.end = self._tree.main_end
        self._nodes, self._known, self._first = [self.end], {self.end}, self.end.position
        self._parents.clear()

    def add(self, number: int, tokens: Sequence[int], parents: Sequence[int], end: int) -> bool:
        """Add drafts to the tree: the first has this number, `parents` are numbers, none at position `end` or beyond. False if
        one cannot stand where it says."""
        if number != self._first + len(self._nodes):
            return False
        for index, token in enumerate(tokens):
            parent_number = parents[index] if parents else number - 1
            if not self._first <= parent_number < number:
                return False
            parent = self._nodes[parent_number - self._first]
            if parent.position + 1 >= end:
                return False
            first = parent_number not in self._parents
            self._parents.add(parent_number)
            node = self._node(parent, token, first=first)
            self._nodes.append(node)
            self._known.add(node)
            if first and parent is self.end:
                self.end = node
            number += 1
        return True

    def _node(self, parent: Node, token: int, *, first: bool) -> Node:
        """The node of a draft behind `parent`. `first`: it is the drafter's first choice there."""
        if parent.live and parent.position >= self._tree.root.position:
            return self._tree.add(parent, token)
        if not parent.live:
            return Node(token, parent.position + 1, parent, live=False)
        own = parent.children[0]  # the target was faster: compare late
        if first:
            self._on_late(own.token == token)
        return own if own.token == token else Node(token, own.position, parent, live=False)
