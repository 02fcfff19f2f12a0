"""Prompt lookup for a drafter: its model needs fewer forward passes where the text repeats earlier text.

A guess is a sequence of tokens that followed the same tokens earlier (suffix_index.py). The drafter's model checks a guess in
the forward pass in which it computes its next token. The best number of guessed tokens follows from two measurements: what a
wider forward pass costs, and how often recent guesses were right.

Where guesses are nearly always right, as while an answer quotes its prompt, they are copied: they become drafts without a
check by the model. The model would say the same, and the target can use the processors and the memory meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsi_workers.drafting.suffix_index import SUFFIX_LENGTHS, Texts
from dsi_workers.session import Session

#: The most tokens of a guess.
_MOST_GUESSED_TOKENS = 7
#: Guesses are copied if at least this share of them is right.
COPY_RATE = 0.95
#: The fewest tokens worth copying.
_FEWEST_COPIED = 4
#: The most tokens by which the model may fall behind the text while guesses are copied. It then reads them in one forward pass.
_MOST_BEHIND = 48
#: The most copied drafts of one generation that are remembered, because they may still turn out to be wrong.
_MOST_UNCONFIRMED = 16
#: The share of right guesses that is assumed without evidence, and how many checked tokens this assumption counts for.
_PRIOR_RATE, _PRIOR_WEIGHT = 0.6, 4.0
#: The share of the evidence that is forgotten with each checked token, and each time that guessing did not pay. So only the last
#: few hundred tokens count.
_DECAY = 0.005


class _Record:
    """How often guesses after a match of one length were right: a decaying count of tokens."""

    def __init__(self) -> None:
        self.right, self.checked = _PRIOR_RATE * _PRIOR_WEIGHT, _PRIOR_WEIGHT

    @property
    def rate(self) -> float:
        return self.right / self.checked

    def count(self, right: float, checked: float) -> None:
        """Add tokens that were right, and tokens that were checked. Negative numbers take earlier counts back."""
        self.right = max(0.0, self.right + right)
        self.checked = max(self.right, _PRIOR_WEIGHT / 2, self.checked + checked)

    def decay(self, tokens: int = 1) -> None:
        """Move the counts towards the prior, as far as `tokens` checked tokens do."""
        share = 1 - (1 - _DECAY) ** tokens
        self.right += (_PRIOR_RATE * _PRIOR_WEIGHT - self.right) * share
        self.checked += (_PRIOR_WEIGHT - self.checked) * share


@dataclass(frozen=True, slots=True)
class _CopiedDraft:
    """A guess that became a draft without a check, and the position of its first token."""

    position: int
    tokens: Sequence[int]
    record: _Record


class Lookup:
    """Guesses the next tokens of generations by prompt lookup, and learns how often its guesses are right.

    `costs_us`: microseconds of the model's forward pass, by number of rows. `remember`: also look in the texts of other
    generations, including ended ones. `copy_rate`: the share of right guesses from which on guesses are copied.
    """

    def __init__(self, costs_us: Mapping[int, float], *, remember: bool, copy_rate: float = COPY_RATE) -> None:
        self._costs_us = costs_us
        self._copy_rate = copy_rate
        self._texts = Texts(remember=remember)
        self._records = {length: _Record() for length in SUFFIX_LENGTHS}
        #: By generation: the length of the match that its last guess came from.
        self._matches: dict[int, int] = {}
        #: By generation: the tokens of its last guess that were right, and the position of the first.
        self._right: dict[int, tuple[int, Sequence[int]]] = {}
        self._copies: dict[int, deque[_CopiedDraft]] = {}

    def guess(self, session: Session, most: int) -> list[int]:
        """Return up to `most` tokens that may follow the session's. The model must check them: call `checked` then."""
        found, match = self._texts.find(session, min(most, _MOST_GUESSED_TOKENS))
        if match:
            del found[self._best_guess_length(self._records[match]) :]
            self._matches[session.generation] = match
            if not found:
                self._records[match].decay()
        return found

    def checked(self, session: Session, guess: Sequence[int], *, right: int) -> None:
        """Learn that the first `right` tokens of the guess are the model's own tokens. The next one, if any, is not."""
        record = self._records[self._matches[session.generation]]
        looked_at = min(right + 1, len(guess))
        record.decay(looked_at)
        record.count(right, looked_at)
        self._right[session.generation] = session.computed, guess[:right]

    def copy(self, session: Session, most: int) -> list[int]:
        """Return up to `most` tokens to draft without a check by the model. [] where guesses are not right often enough."""
        copies = self._copies.setdefault(session.generation, deque(maxlen=_MOST_UNCONFIRMED))
        self._revise_counts(session, copies)
        found, match = self._texts.find(session, _MOST_GUESSED_TOKENS)
        length, enough = len(session.tokens), len(found) >= _FEWEST_COPIED
        del found[most:]
        if not enough or length + len(found) - session.computed > _MOST_BEHIND:
            return []
        record = self._records[match]
        if record.rate < self._copy_rate:
            return []
        record.decay(len(found))
        record.count(len(found), len(found))  # counted as right; _revise_counts takes this back for wrong tokens
        copies.append(_CopiedDraft(length, found, record))
        return found

    @staticmethod
    def _revise_counts(session: Session, copies: deque[_CopiedDraft]) -> None:
        """Correct the counts for copied tokens that were wrong, or that were dropped because an earlier token was wrong."""
        changed = len(session.tokens) + 1
        for copy in list(copies):
            stands = session.tokens[copy.position : min(copy.position + len(copy.tokens), changed)]
            same = next((at for at, token in enumerate(stands) if token != copy.tokens[at]), len(stands))
            if copy.position < changed and same == len(stands):
                continue  # no token of this copy has changed
            copies.remove(copy)
            wrong = same < len(stands)
            copy.record.count(same - len(copy.tokens), same + wrong - len(copy.tokens))
            changed = min(changed, copy.position + same)

    def recognize(self, session: Session) -> None:
        """Advance `session.computed` over tokens that the model computed as a guess and that are now part of the session."""
        position, right = self._right.pop(session.generation, (0, ()))
        if position != session.computed:
            return  # the text before the guess has changed
        for token in right:
            if session.tokens[session.computed : session.computed + 1] != [token]:
                return
            session.computed += 1

    def forget(self, session: Session) -> None:
        """Drop the state of a closed generation."""
        self._revise_counts(session, self._copies.pop(session.generation, deque()))
        self._texts.forget(session)
        self._matches.pop(session.generation, None)
        self._right.pop(session.generation, None)

    def _best_guess_length(self, record: _Record) -> int:
        """The number of guessed tokens for which a forward pass gives the most expected tokens per microsecond. May be 0."""
        rate = record.rate
        best, best_per_us = 0, 1.0 / self._cost_us(1)
        expected, chance = 1.0, 1.0
        for guesses in range(1, _MOST_GUESSED_TOKENS + 1):
            chance *= rate
            expected += chance
            if (per_us := expected / self._cost_us(guesses + 1)) > best_per_us:
                best, best_per_us = guesses, per_us
        return best

    def _cost_us(self, rows: int) -> float:
        """Microseconds of a forward pass with this many rows, interpolated linearly between measurements."""
        below = max(width for width in self._costs_us if width <= rows)
        above = min((width for width in self._costs_us if width >= rows), default=below)
        low_us, high_us = self._costs_us[below], self._costs_us[above]
        return low_us if above == below else low_us + (high_us - low_us) * (rows - below) / (above - below)
