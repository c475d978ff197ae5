"""What a request may ask for, and the errors of the HTTP API in OpenAI's form. Both are checked before anything is
decoded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bytes of a request and of one image, its pixels, and what one request may ask for. waiting: images in the queue;
    batch: images in one batch; side: longest side of a generated image; kept: longest side at which a reference is
    read; seconds: to send a request."""

    body: int = 32_000_000
    image: int = 16_000_000
    pixels: int = 16_000_000
    prompt: int = 2000
    steps: int = 100
    n: int = 16
    references: int = 8
    side: int = 1536
    kept: int = 1024
    waiting: int = 64
    batch: int = 16
    seconds: float = 30.0


class Refusal(Exception):
    """An error of the API: an HTTP status, and OpenAI's code, parameter and message. retry: seconds to wait."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry = status, code, param, retry

    @property
    def body(self) -> dict[str, object]:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error", 500: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry is None else {"Retry-After": str(self.retry)}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> Refusal:
    """A value that the API does not take."""
    return Refusal(400, code, message, param=param)
