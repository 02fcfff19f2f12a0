"""Engines that follow a grammar. Targets verify chains, trees and batches as token by token; drafters draft what may follow."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dsi_actors.structure import Structure
from dsi_protocol import SamplingParameters
from dsi_workers.engines import Engine, Interrupted, Task, load_engine
from dsi_workers.engines.translating import TranslatingEngine
from dsi_workers.grammar import Grammars
from dsi_workers.session import Session
from dsi_workers.tree import Branch
from support.engines import END, InterruptAfter, NoInterrupt, make_byte_model

PROMPT = [3, 14, 15, 9, 26]
JSON = Structure.json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 9},
            "kinds": {"type": "array", "items": {"enum": ["cat", "cow", "dog"]}, "minItems": 2, "maxItems": 4},
        },
        "required": ["name", "kinds"],
        "additionalProperties": False,
    }
).grammar
WORDS = Structure.regex("([a-c]{2,5}-){4}end").grammar
SAMPLINGS = [
    SamplingParameters(grammar=JSON, stop_tokens=(END,)),
    SamplingParameters(grammar=JSON, stop_tokens=(END,), temperature=1.5, seed=4, frequency_penalty=0.5),
    SamplingParameters(grammar=WORDS, stop_tokens=(END,), temperature=1.5, seed=5),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("bytes"))


def engine_of(model: Path, role: str, **options: Any) -> Engine:
    options = {"calibrate": False, "max_length": 256, "quantization": "none", **options}
    return load_engine("transformers", role=role, model=str(model), device="cpu:0", options=options)


def opened(sampling: SamplingParameters, answer: Sequence[int] = (), generation: int = 1) -> Session:
    session = Session(generation, len(PROMPT), "", sampling)
    session.write(0, [*PROMPT, *answer])
    return session


def text_of(engine: Engine, sampling: SamplingParameters, most: int = 100) -> list[int]:
    """The target's answer, a token in each step."""
    session, found = opened(sampling, generation=99), list[int]()
    while len(found) < most and END not in found:
        [token] = engine.verify(session, len(session.tokens), NoInterrupt()).tokens
        found.append(token)
        session.write(len(session.tokens), [token])
    engine.forget(session)
    return found


def guesses(chance: random.Random, text: Sequence[int], alphabet: Sequence[int]) -> list[int]:
    """The beginning of the text, then tokens that are hardly ever right, some of which the grammar never allows."""
    right = list(text[: chance.randint(0, 5)])
    return right + [chance.choice([*alphabet, END, 200]) for _ in range(chance.randint(0, 4))]


def branches_of(chance: random.Random, fork: int, path: Sequence[int], text: Sequence[int]) -> list[Branch]:
    """Branches that leave the path from position `fork` on with another token, one of them with the right one."""
    found = list[Branch]()
    for place in sorted(chance.sample(range(len(path)), min(len(path), 2))):
        first = text[place] if place < len(text) and text[place] != path[place] else (path[place] + 1) % END
        rest = text[place + 1 : place + 1 + chance.randint(0, 2)]
        found.append(Branch(fork + place, None, [first, *rest]))
    return found


def test_targets_answer_chains_trees_and_batches_as_token_by_token(model: Path) -> None:
    engine = engine_of(model, "target", dtype="float32")
    texts = [text_of(engine, sampling) for sampling in SAMPLINGS]
    assert all(text[-1] == END for text in texts), "finished answers"
    chance = random.Random(7)
    for _ in range(12):
        sessions = [opened(sampling, generation=number) for number, sampling in enumerate(SAMPLINGS)]
        done = [0] * len(sessions)
        while any(count < len(text) for count, text in zip(done, texts, strict=True)):
            tasks, asked = list[Task](), list[int]()
            for number, (session, text) in enumerate(zip(sessions, texts, strict=True)):
                if done[number] == len(text):
                    continue
                start = len(PROMPT) + done[number]
                session.truncate(start)
                path = guesses(chance, text[done[number] :], text)
                session.write(start, path)
                branches = branches_of(chance, start, path, text[done[number] :]) if chance.random() < 0.5 else []
                tasks.append(Task(session, start, branches=branches))
                asked.append(number)
            if chance.random() < 0.2:  # a step that nobody wants any more leaves nothing behind
                with pytest.raises(Interrupted):
                    engine.step(tasks, InterruptAfter(1))
                continue
            while not all(task.done for task in tasks):
                engine.step([task for task in tasks if not task.done], NoInterrupt())
            for number, task in zip(asked, tasks, strict=True):
                answer = task.answer.tokens[: len(texts[number]) - done[number]]  # what follows the end is no answer
                assert answer == texts[number][done[number] : done[number] + len(answer)]
                done[number] += len(answer)
                sessions[number].truncate(len(PROMPT))
                sessions[number].write(len(PROMPT), texts[number][: done[number]])
        for session in sessions:
            engine.forget(session)


def test_tokens_that_the_grammar_forces_are_drafted_without_a_forward(model: Path) -> None:
    engine = engine_of(model, "drafter")
    forced = SamplingParameters(grammar=Structure.regex("[x-z]abcdefgh[mn]ij").grammar, stop_tokens=(END,))
    session = opened(forced)
    [first] = engine.draft(session, 9, NoInterrupt())
    session.write(len(session.tokens), [first])
    forwards = engine.forwards
    drafts = engine.draft(session, 9, NoInterrupt())
    assert len(drafts) == 8
    assert engine.forwards == forwards
    session.write(len(session.tokens), drafts)
    assert len(engine.draft(session, 9, NoInterrupt())) == 1, "a choice needs a forward again"
    assert engine.forwards > forwards


def test_nothing_but_the_end_is_forced_after_the_last_token(model: Path) -> None:
    engine = engine_of(model, "drafter")
    session = opened(SamplingParameters(grammar=Structure.regex("[xy]{1,2}").grammar, stop_tokens=(END,)))
    while END not in session.tokens:
        session.write(len(session.tokens), engine.draft(session, 5, NoInterrupt()))
    assert len(session.tokens) - len(PROMPT) <= 3


@pytest.mark.parametrize("options", [{}, {"lookup": True}], ids=["model", "lookup"])
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_drafts_follow_the_grammar(model: Path, temperature: float, options: dict[str, Any]) -> None:
    """A drafter without masks writes any byte."""
    engine = engine_of(model, "drafter", **options)
    pattern = "(a[b-d]{1,3}){12}"
    sampling = SamplingParameters(
        grammar=Structure.regex(pattern).grammar, stop_tokens=(END,), temperature=temperature, seed=9
    )
    session = opened(sampling)
    letters = text_from(model, "abcd")
    prefixes = re.compile("(a[b-d]{1,3})*a?")
    while END not in session.tokens:
        session.write(len(session.tokens), engine.draft(session, 4, NoInterrupt()))
        answer = "".join(letters.get(token, "?") for token in session.tokens[len(PROMPT) :] if token != END)
        assert prefixes.fullmatch(answer), answer


def test_second_choices_and_branches_follow_the_grammar(model: Path) -> None:
    engine = engine_of(model, "drafter")
    assert engine.info.rows > 1
    letters = text_from(model, "abc")
    sampling = SamplingParameters(grammar=Structure.regex("[abc]{30}").grammar, stop_tokens=(END,))
    session = opened(sampling)
    for _ in range(8):
        branches = session.drafts.branches[:3]
        task = Task(session, len(session.tokens), 1, branches=branches, alternatives=True)
        while not task.done:
            engine.step([task], NoInterrupt())
        drafted = [*task.answer.tokens, *task.answer.alternatives, *task.answer.continued]
        assert {token for token in drafted if token is not None} <= letters.keys()
        session.drafts.add(
            len(session.tokens), task.answer.tokens, task.answer.alternatives, branches, task.answer.continued
        )
        session.write(len(session.tokens), task.answer.tokens)
    assert len(session.drafts.branches) == 8


def test_a_drafter_with_another_vocabulary_follows_the_grammar(model: Path, tmp_path: Path) -> None:
    other = make_byte_model(tmp_path)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    letters = sorted(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] = {letter: 255 - number for number, letter in enumerate(letters)}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    engine = engine_of(other, "drafter", target=str(model))
    assert isinstance(engine, TranslatingEngine)
    sampling = SamplingParameters(grammar=Structure.regex("(abcdef|[^a]{2})+").grammar, stop_tokens=(END,))
    known = text_from(model, "abcdef")
    [a] = (token for token, letter in known.items() if letter == "a")
    session = opened(sampling, [a])
    forwards = engine.forwards
    drafts = engine.draft(session, 9, NoInterrupt())
    assert "".join(known[token] for token in drafts) == "bcdef"
    assert engine.forwards == forwards
    expected = Grammars(model / "tokenizer.json").mask_of(session)
    assert expected is not None
    for _ in range(30):
        drafts = engine.draft(session, 4, NoInterrupt())
        assert list(expected.allowed(drafts)) == drafts
        session.write(len(session.tokens), drafts or [a, *list(known)[1:]])


def text_from(model: Path, letters: str) -> dict[int, str]:
    """The letters by their tokens."""
    from dsi_actors.tokenizer import Tokenizer

    tokenizer = Tokenizer(model)
    return {tokenizer.encode(letter)[0]: letter for letter in letters}
