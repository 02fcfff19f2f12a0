"""From logits to a token: transformers' parameters, then argmax(log p + g) with noise that is the same everywhere.

The choice depends on the logits, the parameters, the seed, the position and the tokens before it, and on nothing else:
not on who drafted, what was verified together, or which worker it is. A drafter that samples with the same noise agrees
with the target as often as their distributions are close (arXiv 2408.07978), and only token ids travel.

Each parameter is computed as transformers' processor of that name computes it, to the bit (tests/workers/test_sampling.py). The
library itself is not used: its import takes seconds, and its repetition penalty reads the whole text for each token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from dsi_protocol.gumbel import (
    FRACTION_BITS,
    GAMMA,
    LN_2,
    LN_LN_2,
    POINT_BITS,
    half_log_table,
    stream_key,
)
from dsi_workers.session import Occurrences, SamplingParameters, Session

_LARGEST = torch.finfo(torch.float32).max


class Sampler:
    """Chooses the tokens of one session. A choice takes no longer for a longer text."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._parameters = session.sampling
        self._said: _Said | None = None
        if self._parameters.repetition_penalty != 1:
            session.occurrences = Occurrences()
            self._said = _Said(session.occurrences)

    def choose(self, logits: torch.Tensor, position: int, guess: Sequence[int] = (), *, fork: int | None = None) -> int:
        """Return the token at `position`. Before it stand the session's tokens and, where those end, `guess`. With `fork` the
        session's tokens count before that position only: a branch of drafts. logits: [vocabulary]."""
        candidates, perturbed = self._perturbed(self._scores(logits, position, guess, fork), position)
        return int(candidates[perturbed.argmax()]) if candidates is not None else int(perturbed.argmax())

    def choose_two(self, logits: torch.Tensor, position: int, guess: Sequence[int] = ()) -> tuple[int, int]:
        """Return the token of `choose` and the runner-up under the same noise: what `choose` would return if the first token
        could not be chosen. Where the parameters leave one candidate, the runner-up is the most probable of the others."""
        scores = self._scores(logits, position, guess, None)
        candidates, perturbed = self._perturbed(scores, position)
        if candidates is None:
            first = int(perturbed.argmax())
            return first, second_choice(scores, first)
        place = int(perturbed.argmax())
        first = int(candidates[place])
        if len(candidates) == 1:
            return first, second_choice(scores, first)
        return first, int(candidates[second_choice(perturbed, place)])

    def _scores(self, logits: torch.Tensor, position: int, guess: Sequence[int], fork: int | None) -> torch.Tensor:
        """Finite logits after the repetition penalty."""
        scores = _finite(logits)
        if self._said is None:
            return scores
        tokens = self._session.tokens
        length = min(position, len(tokens) if fork is None else fork)
        self._said.move_to(tokens, length)
        return penalised(
            scores, self._said.mask(scores, guess[: position - length]), self._parameters.repetition_penalty
        )

    def _perturbed(self, scores: torch.Tensor, position: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return (candidates, log p + g of each). The largest is the choice. Candidates None: every token, without noise."""
        if self._parameters.greedy:
            return None, scores
        kept = kept_scores(scores, self._parameters)
        candidates = (kept > -torch.inf).nonzero()[:, 0]
        if not len(candidates):  # a broken model: no token is possible
            return None, scores
        noise = gumbel_noise(stream_key(self._parameters.seed, position), candidates)
        return candidates, kept[candidates].double() + noise


class _Said:
    """Which tokens a text has, as a mask over the vocabulary that is corrected where the text changes."""

    def __init__(self, occurrences: Occurrences) -> None:
        self._occurrences = occurrences
        self._mask: torch.Tensor | None = None

    def move_to(self, tokens: Sequence[int], length: int) -> None:
        """The text is the first `length` of these tokens."""
        self._occurrences.move_to(tokens, length)

    def mask(self, like: torch.Tensor, more: Sequence[int]) -> torch.Tensor:
        """Of the shape of `like`, for the text with `more` behind it."""
        if self._mask is None:
            self._mask = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
        for ids, said in zip(self._occurrences.changes(), (True, False), strict=True):
            self._set(self._mask, ids, said=said)
        if not more:
            return self._mask
        mask = self._mask.clone()
        self._set(mask, more, said=True)
        return mask

    @staticmethod
    def _set(mask: torch.Tensor, ids: Sequence[int], *, said: bool) -> None:
        known = [token for token in ids if token < len(mask)]  # a vocabulary may have tokens that no logit belongs to
        if known:
            mask[torch.tensor(known, device=mask.device)] = said


def second_choice(scores: torch.Tensor, first: int) -> int:
    """Return the place of the largest of `scores` [n] beside the place `first`."""
    others = scores.clone()
    others[first] = -torch.inf
    return int(others.argmax())


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """In float32. What is no number counts as impossible, what is infinite as the largest number."""
    return logits.float().nan_to_num(nan=-torch.inf, posinf=_LARGEST, neginf=-torch.inf)


def penalised(scores: torch.Tensor, said: torch.Tensor, penalty: float) -> torch.Tensor:
    """`said`: whether a token stands before."""
    changed = torch.where(scores < 0, scores * penalty, scores / penalty).clamp_(max=_LARGEST)
    return torch.where(said, changed, scores)


def kept_scores(scores: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """In transformers' order: temperature, top-k, top-p, min-p. Tokens that are dropped have -inf; one stays."""
    if parameters.temperature != 1:
        scores = (scores / parameters.temperature).clamp_(max=_LARGEST)
    if parameters.top_k:
        least = torch.topk(scores, min(parameters.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if parameters.top_p < 1:
        ordered, places = scores.sort()
        dropped = ordered.softmax(dim=-1).cumsum(dim=-1) <= (1 - parameters.top_p)
        dropped[-1] = False
        scores = scores.masked_fill(dropped.scatter(0, places, dropped), -torch.inf)
    if parameters.min_p > 0:
        probabilities = scores.softmax(dim=-1)
        dropped = probabilities < parameters.min_p * probabilities.amax()
        dropped[probabilities.argmax()] = False
        scores = scores.masked_fill(dropped, -torch.inf)
    return scores


def log_probability(logits: torch.Tensor, token: int) -> float:
    """Of the token in the softmax of logits [vocabulary]: a finite number, whatever they are."""
    value = float(_finite(logits).log_softmax(dim=-1)[token])
    return value if value >= -_LARGEST else -_LARGEST


def warm_up(logits: torch.Tensor) -> None:
    """Choose once with every parameter from logits [vocabulary]: what is loaded or built for that is not when somebody waits."""
    parameters = SamplingParameters(0.9, 50, 0.9, 0.01, 1.1, 1, logprobs=True)
    session = Session(0, 1, "warm-up", parameters)
    session.write(0, [0, 1, 0])
    sampler = Sampler(session)
    sampler.choose_two(logits, 3)
    for guess in ((), (1,)):
        log_probability(logits, sampler.choose(logits, 3 + len(guess), guess))
    session.truncate(1)
    sampler.choose(logits, 1)


def gumbel_noise(key: int, tokens: torch.Tensor) -> torch.Tensor:
    """dsi_protocol.gumbel for many tokens of one stream: int64 [n] -> float64 [n], the same bits."""
    bits = _mix(_signed(key) + (tokens + 1) * _signed(GAMMA))
    bits = torch.where(bits == 0, torch.ones_like(bits), bits)
    zeros = _leading_zeros(bits)
    fraction = (bits << zeros) >> (63 - FRACTION_BITS) & ((1 << FRACTION_BITS) - 1)
    exponential = ((zeros << POINT_BITS) + _half_log(fraction)).clamp(min=1)
    exponent = _floor_log2(exponential)
    fraction = ((exponential - (torch.ones_like(bits) << exponent)) << (46 - exponent)) >> (46 - FRACTION_BITS)
    logarithm = ((exponent - POINT_BITS) << POINT_BITS) + (1 << POINT_BITS) - _half_log(fraction)
    return -(logarithm.double() * 2.0**-POINT_BITS * LN_2) - LN_LN_2


def _mix(number: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function; int64 arithmetic wraps as unsigned arithmetic does."""
    number = number ^ _shift_right(number, 30)
    number = number * _signed(0xBF58476D1CE4E5B9)
    number = number ^ _shift_right(number, 27)
    number = number * _signed(0x94D049BB133111EB)
    return number ^ _shift_right(number, 31)


def _shift_right(number: torch.Tensor, by: int) -> torch.Tensor:
    """Logical, where >> of a signed tensor is arithmetic."""
    return (number >> by) & ((1 << (64 - by)) - 1)


def _leading_zeros(bits: torch.Tensor) -> torch.Tensor:
    """Of 64-bit patterns that are not zero."""
    high, low = _shift_right(bits, 32), bits & 0xFFFFFFFF
    return torch.where(high > 0, 31 - _floor_log2(high.clamp(min=1)), 63 - _floor_log2(low.clamp(min=1)))


def _floor_log2(number: torch.Tensor) -> torch.Tensor:
    """Of positive integers below 2^53: the exponent of the double that is equal to it."""
    return torch.frexp(number.double()).exponent.long() - 1


def _half_log(fraction: torch.Tensor) -> torch.Tensor:
    table = _table_on(fraction.device)
    cell, within = fraction >> 32, fraction & 0xFFFFFFFF
    upper = table[cell]
    return upper - ((upper - table[cell + 1]) * within >> 32)


@functools.cache
def _table_on(device: torch.device) -> torch.Tensor:
    return torch.tensor(half_log_table(), device=device)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
