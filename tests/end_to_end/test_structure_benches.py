"""The benchmarks of structured output in short: random JSON schemas, exactness, time per token."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dsi_actors.benches.random_schemas import random_schema
from dsi_actors.config import DEFAULT_TARGET
from support.command import dsi_actors_command
from support.engines import make_byte_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"id": "one", "prompt": "some text"}) + "\n", encoding="utf-8")
    return file


def results_of(*arguments: str | Path) -> dict[str, Any]:
    done = dsi_actors_command("bench", *arguments, "--json", "--ready-timeout", "600")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_schemas_are_drawn_by_the_seed_alone() -> None:
    assert random_schema(random.Random(3)) == random_schema(random.Random(3)) != random_schema(random.Random(4))


def test_finished_answers_are_valid_by_their_schemas(model: Path) -> None:
    found = results_of("schemas", "--target", model, "--schemas", "6")
    [row] = found["results"]
    assert row["schemas"] == 6
    assert row["valid"] >= 4
    assert row["invalid"] == row["failed"] == row["hung"] == 0
    assert found["examples"] == []


@pytest.mark.long
@pytest.mark.model
def test_finished_answers_of_a_real_model_are_valid() -> None:
    [row] = results_of("schemas", "--target", DEFAULT_TARGET, "--schemas", "6", "--max-tokens", "60")["results"]
    assert row["valid"] + row["cut"] + row["refused"] == 6
    assert row["valid"] >= 2


@pytest.mark.long
def test_penalised_and_structured_texts_are_the_same_in_every_way(model: Path, prompts: Path) -> None:
    found = results_of(
        "exact", "--target", model, "--prompts", prompts, "--kinds", "penalised,structured", "--servers", "2",
        "--dtypes", "float32", "--drafters", "self-int8,ngram", "--max-tokens", "24", "--gpu", "cpu",
    )  # fmt: skip
    ways = 1 + 5 + 2 * 5  # AR, SI and DSI at four lookaheads and with a tree, DSI at two SP
    assert found["compared"] == 2 * 2 * ways - 2
    assert found["differing"] == 0


@pytest.mark.long
def test_bench_structure_measures_both(model: Path, prompts: Path) -> None:
    rows = results_of("structure", "--target", model, "--prompts", prompts, "--max-tokens", "12", "--repeats", "1")
    assert [row["structure"] for row in rows["results"]] == ["json_schema", "json_object", "regex"]
    for row in rows["results"]:
        assert row["tokens"] == 12
        assert row["ratio"] == pytest.approx(row["structured_ms_per_token"] / row["free_ms_per_token"])
