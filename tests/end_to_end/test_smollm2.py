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

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

PROMPTS = (
    'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number."""\n',
    "The three laws of thermodynamics are",
)
TOKENS = 24


@pytest.fixture(scope="module")
def model() -> Path:
    """Converts the weights, the first time on this machine."""
    return resolve_model(DEFAULT_TARGET)


async def test_all_algorithms_agree_with_transformers(model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer(model)
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sampling = dsi_actors.Sampling(max_tokens=TOKENS)
    async with dsi_actors.Orchestrator(dsi_actors.Config(devices=("cpu",))) as orchestrator:
        for prompt in PROMPTS:
            prompt_ids = tokenizer.encode(prompt)
            outputs: list[list[int]] = []
            for algorithm in ALGORITHMS:
                stream = orchestrator.generate(prompt_ids, sampling, algorithm=algorithm)
                outputs.append([token async for tokens in stream for token in tokens])
                report = await stream.report()
                if algorithm != "ar":
                    assert report.acceptance_rate > 0.5, "an int8 copy of the target agrees with it most of the time"
                    assert report.target_forwards - report.wasted_target_forwards < TOKENS
            expected = await asyncio.to_thread(
                reference.generate,
                torch.tensor([prompt_ids]),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
            assert outputs[0] == outputs[1] == outputs[2] == expected[0, len(prompt_ids) :].tolist()


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
