"""What /v1/responses answers: items of output, and the events of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from dsi_actors.serving.bodies import Event, ItemBodies, costs
from dsi_actors.serving.completions import Completion
from dsi_actors.serving.errors import ApiError
from dsi_actors.serving.responses import ResponsesRequest
from dsi_actors.text import Part

#: The kind of an item, and the name of its events, by the kind of a part.
_KINDS = {"content": "output_text", "reasoning": "reasoning_text", "arguments": "function_call_arguments"}


class ResponseBodies(ItemBodies):
    """The bodies of one answer. Each item is an item of `output`."""

    def __init__(self, asked: ResponsesRequest, number: str) -> None:
        super().__init__()
        self._asked = asked
        self._number = number
        self._created = int(time.time())
        self._events = 0
        self._items: list[dict[str, Any]] = []

    def whole(self, completion: Completion) -> dict[str, Any]:
        self._make_all(completion)
        return self._response(completion)

    def begin(self, completion: Completion) -> Iterator[Event]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response(None))

    def end(self, completion: Completion) -> Iterator[Event]:
        yield from self._close()
        response = self._response(completion)
        yield self._event(f"response.{response['status']}", response=response)

    def error(self, error: ApiError) -> Event:
        told = error.body["error"]
        return self._event("error", code=told["code"], message=told["message"], param=told["param"])

    # Items

    def _delta(self, part: Part) -> Event:
        more: dict[str, Any] = {"logprobs": []} if part.kind == "content" else {}
        return self._event(f"response.{_KINDS[part.kind]}.delta", **self._place(), delta=part.text, **more)

    def _begin_item(self, part: Part) -> Iterator[Event]:
        number = f"{self._number}{len(self._items)}"
        item: dict[str, Any]
        if part.kind == "call":
            item = {
                "id": f"fc_{number}",
                "type": "function_call",
                "call_id": part.id,
                "name": part.text,
                "arguments": "",
            }
        elif part.kind == "reasoning":
            item = {"id": f"rs_{number}", "type": "reasoning", "summary": [], "content": []}
        else:
            item = {"id": f"msg_{number}", "type": "message", "role": "assistant", "content": []}
        item["status"] = "in_progress"
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(item))
        if part.kind != "call":
            yield self._event("response.content_part.added", **self._place(), part=self._content(""))

    def _end_item(self, text: str) -> Iterator[Event]:
        item = self._items[-1]
        name = f"response.{_KINDS[self._open]}.done"
        if self._open == "arguments":
            item["arguments"] = text
            yield self._event(name, **self._place(), arguments=text, name=item["name"])
        else:
            item["content"] = [self._content(text)]
            more: dict[str, Any] = {"logprobs": []} if self._open == "content" else {}
            yield self._event(name, **self._place(), text=text, **more)
            yield self._event("response.content_part.done", **self._place(), part=self._content(text))
        item["status"] = "completed"
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=dict(item))

    def _content(self, text: str) -> dict[str, Any]:
        if self._open == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _place(self) -> dict[str, Any]:
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return place if self._open == "arguments" else {**place, "content_index": 0}

    # The whole

    def _event(self, kind: str, **fields: Any) -> Event:
        self._events += 1
        return kind, {"type": kind, "sequence_number": self._events - 1, **fields}

    def _response(self, completion: Completion | None) -> dict[str, Any]:
        """As it is now: complete if there is a completion."""
        asked = self._asked
        made: dict[str, Any] = {
            "id": f"resp_{self._number}", "object": "response", "created_at": self._created, "status": "in_progress",
            "model": asked.model, "output": list(self._items), "error": None, "incomplete_details": None,
            "instructions": asked.instructions, "max_output_tokens": asked.max_output_tokens,
            "parallel_tool_calls": asked.parallel_tool_calls, "previous_response_id": None, "store": False,
            "reasoning": {"effort": asked.reasoning.effort, "summary": None}, "temperature": asked.temperature,
            "top_p": asked.top_p, "text": {"format": asked.text.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [{**tool.model_dump(exclude={"defer_loading"})} for tool in asked.tools],
            "truncation": "disabled", "metadata": asked.metadata or {}, "usage": None, "user": asked.user,
        }  # fmt: skip
        if completion is None:
            return made
        [choice] = completion.choices
        cut = choice.finish_reason == "length"
        prompt = sum(map(len, completion.job.prompts))
        made["usage"] = {
            "input_tokens": prompt, "input_tokens_details": {"cached_tokens": completion.cached_tokens},
            "output_tokens": choice.tokens,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + choice.tokens,
        }  # fmt: skip
        made |= {"status": "incomplete" if cut else "completed", "dsi": costs(completion)}
        if cut:
            made["incomplete_details"] = {"reason": "max_output_tokens"}
            if self._items:
                self._items[-1]["status"] = "incomplete"
        return made
