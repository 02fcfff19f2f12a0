"""Models that transformers' layers run, in processes of their own: AR, SI and DSI write the text of transformers' generate."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

import dsi_actors
from support.timed import text_of
from support.zoo import KINDS, WORDS, make

pytestmark = pytest.mark.usefixtures("forked_workers")

PROMPT = [(7 * place * place + 3 * place + 5) % WORDS for place in range(310)]
TOKENS = 40


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
async def test_all_algorithms_write_the_text_of_transformers(name: str, tmp_path: Path) -> None:
    model = await asyncio.to_thread(make, tmp_path, KINDS[name])
    config = dsi_actors.Config(
        target=str(tmp_path), drafter="self-int8", sp=2, devices=("cpu",), heartbeat_ms=100, silence_ms=600_000,
        request_timeout_s=600, ready_timeout_s=600, target_wait_s=600,
    )  # fmt: skip
    samplings = [
        dsi_actors.Sampling(max_tokens=TOKENS), dsi_actors.Sampling(max_tokens=TOKENS, temperature=0.8, seed=5),
    ]  # fmt: skip
    texts = []
    async with dsi_actors.Orchestrator(config) as orchestrator:
        for sampling in samplings:
            texts.append(await text_of(orchestrator.generate(PROMPT, sampling, algorithm="ar")))
            for algorithm in ("si", "dsi"):
                stream = orchestrator.generate(PROMPT, sampling, algorithm=algorithm, lookahead=2)
                assert await text_of(stream) == texts[-1]
    prompt = torch.tensor([PROMPT])
    generated = await asyncio.to_thread(
        model.generate,
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    assert texts[0] == generated[0, len(PROMPT) :].tolist()
