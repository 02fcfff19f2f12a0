"""Text in, text out: the text of the tokens that `generate` gives, in whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import dsi_actors
from dsi_actors.config import ALGORITHMS
from dsi_actors.text_stream import sampling_for
from dsi_actors.tokenizer import Tokenizer
from support.engines import END, make_byte_model
from support.patience import until
from support.timed import text_of, timed_config

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("forked_workers")]

QUESTION = "Why is the sky blue?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def orchestrator(model: Path, forked_workers: None) -> AsyncIterator[dsi_actors.Orchestrator]:
    config = dsi_actors.Config(
        target=str(model), drafter=str(model), sp=1, devices=("cpu",), heartbeat_ms=100, silence_ms=600_000,
        drafter_options={"layers": 2, "quantization": "none"}, request_timeout_s=600, ready_timeout_s=600,
    )  # fmt: skip
    async with dsi_actors.Orchestrator(config) as started:
        yield started


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("raw", [True, False])
async def test_the_text_is_that_of_the_tokens(
    orchestrator: dsi_actors.Orchestrator, model: Path, algorithm: dsi_actors.config.Algorithm, raw: bool
) -> None:
    tokenizer = Tokenizer(model)
    prompt = tokenizer.encode(QUESTION) if raw else tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    sampling = dsi_actors.Sampling(max_tokens=60, temperature=1, seed=3, stop_token_ids=tokenizer.stop_token_ids)
    tokens = await text_of(orchestrator.generate(prompt, sampling, algorithm="ar"))
    stream = orchestrator.generate_text(QUESTION, raw=raw, max_tokens=60, temperature=1, seed=3, algorithm=algorithm)
    pieces = [piece async for piece in stream]
    assert stream.token_ids == tokens
    assert "".join(pieces) == tokenizer.decode(tokens, after=prompt if raw else ())
    assert all(pieces)
    assert (await stream.report()).algorithm == algorithm


async def test_an_answer_knows_its_tokens_and_what_it_cost(orchestrator: dsi_actors.Orchestrator, model: Path) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    answer = await orchestrator.answer(messages, max_tokens=20, temperature=1, seed=3, logprobs=True)
    assert answer == await orchestrator.answer(QUESTION, max_tokens=20, temperature=1, seed=3)
    assert answer == Tokenizer(model).decode(answer.token_ids)
    assert len(answer.logprobs) == len(answer.token_ids) == answer.report.tokens == 20
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_characters_are_whole(
    orchestrator: dsi_actors.Orchestrator, algorithm: dsi_actors.config.Algorithm
) -> None:
    """Each is several tokens."""
    structure = dsi_actors.Structure.regex("[🙂🎈é日]{12}")
    stream = orchestrator.generate_text("x", structure=structure, temperature=1, algorithm=algorithm)
    pieces = [piece async for piece in stream]
    assert len("".join(pieces)) == 12
    assert set("".join(pieces)) <= set("🙂🎈é日")
    assert len(stream.token_ids) > 24
    assert stream.token_ids[-1] == END


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("stop", "text"), [("cde", "ab"), (["🙂g", "zz"], "abcdef"), ("🙃", "abcdef🙂ghi"), ((), "abcdef🙂ghi")]
)
async def test_nothing_from_a_stop_string_on_is_given(
    orchestrator: dsi_actors.Orchestrator, algorithm: dsi_actors.config.Algorithm, stop: str | list[str], text: str
) -> None:
    """A stop string is several tokens, and so several pieces."""
    answer = await orchestrator.answer(
        "x", structure=dsi_actors.Structure.choice(["abcdef🙂ghi"]), stop=stop, algorithm=algorithm
    )
    assert (answer, answer.finish_reason) == (text, "stop")


async def test_a_stop_string_ends_the_generation(orchestrator: dsi_actors.Orchestrator) -> None:
    structure = dsi_actors.Structure.regex("a[bc]{400}")
    answer = await orchestrator.answer("x", structure=structure, max_tokens=450, stop=["b", "c"])
    assert (answer, answer.finish_reason, len(answer.token_ids)) == ("a", "stop", 2)
    assert answer.report.finish_reason == "cancelled"
    assert orchestrator.running == 0


async def test_who_leaves_cancels(orchestrator: dsi_actors.Orchestrator) -> None:
    async for _ in orchestrator.generate_text("x", max_tokens=400, ignore_eos=True):
        break
    await until(lambda: orchestrator.running == 0)
    stream = orchestrator.generate_text("x", max_tokens=400, ignore_eos=True)
    await anext(stream)
    await stream.aclose()
    assert orchestrator.running == 0
    assert [piece async for piece in stream] == []


async def test_bad_words_are_texts_or_tokens(orchestrator: dsi_actors.Orchestrator, model: Path) -> None:
    structure = dsi_actors.Structure.regex("[ab]{20}")
    assert await orchestrator.answer("x", structure=structure, bad_words=["a"]) == "b" * 20
    assert await orchestrator.answer("x", structure=structure, bad_words=[Tokenizer(model).encode("b")]) == "a" * 20


async def test_what_a_model_cannot_do_is_said_in_a_sentence(orchestrator: dsi_actors.Orchestrator) -> None:
    with pytest.raises(dsi_actors.ConfigError, match="reads no enable_thinking"):
        await orchestrator.answer("x", chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(dsi_actors.ConfigError, match="over the target's limit"):
        await orchestrator.answer("x" * 600)


@pytest.mark.parametrize(
    ("prompt", "options", "problem"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([1, 2], {}, "the prompt must be a text, or a list of messages"),
        ([{"content": "x"}], {}, "the prompt must be a text, or a list of messages"),
        (b"x", {}, "the prompt must be a text, or a list of messages"),
        ([{"role": "user", "content": "x"}], {"raw": True}, "raw is for a prompt that is a text"),
        ("x", {"stop": [""]}, "stop must be a text, or a list of texts"),
        ("x", {"stop": 5}, "stop must be a text, or a list of texts"),
        ("x", {"bad_words": "x"}, "bad_words must be a list of texts"),
        ("x", {"bad_words": [""]}, "bad_words must be a list of texts"),
        ("x", {"max_tokens": 0}, "max_tokens must be at least 1"),
        ("x", {"temperature": "hot"}, "temperature must be a number"),
        ("x", {"structure": "json"}, "structure must be a dsi_actors.Structure"),
        ("x", {"max_token": 1}, "there is no option max_token: choose among max_tokens, temperature"),
        ("x", {"algorithm": "best"}, "unknown algorithm"),
        ("x", {"sp": 0}, "sp must lie"),
    ],
)
async def test_what_no_model_can_do_is_said_at_once(prompt: Any, options: Any, problem: str) -> None:
    with pytest.raises(dsi_actors.ConfigError, match=problem) as raised:
        dsi_actors.Orchestrator().generate_text(prompt, **options)
    assert "\n" not in str(raised.value)


async def test_without_a_tokenizer_it_is_said_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = dsi_actors.Config(target=str(tmp_path), listen="tcp://127.0.0.1:*")
    async with dsi_actors.Orchestrator(config) as orchestrator:
        with pytest.raises(dsi_actors.ConfigError, match=r"tokenizer\.json") as raised:
            await orchestrator.answer("x")
    assert "\n" not in str(raised.value)


async def test_a_timed_engine_says_no_text() -> None:
    async with dsi_actors.Orchestrator(timed_config(sp=1, drafter=None)) as orchestrator:
        with pytest.raises(dsi_actors.ConfigError, match="the engine timed stands for a model and says no text"):
            await orchestrator.answer("x")


async def test_an_orchestrator_that_does_not_run_says_so(model: Path) -> None:
    with pytest.raises(dsi_actors.OrchestratorClosed, match="use it inside `async with`"):
        await dsi_actors.Orchestrator(dsi_actors.Config(target=str(model))).answer("x")


async def test_every_parameter_of_sampling_is_an_option() -> None:
    options = set(dsi_actors.TextOptions.__annotations__)
    assert {field.name for field in fields(dsi_actors.Sampling)} <= options


async def test_the_models_own_parameters_count_where_none_is_given(tmp_path: Path) -> None:
    make_byte_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 256, "do_sample": true, "top_p": 0.5}')
    tokenizer = Tokenizer(tmp_path)
    assert sampling_for(tokenizer, {"seed": 4}) == dsi_actors.Sampling(
        temperature=1, top_p=0.5, seed=4, stop_token_ids=(END,)
    )
    assert sampling_for(tokenizer, {"temperature": 0, "stop_token_ids": [7]}, stop=["<|end|>", "x"]) == (
        dsi_actors.Sampling(top_p=0.5, stop_token_ids=(7, END))
    )
    assert sampling_for(tokenizer, {}, ignore_eos=True).stop_token_ids == ()
