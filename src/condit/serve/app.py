"""The HTTP API: OpenAI's images API with references, the page, health and figures."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import condit
from condit.data.images import load_image, read_recipe
from condit.serve.engine import Done, Engine, Event, Progress, QueuedJob
from condit.serve.forms import (
    AnnotateForm,
    CommonForm,
    EditForm,
    GenerationForm,
    ReplayForm,
    body_of,
    check_limits,
    on_thread,
    read_form,
    size_of,
    swept,
)
from condit.serve.guard import Guard, Rules
from condit.serve.limits import Limits, Refusal, invalid
from condit.serve.metrics import Metrics
from condit.serve.models import Pictures, Request, Served, encoded, random_seed
from condit.serve.study import Study
from condit.serve.study_api import add_study

log = logging.getLogger(__name__)
ASSETS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
ASSETS["json"] = "application/json"


@dataclass(eq=False)
class ApiCall:
    """The jobs of one HTTP request, their requests and their events. kind: of its streamed events."""

    served: Served
    form: CommonForm
    requests: list[Request]
    jobs: list[QueuedJob]
    events: asyncio.Queue[tuple[int, Event]]
    kind: str


class Events(StreamingResponse):
    """A stream that calls `cancel` at its end, also where the client left before it began."""

    def __init__(self, content: AsyncIterator[str], cancel: Callable[[], None]) -> None:
        headers = {"X-Accel-Buffering": "no"}  # a proxy must pass each event on
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self.cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.cancel()


class Server:
    """The state of a server: models by name, the engine, the figures."""

    def __init__(
        self, models: Sequence[Served], limits: Limits, *, batching: bool = True, prompts: bool = False
    ) -> None:
        self.models = {served.name: served for served in models}
        self.limits, self.metrics, self.prompts = limits, Metrics(), prompts
        self.engine = Engine(limits, self.metrics, batching=batching)
        self.decoding = asyncio.Semaphore(2)  # images in full size take much memory

    def served(self, name: str | None) -> Served:
        """A model by name; None: the first. Raises Refusal for one that was not loaded."""
        if name is None and self.models:
            return next(iter(self.models.values()))
        if name not in self.models:
            message = f"The model {name!r} does not exist here; there is {', '.join(self.models) or 'none'}."
            raise Refusal(404, "model_not_found", message, param="model")
        return self.models[name or ""]

    # Jobs

    async def call(self, form: CommonForm, kind: str) -> ApiCall:
        """Checks a form and queues its jobs. Raises Refusal."""
        check_limits(form, self.limits)
        served, events = self.served(form.model), asyncio.Queue[tuple[int, Event]]()
        call = ApiCall(served, form, [], [], events, kind)
        self.engine.check_room(form.n)  # before images are decoded; `put` decides
        seed = random_seed() if form.seed is None else form.seed
        for number, one in enumerate(swept(form)):
            first = seed if one.seed is None else one.seed
            request = await on_thread(lambda one=one, first=first: served.request(one, first), self.decoding)
            emit = self.emitter(number, events)
            call.requests.append(request)
            call.jobs.append(
                served.edit_job(one, request, emit)
                if isinstance(one, EditForm) and one.source_prompt is not None
                else served.job(request, one.partial_images, emit)
            )
        self.engine.put(call.jobs)
        if self.prompts:
            log.info("%s", json.dumps({"prompt": form.prompt, "model": served.name, "seed": seed}))
        return call

    def emitter(self, number: int, events: asyncio.Queue[tuple[int, Event]]) -> Callable[[Event], None]:
        """What the engine's thread calls: the event goes to the loop of the request."""
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (number, event))

        return emit

    async def results(self, call: ApiCall) -> AsyncIterator[tuple[int, Event]]:
        """The events of a call until all its jobs are done. Raises the first error."""
        left = len(call.jobs)
        while left:
            number, event = await call.events.get()
            if isinstance(event, Refusal):
                raise event
            left -= isinstance(event, Done)
            yield number, event

    async def finish(self, request: HTTPRequest, call: ApiCall) -> list[Done]:
        """The results of a call in order. Its jobs are cancelled when the client leaves."""

        async def collect() -> list[Done]:
            done = {number: event async for number, event in self.results(call) if isinstance(event, Done)}
            return [done[number] for number in sorted(done)]

        try:
            return await unless_left(request, collect())
        finally:
            self.engine.cancel(call.jobs)

    async def answer(self, request: HTTPRequest, call: ApiCall) -> Response:
        """The whole answer, or a stream of events."""
        if call.form.stream:
            return Events(self.stream(call), partial(self.engine.cancel, call.jobs))
        finished = await self.finish(request, call)
        pictures = [picture for number, done in enumerate(finished) for picture in self.pictures(call, number, done)]
        return JSONResponse({**self.facts(call), "data": pictures, "usage": usage(call)})

    async def stream(self, call: ApiCall) -> AsyncIterator[str]:
        """Server-sent events: partial images, then the image, as OpenAI's; progress where it was asked for."""
        yield ": queued\n\n"
        sent = 0
        try:
            async for number, event in self.results(call):
                if isinstance(event, Done):
                    for picture in self.pictures(call, number, event):
                        data = {**self.facts(call), **picture, "usage": usage(call)}
                        yield sse(f"{call.kind}.completed", data)
                elif isinstance(event, Progress):
                    if call.form.progress:
                        yield sse("condit.progress", {"step": event.step, "steps": event.steps, "number": number})
                    for index, image in enumerate(event.images):
                        picture = base64.b64encode(encoded(image)).decode()
                        own = {"number": number, "image": index, "step": event.step, "steps": event.steps}
                        data = {"b64_json": picture, "partial_image_index": sent, "condit": own, **self.facts(call)}
                        sent += 1
                        yield sse(f"{call.kind}.partial_image", data)
        except Refusal as refusal:
            self.metrics.refused(refusal.code)
            yield f"event: error\ndata: {json.dumps(refusal.body)}\n\n"

    def facts(self, call: ApiCall) -> dict[str, object]:
        """What OpenAI's answers say besides the images."""
        now, form = int(time.time()), call.form
        shown = {"background": "opaque", "output_format": form.output_format, "quality": "auto", "size": form.size}
        return {"created": now, "created_at": now, **shown}

    def pictures(self, call: ApiCall, number: int, done: Done) -> list[dict[str, object]]:
        """The entries of `data` for a job."""
        form, request = call.form, call.requests[number]
        entries = []
        for index, file in enumerate(call.served.files(request, done, form.output_format)):
            text = base64.b64encode(file).decode()
            link = {"url": f"data:image/{form.output_format};base64,{text}", "b64_json": None}
            own = {"seed": request.seed + index, "number": number, "model": request.model, **done.extra}
            own |= {"strengths": [reference.strength for reference in request.references]}
            entries.append({**(link if form.response_format == "url" else {"b64_json": text}), "condit": own})
        return entries


def usage(call: ApiCall) -> dict[str, object]:
    """Tokens as OpenAI counts them: cells of the images, and the words of the prompts (not a price)."""
    cells = sum(
        (r.height or call.served.pipe.size[0]) * (r.width or call.served.pipe.size[1]) // call.served.pipe.pixels**2
        for r in call.requests
        for _ in range(r.count)
    )
    words = sum(len(request.prompt.split()) for request in call.requests)
    shown = sum(len(request.references) + (request.image is not None) for request in call.requests)
    details = {"text_tokens": words, "image_tokens": shown}
    total = words + shown + cells
    return {
        "input_tokens": words + shown,
        "output_tokens": cells,
        "total_tokens": total,
        "input_tokens_details": details,
    }


def sse(kind: str, data: dict[str, object]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


async def unless_left(request: HTTPRequest, work) -> list[Done]:
    """The result of a coroutine, cancelled when the client leaves."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Refusal(499, "disconnected", "The client has left.")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def page_files() -> dict[str, tuple[bytes, str]]:
    """Path -> content and type of the page's files, all in memory: a request can name no other file."""
    found = {}
    for file in files("condit.serve").joinpath("page").iterdir():
        kind = ASSETS.get(file.name.rpartition(".")[2])
        if kind is not None:
            found[f"/page/{file.name}"] = file.read_bytes(), kind
    return found


def make_app(server: Server, study: Path | None = None) -> FastAPI:
    """The application. Its engine starts and ends with it. study: a folder of `condit study make`."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        yield
        server.engine.stop()
        await asyncio.to_thread(server.engine.join)

    about = "OpenAI's images API with references: strength, mask, schedule. Errors have OpenAI's form."
    app = FastAPI(
        title="condit", version=condit.__version__, description=about, lifespan=life, docs_url=None, redoc_url=None
    )
    assets = page_files()

    @app.exception_handler(Refusal)
    async def refused(request: HTTPRequest, error: Refusal) -> Response:
        server.metrics.refused(error.code)
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: HTTPRequest, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        refusal = Refusal(error.status_code, code, str(error.detail))
        return JSONResponse(refusal.body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: HTTPRequest, error: Exception) -> Response:
        refusal = Refusal(500, "internal_error", "The server failed. Its log says why.")
        return JSONResponse(refusal.body, 500)

    @app.exception_handler(RequestValidationError)
    async def wrong(request: HTTPRequest, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        refusal = invalid(f"{first['loc'][-1]}: {first['msg']}.", str(first["loc"][-1]))
        return JSONResponse(refusal.body, 400)

    @app.post("/v1/images/generations", openapi_extra=body_of(GenerationForm))
    async def generations(request: HTTPRequest) -> Response:
        """Generate images from a prompt and references."""
        form = await read_form(request, GenerationForm, server.limits)
        return await server.answer(request, await server.call(form, "image_generation"))

    @app.post("/v1/images/edits", openapi_extra=body_of(EditForm))
    async def edits(request: HTTPRequest) -> Response:
        """Change an image: by a prompt, in a mask, or by the words that describe it."""
        form = await read_form(request, EditForm, server.limits)
        return await server.answer(request, await server.call(form, "image_edit"))

    @app.post("/v1/replay", openapi_extra=body_of(ReplayForm))
    async def replay(request: HTTPRequest) -> Response:
        """Generate a PNG again from the recipe in it, and compare."""
        form = await read_form(request, ReplayForm, server.limits)
        pictures = Pictures(form.references, server.limits)
        data = pictures.bytes_of(form.image, "image")

        def read() -> tuple[Served, Request, int]:
            recipe = read_recipe(data)
            wanted, index = Request.from_recipe(recipe)
            served = server.served(wanted.model)
            return served, served.replayed(wanted, form.references), index

        served, wanted, index = await on_thread(read, server.decoding)
        events = asyncio.Queue[tuple[int, Event]]()
        asked = GenerationForm(prompt=wanted.prompt)
        call = ApiCall(
            served, asked, [wanted], [served.job(wanted, 0, server.emitter(0, events))], events, "image_generation"
        )
        server.engine.put(call.jobs)
        (done,) = await server.finish(request, call)
        before, after = await on_thread(lambda: load_image(data, max_pixels=server.limits.pixels)), done.images[index]
        entry = server.pictures(call, 0, done)[index]
        same = before.size == after.size and before.tobytes() == after.convert("RGB").tobytes()
        return JSONResponse({**server.facts(call), "data": [entry], "identical": same, "usage": usage(call)})

    @app.post("/v1/annotate", openapi_extra=body_of(AnnotateForm))
    async def annotate(request: HTTPRequest) -> Response:
        """Make a condition of an image: edges, lines, gray, blur."""
        from condit.drawing.references import ANNOTATORS

        form = await read_form(request, AnnotateForm, server.limits)
        size = size_of(form.size, server.limits)

        def work() -> bytes:
            image = Pictures((), server.limits).image(form.image, "image")
            image = image if size is None else image.resize((size[1], size[0]))
            return encoded(ANNOTATORS[form.kind](image))

        file = await on_thread(work, server.decoding)
        return JSONResponse({"created": int(time.time()), "data": [{"b64_json": base64.b64encode(file).decode()}]})

    @app.get("/v1/models")
    async def models() -> Response:
        """The loaded models with their adapters."""
        return JSONResponse({"object": "list", "data": [served.describe() for served in server.models.values()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One model."""
        return JSONResponse(server.served(name).describe())

    @app.get("/healthz")
    async def healthz() -> Response:
        """200 while the process lives."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz")
    async def readyz() -> Response:
        """200 while requests are taken, else 503."""
        ready = server.engine.thread.is_alive() and not server.engine.stopping
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures in Prometheus' format."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        content, kind = assets["/page/index.html"]
        return Response(content, media_type=kind)

    @app.get("/study", include_in_schema=False)
    async def study_page() -> Response:
        content, kind = assets["/page/study.html"]
        return Response(content, media_type=kind)

    @app.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if f"/page/{name}" not in assets:
            raise Refusal(404, "not_found", "Not found.")
        content, kind = assets[f"/page/{name}"]
        return Response(content, media_type=kind)

    if study is not None:
        add_study(app, Study(study), server.limits)
    return app


def guarded(app: FastAPI, server: Server, token: str | None, hosts: Sequence[str] = ()) -> Guard:
    """The application behind its guard. The page's files hold no secret, so they need no token."""
    public = {"/", "/study", "/healthz", "/readyz", *page_files()}
    return Guard(app, Rules(token, frozenset(host.lower() for host in hosts), public), server.limits, server.metrics)
