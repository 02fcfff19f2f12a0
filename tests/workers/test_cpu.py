"""The kernels for CPUs: what they compute, that no row's bits depend on what is beside it, and where they do not compute."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import nn

from dsi_workers.backend import Run
from dsi_workers.checkpoints.load import load_model
from dsi_workers.decoding.cpu import GROUP, INPUTS_PER_SUM, LANES, OUTPUTS, ROWS_TOGETHER, kernels, multiplies_bfloat16
from dsi_workers.decoding.cpu.arena import Arena
from dsi_workers.decoding.cpu.bfloat16 import narrow, wide
from dsi_workers.decoding.cpu.decoder import CpuDecoder
from dsi_workers.decoding.cpu.kernels import attention_of
from dsi_workers.decoding.cpu.linear import TileLinear, as_array, in_four_bits, input_dtype
from dsi_workers.decoding.decoder import Decoder
from dsi_workers.decoding.forward import Forward
from support.engines import make_tiny_model

DTYPES = (torch.float32, torch.bfloat16)
WORDS, CAPACITY = 97, 512


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiles_of(outputs: int, size: int, dtype: torch.dtype, *, bias: bool = False) -> TileLinear:
    linear = nn.Linear(size, outputs, bias=bias)
    linear.weight.data = random(outputs, size)
    return TileLinear(linear.to(dtype), Arena())


# Weights in large pages


def test_arrays_of_an_arena_share_large_pages() -> None:
    arena = Arena()
    arrays = [arena.keep(np.full(size, size, np.float32)) for size in (1, 17, 1 << 18, 20 << 20)]
    first, second, third, larger = (array.ctypes.data for array in arrays)
    assert (first % (2 << 20), second - first, third - second) == (0, 64, 128)
    assert larger % (2 << 20) == 0, "it has pages of its own"
    assert all((array == len(array)).all() for array in arrays), "none lies on another"


# Products


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("outputs", [OUTPUTS, OUTPUTS + 1, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_that_of_torch(rows: int, outputs: int, dtype: torch.dtype) -> None:
    size = INPUTS_PER_SUM + LANES  # two sums for each output
    linear = nn.Linear(size, outputs)
    linear.weight.data, linear.bias.data = random(outputs, size), random(outputs)
    tiles = TileLinear(linear.to(dtype), Arena())
    x = random(rows, size, seed=2).to(tiles.dtype)
    expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    torch.testing.assert_close(tiles(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.12)])
def test_a_product_in_fewer_bits_is_near(rows: int, bits: int, error: float) -> None:
    size = INPUTS_PER_SUM + GROUP
    linear = nn.Linear(size, 10)
    linear.weight.data = random(10, size)
    tiles, x = TileLinear(linear, Arena(), bits=bits), random(rows, size, seed=2)
    x[0, :GROUP] = 0
    expected = linear(x)
    found = tiles(x)
    assert (found - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_each_weight_in_fewer_bits_is_where_it_was(bits: int) -> None:
    """The product of the identity is the weights, each of which is within half a step of its own."""
    linear = nn.Linear(2 * GROUP, 6, bias=False)
    linear.weight.data = random(6, 2 * GROUP)
    found = TileLinear(linear, Arena(), bits=bits)(torch.eye(2 * GROUP)).T
    steps = linear.weight.view(6, 2, GROUP).amax(2) - linear.weight.view(6, 2, GROUP).amin(2)
    step = (steps / 15).repeat_interleave(GROUP, 1) if bits == 4 else linear.weight.abs().amax(1, True) / 127
    assert ((found - linear.weight).abs() <= 0.6 * step).all()


def test_numbers_of_four_bits_are_found_again() -> None:
    """As those of a GGUF file with Q4_1, whose scales are in float16. Ours are in bfloat16."""
    numbers = torch.randint(16, (8, 3, GROUP), generator=torch.Generator().manual_seed(3))
    numbers[:, :, 4], numbers[:, :, 20] = 0, 15
    scale = random(8, 3).abs().add(0.1).half().float()
    low = (-7.7 * scale).half().float()
    found, scales = in_four_bits((numbers * scale[:, :, None] + low[:, :, None]).flatten(1))
    assert torch.equal(found.view(numbers.shape).long(), numbers)
    torch.testing.assert_close(scales.float().view(8, 3, 2), torch.stack((scale, low), 2), rtol=2**-7, atol=0)


_FEATURES = """
import numpy as np
from dsi_workers.decoding.cpu.products import check_products, multiply
drawn = np.random.default_rng(1)
x, none = drawn.standard_normal((7, 384), np.float32), np.empty(0, np.float32)
for bits, kind, shape in ((8, np.int8, (2, 96, 32, 4)), (4, np.uint8, (2, 48, 32, 4))):
    check_products(bits)
    tiles = drawn.integers(-127, 128, shape).astype(kind)
    scale = np.ones(64, np.float32) if bits == 8 else drawn.integers(0x3F00, 0x3F80, (2, 12, 2, 32)).astype(np.uint16)
    out = np.empty((7, 64), np.float32)
    multiply(x, tiles, scale, none, out)
    print(out.tobytes().hex())
"""


def test_whole_numbers_give_the_same_product_with_other_instructions() -> None:
    """Those of this processor, those of AVX2, and without either, as on another processor: sums of whole numbers are exact."""

    def computed(**settings: str) -> list[str]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
        words = [sys.executable, "-c", _FEATURES]
        done = subprocess.run(words, env={**variables, **settings}, capture_output=True, text=True, check=True)
        return done.stdout.split()

    found = computed()
    assert len(found) == 2
    if platform.machine() in ("x86_64", "AMD64"):
        assert computed(NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="+sse2") == found
        if "avx2" in Path("/proc/cpuinfo").read_text().split():
            assert computed(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+avx,+avx2,+fma") == found


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_product_has_the_same_bits_beside_any_rows(dtype: torch.dtype) -> None:
    tiles = tiles_of(OUTPUTS + 1, 1536, dtype, bias=True)
    x = random(37, 1536).to(tiles.dtype)
    together = tiles(x)
    for rows in range(1, 18):
        assert torch.equal(torch.cat([tiles(part) for part in x.split(rows)]), together), rows


def test_more_rows_than_a_core_keeps_are_multiplied_in_parts() -> None:
    tiles = tiles_of(8 * OUTPUTS, 4096, torch.float32)
    x = random(75, 4096)
    torch.testing.assert_close(tiles(x), x @ random(8 * OUTPUTS, 4096).T, rtol=1e-4, atol=1e-4)


# Numbers


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    import numba

    @numba.njit
    def rounded(numbers: Any, out: Any) -> None:
        for i in range(len(numbers)):
            out[i] = narrow(numbers[i], out)  # type: ignore[no-untyped-call]

    @numba.njit
    def widened(bits: Any, out: Any) -> None:
        for i in range(len(bits)):
            out[i] = wide(bits[i])  # type: ignore[no-untyped-call]

    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], dtype=torch.int32).view(torch.float32)
    numbers = torch.cat((random(1000), random(1000) * 1e38, ties, torch.tensor([0.0, -0.0, torch.inf, -torch.inf])))
    bits = np.empty(len(numbers), np.uint16)
    rounded(numbers.numpy(), bits)
    expected = numbers.to(torch.bfloat16)
    assert (bits == as_array(expected)).all()
    back = np.empty(len(numbers), np.float32)
    widened(bits, back)
    assert (back == expected.float().numpy()).all()
    rounded(np.array([np.nan], np.float32), bits[:1])
    widened(bits[:1], back[:1])
    assert np.isnan(back[0])


def test_the_exponential_is_as_right_as_it_says() -> None:
    import numba

    exponential = kernels._exp

    @numba.njit(fastmath=kernels._FAST)
    def computed(numbers: Any, out: Any) -> None:
        for i in range(len(numbers)):
            out[i] = exponential(numbers[i])

    numbers = np.linspace(-87, 88, 100_001, dtype=np.float32)
    found = np.empty_like(numbers)
    computed(numbers, found)
    errors = abs(found / np.exp(numbers.astype(np.float64)) - 1)
    assert errors.max() < 1e-5
    assert errors[abs(numbers) <= 4].max() < 1e-6


def test_other_threads_run_while_a_kernel_does() -> None:
    """A heart must beat while a long chunk of a prompt is computed."""
    called = (kernels.before_attention, kernels.after_attention, kernels.logits_of, attention_of(4, 2, 16, False))
    assert all(kernel.targetoptions.get("nogil") for kernel in called)


# Attention


def attended(
    states: torch.Tensor, cache: tuple[Any, Any], first: int, *, dim: int, window: int = 0, chunk: int = 0
) -> torch.Tensor:
    """Attention of a run of positions, without RoPE. Four query heads share two KV heads."""
    rows = len(states)
    queries = ROWS_TOGETHER * 2
    none = np.empty(0, np.float32)
    cos, sin = np.ones((CAPACITY, dim), np.float32), np.zeros((CAPACITY, dim), np.float32)
    out = torch.empty(rows, 4 * dim)
    attention_of(4, 2, dim, False)(
        as_array(states.clone()), none, none, np.float32(0), cos, sin, *cache, first, window, chunk, np.float32(dim**-0.5),
        np.empty((queries, dim), np.float32), np.empty((queries, CAPACITY), np.float32), np.empty((queries, dim), np.float32),
        as_array(out),
    )  # fmt: skip
    return out


def empty_cache(dim: int, dtype: torch.dtype) -> tuple[Any, Any]:
    return as_array(torch.zeros(2, CAPACITY, dim, dtype=dtype)), as_array(torch.zeros(2, CAPACITY, dim, dtype=dtype))


@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (7, 0), (0, 16)])
@pytest.mark.parametrize("dim", [16, 48, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_that_of_torch_and_each_row_has_the_same_bits_in_any_group(
    dtype: torch.dtype, dim: int, window: int, chunk: int
) -> None:
    positions = 61
    states = random(positions, 8 * dim)
    whole = attended(states, empty_cache(dim, dtype), 0, dim=dim, window=window, chunk=chunk)
    queries, keys, values = (
        part.view(positions, -1, dim).transpose(0, 1).repeat_interleave(repeats, 0)
        for part, repeats in zip(states.split((4 * dim, 2 * dim, 2 * dim), 1), (1, 2, 2), strict=True)
    )
    of_row, of_key = torch.arange(positions)[:, None], torch.arange(positions)[None]
    mask = of_key <= of_row
    mask &= of_key > of_row - window if window else mask
    mask &= of_key // chunk == of_row // chunk if chunk else mask
    kept = (keys.to(dtype).float(), values.to(dtype).float())
    expected = nn.functional.scaled_dot_product_attention(queries, *kept, attn_mask=mask)
    torch.testing.assert_close(whole, expected.transpose(0, 1).reshape(positions, -1), rtol=1e-4, atol=1e-5)
    for rows in (1, 2, 3, 5, 8, 11):
        cache, parts = empty_cache(dim, dtype), list[torch.Tensor]()
        for begin in range(0, positions, rows):
            part = states[begin : begin + rows]
            parts.append(attended(part, cache, begin, dim=dim, window=window, chunk=chunk))
        assert torch.equal(torch.cat(parts), whole), rows


# The decoder


def loaded(directory: Path, **options: Any) -> tuple[Any, Any]:
    words = {"dtype": "float32", "quantization": "none", "rows": 8, "most_positions": 256, **options}
    found = load_model(directory, torch.device("cpu"), reference="tiny", **words)
    return found.decoder, found.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sliding_window", [None, 24])
@pytest.mark.parametrize("threads", [1, 3])
@torch.inference_mode()
def test_a_token_has_the_same_bits_in_any_run_and_beside_any_generation_and_with_any_threads(
    dtype: str, sliding_window: int | None, threads: int, tmp_path: Path
) -> None:
    make_tiny_model(tmp_path, words=WORDS, sliding_window=sliding_window)
    decoder, config = loaded(tmp_path, dtype=dtype, prompt_threads=threads)
    assert isinstance(decoder, CpuDecoder)
    tokens = [7 * place % WORDS for place in range(100)]

    def logits(widths: list[int], *, beside: bool) -> torch.Tensor:
        forward = Forward(decoder, config, torch.device("cpu"), slots=2, capacity=CAPACITY)
        found, begin = [], 0
        for width in widths:
            runs = [Run(0, tokens[begin : begin + width], begin, width, begin)]
            if beside:
                runs.insert(0, Run(1, tokens[: width + 1], begin, width + 1, begin))
            rows = sum(run.width for run in runs)
            found.append(forward(runs, rows=rows, logit_rows=rows)[-1])
            begin += width
        return torch.cat(found)

    expected = logits([1] * 100, beside=False)
    for widths in ([100], [64, 36], [3, 8, 8, 30, 1, 50], [17] * 5 + [15]):
        for beside in (False, True):
            assert torch.equal(logits(widths, beside=beside), expected)


@pytest.mark.parametrize(
    ("options", "threads"),
    [({}, 2), ({"dtype": "float16"}, 1), ({"kernels": False}, 1)],
    ids=["threads", "float16", "told"],
)
def test_torch_computes_what_the_kernels_do_not(options: dict[str, Any], threads: int, tmp_path: Path) -> None:
    make_tiny_model(tmp_path, words=WORDS)
    torch.set_num_threads(threads)
    decoder, _ = loaded(tmp_path, **options)
    assert isinstance(decoder, Decoder)


@pytest.mark.parametrize("broken", ["missing", "wrong"])
def test_kernels_that_do_not_work_are_not_used(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_model(tmp_path, words=WORDS)
    if broken == "missing":
        monkeypatch.setitem(sys.modules, "dsi_workers.decoding.cpu.decoder", None)
    else:
        monkeypatch.setattr(
            "dsi_workers.decoding.cpu.products.multiply", lambda x, tiles, scale, bias, out: out.fill(0)
        )
    with capture_logs() as logs:
        decoder, _ = loaded(tmp_path)
    assert isinstance(decoder, Decoder)
    assert any("CPU kernels do not work here" in entry["event"] for entry in logs)


def test_inputs_are_in_bfloat16_only_where_the_compiler_may_multiply_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(CPU_FEATURES="+avx2,+fma")
    monkeypatch.setattr("numba.config", config)
    assert not multiplies_bfloat16()
    assert input_dtype(torch.bfloat16) is torch.float32
    config.CPU_FEATURES = "+avx512f,+avx512bf16"
    assert multiplies_bfloat16()
    assert input_dtype(torch.bfloat16) is torch.bfloat16
    assert {input_dtype(dtype) for dtype in (torch.int8, torch.float32)} == {torch.float32}
