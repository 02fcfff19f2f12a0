"""A prompt on a GPU: library calls compute what the decoder computes, and its bits are a function of the prompt alone.

Without a GPU, Triton's interpreter runs the kernels, and the library calls run on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton", reason="kernels for a GPU need Triton")

from dsi_protocol import SamplingParameters
from dsi_workers.backend import Run
from dsi_workers.benches.device import peak_tflops
from dsi_workers.benches.shapes import SHAPES
from dsi_workers.checkpoints.load import load_model
from dsi_workers.decoding import capacity
from dsi_workers.decoding.decoder import Decoder
from dsi_workers.decoding.forward import Forward
from dsi_workers.decoding.gpu import prompt
from dsi_workers.decoding.gpu.decoder import GpuDecoder
from dsi_workers.decoding.quantization import Int8Linear
from dsi_workers.decoding.torch_backend import TorchBackend
from dsi_workers.decoding.widths import Widths
from dsi_workers.engine import EngineError, Interrupted, Task
from dsi_workers.engines import load_engine
from dsi_workers.engines.model import ModelEngine
from dsi_workers.session import Session
from support.engines import InterruptAfter, NoInterrupt, make_tiny_model

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
#: Of the norm of what is compared.
NEAR = 0.03 if GPU else 1e-5
WORDS, CHUNK, CAPACITY = 96, 256, 1024


def decoder(directory: Path, monkeypatch: pytest.MonkeyPatch, sliding_window: int | None = None) -> tuple[Decoder, Any]:
    monkeypatch.setattr("dsi_workers.checkpoints.load.pack", lambda linear, rows: linear)
    model = make_tiny_model(directory, words=WORDS, sliding_window=sliding_window, positions=1 << 16)
    found = load_model(
        model, DEVICE, reference="tiny", dtype="auto", quantization="none", rows=8, most_positions=1 << 16, kernels=False
    )  # fmt: skip
    assert isinstance(found.decoder, Decoder)
    return found.decoder, found.config


def forwards(own: Decoder, config: Any, *, chunk: int = CHUNK, positions: int = CAPACITY) -> tuple[Forward, Forward]:
    """By library calls and kernels, and by the decoder."""
    by_kernels = GpuDecoder(own, prompt_chunk=chunk)
    first, second = (Forward(each, config, DEVICE, slots=3, capacity=positions) for each in (by_kernels, own))
    return first, second


def text(seed: int, length: int) -> list[int]:
    return [(13 * seed + 7 * place + place * place) % WORDS for place in range(length)]


def read(forward: Forward, slot: int, tokens: Sequence[int], *, chunk: int = CHUNK) -> list[torch.Tensor]:
    """The logits after each position, chunk by chunk."""
    return [
        logits_of(forward, Run(slot, tokens[begin : begin + chunk], begin, min(chunk, len(tokens) - begin), begin))
        for begin in range(0, len(tokens), chunk)
    ]


def logits_of(forward: Forward, run: Run) -> torch.Tensor:
    [logits] = forward([run], rows=run.width, logit_rows=len(run.wanted))
    return logits


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.float() - expected.float()).norm() <= NEAR * expected.float().norm()


@pytest.mark.parametrize("sliding_window", [None, 100])
def test_logits_are_the_decoders(sliding_window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a first chunk, of one with positions before it, and of one that is not full."""
    by_kernels, plain = forwards(*decoder(tmp_path, monkeypatch, sliding_window))
    tokens = text(1, 2 * CHUNK + 70)
    for ours, theirs in zip(read(by_kernels, 1, tokens), read(plain, 1, tokens), strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("sliding_window", [pytest.param(None, marks=pytest.mark.long), 100])
def test_a_chunk_has_the_same_bits_whatever_else_the_worker_computes(
    sliding_window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, config = decoder(tmp_path, monkeypatch, sliding_window)
    forward, _ = forwards(own, config)
    tokens = text(2, CHUNK + 140)
    expected = read(forward, 0, tokens)
    # In another slot, over what other texts left there, with other work between.
    with torch.inference_mode():
        like = torch.empty(1, own.kv_heads, 1, own.dim, dtype=own.dtype, device=DEVICE)
        for layer in forward.cache.layers:
            for tensor in layer.tensors(like, like):
                tensor[1:] = 50.0
    read(forward, 2, text(3, CHUNK))
    first = logits_of(forward, Run(1, tokens[:CHUNK], 0, CHUNK, 0))
    read(forward, 2, text(3, 128), chunk=128)
    # Some of its tokens have not arrived yet.
    cut = logits_of(forward, Run(1, tokens[CHUNK : CHUNK + 44], CHUNK, 140, CHUNK))
    second = logits_of(forward, Run(1, tokens[CHUNK:], CHUNK, 140, CHUNK))
    assert torch.equal(first, expected[0])
    assert torch.equal(cut, expected[1][:44])
    assert torch.equal(second, expected[1])
    # After a prefix that another generation left.
    read(forward, 0, [*tokens[:CHUNK], *text(4, 90)])
    assert torch.equal(logits_of(forward, Run(0, tokens[CHUNK:], CHUNK, 140, CHUNK)), expected[1])


@pytest.mark.long
def test_a_text_is_the_same_however_its_prompt_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in pieces, beside another generation, after a prefix that was kept: the log probabilities agree to the bit."""
    chunk = capacity.ROW_TILE
    forward, _ = forwards(*decoder(tmp_path, monkeypatch), chunk=chunk, positions=512)
    if not GPU:
        monkeypatch.setattr("dsi_workers.decoding.gpu.recording._WARM_UP", 0)
    widths = Widths({width: 1.0 for width in (8, 16, 32, 64)})
    backend = TorchBackend(forward, widths, vocabulary="", vocabulary_size=WORDS, max_length=384, window=8)
    engine = ModelEngine(backend, exact=True, calibrate=False)

    def session(number: int, tokens: Sequence[int], arrived: int) -> Session:
        made = Session(number, len(tokens), "", SamplingParameters(temperature=0.7, seed=5, logprobs=True))
        made.write(0, tokens[:arrived])
        return made

    def answer(one: Session) -> tuple[list[int], list[float]]:
        found = engine.verify(one, len(one.tokens), NoInterrupt())
        return found.tokens, found.logprobs

    tokens = text(5, chunk + 100)
    alone = session(1, tokens, len(tokens))
    expected = answer(alone)
    assert len(expected[1]) == 1
    in_pieces = session(2, tokens, chunk + 30)
    answer(in_pieces)
    in_pieces.write(len(in_pieces.tokens), tokens[len(in_pieces.tokens) :])
    assert answer(in_pieces) == expected
    together = [session(3, tokens, len(tokens)), session(4, text(6, chunk + 80), chunk + 80)]
    tasks = [Task(each, len(each.tokens)) for each in together]
    while left := [task for task in tasks if not task.done]:
        engine.step(left, NoInterrupt())
    assert (tasks[0].answer.tokens, tasks[0].answer.logprobs) == expected
    for each in (alone, in_pieces, *together):
        engine.forget(each)
    reused = engine._slots.reused
    assert answer(session(5, tokens, len(tokens))) == expected
    assert engine._slots.reused - reused == chunk, "a whole chunk is kept, and no part of one"


def test_the_chunk_is_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, config = decoder(tmp_path, monkeypatch)
    assert GpuDecoder(own).prompt_chunk == capacity.prompt_chunk_of("cuda") == 512
    assert capacity.prompt_chunk_of("cpu") == 128
    forward = Forward(GpuDecoder(own), config, DEVICE, slots=1, capacity=capacity.slot_positions(300, 512))
    assert forward.cache.capacity >= 512 + 64, "the fingerprint's prompt and window"
    assert capacity.slot_positions(2048, 512) == capacity.slot_positions(2048, 128), "chunks lie within max_length"


@pytest.mark.parametrize("checks", [0, 2])
def test_an_interrupt_takes_effect_within_a_chunk_and_leaves_no_trace(
    checks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, _ = forwards(*decoder(tmp_path, monkeypatch))
    run = Run(0, text(7, 128), 0, 128, 120)
    expected = logits_of(forward, run)
    logits_of(forward, Run(0, text(8, 128), 0, 128, 120))
    forward.interrupt = InterruptAfter(1 + checks)
    with pytest.raises(Interrupted):
        logits_of(forward, run)
    forward.interrupt = NoInterrupt()
    assert torch.equal(logits_of(forward, run), expected)


def test_few_layers_are_queued_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer ends only when it is waited for: the most that a cancel can find unfinished."""
    unfinished: list[object] = []

    class Event:
        def record(self) -> None:
            unfinished.append(self)

        def synchronize(self) -> None:
            del unfinished[: unfinished.index(self) + 1]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    queue, most = prompt._Queue(torch.device("cuda")), 0
    for _ in range(10):
        queue.add_layer()
        most = max(most, len(unfinished))
    assert most == 2


def test_the_end_of_a_long_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk of 32,768 positions, after random keys and values."""
    own, config = decoder(tmp_path, monkeypatch)
    by_kernels, plain = forwards(own, config, positions=1 << 15)
    run = Run(0, text(9, CHUNK), (1 << 15) - CHUNK, CHUNK, (1 << 15) - 8)
    found = []
    for forward in (by_kernels, plain):
        logits_of(forward, Run(0, text(9, 128), 0, 128, 127))  # allocates the cache
        with torch.inference_mode():
            forward.cache.fill_at_random()
        found.append(logits_of(forward, run))
    assert_near(*found)


def test_no_mask_grows_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, rows, window = 32_256, 512, 1000
    whole, _ = decoder(tmp_path / "whole", monkeypatch)
    sliding, _ = decoder(tmp_path / "sliding", monkeypatch, window)
    chunk = prompt._Chunk(whole, begin, rows, 1 << 15)
    assert chunk._sliding is None
    assert chunk._causal.untyped_storage().nbytes() == 0
    mask = prompt._Chunk(sliding, begin, rows, 1 << 15)._sliding
    assert mask is not None
    assert mask.shape[0] == rows
    assert window + rows <= mask.shape[1] + 1 <= window + rows + capacity.ROW_TILE
    assert (mask == 0).sum(dim=1).eq(window).all()


@pytest.mark.parametrize("kind", ["plain", "biased", "int8"])
def test_products_are_added_in_place(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    linear: torch.nn.Module = torch.nn.Linear(24, 40, bias=kind != "plain")
    if kind == "int8":
        linear = Int8Linear(cast(torch.nn.Linear, linear))
        linear.scale, linear.bias = linear.scale.float(), None if linear.bias is None else linear.bias.float()
    x, inputs = torch.randn(16, 40, generator=generator), torch.randn(16, 24, generator=generator)
    with torch.inference_mode():
        expected = x + linear.forward(inputs)
        prompt._add_product(x, linear, inputs)
    torch.testing.assert_close(x, expected)


def test_a_window_that_a_gpu_would_compute_like_a_prompt_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsi_workers.engines.loading.torch_device", lambda name: torch.device("cuda:0"))
    model, options = str(make_tiny_model(tmp_path)), {"window": 100}
    with pytest.raises(EngineError, match=r"option window must be a whole number in \[1, 64\], not 100"):
        load_engine("transformers", role="target", model=model, device="cuda:0", options=options)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA H200 NVL", None), ("cpu", None),
    ],
)  # fmt: skip
def test_peak_rates_are_those_of_the_card(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_the_arithmetic_of_a_prompt_is_counted() -> None:
    """An 8B shape has 7 billion weights in its layers; attention adds 15 % at 8,192 positions."""
    assert SHAPES["8b"].prompt_flop(512) / 512 == pytest.approx(2 * 6.98e9, rel=0.02)
    more = SHAPES["8b"].prompt_flop(8192) / 8192 - 2 * 6.98e9
    assert more == pytest.approx(32 * 4 * 4096 * 4096, rel=0.02)


@pytest.mark.skipif(not GPU, reason="there is no GPU")
def test_a_long_prompt_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, config = decoder(tmp_path, monkeypatch)
    forward, _ = forwards(own, config, chunk=512, positions=1 << 15)
    read(forward, 0, text(1, 512), chunk=512)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for begin in range(0, 1 << 15, 512):
        logits_of(forward, Run(0, text(1, 512), begin, 512, begin + 511))
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
