"""Load on `condit serve`: what batching gains, latency under Poisson arrivals, and a mixed crowd of requests.

    python benchmarks/serve.py --threads 2                 # the three parts, about 15 minutes on two cores
    python benchmarks/serve.py --parts batching --steps 20

Servers run in processes of their own, one with batching and one without, and take turns, so that both see the same
machine. Arrivals are open loop: a request is sent at its time, whether or not the others have been answered.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

PROMPTS = ("a red apple", "a penguin", "a guitar", "a rocket", "a key", "a mushroom")
SERVER = """
import sys, logging, torch
torch.set_num_threads(int(sys.argv[3]))
from condit.serve.limits import Limits
from condit.serve.run import ServeOptions, serve
limits = Limits(waiting=int(sys.argv[4]), seconds=3.0)
serve(ServeOptions(port=int(sys.argv[1]), batching=sys.argv[2] == "on", limits=limits), print)
"""


@dataclass(frozen=True)
class Running:
    """A server: its address and process."""

    url: str
    process: subprocess.Popen

    @property
    def megabytes(self) -> float:
        """Its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(batching: str, threads: int, waiting: int = 64) -> Iterator[Running]:
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port), batching, str(threads), str(waiting)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                try:
                    if httpx.get(f"{url}/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield Running(url, process)
        finally:
            process.terminate()


def body(index: int, steps: int, **more: object) -> dict[str, object]:
    return {"prompt": PROMPTS[index % len(PROMPTS)], "seed": index % 12, "num_inference_steps": steps, **more}


def png(size: int = 96) -> bytes:
    blocks = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((size, size)).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(answer: httpx.Response) -> np.ndarray:
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)


async def all_at_once(running: Running, count: int, steps: int) -> float:
    """Images a second for `count` requests that are sent together."""
    async with httpx.AsyncClient(
        base_url=running.url, timeout=600, limits=httpx.Limits(max_connections=None)
    ) as client:
        begun = time.perf_counter()
        answers = await asyncio.gather(
            *(client.post("/v1/images/generations", json=body(i, steps)) for i in range(count))
        )
        assert all(answer.status_code == 200 for answer in answers)
        return count / (time.perf_counter() - begun)


def gain(threads: int, steps: int, rounds: int, count: int) -> dict[str, object]:
    """Throughput with and without batching, in turns."""
    found: dict[str, list[float]] = {"on": [], "off": []}
    with server("on", threads) as on, server("off", threads) as off:
        for running in (on, off):
            asyncio.run(all_at_once(running, 1, 1))  # warm
        for _ in range(rounds):
            for name, running in (("on", on), ("off", off)):
                found[name].append(asyncio.run(all_at_once(running, count, steps)))
    ratios = [a / b for a, b in zip(found["on"], found["off"], strict=True)]
    return {"waiting": count, "steps": steps, "images_a_second": found, "ratio": statistics.median(ratios)}


async def poisson(running: Running, rate: float, count: int, steps: int, seed: int = 0) -> dict[str, object]:
    """Latency of `count` requests that arrive at `rate` a second."""
    chance, latencies, refused = random.Random(seed), [], 0
    async with httpx.AsyncClient(
        base_url=running.url, timeout=600, limits=httpx.Limits(max_connections=None)
    ) as client:

        async def one(index: int) -> None:
            nonlocal refused
            begun = time.perf_counter()
            answer = await client.post("/v1/images/generations", json=body(index, steps))
            if answer.status_code == 200:
                latencies.append(time.perf_counter() - begun)
            refused += answer.status_code == 429

        tasks = []
        for index in range(count):
            tasks.append(asyncio.create_task(one(index)))
            await asyncio.sleep(chance.expovariate(rate))
        await asyncio.gather(*tasks)
    centiles = statistics.quantiles(latencies, n=100) if len(latencies) > 1 else [float("nan")] * 99
    shown = {f"p{p}": round(centiles[p - 1], 3) for p in (50, 95, 99)}
    return {"rate": round(rate, 3), "requests": count, "refused_429": refused, **shown}


# A crowd: each kind sends one request and says what became of it.


async def valid(client: httpx.AsyncClient, index: int, steps: int, known: dict[int, np.ndarray]) -> str:
    for _ in range(200):
        answer = await client.post("/v1/images/generations", json=body(index % 12, steps))
        if answer.status_code != 429:
            break
        await asyncio.sleep(int(answer.headers["retry-after"]) * random.uniform(0.5, 1.5))
    if answer.status_code != 200:
        return f"lost {answer.status_code}"
    # Rounding may fall to either side of a level where the batch differs.
    return "ok" if np.abs(pixels(answer) - known[index % 12]).max() <= 1 else "mixed up"


async def broken(client: httpx.AsyncClient, index: int, steps: int, known: object) -> str:
    data = (png()[: 40 + index % 200], b"GIF89a", b"", bytes(500))[index % 4]
    answer = await client.post(
        "/v1/images/edits", files={"image": data}, data={"prompt": "a key"}, headers={"X-Condit": "1"}
    )
    return "ok" if answer.status_code in (400, 429) else f"broken {answer.status_code}"


async def oversized(client: httpx.AsyncClient, index: int, steps: int, known: object) -> str:
    more = ({"n": 10_000}, {"num_inference_steps": 99_999}, {"size": "9000x9000"}, {"prompt": "x" * 30_000})[index % 4]
    answer = await client.post("/v1/images/generations", json={**body(index, steps), **more})
    return "ok" if answer.status_code == 400 else f"oversized {answer.status_code}"


async def leaving(client: httpx.AsyncClient, index: int, steps: int, known: object) -> str:
    with suppress(httpx.TimeoutException):
        await client.post("/v1/images/generations", json=body(index, 100), timeout=random.uniform(0.05, 1.0))
    return "ok"


async def slow(client: httpx.AsyncClient, index: int, steps: int, known: object) -> str:
    """A client that sends its body byte by byte, and never to the end."""
    url = client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = ("POST /v1/annotate HTTP/1.1", f"Host: {url.host}", "Content-Type: application/json", "Content-Length: 999")
    writer.write("\r\n".join([*head, "", ""]).encode())
    try:
        for _ in range(20):
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.5)
        answer = await asyncio.wait_for(reader.read(100), 20)
    except (ConnectionError, TimeoutError) as error:
        answer = b" 408 " if isinstance(error, ConnectionError) else b""
    writer.close()
    return "ok" if b" 408 " in answer else f"slow {answer[:20]!r}"


KINDS: dict[Callable, int] = {valid: 40, broken: 20, oversized: 20, leaving: 15, slow: 5}


async def crowd(running: Running, count: int, steps: int, at_once: int = 40) -> dict[str, object]:
    """`count` requests of all kinds, at most `at_once` of them at a time."""
    kinds = random.Random(0).choices(list(KINDS), list(KINDS.values()), k=count)
    outcomes: Counter[str] = Counter()
    memory: list[float] = []
    places = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(
        base_url=running.url, timeout=600, limits=httpx.Limits(max_connections=None)
    ) as client:
        known = {}
        for index in range(12):
            known[index] = pixels(await client.post("/v1/images/generations", json=body(index, steps)))

        async def one(index: int, kind: Callable) -> None:
            async with places:
                outcomes[f"{kind.__name__}: {await kind(client, index, steps, known)}"] += 1
                if sum(outcomes.values()) % max(count // 20, 1) == 0:
                    memory.append(round(running.megabytes, 1))

        await asyncio.gather(*(one(index, kind) for index, kind in enumerate(kinds)))
        ready = (await client.get("/readyz")).status_code == 200
    half = memory[len(memory) // 4 :]
    growth = (statistics.mean(half[-3:]) / statistics.mean(half[:3]) - 1) if len(half) > 5 else float("nan")
    return {"requests": count, "outcomes": dict(outcomes), "ready": ready, "mb": memory, "growth": round(growth, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["batching", "latency", "crowd"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waiting", type=int, default=16)
    parser.add_argument("--arrivals", type=int, default=60)
    parser.add_argument("--requests", type=int, default=1000)
    options = parser.parse_args()
    found: dict[str, object] = {"threads": options.threads}
    if "batching" in options.parts:
        found["batching"] = gain(options.threads, options.steps, options.rounds, options.waiting)
        print(json.dumps(found["batching"]), flush=True)
    if "latency" in options.parts:
        with server("on", options.threads) as running:
            most = asyncio.run(all_at_once(running, options.waiting, options.steps))
            count = options.arrivals
            loads = [asyncio.run(poisson(running, share * most, count, options.steps)) for share in (0.3, 0.6, 0.9)]
        found["latency"] = {"images_a_second_at_most": round(most, 3), "loads": loads}
        print(json.dumps(found["latency"]), flush=True)
    if "crowd" in options.parts:
        with server("on", options.threads) as running:
            found["crowd"] = asyncio.run(crowd(running, options.requests, min(options.steps, 2)))
        print(json.dumps(found["crowd"]), flush=True)


if __name__ == "__main__":
    main()
