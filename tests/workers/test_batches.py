"""Several generations in one forward: the same text as alone, to the bit; nobody waits for the whole of a long prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from dsi_protocol import (
    Cancel,
    Cancelled,
    CloseGeneration,
    Draft,
    Drafted,
    Failed,
    Message,
    OpenGeneration,
    SamplingParameters,
    Verified,
    Verify,
)
from dsi_workers.connection import WorkSocket
from dsi_workers.decoding.slots import Slots
from dsi_workers.engine import Answer, Interrupt
from dsi_workers.engines import Engine, Task, load_engine
from dsi_workers.engines.model import ModelEngine
from dsi_workers.loop import WorkerLoop
from dsi_workers.session import Session
from support.engines import CountingEngine, NoInterrupt, ScriptedSocket, make_tiny_model, role_for, session_of
from support.gguf_files import made as made_llama
from support.gguf_files import write as write_gguf


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["float32", "bfloat16", "timed", "trigrams", pytest.param("llama-cpp", marks=pytest.mark.llama)])
def target(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Engine:
    if request.param == "timed":
        return load_engine("timed", role="target", model="", device="cpu:0", options={"chunk": 16, "seed": 4})
    if request.param == "trigrams":
        model = str(request.getfixturevalue("example_model"))
        return load_engine("trigrams", role="target", model=model, device="cpu:0", options={})
    if request.param == "llama-cpp":
        pytest.importorskip("llama_cpp")
        model = str(write_gguf(tmp_path / "tiny.gguf", made_llama()))
        options: dict[str, Any] = {"max_length": 384, "slots": 5}
        return load_engine("llama-cpp", role="target", model=model, device="cpu:0", options=options)
    options = {"max_length": 384, "slots": 5, "dtype": request.param}
    return load_engine("transformers", role="target", model=str(tiny_model), device="cpu:0", options=options)


def sampled(number: int, prompt: list[int]) -> Session:
    made = Session(
        number, len(prompt), "", SamplingParameters(temperature=0.7, seed=number, logprobs=True, top_logprobs=2)
    )
    made.write(0, prompt)
    return made


def alone(engine: Engine, prompt: list[int], number: int, count: int) -> tuple[list[int], list[float]]:
    session = sampled(number, prompt)
    logprobs: list[float] = []
    for _ in range(count):
        answer = engine.verify(session, len(session.tokens), NoInterrupt())
        session.write(len(session.tokens), answer.tokens)
        logprobs += answer.logprobs
    engine.forget(session)
    return session.tokens[len(prompt) :], logprobs


def test_who_else_is_in_the_batch_changes_no_bit(target: Engine) -> None:
    """Five generations of different lengths, with right and wrong guesses, in batches of any size."""
    chance = random.Random(7)
    prompts = [[chance.randrange(90) for _ in range(length)] for length in (3, 130, 20, 1, 200)]
    expected = [alone(target, prompt, number, 30) for number, prompt in enumerate(prompts, start=1)]
    sessions = [sampled(number, prompt) for number, prompt in enumerate(prompts, start=1)]
    known = list(map(len, prompts))
    logprobs: list[list[float]] = [[] for _ in prompts]
    while min(have - len(prompt) for have, prompt in zip(known, prompts, strict=True)) < 30:
        tasks = {}
        for index in chance.sample(range(5), chance.randint(1, 5)):
            session, prompt = sessions[index], prompts[index]
            session.truncate(known[index])
            done = known[index] - len(prompt)
            guesses = expected[index][0][done : done + chance.randint(0, 11)]
            if guesses and chance.random() < 0.4:
                guesses[-1] = (guesses[-1] + 1) % 90
            session.write(known[index], guesses)
            tasks[index] = Task(session, known[index])
        while open_tasks := [task for task in tasks.values() if not task.done]:
            target.step(open_tasks, NoInterrupt())
        for index, task in tasks.items():
            sessions[index].write(known[index], task.answer.tokens)
            known[index] += len(task.answer.tokens)
            logprobs[index] += task.answer.logprobs
    for index, (tokens, values) in enumerate(expected):
        found = sessions[index].tokens[len(prompts[index]) : known[index]]
        assert found[:30] == tokens
        assert logprobs[index][:30] == values


def test_a_drafter_drafts_for_several(tiny_model: Path) -> None:
    options: dict[str, Any] = {"slots": 3, "quantization": "none"}
    drafter = load_engine("transformers", role="drafter", model=str(tiny_model), device="cpu:0", options=options)
    sessions = [session_of([7 + number, 3, 5], generation=number) for number in (1, 2, 3)]
    drafter.step([Task(session, 3, 4) for session in sessions], NoInterrupt())
    tasks = [Task(session, 3, 4) for session in sessions]
    drafter.step(tasks, NoInterrupt())
    assert [task.answer.tokens for task in tasks] == [
        drafter.draft(session_of([7 + number, 3, 5], generation=9 + number), 4, NoInterrupt()) for number in (1, 2, 3)
    ]


def test_the_next_turn_does_not_read_the_history_again(tiny_model: Path) -> None:
    engine = load_engine("transformers", role="target", model=str(tiny_model), device="cpu:0", options={"slots": 2})
    assert isinstance(engine, ModelEngine)
    chance = random.Random(1)
    turn = [chance.randrange(90) for _ in range(300)]
    answer, _ = alone(engine, turn, 1, 20)
    following = [*turn, *answer, *(chance.randrange(90) for _ in range(40))]
    fresh = load_engine("transformers", role="target", model=str(tiny_model), device="cpu:0", options={})
    before = engine.forwards
    assert alone(engine, following, 2, 20) == alone(fresh, following, 2, 20)
    assert engine._slots.reused == 256  # of the first turn's prompt its two whole blocks
    assert engine.forwards - before == fresh.forwards - 2
    other = [*turn[:130], *(chance.randrange(90) for _ in range(90))]
    assert alone(engine, other, 3, 5) == alone(fresh, other, 3, 5)
    assert engine._slots.reused == 256 + 128


def test_the_least_recently_used_goes_first(tiny_model: Path) -> None:
    engine = load_engine("transformers", role="target", model=str(tiny_model), device="cpu:0", options={"slots": 2})
    assert isinstance(engine, ModelEngine)
    texts = [[number] * 140 for number in range(3)]
    for number, text in enumerate(texts):
        alone(engine, text, number, 1)
    alone(engine, texts[0], 10, 1)  # its slot went to the third
    assert engine._slots.reused == 0
    alone(engine, texts[2], 11, 1)
    assert engine._slots.reused == 128


def test_a_long_verification_of_a_timed_target_comes_to_its_end() -> None:
    engine = load_engine("timed", role="target", model="", device="cpu:0", options={"chunk": 4})
    session = session_of([1] * 40, prompt_length=30)
    task = Task(session, 30)
    for _ in range(12):
        engine.step([task], NoInterrupt())
        if task.done:
            break
    assert task.done
    assert task.answer.tokens


def test_a_session_that_is_opened_again_finds_nothing_of_the_closed_one() -> None:
    slots = Slots(1, block=4)
    closed, opened_again = session_of([1] * 8), session_of([2] * 8)
    closed.computed = 8
    slots.of(closed)
    slots.forget(closed)
    slots.of(closed)  # work that was under way
    opened_again.computed = 0
    slots.of(opened_again)
    other = session_of([3] * 8, generation=2)
    opened_again.computed = 8
    slots.of(other)
    assert opened_again.computed == 0


# The loop


def opened(generation: int) -> OpenGeneration:
    return OpenGeneration(generation, 3, "test")


def serve(engine: CountingEngine, *messages: Message) -> ScriptedSocket:
    socket = ScriptedSocket()
    engine.socket = socket
    socket.inbox.extend(messages)
    WorkerLoop(cast(WorkSocket, socket), engine, still_needed=lambda: True, role=role_for(messages)).run()
    return socket


def verify(generation: int, attempt: int = 1, last: int = 12) -> Verify:
    return Verify(generation, attempt, 0, 0, (10, 11, last), 3)


def test_requests_of_several_generations_share_a_step() -> None:
    engine = CountingEngine()
    socket = serve(
        engine, *(opened(each) for each in (1, 2, 3, 4)), *(verify(each) for each in (1, 2, 3, 4)), verify(1, 2)
    )
    assert engine.batches == [[1, 2, 3], [4, 1]]
    assert [reply.generation for reply in socket.sent if isinstance(reply, Verified)] == [1, 2, 3, 4, 1]


def test_who_was_answered_together_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their next requests come one after another: without waiting the first would have a forward alone."""
    now_s = 0.0

    def clock() -> float:
        """Each look at it takes a moment."""
        nonlocal now_s
        now_s += 1e-4
        return now_s

    monkeypatch.setattr("dsi_workers.loop.time", SimpleNamespace(perf_counter=clock))

    class Slow(ScriptedSocket):
        later: ClassVar[list[Message]] = [verify(1, 2), verify(2, 2)]

        def receive(self, timeout_s: float = 0.0) -> Message | None:
            if not self.inbox and self.later and self.sent and timeout_s > 0:
                return self.later.pop(0)
            return super().receive(timeout_s)

    class Busy(CountingEngine):
        """Takes long enough for a quarter of it to be some time."""

        def step(self, tasks: Sequence[Task], interrupt: Interrupt) -> None:
            nonlocal now_s
            super().step(tasks, interrupt)
            now_s += 0.1

    engine, socket = Busy(), Slow()
    engine.socket = socket
    socket.inbox.extend([opened(1), opened(2), verify(1), verify(2)])
    WorkerLoop(cast(WorkSocket, socket), engine, still_needed=lambda: True, role="target").run()
    assert engine.batches == [[1, 2], [1, 2]]


def test_drafts_of_several_generations_go_side_by_side() -> None:
    engine = CountingEngine()
    drafts = [Draft(each, 1, 0, 0, (10, 11, 12), 3, 2 * each, 2) for each in (1, 2)]
    socket = serve(engine, opened(1), opened(2), *drafts)
    assert engine.batches == [[1, 2], [1, 2], [2], [2]]
    assert [(reply.generation, reply.done) for reply in socket.sent if isinstance(reply, Drafted)] == [
        (1, True), (2, False), (2, True),
    ]  # fmt: skip


@pytest.mark.parametrize("end", [Cancel(1, 1), CloseGeneration(1)])
def test_a_cancel_ends_one_row_of_a_batch(end: Message) -> None:
    engine = CountingEngine()
    engine.during.append([end])
    socket = serve(engine, opened(1), opened(2), verify(1), verify(2))
    kinds = {reply.generation: type(reply) for reply in socket.sent if isinstance(reply, Verified | Cancelled)}
    assert kinds == {1: Cancelled, 2: Verified}


def test_one_that_breaks_the_engine_breaks_no_other() -> None:
    class Fragile(CountingEngine):
        def _count(self, task: Task) -> None:
            if task.session.tokens[-1] == 99:
                raise RuntimeError("out of memory")
            super()._count(task)

    socket = serve(Fragile(), opened(1), opened(2), verify(1, last=99), verify(2))
    assert {reply.generation: type(reply).__name__ for reply in socket.sent if isinstance(reply, Failed | Verified)} == {
        1: "Failed", 2: "Verified",
    }  # fmt: skip


def test_a_short_request_does_not_wait_for_a_long_prompt() -> None:
    class Reader(CountingEngine):
        """Reads ten tokens in a step."""

        def reads_alone(self, task: Task) -> bool:
            return bool(len(task.session.tokens) - task.session.computed > 10)

        def _count(self, task: Task) -> None:
            if not self.reads_alone(task):
                super()._count(task)
                task.session.computed = len(task.session.tokens)
            else:
                task.session.computed += 10
                task.answer = Answer()

    engine = Reader()
    long = Verify(1, 1, 0, 0, tuple([10] * 49), 49)
    socket = serve(engine, opened(1), opened(2), opened(3), long, verify(2), verify(3), verify(2, 2))
    assert engine.batches[:3] == [[1], [2, 3], [1]]
    assert engine.batches.index([2]) < 5
    assert sum(isinstance(reply, Verified) for reply in socket.sent) == 4
