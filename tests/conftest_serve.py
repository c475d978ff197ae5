"""A server over the random embedded model, on a port of the loopback."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from random_tiny import random_tiny_folder  # noqa: F401

pytest.importorskip("fastapi")
import httpx

from condit.serve.app import Server, guarded, make_app
from condit.serve.limits import Limits
from condit.serve.models import Served
from condit.serve.run import Uvicorn, config_of
from condit.weights import catalog


@dataclass
class Running:
    """A server that runs, and the runner that takes its signals."""

    url: str
    server: Server
    runner: Uvicorn

    def post(self, path: str, **how) -> httpx.Response:
        headers = {"X-Condit": "1", **how.pop("headers", {})}
        return httpx.post(f"{self.url}{path}", headers=headers, timeout=60, **how)

    def get(self, path: str, **how) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60, **how)


@pytest.fixture(scope="session")
def served(random_tiny_folder: Path) -> Iterator[Served]:  # noqa: F811
    kinds: dict[str, catalog.Kind] = {"style": "ip-adapter", "subject": "omini", "edges": "omini", "gray": "omini"}
    entries = {"tiny": catalog.Entry("model", "random", "none", random_tiny_folder / "model")}
    for name, kind in kinds.items():
        entries[f"tiny/{name}"] = catalog.Entry(kind, "random", "none", random_tiny_folder / name)
    with pytest.MonkeyPatch.context() as patch:
        for name in list(catalog.MODELS):
            patch.delitem(catalog.MODELS, name)
        for name, entry in entries.items():
            patch.setitem(catalog.MODELS, name, entry)
        yield Served("tiny", Limits())


@contextmanager
def running(
    served: Served, *, token: str | None = None, study: Path | None = None, limits: Limits | None = None, **how
) -> Iterator[Running]:
    server = Server([served], limits or Limits(), **how)
    app = guarded(make_app(server, study), server, token)
    runner = Uvicorn(config_of(app, "127.0.0.1", 0), server)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not runner.started and time.monotonic() < deadline:
        time.sleep(0.01)
    port = runner.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", server, runner)
    finally:
        runner.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def run_server(served: Served) -> Callable:
    def start(**how):
        limits = how.pop("limits", {})
        return running(served, limits=replace(Limits(), **limits), **how)

    return start


@pytest.fixture(scope="session")
def live(run_server) -> Iterator[Running]:
    with run_server() as running:
        yield running


def picture(seed: int = 0, side: int = 64, *, hole: bool = False) -> bytes:
    """A PNG of random blocks; with `hole` the right half is transparent."""
    blocks = np.random.default_rng(seed).integers(0, 255, (4, 4, 4), dtype=np.uint8)
    blocks[:, :, 3] = 255
    if hole:
        blocks[:, 2:, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()
