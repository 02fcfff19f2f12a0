"""Which tokens a grammar allows after a text: a mask for each row, from the committed and the guessed tokens before it.

The library llguidance follows the grammar: it needs no compilation before the first token, can roll back, and bounds the work for
a token. It is imported when the first generation with a grammar comes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dsi_workers.engine import RequestError
from dsi_workers.session import Session

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


def grammar_checksum() -> int:
    """A checksum of the library's version, which decides the tokens that a grammar allows. 0 if it is not installed."""
    try:
        return zlib.crc32(version("llguidance").encode())
    except PackageNotFoundError:
        return 0


class Grammars:
    """Makes a mask for each generation with a grammar. `tokenizer`: the model's tokenizer.json; None: the engine has no text."""

    def __init__(self, tokenizer: Path | None = None) -> None:
        self._file = tokenizer
        self._tokenizer: LLTokenizer | None = None

    def mask_of(self, session: Session) -> GrammarMask | None:
        """None for a generation without a grammar. Raises RequestError."""
        if not session.sampling.grammar:
            return None
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            raise RequestError(
                "structured output needs llguidance: pip install 'dsi-actors[structure]' where the worker runs"
            ) from None
        if self._file is None or not self._file.is_file():
            raise RequestError("structured output needs a model with a tokenizer.json")
        if self._tokenizer is None:
            try:
                self._tokenizer = LLTokenizer(self._file.read_text(encoding="utf-8"))
            except Exception as error:
                raise RequestError(f"structured output is not possible with this model's tokenizer: {error}") from None
        matcher = LLMatcher(self._tokenizer, session.sampling.grammar, log_level=0)
        return GrammarMask(matcher, session, self._tokenizer.eos_tokens)


class GrammarMask:
    """Follows the answer of one session. The cost of a row depends on how much the text changed since the row before."""

    def __init__(self, matcher: LLMatcher, session: Session, ends: Sequence[int]) -> None:
        self._matcher = matcher
        self._session = session
        self._stops = sorted(set(session.sampling.stop_tokens))
        #: No text follows these.
        self._ends = {*ends, *self._stops}
        self._check()
        #: The matcher has read the session's tokens at [prompt_length, read_to), as they were at this revision.
        self._read_to = session.prompt_length
        self._revision = session.revision

    def apply(self, scores: torch.Tensor, position: int, guess: Sequence[int], end: int) -> torch.Tensor:
        """Return the scores [vocabulary] with -inf for tokens that the grammar does not allow at `position`.

        The text is the session's tokens before position `end`, and then `guess`. Scores after a text that the grammar does not
        allow are unchanged: such a text is a wrong guess. At least one allowed token keeps a score above -inf. Raises
        RequestError where the grammar is too complex to be followed.
        """
        begin = self._session.prompt_length
        if position < begin or not self._move_to(min(position, end)):
            return scores
        guessed = guess[max(0, begin - end) : max(0, position - end)]
        read = self._read(guessed)
        allowed = self._allowed(len(scores)).to(scores.device) if read == len(guessed) else None
        if read:
            self._matcher.rollback(read)
        self._check()
        if allowed is None:
            return scores
        left = scores.masked_fill(~allowed, -torch.inf)
        if bool((left > -torch.inf).any()):
            return left
        return torch.where(allowed, 0.0, -torch.inf)  # the model is broken: it gives no allowed token a probability

    def _move_to(self, position: int) -> bool:
        """Read the session's tokens before `position`, and no others. Returns False if the grammar does not allow them."""
        session = self._session
        keep = max(session.prompt_length, min(self._read_to, position, session.unchanged_since(self._revision)))
        if keep < self._read_to:
            self._matcher.rollback(self._read_to - keep)
            self._read_to = keep
        self._revision = session.revision
        wanted = session.tokens[self._read_to : position]
        read = self._read(wanted)
        self._read_to += read
        return read == len(wanted)

    def _read(self, tokens: Sequence[int]) -> int:
        """Read these tokens up to the first that is not allowed. Returns how many were read."""
        until = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
        return self._matcher.try_consume_tokens(list(tokens[:until])) if until else 0

    def _allowed(self, words: int) -> torch.Tensor:
        """True for each of `words` tokens that may come next."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[:words].astype(np.bool_)
        allowed = torch.zeros(words, dtype=torch.bool)
        allowed[: len(bits)] = torch.from_numpy(bits)
        allowed[[token for token in self._ends if token < words]] = False
        if self._matcher.is_accepting() or not bool(allowed.any()):
            allowed[[token for token in self._stops if token < words]] = True
        return allowed

    def _check(self) -> None:
        """Raises RequestError if the library cannot go on. It says so instead of raising an exception."""
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())[:300]
            raise RequestError(f"the grammar of the structured output cannot be followed: {reason}")
