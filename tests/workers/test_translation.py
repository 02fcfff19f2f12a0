"""A drafter with another vocabulary: it reads what the target said and says what the target would, both as text."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dsi_workers.drafting.translation import Translation, Vocabulary
from dsi_workers.engines import Engine, EngineError, EngineInfo, Interrupt, Interrupted, Task
from dsi_workers.engines.translating import TranslatingEngine
from dsi_workers.session import Session
from support.engines import InterruptAfter, NoInterrupt, session_of

_WORDS = """
the a of and to in it that is was for on with as at by this had not are but from have they which one you were all her she
there would their we him been has when who will no more if out so up said what its about than into them can only other time
new some could these two may first then do any like my now over such our man me even most made after also verification
drafter lighthouse harbour keeper remembers understanding continues attempts positions rejected wonderful 42 1987 e.g.
(perhaps) self.tokens[3:7] x=y+1; don't well-known
"""


def _story() -> str:
    chance, words_known, sentences = random.Random(11), _WORDS.split(), []
    for _ in range(75):
        words = [chance.choice(words_known) for _ in range(chance.randrange(5, 16))]
        sentences.append(" ".join(words).capitalize() + chance.choice([".", ".", "", "?", "", "!", "", ".\n", ".\n\n"]))
    return " ".join(sentences) + " Zürich, 日本語, naïve – 🙂 end."


STORY = _story()


def byte_level(words: int) -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM2 cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([STORY], trainer)
    return tokenizer


def with_bytes_for_the_rare(words: int) -> Tokenizer:
    """As Gemma cuts: spaces are letters, and what is not in the vocabulary is spelled in bytes."""
    alphabet = sorted({"▁" if letter == " " else letter for letter in STORY if letter.isascii()})
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(
        ["".join(letter for letter in STORY if letter.isascii())],
        trainers.BpeTrainer(vocab_size=words, initial_alphabet=alphabet, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    vocabulary = {"<start>": 0, "<end>": 1, "<unk>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for word in model["vocab"]:
        vocabulary.setdefault(word, len(vocabulary))
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = trained.normalizer
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<start>", "<end>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 0)])
    return tokenizer


def with_a_space_before(words: int) -> Tokenizer:
    """As Llama 2 cuts: a text begins with a space that nobody wrote."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=words, special_tokens=["<end>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([STORY], trainer)
    return tokenizer


KINDS = {"byte level": byte_level, "bytes for the rare": with_bytes_for_the_rare, "a space before": with_a_space_before}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Vocabulary]:
    made = {}
    for kind, make in KINDS.items():
        for words in (420, 800):
            directory = tmp_path_factory.mktemp("vocabulary")
            make(words).save(str(directory / "tokenizer.json"))
            made[kind, words] = Vocabulary(directory)
    return made


class KnowsTheStory(Engine):
    """A drafter that goes on where its own text stands in the story, one token a step; after it, the end token."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.info = EngineInfo("its own", vocabulary.size, 1 << 16, 0, 100, slots=4)
        self._vocabulary = vocabulary
        self.story = vocabulary.tokens(STORY, begins=True)
        self.read: list[int] = []

    def step(self, tasks: Sequence[Task], interrupt: Interrupt) -> None:
        self.forwards += 1
        interrupt.check()
        for task in tasks:
            session = task.session
            self.read.append(len(session.tokens) - session.computed)
            session.computed = len(session.tokens)
            task.answer.tokens = [self._next(session.tokens)]
            task.done = True

    def _next(self, tokens: list[int]) -> int:
        said = self._vocabulary.text(tokens, begins=True)
        rest = self._vocabulary.tokens(STORY[len(said) :]) if STORY.startswith(said) else []
        for spelled in range(12, 0, -1):  # bytes of characters that are not complete
            if tokens[-spelled:] == rest[:spelled] and self._vocabulary.text(tokens[:-spelled], begins=True) == said:
                return [*rest, 0][spelled]
        return rest[0] if rest else 0


def translating(vocabularies: dict[tuple[str, int], Vocabulary], drafter: str, target: str) -> TranslatingEngine:
    own, other = vocabularies[drafter, 800], vocabularies[target, 420]
    return TranslatingEngine(KnowsTheStory(own), own, other, "the target's", 0)


def drafted(engine: Engine, session: Session, most: int) -> list[int]:
    """What the loop would send: draft after draft, until there is none."""
    found: list[int] = []
    while len(found) < most:
        tokens = engine.draft(session, most - len(found), NoInterrupt())
        if not tokens:
            break
        session.write(len(session.tokens), tokens)
        found += tokens
    return found


PAIRS = [(drafter, target) for drafter in KINDS for target in KINDS]


@pytest.mark.parametrize(("drafter", "target"), PAIRS)
def test_a_drafter_that_is_right_is_right_in_the_targets_tokens(
    vocabularies: dict[tuple[str, int], Vocabulary], drafter: str, target: str
) -> None:
    engine = translating(vocabularies, drafter, target)
    story = vocabularies[target, 420].tokens(STORY, begins=True)
    session, right, wrong = session_of(story[:40]), 0, 0
    while len(session.tokens) < 800:
        length = len(session.tokens)
        found = drafted(engine, session, 8)
        until = next((at for at, token in enumerate(found) if token != story[length + at]), len(found))
        right, wrong = right + until, wrong + (until < len(found))
        session.write(0, story[: length + until + 1])  # the target's correction, or one token more
    assert right > 600
    assert wrong < 0.05 * right
    assert engine.forwards > 100


@pytest.mark.parametrize(("drafter", "target"), PAIRS)
def test_to_the_end_of_a_long_text_and_no_further(
    vocabularies: dict[tuple[str, int], Vocabulary], drafter: str, target: str
) -> None:
    engine = translating(vocabularies, drafter, target)
    story = vocabularies[target, 420].tokens(STORY, begins=True)
    session = session_of(story[:-60])
    found = drafted(engine, session, 1000)
    said = vocabularies[target, 420].text(session.tokens, begins=True)
    assert said == vocabularies[target, 420].text(story, begins=True)
    assert abs(len(found) - 60) <= 5  # what stands at the end may be cut otherwise by itself
    assert engine.draft(session, 5, NoInterrupt()) == []
    fresh = translating(vocabularies, drafter, target)
    assert fresh.draft(session_of(story), 5, NoInterrupt()) == []
    assert fresh.forwards == 1, "the drafter said that the text ends"


@pytest.mark.parametrize("drafter", KINDS)
def test_a_correction_is_followed_and_little_is_read_again(
    vocabularies: dict[tuple[str, int], Vocabulary], drafter: str
) -> None:
    engine = translating(vocabularies, drafter, "byte level")
    engine._own = copy.copy(engine._own)
    inner = engine._drafter
    assert isinstance(inner, KnowsTheStory)
    story = vocabularies["byte level", 420].tokens(STORY)
    session = session_of(story[:700])
    drafted(engine, session, 20)
    inner.read.clear()
    asked: list[int] = []
    whole = engine._own.tokens

    def counted(text: str, *, begins: bool = False) -> list[int]:
        asked.append(len(text))
        return whole(text, begins=begins)

    engine._own.tokens = counted  # type: ignore[method-assign]
    for length in range(710, 1000, 10):
        session.truncate(length - 10)
        session.write(length - 10, [*story[length - 10 : length - 1], 5])  # a wrong word
        drafted(engine, session, 8)
        session.write(0, story[:length])  # and the right one
        assert drafted(engine, session, 8)[:4] == story[length : length + 4]
    assert max(inner.read) < 40
    assert max(asked) < 2000


@given(data=st.data())
@settings(max_examples=60)
def test_whatever_the_target_says_something_or_nothing_is_drafted(
    vocabularies: dict[tuple[str, int], Vocabulary], data: st.DataObject
) -> None:
    drafter, target = data.draw(st.sampled_from(PAIRS))
    engine = translating(vocabularies, drafter, target)
    size = engine.info.vocabulary_size
    tokens = st.integers(0, size - 1)
    session = session_of(data.draw(st.lists(tokens, min_size=1, max_size=300)))
    for _ in range(data.draw(st.integers(1, 6))):
        count = data.draw(st.integers(1, 9))
        found = engine.draft(session, count, NoInterrupt())
        assert len(found) <= count
        assert all(0 <= token < size for token in found)
        session.write(len(session.tokens), found)
        if data.draw(st.booleans()):
            session.write(data.draw(st.integers(0, len(session.tokens))), data.draw(st.lists(tokens, max_size=5)))
        if data.draw(st.booleans()):
            session.truncate(data.draw(st.integers(1, len(session.tokens))))


def test_an_interrupt_leaves_no_trace(vocabularies: dict[tuple[str, int], Vocabulary]) -> None:
    story = vocabularies["byte level", 420].tokens(STORY)
    calm, disturbed = (translating(vocabularies, "bytes for the rare", "byte level") for _ in range(2))
    first, second = session_of(story[:60]), session_of(story[:60])
    expected = drafted(calm, first, 30)
    with pytest.raises(Interrupted):
        disturbed.draft(second, 30, InterruptAfter(0))
    assert drafted(disturbed, second, 30) == expected


def test_it_has_nothing_to_verify_with(vocabularies: dict[tuple[str, int], Vocabulary]) -> None:
    engine = translating(vocabularies, "byte level", "bytes for the rare")
    task = Task(session_of([20, 30, 40]), 1)
    assert not engine.reads_alone(task)
    with pytest.raises(EngineError, match="only drafts"):
        engine.step([task], NoInterrupt())


def test_a_text_that_is_too_long_for_the_drafter_gets_no_drafts(
    vocabularies: dict[tuple[str, int], Vocabulary],
) -> None:
    engine = translating(vocabularies, "byte level", "bytes for the rare")
    engine.info = dataclasses.replace(engine.info, max_length=50)
    story = vocabularies["bytes for the rare", 420].tokens(STORY, begins=True)
    session = session_of(story[:30])
    drafted(engine, session, 1000)
    assert len(engine._translations[1].session.tokens) == 50
    assert engine.draft(session, 5, NoInterrupt()) == []


def test_what_is_forgotten_is_given_back(vocabularies: dict[tuple[str, int], Vocabulary]) -> None:
    engine = translating(vocabularies, "byte level", "a space before")
    session = session_of(vocabularies["a space before", 420].tokens(STORY[:200], begins=True))
    drafted(engine, session, 5)
    engine.forget(session)
    assert not engine._translations
    assert not engine._silent


def test_a_character_that_is_not_complete_is_waited_for(vocabularies: dict[tuple[str, int], Vocabulary]) -> None:
    target, own = vocabularies["byte level", 420], vocabularies["bytes for the rare", 800]
    text = "naïve 🙂 end"
    tokens = target.tokens(text)
    followed = session_of([])
    translation = Translation(target, own, followed)
    for length in range(1, len(tokens) + 1):
        followed.write(0, tokens[:length])
        translation.follow()
        said = own.text(translation.session.tokens, begins=True)
        assert text.startswith(said)
    assert said == text
