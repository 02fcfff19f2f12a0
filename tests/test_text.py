"""Stop strings: the client sees the text up to the first of them, and the same tokens, however the tokens come in blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsi_actors.results import CommittedTokens
from dsi_actors.text import Piece, TextAssembler, TokenText
from dsi_actors.tokenizer import Tokenizer
from support.tokenizers import KINDS, save


class Letters:
    """A tokenizer whose token n is the n-th of these; the last two are special tokens. A half of é has no text alone."""

    words = (b"a", b"b", b"ab", b"ba", b"", b"aab", b"c", "é".encode()[:1], "é".encode()[1:], b"", b"")
    special_tokens = {9: "<a>", 10: "<b>"}  # noqa: RUF012

    def __init__(self) -> None:
        self.own = b""
        self._read = b""

    def names_special_token(self, text: str) -> bool:
        return any(name in text for name in self.special_tokens.values())

    def stream(self, after: object = ()) -> Letters:
        return Letters()

    def add(self, token_id: int) -> str:
        before = self._text()
        self.own = self.words[token_id]
        self._read += self.own
        return self._text()[len(before) :]

    def flush(self) -> str:
        return self._read.decode(errors="replace")[len(self._text()) :]

    def _text(self) -> str:
        """As far as characters are complete."""
        text = self._read.decode(errors="replace")
        return text[:-1] if self._read.endswith(self.words[7]) else text


LETTERS = Letters()
BLOCKS = st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=4), max_size=8)
STOPS = st.lists(st.text("abcé�", min_size=1, max_size=4), max_size=3)


def assembler_of(stops: list[str]) -> TextAssembler:
    return TextAssembler(LETTERS, stops)  # type: ignore[arg-type]


def committed(tokens: list[int]) -> CommittedTokens:
    return CommittedTokens(tokens, [False] * len(tokens), [-float(token) for token in tokens])


def read(blocks: list[list[int]], stops: list[str]) -> tuple[str, list[TokenText], bool]:
    """What a client gets: text, tokens, and whether a stop string ended it."""
    assembler, pieces = assembler_of(stops), list[Piece]()
    for block in blocks:
        pieces.append(assembler.add(committed(block)))
        if assembler.stopped:
            break
    if not assembler.stopped:
        pieces.append(assembler.rest())
    text = "".join(piece.text for piece in pieces)
    return text, [token for piece in pieces for token in piece.tokens], assembler.stopped


@given(BLOCKS, STOPS)
@settings(max_examples=400)
def test_nothing_from_a_stop_string_on_is_shown(blocks: list[list[int]], stops: list[str]) -> None:
    whole, counted, reader = "", 0, Letters()
    for token in (token for block in blocks for token in block):
        if any(stop in whole for stop in stops):
            break
        whole += reader.add(token)
        counted += 1
    else:
        if not any(stop in whole for stop in stops):
            whole += reader.flush()
    text, tokens, stopped = read(blocks, stops)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert stopped == bool(ends)
    assert text == whole[: min(ends, default=len(whole))]
    assert len(tokens) == counted, "the token that completes the stop string is the last"


@given(BLOCKS, st.lists(st.text("ab<>", min_size=1, max_size=5), max_size=3), st.integers(1, 4))
@settings(max_examples=400)
def test_neither_text_nor_tokens_depend_on_the_blocks(blocks: list[list[int]], stops: list[str], size: int) -> None:
    tokens = [token for block in blocks for token in block]
    others = [tokens[at : at + size] for at in range(0, len(tokens), size)]
    assert read(blocks, stops) == read(others, stops)


@pytest.mark.parametrize(
    ("tokens", "stops", "text", "counted"),
    [
        ([0, 9, 1], ["<a>"], "a", 2),  # a special token
        ([0, 9, 1], ["a<a>"], "", 2),  # with text before it
        ([0, 0, 9, 1, 1], ["a<a>b"], "a", 4),  # and behind it
        ([0, 10, 9, 1], ["<b><a>"], "a", 3),
        ([0, 10, 10, 9, 1], ["<b><a>"], "a", 4),
        ([0, 9, 1], ["ab"], "", 3),  # what is not shown does not part what is shown
        ([0, 9, 1, 6], ["b<a>", "<a>c"], "abc", 4),
        ([0, 9, 6], ["<a>b"], "ac", 3),  # held back, then given
        ([0, 9], ["<a>b"], "a", 2),
        ([2, 5, 1], ["bb", "baa"], "a", 2),  # two at once: the one that begins first
        ([2, 3], ["bb", "abb"], "", 2),
        ([0, 7, 8, 1], ["é"], "a", 3),  # a character of two tokens
        ([0, 7, 8, 1], ["éb"], "a", 4),
        ([0, 7], ["�"], "a", 2),  # a character that never ends
        ([0, 0, 0, 1], ["aab"], "a", 4),
    ],
)
def test_stop_strings(tokens: list[int], stops: list[str], text: str, counted: int) -> None:
    for size in (1, len(tokens)):
        blocks = [tokens[at : at + size] for at in range(0, len(tokens), size)]
        shown, given_tokens, _ = read(blocks, stops)
        assert (shown, len(given_tokens)) == (text, counted)


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    assembler = assembler_of(["abc"])
    assert [assembler.add(committed([token])).text for token in (0, 0, 1, 1)] == ["", "a", "", "abb"]


def test_every_token_has_its_own_bytes_and_its_place() -> None:
    piece = assembler_of(["zz"]).add(committed([2, 7, 8, 4, 6]))
    assert [(token.own, token.offset, token.logprob) for token in piece.tokens] == [
        (b"ab", 0, -2.0), (b"\xc3", 2, -7.0), (b"\xa9", 2, -8.0), (b"", 3, -4.0), (b"c", 3, -6.0),
    ]  # fmt: skip
    assert piece.text == "abéc"


def test_a_long_stop_string_costs_no_more_than_a_short_one() -> None:
    """A text that nearly is the stop string, again and again."""
    assembler = assembler_of(["a" * 20_000 + "b", "c" * 100_000_000])
    pieces = [assembler.add(committed([0] * 1000)) for _ in range(30)]
    assert sum(len(piece.text) for piece in pieces) + len(assembler.rest().text) == 30_000


def test_an_answer_continues_its_prompt(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = Tokenizer(save(KINDS["llama_2"](), tmp_path_factory.mktemp("model")))
    prompt, whole = tokenizer.encode("heat flows"), tokenizer.encode("heat flows from hot to cold")
    answer = CommittedTokens(whole[len(prompt) :], [False] * (len(whole) - len(prompt)))
    for after, text in ((prompt, " from hot"), ((), "from hot")):
        assert TextAssembler(tokenizer, [" to"], after=after).add(answer).text == text


def test_nothing_follows_a_stop_string() -> None:
    """Also what the token that completed it says behind it."""
    assembler = assembler_of(["b"])
    assert assembler.add(committed([3])).text == ""
    assert assembler.stopped
    assert assembler.rest().text == "", "the letter behind it"
