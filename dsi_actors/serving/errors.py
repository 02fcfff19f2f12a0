"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import ValidationError

from dsi_actors.errors import ConfigError, DsiError, NoTargetError, OrchestratorClosed, TooManyGenerations

_RETRY_AFTER_S = 1
#: A message may quote what the client sent. No more than so many characters of it go back.
_MOST_CHARACTERS = 1000


class ApiError(Exception):
    """An error that the client is told. The text is cut and made encodable, since it may quote the request."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        message = _quotable(message)
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})
        param = None if param is None else _quotable(param)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def encoded(self) -> bytes:
        return json.dumps(self.body, ensure_ascii=False, separators=(",", ":")).encode()


class ClientGone(Exception):
    """The client has closed its connection: nobody is left to be told anything."""


def unavailable(message: str, *, close: bool = False) -> ApiError:
    """503: the same request may succeed soon, here or elsewhere. `close` ends the connection, too."""
    headers = {"Retry-After": str(_RETRY_AFTER_S), **({"Connection": "close"} if close else {})}
    return ApiError(503, message, kind="server_error", code="unavailable", headers=headers)


def context_length_exceeded(prompt: int, answer: int, most: int, *, chat: bool) -> ApiError:
    """Prompt and answer have more tokens than fit. The sentence is OpenAI's: clients look for its words."""
    place = "messages" if chat else "prompt"
    return ApiError(
        400, f"This model's maximum context length is {most} tokens. However, you requested {prompt + answer} tokens ({prompt} "
        f"in the {place}, {answer} in the completion). Please reduce the length of the {place} or completion.",
        param=place, code="context_length_exceeded",
    )  # fmt: skip


#: What is wrong with a value, by pydantic's name for it.
_WORDS = {
    "missing": "is missing", "int_type": "must be a whole number", "int_from_float": "must be a whole number",
    "float_type": "must be a number", "bool_type": "must be true or false", "string_type": "must be a text",
    "list_type": "must be a list", "dict_type": "must be an object", "model_type": "must be an object",
    "literal_error": "must be {expected}", "greater_than_equal": "must be at least {ge}", "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}", "too_short": "must have at least {min_length} of them, not {actual_length}",
    "too_long": "must have at most {max_length} of them", "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must be a name of letters, digits, dots, hyphens and underscores",
}  # fmt: skip


def from_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ""
    for part in first["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else part
    form = _WORDS.get(first["type"])
    words = str(first["msg"]).removeprefix("Value error, ") if form is None else form.format(**first.get("ctx", {}))
    if not where:  # what is wrong with several fields together begins with a field's name
        name = words.partition(":")[0]
        return ApiError(400, words, param=name if name.isidentifier() else None)
    return ApiError(400, f"{where}: {words}", param=where)


def from_ours(error: DsiError) -> ApiError:
    match error:
        case TooManyGenerations():
            headers = {"Retry-After": str(_RETRY_AFTER_S)}
            return ApiError(429, str(error), kind="rate_limit_error", code="queue_full", headers=headers)
        case ConfigError():
            return ApiError(400, str(error))
        case NoTargetError() | OrchestratorClosed():
            return unavailable(str(error))
    return ApiError(500, str(error), kind="server_error")


def from_any(error: Exception) -> ApiError:
    """What the client is told of `error`. A bug of ours is told without its details: they are in the log."""
    match error:
        case ApiError():
            return error
        case DsiError():
            return from_ours(error)
        case ValidationError():
            return from_validation(error)
    return ApiError(500, "the service failed on this request: its log says how", kind="server_error", code="internal")


def _quotable(text: str) -> str:
    """Short enough, and free of lone surrogates, which UTF-8 cannot encode."""
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]} ..."
    return text.encode("utf-8", "backslashreplace").decode()
