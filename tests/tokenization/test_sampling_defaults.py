"""What a model's generation_config.json says about sampling, and where that is the default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsi_actors.cli.main import _parser
from dsi_actors.config import Sampling
from dsi_actors.console.options import sampling_from
from dsi_actors.errors import ConfigError
from dsi_actors.tokenization.sampling_defaults import described_defaults
from dsi_actors.tokenizer import Tokenizer
from support.tokenizers import save, words


def defaults_of(directory: Path, **settings: Any) -> dict[str, float]:
    save(words(), directory)
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return dict(Tokenizer(directory).sampling_defaults)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 20, "min_p": 0.1}, {"temperature": 1.0, "top_k": 20, "min_p": 0.1}),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": None}, {"temperature": 1.0}),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        ({"do_sample": False, "repetition_penalty": 1.0}, {}),
    ],
)
def test_what_the_file_says(tmp_path: Path, settings: dict[str, Any], expected: dict[str, float]) -> None:
    assert defaults_of(tmp_path, **settings) == expected


def test_without_the_file_there_are_none(tmp_path: Path) -> None:
    assert dict(Tokenizer(save(words(), tmp_path)).sampling_defaults) == {}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_sample": True, "temperature": "hot"}, 'temperature must be a number, not "hot"'),
        ({"do_sample": True, "top_p": 3}, r"top_p must lie in \(0, 1\], not 3"),
        ({"do_sample": True, "top_k": 2.5}, "top_k must be a whole number"),
        ({"repetition_penalty": True}, "repetition_penalty must be a number, not true"),
    ],
)
def test_values_that_make_no_sense(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {reason}"):
        defaults_of(tmp_path, **settings)


def test_what_the_user_gives_counts() -> None:
    defaults: dict[str, Any] = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    arguments = _parser().parse_args(["generate", "x", "--temperature", "0", "--top-k", "5"])
    sampling = Sampling(**{**defaults, **sampling_from(arguments)})
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.9, 5)
    sampling = Sampling(**{**defaults, **sampling_from(_parser().parse_args(["generate", "x"]))})
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, 20)


def test_without_defaults_generate_is_greedy() -> None:
    sampling = Sampling(**sampling_from(_parser().parse_args(["generate", "x"])))
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 1.0, None, 0.0)
    assert sampling.repetition_penalty == 1.0


def test_the_line_that_is_shown() -> None:
    assert described_defaults({"temperature": 0.6, "top_k": 20}) == (
        "temperature 0.6, top_k 20, by the model's generation_config.json"
    )
