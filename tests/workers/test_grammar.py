"""Masks of a grammar: what may come next after any text, committed, guessed, or on a branch."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsi_actors.structure import Structure
from dsi_actors.tokenizer import Tokenizer
from dsi_protocol import SamplingParameters
from dsi_workers.engine import RequestError
from dsi_workers.engines.fingerprint import fingerprint_of
from dsi_workers.grammar import Grammars, Row
from dsi_workers.sampling import Sampler
from dsi_workers.session import Session
from support.engines import END, make_byte_model, make_tiny_model

CHOICES = ("abc", "abca", "abd", "xyz", "é")
PROMPT = [7, 8, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def grammars(model: Path) -> Grammars:
    return Grammars(model / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(model)


def session_of(grammar: str) -> Session:
    session = Session(1, len(PROMPT), "", SamplingParameters(grammar=grammar, stop_tokens=(END,)))
    session.write(0, PROMPT)
    return session


def test_what_may_come_next_follows_from_the_text_before_alone(grammars: Grammars, tokenizer: Tokenizer) -> None:
    texts = [tokenizer.encode(text) for text in CHOICES]
    grammar = Structure.choice(CHOICES).grammar
    tokens = st.one_of(st.sampled_from(sorted({token for text in texts for token in text})), st.just(END))
    starts = st.sampled_from(texts).flatmap(lambda text: st.integers(0, len(text)).map(lambda most: text[:most]))
    pieces = st.one_of(starts, st.lists(tokens, max_size=4))

    def expected(answer: list[int]) -> set[int]:
        if not any(text[: len(answer)] == answer for text in texts):
            return set(range(END + 1))
        following = {text[len(answer)] for text in texts if len(text) > len(answer) and text[: len(answer)] == answer}
        return following | ({END} if answer in texts else set())

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        session = session_of(grammar)
        mask = grammars.mask_of(session)
        assert mask is not None
        for _ in range(data.draw(st.integers(1, 8))):
            if data.draw(st.booleans()):
                session.truncate(data.draw(st.integers(len(PROMPT), len(session.tokens))))
            base = data.draw(st.integers(len(PROMPT), len(session.tokens)))
            session.write(base, data.draw(pieces))
            end = data.draw(st.integers(len(PROMPT), len(session.tokens)))
            guess = data.draw(pieces)
            position = data.draw(st.integers(len(PROMPT), end + len(guess)))
            if data.draw(st.booleans()):  # as before a forward, for some of its rows, by the thread
                rows = [
                    Row(each, guess, end) for each in range(data.draw(st.integers(0, position)), end + len(guess) + 1)
                ]
                mask.prepare(rows, END + 1)
                if data.draw(st.booleans()):
                    session.truncate(max(len(PROMPT), len(session.tokens) - 1))
                    end = min(end, len(session.tokens))
                    position = min(position, end + len(guess))
            if data.draw(st.booleans()):
                assert set(mask.forced(9)[:1]) <= expected(session.tokens[len(PROMPT) :])
            scores = mask.apply(torch.zeros(END + 1), position, guess, end)
            answer = [*session.tokens[:end], *guess][len(PROMPT) : position]
            assert set((scores > -torch.inf).nonzero()[:, 0].tolist()) == expected(answer)

    check()


def test_an_allowed_token_is_chosen_whatever_the_logits(grammars: Grammars, tokenizer: Tokenizer) -> None:
    [letter] = tokenizer.encode("x")
    for broken in (torch.full((END + 1,), -torch.inf), torch.full((END + 1,), torch.nan)):
        sampler = Sampler(session_of(Structure.regex("x+").grammar), grammars)
        assert sampler.choose(broken, len(PROMPT)) == letter


def test_rows_in_the_prompt_are_free(grammars: Grammars) -> None:
    mask = grammars.mask_of(session_of(Structure.regex("x").grammar))
    assert mask is not None
    assert not mask.apply(torch.zeros(END + 1), 2, (), 3).isinf().any()


def test_logits_beyond_the_tokenizer_are_forbidden(grammars: Grammars) -> None:
    """A vocabulary that is padded to a round size."""
    mask = grammars.mask_of(session_of(Structure.regex("x+").grammar))
    assert mask is not None
    assert int((mask.apply(torch.zeros(300), 3, (), 3) > -torch.inf).sum()) == 1


def test_the_tokenizer_is_ready_when_the_model_is_loaded(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    shutil.copy(model / "tokenizer.json", file)
    ready = Grammars(file)
    file.unlink()
    assert ready.mask_of(session_of(Structure.regex("x").grammar)) is not None


def test_masks_are_made_by_another_thread_while_a_forward_runs(grammars: Grammars) -> None:
    session = session_of(Structure.regex("[xy]{9}").grammar)
    mask = grammars.mask_of(session)
    assert mask is not None
    matcher = mask._follower._matcher
    threads = list[int]()

    class Watched:
        def compute_bitmask(self) -> bytes:
            threads.append(threading.get_ident())
            return matcher.compute_bitmask()

        def __getattr__(self, name: str) -> object:
            return getattr(matcher, name)

    mask._follower._matcher = Watched()  # type: ignore[assignment]
    mask.prepare([Row(len(PROMPT), (), len(PROMPT))], END + 1)
    scores = mask.apply(torch.zeros(END + 1), len(PROMPT), (), len(PROMPT))
    assert int((scores > -torch.inf).sum()) == 2
    assert len(threads) == 1, "a mask that is there is not made again"
    assert threads[0] != threading.get_ident()


@pytest.mark.parametrize("grammar", ["start: (", '{"grammars": [{"json_schema": {"type": "nonsense"}}]}', "{}", "\0"])
def test_a_grammar_from_the_wire_that_is_none_is_refused(grammars: Grammars, grammar: str) -> None:
    with pytest.raises(RequestError, match="the grammar of the structured output cannot be followed"):
        grammars.mask_of(session_of(grammar))


def test_a_tokenizer_without_bytes_is_refused(tmp_path: Path) -> None:
    grammar = Structure.regex("x").grammar
    with pytest.raises(RequestError, match="not possible with this model's tokenizer"):
        Grammars(make_tiny_model(tmp_path) / "tokenizer.json").mask_of(session_of(grammar))
    with pytest.raises(RequestError, match="needs a model with a tokenizer"):
        Grammars().mask_of(session_of(grammar))


def test_the_library_belongs_to_the_fingerprint(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsi_workers.engines import load_engine
    from support.engines import torch_backend

    engine = load_engine("transformers", role="target", model=str(model), device="cpu:0", options={"calibrate": False})
    monkeypatch.setattr("dsi_workers.engines.fingerprint.grammar_checksum", lambda: 5)
    assert fingerprint_of(torch_backend(engine)) != engine.info.fingerprint
