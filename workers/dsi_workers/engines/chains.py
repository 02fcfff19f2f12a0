"""Chains of drafts that a backend chooses by itself, several tokens in one step (Backend.draft)."""

from __future__ import annotations

from collections.abc import Sequence

from dsi_workers.backend import Backend
from dsi_workers.engine import Interrupt, Task
from dsi_workers.engines.trees import Share
from dsi_workers.session import Session


class Chains:
    """Drafts chains, and knows afterwards which of their positions the backend has computed.

    Whether a session takes drafted tokens is not known in the step that drafts them: a cancel may come first. So their positions
    count as computed once the session has these tokens.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        #: By generation: a position, and the tokens from there on that the backend has computed.
        self._computed: dict[int, tuple[int, Sequence[int]]] = {}

    def draft(self, tasks: Sequence[Task], shares: Sequence[Share], *, words: int, interrupt: Interrupt) -> bool:
        """Draft tokens below `words` for all of the tasks, if the backend can. Returns whether they are answered."""
        runs = [share.main for share in shares if share.main is not None and len(share.main.tokens) == 1]
        count = min([self._backend.most_drafts, *(min(task.count or 1, task.block) for task in tasks)])
        if count == 1 or len(runs) < len(tasks) or any(task.alternatives or task.branches for task in tasks):
            return False
        for task, run in zip(tasks, runs, strict=True):
            task.session.computed = min(task.session.computed, run.begin)
        parameters = [task.session.sampling for task in tasks]
        drafted = self._backend.draft(runs, parameters, count=count, words=words, interrupt=interrupt)
        if drafted is None:
            return False
        for task, run, tokens in zip(tasks, runs, drafted, strict=True):
            task.answer.tokens, task.done = tokens, True
            task.session.computed = run.begin + 1
            self._computed[task.session.generation] = run.begin + 1, tokens[:-1]
        return True

    def recall(self, session: Session) -> None:
        """Count what was computed with the last chain, as far as the session has its tokens now."""
        begin, tokens = self._computed.pop(session.generation, (-1, ()))
        if session.computed == begin:
            for token, drafted in zip(session.tokens[begin : begin + len(tokens)], tokens, strict=False):
                if token != drafted:
                    break
                session.computed += 1

    def forget(self, session: Session) -> None:
        self._computed.pop(session.generation, None)
