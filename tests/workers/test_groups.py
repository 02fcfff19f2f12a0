"""A model that is divided among the ranks of a group: the bits of a plain computation of the same degree, whatever shares a
forward, and aborts that all ranks agree on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dsi_actors.config import DEFAULT_TARGET
from dsi_actors.models import resolve_model
from dsi_protocol import SamplingParameters
from dsi_workers.backend import Run
from dsi_workers.checkpoints.checkpoint import read_checkpoint
from dsi_workers.checkpoints.load import load_model
from dsi_workers.decoding.forward import Forward
from dsi_workers.decoding.share import Share
from dsi_workers.decoding.torch_backend import TorchBackend
from dsi_workers.engine import EngineError, Interrupted, Never, Task
from dsi_workers.engines import load_engine
from dsi_workers.engines.loading import load_backend
from dsi_workers.engines.model import ModelEngine
from dsi_workers.group.steps import Following, Leading, SharedSteps
from dsi_workers.session import Session
from dsi_workers.tree import Branch
from support.engines import InterruptAfter, NoInterrupt, make_tiny_model, session_of
from support.group import ThreadRanks, make_uneven_model, of_each_rank

CPU = torch.device("cpu")
PROMPT, LENGTH, WINDOW = 8, 72, 64
TEXT = [31 * position % 97 for position in range(LENGTH)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_uneven_model(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(
    scope="module",
    params=[
        (2, "float32"),
        *(pytest.param(each, marks=pytest.mark.long) for each in ((3, "float32"), (2, "bfloat16"))),
    ],
    ids=str,
)
def group(model: Path, request: pytest.FixtureRequest) -> Iterator[tuple[TorchBackend, int, str]]:
    degree, dtype = request.param
    device = ",".join(f"cpu:{rank}" for rank in range(degree))
    options: dict[str, Any] = {"window": WINDOW, "slots": 4, "max_length": 256, "dtype": dtype}
    backend = load_backend(str(model), device=device, exact=True, options=options)
    yield backend, degree, dtype
    backend.close()


def prompt_of(slot: int) -> Run:
    return Run(slot, TEXT[:PROMPT], 0, PROMPT, PROMPT - 1)


def windows_of(backend: TorchBackend, slot: int = 0) -> torch.Tensor:
    """The logits after the prompt's last token and after each position behind it, a full window at a time."""
    found = backend.compute([prompt_of(slot)], Never())
    found += backend.compute([Run(slot, TEXT[PROMPT:], PROMPT, 0, PROMPT)], Never())
    return torch.cat(found)


def plain_computation(directory: Path, backend: TorchBackend, degree: int, dtype: str, text: list[int]) -> torch.Tensor:
    """The logits after the prompt's last token and after each one behind it: ranks are threads, and sums plain additions."""

    @torch.inference_mode()
    def rank(ranks: ThreadRanks) -> torch.Tensor:
        torch.set_num_threads(1)
        loaded = load_model(
            directory,
            CPU,
            reference="made",
            dtype=dtype,
            quantization="none",
            rows=WINDOW,
            most_positions=256,
            ranks=ranks,
        )
        forward = Forward(loaded.decoder, loaded.config, CPU, slots=1, capacity=256)
        forward.read_step = backend.forward.read_step
        forward.attends_per_position = backend.forward.attends_per_position
        first = forward([Run(0, text[:PROMPT], 0, PROMPT, PROMPT - 1)], rows=PROMPT, logit_rows=1)
        rest = forward([Run(0, text[PROMPT:], PROMPT, WINDOW, PROMPT)], rows=WINDOW, logit_rows=WINDOW)
        return torch.cat(first + rest)

    return of_each_rank(degree, rank)[0]


# Weights


@pytest.mark.parametrize("tied", [True, False])
def test_each_rank_reads_its_own_part_and_together_they_have_all(tmp_path: Path, tied: bool) -> None:
    directory = make_uneven_model(tmp_path, tied=tied)
    assert len(list(directory.glob("*.safetensors"))) > 1
    whole = read_checkpoint(directory, torch.float32, CPU, "made")
    assert whole is not None
    parts = [read_checkpoint(directory, torch.float32, CPU, "made", share) for share in Share(0, 2).all()]
    ranks = [part for part in parts if part is not None]
    assert [part.config.num_key_value_heads for part in ranks] == [2, 1]
    assert [part.config.num_attention_heads for part in ranks] == [6, 3]
    for name, expected in whole.weights.items():
        found = [part.weights[name] for part in ranks if name in part.weights]
        if found[0].shape == expected.shape:
            assert torch.equal(found[0], expected)
            assert len(found) == (1 if name.endswith(("o_proj.bias", "down_proj.bias")) else 2), name
            continue
        dimension = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        assert torch.equal(torch.cat(found, dimension), expected), name


def test_refuses_what_cannot_be_divided(model: Path, tmp_path: Path) -> None:
    def load(directory: Path, device: str, engine: str = "transformers") -> None:
        load_engine(engine, role="target", model=str(directory), device=device, options={})

    before = psutil.Process().children(recursive=True)
    with pytest.raises(EngineError, match="has 3 KV heads, which cannot be divided among 4 devices: give it at most 3"):
        load(model, "cpu:0,cpu:1,cpu:2,cpu:3")
    sliding = make_tiny_model(tmp_path, sliding_window=16)
    with pytest.raises(EngineError, match="computed by transformers' layers, which cannot be divided among 2 devices"):
        load(sliding, "cpu:0,cpu:1")
    with pytest.raises(EngineError, match="of one kind"):
        load(model, "cpu:0,cuda:0")
    with pytest.raises(EngineError, match="the engine timed computes on one device"):
        load(model, "cpu:0,cpu:1", "timed")
    assert psutil.Process().children(recursive=True) == before


# Bits


def test_bits_are_those_of_a_plain_computation_of_the_same_degree(
    group: tuple[TorchBackend, int, str], model: Path
) -> None:
    backend, degree, dtype = group
    found = windows_of(backend)

    expected = plain_computation(model, backend, degree, dtype, TEXT)
    assert found.shape == (1 + LENGTH - PROMPT, 97)
    assert torch.equal(found[1:], expected[1:])
    assert torch.equal(found[0], expected[0])


@pytest.mark.long
@pytest.mark.model
def test_smollm2_has_the_bits_of_a_plain_computation_of_the_same_degree() -> None:
    """9 heads that share 3 KV heads: one rank has 6 and 2, the other 3 and 1."""
    directory = asyncio.run(resolve_model(DEFAULT_TARGET))
    text = [(17 * position * position + 5) % 49_000 for position in range(LENGTH)]
    options: dict[str, Any] = {"window": WINDOW, "slots": 1, "max_length": 256, "dtype": "float32"}
    backend = load_backend(str(directory), device="cpu:0,cpu:1", exact=True, options=options)
    try:
        [first] = backend.compute([Run(0, text[:PROMPT], 0, PROMPT, PROMPT - 1)], Never())
        found = [first]
        for begin, end in itertools.pairwise([PROMPT, PROMPT + 1, PROMPT + 6, PROMPT + 23, LENGTH]):
            found += backend.compute([Run(0, text[begin:end], begin, 0, begin)], Never())
        expected = plain_computation(directory, backend, 2, "float32", text)
    finally:
        backend.close()
    assert torch.equal(torch.cat(found), expected)


def test_numbers_are_those_of_transformers(group: tuple[TorchBackend, int, str], model: Path) -> None:
    from transformers import AutoModelForCausalLM

    backend, _, dtype = group
    library = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    with torch.inference_mode():
        expected = library(torch.tensor([TEXT])).logits[0, PROMPT - 1 :].float()
    found = windows_of(backend).float()
    assert (found - expected).norm() < (1e-4 if dtype == "float32" else 0.1) * expected.norm()


def test_bits_do_not_depend_on_widths_and_packings(group: tuple[TorchBackend, int, str]) -> None:
    backend, _, _ = group
    expected = windows_of(backend)[1:]
    for width in (1, 2, 3, 5, 8, 17, 33, 64):
        backend.compute([prompt_of(1)], Never())
        found = list[torch.Tensor]()
        for begin in range(PROMPT, LENGTH, width):
            tokens = TEXT[begin : min(begin + width, LENGTH)]
            found += backend.compute([Run(1, tokens, begin, 0, begin)], Never())
        assert torch.equal(torch.cat(found), expected), width
    chance = random.Random(3)
    known = [PROMPT] * 4
    for slot in range(4):
        backend.compute([prompt_of(slot)], Never())
    while min(known) < LENGTH:
        runs = list[Run]()
        for slot in chance.sample(range(4), chance.randint(1, 4)):
            end = min(LENGTH, known[slot] + chance.randint(1, 24))
            run = Run(slot, TEXT[known[slot] : end], known[slot], 0, known[slot])
            if run.tokens and sum(map(backend.rows, [*runs, run])) <= backend.most_rows:
                runs.append(run)
        for run, logits in zip(runs, backend.compute(runs, Never()) if runs else (), strict=True):
            assert torch.equal(logits, expected[run.begin - PROMPT :][: len(run.tokens)])
            known[run.slot] = run.begin + len(run.tokens)


def test_bits_on_a_branch_are_those_of_a_chain(group: tuple[TorchBackend, int, str]) -> None:
    backend, _, _ = group
    expected = windows_of(backend)[1:]
    fork, wrong = PROMPT + 20, [5, 6, 7, 8, 9, 10]
    backend.compute([prompt_of(2)], Never())
    main = Run(2, [*TEXT[PROMPT:fork], *wrong], PROMPT, 0, PROMPT)
    branch = Run(2, TEXT[fork : fork + 9], fork, 0, fork, fork)
    if backend.rows(main) + backend.rows(branch) > backend.most_rows:
        pytest.skip("no two windows in one forward have the bits of one on this processor")
    on_main, on_branch = backend.compute([main, branch], Never())
    assert torch.equal(on_main[: fork - PROMPT], expected[: fork - PROMPT])
    assert torch.equal(on_branch, expected[fork - PROMPT :][:9])
    after = fork + len(wrong)
    again = backend.compute([Run(2, [11], after, 0, after)], Never())[0]
    backend.compute([prompt_of(3)], Never())
    backend.compute([Run(3, main.tokens, PROMPT, 0, PROMPT)], Never())
    assert torch.equal(again, backend.compute([Run(3, [11], after, 0, after)], Never())[0])


def test_a_group_leaves_the_environment_as_it_was(group: tuple[TorchBackend, int, str]) -> None:
    """What its process starts later would inherit the network interface of the group."""
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_an_abort_at_any_part_leaves_all_ranks_ready(group: tuple[TorchBackend, int, str]) -> None:
    backend, _, _ = group
    expected = windows_of(backend)
    run = Run(0, TEXT[PROMPT:], PROMPT, 0, PROMPT)
    aborted = 0
    for checks in range(20):
        try:
            backend.compute([run], InterruptAfter(checks))
        except Interrupted:
            aborted += 1
        assert torch.equal(windows_of(backend), expected), checks
    assert aborted == 1 + 1 + 2  # before the forward, before its first part, and before each layer


# An engine


def answers(engine: ModelEngine, session: Session, drafts: Sequence[int], branches: Sequence[Branch] = ()) -> list[int]:
    start = len(session.tokens)
    session.write(start, drafts)
    task = Task(session, start, branches=branches)
    while not task.done:
        engine.step([task], NoInterrupt())
    session.truncate(start)
    session.write(start, task.answer.tokens)
    return task.answer.tokens


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_group_says_what_one_process_says(model: Path, temperature: float) -> None:
    """In float32 sums in another order give the same choice nearly always. Drafts, right or wrong, change nothing."""

    def text(device: str, drafts: Sequence[int]) -> list[int]:
        options: dict[str, Any] = {"max_length": 256, "slots": 2, "calibrate": False}
        engine = load_engine("transformers", role="target", model=str(model), device=device, options=options)
        assert isinstance(engine, ModelEngine)
        assert engine.info.devices == 1 + device.count(",")
        try:
            session = Session(1, 5, "", SamplingParameters(temperature=temperature, seed=4, top_p=0.95))
            session.write(0, [3, 1, 4, 1, 5])
            while len(session.tokens) < 45:
                done = len(session.tokens) - 5
                answers(engine, session, drafts[done : done + 5])
            return session.tokens[5:45]
        finally:
            engine.close()

    expected = text("cpu:0", [])
    assert text("cpu:0,cpu:1", [token if place % 7 else 1 for place, token in enumerate(expected)]) == expected


def test_a_drafter_may_be_a_group(model: Path) -> None:
    options: dict[str, Any] = {"max_length": 128, "slots": 2, "calibrate": False, "quantization": "none"}
    one, group = (
        load_engine("transformers", role="drafter", model=str(model), device=device, options=options)
        for device in ("cpu:0", "cpu:0,cpu:1")
    )
    tokens = [[*TEXT[:9]], [*TEXT[:9]]]
    for engine, text in ((one, tokens[0]), (group, tokens[1])):
        for _ in range(12):
            text += engine.draft(session_of(text, prompt_length=9), 1, NoInterrupt())
    group.close()
    assert tokens[0] == tokens[1]


# Agreement


def test_ranks_stop_before_the_same_part() -> None:
    steps = SharedSteps.create(2)
    steps.close_file()
    for stops_after in range(6):
        leading = Leading(steps, InterruptAfter(stops_after))
        following = Following(steps, leading.begin())
        ran = list[int]()

        def follow(following: Following = following, ran: list[int] = ran) -> None:
            with contextlib.suppress(Interrupted):
                while True:
                    following.check()
                    ran.append(1)

        thread = threading.Thread(target=follow)
        thread.start()
        for _ in range(stops_after):
            leading.check()
        with pytest.raises(Interrupted):
            leading.check()
        thread.join()
        assert len(ran) == stops_after
        assert leading.ended


def test_a_rank_that_sees_the_end_late_skips_no_part() -> None:
    """Rank 0 may have begun the next forward before a rank looks again."""
    steps = SharedSteps.create(2)
    steps.close_file()
    leading = Leading(steps, InterruptAfter(1))
    following = Following(steps, leading.begin())
    leading.check()
    following.check()
    with pytest.raises(Interrupted):
        leading.check()
    Leading(steps, Never()).begin()
    with pytest.raises(Interrupted):
        following.check()
