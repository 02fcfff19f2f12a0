"""Messages that come while a step runs: what the step works on stays until it ends, and what fails there is not the engine's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from dsi_protocol import (
    Cancel,
    CloseGeneration,
    Draft,
    Drafted,
    Failed,
    FromWorker,
    Goodbye,
    Message,
    OpenGeneration,
    OptionValue,
    Ready,
    SamplingParameters,
    Verified,
    Verify,
    Welcome,
    prefix_checksum,
)
from dsi_workers.connection import Unreachable, WorkSocket
from dsi_workers.drafting.lookup import Lookup
from dsi_workers.engines import Engine, RequestError, load_engine
from dsi_workers.engines.model import ModelEngine
from dsi_workers.engines.translating import TranslatingEngine
from dsi_workers.loop import WorkerLoop
from dsi_workers.sessions import MAX_SESSIONS
from support.engines import CountingEngine, ScriptedSocket, make_tiny_model, role_for, torch_backend

#: Numbers that stand for nothing else in an engine.
ONE, OTHER, THIRD = 987_654_321, 987_654_322, 987_654_323
#: Prompt lookup finds what follows.
PROMPT, FOLLOWS = (5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10, 5, 6, 7, 8), (9,)
OPEN = OpenGeneration(ONE, len(PROMPT), "test", SamplingParameters(0.7, repetition_penalty=1.2, seed=3))
READY = Ready("count", 1000, 64, 8, 1, 1, 8, 1, 5, 0)


class MidStepSocket(ScriptedSocket):
    """Messages of `mid_step` come, in their order, when the engine looks up from the step that they name, or a later one."""

    def __init__(self, *mid_step: tuple[int, Message]) -> None:
        super().__init__()
        self.mid_step = deque(mid_step)
        self.loop: WorkerLoop | None = None
        self.steps = 0
        self._within = False

    def receive(self, timeout_s: float = 0.0) -> Message | None:
        within = bool(self.loop is not None and self.loop._current)
        self.steps += within and not self._within
        self._within = within
        if not within:
            return super().receive(timeout_s)
        due = bool(self.mid_step) and self.mid_step[0][0] <= self.steps
        return self.mid_step.popleft()[1] if due else None


def served(engine: Engine, socket: MidStepSocket, *messages: Message) -> list[FromWorker]:
    socket.inbox.extend(messages)
    role = role_for([*messages, *(message for _, message in socket.mid_step)])
    socket.loop = WorkerLoop(cast(WorkSocket, socket), engine, lambda: True, READY, role=role)
    socket.loop.run()
    assert not socket.mid_step, "it all came"
    return socket.sent


def remembers(thing: Any, number: int, seen: set[int] | None = None) -> bool:
    """Whether a dictionary somewhere in `thing` has this key."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, str | bytes | int | float):
        return False
    seen.add(id(thing))
    if isinstance(thing, dict):
        return number in thing or any(remembers(value, number, seen) for value in thing.values())
    if isinstance(thing, list | tuple | deque):
        return any(remembers(value, number, seen) for value in thing)
    names = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    inner = {**getattr(thing, "__dict__", {}), **{name: getattr(thing, name, None) for name in names}}
    ours = type(thing).__module__.startswith("dsi_workers")
    return ours and any(remembers(value, number, seen) for value in inner.values())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("other"), words=64)


@pytest.fixture(
    params=["target", "drafter", "drafter with lookup", "translating drafter", "ngram", "timed target", "timed drafter"]
)
def worker(request: pytest.FixtureRequest, model: Path, other_model: Path) -> tuple[str, Engine]:
    """Its role, and its engine."""
    kind: str = request.param
    role = "target" if "target" in kind else "drafter"
    if kind == "ngram" or "timed" in kind:
        return role, load_engine(kind.split()[0], role=role, model="", device="cpu:0", options={})
    options: dict[str, OptionValue] = {"calibrate": False, "quantization": "none", "lookup": "lookup" in kind}
    if kind == "translating drafter":
        options["target"] = str(other_model)
    made = load_engine("transformers", role=role, model=str(model), device="cpu:0", options=options)
    assert type(made) is (TranslatingEngine if kind == "translating drafter" else ModelEngine)
    if "lookup" in kind:  # many guesses are worth it, none is copied
        cast("Any", made)._lookup = Lookup({1: 10.0, 8: 11.0}, remember=False, copy_rate=2.0)
    return role, made


def ask(role: str, generation: int) -> Draft | Verify:
    if role == "target":
        return Verify(generation, 1, 0, 0, PROMPT, len(PROMPT))
    return Draft(generation, 1, 0, 0, PROMPT, len(PROMPT), 1, 1)


def go_on(role: str, generation: int) -> Draft | Verify:
    """All before it was read, and prompt lookup has a guess."""
    length, checksum = len(PROMPT), prefix_checksum(PROMPT)
    if role == "target":
        return Verify(generation, 2, length, checksum, FOLLOWS, length)
    return Draft(generation, 2, length, checksum, FOLLOWS, length + len(FOLLOWS), 6, 2)


def tokens_of(sent: list[FromWorker], generation: int) -> list[int]:
    replies = [reply for reply in sent if isinstance(reply, Verified | Drafted) and reply.generation == generation]
    return [token for reply in replies for token in reply.tokens]


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_generation_that_is_closed_in_the_middle_of_a_step_harms_no_other(
    worker: tuple[str, Engine], at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does it leave anything behind."""
    role, engine = worker
    alone = served(engine, MidStepSocket(), replace(OPEN, generation=THIRD), ask(role, THIRD), go_on(role, THIRD))
    second = [(2, go_on(role, ONE)), (2, go_on(role, OTHER))]  # so that both go on together
    socket = MidStepSocket(*sorted([*second, (at, CloseGeneration(ONE))], key=lambda each: each[0]))
    socket.inbox.extend([OPEN, replace(OPEN, generation=OTHER), ask(role, ONE), ask(role, OTHER)])
    socket.loop = WorkerLoop(cast(WorkSocket, socket), engine, lambda: True, role=role)
    socket.loop.run()
    if socket.mid_step:  # there were not so many steps, or an engine that never looks up: it comes to an idle worker
        socket.inbox.extend(message for _, message in socket.mid_step)
        socket.mid_step.clear()
        socket.loop.farewell = None
        socket.loop.run()
    assert "failed" not in capsys.readouterr().out
    assert tokens_of(socket.sent, OTHER) == tokens_of(alone, THIRD) != []
    assert not remembers(engine, ONE)


def ends_of_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each step from now on, whether it came to its end."""
    ended: list[bool] = []

    def step(tasks: Any, interrupt: Any) -> None:
        ended.append(False)
        ModelEngine.step(cast("ModelEngine", engine), tasks, interrupt)
        ended[-1] = True

    monkeypatch.setattr(engine, "step", step)
    return ended


@pytest.mark.parametrize("asked_anew", [True, False])
@pytest.mark.parametrize("role", ["target", "drafter"])
def test_a_prompt_is_read_on_if_a_later_request_needs_it(
    role: str, asked_anew: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was slower than others was given up and asked anew, each time before it came to the end of a chunk."""
    engine = load_engine(
        "transformers",
        role=role,
        model=str(model),
        device="cpu:0",
        options={"calibrate": False, "quantization": "none"},
    )
    ended = ends_of_steps(engine, monkeypatch)
    later = [(1, go_on(role, ONE))] if asked_anew else []
    served(engine, MidStepSocket((1, Cancel(ONE, 1)), *later), OPEN, ask(role, ONE))
    assert ended[0] == asked_anew
    assert all(ended[1:])


def test_once_the_prompt_is_read_a_cancel_ends_the_step_whatever_is_asked_next(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine(
        "transformers", role="drafter", model=str(model), device="cpu:0", options={"calibrate": False, "quantization": "none"}
    )  # fmt: skip
    ended = ends_of_steps(engine, monkeypatch)
    first, second = ask("drafter", ONE), go_on("drafter", ONE)
    served(engine, MidStepSocket((2, Cancel(ONE, 2)), (2, replace(second, attempt=3))), OPEN, first, second)
    assert ended[:2] == [True, False]
    assert all(ended[2:])


def test_what_is_open_is_remembered(model: Path) -> None:
    """Else the test above would see nothing."""
    engine = load_engine("transformers", role="drafter", model=str(model), device="cpu:0", options={"lookup": True})
    served(engine, MidStepSocket(), OPEN, ask("drafter", ONE))
    assert remembers(engine, ONE)


def test_one_that_makes_room_in_the_middle_of_a_step_is_forgotten_when_it_ends() -> None:
    forgotten_during: list[bool] = []
    engine = CountingEngine()
    forget = engine.forget

    def noted(session: Any) -> None:
        assert socket.loop is not None
        forgotten_during.append(bool(socket.loop._current))
        forget(session)

    engine.forget = noted  # type: ignore[method-assign]
    socket = MidStepSocket((1, replace(OPEN, generation=1000)), (1, Welcome(1, "target", "timed", "", {}, 500, 2000)))
    opened = [replace(OPEN, generation=number) for number in range(1, MAX_SESSIONS + 1)]
    sent = served(engine, socket, *opened, Verify(MAX_SESSIONS, 1, 0, 0, (10, 11, 12), 3))
    assert engine.forgotten == [1]
    assert forgotten_during == [False]
    assert [type(message) for message in sent] == [Ready, Verified]


def test_a_goodbye_in_the_middle_of_a_step_ends_the_worker() -> None:
    socket = MidStepSocket((1, CloseGeneration(OTHER)), (1, Goodbye("go")))
    sent = served(CountingEngine(), socket, OPEN, Verify(ONE, 1, 0, 0, (10, 11, 12), 3))
    assert sent == []


class Dead(MidStepSocket):
    """Nobody takes what is sent."""

    def __init__(self, fails: Callable[[], Exception], *mid_step: tuple[int, Message]) -> None:
        super().__init__(*mid_step)
        self._fails = fails

    def send(self, message: FromWorker) -> None:
        raise self._fails()


@pytest.mark.parametrize("fails", [Unreachable, lambda: OSError("no socket")])
@pytest.mark.parametrize("waits", [False, True])
def test_an_orchestrator_that_cannot_be_reached_from_within_a_step_is_no_failure_of_the_engine(
    fails: Callable[[], Exception], waits: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends the worker, as elsewhere."""

    class Waits(CountingEngine):
        def step(self, tasks: Any, interrupt: Any) -> None:
            if waits:
                interrupt.wait_until(0.0)
            super().step(tasks, interrupt)

    socket = Dead(fails, (1, Draft(2, 1, 0, 0, (1,), 1, 1, 1)))  # of no generation: answered at once, with Failed
    with pytest.raises(type(fails())):
        served(Waits(), socket, OPEN, Verify(ONE, 1, 0, 0, (10, 11, 12), 3))
    assert "the engine failed" not in capsys.readouterr().out


def test_what_a_request_asks_is_no_failure_of_the_engine() -> None:
    """Neither alone nor in a batch, where it harms no other."""

    class Picky(CountingEngine):
        def _count(self, task: Any) -> None:
            if task.session.generation == ONE:
                raise RequestError("no token can be chosen")
            super()._count(task)

    opened = [OPEN, replace(OPEN, generation=OTHER)]
    asked = [Verify(generation, 1, 0, 0, (10, 11, 12), 3) for generation in (ONE, OTHER)]
    sent = served(Picky(), MidStepSocket(), *opened, *asked)
    assert Failed(ONE, 1, "request", "no token can be chosen") in sent
    assert any(isinstance(reply, Verified) and reply.generation == OTHER for reply in sent)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0), ("temperature", 1e9), ("top_p", 0.0), ("top_p", 2.0), ("min_p", -0.5), ("min_p", 7.0),
        ("repetition_penalty", 0.0), ("repetition_penalty", -2.0), ("repetition_penalty", 1e-40), ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
    ],
)  # fmt: skip
def test_parameters_without_a_meaning_are_refused_as_the_requests_own(name: str, value: float) -> None:
    changed: dict[str, Any] = {name: value}
    opened = replace(OPEN, sampling=replace(OPEN.sampling, **changed))
    [reply] = served(CountingEngine(), MidStepSocket(), opened, Verify(ONE, 1, 0, 0, (10, 11, 12), 3))
    assert isinstance(reply, Failed)
    assert reply.code == "request"
    assert f"{name} must lie in" in reply.message


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"biased_tokens": (1, 2), "biases": (1.0,)}, "one bias for each token"),
        ({"biased_tokens": (1, 1), "biases": (1.0, 2.0)}, "no token twice"),
        ({"biased_tokens": (1,), "biases": (1000.0,)}, "a bias in"),
        ({"biased_tokens": tuple(range(1025)), "biases": (1.0,) * 1025}, "at most 1024 tokens"),
        ({"bad_words": ((),)}, "bad_words must"),
        ({"bad_words": ((1,) * 65,)}, "bad_words must"),
        ({"stop_tokens": tuple(range(1025))}, "stop_token_ids must"),
    ],
)
def test_lists_of_parameters_have_limits(changed: dict[str, Any], words: str) -> None:
    opened = replace(OPEN, sampling=replace(OPEN.sampling, **changed))
    [reply] = served(CountingEngine(), MidStepSocket(), opened, Verify(ONE, 1, 0, 0, (10, 11, 12), 3))
    assert isinstance(reply, Failed)
    assert reply.code == "request"
    assert words in reply.message


def test_a_sampler_that_breaks_is_no_failure_of_the_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*arguments: Any) -> int:
        raise ValueError("probabilities sum to nothing")

    options = {"calibrate": False}
    engine = load_engine("transformers", role="target", model=str(model), device="cpu:0", options=options)
    monkeypatch.setattr("dsi_workers.sampling.Sampler.choose", breaks)
    [reply] = served(engine, MidStepSocket(), OPEN, ask("target", ONE))
    assert isinstance(reply, Failed)
    assert reply.code == "request"
    assert "probabilities sum to nothing" in reply.message


def test_broken_logits_are_answered(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a token, and a log probability that can be said."""
    options = {"calibrate": False}
    engine = load_engine("transformers", role="target", model=str(model), device="cpu:0", options=options)
    compute = type(torch_backend(engine).forward).__call__

    def broken(self: Any, *arguments: Any, **more: Any) -> Any:
        return [logits * float("nan") for logits in compute(self, *arguments, **more)]

    monkeypatch.setattr(type(torch_backend(engine).forward), "__call__", broken)
    told = replace(OPEN, sampling=replace(OPEN.sampling, logprobs=True))
    greedy = OpenGeneration(OTHER, len(PROMPT), "test", SamplingParameters(logprobs=True))
    sent = served(engine, MidStepSocket(), told, greedy, ask("target", ONE), ask("target", OTHER))
    assert len(sent) == 2
    for reply in sent:
        assert isinstance(reply, Verified)
        assert len(reply.tokens) == len(reply.logprobs) == 1
        assert all(0 <= token < 96 for token in reply.tokens)
        assert all(abs(value) < 1e39 for value in reply.logprobs)
