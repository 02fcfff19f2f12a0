"""Trees in a worker: what a request's parents mean, the walk along a tree, and the numbers of what a drafter drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsi_protocol import Draft, Drafted, OpenGeneration, Reply, prefix_checksum
from dsi_workers.connection import WorkSocket
from dsi_workers.draft_tree import DraftTree
from dsi_workers.loop import WorkerLoop
from dsi_workers.tree import Branch, Walk, read_tree
from support.engines import CountingEngine, ScriptedSocket

Path = tuple[int, ...]


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Tokens and parents of a Verify: the main path first, then branches that leave anything before them."""
    main = draw(st.integers(0, 4))
    more = draw(st.integers(0, 8))
    parents = list(range(main))
    for place in range(main, main + more):
        # What would make the main path longer is no branch.
        parents.append(draw(st.integers(0, place - 1 if place == main and place else place)))
    return draw(st.lists(st.integers(0, 2), min_size=main + more, max_size=main + more)), parents


def paths_of(tokens: Sequence[int], parents: Sequence[int]) -> list[Path]:
    """The tokens from the root to each place, by place; the first one is the root's."""
    paths: list[Path] = [()]
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*paths[parent], token))
    return paths


def main_length(parents: Sequence[int]) -> int:
    return next((place for place, parent in enumerate(parents) if parent != place), len(parents))


@given(tree=trees(), base=st.integers(0, 3))
def test_a_request_is_read_as_paths(tree: tuple[list[int], list[int]], base: int) -> None:
    tokens, parents = tree
    main, branches = read_tree(base, tokens, parents)
    assert list(main) == tokens[: main_length(parents)]
    texts: dict[int, Path] = {}

    def text(branch: Branch | None, end: int) -> Path:
        """What stands at [base, end) of a branch, or of the main path."""
        if branch is None:
            return tuple(main[: end - base])
        return (*text(branch.parent, branch.fork), *branch.tokens[: end - branch.fork])

    for branch in branches:
        assert branch.tokens
        assert branch.parent is None or branch.parent in branches[: branches.index(branch)], (
            "it comes after what it leaves"
        )
        texts[id(branch)] = text(branch, branch.end)
    found = {text(branch, end) for branch in branches for end in range(branch.fork + 1, branch.end + 1)}
    assert found | {tuple(main[:end]) for end in range(len(main) + 1)} == set(paths_of(tokens, parents))
    assert sum(len(branch.tokens) for branch in branches) == len(tokens) - len(main), "no token is there twice"


@pytest.mark.parametrize(
    ("parents", "words"),
    [
        ((0, 2), "the token at 1 follows one that comes after it"),
        ((1, 1), "the token at 0 follows one that comes after it"),
        ((0,), "2 tokens with 1 parents"),
        ((0, 1, 2), "2 tokens with 3 parents"),
    ],
)
def test_what_is_no_tree_is_refused(parents: Sequence[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_tree(3, (7, 8), parents)


@given(tree=trees(), base=st.integers(1, 3), said=st.lists(st.integers(0, 2), min_size=1, max_size=10))
def test_a_walk_goes_as_far_as_a_path_has_the_tokens(
    tree: tuple[list[int], list[int]], base: int, said: list[int]
) -> None:
    tokens, parents = tree
    # Siblings differ: what would be there twice is left out, with what follows it.
    kept: dict[Path, int] = {(): 0}
    places, own_tokens, own_parents = {0: 0}, list[int](), list[int]()
    for place, path in enumerate(paths_of(tokens, parents)[1:], 1):
        if path not in kept and parents[place - 1] in places:
            own_tokens.append(tokens[place - 1])
            own_parents.append(places[parents[place - 1]])
            kept[path] = places[place] = len(own_tokens)
    main, branches = read_tree(base, own_tokens, own_parents)
    walk, taken = Walk([9] * base + list(main), branches, base), 0
    while taken < len(said) and walk.takes(said[taken]):
        taken += 1
        assert walk.position == base + taken
    longest = max(length for length in range(len(said) + 1) if tuple(said[:length]) in kept)
    assert taken == longest


class NaiveDrafter:
    """What DraftTree keeps, as plain paths."""

    def __init__(self, prefix: Sequence[int], start: int) -> None:
        self.number_of: dict[Path, int] = {tuple(prefix[:end]): end - 1 for end in range(start, len(prefix) + 1)}
        self.next = len(prefix)
        self.made = [tuple(prefix[:end]) for end in range(start + 1, len(prefix) + 1)]

    def add(self, path: Path) -> None:
        self.number_of[path] = self.next
        self.next += 1
        self.made.append(path)


@given(data=st.data())
def test_drafts_are_numbered_in_the_order_in_which_they_are_made(data: st.DataObject) -> None:
    main = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6), label="what is held")
    start = data.draw(st.integers(1, len(main)), label="start")
    tree, naive = DraftTree(), NaiveDrafter(main, start)
    tree.restart(main, start)
    told: list[tuple[int, int]] = []  # token and parent, by number from `start` on

    def take() -> None:
        first, tokens, parents = tree.take()
        assert first == start + len(told), "there is no gap"
        before = [*range(first - 1, first - 1 + len(tokens))]
        assert parents == () or list(parents) != before, "a chain has no parents"
        told.extend(zip(tokens, parents or before, strict=True))
        assert tree.unsent == 0

    for _ in range(data.draw(st.integers(0, 6), label="steps")):
        rows = data.draw(st.integers(1, 4), label="rows")
        branches, texts = tree.branches[: rows - 1], []
        for branch in branches:
            texts.append((*main[: branch.fork], *branch.tokens))
        continued = [10 + len(text) for text in texts]
        token, unsent = data.draw(st.integers(0, 9), label="token"), tree.unsent
        alternatives = [token + 20] if rows > 1 else []
        tree.add(len(main), [token], alternatives, branches, continued)
        naive.add((*main, token))
        for text, more in zip(texts, continued, strict=True):
            naive.add((*text, more))
        for alternative in alternatives:
            naive.add((*main, alternative))
        main.append(token)
        assert tree.unsent == unsent + 1, "of the main path"
        if data.draw(st.booleans(), label="send"):
            take()
    take()
    assert told == [(path[-1], naive.number_of[path[:-1]]) for path in naive.made]
    for branch in tree.branches:
        whole = [*main[: branch.fork], *branch.tokens]
        assert naive.number_of[tuple(whole)] == branch.number
        base = data.draw(st.integers(0, branch.fork), label="base")
        leading = tree.leading_to(base, whole[base:], main)
        assert leading is not None
        assert [*main[: leading.fork], *leading.tokens][: len(whole)] == whole
    base = data.draw(st.integers(0, len(main)), label="base of a path")
    tokens = data.draw(st.lists(st.integers(0, 9), max_size=4), label="its tokens")
    # Beside arbitrary ones: what a branch says, with a token of the main path before it changed.
    for branch in tree.branches[:1]:
        if base < branch.fork and data.draw(st.booleans(), label="nearly a branch's"):
            tokens = [*main[base : branch.fork], *branch.tokens]
            tokens[0] = 9 - tokens[0]
    leading = tree.leading_to(base, tokens, main)
    path = [*main[:base], *tokens]
    lead = [branch for branch in tree.branches if [*main[: branch.fork], *branch.tokens][: len(path)] == path]
    assert leading is None or leading in lead
    assert leading is not None or not any(branch.fork >= base for branch in lead)
    committed = data.draw(st.integers(0, len(main)), label="committed")
    tree.drop_dead_branches(committed)
    assert all(branch.fork >= committed for branch in tree.branches)


# In the loop

PROMPT = (1, 2, 3)


def asked(loop: WorkerLoop, socket: ScriptedSocket, *requests: Draft, steps: int = 100) -> list[Reply]:
    """The replies to these requests, after at most so many steps."""
    for request in requests:
        loop._on_message(request)
    for _ in range(steps):
        batch = loop._pick()
        if not batch:
            break
        loop._step(batch)
    said, socket.sent = [reply for reply in socket.sent if isinstance(reply, Reply)], []
    return said


def a_drafter() -> tuple[WorkerLoop, ScriptedSocket, CountingEngine]:
    engine, socket = CountingEngine(), ScriptedSocket()
    loop = WorkerLoop(cast(WorkSocket, socket), engine, lambda: True, role="drafter")
    loop._on_message(OpenGeneration(1, len(PROMPT), "test"))
    return loop, socket, engine


def test_the_drafter_goes_on_from_a_branch_with_what_it_made_there() -> None:
    """The alternative at position 3 was right, and is committed. The branch left the main path before that, but is not dead."""
    loop, socket, engine = a_drafter()
    asked(loop, socket, Draft(1, 1, 0, 0, PROMPT, 3, 3, 3, rows=3))
    # The main path is 4 5 6; beside its first token stands 104, with 105 and 106 behind it.
    assert engine.forwards == 3
    down = Draft(1, 2, 3, prefix_checksum(PROMPT), (104,), 4, 3, 1, rows=3, committed=4)
    first, *_ = asked(loop, socket, down, steps=1)
    assert isinstance(first, Drafted)
    assert (first.start, first.tokens[:2]) == (4, (105, 106)), "it was made already, and is told first"
    assert engine.forwards == 4, "one step more, for the third token"


def test_a_branch_that_reaches_as_far_as_is_asked_needs_no_step() -> None:
    loop, socket, engine = a_drafter()
    asked(loop, socket, Draft(1, 1, 0, 0, PROMPT, 3, 3, 3, rows=3))
    [block] = asked(loop, socket, Draft(1, 2, 3, prefix_checksum(PROMPT), (104,), 4, 2, 1, rows=3, committed=4))
    assert isinstance(block, Drafted)
    assert (block.start, block.tokens, block.done) == (4, (105, 106), True), "and no token beyond those asked for"
    assert engine.forwards == 3


def test_branches_that_left_the_main_path_before_what_is_committed_are_continued_no_more() -> None:
    loop, socket, _ = a_drafter()
    asked(loop, socket, Draft(1, 1, 0, 0, PROMPT, 3, 2, 2, rows=3))
    onwards = Draft(1, 2, 3, prefix_checksum(PROMPT), (), 5, 1, 1, rows=3, committed=5)
    [block] = asked(loop, socket, onwards)
    assert isinstance(block, Drafted)
    assert len(block.tokens) == 2, "a token of the main path and its alternative, and none for a dead branch"


def test_a_request_with_its_own_prefix_ends_those_before_it() -> None:
    loop, socket, _ = a_drafter()
    asked(loop, socket, Draft(1, 1, 0, 0, PROMPT, 3, 50, 1, rows=2), steps=2)
    replies = asked(loop, socket, Draft(1, 2, 3, prefix_checksum(PROMPT), (9,), 4, 1, 1, rows=2))
    assert [(type(reply).__name__, reply.attempt) for reply in replies] == [("Cancelled", 1), ("Drafted", 2)]


@pytest.mark.parametrize(
    ("tokens", "start", "continued"),
    [((104,), 4, True), ((4, 5), 5, True), ((9,), 4, False), ((104, 9), 5, False), ((4, 5, 6), 6, False)],
    ids=["a branch", "the main path", "a correction", "a correction of a branch", "what the step may or may not draft"],
)
def test_a_step_goes_on_only_for_a_request_that_goes_on_behind_what_was_drafted(
    tokens: tuple[int, ...], start: int, continued: bool
) -> None:
    """Else it was of no use, and what was asked waited for it. The step in which the request comes drafts 6."""
    loop, socket, engine = a_drafter()
    engine.socket = socket
    asked(loop, socket, Draft(1, 1, 0, 0, PROMPT, 3, 50, 2, rows=3), steps=2)
    later = Draft(1, 2, 3, prefix_checksum(PROMPT), tokens, start, 3, 3, rows=3, committed=start)
    engine.during.append([later])
    asked(loop, socket, steps=1)
    session = loop._sessions.get(1)
    assert session is not None
    assert session.tokens[3:] == ([4, 5, 6] if continued else [4, 5])
    replies = asked(loop, socket)
    assert [(type(reply).__name__, reply.attempt) for reply in replies] == [("Cancelled", 1), ("Drafted", 2)]


def test_a_drafter_may_have_no_alternative_and_leave_a_branch_as_it_is() -> None:
    tree = DraftTree()
    tree.restart([1, 2, 3], 3)
    tree.add(3, [4, 5], [None, 6], (), ())
    [branch] = tree.branches
    assert (branch.fork, branch.tokens) == (4, [6])
    tree.add(5, [7], [None], [branch], [None])
    tree.add(6, [8], [None], [branch], [9])
    assert branch.tokens == [6, 9]
    assert tree.take() == (3, (4, 5, 6, 7, 8, 9), (2, 3, 3, 4, 6, 5))


def test_an_earlier_request_that_comes_late_does_not_end_the_later_one() -> None:
    """Nobody cancelled that: a worker that says so is taken for a broken one."""
    loop, socket, _ = a_drafter()
    later = Draft(1, 2, 0, 0, PROMPT, 3, 2, 2, rows=3)
    replies = asked(loop, socket, later, Draft(1, 1, 0, 0, PROMPT, 3, 3, 3, rows=3))
    assert [type(reply) for reply in replies if reply.attempt == 2] == [Drafted]


def test_going_on_from_fewer_drafts_than_there_are_leaves_no_branch_behind_them() -> None:
    """A branch that left the main path where that does not reach any more could not be continued."""
    loop, socket, _ = a_drafter()
    asked(loop, socket, Draft(1, 1, 0, 0, PROMPT, 3, 6, 6, rows=3))
    replies = asked(loop, socket, Draft(1, 2, 0, 0, PROMPT, 5, 2, 2, rows=3))
    assert all(isinstance(reply, Drafted) for reply in replies)
    session = loop._sessions.get(1)
    assert session is not None
    assert all(branch.fork <= len(session.tokens) for branch in session.drafts.branches)
