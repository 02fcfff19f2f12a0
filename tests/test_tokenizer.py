"""Tokenizer files as they are found in the wild."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as LibraryTokenizer

from dsi_actors.errors import ConfigError
from dsi_actors.tokenizer import Tokenizer
from support.engines import make_tiny_model

MESSAGES = [{"role": "user", "content": "w1 w2"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def with_template(model: Path, template: object, **config: Any) -> Tokenizer:
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return Tokenizer(model)


def test_settings_of_a_training_run_do_not_cut_prompts(model: Path, tmp_path: Path) -> None:
    library = LibraryTokenizer.from_file(str(model / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode("w1 w2 w3 w4 w5 w6") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% if tools is not none %}w9{% endif %}{{ messages[0].content }}",
        "{{ messages[0].content if strftime_now('%Y') | int > 2000 else 'w9' }}",
        "{% set x = [1, 2] | tojson(ensure_ascii=False) %}{{ messages[0]['content'] }}",
        [{"name": "other", "template": "w9"}, {"name": "default", "template": "{{ messages[0].content }}"}],
    ],
)
def test_chat_templates(model: Path, template: object) -> None:
    assert with_template(model, template).encode_chat(MESSAGES) == [1, 2]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('system role is not supported') }}", "system role is not supported"),
        ("{% for %}", "chat template failed"),
        ("{{ nothing.at.all }}", "chat template failed"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        (None, "has no chat template"),
    ],
)
def test_templates_that_fail_say_so_and_plain_text_still_works(model: Path, template: object, problem: str) -> None:
    tokenizer = with_template(model, template)
    with pytest.raises(ConfigError, match=problem):
        tokenizer.encode_chat(MESSAGES)
    assert tokenizer.encode("w3") == [3]


def test_stop_tokens_come_from_both_files(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert with_template(model, None, eos_token={"content": "w2"}).stop_token_ids == (2, 5, 7)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        Tokenizer(tmp_path)
