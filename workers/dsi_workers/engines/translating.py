"""A drafter whose model has another vocabulary than the target: it drafts in its own tokens and answers in the target's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import structlog

from dsi_workers.drafting.translation import Translation, Vocabulary
from dsi_workers.engine import Engine, EngineError, Interrupt, Task
from dsi_workers.engines.model import ModelEngine
from dsi_workers.grammar import GrammarMask, Grammars
from dsi_workers.models.files import ModelError, read_json, read_vocabulary_hash
from dsi_workers.models.resolve import resolve_model
from dsi_workers.session import Session

log = structlog.get_logger("dsi.engine")

#: Steps without a draft after which an incomplete word is given as a draft: it will not become complete.
_PATIENCE = 16


def in_vocabulary_of(target: str, drafter: Engine, model: str) -> Engine:
    """Return the drafter, wrapped if its model `model` has another vocabulary than the model `target`. If it has the same one, it
    never drafts tokens that only its embedding has, as one that is padded to a round size.

    Where the target's tokenizer cannot be read, as on another machine, the drafter is returned as it is. If its vocabulary is
    not the target's, the orchestrator refuses it.
    """
    try:
        directory, own = resolve_model(target, tokenizer_only=True), resolve_model(model, tokenizer_only=True)
    except ModelError as error:
        log.warning("the target's vocabulary cannot be read here: drafting in our own", reason=str(error))
        return drafter
    vocabulary = read_vocabulary_hash(directory)
    if vocabulary == drafter.info.vocabulary:
        if isinstance(drafter, ModelEngine) and (words := _words(directory)):
            drafter.limit_vocabulary(words)
        return drafter
    grammars = Grammars(directory / "tokenizer.json")
    return TranslatingEngine(drafter, Vocabulary(own), Vocabulary(directory), vocabulary, _words(directory), grammars)


class TranslatingEngine(Engine):
    """Wraps a drafter. It drafts greedily even where the target samples: the shared noise belongs to the target's token ids.

    A grammar belongs to the target's tokens, too: drafts are cut before the first token that it does not allow, and tokens
    that it forces are drafted without a forward.
    """

    def __init__(
        self, drafter: Engine, own: Vocabulary, target: Vocabulary, vocabulary: str, vocabulary_size: int,
        grammars: Grammars | None = None,
    ) -> None:  # fmt: skip
        self._drafter, self._own, self._target = drafter, own, target
        self.info = dataclasses.replace(
            drafter.info, vocabulary=vocabulary, vocabulary_size=max(vocabulary_size, target.size), rows=1
        )
        self._grammars = grammars if grammars is not None else Grammars()
        #: By generation, of those with a grammar.
        self._masks: dict[int, GrammarMask] = {}
        self._translations: dict[int, Translation] = {}
        #: By generation: steps since its last draft.
        self._silent: dict[int, int] = {}

    def step(self, tasks: Sequence[Task], interrupt: Interrupt) -> None:
        asked: list[tuple[Task, Translation, Task]] = []
        for task in tasks:
            if task.count is None:
                raise EngineError("a drafter with another vocabulary only drafts: it has no tokens to verify with")
            if self._is_forced(task):
                continue
            translation = self._follow(task.session)
            if self._answer(task, translation, whole=False):
                continue
            own = self._own_task(task, translation)
            if own is None:
                task.done = True
            else:
                asked.append((task, translation, own))
        if not asked:
            return
        try:
            self._drafter.step([own for _, _, own in asked], interrupt)
        finally:
            self.forwards = self._drafter.forwards
        for task, translation, own in asked:
            if own.done:
                self._go_on(task, translation, own)

    def reads_alone(self, task: Task) -> bool:
        own = self._own_task(task, self._follow(task.session))
        return own is not None and self._drafter.reads_alone(own)

    def forget(self, session: Session) -> None:
        self._silent.pop(session.generation, None)
        self._masks.pop(session.generation, None)
        translation = self._translations.pop(session.generation, None)
        if translation is not None:
            self._drafter.forget(translation.session)

    def close(self) -> None:
        self._drafter.close()

    def _follow(self, session: Session) -> Translation:
        """The generation's translation, brought up to the session's tokens."""
        translation = self._translations.get(session.generation)
        if translation is None or translation.followed is not session:
            translation = Translation(self._target, self._own, session)
            self._translations[session.generation] = translation
        translation.follow()
        return translation

    def _own_task(self, task: Task, translation: Translation) -> Task | None:
        """The task for the wrapped drafter, in its own tokens. None: it has no token to continue from, or no position left."""
        length, most = len(translation.session.tokens), self.info.max_length
        if length == 0 or length >= most:
            return None
        return Task(translation.session, length, min((task.count or 0) + 1, most - length))

    def _mask_of(self, session: Session) -> GrammarMask | None:
        """None: the generation has no grammar. Raises RequestError."""
        if session.generation not in self._masks and (mask := self._grammars.mask_of(session)) is not None:
            self._masks[session.generation] = mask
        return self._masks.get(session.generation)

    def _is_forced(self, task: Task) -> bool:
        """Answer the task with what the grammar forces. Returns whether it forces anything."""
        mask = self._mask_of(task.session)
        task.answer.tokens = mask.forced(task.count or 0) if mask is not None else []
        task.done = bool(task.answer.tokens)
        return task.done

    def _go_on(self, task: Task, translation: Translation, own: Task) -> None:
        """Take the wrapped drafter's answer `own` and answer the task, if there is a complete token of the target by now."""
        session = translation.session
        silent = self._silent[session.generation] = self._silent.get(session.generation, 0) + 1
        ends = self._own.says_nothing(own.answer.tokens)
        if not ends:
            session.write(len(session.tokens), own.answer.tokens)
        if not self._answer(task, translation, whole=ends or silent > _PATIENCE):
            task.done = ends or silent > _PATIENCE

    def _answer(self, task: Task, translation: Translation, *, whole: bool) -> bool:
        """Answer the task with what is translated so far. `whole`: the last word counts as complete. Returns whether there
        was a draft."""
        drafts = translation.drafts(whole=whole)[: task.count]
        if drafts:
            mask = self._mask_of(task.session)
            task.answer.tokens = list(mask.allowed(drafts)) if mask is not None else drafts
            task.done = True
            self._silent[task.session.generation] = 0
        return bool(drafts)


def _words(directory: Path) -> int:
    """The size of the vocabulary by the target's config.json. A model may have more tokens than its tokenizer."""
    config = read_json(directory / "config.json")
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size", 0)
    return int(size)
