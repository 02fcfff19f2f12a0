"""The engine for language models: on top of a backend's logits it does slots, prompts in chunks, batches and sampling.

A target's logits must not depend on how tokens were grouped into requests, nor on the generations that share a forward
(docs/exactness.md). So a target reads the prompt in chunks aligned to position 0, and relies on the backend's promise for
every later position (backend.py). A drafter only guesses: it computes no more rows than it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dsi_workers.backend import Backend, Run
from dsi_workers.decoding.slots import Slots
from dsi_workers.drafting.lookup import Lookup
from dsi_workers.engine import Engine, EngineInfo, Interrupt, Never, Task
from dsi_workers.engines.branches import Branches
from dsi_workers.engines.calibration import measured
from dsi_workers.engines.chains import Chains
from dsi_workers.engines.choice import Choice
from dsi_workers.engines.fingerprint import fingerprint_of
from dsi_workers.engines.trees import Share, answer_along, branches_to_compute, has_tree, main_end, rows_of, runs_of
from dsi_workers.grammar import Grammars
from dsi_workers.sampling import warm_up
from dsi_workers.session import Session
from dsi_workers.tree import Branch

#: The most rows of a drafter's main path in a forward with branches. A longer run, as after the loss of a slot, has forwards of
#: its own: a GPU's kernels compute few rows, and prompts have no branches.
_MOST_BESIDE_BRANCHES = 8


class ModelEngine(Engine):
    """`exact`: the engine is a target, whose bits matter. `lookup`: the engine is a drafter that checks guesses of prompt lookup
    in its forwards. `calibrate`: measure latencies now. `tokenizer`: the model's tokenizer.json, for structured output.

    Uses slot 0 of the backend for warm-up and measurements.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        exact: bool,
        lookup: Lookup | None = None,
        calibrate: bool = True,
        tokenizer: Path | None = None,
    ) -> None:
        self._backend = backend
        self._exact = exact
        self._lookup = lookup
        self._choice = Choice(Grammars(tokenizer))
        self._chains = Chains(backend)
        self._slots = Slots(backend.slots, block=backend.prompt_chunk if exact else None)
        #: Of a drafter of trees.
        self._branches: Branches | None = None
        if backend.branch_slots > 1 and not exact and lookup is None:
            self._branches = Branches(backend, self._slots, self._choice)
        [logits] = backend.compute([Run(0, [0], 0, 0, 0)], Never())
        warm_up(logits[0])
        info = EngineInfo(
            vocabulary=backend.vocabulary,
            vocabulary_size=backend.vocabulary_size,
            max_length=backend.max_length,
            window=backend.window,
            latency_us=0,
            slots=backend.slots,
            fingerprint=fingerprint_of(backend) if exact else 0,
            rows=backend.tree_rows if exact else 1 if self._branches is None else self._branches.most_rows,
            devices=backend.devices,
            scores=exact,
        )
        self.info = measured(backend, info, exact=exact) if calibrate else info
        backend.release()
        backend.forwards = 0

    # A step

    def step(self, tasks: Sequence[Task], interrupt: Interrupt) -> None:
        tasks = [task for task in tasks if not self._is_known(task)]
        counted = self._backend.forwards
        if self._branches is not None:
            self._branches.begin_step(tasks)
        try:
            shares = {id(task): self._share_of(task) for task in tasks}
            for group in self._groups(tasks, shares):
                of_group = [shares[id(task)] for task in group]
                if not self._chains.draft(group, of_group, words=self.info.vocabulary_size, interrupt=interrupt):
                    self._compute(group, of_group, interrupt)
        finally:
            self.forwards += self._backend.forwards - counted

    def reads_alone(self, task: Task) -> bool:
        if self._exact:
            return _position(task) < task.session.prompt_length
        self._chains.recall(task.session)
        if self._lookup is not None:
            self._lookup.recognize(task.session)
        return len(task.session.tokens) - _position(task) > 1

    def _groups(self, tasks: Sequence[Task], shares: Mapping[int, Share]) -> list[list[Task]]:
        """Split the tasks into groups that share a forward. A chunk of a prompt has a forward of its own; other tasks share one
        up to the backend's `most_rows`."""
        groups: list[list[Task]] = [[]]
        for task in tasks:
            together = [*groups[0], task]
            rows = sum(self._rows(shares[id(each)].runs) for each in together)
            rows += self._branches.rows(together) if self._branches is not None else 0
            if len(tasks) > 1 and self.reads_alone(task):
                groups.append([task])
            elif groups[0] and rows > self._backend.most_rows:
                groups.insert(0, [task])
            else:
                groups[0].append(task)
        return [group for group in groups if group]

    def _rows(self, runs: Sequence[Run]) -> int:
        return sum(self._backend.rows(run) for run in runs)

    def _compute(self, tasks: Sequence[Task], shares: Sequence[Share], interrupt: Interrupt) -> None:
        self._add_branches(tasks, shares)
        known = [task.session.computed for task in tasks]
        for task, share in zip(tasks, shares, strict=True):
            # Padding or an interrupt may leave anything in the cache from `begin` on.
            task.session.computed = min(task.session.computed, share.runs[0].begin)
        runs, beside = [run for share in shares for run in share.runs], list[Run]()
        if self._branches is not None:
            beside = self._branches.runs([task for task, run in zip(tasks, runs, strict=True) if _ends(task, run)])
        for task, share in zip(tasks, shares, strict=True):
            if task.session.sampling.grammar:
                more = self._branches.texts(task) if self._branches is not None else []
                self._choice.prepare(task.session, [*rows_of(task, share), *more], self.info.vocabulary_size)
        answers = iter(self._cut(self._backend.compute([*runs, *beside], interrupt)))
        main, branches_of = list[torch.Tensor | None](), list[list[tuple[Branch, torch.Tensor]]]()
        for share in shares:
            main.append(next(answers) if share.main is not None else None)
            branches_of.append([(branch, torch.cat([next(answers) for _ in runs])) for branch, runs in share.branches])
        chains = [None if has_tree(task) or task.score else each for task, each in zip(tasks, main, strict=True)]
        chosen = self._choice.most_probable(tasks, chains)
        for task, share, computed, logits, branches, choices in zip(
            tasks, shares, known, main, branches_of, chosen, strict=True
        ):
            run = share.main
            if has_tree(task):
                task.session.computed = computed if run is None else run.begin + len(run.tokens)
                answer_along(task, self._choice, logits, branches)
                continue
            assert run is not None
            assert logits is not None
            if task.score:
                task.session.computed = run.begin + len(run.tokens)
                self._choice.score(task, logits, run.wanted.start)
                task.done = bool(task.answer.logprobs)
                continue
            guess = run.tokens[len(task.session.tokens) - run.begin :]
            task.session.computed = run.begin + len(run.tokens) - len(guess)
            differs = self._choice.answer(task, logits, guess, choices=choices)
            task.done = differs or task.session.computed == len(task.session.tokens)
            if self._lookup is not None and guess:
                self._lookup.checked(task.session, guess, right=len(task.answer.tokens) - 1)
        if self._branches is not None:
            self._branches.answer(list(answers))

    def limit_vocabulary(self, words: int) -> None:
        """Of a drafter: never draft a token from `words` on. The target has none of these, and the drafter's embedding only has
        rows for them to fill it up."""
        self.info = replace(self.info, vocabulary_size=min(words, self.info.vocabulary_size))

    def _cut(self, answers: list[torch.Tensor]) -> list[torch.Tensor]:
        """The logits of the tokens that may be chosen."""
        words = self.info.vocabulary_size
        return answers if words == self._backend.vocabulary_size else [logits[:, :words] for logits in answers]

    def _share_of(self, task: Task) -> Share:
        """What the next forward must compute for this task: a run of the main path, or the branch that the answer goes along."""
        run = self._run_of(task)
        if run.tokens or not has_tree(task):
            return Share(run)
        branch = branches_to_compute(task, run.begin)[0]
        return Share(None, [(branch, runs_of(branch, task, run.slot, self._backend.window))])

    def _add_branches(self, tasks: Sequence[Task], shares: Sequence[Share]) -> None:
        """Have the forward compute further branches while there are rows for them. Those that leave the main path first are the
        first that an answer may need."""
        if any(run.width for share in shares for run in share.runs):
            return  # a chunk of a prompt has a forward of its own
        left = self._backend.most_rows - sum(self._rows(share.runs) for share in shares)
        found = [
            (branch.fork - task.start, task, share, branch)
            for task, share in zip(tasks, shares, strict=True)
            if has_tree(task)
            for branch in branches_to_compute(task, share.main_end)
        ]
        for _, task, share, branch in sorted(found, key=lambda each: each[0]):
            runs = runs_of(branch, task, share.runs[0].slot, self._backend.window)
            if (rows := self._rows(runs)) <= left and all(branch is not each for each, _ in share.branches):
                share.branches.append((branch, runs))
                left -= rows

    def _run_of(self, task: Task) -> Run:
        """The inputs that the next forward computes for this task.

        The logits for position p follow the input at p - 1. So the task needs the inputs [start - 1, length), and before them
        those that this worker has not computed yet.
        """
        session = task.session
        self._choice.begin(session)
        self._chains.recall(session)  # before it may get another slot
        slot = self._slots.of(session)
        if self._lookup is not None:
            self._lookup.recognize(session)
        begin, length = _position(task), main_end(task) if has_tree(task) else len(session.tokens)
        guess: list[int] = []
        width, chunk = 0, self._backend.prompt_chunk
        if not self._exact:
            end = min(begin + chunk, length)
            if task.branches and end - begin > _MOST_BESIDE_BRANCHES:
                end = min(end, length - 1)  # the last row then shares a forward with the branches
            guess = self._guess(task) if end == length else []
        elif begin < session.prompt_length:
            begin -= begin % chunk
            session.reused = min(session.reused, begin)  # a chunk whose logits are wanted is read again
            width = min(chunk, session.prompt_length - begin)  # the same if some tokens have not arrived yet
            end = min(begin + width, length)
        else:
            end = min(begin + self._backend.window, length)
        first_logits = max(task.start - 1 + len(task.answer.tokens), begin)
        if task.score and first_logits < end:
            first_logits = begin  # of every row, whatever is asked: how many rows are wanted may change their bits
        return Run(slot, session.tokens[begin:end] + guess, begin, width, first_logits)

    # Drafts without a forward

    def _is_known(self, task: Task) -> bool:
        """Answer a draft with the tokens that the grammar forces, or with what followed the same tokens before, if that is
        sure enough. Returns whether the task is done."""
        if task.count is None:
            return task.done
        grammar = self._choice.grammar_of(task.session)
        tokens = grammar.forced(task.count) if grammar is not None else []
        if not tokens and self._lookup is not None:
            tokens = self._lookup.copy(task.session, task.count)
            tokens = list(grammar.allowed(tokens)) if grammar is not None else tokens
        if tokens:
            task.answer.tokens, task.answer.continued, task.done = tokens, [None] * len(task.branches), True
        return task.done

    # Prompt lookup for a drafter

    def _guess(self, task: Task) -> list[int]:
        """Guesses that the next forward checks, to stand after the session's tokens."""
        if self._lookup is None or task.count is None or len(task.session.tokens) - _position(task) > 1:
            return []
        return self._lookup.guess(task.session, task.count - 1)

    # Branches of a drafter

    def promote(self, session: Session, branch: Branch) -> None:
        if self._branches is None or not self._branches.promote(session, branch):
            super().promote(session, branch)

    def forget(self, session: Session) -> None:
        self._slots.forget(session)
        self._chains.forget(session)
        if self._branches is not None:
            self._branches.forget(session)
        self._choice.forget(session)
        if self._lookup is not None:
            self._lookup.forget(session)

    def close(self) -> None:
        self._backend.close()


def _position(task: Task) -> int:
    """The position of the first input that the next forward for this task must compute."""
    return min(task.session.computed, task.start - 1 + len(task.answer.tokens))


def _ends(task: Task, run: Run) -> bool:
    """Whether the run reaches the end of the main path."""
    return run.begin + len(run.tokens) >= len(task.session.tokens)
