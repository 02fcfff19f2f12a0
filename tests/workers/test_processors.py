"""What depends on the processor, on one with AVX2 only: a machine that has more is told to use no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

#: torch, oneDNN, FBGEMM, MKL and numpy's BLAS each choose their kernels by themselves. The Makefile has the same list.
AVX2_ONLY = {
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2", "OPENBLAS_CORETYPE": "Haswell",
}  # fmt: skip
#: Where kernels were found to matter.
TESTS = (
    "test_processors.py::test_kernels_are_those_of_this_setting",
    "test_packing.py",
    "test_decoder.py::test_int8_is_near",
    "test_decoder.py::test_int8_cuts_no_sum",
    "test_engines.py::test_the_bits_do_not_depend_on_how_tokens_are_grouped",
    "test_engines.py::test_learned_positions_may_be_used_to_the_last",
)
avx2 = pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx2"), reason="for a processor that has AVX2, and perhaps more"
)


@avx2
def test_kernels_are_those_of_this_setting() -> None:
    """Else the tests of such a processor would test nothing."""
    from dsi_workers.decoding import quantization

    if any(os.environ.get(name) != value for name, value in AVX2_ONLY.items()):
        pytest.skip("this run uses whatever the processor has")
    assert torch.backends.cpu.get_cpu_capability() == "AVX2"
    torch.backends.quantized.engine = "fbgemm"
    assert quantization._int16_sums_saturate()
    with pytest.raises(RuntimeError, match="bf16 path needs"):
        torch.ops.mkldnn._reorder_linear_weight(torch.ones(16, 16, dtype=torch.bfloat16), 8)


@pytest.mark.long
@avx2
@pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "avx2", reason="the whole run is for such a processor already"
)
def test_a_processor_with_avx2_only(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not (llama or zoo)"]
    command += [f"--basetemp={tmp_path / 'of'}"]
    done = subprocess.run(
        [*command, *(str(here / test) for test in TESTS)],
        env={**os.environ, **AVX2_ONLY}, cwd=here.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]


def test_the_makefile_has_the_same_list() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    assert " ".join(f"{name}={value}" for name, value in AVX2_ONLY.items()) in makefile
