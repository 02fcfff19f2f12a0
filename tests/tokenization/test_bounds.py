"""A text that is refused by its bytes would have had too many tokens."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from dsi_actors.config import DEFAULT_TARGET
from dsi_actors.tokenization.bounds import UNBOUNDED, max_token_bytes
from dsi_actors.tokenization.detokenizer import Detokenizer
from dsi_actors.tokenizer import Tokenizer as OurTokenizer
from dsi_workers.models.resolve import resolve_model
from support.tokenizers import KINDS, byte_level, llama_2, save


def composed() -> Tokenizer:
    """As Qwen cuts: characters are composed before."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


MADE = {**KINDS, "composed": composed}


def bound_of(tokenizer: Tokenizer) -> int:
    detokenizer = Detokenizer(tokenizer)
    return max_token_bytes(tokenizer, (detokenizer.bytes_of(number) or b"" for number in range(600)))


@cache
def made(kind: str) -> tuple[Tokenizer, int]:
    tokenizer = MADE[kind]()
    return tokenizer, bound_of(tokenizer)


@pytest.mark.parametrize("kind", ["byte_level", "llama_2", "mistral", "gemma", "composed"])
@given(text=st.text(max_size=60) | st.text("▁ \u212a\u0308\u0301ι thermodynamics", max_size=200))
@settings(max_examples=100, deadline=None)
def test_no_token_stands_for_more(kind: str, text: str) -> None:
    tokenizer, bound = made(kind)
    assert len(text.encode()) <= bound * len(tokenizer.encode(text).ids)


def test_where_there_is_a_bound() -> None:
    assert [kind for kind in MADE if made(kind)[1] == UNBOUNDED] == ["unigram", "word_piece", "words", "word_ends"]
    assert len(" thermodynamics") <= made("byte_level")[1] < 40


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Strip()),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Replace("  ", " ")),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Replace(Regex(" +"), " ")),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.WhitespaceSplit()),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Split(" ", "removed")),
        lambda tokenizer: tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=True)]),
    ],
)
def test_where_text_can_vanish_there_is_none(change: object) -> None:
    tokenizer = llama_2()
    assert callable(change)
    change(tokenizer)
    assert bound_of(tokenizer) == UNBOUNDED


def test_the_tokenizer_tells_it(tmp_path: Path) -> None:
    assert OurTokenizer(save(byte_level(), tmp_path / "bounded")).max_token_bytes == made("byte_level")[1]
    assert OurTokenizer(save(KINDS["words"](), tmp_path / "words")).max_token_bytes == sys.maxsize


@pytest.mark.model
def test_smollm2() -> None:
    assert 16 <= OurTokenizer(resolve_model(DEFAULT_TARGET)).max_token_bytes <= 256
