"""A drafter on a GPU drafts several tokens at once: those that it would draft one by one, or nearly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="kernels for a GPU need Triton")

import triton
import triton.language as tl

from dsi_protocol import SamplingParameters
from dsi_protocol.gumbel import gumbel, stream_key
from dsi_workers.backend import Run
from dsi_workers.decoding.forward import Forward
from dsi_workers.decoding.gpu import choice_kernels
from dsi_workers.decoding.gpu.drafts import can_draft
from dsi_workers.engine import Interrupted
from dsi_workers.engines import Task
from dsi_workers.engines.model import ModelEngine
from dsi_workers.sampling import Sampler
from dsi_workers.session import Session
from support.engines import InterruptAfter, NoInterrupt, session_of
from workers.test_gpu import DEVICE, WORDS, engine_on_a_gpu, forwards, logits_of, read, tokens_of

SAMPLED = SamplingParameters(temperature=0.9, seed=2**63 + 5)
FILTERED = [
    SamplingParameters(temperature=0.8, top_p=0.7, seed=3),
    SamplingParameters(temperature=1.3, top_k=3, seed=4),
    SamplingParameters(temperature=1.1, min_p=0.2, top_k=20, top_p=0.9, seed=5),
]


def one_by_one(
    forward: Forward, slot: int, begin: int, count: int, parameters: SamplingParameters, words: int
) -> list[int]:
    """Drafts as the engine makes them from logits."""
    session = Session(1, 1, "test", parameters)
    session.write(0, tokens_of(slot, 0, begin + 1))
    sampler = Sampler(session)
    for position in range(begin, begin + count):
        [logits] = logits_of(forward, [Run(slot, session.tokens[position:], position, 1, position)])
        session.write(position + 1, [sampler.choose(logits[0, :words], position + 1)])
    return session.tokens[begin + 1 :]


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(),
        SAMPLED,
        FILTERED[2],
        *(pytest.param(each, marks=pytest.mark.long) for each in FILTERED[:2]),
    ],
)
def test_drafts_are_those_of_one_forward_after_another(parameters: SamplingParameters) -> None:
    """Across the position at which attention is cut, and never a token that the target does not have."""
    by_kernels, _ = forwards(layers=1)
    begin, count, words = 126, 3, 60
    read(by_kernels, 0, begin)
    expected = one_by_one(by_kernels, 0, begin, count, parameters, words)
    assert max(expected) < words
    further = Run(0, expected[-1:], begin + count, 1, begin + count)
    [after] = logits_of(by_kernels, [further])
    assert by_kernels.draft(
        [Run(0, tokens_of(0, begin, 1), begin, 1, begin)], [parameters], count=count, words=words
    ) == [expected]
    assert torch.equal(logits_of(by_kernels, [further])[0], after), "the cache holds what it would hold"


def test_generations_are_drafted_together_each_with_its_own_parameters() -> None:
    by_kernels, _ = forwards(layers=1)
    begins, wanted = (
        (20, 127, 3),
        (SAMPLED, SamplingParameters(temperature=0.5, seed=9), SamplingParameters(temperature=2.0)),
    )
    for slot, begin in enumerate(begins):
        read(by_kernels, slot, begin)
    runs = [Run(slot, tokens_of(slot, begin, 1), begin, 1, begin) for slot, begin in enumerate(begins)]
    drafted = by_kernels.draft(runs, wanted, count=2, words=WORDS)
    assert drafted == [
        one_by_one(by_kernels, slot, begin, 2, parameters, WORDS)
        for slot, (begin, parameters) in enumerate(zip(begins, wanted, strict=True))
    ]


def test_what_needs_the_logits_is_left_to_the_engine() -> None:
    assert can_draft([SamplingParameters(), SAMPLED])
    assert can_draft(FILTERED[:1])
    assert not can_draft([SAMPLED, FILTERED[0]]), "the whole vocabulary would be sorted for each row"
    assert not can_draft([SamplingParameters(presence_penalty=0.5)])
    by_kernels, _ = forwards(layers=1)
    counted = by_kernels.count
    run = Run(0, [1], 0, 1, 0)
    assert by_kernels.draft([run], [SamplingParameters(bad_words=((2,),))], count=2, words=WORDS) is None
    assert by_kernels.count == counted


@triton.jit  # type: ignore[untyped-decorator]
def _write_noise(keys, out, size: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.arange(0, size)
    tl.store(out + token, choice_kernels._gumbel_noise(tl.load(keys).to(tl.uint64), token))


def test_the_noise_is_the_protocols() -> None:
    key = stream_key(7, 11)
    keys = torch.tensor([key - (1 << 64) if key >= 1 << 63 else key], device=DEVICE)
    out = torch.zeros(4096, device=DEVICE)
    _write_noise[(1,)](keys, out, size=4096)
    expected = torch.tensor([gumbel(7, 11, token) for token in range(4096)])
    assert expected.max() > 6, "where u is near 1"
    assert (out.cpu() - expected).abs().max() < 1e-4


def test_an_engine_drafts_a_block_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block begins where the first ended: no position is computed again."""
    engine = engine_that_drafts(monkeypatch, tmp_path)
    text = [5, 9, 20, 31]
    session, other = session_of(text), session_of(text, generation=2)
    single = [engine.draft(other, 1, NoInterrupt())[0]]
    for _ in range(7):
        other.write(len(other.tokens), single[-1:])
        single += engine.draft(other, 1, NoInterrupt())
    drafted = list[int]()
    engine.draft(session, 1, NoInterrupt())  # reads the prompt
    for count in (4, 3):
        task = Task(session, len(session.tokens), count, block=4)
        assert not engine.reads_alone(task)
        engine.step([task], NoInterrupt())
        assert task.done
        drafted += task.answer.tokens
        session.write(task.start, task.answer.tokens)
        assert session.computed == task.start
    assert drafted == single[:7]


def test_drafts_that_are_not_taken_are_not_taken_for_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target had another token behind the first draft."""
    engine = engine_that_drafts(monkeypatch, tmp_path)
    session = session_of([5, 9, 20, 31])
    engine.draft(session, 1, NoInterrupt())
    task = Task(session, 4, 4, block=4)
    engine.step([task], NoInterrupt())
    first, second, third, _ = task.answer.tokens
    session.write(4, [first, (second + 1) % 90, third])
    assert engine.reads_alone(Task(session, 7, 1)), "it has more than one position to compute"
    assert session.computed == 5
    [found] = engine.draft(session, 1, NoInterrupt())
    assert [found] == engine.draft(session_of(list(session.tokens), generation=2), 1, NoInterrupt())


@pytest.mark.parametrize("checks", [1, 4])
def test_an_interrupt_between_drafts_leaves_no_trace(
    checks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_that_drafts(monkeypatch, tmp_path)
    session = session_of([5, 9, 20, 31])
    engine.draft(session, 1, NoInterrupt())
    expected = Task(session, 4, 4, block=4)
    engine.step([expected], NoInterrupt())
    again = Task(session, 4, 4, block=4)
    with pytest.raises(Interrupted):
        engine.step([again], InterruptAfter(checks))
    engine.step([again], NoInterrupt())
    assert again.answer.tokens == expected.answer.tokens


def engine_that_drafts(monkeypatch: pytest.MonkeyPatch, directory: Path) -> ModelEngine:
    return engine_on_a_gpu(monkeypatch, directory, "drafter", slots=3, calibrate=False)
