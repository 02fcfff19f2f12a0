"""The engine on llama.cpp. The contract of all engines, which it keeps too, is in test_engines.py and test_batches.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from dsi_workers.backend import Run
from dsi_workers.engine import EngineError, Interrupted
from dsi_workers.engines import load_engine
from dsi_workers.engines.model import ModelEngine
from dsi_workers.models.files import ModelError
from dsi_workers.models.resolve import resolve_gguf, resolve_model
from support.engines import NoInterrupt, session_of
from support.gguf_files import made, write

llama = pytest.mark.llama


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., ModelEngine]:
    pytest.importorskip("llama_cpp")
    file = write(tmp_path / "tiny.gguf", made())

    def load(role: str = "target", **options: Any) -> ModelEngine:
        options = {"max_length": 256, "slots": 2, "calibrate": False, **options}
        engine = load_engine("llama-cpp", role=role, model=str(file), device="cpu:0", options=options)
        assert isinstance(engine, ModelEngine)
        return engine

    return load


@llama
def test_llama_cpp_ends_a_forward_when_it_reads_that_it_is_not_wanted(load: Callable[..., ModelEngine]) -> None:
    backend: Any = load()._backend
    run, context = Run(0, list(range(40)), 0, 40, 39), backend._context
    [expected] = backend.compute([run], NoInterrupt())
    context._unwanted[0] = b"x"
    with pytest.raises(RuntimeError, match="llama_decode gave 2 for 40 rows"):
        backend.compute([run], NoInterrupt())
    context._unwanted[0] = b"\0"
    assert expected.equal(backend.compute([run], NoInterrupt())[0])


@llama
@pytest.mark.parametrize("problem", [Interrupted(), KeyError("the socket")])
def test_whatever_the_interrupt_raises_ends_the_forward_and_leaves_no_trace(
    load: Callable[..., ModelEngine], problem: Exception
) -> None:
    """After the forward has begun: the first look is before it."""

    class Second(NoInterrupt):
        looks = 0

        def check(self) -> None:
            self.looks += 1
            if self.looks == 2:
                raise problem

    backend = load()._backend
    run = Run(0, list(range(40)), 0, 40, 39)
    [expected] = backend.compute([run], NoInterrupt())
    with pytest.raises(type(problem)):
        backend.compute([run], Second())
    assert expected.equal(backend.compute([run], NoInterrupt())[0])


@llama
def test_settings_and_weights_are_in_the_fingerprint(load: Callable[..., ModelEngine]) -> None:
    once = load().info.fingerprint
    assert once > 0
    assert load().info.fingerprint == once  # the second time from the kept trial
    others = [load(threads=2), load(quantization="q8_0"), load(flash_attention=False)]
    assert len({once, *(engine.info.fingerprint for engine in others)}) == 4
    assert load("drafter").info.fingerprint == 0


@llama
def test_a_copy_in_fewer_bits_is_written_of_wider_weights_only(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from dsi_workers.llama.files import gguf_file

    file = write(tmp_path / "tiny.gguf", made())

    def kind(source: Path, quantization: str) -> int:
        found = gguf_file(str(source), quantization, 1)
        return int(gguf.GGUFReader(found).fields["general.file_type"].contents())

    kinds = gguf.LlamaFileType
    assert kind(file, "int8") == kinds.MOSTLY_Q8_0
    assert kind(file, "int4") == kinds.MOSTLY_Q4_1
    wide, narrow = (gguf_file(str(file), name, 1) for name in ("q8_0", "q4_0"))
    assert (kind(wide, "int8"), kind(wide, "int4")) == (kinds.MOSTLY_Q8_0, kinds.MOSTLY_Q4_1)
    assert kind(narrow, "int8") == kind(narrow, "int4") == kinds.MOSTLY_Q4_0


@llama
def test_a_prefix_is_kept_for_the_next_generation(load: Callable[..., ModelEngine]) -> None:
    engine = load(max_length=512)
    prompt = [(7 * position + 3) % 90 for position in range(300)]
    first = session_of(prompt)
    expected = engine.verify(first, 300, NoInterrupt()).tokens
    engine.forget(first)
    second = session_of(prompt, generation=2)
    assert engine.verify(second, 300, NoInterrupt()).tokens == expected
    assert engine._slots.reused == 256


@llama
def test_what_cannot_be_loaded_says_why(load: Callable[..., ModelEngine], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no weights of the kind Q99"):
        load(quantization="q99")
    with pytest.raises(EngineError, match="computes on a CPU, not on cuda:0"):
        load_engine("llama-cpp", role="target", model="x.gguf", device="cuda:0", options={})


def test_without_the_extra_it_says_how_to_install_it() -> None:
    if importlib.util.find_spec("llama_cpp") is not None:
        pytest.skip("llama.cpp is installed")
    with pytest.raises(EngineError, match=r"needs llama_cpp: pip install 'dsi-actors\[llama-cpp\]'"):
        load_engine("llama-cpp", role="target", model="x.gguf", device="cpu:0", options={})


def test_only_gguf_files_are_taken(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="reads GGUF files"):
        resolve_gguf(str(tmp_path))
    with pytest.raises(ModelError, match="there is no file"):
        resolve_gguf(str(tmp_path / "x.gguf"))


def test_the_vocabulary_of_a_gguf_is_read_without_its_weights(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", made())
    directory = resolve_model(str(file), tokenizer_only=True)
    assert (directory / "tokenizer.json").is_file()
    assert not list(directory.glob("*.safetensors"))
    whole = resolve_model(str(file))
    assert (whole / "model.safetensors").is_file()
    assert resolve_model(str(file), tokenizer_only=True) == whole
