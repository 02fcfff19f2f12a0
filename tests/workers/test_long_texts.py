"""A token costs a worker no more after a long text than after a short one: what is counted does not grow."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsi_protocol import Draft, Drafted, OpenGeneration, SamplingParameters, Verified, Verify, prefix_checksum
from dsi_workers.backend import Run
from dsi_workers.connection import WorkSocket
from dsi_workers.decoding.torch_backend import TorchBackend
from dsi_workers.drafting.lookup import Lookup
from dsi_workers.drafting.suffix_index import SuffixIndex, Text
from dsi_workers.drafting.translation import Vocabulary
from dsi_workers.engines import Engine, Task, load_engine
from dsi_workers.engines.translating import TranslatingEngine
from dsi_workers.loop import WorkerLoop
from dsi_workers.session import Session
from support.counting import CountedList, calls_of
from support.engines import NoInterrupt, ScriptedSocket, make_tiny_model

SHORT, LONG = 1_000, 8_000
SAMPLED = SamplingParameters(0.8, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=3)


def text(length: int) -> list[int]:
    chance = random.Random(length)
    return [chance.randrange(90) for _ in range(length)]


def counted_session(length: int, sampling: SamplingParameters | None = None, *, generation: int = 1) -> Session:
    session = Session(generation, length, "test", sampling)
    session.tokens = CountedList()
    session.write(0, text(length))
    session.drafts.restart(session.tokens, length)
    return session


def touched(session: Session, work: Callable[[], object]) -> int:
    """How many of the session's tokens the work looks at."""
    tokens = cast(CountedList, session.tokens)
    before = tokens.touched
    work()
    return tokens.touched - before


def draft_and_correct(engine: Engine, session: Session, rounds: int) -> None:
    """Drafts, of which the target accepts the first two and corrects the third, as the loop writes them."""
    for turn in range(rounds):
        begin = len(session.tokens)
        while len(session.tokens) < begin + 6:
            found = engine.draft(session, begin + 6 - len(session.tokens), NoInterrupt()) or [turn % 90]
            session.write(len(session.tokens), found)
        session.truncate(begin + 2)
        session.write(begin + 2, [(7 * turn) % 90])


def verify_and_accept(engine: Engine, session: Session, rounds: int) -> None:
    """Verifications of three drafts each, which are as good as random, and of one more token."""
    for turn in range(rounds):
        start = len(session.tokens)
        session.write(start, [turn % 90, 3, 4])
        answer = engine.verify(session, start, NoInterrupt()).tokens
        session.truncate(start)
        session.write(start, answer)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), positions=2 * LONG)


def ngram() -> Engine:
    return load_engine("ngram", role="drafter", model="", device="cpu:0", options={"remember": False})


def of_model(model: Path, role: str, **options: Any) -> Engine:
    options = {"max_length": 2 * LONG, "slots": 1, "calibrate": False, **options}
    return load_engine("transformers", role=role, model=str(model), device="cpu:0", options=options)


@pytest.mark.parametrize("kind", ["prompt lookup", "a model", "a model with prompt lookup", "timed"])
def test_a_drafter_looks_at_the_end_of_the_text_only(model: Path, kind: str) -> None:
    makes: dict[str, Callable[[], Engine]] = {
        "prompt lookup": ngram,
        "a model": lambda: of_model(model, "drafter"),
        "a model with prompt lookup": lambda: of_model(model, "drafter", lookup=True),
        "timed": lambda: load_engine("timed", role="drafter", model="", device="cpu:0", options={"acceptance": 0.5}),
    }
    engine = makes[kind]()
    found = {}
    for length in (SHORT, LONG):
        session = counted_session(length, SAMPLED, generation=length)
        draft_and_correct(engine, session, 2)  # it has read the text
        found[length] = touched(session, lambda session=session: draft_and_correct(engine, session, 20))  # type: ignore[misc]
    assert found[LONG] < 1.5 * found[SHORT] < LONG, found


@pytest.mark.parametrize("sampling", [SamplingParameters(), SAMPLED])
@pytest.mark.parametrize("kind", ["a model", "timed"])
def test_a_target_looks_at_the_end_of_the_text_only(model: Path, kind: str, sampling: SamplingParameters) -> None:
    engine = (
        of_model(model, "target")
        if kind == "a model"
        else load_engine("timed", role="target", model="", device="cpu:0", options={"vocabulary_size": 90})
    )
    found = {}
    for length in (SHORT, LONG):
        session = counted_session(length, sampling, generation=length)
        verify_and_accept(engine, session, 2)
        found[length] = touched(session, lambda session=session: verify_and_accept(engine, session, 20))  # type: ignore[misc]
    assert found[LONG] < 1.5 * found[SHORT] < LONG, found


def test_an_index_is_brought_in_line_by_what_has_changed() -> None:
    found = {}
    for length in (SHORT, LONG):
        session = counted_session(length)
        read = Text(SuffixIndex(), session)
        assert read.read()

        def change(session: Session = session, read: Text = read) -> None:
            for turn in range(50):
                session.truncate(len(session.tokens) - 5)
                session.write(len(session.tokens), [turn % 90, 1, 2, 3, 4, 5])
                assert read.read()

        found[length] = touched(session, change), calls_of(change)
    assert found[SHORT] == found[LONG]


def test_lookup_asks_as_much_after_a_long_text() -> None:
    found = {}
    for length in (SHORT, LONG):
        lookup, session = Lookup({1: 10.0, 8: 11.0}, remember=False), counted_session(length)
        lookup.guess(session, 7)

        def ask(lookup: Lookup = lookup, session: Session = session) -> None:
            for turn in range(50):
                session.write(len(session.tokens), [turn % 90])
                session.computed = len(session.tokens)
                lookup.copy(session, 4)
                lookup.recognize(session)
                lookup.guess(session, 7)

        found[length] = touched(session, ask)
    assert found[LONG] < 1.5 * found[SHORT] < LONG, found


def test_a_branch_copies_the_keys_that_its_slot_lacks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rejection, all keys before the fork were copied again into the slot of each branch."""
    copied: list[int] = []
    plain = TorchBackend.copy

    def counted(backend: TorchBackend, source: int, destination: int, begin: int, end: int) -> None:
        copied.append(end - begin)
        plain(backend, source, destination, begin, end)

    monkeypatch.setattr(TorchBackend, "copy", counted)
    found = {}
    for length in (SHORT, LONG):
        engine, session = of_model(model, "drafter"), counted_session(length)

        def grow(steps: int, engine: Engine = engine, session: Session = session) -> None:
            for _ in range(steps):
                at = len(session.tokens)
                task = Task(session, at, 100, session.drafts.branches[:7], alternatives=True)
                while not task.done:
                    engine.step([task], NoInterrupt())
                answer = task.answer
                session.drafts.add(at, answer.tokens, answer.alternatives, task.branches, answer.continued)
                session.write(at, answer.tokens)

        def go_on(rounds: int, grow: Callable[[int], None] = grow, session: Session = session) -> None:
            for turn in range(rounds):
                grow(6)
                at = len(session.tokens) - 3
                session.truncate(at)
                session.write(at, [turn % 90])
                session.drafts.restart(session.tokens, at + 1)

        go_on(6)  # each slot has had a branch
        copied.clear()
        looked_at = touched(session, lambda go_on=go_on: go_on(10))  # type: ignore[misc]
        assert copied
        found[length] = sum(copied), looked_at
    assert found[LONG][0] < 1.5 * found[SHORT][0] < LONG
    assert found[LONG][1] < 1.5 * found[SHORT][1] < LONG


def test_the_next_turn_of_a_chat_finds_the_keys_of_branches_where_they_were(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[tuple[int, int]] = []
    monkeypatch.setattr(TorchBackend, "copy", lambda self, source, to, begin, end: copied.append((begin, end)))
    engine = of_model(model, "drafter")

    def draft_a_branch(session: Session) -> None:
        for _ in range(2):
            at = len(session.tokens)
            task = Task(session, at, 100, session.drafts.branches[:1], alternatives=True)
            while not task.done:
                engine.step([task], NoInterrupt())
            session.drafts.add(
                at, task.answer.tokens, task.answer.alternatives, task.branches, task.answer.continued
            )  # fmt: skip
            session.write(at, task.answer.tokens)

    first = counted_session(500, generation=1)
    draft_a_branch(first)
    assert copied == [(0, 500)]
    engine.forget(first)
    second = counted_session(500, generation=2)
    second.write(500, [1, 2, 3])
    second.drafts.restart(second.tokens, 503)
    copied.clear()
    draft_a_branch(second)
    assert copied == [(500, 503)]


def byte_level(directory: Path, words: int, spaces: bool) -> Vocabulary:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([prose(3_000, spaces=spaces)], trainer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    return Vocabulary(directory)


def prose(words: int, *, spaces: bool) -> str:
    chance = random.Random(words)
    syllables = ["ka", "to", "mi", "ren", "shu", "wo"] if spaces else list("日本語文字列海山川風雨雪月花鳥")
    made = ["".join(chance.choices(syllables, k=chance.randrange(1, 4))) for _ in range(words)]
    return (" " if spaces else "").join(made)


class _CountedTokenizer:
    """Counts characters that are tokenized, and tokens that become text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.converted = 0

    def encode(self, characters: str, **more: Any) -> Any:
        self.converted += len(characters)
        return self._tokenizer.encode(characters, **more)

    def decode(self, tokens: Sequence[int], **more: Any) -> Any:
        self.converted += len(tokens)
        return self._tokenizer.decode(tokens, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class _Echo(Engine):
    """A drafter that goes on with tokens of its own, whatever the text."""

    def __init__(self, info: Any, tokens: Sequence[int]) -> None:
        self.info = info
        self._tokens = tokens
        self._at = 0

    def step(self, tasks: Sequence[Task], interrupt: Any) -> None:
        for task in tasks:
            self._at += 1
            task.answer.tokens, task.done = [self._tokens[self._at % len(self._tokens)]], True


@pytest.mark.parametrize("spaces", [True, False])
def test_a_drafter_of_another_vocabulary_translates_the_end_of_the_text_only(tmp_path: Path, spaces: bool) -> None:
    """Also after corrections far behind the end, as of a drafter that is far ahead, and in scripts without spaces."""
    own, target = byte_level(tmp_path / "own", 500, spaces), byte_level(tmp_path / "target", 330, spaces)
    words = target.tokens(prose(12_000, spaces=spaces))
    assert len(words) > LONG + 2_000
    info = load_engine("timed", role="drafter", model="", device="cpu:0", options={}).info
    found = {}
    for length in (SHORT, LONG):
        spies = [_CountedTokenizer(each._tokenizer) for each in (own, target)]
        vocabularies = [object.__new__(Vocabulary) for _ in spies]
        for vocabulary, plain, spy in zip(vocabularies, (own, target), spies, strict=True):
            vocabulary.__dict__.update(plain.__dict__, _tokenizer=spy)
        echo = _Echo(info, own.tokens(prose(200, spaces=spaces)))
        engine = TranslatingEngine(echo, vocabularies[0], vocabularies[1], "the target's", 0)
        session = counted_session(0)
        session.write(0, words[:length])

        def go_on(rounds: int, session: Session = session, engine: Engine = engine) -> None:
            for _ in range(rounds):
                begin = len(session.tokens)
                for _ in range(8):
                    session.write(len(session.tokens), engine.draft(session, 8, NoInterrupt()))
                session.write(len(session.tokens), words[begin : begin + 150])  # far ahead
                engine.draft(session, 8, NoInterrupt())
                session.truncate(begin)  # and wrong from the beginning
                session.write(begin, words[begin : begin + 5])

        go_on(3)
        before = sum(spy.converted for spy in spies)
        looked_at = touched(session, lambda go_on=go_on: go_on(20))  # type: ignore[misc]
        found[length] = sum(spy.converted for spy in spies) - before, looked_at
    assert found[LONG][0] < 1.5 * found[SHORT][0]
    assert found[LONG][1] < 1.5 * found[SHORT][1]


def test_a_request_is_prepared_and_answered_without_a_look_at_the_whole_text() -> None:
    """From the message to the reply, by the loop, with the drafter that has no forward."""
    found = {}
    for length in (SHORT, LONG):
        socket = ScriptedSocket()
        loop = WorkerLoop(cast(WorkSocket, socket), ngram(), lambda: True, role="drafter")
        prompt = tuple(text(length))
        socket.inbox.append(OpenGeneration(1, length, "test"))
        socket.inbox.append(Draft(1, 1, 0, 0, prompt, length, 4, 4))
        loop.run()
        loop.farewell = None
        session = loop._sessions.get(1)
        assert session is not None
        session.checksum(length)  # of the prompt: once
        session.tokens = CountedList(session.tokens)
        looked_at, tokens = 0, list(prompt)
        for attempt in range(2, 60):
            base, correction = len(tokens), (attempt % 90, (5 * attempt) % 90)
            tokens += correction
            checksum = prefix_checksum(tokens[:base])
            socket.inbox.append(Draft(1, attempt, base, checksum, correction, len(tokens), 4, 4, rows=1 + attempt % 2))
            looked_at += touched(session, loop.run)
            loop.farewell = None
        assert len([reply for reply in socket.sent if isinstance(reply, Drafted)]) == 59
        found[length] = looked_at
    assert found[LONG] < 1.5 * found[SHORT] < LONG, found


def test_a_target_answers_a_verification_by_its_own_tokens_only() -> None:
    found = {}
    for length in (SHORT, LONG):
        socket = ScriptedSocket()
        engine = load_engine("timed", role="target", model="", device="cpu:0", options={"vocabulary_size": 90})
        loop = WorkerLoop(cast(WorkSocket, socket), engine, lambda: True, role="target")
        prompt = tuple(text(length))
        socket.inbox.append(OpenGeneration(1, length, "test"))
        socket.inbox.append(Verify(1, 1, 0, 0, prompt, length))
        loop.run()
        loop.farewell = None
        session = loop._sessions.get(1)
        assert session is not None
        session.checksum(length)  # of the prompt: once
        session.tokens = CountedList(session.tokens)
        looked_at, tokens = 0, list(prompt)
        for attempt in range(2, 40):
            [answer] = [each for each in socket.sent if isinstance(each, Verified) and each.attempt == attempt - 1]
            tokens += answer.tokens
            base = len(tokens) - len(answer.tokens)
            request = Verify(1, attempt, base, prefix_checksum(tokens[:base]), (*answer.tokens, 1, 2), len(tokens))
            socket.inbox.append(request)
            looked_at += touched(session, loop.run)
            loop.farewell = None
        found[length] = looked_at
    assert found[LONG] < 1.5 * found[SHORT] < LONG, found


def test_runs_of_a_forward_are_short_after_the_prompt(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention reads the whole cache; nothing else is computed again."""
    rows: list[int] = []
    plain = TorchBackend.compute

    def counted(backend: TorchBackend, runs: Sequence[Run], interrupt: Any) -> Any:
        rows.append(sum(len(run.tokens) for run in runs))
        return plain(backend, runs, interrupt)

    engine, session = of_model(model, "target"), counted_session(LONG)
    verify_and_accept(engine, session, 1)
    monkeypatch.setattr(TorchBackend, "compute", counted)
    verify_and_accept(engine, session, 10)
    assert max(rows) <= 8
