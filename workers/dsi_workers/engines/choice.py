"""From logits to the tokens of an answer: greedy, or as the generation samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsi_workers.engine import RequestError, Task
from dsi_workers.sampling import Sampler, log_probability
from dsi_workers.session import Session


class Choice:
    """Chooses for all generations of one engine."""

    def __init__(self) -> None:
        #: Of generations that are not plainly greedy.
        self._samplers: dict[int, Sampler] = {}

    def begin(self, session: Session) -> None:
        """Call before the session's logits are computed: what is wrong with its parameters shows here."""
        if not session.sampling.plain_greedy and session.generation not in self._samplers:
            self._samplers[session.generation] = Sampler(session)

    def forget(self, session: Session) -> None:
        self._samplers.pop(session.generation, None)

    def answer(self, task: Task, logits: torch.Tensor, guess: Sequence[int]) -> bool:
        """Add the tokens that `logits` [n, vocabulary] give to the answer. Returns whether one differs from the session's
        token at its position, or from the guess that follows the session's tokens; the rest is then left out.

        Raises RequestError if the request's own parameters let no token be chosen.
        """
        session, answer = task.session, task.answer
        length = len(session.tokens)
        sampler = self._samplers.get(session.generation)
        choices = logits.argmax(dim=-1).tolist() if sampler is None else None
        for row in range(len(logits)):
            at = task.start + len(answer.tokens)
            if sampler is not None:
                token = _sampled(sampler, logits[row], at, guess)
            else:
                assert choices is not None
                token = choices[row]
            answer.tokens.append(token)
            if session.sampling.logprobs:
                answer.logprobs.append(log_probability(logits[row], token))
            expected = session.tokens[at : at + 1] or guess[at - length : at - length + 1]
            if expected and expected[0] != token:
                return True
        return False


def _sampled(sampler: Sampler, logits: torch.Tensor, position: int, guess: Sequence[int]) -> int:
    """Raises RequestError: parameters that nobody foresaw are no fault of the model."""
    try:
        return sampler.choose(logits, position, guess)
    except (
        torch.OutOfMemoryError,
        torch.AcceleratorError,
    ):  # of a forward before, too: it shows where results are read
        raise
    except Exception as error:
        raise RequestError(f"no token can be chosen: {type(error).__name__}: {error}") from error
