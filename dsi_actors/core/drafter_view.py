"""What one drafter was asked and told, and what it has drafted since it was last given a prefix: its drafts by number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsi_actors.core.tree import DraftTree, Node


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """The drafter was asked to extend its path to [start, end)."""

    start: int
    end: int


class DrafterView:
    """One of the drafters that serve a generation.

    Its *path* follows its own first choices. Drafts are numbered in the order in which they are made; the token before the first
    one has its position as its number (DraftsArrived). `on_late` is told whether a first choice was right that came after its
    position had been committed."""

    def __init__(
        self, number: int, rank: int, rows: int, tree: DraftTree, on_late: Callable[[DrafterView, bool], None]
    ) -> None:
        self.number = number
        #: Of several drafters the one with the lowest rank leads.
        self.rank = rank
        #: The most rows that one of its steps may have.
        self.rows = rows
        self._tree = tree
        self._on_late = on_late
        #: Where its path ends. Not live: the drafter follows a path that is dead.
        self.end = tree.root
        #: It is known to hold so many tokens: those of its path, or of what was committed when its path died.
        self.held = 0
        #: What was committed when it last heard of it.
        self.heard = 0
        #: Live requests by attempt: contiguous, in order; the first one extends its path.
        self.requests: dict[int, DraftRequest] = {}
        #: It had nothing to offer here. It is asked again after the next commit.
        self.exhausted = False
        #: Its first choices that were compared with the target's own tokens, and those that were equal.
        self.judged = self.accepted = 0
        #: The n-th has the number _first + n.
        self._nodes: list[Node] = [tree.root]
        #: The same, to look one up: there may be as many as the text has tokens.
        self._known = {tree.root}
        self._first = tree.root.position
        #: Numbers that have a child: the first child is the path's.
        self._parents: set[int] = set()

    @property
    def astray(self) -> bool:
        """Whether the drafter follows a path that is dead."""
        return not self.end.live

    @property
    def asked_to(self) -> int:
        """One past the last position that it has been asked for. There is a request."""
        return next(reversed(self.requests.values())).end

    def drafted(self, node: Node) -> bool:
        """Whether it has drafted this node since it was last given a prefix, or was given it then."""
        return node in self._known

    def restart(self, end: Node) -> None:
        """It is told the path to this node, and goes on behind it."""
        self.end, self.held = end, end.position + 1
        self._nodes, self._known, self._first = [end], {end}, end.position
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

    def judge(self, token: int) -> None:
        """The target's own token follows the root, which has not moved yet."""
        chosen = next((child for child in self._tree.root.children if child.drafted_by.get(self.rank)), None)
        if chosen is not None:
            self.count(chosen.token == token)

    def count(self, right: bool) -> None:
        self.judged += 1
        self.accepted += right

    def _node(self, parent: Node, token: int, *, first: bool) -> Node:
        """The node of a draft behind `parent`. `first`: it is the drafter's first choice there."""
        if parent.live and parent.position >= self._tree.root.position:
            node = self._tree.add(parent, token)
            node.drafted_by[self.rank] = first or node.drafted_by.get(self.rank, False)
            if first and self._leads(parent.children[0]):
                self._tree.lead(node)
            return node
        if not parent.live:
            return Node(token, parent.position + 1, parent, live=False)
        own = parent.children[0]  # the target was faster: compare late
        if first:
            self._on_late(self, own.token == token)
        return own if own.token == token else Node(token, own.position, parent, live=False)

    def _leads(self, node: Node) -> bool:
        """Whether its first choice goes before this one: no drafter has chosen this one that leads it."""
        return all(self.rank < rank for rank, first in node.drafted_by.items() if first)
