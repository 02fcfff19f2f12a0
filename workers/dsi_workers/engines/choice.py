"""Turns logits into the tokens of an answer, greedily or by the generation's sampling parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dsi_protocol import MAX_TOLD
from dsi_workers.engine import RequestError, Task
from dsi_workers.grammar import GrammarMask, Grammars, Row
from dsi_workers.sampling import Sampler, log_probabilities, most_probable, second_choice
from dsi_workers.session import Session
from dsi_workers.tree import Branch

#: Log probabilities of a vocabulary take memory.
_ROWS_AT_ONCE = 32


class Choice:
    """Chooses the tokens of all generations of one engine."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        #: By generation. Plainly greedy generations have none.
        self._samplers: dict[int, Sampler] = {}

    def begin(self, session: Session) -> None:
        """Prepare to choose tokens for the session. Call this before its logits are computed, so that errors show early.

        Raises RequestError.
        """
        if not session.sampling.plain_greedy and session.generation not in self._samplers:
            self._samplers[session.generation] = Sampler(session, self._grammars)

    def grammar_of(self, session: Session) -> GrammarMask | None:
        """The masks of the session's grammar. None: it has no grammar. Raises RequestError."""
        if not session.sampling.grammar:
            return None
        self.begin(session)
        return self._samplers[session.generation].grammar

    def prepare(self, session: Session, rows: Sequence[Row], words: int) -> None:
        """Begin to make masks for these rows, for logits of `words` tokens, while a forward computes the logits."""
        if (grammar := self.grammar_of(session)) is not None:
            grammar.prepare(rows, words)

    def forget(self, session: Session) -> None:
        """Free what is held for the session."""
        self._samplers.pop(session.generation, None)

    def most_probable(self, tasks: Sequence[Task], logits: Sequence[torch.Tensor | None]) -> list[list[int] | None]:
        """The most probable token of each row, for those tasks that are plainly greedy; None for the others, and where there are
        no logits. All at once: on a GPU each answer by itself would wait for the device."""
        rows = [
            None if each is None or task.session.generation in self._samplers else each
            for task, each in zip(tasks, logits, strict=True)
        ]
        asked = [each for each in rows if each is not None]
        found = iter(torch.cat(asked).argmax(dim=-1).tolist() if asked else ())
        return [None if each is None else [next(found) for _ in range(len(each))] for each in rows]

    def answer(
        self, task: Task, logits: torch.Tensor, guess: Sequence[int], fork: int | None = None,
        choices: list[int] | None = None,
    ) -> bool:  # fmt: skip
        """Choose a token from each row of `logits` [n, vocabulary], with a second choice if the task wants alternatives, and add
        them to the task's answer.

        The text is session.tokens before position `fork` (None: all of them), and then `guess`: what a drafter's own drafter
        expects, or the tokens of a branch. Stops at the first token that differs from the text's token at its position, and then
        returns True. `choices`: what `most_probable` found in these rows, if it was asked.

        Raises RequestError if the request's parameters let no token be chosen.
        """
        session, answer = task.session, task.answer
        length = len(session.tokens) if fork is None else fork
        sampler = self._samplers.get(session.generation)
        if sampler is None and choices is None:
            choices = logits.argmax(dim=-1).tolist()
        for row in range(len(logits)):
            at = task.start + len(answer.tokens)
            if sampler is None:
                assert choices is not None
                token = choices[row]
                if task.alternatives:
                    answer.alternatives.append(second_choice(logits[row], token))
            elif task.alternatives:
                with _blamed_on_the_request():
                    token, second = sampler.choose_two(logits[row], at, guess, length)
                answer.alternatives.append(second)
            else:
                with _blamed_on_the_request():
                    token = sampler.choose(logits[row], at, guess, length)
            answer.tokens.append(token)
            if session.sampling.logprobs and task.count is None:
                _tell(task, log_probabilities(logits[row]), token)
            expected = session.tokens[at : at + 1] if at < length else guess[at - length : at - length + 1]
            if expected and expected[0] != token:
                return True
        return False

    def score(self, task: Task, logits: torch.Tensor, begin: int) -> None:
        """Tell how probable the task's tokens are, as far as there are logits. logits: [n, vocabulary], after the inputs at
        positions [begin, begin + n)."""
        end = min(begin + len(logits) + 1, len(task.session.tokens), task.start + MAX_TOLD)
        wanted = logits[task.start - 1 - begin : end - 1 - begin]
        at = task.start
        for rows in wanted.split(_ROWS_AT_ONCE):
            for row in log_probabilities(rows):
                _tell(task, row, task.session.tokens[at])
                at += 1

    def after(self, session: Session, branches: Sequence[Branch], logits: torch.Tensor) -> list[int]:
        """Choose the token that continues each branch of drafts beside the session's tokens. logits: [branches, vocabulary].

        Raises RequestError as `answer` does.
        """
        sampler = self._samplers.get(session.generation)
        if sampler is None:
            tokens: list[int] = logits.argmax(dim=-1).tolist()
            return tokens
        with _blamed_on_the_request():
            return [
                sampler.choose(row, branch.end, branch.tokens, fork=branch.fork)
                for branch, row in zip(branches, logits, strict=True)
            ]


def _tell(task: Task, logprobs: torch.Tensor, token: int) -> None:
    """Add the log probability of a token to the task's answer, and the most probable tokens. logprobs: [vocabulary]."""
    task.answer.logprobs.append(float(logprobs[token]))
    if count := task.session.sampling.top_logprobs:
        tokens, values = most_probable(logprobs, count)
        task.answer.top_tokens += tokens
        task.answer.top_logprobs += values


@contextmanager
def _blamed_on_the_request() -> Iterator[None]:
    """Any error of the sampler but one of the device is the request's fault, not the model's: raises RequestError."""
    try:
        yield
    except RequestError:
        raise
    except (
        torch.OutOfMemoryError,
        torch.AcceleratorError,
    ):  # may come from the forward before: a device reports errors when results are read
        raise
    except Exception as error:
        raise RequestError(f"no token can be chosen: {type(error).__name__}: {error}") from error
