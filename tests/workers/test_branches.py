"""Drafters that draft trees: the main path of a chain, branches that go on as chains would, and no position computed twice."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dsi_protocol import SamplingParameters
from dsi_workers import sampling as sampling_module
from dsi_workers.backend import Run
from dsi_workers.decoding.forward import Forward
from dsi_workers.engines import Engine, EngineError, Interrupted, Task, load_engine
from dsi_workers.sampling import Sampler
from dsi_workers.session import Session
from dsi_workers.tree import Branch
from support.engines import InterruptAfter, NoInterrupt, make_tiny_model, torch_backend

PROMPT = [3, 14, 15, 9, 26]
ROWS = 8
SAMPLINGS = {
    "greedy": SamplingParameters(),
    "penalty": SamplingParameters(repetition_penalty=1.3),
    "sampled": SamplingParameters(1.3, top_k=60, top_p=0.98, repetition_penalty=1.2, seed=3),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def sliding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("sliding"), sliding_window=12)


@pytest.fixture(params=SAMPLINGS)
def sampling(request: pytest.FixtureRequest) -> SamplingParameters:
    return SAMPLINGS[request.param]


def drafter(model: Path, **options: Any) -> Engine:
    options = {"quantization": "none", "max_length": 256, "calibrate": False, **options}
    return load_engine("transformers", role="drafter", model=str(model), device="cpu:0", options=options)


def session(sampling: SamplingParameters, tokens: Sequence[int] = PROMPT, *, generation: int = 1) -> Session:
    made = Session(generation, len(tokens), "test", sampling)
    made.write(0, tokens)
    made.drafts.restart(made.tokens, len(tokens))
    return made


def task_of(session: Session, rows: int = ROWS) -> Task:
    """As the loop makes it (work.py)."""
    length = len(session.tokens)
    task = Task(session, length, 100, alternatives=rows > 1)
    task.branches = session.drafts.branches[: rows - 1]
    return task


def take(task: Task) -> None:
    """As the loop takes an answer."""
    session, answer = task.session, task.answer
    session.drafts.add(len(session.tokens), answer.tokens, answer.alternatives, task.branches, answer.continued)
    session.write(len(session.tokens), answer.tokens)


def grow(engine: Engine, sessions: Sequence[Session], steps: int, rows: int = ROWS) -> None:
    for _ in range(steps):
        tasks = [task_of(each, rows) for each in sessions]
        while open_tasks := [task for task in tasks if not task.done]:
            reading = [task for task in open_tasks if engine.reads_alone(task)]
            engine.step(reading[:1] or open_tasks, NoInterrupt())
        for task in tasks:
            take(task)


def promote(engine: Engine, session: Session, branch: Branch) -> None:
    """As the loop does it when a correction leads down the branch."""
    engine.promote(session, branch)
    session.drafts.restart(session.tokens, branch.fork + 1)


def chain(engine: Engine, sampling: SamplingParameters, tokens: Sequence[int], count: int) -> list[int]:
    """What the drafter drafts after `tokens`, of which the last may be drafts, without branches."""
    alone = session(sampling, tokens, generation=999)
    alone.prompt_length = len(PROMPT)
    grow(engine, [alone], count, rows=1)
    engine.forget(alone)
    return alone.tokens[len(tokens) :]


def runner_up(engine: Engine, sampling: SamplingParameters, tokens: Sequence[int]) -> int:
    alone = session(sampling, tokens, generation=998)
    task = task_of(alone, 2)
    engine.step([task], NoInterrupt())
    engine.forget(alone)
    [second] = task.answer.alternatives
    assert second is not None
    return second


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward of our own backend."""
    computed: list[int] = []
    plain = Forward.__call__

    def counted(forward: Forward, runs: Sequence[Run], **more: Any) -> Any:
        computed.append(sum(len(run.tokens) for run in runs))
        return plain(forward, runs, **more)

    monkeypatch.setattr(Forward, "__call__", counted)
    return computed


def test_a_drafter_measures_a_step_with_all_its_rows(model: Path) -> None:
    assert drafter(model, calibrate=True, slots=1).info.window_latency_us > 0
    assert drafter(model, calibrate=False).info.window_latency_us == 0


@pytest.mark.parametrize("kind", ["plain", "sliding", "library"])
def test_the_main_path_is_the_chain_and_branches_go_on_as_chains(
    model: Path, sliding_model: Path, sampling: SamplingParameters, kind: str, request: pytest.FixtureRequest
) -> None:
    path = {"plain": model, "sliding": sliding_model, "library": model}[kind]
    if kind == "library":
        path = request.getfixturevalue("library_model")
    engine, plain = drafter(path), drafter(path)
    assert engine.info.rows == ROWS
    drafted = session(sampling)
    grow(engine, [drafted], 12)
    assert drafted.tokens == PROMPT + chain(plain, sampling, PROMPT, 12)
    assert len(drafted.drafts.branches) == 12
    for place, branch in enumerate(drafted.drafts.branches):
        before = drafted.tokens[: branch.fork]
        assert branch.fork == len(PROMPT) + place
        assert branch.tokens[0] == runner_up(plain, sampling, before) != drafted.tokens[branch.fork]
        assert len(branch.tokens) == (12 - place if place < ROWS - 1 else 1)
        assert branch.tokens[1:] == chain(plain, sampling, [*before, branch.tokens[0]], len(branch.tokens) - 1)


@pytest.fixture(scope="module")
def library_model(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The library's own layers run it."""
    import shutil

    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("library")
    made = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=256, n_embd=32, n_layer=3, n_head=4))
    for parameter in made.parameters():
        parameter.data.mul_(3.0)
    made.save_pretrained(directory)
    shutil.copy(model / "tokenizer.json", directory)
    return directory


def test_the_runner_up_is_what_would_be_chosen_without_the_first(sampling: SamplingParameters) -> None:
    sampler, generator = Sampler(session(sampling)), torch.Generator().manual_seed(1)
    for position in range(5, 40):
        logits = torch.randn(300, generator=generator)
        first, second = sampler.choose_two(logits, position, [7] * position)
        assert first == sampler.choose(logits, position, [7] * position)
        if sampling.top_p == 1:  # which tokens are kept depends on the first one, too
            without = logits.clone()
            without[first] = -torch.inf
            assert second == sampler.choose(without, position, [7] * position)
        assert first != second
    only = Sampler(session(SamplingParameters(1.0, top_k=1)))
    assert only.choose_two(torch.tensor([0.1, 3.0, 2.0]), 5) == (1, 2)


def test_the_rows_of_a_step_draw_their_noise_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a large vocabulary the noise takes longer than a row of the forward."""
    drawn: list[int] = []
    plain = sampling_module.gumbel_noise

    def counted(key: int, tokens: torch.Tensor) -> torch.Tensor:
        drawn.append(len(tokens))
        return plain(key, tokens)

    engine = drafter(model)
    drafted = session(SamplingParameters(1.3, seed=3))
    grow(engine, [drafted], 3)
    monkeypatch.setattr(sampling_module, "gumbel_noise", counted)
    grow(engine, [drafted], 6)
    assert drawn == [96] * 6


def test_a_promoted_branch_goes_on_without_computing_anything_again(
    model: Path, sampling: SamplingParameters, positions: list[int]
) -> None:
    engine, plain = drafter(model), drafter(model)
    drafted = session(sampling)
    for place in (2, 0, 4):
        grow(engine, [drafted], 6)
        branch = drafted.drafts.branches[place]
        promote(engine, drafted, branch)
        assert drafted.tokens[branch.fork :] == branch.tokens
        expected = chain(plain, sampling, drafted.tokens, 3)
        begin = len(drafted.tokens)
        positions.clear()
        grow(engine, [drafted], 3)
        assert drafted.tokens[begin:] == expected
        assert positions == [1, 2, 3], "one position of the main path, and one of each branch"


def test_a_branch_that_was_never_continued_is_promoted_too(model: Path, sampling: SamplingParameters) -> None:
    engine, plain = drafter(model), drafter(model)
    drafted = session(sampling)
    grow(engine, [drafted], 10)
    branch = drafted.drafts.branches[-1]
    promote(engine, drafted, branch)
    assert len(branch.tokens) == 1
    grow(engine, [drafted], 3)
    assert drafted.tokens[-3:] == chain(plain, sampling, drafted.tokens[:-3], 3)


def test_several_generations_and_their_branches_share_a_forward(model: Path, positions: list[int]) -> None:
    engine, plain = drafter(model), drafter(model)
    sessions = [
        session(sampling, [7 + number, *PROMPT], generation=number)
        for number, sampling in enumerate(SAMPLINGS.values())
    ]
    grow(engine, sessions, 1)
    positions.clear()
    forwards = engine.forwards
    grow(engine, sessions, 6, rows=4)
    assert engine.forwards - forwards == 6
    assert positions == [6, 9, 12, 12, 12, 12], "of each generation the main path, and at most three branches"
    for each in sessions:
        assert each.tokens[6:] == chain(plain, each.sampling, each.tokens[:6], 7)
        for branch in each.drafts.branches:
            path = [*each.tokens[: branch.fork], *branch.tokens]
            assert path[branch.fork + 1 :] == chain(
                plain, each.sampling, path[: branch.fork + 1], len(branch.tokens) - 1
            )


def test_whatever_happens_the_drafts_are_those_of_a_chain(model: Path, sampling: SamplingParameters) -> None:
    """Interrupts, corrections, promotions, dropped branches, lost answers, closed generations, and too few slots for all."""
    engine, plain = drafter(model, slots=2), drafter(model)
    chance = random.Random(5)
    sessions = {number: session(sampling, [number, *PROMPT], generation=number) for number in range(4)}
    for _ in range(60):
        number = chance.choice(list(sessions))
        drafted = sessions[number]
        event = chance.random()
        if event < 0.2:
            task = task_of(drafted)
            with contextlib.suppress(Interrupted):
                engine.step([task], InterruptAfter(chance.randrange(5)))  # the answer is lost
        elif event < 0.35 and drafted.drafts.branches:
            promote(engine, drafted, chance.choice(drafted.drafts.branches))
        elif event < 0.45 and len(drafted.tokens) > len(PROMPT) + 1:
            at = chance.randrange(len(PROMPT) + 1, len(drafted.tokens))
            drafted.truncate(at)
            drafted.write(at, [chance.randrange(90)])
            drafted.drafts.restart(drafted.tokens, at + 1)
        elif event < 0.55:
            drafted.drafts.drop_dead_branches(len(drafted.tokens) - 3)
        elif event < 0.6:
            engine.forget(drafted)
            sessions[number] = session(sampling, drafted.tokens[:9], generation=number)
        else:
            begin = len(drafted.tokens)
            grow(engine, [drafted], chance.randrange(1, 4))
            assert drafted.tokens[begin:] == chain(plain, sampling, drafted.tokens[:begin], len(drafted.tokens) - begin)
            for branch in drafted.drafts.branches:
                path = [*drafted.tokens[: branch.fork], *branch.tokens]
                alone = chain(plain, sampling, path[: branch.fork + 1], len(branch.tokens) - 1)
                assert path[branch.fork + 1 :] == alone


def test_branches_that_leave_no_slot_are_not_continued(model: Path) -> None:
    engine, plain = drafter(model, slots=3), drafter(model)
    sampling = SAMPLINGS["sampled"]
    sessions = [session(sampling, [number, *PROMPT], generation=number) for number in range(3)]
    grow(engine, sessions, 9)
    for each in sessions:
        assert each.tokens[6:] == chain(plain, sampling, each.tokens[:6], 9)
    lengths = [len(branch.tokens) for each in sessions for branch in each.drafts.branches]
    assert sum(length > 1 for length in lengths) == 2 * (ROWS - 1)


def test_a_drafter_that_cannot_copy_keys_drafts_chains(model: Path, request: pytest.FixtureRequest) -> None:
    assert drafter(model, lookup=True).info.rows == 1
    example = str(request.getfixturevalue("example_model"))
    assert load_engine("trigrams", role="drafter", model=example, device="cpu:0", options={}).info.rows == 1


@pytest.mark.parametrize("kind", ["plain", "library"])
def test_a_drafter_of_the_first_layers(model: Path, library_model: Path, kind: str) -> None:
    path = model if kind == "plain" else library_model
    whole, weak = drafter(path), drafter(path, layers=2)
    assert torch_backend(weak).forward.cache.layers[2:] == []
    assert chain(drafter(path, layers=3), SAMPLINGS["greedy"], PROMPT, 5) == chain(
        whole, SAMPLINGS["greedy"], PROMPT, 5
    )
    assert chain(weak, SAMPLINGS["greedy"], PROMPT, 5) != chain(whole, SAMPLINGS["greedy"], PROMPT, 5)
    for layers in (0, 4, "two", True):
        with pytest.raises(
            EngineError, match=r"option layers must be a whole number in \[1, 3\], the layers of .*, not"
        ):
            drafter(path, layers=layers)
    with pytest.raises(EngineError, match="option layers is for a drafter"):
        load_engine("transformers", role="target", model=str(path), device="cpu:0", options={"layers": 2})
