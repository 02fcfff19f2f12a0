"""A drafter by prompt lookup: it guesses what followed the same tokens earlier. It needs no model and no vocabulary."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from dsi_protocol import OptionValue
from dsi_workers.drafting.suffix_index import SUFFIX_LENGTHS, SuffixIndex, Text, Texts
from dsi_workers.engine import Engine, EngineError, EngineInfo, Interrupt, Task
from dsi_workers.session import Session

#: Of one generation's step. A row costs microseconds.
_MOST_ROWS = 16


class NgramEngine(Engine):
    """In a tree, the alternatives to a token are the other tokens that followed the same tokens, and a branch goes on with what
    followed its last tokens.

    Options: block (the most tokens of one guess), remember (false: look only at the generation's own text, not at earlier
    generations). It cannot verify."""

    def __init__(self, options: Mapping[str, OptionValue]) -> None:
        self._block = int(options.get("block", 8))
        self._texts = Texts(remember=options.get("remember", True) is not False)
        example = Session(0, 512, "calibration")
        example.write(0, range(512))
        begun = time.perf_counter()
        Text(SuffixIndex(), example).read()
        latency_us = max(1, round((time.perf_counter() - begun) * 1e6 / 512))
        self.info = EngineInfo(
            vocabulary="", vocabulary_size=0, max_length=1 << 20, window=0, latency_us=latency_us, slots=64,
            window_latency_us=latency_us * _MOST_ROWS, batch_latency_us=latency_us * 64, rows=_MOST_ROWS,
        )  # fmt: skip

    def step(self, tasks: Sequence[Task], interrupt: Interrupt) -> None:
        for task in tasks:
            if task.count is None:
                raise EngineError("the ngram engine only drafts: it has no tokens of its own to verify with")
            interrupt.check()
            if not self._texts.read(task.session):
                continue
            self.forwards += 1
            task.answer.tokens, _ = self._texts.find(task.session, min(self._block, task.count))
            self._draft_branches(task)
            task.done = True

    def _draft_branches(self, task: Task) -> None:
        session, answer = task.session, task.answer
        if task.alternatives:
            path = session.tokens[-SUFFIX_LENGTHS[0] :]
            for token in answer.tokens:
                others = (other for other in self._texts.find_next(session, path) if other != token)
                answer.alternatives.append(next(others, None))
                path.append(token)
        for branch in task.branches:
            path = [*session.tokens[max(0, branch.fork - SUFFIX_LENGTHS[0]) : branch.fork], *branch.tokens]
            answer.continued.append(next(iter(self._texts.find_next(session, path)), None))

    def forget(self, session: Session) -> None:
        self._texts.forget(session)
