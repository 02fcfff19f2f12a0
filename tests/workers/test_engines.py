"""One contract for all engines: rewind then extend equals fresh, an interrupt leaves no trace, answers are minimal."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsi_protocol import SamplingParameters
from dsi_workers.decoding.torch_backend import TorchBackend
from dsi_workers.decoding.widths import Trial, Widths
from dsi_workers.drafting.suffix_index import READ_AT_ONCE
from dsi_workers.engines import Engine, EngineError, Interrupted, Task, load_engine
from dsi_workers.engines.loading import load_model_engine
from dsi_workers.engines.model import ModelEngine
from dsi_workers.engines.translating import TranslatingEngine
from dsi_workers.session import Session
from support.engines import InterruptAfter, NoInterrupt, make_tiny_model, session_of, torch_backend
from support.gguf_files import made as made_llama
from support.gguf_files import write as write_gguf

MakeEngine = Callable[[], Engine]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def sliding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("sliding"), sliding_window=12)


# An int8 drafter computes in bfloat16 at whatever width the text comes: near ties fall either way, so it is not here.
@pytest.fixture(
    params=[
        "timed", "timed drafter", "transformers", "transformers drafter", "sliding window", "trigrams", "trigrams drafter",
        pytest.param("llama-cpp", marks=pytest.mark.llama), pytest.param("llama-cpp drafter", marks=pytest.mark.llama),
    ]
)  # fmt: skip
def engine(request: pytest.FixtureRequest, tiny_model: Path, sliding_model: Path) -> Engine:
    kind = request.param
    role = "drafter" if "drafter" in kind else "target"
    if "trigrams" in kind:
        model = request.getfixturevalue("example_model")
        return load_engine("trigrams", role=role, model=str(model), device="cpu:0", options={})
    if "llama-cpp" in kind:
        return llama_engine(role, request)
    if "timed" in kind:
        return load_engine("timed", role=role, model="", device="cpu:0", options={"acceptance": 0.5, "seed": 4})
    model = sliding_model if "sliding" in kind else tiny_model
    options: dict[str, Any] = {"max_length": 256, "quantization": "none"}
    return load_engine("transformers", role=role, model=str(model), device="cpu:0", options=options)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", made_llama())


def llama_engine(role: str, request: pytest.FixtureRequest, **options: Any) -> Engine:
    pytest.importorskip("llama_cpp")
    model = str(request.getfixturevalue("tiny_gguf"))
    options = {"max_length": 256, "slots": 2, **options}
    return load_engine("llama-cpp", role=role, model=model, device="cpu:0", options=options)


def fresh(engine: Engine, tokens: list[int], start: int) -> list[int]:
    session = session_of(tokens, prompt_length=min(len(tokens), 5), generation=999)
    try:
        return engine.verify(session, start, NoInterrupt()).tokens
    finally:
        engine.forget(session)


def grow(engine: Engine, session: Session, count: int) -> list[int]:
    grown: list[int] = []
    for _ in range(count):
        grown += engine.verify(session, len(session.tokens), NoInterrupt()).tokens
        session.write(len(session.tokens), grown[-1:])
    return grown


def test_one_token_at_a_time_or_all_at_once(engine: Engine) -> None:
    prompt = [3, 14, 15, 9, 26]
    session = session_of(prompt)
    own = grow(engine, session, 20)
    assert fresh(engine, prompt + own, 5) == [*own, *fresh(engine, prompt + own, 25)]


def test_an_answer_ends_at_the_first_difference(engine: Engine) -> None:
    prompt = [3, 14, 15, 9, 26]
    own = grow(engine, session_of(prompt), 6)
    wrong = (own[3] + 1) % 90
    assert fresh(engine, [*prompt, *own[:3], wrong, 7, 7], 5) == own[:4]
    assert fresh(engine, [*prompt, wrong], 5) == own[:1] or own[0] == wrong


def test_rewind_then_extend_equals_fresh(engine: Engine) -> None:
    prompt = [3, 14, 15, 9, 26]
    session = session_of(prompt)
    grow(engine, session, 12)
    for keep, branch in ((9, [1, 2]), (6, [80, 3, 4, 5, 6, 7, 8, 9, 10, 11]), (16, [1]), (5, [44])):
        session.truncate(keep)
        session.write(len(session.tokens), branch)
        tokens = list(session.tokens)
        assert engine.verify(session, len(tokens), NoInterrupt()).tokens == fresh(engine, tokens, len(tokens))
        start = max(5, len(tokens) - 3)
        assert engine.verify(session, start, NoInterrupt()).tokens == fresh(engine, tokens, start)


def test_an_interrupt_leaves_no_trace(engine: Engine) -> None:
    prompt = [3, 14, 15, 9, 26]
    session = session_of(prompt)
    interrupted = 0
    for checks in range(8):
        session.write(len(session.tokens), [checks + 30])
        tokens = list(session.tokens)
        try:
            engine.verify(session, len(tokens), InterruptAfter(checks))
        except Interrupted:
            interrupted += 1
        session.truncate(len(tokens) - checks % 3)
        tokens = list(session.tokens)
        assert engine.verify(session, len(tokens), NoInterrupt()).tokens == fresh(engine, tokens, len(tokens))
    if isinstance(engine, ModelEngine) and isinstance(engine._backend, TorchBackend):  # llama.cpp is asked by time
        assert interrupted >= 3, "an interrupt reaches between the layers"


def test_a_prompt_that_comes_in_pieces(engine: Engine) -> None:
    """Positions before prompt_length may arrive with several requests, and be taken back."""
    prompt = [(7 * position + 3) % 90 for position in range(70)]
    expected = fresh(engine, prompt, 70)
    session = session_of(prompt[:20], prompt_length=70)
    engine.verify(session, 20, NoInterrupt())
    session.write(20, prompt[20:])
    assert engine.verify(session, 70, NoInterrupt()).tokens == expected
    session.truncate(33)
    engine.verify(session, 33, NoInterrupt())
    session.write(33, prompt[33:])
    assert engine.verify(session, 70, NoInterrupt()).tokens == expected


@pytest.mark.parametrize(
    "kind", ["float32", "bfloat16", "trigrams",
             *(pytest.param(f"llama-cpp {kind}", marks=pytest.mark.llama) for kind in ("none", "f16", "q8_0", "q4_0"))],
)  # fmt: skip
def test_the_bits_do_not_depend_on_how_tokens_are_grouped(
    tiny_model: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """Log probabilities, compared as they are: one position at a time, all at once, and in random groups."""
    if kind == "trigrams":
        model = str(request.getfixturevalue("example_model"))
        engine = load_engine("trigrams", role="target", model=model, device="cpu:0", options={})
    elif kind.startswith("llama-cpp"):
        engine = llama_engine("target", request, quantization=kind.split()[1])
    else:
        options: dict[str, Any] = {"dtype": kind, "window": 8}
        engine = load_engine("transformers", role="target", model=str(tiny_model), device="cpu:0", options=options)
    wants = SamplingParameters(logprobs=True)
    prompt = [3, 14, 15, 9, 26]
    alone = Session(1, 5, "", wants)
    alone.write(0, prompt)
    expected: list[float] = []
    for _ in range(40):
        answer = engine.verify(alone, len(alone.tokens), NoInterrupt())
        expected += answer.logprobs
        alone.write(len(alone.tokens), answer.tokens)
    generator = random.Random(7)
    for number in range(2, 12):
        session = Session(number, 5, "", wants)
        session.write(0, prompt)
        found: list[float] = []
        while len(found) < 40:
            have = len(session.tokens)
            group = 40 if number == 2 else generator.randint(0, 13)
            session.write(have, alone.tokens[have : min(45, have + group)])
            answer = engine.verify(session, have, NoInterrupt())
            found += answer.logprobs[: len(session.tokens) - have + 1]
            session.write(len(session.tokens), answer.tokens[-1:])
        assert found[:40] == expected
        engine.forget(session)


def test_servers_with_other_bits_say_another_fingerprint(tiny_model: Path, sliding_model: Path) -> None:
    def said(model: Path, *, drafter: bool = False, **options: str | int) -> int:
        return load_model_engine(str(model), device="cpu", drafter=drafter, options=options).info.fingerprint

    once = said(tiny_model)
    assert once > 0
    assert said(tiny_model, slots=2) == once
    assert len({once, said(tiny_model, dtype="bfloat16"), said(sliding_model)}) == 3
    assert said(tiny_model, drafter=True) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_do_not_depend_on_how_much_of_the_cache_is_read(tmp_path: Path, dtype: str) -> None:
    """Around position 512 one grouping reads 512 positions of the cache for a token, another reads 1024."""
    model = make_tiny_model(tmp_path, positions=1024)
    engine = load_engine("transformers", role="target", model=str(model), device="cpu:0", options={"dtype": dtype})
    generator = random.Random(3)
    tokens = [generator.randrange(96) for _ in range(560)]
    found: list[list[float]] = []
    for number, group in enumerate((8, 3, 5, 1), start=1):
        session = Session(number, 480, "", SamplingParameters(logprobs=True))
        session.write(0, tokens[:480])
        logprobs: list[float] = []
        for begin in range(480, 552, group):
            session.write(begin, tokens[begin : begin + group])
            for start in range(begin, begin + group):  # an answer ends at the first difference: ask from each position
                logprobs += engine.verify(session, start, NoInterrupt()).logprobs[:1]
        found.append(logprobs[:72])
        engine.forget(session)
    assert len(set(found[0])) > 1, "these positions are not alike"
    assert [len(logprobs) for logprobs in found] == [72] * 4
    assert all(other == found[0] for other in found[1:])


def test_a_device_that_sums_by_what_it_reads_has_all_of_the_cache_read(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn import functional

    plain, chance = functional.scaled_dot_product_attention, random.Random(1)

    def by_length(query: Any, key: Any, *arguments: Any, **more: Any) -> Any:
        return plain(query, key, *arguments, **more) * (1 + key.shape[2] / 1e4)

    def by_chance(query: Any, *arguments: Any, **more: Any) -> Any:
        return plain(query, *arguments, **more) * (1 + chance.random() / 1e3)

    words: dict[str, Any] = {"role": "target", "device": "cpu:0", "options": {"max_length": 512, "kernels": False}}
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "by length"))
    monkeypatch.setattr(functional, "scaled_dot_product_attention", by_length)
    engine = load_engine("transformers", model=str(tiny_model), **words)
    assert torch_backend(engine).forward.read_step == 1024
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "by chance"))
    monkeypatch.setattr(functional, "scaled_dot_product_attention", by_chance)
    with pytest.raises(EngineError, match="gives different bits when it computes the same tokens again"):
        load_engine("transformers", model=str(tiny_model), **words)


def test_a_device_that_computes_a_prompt_by_chance_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows agree, chunks of a prompt do not."""
    from torch.nn import functional

    plain, chance = functional.scaled_dot_product_attention, random.Random(1)

    def by_chance(query: Any, *arguments: Any, **more: Any) -> Any:
        return plain(query, *arguments, **more) * (1 + (chance.random() / 1e3 if query.shape[2] > 200 else 0))

    monkeypatch.setenv("DSI_CACHE", str(tmp_path))
    monkeypatch.setattr(functional, "scaled_dot_product_attention", by_chance)
    with pytest.raises(EngineError, match="gives different bits when it computes the same tokens again"):
        load_engine(
            "transformers",
            role="target",
            model=str(tiny_model),
            device="cpu:0",
            options={"max_length": 512, "kernels": False},
        )


def test_a_device_that_sums_by_place_attends_to_each_position_by_itself(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then a token's bits do not depend on what is beside it."""
    import torch
    from torch.nn import functional

    plain = functional.scaled_dot_product_attention

    def by_place(query: Any, *arguments: Any, **more: Any) -> Any:
        return plain(query, *arguments, **more) * (1 + torch.arange(query.shape[2])[:, None] / 1e4)

    monkeypatch.setenv("DSI_CACHE", str(tmp_path))
    monkeypatch.setattr(functional, "scaled_dot_product_attention", by_place)
    options = {"max_length": 512, "window": 8, "kernels": False}
    first, again = (
        load_engine("transformers", role="target", model=str(tiny_model), device="cpu:0", options=options) for _ in "12"
    )
    wants, found = SamplingParameters(logprobs=True), []
    for engine, groups in ((first, (1,) * 8), (first, (8,)), (again, (3, 5))):
        assert torch_backend(engine).forward.attends_per_position
        session = Session(1, 2, "", wants)
        session.write(0, [5, 7])
        logprobs: list[float] = []
        for group in groups:
            begin = len(session.tokens)
            session.write(begin, [9 + 4 * place for place in range(begin, begin + group)])
            for start in range(begin, begin + group):
                logprobs += engine.verify(session, start, NoInterrupt()).logprobs[:1]
        found.append(logprobs)
        engine.forget(session)
    assert found[0] == found[1] == found[2]


def test_a_drafter_on_a_cpu_is_int8_unless_told_otherwise(tiny_model: Path) -> None:
    def layers(role: str, **options: Any) -> set[type]:
        words: dict[str, Any] = {
            "role": role,
            "device": "cpu:0",
            "options": {"calibrate": False, "kernels": False, **options},
        }
        engine = load_engine("transformers", model=str(tiny_model), **words)
        return {type(layer) for layer in torch_backend(engine).forward.linear_layers()}

    assert layers("drafter") == layers("drafter", quantization="int8") != layers("drafter", quantization="none")
    assert layers("target") == layers("drafter", quantization="none")


def test_a_drafter_translates_only_for_a_target_with_another_vocabulary_that_it_can_read(
    tiny_model: Path, tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path, words=64)
    kinds = {str(tiny_model): ModelEngine, str(other): TranslatingEngine, "/nowhere/x.gguf": ModelEngine}
    for target, kind in kinds.items():
        words: dict[str, Any] = {"role": "drafter", "device": "cpu:0", "options": {"target": target}}
        engine = load_engine("transformers", model=str(tiny_model), **words)
        assert type(engine) is kind
        assert engine.info.vocabulary_size == (64 if target == str(other) else 96)
        assert (engine.info.rows == 1) == (target == str(other)), "what is translated is a chain"
        assert len(engine.draft(session_of([3, 5, 7]), 1, NoInterrupt())) == 1


def test_widths_are_tried_once_for_all_that_they_depend_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    plain = Trial.widths

    def counted(trial: Trial, slots: int) -> Widths:
        tried.append(slots)
        return plain(trial, slots)

    def widths(**options: Any) -> set[int]:
        words: dict[str, Any] = {"role": "target", "device": "cpu:0", "options": {"calibrate": False, **options}}
        engine = load_engine("transformers", model=str(tiny_model), **words)
        widths = torch_backend(engine).widths
        assert widths is not None
        return set(widths.costs_s)

    monkeypatch.setattr(Trial, "widths", counted)
    monkeypatch.setenv("DSI_CACHE", str(tmp_path))
    first = widths()
    assert widths() == first
    assert len(tried) == 1
    widths(dtype="bfloat16")
    widths(slots=3)
    widths(window=4)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "ALL")
    widths()
    assert len(tried) == 5
    for file in (tmp_path / "trials").iterdir():
        file.write_text("{")
    assert widths() == first
    assert len(tried) == 6
    monkeypatch.setenv("DSI_CACHE", "/dev/null")
    assert widths() == first
    assert len(tried) == 7


@pytest.mark.parametrize("checks", [1, 2, 3])
def test_reading_the_prompt_again_spoils_nothing(engine: Engine, checks: int) -> None:
    """The prompt's chunk is wider than the prompt: its padding lies where the continuation was computed."""
    prompt = [3, 14, 15, 9, 26]
    session = session_of(prompt)
    own = grow(engine, session, 12)
    with contextlib.suppress(Interrupted):
        engine.verify(session, 5, InterruptAfter(checks))
    assert engine.verify(session, 17, NoInterrupt()).tokens == fresh(engine, prompt + own, 17)
    wrong = [*prompt, (own[0] + 1) % 90]
    session.truncate(5)
    session.write(5, [*own, 1])
    engine.verify(session, 18, NoInterrupt())
    branch = session_of(wrong, generation=2)
    engine.verify(branch, 5, NoInterrupt())
    assert engine.verify(session, 18, NoInterrupt()).tokens == fresh(engine, [*prompt, *own, 1], 18)


def test_sessions_do_not_disturb_each_other(engine: Engine) -> None:
    """More sessions than the cache has slots, taking turns."""
    sessions = [session_of([7 + number, 3, 5], generation=number + 1) for number in range(6)]
    texts: list[list[int]] = [[] for _ in sessions]
    for _ in range(4):
        for number, session in enumerate(sessions):
            texts[number] += grow(engine, session, 2)
    for number, text in enumerate(texts):
        assert text == grow(engine, session_of([7 + number, 3, 5], generation=77), 8)
        engine.forget(session_of([], generation=77))


def test_a_sliding_window_model_agrees_with_the_library(sliding_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    engine = load_engine("transformers", role="target", model=str(sliding_model), device="cpu:0", options={})
    prompt = [5, 17, 3, 41, 29, 11, 2]
    own = grow(engine, session_of(prompt), 40)
    model: Any = AutoModelForCausalLM.from_pretrained(sliding_model)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert own == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("quantization", "least"), [("int8", 45), ("int4", 20)])
def test_a_copy_in_fewer_bits_is_close_to_its_target(quantization: str, least: int, tiny_model: Path) -> None:
    target = load_engine("transformers", role="target", model=str(tiny_model), device="cpu:0", options={})
    options = {"quantization": quantization}
    drafter = load_engine("transformers", role="drafter", model=str(tiny_model), device="cpu:0", options=options)
    session, copy = session_of([3, 14, 15, 9, 26]), session_of([3, 14, 15, 9, 26])
    agreed = 0
    for _ in range(60):
        guess = drafter.draft(copy, 1, NoInterrupt())
        truth = grow(target, session, 1)
        agreed += guess == truth
        copy.write(len(copy.tokens), truth)
    assert agreed >= least


def test_ngram_continues_what_was_there_before() -> None:
    engine = load_engine("ngram", role="drafter", model="", device="cpu:0", options={"remember": False})
    repeated = session_of([9, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3], generation=1)
    assert engine.draft(repeated, 3, NoInterrupt()) == [4, 5, 6]
    assert engine.draft(repeated, 1, NoInterrupt()) == [4]
    assert engine.draft(session_of([1, 2, 3, 4], generation=2), 3, NoInterrupt()) == []
    long = session_of([*range(1000), 5, 6, 7], generation=3)
    assert engine.draft(long, 4, NoInterrupt()) == [8, 9, 10, 11]


def test_ngram_reads_a_long_text_in_pieces() -> None:
    """A cancel is looked for between them."""
    engine = load_engine("ngram", role="drafter", model="", device="cpu:0", options={})
    session = session_of([*range(3 * READ_AT_ONCE), 5, 6, 7])
    task, steps = Task(session, len(session.tokens), 2), 0
    while not task.done:
        engine.step([task], NoInterrupt())
        steps += 1
    assert steps == 4
    assert task.answer.tokens == [8, 9]


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 1.0])
def test_timed_drafters_agree_as_often_as_they_are_told(acceptance: float) -> None:
    target = load_engine("timed", role="target", model="", device="cpu:0", options={"seed": 11})
    options = {"seed": 11, "acceptance": acceptance}
    drafter = load_engine("timed", role="drafter", model="", device="cpu:0", options=options)
    session = session_of([1])
    agreed = 0
    for _ in range(2000):
        [truth] = target.verify(session, len(session.tokens), NoInterrupt()).tokens
        agreed += drafter.draft(session, 1, NoInterrupt()) == [truth]
        session.write(len(session.tokens), [truth])
    assert abs(agreed / 2000 - acceptance) < 0.05


@pytest.mark.skipif(sys.platform != "linux", reason="a device is a name that only Linux has")
def test_timed_engines_on_one_device_take_turns() -> None:
    """A step waits while another one computes, and no longer once it is not wanted."""

    def engine(device: str) -> Engine:
        return load_engine("timed", role="target", options={"device": device}, model="", device="cpu:0")

    one = f"one-{os.getpid()}"
    first, second, elsewhere = engine(one), engine(one), engine(f"another-{os.getpid()}")
    waits: list[float] = []

    class Waiting(NoInterrupt):
        def wait_until(self, deadline_s: float) -> None:
            waits.append(deadline_s)
            if len(waits) > 3:
                raise Interrupted

    class Computing(NoInterrupt):
        def wait_until(self, deadline_s: float) -> None:
            assert elsewhere.verify(session_of([1], generation=2), 1, NoInterrupt()).tokens
            with pytest.raises(Interrupted):
                second.verify(session_of([1], generation=3), 1, Waiting())

    first.verify(session_of([1], generation=1), 1, Computing())
    assert len(waits) == 4
    assert second.verify(session_of([1], generation=3), 1, NoInterrupt()).tokens
    with pytest.raises(EngineError, match="option device"):
        engine("x" * 65)


def test_jitter_is_drawn_for_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same verification takes the same time in every algorithm; the mean is the latency."""
    monkeypatch.setattr("dsi_workers.engines.timed.time", SimpleNamespace(perf_counter=lambda: 0.0))
    options = {"latency_ms": 20.0, "jitter": 0.5, "seed": 3}
    engines = [load_engine("timed", role="target", model="", device="cpu:0", options=options) for _ in range(2)]
    waits: list[list[float]] = [[], []]
    for engine, waited in zip(engines, waits, strict=True):

        class Note(NoInterrupt):
            def wait_until(self, deadline_s: float) -> None:
                waited.append(deadline_s)  # noqa: B023

        for length in range(1, 2001):
            engine.verify(session_of([1] * length), length, Note())
    assert waits[0] == waits[1]
    assert sum(waits[0]) / 2000 == pytest.approx(0.020, rel=0.05)
    assert len({round(wait, 4) for wait in waits[0]}) > 100


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            {"name": "nonsense"},
            "unknown engine 'nonsense': choose one of transformers, llama-cpp, timed, ngram, or pip install the package",
        ),
        ({"name": "ngram", "role": "target"}, "only drafts"),
        ({"name": "timed", "options": {"acceptance": 1.5}}, r"acceptance .* must lie in \[0, 1\], not 1.5"),
        ({"name": "timed", "options": {"latency_ms": -1}}, "latency_ms .* must be a number of at least 0, not -1"),
        ({"name": "transformers", "model": "package:no_such_package"}, "no Python package 'no_such_package'"),
        ({"name": "transformers", "model": "/nowhere/model.gguf"}, "there is no file /nowhere/model.gguf"),
        ({"name": "transformers", "model": ""}, "the model reference is empty"),
        ({"name": "transformers", "model": "tiny", "device": "cuda:7"}, "there is no GPU 7"),
        (
            {"name": "transformers", "model": "tiny", "options": {"window": 0}},
            r"window must be a whole number in \[1, 64\], not 0",
        ),
        ({"name": "transformers", "model": "tiny", "role": "boss"}, "unknown role 'boss'"),
        ({"name": "transformers", "model": "tiny", "options": {"dtype": "int3"}}, "unknown dtype 'int3'"),
        ({"name": "transformers", "model": "tiny", "options": {"quantization": "int3"}}, "unknown quantization"),
        (
            {"name": "transformers", "model": "tiny", "options": {"quantization": "int4", "kernels": False}},
            "cannot be computed in int4 here: only the kernels for CPUs do, for dense models on one thread: choose int8",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused(arguments: dict[str, object], problem: str, tiny_model: Path) -> None:
    settings = {"role": "target", "model": "", "device": "cpu:0", "options": {}, **arguments}
    if settings["model"] == "tiny":
        settings["model"] = str(tiny_model)
    with pytest.raises(EngineError, match=problem):
        load_engine(settings.pop("name"), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "qwen3_next", "recurrent_gemma", "falcon_mamba"])
def test_models_that_cannot_be_rewound_are_refused(model_type: str) -> None:
    from transformers import AutoConfig

    from dsi_workers.checkpoints.compatibility import refuse_if_not_rewindable

    with pytest.raises(EngineError, match="keeps a running state that cannot be rewound"):
        refuse_if_not_rewindable(AutoConfig.for_model(model_type), "org/model")


def test_models_with_other_masks_are_refused() -> None:
    from transformers import AutoConfig

    from dsi_workers.checkpoints.compatibility import refuse_if_not_rewindable

    with pytest.raises(EngineError, match="choose in a way of their own which earlier tokens they read"):
        refuse_if_not_rewindable(AutoConfig.for_model("moshi"), "org/model")


def test_learned_positions_may_be_used_to_the_last(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=96, n_embd=32, n_layer=2, n_head=4)).save_pretrained(tmp_path)
    shutil.copy(tiny_model / "tokenizer.json", tmp_path)
    engine = load_engine("transformers", role="target", model=str(tmp_path), device="cpu:0", options={})
    assert engine.info.max_length == 96
    session = session_of([3, 1, 4], prompt_length=3)
    assert len(grow(engine, session, 92)) == 92
    assert engine.verify(session, 3, NoInterrupt()).tokens[:92] == session.tokens[3:]


def test_longrope_models_stay_within_their_original_length() -> None:
    from transformers import AutoConfig

    from dsi_workers.checkpoints.compatibility import position_limit

    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [1.0] * 48, "short_factor": [1.0] * 48,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    config = AutoConfig.for_model("phi3", max_position_embeddings=131072, rope_parameters=rope)
    assert position_limit(config) == 4096
    assert position_limit(AutoConfig.for_model("llama", max_position_embeddings=8192)) == 8192


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "cfg.Config"}}')
    (tmp_path / "cfg.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(EngineError, match="transformers cannot read the configuration"):
        load_engine("transformers", role="target", model=str(tmp_path), device="cpu:0", options={})


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gemma3n_text", "llama4_text", "mixtral"])
def test_models_with_attention_only_are_taken(model_type: str) -> None:
    from transformers import AutoConfig

    from dsi_workers.checkpoints.compatibility import refuse_if_not_rewindable

    refuse_if_not_rewindable(AutoConfig.for_model(model_type), "org/model")
