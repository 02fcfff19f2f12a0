"""From committed tokens to the text that a client sees: whole characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsi_actors.results import CommittedTokens
from dsi_actors.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is settled, and the tokens that came with it."""

    text: str
    tokens: tuple[TokenText, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token: its id, the text that it completed (often all of its own), and its log probability if asked for."""

    token_id: int
    text: str
    logprob: float | None


class TextAssembler:
    """Feed it committed tokens. Text that may be the beginning of a stop string is held back until that is decided."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._stream = tokenizer.stream()
        self._stop = tuple(stop)
        self._held = ""
        #: A stop string was found: nothing that follows it is given.
        self.stopped = False

    def add(self, tokens: CommittedTokens) -> Piece:
        """What can be shown now. Tokens that belong to text held back are given at once: they are settled."""
        shown = ""
        seen: list[TokenText] = []
        for index, token in enumerate(tokens):
            text = self._stream.add(token)
            seen.append(TokenText(token, text, tokens.logprobs[index] if tokens.logprobs else None))
            self._held += text
            end = self._found()
            if end is not None:
                self.stopped = True
                shown, self._held = self._held[:end], ""
                break
        if not self.stopped:
            keep = self._may_begin_a_stop()
            shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return Piece(shown, tuple(seen))

    def rest(self) -> Piece:
        """What was held back, now that nothing follows."""
        rest, self._held = self._held, ""
        return Piece(rest)

    def _found(self) -> int | None:
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        return min(places, default=None)

    def _may_begin_a_stop(self) -> int:
        """The length of the longest end of the text with which a stop string begins."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
