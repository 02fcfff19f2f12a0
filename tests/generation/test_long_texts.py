"""A token costs the orchestrator no more after a long text than after a short one: what is counted does not grow."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest

from dsi_actors.core import GenerationCore, Policy
from dsi_actors.core.actions import Action, EmitTokens, StartDraft, StartVerify
from dsi_actors.core.drafter_view import DrafterView
from dsi_actors.core.events import DrafterJoined, DraftsArrived, Event, ServerJoined
from dsi_actors.core.policy import UNLIMITED
from dsi_actors.core.tree import DraftTree, Node
from dsi_actors.generation.generation import MOST_ROWS
from dsi_actors.generation.prefix_checksums import PrefixChecksums
from dsi_actors.serving.completions import Choice, Completion
from dsi_actors.simulation.discrete_events import DiscreteEventDriver
from dsi_actors.simulation.scripts import AcceptanceScript, constant
from dsi_actors.text import Piece
from dsi_actors.tracing.drafts import Drafts
from dsi_protocol import MAX_FRAME_BYTES, MAX_TOKENS_PER_MESSAGE, Draft, Verify, encode
from support.counting import CountedList, calls_of

SHORT, LONG = 1_000, 8_000
WARM_UP = 100
TREE = replace(Policy.distributed(2, sp=2), rows=4, branches=UNLIMITED)


def script(prompt: int) -> AcceptanceScript:
    """The same behind a prompt of any length."""
    chance = random.Random(5)
    right, second = ([chance.random() < share for _ in range(1 << 12)] for share in (0.7, 0.5))
    return AcceptanceScript(lambda position: right[position - prompt], lambda position: second[position - prompt])


class _Driver(DiscreteEventDriver):
    """Sends what the orchestrator would send, and keeps drafts as the dashboard does.

    `costs` counts from WARM_UP committed tokens on: then all workers have the prompt."""

    def __init__(self, core: GenerationCore) -> None:
        super().__init__(
            core, script(core.prompt_length), target_ms=constant(8.0), drafter_ms=constant(2.0), servers=core.policy.sp
        )
        self._text = core.tokens = CountedList(core.tokens)
        self._lists = [CountedList() for _ in self._held]
        self._held = dict(enumerate(self._lists))
        self._checksums = PrefixChecksums(core)
        self._drafts = Drafts()
        self._sent_bytes = 0
        self._before: dict[str, int] | None = None

    @property
    def costs(self) -> dict[str, int]:
        held = sum(each.touched for each in self._lists)
        now = {"text": self._text.touched, "held by servers": held, "bytes": self._sent_bytes}
        return {name: count - (self._before or {}).get(name, 0) for name, count in now.items()}

    def _feed(self, event: Event) -> None:
        if isinstance(event, DraftsArrived):
            self._drafts.arrived(event.attempt, event.start, event.tokens, event.parents)
        super()._feed(event)

    def _do(self, action: Action) -> None:
        match action:
            case StartVerify(attempt, _, base, tokens, start, parents):
                self._send(Verify(1, attempt, base, self._checksums.of_first(base), tokens, start, parents))
            case StartDraft(attempt, base, tokens, start, count, block, rows, committed):
                checksum = self._checksums.of_first(base)
                self._send(Draft(1, attempt, base, checksum, tokens, start, count, block, rows, committed))
                self._drafts.requested(attempt, base, tokens, start)
            case EmitTokens(start, tokens, accepted, alternatives):
                self._drafts.committed(start, tokens, accepted, alternatives)
                if self._before is None and self.core.committed >= self.core.prompt_length + WARM_UP:
                    self._before = self.costs
        super()._do(action)

    def _send(self, request: Draft | Verify) -> None:
        self._sent_bytes += len(encode(request))


@pytest.mark.parametrize(
    "policy",
    [
        *(pytest.param(policy, marks=pytest.mark.long) for policy in (Policy.autoregressive(), Policy.speculative(3))),
        Policy.distributed(2, sp=2),
        TREE,
    ],
)
def test_a_generation_looks_at_the_end_of_its_text_only(policy: Policy) -> None:
    """The core, checksums, messages, the dashboard's drafts, and the simulator that drives it all here."""
    short, long = (_cost_of_tokens(prompt, policy) for prompt in (SHORT, LONG))
    assert short["bytes"] > 0
    for name, count in short.items():
        assert long[name] < 1.1 * count + 1_000, (name, short, long)


def _cost_of_tokens(prompt: int, policy: Policy) -> dict[str, int]:
    """Of 400 tokens after the first 100, which take the reading of the prompt."""
    calls = []
    for tokens in (WARM_UP, WARM_UP + 400):
        driver = _Driver(GenerationCore([7] * prompt, policy=policy, max_tokens=tokens))
        calls.append(calls_of(driver.run))
    return {**driver.costs, "calls": calls[1] - calls[0]}


def test_what_is_shown_of_a_long_answer_costs_as_much_as_of_a_short_one() -> None:
    """The dashboard walked along the whole answer whenever the drafter was told a correction."""
    found = []
    for answer in (SHORT, LONG):
        drafts, attempt = Drafts(), 0

        def correct(times: int, drafts: Drafts = drafts) -> None:
            nonlocal attempt
            for _ in range(times):
                attempt += 1
                front = max(1, drafts.front)
                drafts.requested(attempt, front - 1, (5,), front)
                drafts.arrived(attempt, front, (6, 7, 8), ())
                drafts.committed(front, (6, 5), (True, False), ())

        correct(answer // 2)
        found.append(calls_of(lambda correct=correct: correct(50)))  # type: ignore[misc]
    assert found[0] == found[1]


def test_the_end_of_the_main_path_is_found_without_a_look_at_all_drafts() -> None:
    found = []
    for drafted in (SHORT, LONG):
        tree = DraftTree(1, 0)
        view = DrafterView(0, 0, 1, tree, lambda view, right: None)
        view._nodes = nodes = CountedList(view._nodes)
        assert view.add(1, [3] * drafted, (), drafted + 1)
        other = Node(9, drafted + 1)  # a draft of another drafter
        before = nodes.touched
        assert not view.drafted(other)
        found.append(nodes.touched - before)
    assert found[0] == found[1]


async def test_the_text_of_an_answer_is_put_together_once() -> None:
    """It was copied with each piece."""
    peaks = []
    for pieces in (SHORT, LONG):
        completion, choice = object.__new__(Completion), Choice(0, 1, ())
        queue: asyncio.Queue[Any] = asyncio.Queue()
        for _ in range(pieces):
            await completion._show(choice, Piece("0123456789"), None, queue)
        choice.pieces = list(choice.pieces)
        tracemalloc.start()
        await completion._show(choice, Piece("0123456789"), None, queue)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert choice.text == "0123456789" * (pieces + 1)
    assert peaks[1] < 10 * LONG, "less than the text"


def test_a_server_that_must_read_a_long_text_gets_no_branches_with_it() -> None:
    """A tree of more tokens than the server takes was refused, and the server was not used any more."""
    core = GenerationCore([1] * 100, policy=TREE, max_tokens=20)
    core.handle(DrafterJoined())
    core.handle(ServerJoined(0, rows=64))
    core.handle(DraftsArrived(1, 100, (7, 8, 5, 6), (99, 99, 100, 101)))
    [verify] = [action for action in core.handle(ServerJoined(1, rows=64)) if isinstance(action, StartVerify)]
    assert (verify.base, verify.tokens[100:], verify.parents) == (0, (7, 5), ())
    core.check()


@pytest.mark.parametrize(("rows", "branches"), [(1, 0), (3, 0), (4, 1), (64, 2)])
def test_a_tree_has_no_more_tokens_than_the_server_takes(rows: int, branches: int) -> None:
    core = GenerationCore([1], policy=TREE, max_tokens=20)
    core.handle(DrafterJoined())
    for server in range(2):
        core.handle(ServerJoined(server, rows))
    [verify] = core.handle(DraftsArrived(1, 1, (7, 8, 5, 6), (0, 0, 1, 2)))
    assert isinstance(verify, StartVerify)
    assert len(verify.tokens) == 3 + branches
    assert bool(verify.parents) == bool(branches)
    core.check()


def test_the_longest_text_fits_one_frame() -> None:
    tokens = (1 << 32) - 1, *range(MAX_TOKENS_PER_MESSAGE - 1)
    assert len(encode(Verify(1, 1, 0, 0, tokens, len(tokens)))) <= MAX_FRAME_BYTES
    tree, parents = tokens[:MOST_ROWS], (*range(MOST_ROWS - 1), 5)
    assert len(encode(Verify(1, 1, 0, 0, tree, 5, parents))) <= MAX_FRAME_BYTES
