"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from dsi_actors.errors import ConfigError, DsiError, NoTargetError, OrchestratorClosed, TooManyGenerations

_RETRY_AFTER_S = 1


class ApiError(Exception):
    """To be told to the client."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def from_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    words = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{where}: {words}" if where else words, param=where or None)


def from_ours(error: DsiError) -> ApiError:
    match error:
        case TooManyGenerations():
            return ApiError(
                429,
                str(error),
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(_RETRY_AFTER_S)},
            )
        case ConfigError():
            code = "context_length_exceeded" if "limit" in str(error) else None
            return ApiError(400, str(error), code=code)
        case NoTargetError() | OrchestratorClosed():
            headers = {"Retry-After": str(_RETRY_AFTER_S)}
            return ApiError(503, str(error), kind="server_error", code="unavailable", headers=headers)
    return ApiError(500, str(error), kind="server_error")
