"""Checks of trees (section 5.12): of target servers that verify them, and of drafters that draft them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dsi_actors.conformance.differences import Nonconformance, NotApplicable, items, require, require_kind
from dsi_actors.conformance.peer import PROMPT, Peer
from dsi_protocol import Cancelled, Draft, Drafted, Failed, NeedPrefix, Verified

_LENGTH = len(PROMPT)
#: Rows of a drafter's step that are asked for, at most.
_ROWS = 4


async def answers_along_a_tree(peer: Peer) -> None:
    """A tree is answered along the branch that has the target's tokens, as the longest of its paths would be (section 5.12)"""
    rows = _rows(peer)
    truth = await _truth(peer, 4)
    for tokens, parents in _trees(truth, _vocabulary_size(peer)):
        if len(tokens) > rows:
            continue
        expected = max([await _as_chain(peer, path) for path in _paths(tokens, parents)], key=len)
        generation = await _held(peer)
        request = peer.verify(generation, tokens, _LENGTH, held=PROMPT, parents=parents)
        peer.tell(request)
        why = f"the tree {tokens} with parents {parents} has the tokens of its paths, asked for as chains"
        require(await peer.reply(Verified, request), why, start=_LENGTH, tokens=expected)


async def keeps_the_main_path_of_a_tree(peer: Peer) -> None:
    """After a tree the worker holds its main path, and not its branches (section 5.12)"""
    _rows(peer)
    [first] = await _truth(peer, 1)
    wrong = (first + 1) % _vocabulary_size(peer)
    for main, branch in ((wrong, first), (first, wrong)):
        generation = await _held(peer)
        tree = peer.verify(generation, (main, branch), _LENGTH, held=PROMPT, parents=(0, 0))
        peer.tell(tree)
        await peer.reply(Verified, tree)
        onwards = peer.verify(generation, (), _LENGTH + 1, held=(*PROMPT, main))
        peer.tell(onwards)
        require(await peer.reply(Verified, onwards), "the main path is held", tokens=items(1, 1))
        elsewhere = peer.verify(generation, (), _LENGTH + 1, held=(*PROMPT, branch))
        peer.tell(elsewhere)
        require(await peer.reply(NeedPrefix, elsewhere), "a branch is not held", held=0)


async def refuses_what_is_no_tree(peer: Peer) -> None:
    """What is no tree, is too large or branches before start is answered by Failed, code limit (section 5.12)"""
    rows = _rows(peer)
    generation = await _held(peer)
    held, shorter = PROMPT, PROMPT[:-2]
    wrong: list[tuple[str, Sequence[int], tuple[int, ...], tuple[int, ...]]] = [
        ("a token follows one that comes after it", (1, 2), (0, 2), held),
        ("a token has no parent in the list", (1, 2), (0, 7), held),
        ("the first token follows itself", (1, 2), (1, 1), held),
        ("there are fewer parents than tokens", (1, 2), (0,), held),
        ("there are more parents than tokens", (1,), (0, 0), held),
        ("a branch leaves the main path before start", (*PROMPT[-2:], 3), (0, 1, 1), shorter),
        (f"the tree has more than {rows} tokens", [0] * (rows + 1), (0,) * (rows + 1), held),
    ]
    for why, tokens, parents, before in wrong:
        request = peer.verify(generation, tuple(tokens), _LENGTH, held=before, parents=parents)
        peer.tell(request)
        require(await peer.reply(Failed, request), why, code="limit")
    request = peer.verify(generation, (), _LENGTH, held=PROMPT)
    peer.tell(request)
    await peer.reply(Verified, request)  # a refused request changes nothing


async def drafts_trees(peer: Peer) -> None:
    """Guesses of a tree are numbered without gaps, and each follows a token that comes before it (section 5.12)"""
    rows = min(_rows(peer), _ROWS)
    for count, block in ((6, 1), (6, 4), (5, 100)):
        request = peer.draft(peer.open(), PROMPT, count, block, rows=rows)
        peer.tell(request)
        await _tree_of(peer, request)
    generation = peer.open()
    first = peer.draft(generation, PROMPT, 3, 1, rows=rows)
    peer.tell(first)
    tree = await _tree_of(peer, first)
    main = tree.main_path()
    more = peer.draft(generation, (), 2, 1, held=PROMPT, start=_LENGTH + len(main), rows=rows)
    peer.tell(more)
    await _tree_of(peer, more, tree)  # it continues the numbers


async def drafts_on_from_a_branch(peer: Peer) -> None:
    """A request that leads down a branch ends the requests before it, and goes on there with numbers of its own (section 5.12)"""
    rows = min(_rows(peer), _ROWS)
    generation = peer.open()
    first = peer.draft(generation, PROMPT, 4, 1, rows=rows)
    peer.tell(first)
    tree = await _tree_of(peer, first)
    branch, behind = tree.longest_branch()
    if not branch:
        raise NotApplicable("it drafted no branch")
    running = peer.draft(
        generation, (), 50, 1, held=PROMPT, start=_LENGTH + len(tree.main_path()), rows=rows
    )  # many steps, which nobody will wait for
    peer.tell(running)
    down = peer.draft(generation, branch, 3, 1, held=PROMPT, rows=rows, committed=_LENGTH + len(branch))
    peer.tell(down)
    await _ended(peer, running)
    went_on = await _tree_of(peer, down)
    first_guesses = [went_on.token(number) for number in went_on.main_path()][: len(behind)]
    if first_guesses != behind:
        raise Nonconformance(f"it had guessed {behind} on the branch {branch} already, and says {first_guesses} now")


@dataclass
class _Tree:
    """What a drafter has drafted since it was told a prefix: tokens and parents by number, the first of which is `first`."""

    first: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    @property
    def next_number(self) -> int:
        return self.first + len(self.tokens)

    def token(self, number: int) -> int:
        return self.tokens[number - self.first]

    def main_path(self, before: int | None = None) -> list[int]:
        """The numbers of the main path, or of the first choices behind the guess `before`: the first guess behind each token."""
        found, before = list[int](), self.first - 1 if before is None else before
        while (number := self._behind(before)) is not None:
            found.append(number)
            before = number
        return found

    def longest_branch(self) -> tuple[tuple[int, ...], list[int]]:
        """The tokens up to an alternative to one of the main path, and those behind it, of the branch with most of these."""
        main = self.main_path()
        found: tuple[tuple[int, ...], list[int]] = ((), [])
        for number, parent in enumerate(self.parents, self.first):
            if number not in main and parent in (self.first - 1, *main):
                before = main[: main.index(parent) + 1] if parent in main else []
                behind = [self.token(each) for each in self.main_path(number)]
                if not found[0] or len(behind) > len(found[1]):
                    found = (tuple(self.token(each) for each in (*before, number)), behind)
        return found

    def depth(self, number: int) -> int:
        """How many tokens lead to this one, itself among them."""
        depth = 0
        while number >= self.first:
            number, depth = self.parents[number - self.first], depth + 1
        return depth

    def _behind(self, before: int) -> int | None:
        return next((number for number, parent in enumerate(self.parents, self.first) if parent == before), None)


async def _tree_of(peer: Peer, request: Draft, tree: _Tree | None = None) -> _Tree:
    """All guesses for this request, which continues `tree` or brings its own prefix. Raises Nonconformance."""
    tree = _Tree(request.start) if tree is None else tree
    before = tree.first  # the position of the first guess
    while True:
        block = await peer.reply(Drafted, request)
        require(
            block,
            "the guesses of a tree are numbered in the order of their blocks, without a gap",
            start=tree.next_number,
        )
        why = "a block with branches has a parent for each guess"
        require(block, why, parents=items(len(block.tokens), len(block.tokens)) if block.parents else ())
        made = len(tree.main_path())
        for place, token in enumerate(block.tokens):
            number = tree.next_number
            parent = block.parents[place] if block.parents else number - 1
            if not tree.first - 1 <= parent < number:
                raise Nonconformance(f"guess {number} follows guess {parent}, which is not one before it")
            tree.tokens.append(token)
            tree.parents.append(parent)
            position = before + tree.depth(number) - 1
            if position >= request.start + request.count:
                raise Nonconformance(f"guess {number} stands at position {position}, beyond those asked for")
        made = len(tree.main_path()) - made
        if not block.done and made < request.block:
            raise Nonconformance(
                f"a block has at least {request.block} tokens of the main path unless it is the last one, not {made}"
            )
        if block.done:
            return tree


async def _ended(peer: Peer, request: Draft) -> None:
    """Its blocks, and its terminal reply, which may be Cancelled."""
    reply = await peer.terminal(request)
    if not isinstance(reply, Drafted):
        require_kind(reply, Cancelled, "a request that another one with its own prefix ended is Cancelled, or complete")


def _rows(peer: Peer) -> int:
    """Raises NotApplicable."""
    assert peer.ready is not None
    if peer.ready.rows == 1:
        raise NotApplicable("its Ready says rows 1: it takes chains only")
    return peer.ready.rows


def _vocabulary_size(peer: Peer) -> int:
    assert peer.ready is not None
    if peer.ready.vocabulary_size < 4:
        raise NotApplicable("its vocabulary has fewer than 4 tokens")
    return peer.ready.vocabulary_size


async def _held(peer: Peer) -> int:
    """A generation of which the worker holds the prompt."""
    generation = peer.open()
    request = peer.verify(generation, PROMPT, _LENGTH)
    peer.tell(request)
    await peer.reply(Verified, request)
    return generation


async def _truth(peer: Peer, count: int) -> tuple[int, ...]:
    """The target's own tokens behind the prompt."""
    truth: tuple[int, ...] = ()
    while len(truth) < count:
        truth += (await _as_chain(peer, truth))[len(truth) :]
    return truth[:count]


async def _as_chain(peer: Peer, path: tuple[int, ...]) -> tuple[int, ...]:
    request = peer.verify(peer.open(), PROMPT + path, _LENGTH)
    peer.tell(request)
    reply = await peer.reply(Verified, request)
    require(reply, "an answer ends one beyond the path at the latest", tokens=items(1, len(path) + 1))
    return reply.tokens


def _trees(truth: Sequence[int], vocabulary_size: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens and parents of trees behind the prompt, from small to large. `truth`: what the target says there."""
    a, b, c, _ = truth
    not_a, not_b, not_c = ((token + 1) % vocabulary_size for token in (a, b, c))
    nor_a = (a + 2) % vocabulary_size
    return [
        ((not_a, a), (0, 0)),  # the alternative is right
        ((a, not_a), (0, 0)),  # the first choice is
        ((not_a, nor_a), (0, 0)),  # none is
        ((not_a, a, b), (0, 0, 2)),  # and so is what follows the alternative
        ((a, not_b, b, c), (0, 1, 1, 3)),  # a branch that leaves later
        ((not_a, not_b, a, not_b, b, not_c, c), (0, 1, 0, 3, 3, 5, 5)),  # branches that leave a branch
        ((not_a, b, a, nor_a, b), (0, 1, 0, 0, 4)),  # the right token, behind another one
    ]


def _paths(tokens: tuple[int, ...], parents: tuple[int, ...]) -> list[tuple[int, ...]]:
    """From the first token to each one that nothing follows."""
    leaves = [place for place in range(1, len(tokens) + 1) if place not in parents]
    paths: list[tuple[int, ...]] = []
    for place in leaves:
        path: tuple[int, ...] = ()
        while place:
            path, place = (tokens[place - 1], *path), parents[place - 1]
        paths.append(path)
    return paths
