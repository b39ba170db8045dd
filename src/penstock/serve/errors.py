"""Errors in the shape that OpenAI's clients know: message, type, param and code."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 409: "conflict_error", 413: "invalid_request_error",
    415: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "unavailable_error",
}  # fmt: skip
CODES = {
    400: "invalid_value", 401: "invalid_api_key", 403: "invalid_csrf_token", 404: "not_found",
    405: "method_not_allowed", 408: "timeout", 409: "conflict", 413: "request_too_large",
    415: "unsupported_media_type", 429: "rate_limit_exceeded", 500: "internal_error", 503: "unavailable",
}  # fmt: skip
RETRY_SECONDS = 1
"""The retry-after of 429 and 503: about the time of a small model's answer."""


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = Field(description="The key that is at fault, as in messages[0].role.")
    code: str


class ErrorAnswer(BaseModel):
    """The shape of every answer that is not a success."""

    error: ErrorBody


class ApiError(Exception):
    """An answer that is not a success. Example: ApiError(404, "no model x", code="model_not_found")."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_SECONDS))

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        error_type = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        code = self.code or CODES.get(self.status, str(self.status))
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": code}}

    @property
    def encoded(self) -> bytes:
        """As ASCII bytes, so that a message may repeat a name with half a character in it."""
        return json.dumps(self.body).encode()


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These failures, for the OpenAPI document."""
    return {status: {"model": ErrorAnswer, "description": CODES[status].replace("_", " ")} for status in statuses}
