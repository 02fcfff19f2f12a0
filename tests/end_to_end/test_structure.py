"""Structured output with a real model in processes of their own: valid, and the same by every algorithm."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

import dsi_actors
from dsi_actors import Sampling, Structure
from dsi_actors.tokenizer import Tokenizer
from support.engines import END, make_byte_model
from support.timed import text_of

pytestmark = pytest.mark.usefixtures("forked_workers")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog", "dragonfly"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}
GRAMMAR = 'start: "(" item ("," item)~0..3 ")"\nitem: /[a-z]{1,5}/ | start'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("bytes"))


def config(model: Path, **more: Any) -> dsi_actors.Config:
    return dsi_actors.Config(
        target=str(model), drafter=str(model), sp=2, devices=("cpu",), heartbeat_ms=100, silence_ms=600_000,
        drafter_options={"layers": 2, "quantization": "none"}, request_timeout_s=600, ready_timeout_s=600,
        target_wait_s=600, **more,
    )  # fmt: skip


def sampling(structure: Structure, **more: Any) -> Sampling:
    return Sampling(max_tokens=300, structure=structure, stop_token_ids=(END,), **more)


def check_json(text: str) -> None:
    found = json.loads(text)
    assert set(found) == {"name", "kind", "ages"}
    assert len(found["name"]) <= 12
    assert found["kind"] in SCHEMA["properties"]["kind"]["enum"]
    assert len(found["ages"]) <= 3
    assert all(type(age) is int and 0 <= age <= 99 for age in found["ages"])


async def test_all_algorithms_write_the_same_valid_text(model: Path) -> None:
    tokenizer = Tokenizer(model)
    ways: list[dict[str, Any]] = [
        {"algorithm": "si", "lookahead": 3, "rows": 1},
        {"algorithm": "dsi", "lookahead": 1, "rows": 1},
        {"algorithm": "dsi", "lookahead": 2, "rows": 4},
    ]
    async with dsi_actors.Orchestrator(config(model)) as orchestrator:
        for more in ({}, {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.5}):
            for structure, check in (
                (Structure.json_schema(SCHEMA), check_json),
                (Structure.regex("[a-f]{3,9}(-[0-9]{2})+"), lambda text: re.fullmatch("[a-f]{3,9}(-[0-9]{2})+", text)),
                (Structure.choice(["yes", "no", "perhaps not"]), lambda text: text in ("yes", "no", "perhaps not")),
                (Structure.lark(GRAMMAR), lambda text: text[0] == "("),
            ):
                wanted = sampling(structure, **more)
                stream = orchestrator.generate([1, 2, 3], wanted, algorithm="ar")
                expected = await text_of(stream)
                if (await stream.report()).finish_reason == "stop":
                    assert expected[-1] == END
                    assert check(tokenizer.decode(expected[:-1])) is not False
                for way in ways:
                    assert await text_of(orchestrator.generate([1, 2, 3], wanted, **way)) == expected


async def test_a_worker_that_dies_changes_nothing(model: Path) -> None:
    wanted = sampling(Structure.json_schema(SCHEMA), temperature=1.0, seed=5)
    async with dsi_actors.Orchestrator(config(model)) as orchestrator:
        expected = await text_of(orchestrator.generate([4, 5], wanted, algorithm="ar"))
        found = list[int]()
        async for tokens in orchestrator.generate([4, 5], wanted, lookahead=2):
            if not found:
                os.kill(min(orchestrator.process_ids), signal.SIGKILL)
            found += tokens
        assert found == expected


def test_what_cannot_be_followed_is_refused_before_any_work() -> None:
    for make, words in (
        (lambda: Structure.json_schema({"type": "string", "minLength": 5, "maxLength": 3}), "minLength"),
        (lambda: Structure.json_schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "Unsatisfiable"),
        (lambda: Structure.json_schema({"not": {"type": "string"}}), "not"),
        (lambda: Structure.json_schema("{"), "cannot be used"),
        (lambda: Structure.json_schema({"enum": []}), "Unsatisfiable"),
        (lambda: Structure.json_schema({"$ref": "#"}), "no text can follow it"),
        (lambda: Structure.json_schema({"$ref": "https://example.com/schema"}), "not present"),
        (lambda: Structure.regex(r"[^\s\S]"), "no text can follow it"),
        (lambda: Structure.lark("start: start"), "no text can follow it"),
        (lambda: Structure.json_schema({"enum": ["x" * 300_000]}), "over the limit"),
        (lambda: Structure.regex("(a"), "unclosed group"),
        (lambda: Structure.choice([]), "a list of texts"),
        (lambda: Structure.lark("start: nothing"), "unknown name"),
        (lambda: sampling(Structure.json_object()).__class__(structure=Structure.json_object()), "stop_token_ids"),
    ):
        with pytest.raises(dsi_actors.ConfigError, match=words):
            make()
