"""What /v1/messages answers: blocks of content, the events of a stream, and errors as Anthropic's clients know them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dsi_actors.serving.anthropic import MessagesRequest
from dsi_actors.serving.bodies import Event, ItemBodies, costs
from dsi_actors.serving.completions import Choice, Completion
from dsi_actors.serving.errors import ApiError
from dsi_actors.text import Part

#: For each kind of part: the type of its deltas, and the field of a delta (and of a finished block) that has the text.
_DELTAS = {
    "content": ("text_delta", "text"), "reasoning": ("thinking_delta", "thinking"),
    "arguments": ("input_json_delta", "partial_json"),
}  # fmt: skip
#: stop_reason for each finish_reason of the chat endpoint.
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
#: The type of an error for each HTTP status. All others are invalid_request_error.
_ERRORS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
}  # fmt: skip


class MessageBodies(ItemBodies):
    """The bodies of one answer. Each item is a block of content."""

    def __init__(self, asked: MessagesRequest, number: str) -> None:
        super().__init__()
        self._asked = asked
        self._number = number
        self._blocks: list[dict[str, Any]] = []

    def whole(self, completion: Completion) -> dict[str, Any]:
        self._make_all(completion)
        [choice] = completion.choices
        return {**self._message(completion), **_end(choice), "usage": _usage(completion), "dsi": costs(completion)}

    def begin(self, completion: Completion) -> Iterator[Event]:
        yield _event("message_start", message={**self._message(completion), "usage": _usage(completion)})

    def end(self, completion: Completion) -> Iterator[Event]:
        yield from self._close()
        [choice] = completion.choices
        yield _event("message_delta", delta=_end(choice), usage=_usage(completion), dsi=costs(completion))
        yield _event("message_stop")

    def error(self, error: ApiError) -> Event:
        return "error", error_body(error)

    def _message(self, completion: Completion) -> dict[str, Any]:
        return {
            "id": f"msg_{self._number}", "type": "message", "role": "assistant", "model": self._asked.model,
            "content": list(self._blocks), "stop_reason": None, "stop_sequence": None,
        }  # fmt: skip

    # Blocks

    def _delta(self, part: Part) -> Event:
        kind, field = _DELTAS[part.kind]
        return _event("content_block_delta", index=len(self._blocks) - 1, delta={"type": kind, field: part.text})

    def _begin_item(self, part: Part) -> Iterator[Event]:
        block: dict[str, Any]
        if part.kind == "call":
            block = {"type": "tool_use", "id": part.id, "name": part.text, "input": {}}
        elif part.kind == "reasoning":
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            block = {"type": "text", "text": ""}
        self._blocks.append(block)
        yield _event("content_block_start", index=len(self._blocks) - 1, content_block=dict(block))

    def _end_item(self, text: str) -> Iterator[Event]:
        if self._open == "arguments":
            self._blocks[-1]["input"] = _input(text)
        else:
            self._blocks[-1][_DELTAS[self._open][1]] = text
        yield _event("content_block_stop", index=len(self._blocks) - 1)


def error_body(error: ApiError) -> dict[str, Any]:
    """Return the error in Anthropic's shape."""
    kind = _ERRORS.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.body["error"]["message"]}}


def _event(kind: str, **fields: Any) -> Event:
    return kind, {"type": kind, **fields}


def _end(choice: Choice) -> dict[str, Any]:
    reason = "stop_sequence" if choice.stopped_by is not None else _STOP_REASONS[choice.finish_reason or "stop"]
    return {"stop_reason": reason, "stop_sequence": choice.stopped_by}


def _input(text: str) -> dict[str, Any]:
    """Return the arguments of a call as an object. A model may write broken JSON, and max_tokens may cut it: then the object has
    the text."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"_unparsed": text}


def _usage(completion: Completion) -> dict[str, int]:
    """Return the counts of tokens. `input_tokens` leaves out those from the cache, as Anthropic does. How many these are is known
    only at the end of the answer; before, it is 0."""
    prompt, cached = sum(map(len, completion.job.prompts)), completion.cached_tokens
    return {
        "input_tokens": prompt - cached, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached,
        "output_tokens": sum(choice.tokens for choice in completion.choices),
    }  # fmt: skip
