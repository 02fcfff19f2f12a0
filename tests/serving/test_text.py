"""Stop strings: the client sees the text up to the first of them, however the tokens fall."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsi_actors.results import CommittedTokens
from dsi_actors.serving.text import TextAssembler


class Letters:
    """A tokenizer whose token n is the n-th of these."""

    words = ("a", "b", "ab", "ba", "", "aab", "c")

    def stream(self) -> Letters:
        return self

    def add(self, token_id: int) -> str:
        return self.words[token_id]


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_nothing_from_a_stop_string_on_is_shown(blocks: list[list[int]], stops: list[str]) -> None:
    assembler = TextAssembler(Letters(), stops)  # type: ignore[arg-type]
    shown, whole = "", ""
    for block in blocks:
        for token in block:
            if not any(stop in whole for stop in stops):
                whole += Letters.words[token]
        piece = assembler.add(CommittedTokens(block, [False] * len(block)))
        shown += piece.text
        assert whole.startswith(shown), "what was shown is never taken back"
        if assembler.stopped:
            break
    if not assembler.stopped:
        shown += assembler.rest().text
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert assembler.stopped == bool(ends)
    assert shown == whole[: min(ends, default=len(whole))]


def test_every_token_comes_with_the_text_that_it_completes() -> None:
    assembler = TextAssembler(Letters(), ["zz"])  # type: ignore[arg-type]
    piece = assembler.add(CommittedTokens([0, 4, 6], [True] * 3, [-0.1, -0.2, -0.3]))
    assert [(token.text, token.logprob) for token in piece.tokens] == [("a", -0.1), ("", -0.2), ("c", -0.3)]
    assert piece.text == "ac"
