"""The bodies of answers, in the shapes that clients read: what each endpoint writes, and OpenAI's two older ones."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from dsi_actors.serving.completions import Choice, Completion, Update
from dsi_actors.serving.errors import ApiError
from dsi_actors.serving.parts import Message
from dsi_actors.text import Part, Piece, TokenText

#: A server-sent event: its name, if it has one, and its data.
Event: TypeAlias = tuple[str | None, dict[str, Any]]


class Bodies(Protocol):
    """What is sent for one request."""

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The answer, not streamed."""

    def begin(self, completion: Completion) -> Iterable[Event]: ...

    def update(self, update: Update) -> Iterable[Event]: ...

    def end(self, completion: Completion) -> Iterable[Event]: ...

    def error(self, error: ApiError) -> Event:
        """What ends a stream whose answer fails."""

    @property
    def last_line(self) -> str | None:
        """The data of the event that ends every stream."""


class ItemBodies(ABC):
    """Makes the items of an answer (text, reasoning, calls) from its parts, one after another. A subclass says what an item and
    its events look like. An answer that is not streamed is made in the same way, and its events are dropped."""

    last_line = None

    def __init__(self) -> None:
        #: The kind of the last item's parts; "" if that item is complete, or if there is none.
        self._open = ""
        #: The text of the last item so far, in pieces.
        self._texts: list[str] = []

    def update(self, update: Update) -> list[Event]:
        return [event for part in (update.piece.parts if update.piece else ()) for event in self._part(part)]

    def _make_all(self, completion: Completion) -> None:
        """Make all items of an answer that is not streamed."""
        [choice] = completion.choices
        for piece in choice.pieces:
            for part in piece.parts:
                deque(self._part(part), maxlen=0)
        deque(self._close(), maxlen=0)

    def _part(self, part: Part) -> Iterator[Event]:
        if part.kind == "call" or (self._open != part.kind and part.kind != "arguments"):
            yield from self._close()
            self._open, self._texts = "arguments" if part.kind == "call" else part.kind, []
            yield from self._begin_item(part)
        if part.kind != "call":
            self._texts.append(part.text)
            yield self._delta(part)

    def _close(self) -> Iterator[Event]:
        """Complete the last item, if it is not complete yet."""
        if self._open:
            yield from self._end_item("".join(self._texts))
            self._open = ""

    @abstractmethod
    def _begin_item(self, part: Part) -> Iterator[Event]:
        """Add an item that begins with this part."""

    @abstractmethod
    def _delta(self, part: Part) -> Event:
        """Return the event for more text of the last item."""

    @abstractmethod
    def _end_item(self, text: str) -> Iterator[Event]:
        """Complete the last item. `text` is all of its text."""


@dataclass(slots=True)
class _OpenAiBodies:
    model: str
    logprobs: bool
    #: The stream tells the tokens that were used.
    usage: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def last_line(self) -> str | None:
        return "[DONE]"

    def begin(self, completion: Completion) -> Iterable[Event]:
        return ()

    def end(self, completion: Completion) -> Iterable[Event]:
        if self.usage:
            yield None, {**self._head(chunk=True), "choices": [], **_accounting(completion)}

    def error(self, error: ApiError) -> Event:
        return None, error.body

    def whole(self, completion: Completion) -> dict[str, Any]:
        choices = [self._choice(choice) for choice in completion.choices]
        return {**self._head(chunk=False), "choices": choices, **_accounting(completion)}

    def update(self, update: Update) -> Iterable[Event]:
        choice, piece = update.choice, update.piece
        logprobs = None if piece is None else self._logprobs(piece.tokens)
        head = {
            "index": choice.index,
            "finish_reason": choice.finish_reason if piece is None else None,
            "logprobs": logprobs,
        }
        yield None, self._chunk({**head, **self._news(piece)})

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(chunk=True), "choices": [choice]}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        tokens = [token for piece in choice.pieces for token in piece.tokens]
        head = {"index": choice.index, "finish_reason": choice.finish_reason, "logprobs": self._logprobs(tokens)}
        return {**head, **self._answer(choice)}

    # What differs

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _news(self, piece: Piece | None) -> dict[str, Any]:
        raise NotImplementedError

    def _answer(self, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        raise NotImplementedError


class ChatBodies(_OpenAiBodies):
    """/v1/chat/completions."""

    def begin(self, completion: Completion) -> Iterable[Event]:
        for choice in completion.choices:
            delta = {"role": "assistant", "content": ""}
            yield None, self._chunk({"index": choice.index, "delta": delta, "finish_reason": None})

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": f"chatcmpl-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _news(self, piece: Piece | None) -> dict[str, Any]:
        return {"delta": {} if piece is None else _delta(piece.parts)}

    def _answer(self, choice: Choice) -> dict[str, Any]:
        return {"message": _message(choice.message)}

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {**_told(token.own, token.logprob), "top_logprobs": [_told(own, logprob) for _, own, logprob in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionBodies(_OpenAiBodies):
    """/v1/completions."""

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        return {"id": f"cmpl-{self.id}", "object": "text_completion", "created": self.created, "model": self.model}

    def _news(self, piece: Piece | None) -> dict[str, Any]:
        return {"text": "" if piece is None else piece.text}

    def _answer(self, choice: Choice) -> dict[str, Any]:
        prompt = {"prompt_logprobs": [_by_id(token) for token in choice.prompt]} if choice.prompt else {}
        return {"text": choice.text, **prompt}

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {
            "tokens": [_readable(token.own, lead="bytes:") for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_by_text(token) for token in tokens] if any(token.top for token in tokens) else None,
            "text_offset": [token.offset for token in tokens],
        }


def _told(own: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _readable(own), "logprob": logprob, "bytes": list(own)}


def _by_text(token: TokenText) -> dict[str, float | None] | None:
    """The most probable tokens and the one that is there. Of several with one text, the most probable counts. None: nothing is
    known of the first token of a prompt."""
    if token.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for _, own, logprob in (*token.top, (token.token_id, token.own, token.logprob)):
        found.setdefault(_readable(own, lead="bytes:"), logprob)
    return found


def _by_id(token: TokenText) -> dict[str, dict[str, Any]] | None:
    """The same by token ids, as vLLM tells it of prompts. A rank that is not known is None."""
    if token.logprob is None:
        return None
    ranked = [(*other, rank) for rank, other in enumerate(token.top, start=1)]
    found = dict[str, dict[str, Any]]()
    for number, own, logprob, rank in (*ranked, (token.token_id, token.own, token.logprob, None)):
        found.setdefault(str(number), {"logprob": logprob, "rank": rank, "decoded_token": _readable(own)})
    return found


def _message(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
    if message.reasoning:
        made["reasoning_content"] = message.reasoning
    if message.calls:
        made["content"] = message.content or None
        made["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    return made


def _delta(parts: Sequence[Part]) -> dict[str, Any]:
    """What is new in a message."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        match part.kind:
            case "content":
                delta["content"] = delta.get("content", "") + part.text
            case "reasoning":
                delta["reasoning_content"] = delta.get("reasoning_content", "") + part.text
            case "call":
                function = {"name": part.text, "arguments": ""}
                calls[part.place] = {"index": part.place, "id": part.id, "type": "function", "function": function}
            case "arguments":
                call = calls.setdefault(part.place, {"index": part.place, "function": {"arguments": ""}})
                call["function"]["arguments"] += part.text
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta


def _accounting(completion: Completion) -> dict[str, Any]:
    prompt = sum(map(len, completion.job.prompts))
    generated = sum(choice.tokens for choice in completion.choices)
    usage = {
        "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": completion.cached_tokens},
    }  # fmt: skip
    return {"usage": usage, "dsi": costs(completion)}


def _readable(own: bytes, *, lead: str = "") -> str:
    """The text of a token. One that is a part of a character is spelled as OpenAI does: \\xe2\\x82, after `lead`."""
    try:
        return own.decode()
    except UnicodeDecodeError:
        return lead + "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in own)


def costs(completion: Completion) -> list[dict[str, Any]]:
    """The extension: what each choice took, and the seed that gives it again. What was computed behind a stop string, until
    the cancel took effect, is a part of what it took."""
    return [_cost(choice) for choice in completion.choices]


def _cost(choice: Choice) -> dict[str, Any]:
    report = choice.report
    if report is None:
        return {"seed": choice.seed}
    tokens = max(1, choice.tokens)
    return {
        "seed": choice.seed,
        "algorithm": report.algorithm,
        "sp": report.sp,
        "drafter": report.drafter,
        "lookahead": report.lookahead,
        "acceptance_rate": report.acceptance_rate,
        "alternatives": report.alternatives,
        "target_forwards": report.target_forwards,
        "wasted_target_forwards": report.wasted_target_forwards,
        "target_busy_ms_per_token": report.target_busy_ms / tokens,
        "drafter_busy_ms_per_token": report.drafter_busy_ms / tokens,
        "ms_per_token": report.ms_per_token,
        "first_token_ms": report.first_token_ms,
    }
