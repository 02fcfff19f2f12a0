"""A drafter whose embedding has more rows than the target's, with the same tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsi_protocol import SamplingParameters
from dsi_workers.engines import Engine, Task, load_engine
from support.engines import NoInterrupt, make_tiny_model, session_of

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def drafter(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its padded tokens are far more probable than all others."""
    directory = tmp_path_factory.mktemp("drafter")
    weights = load_file(target / "model.safetensors")
    head = weights["lm_head.weight"]
    for name, rows in (("lm_head.weight", 50 * head[:32].abs()), ("model.embed_tokens.weight", torch.ones(32, 32))):
        weights[name] = torch.cat((weights[name], rows, -rows))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 160}))
    (directory / "tokenizer.json").write_bytes((target / "tokenizer.json").read_bytes())
    return directory


def load(model: Path, **options: Any) -> Engine:
    options = {"calibrate": False, "max_length": 64, "quantization": "none", **options}
    return load_engine("transformers", role="drafter", model=str(model), device="cpu:0", options=options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("alternatives", [False, True])
def test_tokens_that_the_target_lacks_are_never_drafted(
    target: Path, drafter: Path, temperature: float, alternatives: bool
) -> None:
    masked, plain = load(drafter, target=str(target)), load(target)
    assert load(drafter).info.vocabulary_size == 160
    assert masked.info.vocabulary_size == 96
    drafted = []
    for engine in (masked, plain):
        session = session_of(PROMPT)
        session.sampling = SamplingParameters(temperature=temperature, seed=3)
        task = Task(session, len(PROMPT), 1, alternatives=alternatives)
        while not task.done:
            engine.step([task], NoInterrupt())
        drafted.append((task.answer.tokens, task.answer.alternatives))
    assert drafted[0] == drafted[1]
    assert all(token is None or token < 96 for tokens in drafted[0] for token in tokens)
