"""Errors in the shape that OpenAI's clients know: message, type, param and code."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

KINDS = {  # status: (type, the code where the error names none)
    400: ("invalid_request_error", "invalid_value"),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "invalid_csrf_token"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "timeout"),
    409: ("conflict_error", "conflict"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    503: ("unavailable_error", "unavailable"),
}
Headers = Mapping[str, str] | None
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
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Headers = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_SECONDS))

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        unlisted = "invalid_request_error" if self.status < 500 else "server_error", str(self.status)
        error_type, code = KINDS.get(self.status, unlisted)
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code or code}}

    @property
    def encoded(self) -> bytes:
        """As ASCII bytes, so that a message may repeat a name with half a character in it."""
        return json.dumps(self.body).encode()


def busy_database(error: Exception) -> ApiError:
    """The answer where the database is locked by another program, or cannot be reached."""
    reason = " ".join(str(getattr(error, "orig", error)).split())
    return ApiError(503, f"the database does not answer ({reason}); try again in a moment.", code="database_busy")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These failures, for the OpenAPI document."""
    return {status: {"model": ErrorAnswer, "description": KINDS[status][1].replace("_", " ")} for status in statuses}
