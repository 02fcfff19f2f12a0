"""A mixture of experts on a GPU computes what the decoder computes, with the same bits whatever other rows choose.

Without a GPU the kernels run in Triton's interpreter, in float32.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="kernels for a GPU need Triton")

from dsi_workers.backend import Run
from dsi_workers.checkpoints.load import load_model
from dsi_workers.checkpoints.sizes import buffer_bytes
from dsi_workers.decoding.decoder import Decoder
from dsi_workers.decoding.experts import Blocks, Expert, Mixture
from dsi_workers.decoding.forward import Forward
from dsi_workers.decoding.gpu.decoder import GpuDecoder
from dsi_workers.decoding.gpu.expert_kernels import choose_experts
from dsi_workers.decoding.gpu.experts import ExpertBuffers, GpuExperts
from dsi_workers.decoding.quantization import Int8Linear
from support.zoo import KINDS, WORDS, make

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
#: Of the norm of what is compared. In bfloat16 a near tie of two experts may be decided otherwise.
NEAR = 0.12 if GPU else 1e-5
HIDDEN, INNER, EXPERTS, TOP_K = 40, 24, 6, 2
CAPACITY = 256


def random_tensor(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(DEVICE, DTYPE)


def linear(rows: int, columns: int, seed: int) -> nn.Linear:
    made = nn.Linear(columns, rows, bias=False, device="meta")
    made.weight = nn.Parameter(random_tensor(rows, columns, seed=seed, scale=columns**-0.5), requires_grad=False)
    return made


def silu_of_gate(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def mixture(*, experts: int = EXPERTS, top_k: int = TOP_K, renormalizes: bool = True) -> Mixture:
    each = [
        Expert(linear(2 * INNER, HIDDEN, 2 * number), linear(HIDDEN, INNER, 2 * number + 1), silu_of_gate, None)
        for number in range(experts)
    ]
    return Mixture(linear(experts, HIDDEN, 99), each, top_k=top_k, renormalizes=renormalizes, blocks=Blocks())


def on_a_gpu(made: Mixture) -> GpuExperts:
    return GpuExperts(made, random_tensor(HIDDEN, seed=7).abs(), 1e-5)


def expected_of(made: Mixture, x: torch.Tensor) -> torch.Tensor:
    normed = nn.functional.rms_norm(x, (HIDDEN,), random_tensor(HIDDEN, seed=7).abs(), 1e-5)
    return x + made.forward(normed)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.float() - expected.float()).norm() <= NEAR * expected.float().norm()


@pytest.mark.parametrize(
    ("experts", "top_k", "renormalizes", "rows"),
    [(6, 2, True, 5), (6, 2, False, 20), (4, 1, False, 17), (5, 3, True, 40)],
)
@torch.inference_mode()
def test_outputs_are_the_mixtures(experts: int, top_k: int, renormalizes: bool, rows: int) -> None:
    """Numbers of experts that are no power of two, and more rows of an expert than a tile has."""
    made = mixture(experts=experts, top_k=top_k, renormalizes=renormalizes)
    x = random_tensor(rows, HIDDEN, seed=rows)
    expected = expected_of(made, x)
    assert_near(on_a_gpu(made)(x), expected)


@pytest.mark.parametrize("of_prompt", [False, True])
@torch.inference_mode()
def test_a_row_has_the_same_bits_whatever_other_rows_choose(of_prompt: bool) -> None:
    by_kernels = on_a_gpu(mixture())
    x, chance = random_tensor(64, HIDDEN, seed=3), random.Random(4)

    def outputs(rows: Sequence[int], *, padded: int) -> torch.Tensor:
        inputs = torch.full((padded, HIDDEN), 1e4, dtype=DTYPE, device=DEVICE)
        inputs[: len(rows)] = x[list(rows)]
        positions = torch.arange(padded, dtype=torch.int32, device=DEVICE)
        positions[len(rows) :] = -1
        by_kernels.add_to(inputs, positions, ExpertBuffers([by_kernels], padded, DEVICE), of_prompt=of_prompt)
        assert (inputs[len(rows) :] == 1e4).all(), "padding stays as it is"
        return inputs[: len(rows)]

    expected = outputs(range(64), padded=64)
    for size in (1, 2, 16, 33):
        rows = chance.sample(range(64), size)
        assert torch.equal(outputs(rows, padded=64 if of_prompt or size > 16 else 16), expected[rows]), size
    same = [5] * 40
    assert torch.equal(outputs(same, padded=64), expected[same]), "all rows choose the same experts"


@torch.inference_mode()
def test_only_experts_that_rows_chose_are_read() -> None:
    """Padding chooses none."""
    made = mixture()
    by_kernels, x = on_a_gpu(made), random_tensor(3, HIDDEN, seed=5)
    normed = nn.functional.rms_norm(x, (HIDDEN,), random_tensor(HIDDEN, seed=7).abs(), 1e-5)
    chosen, _ = made.route(normed)
    expected = by_kernels(x)
    assert by_kernels.counts.tolist() == torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
    for number in set(range(EXPERTS)) - set(chosen.flatten().tolist()):
        by_kernels._up[number], by_kernels._down[number] = torch.nan, torch.nan
    assert torch.equal(by_kernels(x), expected)


@torch.inference_mode()
def test_among_equals_the_first_expert_is_chosen() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 0.0], [2.0] * 5], device=DEVICE)
    choices, shares = torch.zeros(2, 5, dtype=torch.int8, device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    positions = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    choose_experts[(1,)](
        logits,
        positions,
        choices,
        shares,
        experts=5,
        top_k=3,
        renormalized=True,
        block_rows=2,
        block_experts=8,
        pdl=False,
    )
    assert choices.tolist() == [[3, 1, 0, 2, 0], [1, 2, 3, 0, 0]]
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2, device=DEVICE))
    assert shares[0, 0] == shares[0, 1] > shares[0, 2]


@torch.inference_mode()
def test_experts_in_int8_are_scaled_back() -> None:
    made, plain = mixture(), mixture()
    x = random_tensor(5, HIDDEN, seed=6)
    for expert, of_plain in zip(made.experts.each, plain.experts.each, strict=True):
        for name in ("up", "down"):
            int8 = Int8Linear(getattr(expert, name))
            if not GPU:  # the interpreter does not multiply bfloat16
                int8.scale = int8.scale.float()
            setattr(expert, name, int8)
            scaled = int8.weight.float() * int8.scale.float()[:, None]
            getattr(of_plain, name).weight = nn.Parameter(scaled.to(DTYPE), requires_grad=False)
    assert_near(on_a_gpu(made)(x), expected_of(plain, x))


def forwards(
    directory: Path, monkeypatch: pytest.MonkeyPatch, kind: str = "qwen3_moe", **more: Any
) -> tuple[GpuDecoder, Forward, Forward]:
    """By kernels, and by the decoder."""
    monkeypatch.setattr("dsi_workers.checkpoints.load.pack", lambda linear, rows: linear)
    if not GPU:  # there is nothing to compile, and the interpreter takes long
        monkeypatch.setattr("dsi_workers.decoding.gpu.recording._WARM_UP", 0)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, **more}
    make(directory, replace(KINDS[kind], settings={**KINDS[kind].settings, **small}))
    found = load_model(
        directory, DEVICE, reference="made", dtype="auto", quantization="none", rows=8, most_positions=CAPACITY,
        kernels=False,
    )  # fmt: skip
    assert isinstance(found.decoder, Decoder)
    by_kernels = GpuDecoder(found.decoder, prompt_chunk=128)
    first, second = (
        Forward(each, found.config, DEVICE, slots=2, capacity=CAPACITY) for each in (by_kernels, found.decoder)
    )
    return by_kernels, first, second


def run_of(slot: int, begin: int, count: int) -> Run:
    tokens = [(13 * slot + 7 * place + place * place) % WORDS for place in range(begin, begin + count)]
    return Run(slot, tokens, begin, count, begin)


def logits_of(forward: Forward, runs: Sequence[Run]) -> list[torch.Tensor]:
    rows = sum(run.width for run in runs)
    return forward(runs, rows=rows, logit_rows=rows)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_logits_are_the_decoders(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt and of what follows it."""
    _, by_kernels, plain = forwards(tmp_path, monkeypatch, kind)
    for run in (run_of(0, 0, 70), run_of(0, 70, 8)):
        [ours], [theirs] = logits_of(by_kernels, [run]), logits_of(plain, [run])
        assert_near(ours, theirs)


def test_a_model_may_have_both_kinds_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, by_kernels, plain = forwards(tmp_path, monkeypatch, mlp_only_layers=[0])
    for run in (run_of(0, 0, 70), run_of(0, 70, 3)):
        [ours], [theirs] = logits_of(by_kernels, [run]), logits_of(plain, [run])
        assert_near(ours, theirs)
    [read] = decoder.experts_read()
    assert 2 <= read <= 6


@pytest.mark.long
def test_a_token_has_the_same_bits_in_any_group_and_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, forward, _ = forwards(tmp_path, monkeypatch, num_hidden_layers=1)
    logits_of(forward, [run_of(0, 0, 20)])
    [expected] = logits_of(forward, [run_of(0, 20, 8)])
    for size in (1, 3):
        runs = [run_of(0, 20 + begin, min(size, 8 - begin)) for begin in range(0, 8, size)]
        assert torch.equal(torch.cat(logits_of(forward, runs)), expected), size
    assert torch.equal(torch.cat([logits_of(forward, [run])[0] for run in runs]), expected)
    assert torch.equal(logits_of(forward, [run_of(1, 0, 9), run_of(0, 20, 8)])[1], expected)
    branch = [replace(run_of(0, 22, 2), fork=22), run_of(0, 20, 8)]
    found, main = logits_of(forward, branch)
    assert torch.equal(main, expected)
    assert torch.equal(found, expected[2:4])


def test_a_chunk_of_a_prompt_has_the_same_bits_with_other_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that have not arrived yet, and what other texts left, change nothing."""
    _, forward, _ = forwards(tmp_path, monkeypatch, num_hidden_layers=1)
    run = run_of(0, 0, 70)
    [expected] = logits_of(forward, [run])
    logits_of(forward, [run_of(1, 0, 70)])
    [cut] = forward([Run(0, run.tokens[:40], 0, 70, 0)], rows=70, logit_rows=70)
    assert torch.equal(cut, expected[:40])
    assert torch.equal(logits_of(forward, [replace(run, slot=1)])[0], expected)


def test_the_buffers_are_as_large_as_is_counted() -> None:
    experts = on_a_gpu(mixture())
    rows = GpuDecoder.recorded_rows[-1]
    found = sum(each.nbytes for each in vars(ExpertBuffers([experts], rows, DEVICE)).values())
    config = {
        "hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": INNER,
        "intermediate_size": 96, "vocab_size": 64, "num_attention_heads": 2, "head_dim": 8,
    }  # fmt: skip
    dense = {name: value for name, value in config.items() if "expert" not in name and "moe" not in name}
    sizes = [buffer_bytes(each, positions=512, number_bytes=DTYPE.itemsize) for each in (config, dense)]
    assert sizes[0] - sizes[1] == found
