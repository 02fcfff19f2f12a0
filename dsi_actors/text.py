"""From committed tokens to the text that a reader sees: whole characters, and nothing from a stop string on."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from dsi_actors.results import CommittedTokens, TextScores
from dsi_actors.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token of an answer."""

    token_id: int
    #: What the token itself adds to the text: it may end, or begin, inside a character. Nothing for special tokens.
    own: bytes
    #: How many characters of text come before it, from the beginning of the answer.
    offset: int
    #: If asked for.
    logprob: float | None
    #: The most probable tokens in its place, if asked for: each with the bytes that it would add to the text, and its log
    #: probability.
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a message. Of a call, `text` is the function's name, and its arguments follow in parts of their own."""

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    #: Of a call and its arguments: which one it is, from 0.
    place: int = 0
    #: Of a call.
    id: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is settled, and the tokens that came with it."""

    text: str
    tokens: tuple[TokenText, ...] = ()
    #: What the text is to a message, if somebody reads it as one.
    parts: tuple[Part, ...] = ()


class TextAssembler:
    """Feed it committed tokens. Text that may be the beginning of a stop string is held back until that is decided.

    The answer ends with the first token that completes a stop string: no token after it is given, however the tokens come
    in blocks. The text ends before that stop string, and before the one that begins first if a token completes several.
    Names of special tokens, which are not shown, can be stop strings and parts of them.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], *, after: Sequence[int] = (), min_tokens: int = 0,
        shown: Collection[str] = (), offset: int = 0,
    ) -> None:  # fmt: skip
        """`after`: the tokens whose text the answer continues, if it does not stand alone. `min_tokens`: in the text of so many
        tokens, stop strings are not looked for. `shown`: names of special tokens that are a part of the text. `offset`:
        characters that the client gets before this text."""
        self._shown = {number: name for number, name in tokenizer.special_tokens.items() if name in shown}
        self._unread = min_tokens
        self._stream = tokenizer.stream(after=after)
        self._names = tokenizer.special_tokens
        self._stops = [_Stop(text) for text in stop]
        #: These are looked for among the names of special tokens, too.
        self._stops_with_names = [_Stop(text) for text in stop if tokenizer.names_special_token(text)]
        #: Characters of the answer so far. The last ones are held back.
        self._length = offset
        self._held = ""
        #: The stop string that ended the answer. None: no stop string was complete so far.
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def add(self, tokens: CommittedTokens) -> Piece:
        """What can be shown now. Tokens that belong to text held back are given at once: they are settled."""
        seen: list[TokenText] = []
        for index, token in enumerate(tokens):
            tops = tokens.top_logprobs[index] if tokens.top_logprobs else ()
            top = tuple((other, self._stream.spell(other), logprob) for other, logprob in tops)
            offset, text = self._length, self._stream.add(token) + self._shown.get(token, "")
            own = tokens.logprobs[index] if tokens.logprobs else None
            seen.append(TokenText(token, self._stream.own, offset, own, top))
            end = self._read(text, "" if token in self._shown else self._names.get(token, ""))
            self._unread -= 1
            if end is not None:
                return Piece(self._show_until(end), tuple(seen))
        held = [stop.begun_at for stop in (*self._stops, *self._stops_with_names) if stop.begun_at is not None]
        return Piece(self._show_until(min(held, default=self._length)), tuple(seen))

    def rest(self) -> Piece:
        """What was held back, now that nothing follows. Nothing after a stop string."""
        if self.stopped:
            return Piece("")
        end = self._read(self._stream.flush(), "")
        return Piece(self._show_until(self._length if end is None else end))

    def _read(self, text: str, name: str) -> int | None:
        """Where the answer ends, if a stop string is complete now."""
        if self._unread > 0:
            self._held += text
            self._length += len(text)
            return None
        begins = [(stop.read(text, self._length), stop.text) for stop in self._stops]
        begins += [
            (stop.read(name or text, self._length, shown=not name), stop.text) for stop in self._stops_with_names
        ]
        self._held += text
        self._length += len(text)
        complete = [(begin, stop) for begin, stop in begins if begin is not None]
        if not complete:
            return None
        end, self.stopped_by = min(complete)
        return end

    def _show_until(self, end: int) -> str:
        keep = self._length - end
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


def prompt_piece(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], scores: TextScores | None, *, alternatives: int, ends: bool
) -> Piece:
    """A prompt as a part of the answer. `alternatives`: of the most probable tokens in each place, how many are listed.

    `ends`: nothing follows, so that a character that is incomplete at its end is shown as U+FFFD.
    """
    assembler, told = TextAssembler(tokenizer, ()), scores or TextScores()
    top_logprobs = tuple(tops[:alternatives] for tops in told.top_logprobs)
    first = assembler.add(CommittedTokens(prompt_ids[:1], (False,)))
    others = CommittedTokens(prompt_ids[1:], (False,) * (len(prompt_ids) - 1), told.logprobs, (), top_logprobs)
    later = assembler.add(others)
    text = first.text + later.text + (assembler.rest().text if ends else "")
    return Piece(text, first.tokens + later.tokens)


class _Stop:
    """Looks for one stop string, character by character (Knuth, Morris and Pratt): the time depends on the text alone."""

    def __init__(self, text: str) -> None:
        self.text = text
        #: How much of the stop string the text so far ends with. For each such length that was reached: the next shorter
        #: length that it ends with, too.
        self._matched = 0
        self._shorter = [0]
        #: Where the last characters are in the answer.
        self._places: deque[int] = deque(maxlen=len(text))

    @property
    def begun_at(self) -> int | None:
        """Where the text so far may have begun to be the stop string."""
        return self._places[-self._matched] if self._matched else None

    def read(self, text: str, place: int, *, shown: bool = True) -> int | None:
        """`text` stands at `place` of the answer, or, if it is not shown, before what stands there. Returns where the
        stop string begins once it is complete."""
        for character in text:
            self._places.append(place)
            place += shown
            self._matched = self._next(self._matched, character)
            if self._matched == len(self.text):
                return self._places[0]
            if self._matched > len(self._shorter):  # a length that was never reached before
                self._shorter.append(self._next(self._shorter[-1], character))
        return None

    def _next(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == character)
