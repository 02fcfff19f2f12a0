"""The text part of a model for texts and images is read as the model for texts that it is, whatever its file calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsi_workers.checkpoints.checkpoint import read_checkpoint
from dsi_workers.checkpoints.load import load_model
from dsi_workers.engine import EngineError
from dsi_workers.models.files import ModelError
from support.zoo import KINDS, make

WHERE = torch.float32, torch.device("cpu"), "made"


def test_an_older_file_with_the_settings_of_the_text_outside(tmp_path: Path) -> None:
    make(tmp_path, KINDS["qwen2_5_vl"])
    expected = read_checkpoint(tmp_path, *WHERE)
    assert expected is not None
    file = tmp_path / "config.json"
    raw: dict[str, Any] = json.loads(file.read_text())
    older = {**raw.pop("text_config"), **raw, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    older["rope_theta"] = older.pop("rope_parameters")["rope_theta"]
    file.write_text(json.dumps(older))
    found = read_checkpoint(tmp_path, *WHERE)
    assert found is not None
    assert found.config == expected.config
    assert found.weights.keys() == expected.weights.keys()


@pytest.mark.parametrize("name", ["mistral3", "qwen3_vl"])
def test_the_weights_of_the_text_must_be_whole(name: str, tmp_path: Path) -> None:
    make(tmp_path, KINDS[name])
    read = read_checkpoint(tmp_path, *WHERE)
    assert read is not None
    assert not any("vision" in weight or "visual" in weight for weight in read.weights)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    lost = next(weight for weight in weights if weight.endswith("layers.1.mlp.up_proj.weight"))
    save_file({weight: weights[weight] for weight in weights if weight != lost}, file)
    with pytest.raises(ModelError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        read_checkpoint(tmp_path, *WHERE)
    save_file({**weights, "surprise": torch.ones(1)}, file)
    with pytest.raises(ModelError, match="unknown: surprise"):
        read_checkpoint(tmp_path, *WHERE)


def test_the_text_part_of_another_model_is_not_taken_for_one_that_is_known(tmp_path: Path) -> None:
    make(tmp_path, KINDS["mistral3"])
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    settings["text_config"]["model_type"] = "ministral3"
    file.write_text(json.dumps(settings))
    assert read_checkpoint(tmp_path, *WHERE) is None
    with pytest.raises(
        EngineError, match="is a model for texts and images whose text part this engine cannot run alone"
    ):
        load_model(
            tmp_path,
            torch.device("cpu"),
            reference="made",
            dtype="float32",
            quantization="none",
            rows=8,
            most_positions=512,
        )
