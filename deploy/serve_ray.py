"""The studio's page and HTTP API on a Ray cluster: replicas that draw, behind one door.

    pip install 'condit[serve,ray]'
    cd deploy
    serve run serve_ray:build                                        # http://127.0.0.1:8000, the embedded model
    serve run serve_ray:build model=sd15 gpus=1 max_replicas=8       # one GPU for each replica

A replica is `condit serve` without its socket: one model, one queue, and one thread that batches requests which fit
each other. Ray starts more replicas when requests wait, and replaces those that die. The door takes requests and gives
them to a replica that has room. Where Ray's proxy would answer 503, because no replica has room or none is there yet,
the door answers 429 with Retry-After, which clients such as OpenAI's wait for. Set CONDIT_TOKEN before other machines
can reach the address: then clients send it as their API key.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message

from condit.serve.limits import Limits, Refusal

RETRY = 2  # seconds
Headers = list[tuple[bytes, bytes]]


class Settings(BaseModel):
    """model, device: as of `condit serve`. threads: of a replica. cpus, gpus: what a replica takes of its node.
    ongoing: requests in one replica, which batches them. queue: requests that may wait at the door for a replica."""

    model_config = ConfigDict(extra="forbid")
    model: str = "tiny"
    device: str | None = None
    threads: int = 1
    cpus: float = 0.5
    gpus: float = 0
    min_replicas: int = 1
    max_replicas: int = 4
    ongoing: int = 16
    queue: int = 64
    hosts: list[str] = []


@dataclass(frozen=True)
class Call:
    """An HTTP request as a value, with its whole body."""

    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: Headers
    body: bytes


async def answer(app: ASGIApp, call: Call) -> AsyncIterator[tuple[int, Headers] | bytes]:
    """An application's answer to a call: status and headers, then the parts of the body. The application sees the
    client leave when the iterator is closed."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    given, left = False, asyncio.Event()

    async def receive() -> Message:
        nonlocal given
        if given:
            await left.wait()
            return {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": call.body, "more_body": False}

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": ""}
    scope |= {"method": call.method, "path": call.path, "raw_path": call.raw_path, "query_string": call.query}
    scope |= {"headers": call.headers, "client": None, "server": None}
    task = asyncio.ensure_future(app(scope, receive, send))
    task.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                yield message["status"], list(message["headers"])
            elif message.get("body"):
                yield message["body"]
        await task
    finally:
        left.set()
        await asyncio.wait([task], timeout=5)


class Drawer:
    """A replica: the model, its queue and the API."""

    def __init__(self, settings: Settings) -> None:
        from condit.jobs.work import set_threads
        from condit.serve.app import Server, guarded, make_app
        from condit.serve.models import Served

        set_threads(settings.threads)  # Ray sets one
        limits = Limits()
        server = Server([Served(settings.model, limits, settings.device)], limits)
        self.engine = server.engine
        self.engine.start()
        self.app = guarded(make_app(server), server, os.environ.get("CONDIT_TOKEN") or None, settings.hosts)

    async def __call__(self, call: Call) -> AsyncIterator[tuple[int, Headers] | bytes]:
        async for part in answer(self.app, call):
            yield part

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if not self.engine.thread.is_alive():
            raise RuntimeError("the engine's thread has ended")

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.stop()


class Parts(Protocol):
    """What a replica sends."""

    def __aiter__(self) -> AsyncIterator[tuple[int, Headers] | bytes]: ...

    def cancel(self) -> None: ...


class Drawers(Protocol):
    """The handle of the replicas."""

    def remote(self, call: Call, /) -> Parts: ...


class Handle(Drawers, Protocol):
    """As Ray gives it: for one answer a call, unless it is asked for a stream."""

    def options(self, *, stream: bool) -> Drawers: ...


class Door:
    """Takes HTTP requests and passes them on. busy: errors that say that no replica takes the call now."""

    def __init__(self, drawers: Drawers, busy: Sequence[type[Exception]]) -> None:
        self.drawers, self.busy, self.limits = drawers, tuple(busy), Limits()

    async def __call__(self, request: Request) -> Response:
        try:
            return await self.passed_on(request)
        except Refusal as refusal:
            return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)

    async def passed_on(self, request: Request) -> Response:
        """A replica's answer. Raises Refusal."""
        scope, body = request.scope, bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.limits.body:
                raise Refusal(413, "body_too_large", f"The body is larger than {self.limits.body / 1e6:g} MB.")
        raw = scope.get("raw_path") or request.url.path.encode()
        headers = [(name, value) for name, value in scope["headers"]]
        call = Call(request.method, request.url.path, raw, scope.get("query_string", b""), headers, bytes(body))
        busy = Refusal(429, "busy", "All replicas are busy, or are being started. Try again.", retry=RETRY)
        try:
            parts = self.drawers.remote(call)
            stream = aiter(parts)
            first = await anext(stream)
        except self.busy as error:
            raise busy from error
        assert isinstance(first, tuple)
        status, headers = first
        if status == 503 and request.method == "POST":
            parts.cancel()
            raise busy
        return passed(status, headers, stream, parts)


def passed(status: int, headers: Headers, stream: AsyncIterator, parts: Parts) -> StreamingResponse:
    """The rest of an answer. The replica stops when the client leaves."""

    async def rest() -> AsyncIterator[bytes]:
        try:
            async for part in stream:
                yield part
        finally:
            parts.cancel()

    response = StreamingResponse(rest(), status)
    response.raw_headers = headers
    return response


def build(settings: Settings):
    """The application for `serve run` and for `serve.run(build(Settings(...)))`."""
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    scaling = {
        "min_replicas": settings.min_replicas,
        "max_replicas": settings.max_replicas,
        "target_ongoing_requests": max(1, settings.ongoing // 2),
    }
    drawers = serve.deployment(
        Drawer,
        autoscaling_config=scaling,
        max_ongoing_requests=settings.ongoing,
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=120,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    ).bind(settings)
    door = serve.deployment(Opened, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
    return door.bind(drawers, (BackPressureError, DeploymentUnavailableError, RayActorError))


class Opened(Door):
    """The door of the replicas whose handle Ray gives it."""

    def __init__(self, drawers: Handle, busy: Sequence[type[Exception]]) -> None:
        super().__init__(drawers.options(stream=True), busy)

    async def __call__(self, request: Request) -> Response:  # Ray looks for it in the class itself
        return await super().__call__(request)
