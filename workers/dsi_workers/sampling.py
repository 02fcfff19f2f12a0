"""Samples tokens from logits: apply the sampling parameters, then take argmax(log p + g) with Gumbel noise g.

The noise is the same on every worker. The token depends only on the logits, the parameters, the seed, the position and the
tokens before it. It does not depend on the drafter, on how tokens were grouped into verifications, or on the worker. A drafter
with the same noise agrees with the target as often as their distributions are close (arXiv 2408.07978). Only token ids are sent.

A parameter that transformers has, too, gives the same bits as there (tests/workers/test_sampling.py). transformers itself
is not used: its import takes seconds, and its repetition penalty reads the whole text for each token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from dsi_protocol import SamplingParameters
from dsi_protocol.gumbel import (
    FRACTION_BITS,
    GAMMA,
    LN_2,
    LN_LN_2,
    POINT_BITS,
    half_log_table,
    stream_key,
)
from dsi_workers.grammar import GrammarMask, Grammars
from dsi_workers.logit_changes import LARGEST, LogitChanges
from dsi_workers.session import Session


class Sampler:
    """Chooses the tokens of one session. A choice takes no longer for a longer text."""

    def __init__(self, session: Session, grammars: Grammars | None = None) -> None:
        """Raises RequestError if the session's grammar cannot be followed here."""
        self._session = session
        self._parameters = session.sampling
        self._changes = LogitChanges(session, grammars) if self._parameters.changes_logits else None
        #: A position, and the noise of all tokens there.
        self._noise: tuple[int, torch.Tensor] | None = None

    @property
    def grammar(self) -> GrammarMask | None:
        """The masks of the session's grammar. None: it has no grammar."""
        return self._changes.grammar if self._changes is not None else None

    def choose(self, logits: torch.Tensor, position: int, guess: Sequence[int] = (), fork: int | None = None) -> int:
        """Return the token at `position`, from logits [vocabulary].

        The token follows the session's tokens before position `fork` (None: all of them), and then `guess`.
        """
        candidates, perturbed = self._perturbed(self._scores(logits, position, guess, fork), position)
        return int(candidates[perturbed.argmax()]) if candidates is not None else int(perturbed.argmax())

    def choose_two(
        self, logits: torch.Tensor, position: int, guess: Sequence[int] = (), fork: int | None = None
    ) -> tuple[int, int | None]:
        """Return the token of `choose` and the runner-up under the same noise.

        The runner-up is what `choose` would return if the first token could not be chosen. Where the parameters leave one
        candidate, the runner-up is the most probable of the other tokens. None: the grammar allows no other token.
        """
        scores = self._scores(logits, position, guess, fork)
        candidates, perturbed = self._perturbed(scores, position)
        place = int(perturbed.argmax())
        if candidates is None:
            return place, second_choice(scores, place)
        first = int(candidates[place])
        if len(candidates) == 1:
            return first, second_choice(scores, first)
        second = second_choice(perturbed, place)
        return first, None if second is None else int(candidates[second])

    def _scores(self, logits: torch.Tensor, position: int, guess: Sequence[int], fork: int | None) -> torch.Tensor:
        """Finite logits after all changes that come before the temperature."""
        scores = _finite(logits)
        if self._changes is None:
            return scores
        return self._changes.apply(scores, position, guess, len(self._session.tokens) if fork is None else fork)

    def _perturbed(self, scores: torch.Tensor, position: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return (candidates, log p + g of each). The largest is the choice. Candidates None: every token, without noise."""
        if self._parameters.greedy:
            return None, scores
        kept = filter_scores(scores, self._parameters)
        candidates = (kept > -torch.inf).nonzero()[:, 0]
        if not len(candidates):  # the model is broken: every token has probability zero
            return None, scores
        return candidates, kept[candidates].double() + self._noise_of(candidates, position, len(scores))

    def _noise_of(self, candidates: torch.Tensor, position: int, vocabulary: int) -> torch.Tensor:
        """The noise of these tokens at the position. That of the whole vocabulary is kept: in a step of a tree, the main path
        and the branches choose for the same position."""
        key = stream_key(self._parameters.seed, position)
        if len(candidates) < vocabulary:
            return gumbel_noise(key, candidates)
        if self._noise is None or self._noise[0] != position:
            self._noise = position, gumbel_noise(key, candidates)
        return self._noise[1]


def second_choice(scores: torch.Tensor, first: int) -> int | None:
    """Return the place of the largest of `scores` [n] beside the place `first`. None: all others are -inf."""
    others = scores.clone()
    others[first] = -torch.inf
    second = int(others.argmax())
    return second if float(others[second]) > -torch.inf else None


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """The logits in float32, with NaN replaced by -inf (an impossible token), and +inf by the largest finite number."""
    return logits.float().nan_to_num(nan=-torch.inf, posinf=LARGEST, neginf=-torch.inf)


def filter_scores(scores: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """Apply temperature, top-k, top-p and min-p, in transformers' order.

    Dropped tokens get the score -inf. At least one token is kept.
    """
    if parameters.temperature != 1:
        scores = (scores / parameters.temperature).clamp_(max=LARGEST)
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


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return the log probability of every token, from logits [..., vocabulary], in float32. They are finite for any logits."""
    return _finite(logits).log_softmax(dim=-1).nan_to_num(nan=-LARGEST, neginf=-LARGEST)


def most_probable(logprobs: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    """Return the `count` most probable tokens and their log probabilities, from `logprobs` [vocabulary].

    The most probable comes first; among equals, the smallest id. If the vocabulary is smaller than `count`: all of it.
    """
    count = min(count, len(logprobs))
    least = torch.topk(logprobs, count).values[-1]
    tokens = (logprobs >= least).nonzero()[:, 0]  # topk alone may choose any of several equals
    values, order = logprobs[tokens].sort(descending=True, stable=True)
    return tokens[order[:count]].tolist(), values[:count].tolist()


def warm_up(logits: torch.Tensor) -> None:
    """Sample once with every parameter, from logits [vocabulary], so that the first request does not wait for initialization."""
    parameters = SamplingParameters(
        0.9, 50, 0.9, 0.01, 1.1, presence_penalty=0.1, frequency_penalty=0.1, biased_tokens=(1,), biases=(0.5,),
        bad_words=((2,), (0, 1)), min_tokens=9, stop_tokens=(1,), seed=1,
    )  # fmt: skip
    session = Session(0, 1, "warm-up", parameters)
    session.write(0, [0, 1, 0])
    sampler = Sampler(session)
    sampler.choose_two(logits, 3)
    for guess in ((), (1,)):
        sampler.choose(logits, 3 + len(guess), guess)
    most_probable(log_probabilities(logits), 1)
    session.truncate(1)
    sampler.choose(logits, 1)


def gumbel_noise(key: int, tokens: torch.Tensor) -> torch.Tensor:
    """Return the noise of dsi_protocol.gumbel, bit for bit, for many tokens of one stream: int64 [n] -> float64 [n]."""
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
    """SplitMix64's output function. int64 arithmetic overflows to the same bits as unsigned arithmetic."""
    number = number ^ _shift_right(number, 30)
    number = number * _signed(0xBF58476D1CE4E5B9)
    number = number ^ _shift_right(number, 27)
    number = number * _signed(0x94D049BB133111EB)
    return number ^ _shift_right(number, 31)


def _shift_right(number: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift. The operator >> of a signed tensor is an arithmetic shift."""
    return (number >> by) & ((1 << (64 - by)) - 1)


def _leading_zeros(bits: torch.Tensor) -> torch.Tensor:
    """The number of leading zero bits of 64-bit patterns, none of which may be zero."""
    high, low = _shift_right(bits, 32), bits & 0xFFFFFFFF
    return torch.where(high > 0, 31 - _floor_log2(high.clamp(min=1)), 63 - _floor_log2(low.clamp(min=1)))


def _floor_log2(number: torch.Tensor) -> torch.Tensor:
    """floor(log2(number)) for positive integers below 2^53: the exponent of the equal double."""
    return torch.frexp(number.double()).exponent.long() - 1


def _half_log(fraction: torch.Tensor) -> torch.Tensor:
    """Interpolate in dsi_protocol.gumbel's table of logarithms."""
    table = _table_on(fraction.device)
    cell, within = fraction >> 32, fraction & 0xFFFFFFFF
    upper = table[cell]
    return upper - ((upper - table[cell + 1]) * within >> 32)


@functools.cache
def _table_on(device: torch.device) -> torch.Tensor:
    return torch.tensor(half_log_table(), device=device)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
