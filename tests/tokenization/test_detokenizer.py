"""Text from tokens: the library's own where the bytes are text, and something sensible, piece by piece, where they are not."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models

from dsi_actors.config import DEFAULT_TARGET
from dsi_actors.tokenization.detokenizer import BYTE_OF, Detokenizer
from dsi_workers.models.resolve import resolve_model
from support.tokenizers import KINDS, TEXT, number_of

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MOST = 512
TOKENS = st.lists(st.one_of(st.integers(0, MOST), st.integers(0, 261)), max_size=30)


@cache
def made(kind: str) -> tuple[LibraryTokenizer, Detokenizer]:
    library = (
        LibraryTokenizer.from_file(str(resolve_model(DEFAULT_TARGET) / "tokenizer.json"))
        if kind == "smollm2"
        else KINDS[kind]()
    )
    return library, Detokenizer(library)


ALL = [*KINDS, pytest.param("smollm2", marks=pytest.mark.model)]


@pytest.mark.parametrize("kind", ALL)
@given(token_ids=TOKENS, cut=st.integers(0, 30))
@settings(max_examples=150, deadline=None)
def test_any_tokens_give_text_and_none_is_taken_back(kind: str, token_ids: list[int], cut: int) -> None:
    library, detokenizer = made(kind)
    if kind == "smollm2":
        token_ids = [token * 97 % library.get_vocab_size() for token in token_ids]
    stream = detokenizer.stream()
    pieces, owns = [], []
    for token in token_ids:
        pieces.append(stream.add(token))
        owns.append(stream.own)
    text = "".join(pieces) + stream.flush()
    assert text == detokenizer.decode(token_ids)
    if kind != "word_ends":  # which says at the end of a word whether a space was there
        assert b"".join(owns).decode(errors="replace") == text, "each token has its own bytes"
    theirs = library.decode(token_ids)
    if REPLACEMENT not in theirs:
        assert text == theirs
    # The same text in two halves: what continues a text fits behind it.
    first = detokenizer.stream()
    before = "".join([first.add(token) for token in token_ids[:cut]])
    assert before + detokenizer.decode(token_ids[cut:], after=token_ids[:cut]) == text


@pytest.mark.parametrize("kind", ALL)
@given(text=st.text(max_size=40) | st.sampled_from([TEXT[:90], " leading", "a  b ", "é🙂日本", "\n\n x"]))
@settings(max_examples=100, deadline=None)
def test_text_comes_back_as_the_library_gives_it_back(kind: str, text: str) -> None:
    library, detokenizer = made(kind)
    token_ids = library.encode(text).ids
    assert detokenizer.decode(token_ids) == library.decode(token_ids)


@pytest.mark.parametrize("kind", ["llama_2", "mistral", "gemma", "byte_level"])
@given(data=st.binary(max_size=12))
def test_bytes_that_are_no_text(kind: str, data: bytes) -> None:
    library, detokenizer = made(kind)
    spelled = [number_of(library, name_of(kind, byte)) for byte in data]
    stands_alone = data.removeprefix(b" ") if kind in ("llama_2", "mistral") else data
    assert detokenizer.decode(spelled) == stands_alone.decode(errors="replace")


def name_of(kind: str, byte: int) -> str:
    if kind != "byte_level":
        return f"<0x{byte:02X}>"
    return next(character for character, value in BYTE_OF.items() if value == byte)


def test_a_character_appears_once_it_is_complete() -> None:
    library, detokenizer = made("llama_2")
    stream = detokenizer.stream()
    pieces = [stream.add(number_of(library, f"<0x{byte:02X}>")) for byte in "€".encode()]
    assert pieces == ["", "", "€"]
    assert stream.add(number_of(library, "<0xE2>")) == ""
    assert stream.add(number_of(library, "a")) == f"{REPLACEMENT}a", "what is incomplete is not lost"
    assert stream.add(number_of(library, "<0xE2>")) == ""
    assert stream.flush() == REPLACEMENT, "nor is it at the end"


@pytest.mark.parametrize(("kind", "lead"), [("llama_2", ""), ("mistral", ""), ("unigram", ""), ("byte_level", " ")])
def test_only_a_text_that_stands_alone_may_lose_its_leading_space(kind: str, lead: str) -> None:
    library, detokenizer = made(kind)
    prompt = library.encode("heat flows").ids
    whole = library.encode("heat flows from hot").ids
    answer = whole[len(prompt) :]
    assert whole[: len(prompt)] == prompt
    assert detokenizer.decode(answer) == f"{lead}from hot"
    assert detokenizer.decode(answer, after=prompt) == " from hot"
    assert detokenizer.decode(answer, after=prompt * 50) == " from hot", "a long prompt is not read all"


def test_a_character_that_the_prompt_began_is_completed() -> None:
    library, detokenizer = made("llama_2")
    one, two, three = (number_of(library, f"<0x{byte:02X}>") for byte in "€".encode())
    letter = number_of(library, "a")
    assert detokenizer.decode([three, letter], after=[letter] * 40 + [one, two]) == "€a"


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Strip("x", 0, 3),
        decoders.Replace("a", ""),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("a", "b")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip("é", 1, 1)]),
    ],
)
@given(token_ids=st.lists(st.integers(-1, 8) | st.just(1 << 40), max_size=60))
@settings(max_examples=60, deadline=None)
def test_decoders_that_no_model_has_do_not_raise(decoder: decoders.Decoder, token_ids: list[int]) -> None:
    names = ["a", "b", "x", "é", "<0xE2>", "<0x82>", "", "<pad>"]
    library = LibraryTokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="a"))
    library.decoder = decoder
    detokenizer = Detokenizer(library)
    stream = detokenizer.stream()
    assert "".join(map(stream.add, token_ids)) + stream.flush() == detokenizer.decode(token_ids)
