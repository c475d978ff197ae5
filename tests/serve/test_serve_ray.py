"""deploy/serve_ray.py: the door without a cluster, and (slow) the whole with OpenAI's client."""

import asyncio
import base64
import importlib.util
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi")
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def serve_ray():
    spec = importlib.util.spec_from_file_location("serve_ray", DEPLOY / "serve_ray.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_ray"] = module  # by which pickle finds its classes
    spec.loader.exec_module(module)
    yield module
    del sys.modules["serve_ray"]


class Full(Exception):
    """Stands for Ray's error of a full queue."""


class Replica:
    """Stands for the handle of the replicas: answers in this process, and counts the calls that were cancelled."""

    def __init__(self, module, app, error: Exception | None = None) -> None:
        self.module, self.app, self.error, self.cancelled = module, app, error, 0

    def remote(self, call):
        replica = self

        class Parts:
            async def __aiter__(self):
                if replica.error is not None:
                    raise replica.error
                async for part in replica.module.answer(replica.app, call):
                    yield part

            def cancel(self) -> None:
                replica.cancelled += 1

        return Parts()


async def echo(request):
    return JSONResponse({"body": (await request.body()).decode(), "query": str(request.query_params)}, 201)


async def full(request):
    return PlainTextResponse("no room", 503)


async def stream(request):
    return StreamingResponse(iter([b"one ", b"two"]), headers={"X-Kind": "events"})


APP = Starlette(
    routes=[Route("/echo", echo, methods=["POST"]), Route("/full", full, methods=["GET", "POST"]), Route("/s", stream)]
)


def ask(module, method: str, path: str, error: Exception | None = None, **how) -> httpx.Response:
    door = module.Door(Replica(module, APP, error), (Full,))

    async def application(scope, receive, send):
        from starlette.requests import Request

        await (await door(Request(scope, receive)))(scope, receive, send)

    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **how)

    return asyncio.run(work())


def test_the_door_passes_bodies_queries_headers_and_streams_on(serve_ray):
    answer = ask(serve_ray, "POST", "/echo?a=1", content=b"x" * 100_000)
    assert answer.status_code == 201 and answer.json() == {"body": "x" * 100_000, "query": "a=1"}
    answer = ask(serve_ray, "GET", "/s")
    assert (answer.text, answer.headers["x-kind"]) == ("one two", "events")


@pytest.mark.parametrize(("path", "error"), [("/full", None), ("/echo", Full("queue"))])
def test_no_room_is_429_with_the_seconds_to_wait(serve_ray, path, error):
    answer = ask(serve_ray, "POST", path, error)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_readiness_stays_503_and_other_errors_are_not_hidden(serve_ray):
    assert ask(serve_ray, "GET", "/full").status_code == 503
    with pytest.raises(ZeroDivisionError):
        ask(serve_ray, "POST", "/echo", ZeroDivisionError())


def test_a_body_that_is_too_large_stops_at_the_door(serve_ray):
    assert ask(serve_ray, "POST", "/echo", content=b"x" * 32_000_001).status_code == 413


def test_a_client_that_leaves_is_seen_by_the_application(serve_ray):
    seen = []

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        seen.append((await receive())["type"])

    async def work() -> None:
        parts = serve_ray.answer(app, serve_ray.Call("GET", "/", b"/", b"", [], b""))
        assert await anext(parts) == (200, [])
        await parts.aclose()

    asyncio.run(work())
    assert seen == ["http.disconnect"]


@pytest.mark.slow
def test_openai_client_on_a_cluster(serve_ray, monkeypatch):
    ray, openai = pytest.importorskip("ray"), pytest.importorskip("openai")
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(DEPLOY), *sys.path]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 is the default
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"port": port})
        serve.run(serve_ray.build(serve_ray.Settings(max_replicas=1, ongoing=1, queue=1)))
        url, body = f"http://127.0.0.1:{port}", {"seed": 3, "num_inference_steps": 2}
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=20, timeout=600)

        def draw(seed: int) -> bytes:
            answer = client.images.generate(prompt="a red apple", size="128x128", extra_body={**body, "seed": seed})
            return base64.b64decode(answer.data[0].b64_json)

        def refused(seed: int) -> httpx.Response:
            fields = {"prompt": "a fox", **body, "num_inference_steps": 20}
            return httpx.post(f"{url}/v1/images/generations", json=fields, timeout=600)

        assert draw(3) == draw(3) != draw(4)
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(refused, range(8)))
            assert {answer.status_code for answer in answers} == {200, 429}
            assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
            assert len(set(threads.map(draw, range(8)))) == 8  # the client waits and asks again
        assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200
        assert "<title>condit</title>" in httpx.get(url, timeout=60).text
    finally:
        serve.shutdown()
        ray.shutdown()
