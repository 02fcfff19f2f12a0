"""A drafter for a drafter: tokens that a model checks in the forward in which it computes its next one.

How many are worth it is measured: what a wider forward costs, and how often such guesses were right of late. Where they were
nearly always right, as while an answer copies, they are drafts without the model's look at them: it would say the same, and
the processors and the memory that it leaves alone are the target's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsi_workers.drafting.suffix_index import LENGTHS, Texts
from dsi_workers.session import Session

_MOST = 7
#: Guesses that are right so often are copied, if there are so many at once. The model may fall behind by so many tokens, which it
#: then reads in one forward.
SURE = 0.95
_FEWEST, _MOST_BEHIND = 4, 48
#: Copies of one generation that may still turn out to be wrong.
_OPEN = 16
#: Before anything was checked, and after nothing was for long: this often right, as if so many had been.
_PRIOR, _PRIOR_WEIGHT = 0.6, 4.0
#: Of what is known, with each token that was checked, and each time that none was worth it: what counts are the last few hundred.
_FORGOTTEN = 0.005


class _Record:
    """How often guesses after a match of one length were right."""

    def __init__(self) -> None:
        self.right, self.checked = _PRIOR * _PRIOR_WEIGHT, _PRIOR_WEIGHT

    @property
    def rate(self) -> float:
        return self.right / self.checked

    def count(self, right: float, checked: float) -> None:
        self.right = max(0.0, self.right + right)
        self.checked = max(self.right, _PRIOR_WEIGHT / 2, self.checked + checked)

    def forget(self, tokens: int = 1) -> None:
        share = 1 - (1 - _FORGOTTEN) ** tokens
        self.right += (_PRIOR * _PRIOR_WEIGHT - self.right) * share
        self.checked += (_PRIOR_WEIGHT - self.checked) * share


@dataclass(frozen=True, slots=True)
class _Copy:
    """Tokens that were drafted as they were found."""

    position: int
    tokens: Sequence[int]
    record: _Record


class Lookup:
    """`costs_us`: of a forward of so many rows. With `remember` texts of earlier generations serve, too."""

    def __init__(self, costs_us: Mapping[int, float], *, remember: bool, sure: float = SURE) -> None:
        self._costs_us = costs_us
        self._sure = sure
        self._texts = Texts(remember=remember)
        self._records = {length: _Record() for length in LENGTHS}
        #: Of a generation: how long the match was that its last guess came from; what was right of it, and where that stands.
        self._matches: dict[int, int] = {}
        self._right: dict[int, tuple[int, Sequence[int]]] = {}
        self._copies: dict[int, deque[_Copy]] = {}

    def guess(self, session: Session, most: int) -> list[int]:
        """Tokens that may follow the session's, at most so many."""
        found, match = self._texts.find(session, min(most, _MOST))
        if match:
            del found[self._worth(self._records[match]) :]
            self._matches[session.generation] = match
            if not found:
                self._records[match].forget()
        return found

    def checked(self, session: Session, guess: Sequence[int], *, right: int) -> None:
        """The first `right` tokens of the guess were the model's own; at most one more was looked at."""
        record = self._records[self._matches[session.generation]]
        looked_at = min(right + 1, len(guess))
        record.forget(looked_at)
        record.count(right, looked_at)
        self._right[session.generation] = session.computed, guess[:right]

    def copy(self, session: Session, most: int) -> list[int]:
        """Tokens that may follow the session's as surely as the model would have it, at most so many."""
        copies = self._copies.setdefault(session.generation, deque(maxlen=_OPEN))
        self._correct(session, copies)
        found, match = self._texts.find(session, _MOST)
        length, enough = len(session.tokens), len(found) >= _FEWEST
        del found[most:]
        if not enough or length + len(found) - session.computed > _MOST_BEHIND:
            return []
        record = self._records[match]
        if record.rate < self._sure:
            return []
        record.forget(len(found))
        record.count(len(found), len(found))  # until something else stands there
        copies.append(_Copy(length, found, record))
        return found

    @staticmethod
    def _correct(session: Session, copies: deque[_Copy]) -> None:
        """Take back what was counted as right and has turned out to be wrong, or was dropped with what was before it."""
        changed = len(session.tokens) + 1
        for copy in list(copies):
            stands = session.tokens[copy.position : min(copy.position + len(copy.tokens), changed)]
            same = next((at for at, token in enumerate(stands) if token != copy.tokens[at]), len(stands))
            if copy.position < changed and same == len(stands):
                continue  # it is right so far
            copies.remove(copy)
            wrong = same < len(stands)
            copy.record.count(same - len(copy.tokens), same + wrong - len(copy.tokens))
            changed = min(changed, copy.position + same)

    def recognize(self, session: Session) -> None:
        """What was right of the last guess is computed beyond the session's tokens: it counts once they say the same."""
        position, right = self._right.pop(session.generation, (0, ()))
        if position != session.computed:
            return  # something before it changed
        for token in right:
            if session.tokens[session.computed : session.computed + 1] != [token]:
                return
            session.computed += 1

    def forget(self, session: Session) -> None:
        self._correct(session, self._copies.pop(session.generation, deque()))
        self._texts.forget(session)
        self._matches.pop(session.generation, None)
        self._right.pop(session.generation, None)

    def _worth(self, record: _Record) -> int:
        """The number of guesses that gives most tokens in a time."""
        rate = record.rate
        best, best_per_us = 0, 1.0 / self._cost_us(1)
        expected, chance = 1.0, 1.0
        for guesses in range(1, _MOST + 1):
            chance *= rate
            expected += chance
            if (per_us := expected / self._cost_us(guesses + 1)) > best_per_us:
                best, best_per_us = guesses, per_us
        return best

    def _cost_us(self, rows: int) -> float:
        """On a straight line between those that were measured."""
        below = max(width for width in self._costs_us if width <= rows)
        above = min((width for width in self._costs_us if width >= rows), default=below)
        low_us, high_us = self._costs_us[below], self._costs_us[above]
        return low_us if above == below else low_us + (high_us - low_us) * (rows - below) / (above - below)
