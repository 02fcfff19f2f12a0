"""The real model: SmolLM2-135M-Instruct on this machine's CPU, against transformers' own greedy decoding."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import dsi_actors
from dsi_actors.config import ALGORITHMS, DEFAULT_TARGET
from dsi_actors.models import resolve_model
from dsi_actors.tokenizer import Tokenizer
from dsi_protocol import SamplingParameters
from dsi_workers.engines import Task, load_engine
from dsi_workers.session import Session
from dsi_workers.tree import Branch
from support.engines import NoInterrupt

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("forked_workers")]

PROMPTS = (
    'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number."""\n',
    "The three laws of thermodynamics are",
)
TOKENS = 16


@pytest.fixture(scope="module")
def model() -> Path:
    """Converts the weights, the first time on this machine."""
    return asyncio.run(resolve_model(DEFAULT_TARGET))


@pytest.mark.parametrize(
    "prompt", [PROMPTS[0], pytest.param(PROMPTS[1], marks=pytest.mark.long)], ids=["code", "prose"]
)
async def test_all_algorithms_agree_with_transformers(model: Path, prompt: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer(model)
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sampling = dsi_actors.Sampling(max_tokens=TOKENS)
    async with dsi_actors.Orchestrator(dsi_actors.Config(devices=("cpu",), sp=2)) as orchestrator:
        prompt_ids = tokenizer.encode(prompt)
        outputs: list[list[int]] = []
        for algorithm in ALGORITHMS:
            stream = orchestrator.generate(prompt_ids, sampling, algorithm=algorithm)
            outputs.append([token async for tokens in stream for token in tokens])
            report = await stream.report()
            if algorithm != "ar":
                assert report.acceptance_rate > 0.5, "an int8 copy of the target agrees with it most of the time"
                assert report.target_forwards - report.wasted_target_forwards <= TOKENS
        expected = await asyncio.to_thread(
            reference.generate,
            torch.tensor([prompt_ids]),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        assert outputs[0] == outputs[1] == outputs[2] == expected[0, len(prompt_ids) :].tolist()


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_do_not_depend_on_how_tokens_are_grouped(model: Path, dtype: str) -> None:
    """The real model's log probabilities: one position at a time, and in groups of every size to two windows."""
    options = {"dtype": dtype}
    engine = load_engine("transformers", role="target", model=str(model), device="cpu:0", options=options)
    prompt = Tokenizer(model).encode(PROMPTS[0])
    wants = SamplingParameters(logprobs=True)
    alone, grouped = (Session(number, len(prompt), "", wants) for number in (1, 2))
    for session in (alone, grouped):
        session.write(0, prompt)
    expected: list[float] = []
    while len(expected) < sum(range(1, 10)):
        answer = engine.verify(alone, len(alone.tokens), NoInterrupt())
        expected += answer.logprobs
        alone.write(len(alone.tokens), answer.tokens)
    found: list[float] = []
    for group in range(1, 10):
        start = len(prompt) + len(found)
        grouped.write(start, alone.tokens[start : start + group - 1])
        found += engine.verify(grouped, start, NoInterrupt()).logprobs
        grouped.write(len(grouped.tokens), alone.tokens[len(grouped.tokens) : len(prompt) + len(found)])
    assert found == expected
    tree, found = Session(3, len(prompt), "", wants), []
    tree.write(0, prompt)
    for group in range(2, 10):  # the main path turns wrong in the middle, and a branch goes on
        start = len(prompt) + len(found)
        fork, end = start + (group - 1) // 2, start + group - 1
        tree.write(start, [*alone.tokens[start:fork], alone.tokens[fork] + 1, 5, 6])
        branches = [Branch(fork, None, [alone.tokens[fork] + 2, 7]), Branch(fork, None, alone.tokens[fork:end])]
        task = Task(tree, start, branches=branches)
        while not task.done:
            engine.step([task], NoInterrupt())
        found += task.answer.logprobs
        tree.write(start, task.answer.tokens)
    assert found == expected[: len(found)]
    assert tree.tokens == alone.tokens[: len(tree.tokens)]


@pytest.mark.long
async def test_sampled_text_is_the_same_in_every_algorithm(model: Path) -> None:
    prompt_ids = Tokenizer(model).encode(PROMPTS[1])
    sampling = dsi_actors.Sampling(max_tokens=TOKENS, temperature=0.9, top_p=0.95, seed=5)
    async with dsi_actors.Orchestrator(dsi_actors.Config(devices=("cpu",), sp=2)) as orchestrator:
        texts = []
        for algorithm in ALGORITHMS:
            stream = orchestrator.generate(prompt_ids, sampling, algorithm=algorithm)
            texts.append([token async for tokens in stream for token in tokens])
            if algorithm != "ar":
                assert (await stream.report()).acceptance_rate > 0.4, "drafter and target share the noise"
    assert texts[0] == texts[1] == texts[2]


def test_the_chat_template_is_the_models_own(model: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    theirs: Any = AutoTokenizer.from_pretrained(model).apply_chat_template(messages, add_generation_prompt=True)
    tokenizer = Tokenizer(model)
    assert tokenizer.encode_chat(messages) == list(theirs["input_ids"])
    assert tokenizer.stop_token_ids == (2,)


def test_text_streams_as_whole_characters(model: Path) -> None:
    tokenizer = Tokenizer(model)
    text = "naïve — 日本語 🙂 done"
    stream = tokenizer.stream()
    pieces = [stream.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "" in pieces, "a character of several tokens waits for its last one"
