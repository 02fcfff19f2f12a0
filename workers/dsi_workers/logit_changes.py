"""Changes logits before a token is chosen: grammar, bad words, stop tokens, biases and penalties (SPEC.md section 7).

Each change follows from the parameters and the text before the position alone, whether that text is committed or guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from dsi_protocol import SamplingParameters
from dsi_workers.grammar import GrammarMask, Grammars
from dsi_workers.session import Occurrences, Session

LARGEST = torch.finfo(torch.float32).max


class LogitChanges:
    """The changes for one session. They take no longer for a longer text."""

    def __init__(self, session: Session, grammars: Grammars | None = None) -> None:
        """Raises RequestError if the grammar cannot be followed here."""
        self._session = session
        self._parameters = parameters = session.sampling
        #: None: the session has no grammar.
        self.grammar: GrammarMask | None = (grammars or Grammars()).mask_of(session) if parameters.grammar else None
        self._in_text = _TokenCounts(session, 0) if parameters.repetition_penalty != 1 else None
        penalised = parameters.presence_penalty or parameters.frequency_penalty
        self._in_answer = _TokenCounts(session, session.prompt_length) if penalised else None
        self._longest_bad_word = max(map(len, parameters.bad_words), default=0)
        #: The ids that have a logit, and their biases. Made for the first logits, on their device.
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None

    def apply(self, scores: torch.Tensor, position: int, guess: Sequence[int], end: int) -> torch.Tensor:
        """Return the changed scores [vocabulary]. `scores` may be changed, too.

        The text before `position` is the session's tokens before position `end`, and then `guess`.
        """
        parameters = self._parameters
        if self.grammar is not None:
            scores = self.grammar.apply(scores, position, guess, end)
        if self._longest_bad_word:
            scores = _forbid(scores, self._bad_tokens(position, guess, end))
        if position - self._session.prompt_length < parameters.min_tokens:
            scores = _forbid(scores, parameters.stop_tokens)
        if parameters.biased_tokens:
            tokens, biases = self._bias_on(scores)
            scores[tokens] += biases
        if self._in_text is not None:
            seen = self._in_text.before(scores, position, guess, end) > 0
            scores = apply_repetition_penalty(scores, seen, parameters.repetition_penalty)
        if self._in_answer is not None:
            scores = apply_count_penalties(scores, self._in_answer.before(scores, position, guess, end), parameters)
        return scores

    def _bad_tokens(self, position: int, guess: Sequence[int], end: int) -> list[int]:
        """The tokens that would complete a bad word."""
        begin = max(self._session.prompt_length, position - self._longest_bad_word + 1)
        before = [*self._session.tokens[begin : min(position, end)], *_guessed(guess, begin, position, end)]
        found = []
        for *first, last in self._parameters.bad_words:
            if len(first) <= len(before) and before[len(before) - len(first) :] == first:
                found.append(last)
        return found

    def _bias_on(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._bias is None:
            biases = dict(zip(self._parameters.biased_tokens, self._parameters.biases, strict=True))
            known = [token for token in biases if token < len(scores)]
            tokens = torch.tensor(known, dtype=torch.long, device=scores.device)
            self._bias = tokens, torch.tensor([biases[token] for token in known], device=scores.device)
        return self._bias


class _TokenCounts:
    """How often each token occurs from position `begin` on, as a tensor that is updated when the text changes."""

    def __init__(self, session: Session, begin: int) -> None:
        self._session = session
        self._begin = begin
        self._occurrences = Occurrences(begin)
        session.counters.append(self._occurrences)
        self._counts: torch.Tensor | None = None

    def before(self, scores: torch.Tensor, position: int, guess: Sequence[int], end: int) -> torch.Tensor:
        """Return float32 counts for the text before `position`. Their shape and device are those of `scores`."""
        if self._counts is None:
            self._counts = torch.zeros(scores.shape, device=scores.device)
        self._occurrences.move_to(self._session.tokens, min(position, end))
        changes = {token: count for token, count in self._occurrences.changes().items() if token < len(scores)}
        if changes:
            tokens = torch.tensor(list(changes), device=scores.device)
            self._counts[tokens] = torch.tensor(list(changes.values()), dtype=torch.float32, device=scores.device)
        more = [token for token in _guessed(guess, self._begin, position, end) if token < len(scores)]
        if not more:
            return self._counts
        ones = torch.ones(len(more), device=scores.device)
        return self._counts.index_add(0, torch.tensor(more, device=scores.device), ones)


def _guessed(guess: Sequence[int], begin: int, position: int, end: int) -> Sequence[int]:
    """The guessed tokens at [begin, position). The guess begins at `end`."""
    return guess[max(0, begin - end) : max(0, position - end)]


def _forbid(scores: torch.Tensor, tokens: Iterable[int]) -> torch.Tensor:
    """Return the scores with -inf for these tokens, or unchanged scores if nothing would be left."""
    known = [token for token in tokens if token < len(scores)]  # a vocabulary may have tokens without a logit
    if not known:
        return scores
    left = scores.index_fill(0, torch.tensor(known, device=scores.device), -torch.inf)
    return left if bool((left > -torch.inf).any()) else scores


def apply_repetition_penalty(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return the scores after the repetition penalty. `seen` is True for tokens that occur earlier in the text."""
    changed = torch.where(scores < 0, scores * penalty, scores / penalty).clamp_(max=LARGEST)
    return torch.where(seen, changed, scores)


def apply_count_penalties(scores: torch.Tensor, counts: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """Return the scores after the frequency penalty and then the presence penalty. `counts`: of each token in the answer."""
    scores = scores - parameters.frequency_penalty * counts
    return scores - parameters.presence_penalty * (counts > 0)
