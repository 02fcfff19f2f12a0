"""Tokenizer files as they are found in the wild."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as LibraryTokenizer

from dsi_actors.config import DEFAULT_TARGET
from dsi_actors.errors import ConfigError
from dsi_actors.tokenizer import Tokenizer
from dsi_workers.models.resolve import resolve_model
from support.engines import make_tiny_model
from support.tokenizers import byte_level, save

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


@pytest.mark.parametrize(
    ("generation", "model_config", "expected"),
    [
        (None, {"eos_token_id": 4}, (4,)),
        ({}, {"eos_token_id": [4, 6]}, (4, 6)),
        ({}, {"text_config": {"eos_token_id": [4, 6]}}, (4, 6)),
        ({"eos_token_id": 7}, {"eos_token_id": [4, 6]}, (7,)),
    ],
)
def test_stop_tokens_of_config_json(
    model: Path, tmp_path: Path, generation: object, model_config: object, expected: tuple[int, ...]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(model_config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert Tokenizer(tmp_path).stop_token_ids == expected


def test_a_template_in_a_file_of_its_own(model: Path, tmp_path: Path) -> None:
    """As processors save it; chat_template.jinja, which is newer, comes first."""
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "w1"}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "w2"}))
    assert Tokenizer(tmp_path).encode_chat(MESSAGES) == [2]
    (tmp_path / "chat_template.jinja").write_text("w3")
    assert Tokenizer(tmp_path).encode_chat(MESSAGES) == [3]


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE", "voc', "cannot be used: download the model again"),
        ("tokenizer.json", b"[]", "cannot be used: download the model again"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": 5, "merges": []}}', "cannot be used"),
        ("tokenizer.json", b"", "cannot be used"),
        ("tokenizer.json", b"\xff\xfe{}", "cannot be used"),
        ("tokenizer_config.json", b"{nonsense", "is no JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "is no JSON"),
        ("tokenizer_config.json", b"[1]", "holds no JSON object"),
        ("tokenizer_config.json", b'{"a": "\xff"}', "is no UTF-8 text"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template must be a text, or a list .*, not 5"),
        ("tokenizer_config.json", b'{"chat_template": ["a"]}', "chat_template must be a text"),
        (
            "tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": 5}]}',
            "chat_template must be a text",
        ),
        ("tokenizer_config.json", b'{"eos_token": 2}', "eos_token must be a token's text, not 2"),
        ("tokenizer_config.json", b'{"bos_token": {"content": []}}', "bos_token must be a token's text"),
        ("chat_template.json", b'{"chat_template": 5}', "chat_template must be a text, or a list .*, not 5"),
        ("config.json", b"gibberish", "is no JSON"),
        ("generation_config.json", b"null", "holds no JSON object"),
        ("generation_config.json", b'{"eos_token_id": "w2"}', 'eos_token_id must be a token id, .*, not "w2"'),
        ("generation_config.json", b'{"eos_token_id": [2, [3]]}', "eos_token_id must be"),
        ("generation_config.json", b'{"eos_token_id": true}', "eos_token_id must be"),
        ("generation_config.json", b'{"eos_token_id": -1}', "eos_token_id must be"),
        ("generation_config.json", b'{"eos_token_id": 1e30}', "eos_token_id must be"),
        ("chat_template.jinja", b"\xff", "is no UTF-8 text"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(model: Path, tmp_path: Path, file: str, content: bytes, problem: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        Tokenizer(tmp_path)
    assert file in str(caught.value)


def test_text_that_is_no_unicode_is_refused(model: Path) -> None:
    tokenizer = with_template(model, "{{ messages[0].content }}")
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_chat([{"role": "user", "content": text}])):
        with pytest.raises(ConfigError, match=r"character 3 is U\+D800"):
            encode("w1 \ud800")


def test_stop_strings_that_are_special_tokens_are_told(model: Path, tmp_path: Path) -> None:
    library = LibraryTokenizer.from_file(str(model / "tokenizer.json"))
    library.add_special_tokens(["<end>", "<other>"])
    library.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).stop_tokens_of(["w1", "<end>", "<end>w1"]) == (library.token_to_id("<end>"),)


@pytest.mark.model
def test_others_run_while_a_long_text_is_encoded() -> None:
    tokenizer = Tokenizer(resolve_model(DEFAULT_TARGET))
    text = "Hello world, this is a test of speed. " * 4_000
    turns = 0
    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(tokenizer.encode, text)
        while not encoding.done():
            time.sleep(0.001)
            turns += 1
    assert turns > 3, "the lock was held all the time"
    assert len(encoding.result()) == 40_001


def test_threads_may_share_a_tokenizer(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = Tokenizer(save(byte_level(), tmp_path, template=template))
    contents = ["these laws", "a</s>b", "<|im_end|>", "three"] * 10

    def encoded(content: str) -> tuple[list[int], list[int]]:
        return tokenizer.encode_chat([{"role": "user", "content": content}]), tokenizer.encode(content)

    alone = [encoded(content) for content in contents]
    with ThreadPoolExecutor(4) as pool:
        shared = Tokenizer(tmp_path)
        tokenizer = shared
        assert list(pool.map(encoded, contents)) == alone


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        Tokenizer(tmp_path)
