"""The endpoints that answer with text: what each reads, and in what shape it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsi_actors.serving.anthropic import CountRequest, MessagesRequest
from dsi_actors.serving.anthropic_bodies import MessageBodies, error_body
from dsi_actors.serving.bodies import Bodies, ChatBodies, CompletionBodies
from dsi_actors.serving.errors import ApiError
from dsi_actors.serving.fields import Strict
from dsi_actors.serving.response_bodies import ResponseBodies
from dsi_actors.serving.responses import ResponsesRequest
from dsi_actors.serving.schemas import AnyRequest, ChatRequest, CompletionRequest


@dataclass(frozen=True, slots=True)
class Door:
    """One endpoint."""

    #: What clients send.
    kind: type[Strict]
    #: The same as a request of OpenAI's older endpoints.
    as_request: Callable[[Any], AnyRequest]
    #: What is sent for a request, given its id: 24 characters. None: the answer is
    #: the number of tokens of the prompt, and nothing is generated.
    bodies: Callable[[Any, str], Bodies] | None
    #: A request may have several prompts.
    takes_batches: bool = False
    error_body: Callable[[ApiError], dict[str, Any]] = lambda error: error.body


def _older(kind: type[ChatRequest | CompletionRequest], bodies: type[ChatBodies | CompletionBodies]) -> Door:
    def made(asked: ChatRequest | CompletionRequest, number: str) -> Bodies:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return bodies(asked.model, asked.wants_logprobs, usage, number)

    return Door(kind, lambda asked: asked, made, takes_batches=kind is CompletionRequest)


DOORS: Mapping[str, Door] = {
    "/v1/chat/completions": _older(ChatRequest, ChatBodies),
    "/v1/completions": _older(CompletionRequest, CompletionBodies),
    "/v1/responses": Door(ResponsesRequest, ResponsesRequest.as_chat, ResponseBodies),
    "/v1/messages": Door(MessagesRequest, MessagesRequest.as_chat, MessageBodies, error_body=error_body),
    "/v1/messages/count_tokens": Door(CountRequest, CountRequest.as_chat, None, error_body=error_body),
}
