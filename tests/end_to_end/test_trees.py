"""Trees of drafts with a real model, in processes of their own: the text of plain decoding, and rejections that cost nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dsi_actors
from dsi_actors.core.events import ServerLost
from support.engines import make_tiny_model
from support.timed import text_of
from support.together import Together

pytestmark = pytest.mark.usefixtures("forked_workers")

PROMPT = [3, 14, 15, 9, 26]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def config(model: Path, drafter: str | tuple[str, ...], **drafter_options: Any) -> dsi_actors.Config:
    return dsi_actors.Config(
        target=str(model), drafter=drafter, sp=2, devices=("cpu",), drafter_options=drafter_options, heartbeat_ms=100,
        silence_ms=600_000, request_timeout_s=600, ready_timeout_s=600, target_wait_s=600,
    )  # fmt: skip


async def test_all_algorithms_write_the_same_text_with_trees(model: Path) -> None:
    samplings = [
        dsi_actors.Sampling(max_tokens=60),
        dsi_actors.Sampling(max_tokens=60, temperature=1.2, seed=5, repetition_penalty=1.1),
        dsi_actors.Sampling(
            max_tokens=60,
            presence_penalty=0.5,
            frequency_penalty=0.3,
            logit_bias={3: 1.5, 14: -100},
            bad_words=[[9], [3, 26]],
            min_tokens=60,
            stop_token_ids=tuple(range(20, 40)),
        ),
    ]
    settings = config(model, str(model), layers=2, quantization="none")
    by_alternative = 0
    async with dsi_actors.Orchestrator(settings) as orchestrator:
        for sampling in samplings:
            expected = await text_of(orchestrator.generate(PROMPT, sampling, algorithm="ar"))
            assert len(expected) == 60
            for algorithm in ("si", "dsi"):
                for lookahead in (1, 2, 5):
                    stream = orchestrator.generate(PROMPT, sampling, algorithm=algorithm, lookahead=lookahead, rows=4)
                    assert await text_of(stream) == expected
                    by_alternative += (await stream.report()).alternatives
    assert by_alternative > 0, "what was right was an alternative now and then"


async def test_prompt_lookup_drafts_trees(model: Path) -> None:
    prompt = PROMPT * 4 + [3, 14, 7, 7, 3, 14]
    sampling = dsi_actors.Sampling(max_tokens=80)
    async with dsi_actors.Orchestrator(config(model, "ngram")) as orchestrator:
        expected = await text_of(orchestrator.generate(prompt, sampling, algorithm="ar"))
        for algorithm in ("si", "dsi"):
            stream = orchestrator.generate(prompt, sampling, algorithm=algorithm, lookahead=2, rows=4)
            assert await text_of(stream) == expected


async def test_no_server_is_lost_by_trees_after_a_long_prompt(model: Path) -> None:
    """A server that had the prompt still to read got it within the tree, refused so large a tree, and was not used again."""
    settings = config(model, str(model), layers=2, quantization="none")
    sampling, lost = dsi_actors.Sampling(max_tokens=60), list[ServerLost]()

    def look(generation: int, item: object) -> None:
        if isinstance(item, ServerLost):
            lost.append(item)

    async with dsi_actors.Orchestrator(settings) as orchestrator:
        for number in range(4):  # each prompt is new to both servers
            prompt = [number + 1, *PROMPT * 60]
            with orchestrator.observe(look):
                found = await text_of(orchestrator.generate(prompt, sampling, lookahead=2, rows=6))
            assert found == await text_of(orchestrator.generate(prompt, sampling, algorithm="ar"))
    assert lost == []


@pytest.mark.long
async def test_prompt_lookup_and_a_model_draft_together(model: Path) -> None:
    """Each has its turn alone, then both at the same time."""
    prompt, together = PROMPT * 4 + [3, 14, 7, 7, 3, 14], Together()
    samplings = [dsi_actors.Sampling(max_tokens=300), dsi_actors.Sampling(max_tokens=300, temperature=1.2, seed=5)]
    settings = config(model, ("ngram", str(model)), layers=2, quantization="none")
    async with dsi_actors.Orchestrator(settings) as orchestrator:
        orchestrator.observe(together)
        for sampling in samplings:
            expected = await text_of(orchestrator.generate(prompt, sampling, algorithm="ar"))
            assert len(expected) == 300
            for lookahead in (2, 5):
                stream = orchestrator.generate(prompt, sampling, lookahead=lookahead, rows=4)
                assert await text_of(stream) == expected
            assert await text_of(orchestrator.generate(prompt, sampling)) == expected
        drafters = {worker.number for worker in orchestrator.workers if worker.role == "drafter"}
    assert together.drafted == drafters
