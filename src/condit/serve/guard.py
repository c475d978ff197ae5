"""Who may ask, and what an answer carries: token, Host, Origin, size and time of a body, security headers."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from condit.serve.limits import Limits, Refusal
from condit.serve.metrics import Metrics

log = logging.getLogger(__name__)

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
METHODS = {"GET", "HEAD", "POST"}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Rules:
    """token: of every path that is not in `public`; None: no token. hosts: names that the Host header may have besides
    addresses, which no foreign page can point at this server."""

    token: str | None
    hosts: Collection[str]
    public: Collection[str]


class Guard:
    """The outermost layer of the server. Paths are compared as they arrive, so that no spelling of a path leads around
    the token: what is not exactly a public path needs it."""

    def __init__(self, app: ASGIApp, rules: Rules, limits: Limits, metrics: Metrics) -> None:
        self.app, self.rules, self.limits, self.metrics = app, rules, limits, metrics
        self.held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        begun, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        body = b""
        try:
            self.check(scope)
            body = await self.body(scope, receive) if scope["method"] == "POST" else b""
            self.held += len(body)
            await self.app(scope, replayed(body, receive), answer)
        except Refusal as refusal:
            self.metrics.refused(refusal.code)
            await refuse(refusal, answer)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            self.metrics.refused("internal_error")
            if not status:
                await refuse(Refusal(500, "internal_error", "The server failed. Its log says why."), answer)
        finally:
            self.held -= len(body)
        self.metrics.requests.labels(str(status or 499)).inc()
        record = {"method": scope["method"], "path": scope["path"], "status": status or 499}
        record["seconds"] = round(time.perf_counter() - begun, 4)
        log.info("%s", json.dumps(record))

    def check(self, scope: Scope) -> None:
        """Raises Refusal for a request that may not come in."""
        headers, path = Headers(scope=scope), scope["path"]
        if len(headers.getlist("host")) != 1 or not self.known_host(headers["host"]):
            raise Refusal(421, "unknown_host", "The Host header names another server. Start it with --allow-host NAME.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers["host"]:
            raise Refusal(403, "foreign_origin", "Pages of other origins may not use this server.")
        raw = scope.get("raw_path") or path.encode()
        if path not in self.rules.public or raw.partition(b"?")[0] != path.encode():
            self.check_token(headers)
        if scope["method"] not in METHODS:
            raise Refusal(405, "method_not_allowed", "Only GET, HEAD and POST are allowed.")
        if scope["method"] == "POST":
            self.check_type(headers)

    def known_host(self, header: str) -> bool:
        name = header.rpartition(":")[0] if header.rpartition(":")[2].isdecimal() else header
        name = name.strip("[]").lower()
        if name in self.rules.hosts or name in LOOPBACK:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.rules.token is not None

    def check_token(self, headers: Headers) -> None:
        if self.rules.token is None:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.rules.token.encode())
        if kind.lower() != "bearer" or not same:
            raise Refusal(401, "invalid_api_key", "Send the server's token: Authorization: Bearer TOKEN.")

    def check_type(self, headers: Headers) -> None:
        """JSON, or multipart with a header that no foreign form can send."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        own = "authorization" in headers or "x-condit" in headers
        if kind == "multipart/form-data" and not own:
            raise Refusal(403, "missing_header", "multipart needs the header X-Condit: 1, or Authorization.")
        if kind not in ("application/json", "multipart/form-data"):
            raise Refusal(415, "unsupported_type", "The body must be application/json or multipart/form-data.")

    async def body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises Refusal for one that is too large or too slow."""
        headers, most = Headers(scope=scope), self.limits.body
        too_large = Refusal(413, "body_too_large", f"The body is larger than {most / 1e6:g} MB.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise too_large
        if self.held > 8 * most:
            raise Refusal(503, "busy", "The server holds too many requests. Try again.", retry=2)
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self.limits.seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "disconnected", "The client has left.")
                    parts.append(message.get("body", b""))
                    more = message.get("more_body", False)
                    if sum(map(len, parts)) > most:
                        raise too_large
        except TimeoutError:
            raise Refusal(408, "too_slow", f"The body took over {self.limits.seconds:g} s.") from None
        return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body first, then what comes: the client's leaving."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def refuse(refusal: Refusal, send: Send) -> None:
    """Answers with an error in OpenAI's form."""
    body = json.dumps(refusal.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refusal.headers}
    if refusal.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
