"""Error responses in the form of OpenAI's API."""

from __future__ import annotations

from llava_core.types import JsonDict

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""Error types by HTTP status; other 4xx are `invalid_request_error`, 5xx `server_error`."""


class ApiError(Exception):
    """An error response with this HTTP status."""

    def __init__(self, status: int, message: object, *, param: str | None = None, code: str | None = None):
        super().__init__(str(message))
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> JsonDict:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
