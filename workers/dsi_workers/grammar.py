"""Which tokens a grammar allows after a text: a mask for each row, from the committed and the guessed tokens before it.

The library llguidance follows the grammar: it needs no compilation before the first token, can roll back, and bounds the work for
a token. A thread makes the masks of a forward's rows while the forward runs: the library releases the interpreter's lock.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from dsi_workers.engine import RequestError
from dsi_workers.session import Session

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MISSING = "structured output needs llguidance: pip install 'dsi-actors[structure]' where the worker runs"

#: [vocabulary]: True for each token that may not come next.
_Forbidden = NDArray[np.bool_]
#: How many tokens of the session's answer a text has, and the tokens that follow these.
_Key = tuple[int, tuple[int, ...]]


def grammar_checksum() -> int:
    """A checksum of the library's version, which decides the tokens that a grammar allows. 0 if it is not installed."""
    try:
        return zlib.crc32(version("llguidance").encode())
    except PackageNotFoundError:
        return 0


@dataclass(frozen=True, slots=True)
class Row:
    """A text whose next token is asked for. The text is the session's tokens before position `end`, and then `guess`, as far as
    they stand before `position`."""

    position: int
    guess: Sequence[int]
    end: int


class Grammars:
    """Makes a mask for each generation with a grammar. `tokenizer`: the model's tokenizer.json; None: the engine has no text.

    The library's form of the tokenizer is made here, when a model is loaded: for 49,152 tokens that takes about 0.4 s.
    """

    def __init__(self, tokenizer: Path | None = None) -> None:
        self._tokenizer: LLTokenizer | None = None
        #: Why there can be no structured output. "": there can.
        self._problem = ""
        self._thread = ThreadPoolExecutor(1, "masks")
        if tokenizer is None or not tokenizer.is_file():
            self._problem = "structured output needs a model with a tokenizer.json"
            return
        try:
            from llguidance import LLTokenizer

            self._tokenizer = LLTokenizer(tokenizer.read_text(encoding="utf-8"))
        except ImportError:
            self._problem = _MISSING
        except Exception as error:
            self._problem = f"structured output is not possible with this model's tokenizer: {error}"

    def mask_of(self, session: Session) -> GrammarMask | None:
        """None for a generation without a grammar. Raises RequestError."""
        if not session.sampling.grammar:
            return None
        if self._tokenizer is None:
            raise RequestError(self._problem)
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, session.sampling.grammar, log_level=0)
        stops = session.sampling.stop_tokens
        return GrammarMask(session, _Follower(matcher, stops, self._tokenizer.eos_tokens), self._thread)


class GrammarMask:
    """The masks of one session. All calls come from one thread. They cost no more for a longer text."""

    def __init__(self, session: Session, follower: _Follower, thread: ThreadPoolExecutor) -> None:
        self._session = session
        self._follower = follower
        self._thread = thread
        #: The follower has been told the session's tokens at [prompt_length, told_to), as they were at this revision.
        self._told_to = session.prompt_length
        self._revision = session.revision
        #: Being made by the thread, for the text as it was at this revision, and for logits of so many tokens.
        self._pending: Future[dict[_Key, _Forbidden | None]] | None = None
        self._pending_revision = 0
        self._words = 0

    def prepare(self, rows: Sequence[Row], words: int) -> None:
        """Begin to make the masks of these rows, for logits of `words` tokens. Returns at once."""
        keys = self._keys(rows)
        if keys:
            self._pending = self._thread.submit(self._follower.masks, self._news(), keys, words)
            self._pending_revision, self._words = self._revision, words

    def apply(self, scores: torch.Tensor, position: int, guess: Sequence[int], end: int) -> torch.Tensor:
        """Return the scores [vocabulary] with -inf for tokens that the grammar does not allow at `position`. `scores` may be
        changed.

        The text is the session's tokens before position `end`, and then `guess`. Scores after a text that the grammar does not
        allow are unchanged: such a text is a wrong guess. At least one allowed token keeps a score above -inf. Raises
        RequestError where the grammar is too complex to be followed.
        """
        keys = self._keys([Row(position, guess, end)])
        if not keys:
            return scores
        masks = self._made()
        if self._session.revision != self._pending_revision or self._words != len(scores) or keys[0] not in masks:
            masks = self._follower.masks(self._news(), keys, len(scores))
        forbidden = masks[keys[0]]
        return scores if forbidden is None else _masked(scores, forbidden)

    def forced(self, most: int) -> list[int]:
        """At most `most` tokens that must follow the session's tokens, since the grammar allows no other text. Raises
        RequestError."""
        if len(self._session.tokens) < self._session.prompt_length:
            return []
        self._made()
        return self._follower.forced(self._news(), self._words)[:most]

    def allowed(self, tokens: Sequence[int]) -> Sequence[int]:
        """The first of `tokens`, as far as they may follow the session's tokens. Raises RequestError."""
        if len(self._session.tokens) < self._session.prompt_length:
            return tokens
        self._made()
        return tokens[: self._follower.count_allowed(self._news(), tokens)]

    def _made(self) -> dict[_Key, _Forbidden | None]:
        """Wait for the thread. From then on the follower may be used here."""
        return self._pending.result() if self._pending is not None else {}

    def _keys(self, rows: Sequence[Row]) -> list[_Key]:
        begin, length = self._session.prompt_length, len(self._session.tokens)
        found = []
        for row in rows:
            end = min(row.end, length)
            if row.position >= begin:
                guess = row.guess[max(0, begin - end) : max(0, row.position - end)]
                found.append((max(0, min(row.position, end) - begin), tuple(guess)))
        return found

    def _news(self) -> tuple[int, list[int]]:
        """How many tokens of the answer are as the follower knows them, and those after them."""
        session = self._session
        keep = max(session.prompt_length, min(self._told_to, session.unchanged_since(self._revision)))
        self._told_to, self._revision = max(session.prompt_length, len(session.tokens)), session.revision
        return keep - session.prompt_length, session.tokens[keep:]


class _Follower:
    """Follows one answer with one matcher, which is moved forth and back. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, stops: Sequence[int], ends: Sequence[int]) -> None:
        self._matcher = matcher
        self._stops = sorted(set(stops))
        #: No text follows these.
        self._ends = sorted({*ends, *stops})
        self._text: list[int] = []
        #: The matcher has read so many tokens of the text, and then these.
        self._read = 0
        self._beside: list[int] = []
        #: The masks of the last call, for logits of so many tokens.
        self._masks: dict[_Key, _Forbidden | None] = {}
        self._words = 0
        self._check()

    def masks(self, news: tuple[int, list[int]], keys: Sequence[_Key], words: int) -> dict[_Key, _Forbidden | None]:
        """The mask of each text, for logits of `words` tokens. None after a text that the grammar does not allow.

        `news`: after so many tokens the answer goes on with these. Raises RequestError.
        """
        self._learn(news)
        known = self._masks if words == self._words else {}
        self._words, self._masks = words, {}
        for key in keys:
            self._masks[key] = known[key] if key in known else self._mask(key, words)
        return self._masks

    def forced(self, news: tuple[int, list[int]], words: int) -> list[int]:
        """Tokens that must follow the answer. Raises RequestError."""
        self._learn(news)
        key = (len(self._text), ())
        if not self._move_to(*key):
            return []
        forced = self._matcher.compute_ff_tokens()
        self._check()
        if forced or not words:
            return forced
        forbidden = self.masks((len(self._text), []), [key], words)[key]
        if forbidden is None or np.count_nonzero(forbidden) != words - 1:
            return []
        return [int(forbidden.argmin())]

    def count_allowed(self, news: tuple[int, list[int]], tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first on, may follow the answer. Raises RequestError."""
        self._learn(news)
        if not self._move_to(len(self._text), ()):
            return len(tokens)
        count = self._matcher.validate_tokens(list(self._before_an_end(tokens))) if tokens else 0
        self._check()
        if tokens[count : count + 1] and tokens[count] in self._stops and count == len(self._before_an_end(tokens)):
            self._move_to(len(self._text), tokens[:count])
            count += self._matcher.is_accepting()
        return count

    def _learn(self, news: tuple[int, list[int]]) -> None:
        keep, tokens = news
        if keep < len(self._text):
            self._masks = {}
            if keep < self._read:
                self._go_back(len(self._beside) + self._read - keep)
                self._read, self._beside = keep, []
        self._text[keep:] = tokens

    def _mask(self, key: _Key, words: int) -> _Forbidden | None:
        return self._forbidden(words) if self._move_to(*key) else None

    def _move_to(self, place: int, guess: Sequence[int]) -> bool:
        """Have the matcher read the first `place` tokens of the text and then `guess`, and nothing else. Returns False if the
        grammar does not allow them."""
        same = 0
        if place == self._read:
            while same < min(len(guess), len(self._beside)) and guess[same] == self._beside[same]:
                same += 1
        self._go_back(len(self._beside) - same)
        del self._beside[same:]
        if place < self._read:
            self._go_back(self._read - place)
            self._read = place
        elif place > self._read:
            self._read += self._go_on(self._text[self._read : place])
        if place == self._read and len(guess) > same:
            self._beside += guess[same : same + self._go_on(guess[same:])]
        self._check()
        return self._read == place and len(self._beside) == len(guess)

    def _go_back(self, count: int) -> None:
        if count:
            self._matcher.rollback(count)

    def _go_on(self, tokens: Sequence[int]) -> int:
        """Read these tokens up to the first that is not allowed. Returns how many were read."""
        tokens = self._before_an_end(tokens)
        return self._matcher.try_consume_tokens(list(tokens)) if tokens else 0

    def _before_an_end(self, tokens: Sequence[int]) -> Sequence[int]:
        return tokens[: next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))]

    def _forbidden(self, words: int) -> _Forbidden:
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, count=min(words, 8 * len(packed)), bitorder="little")
        self._check()
        forbidden = np.ones(words, dtype=np.bool_)
        forbidden[: len(bits)] = bits == 0
        forbidden[[token for token in self._ends if token < words]] = True
        if self._matcher.is_accepting() or forbidden.all():
            forbidden[[token for token in self._stops if token < words]] = False
        return forbidden

    def _check(self) -> None:
        """Raises RequestError if the library cannot go on. It says so instead of raising an exception."""
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())[:300]
            raise RequestError(f"the grammar of the structured output cannot be followed: {reason}")


def _masked(scores: torch.Tensor, forbidden: _Forbidden) -> torch.Tensor:
    """The scores with -inf where `forbidden`. If nothing would be left, the model is broken: all allowed tokens get 0."""
    if scores.device.type == "cpu":
        # One thread is faster than a team of threads for so few numbers, and on busy processors a team waits for its last thread.
        array = scores.numpy()
        np.copyto(array, -np.inf, where=forbidden)
        if array.max() == -np.inf:
            np.copyto(array, 0.0, where=~forbidden)
        return scores
    on_device = torch.from_numpy(forbidden).to(scores.device)
    left = scores.masked_fill(on_device, -torch.inf)
    return left if bool((left > -torch.inf).any()) else torch.where(on_device, -torch.inf, 0.0)
