"""The command in a process of its own, with the embedded model: start, kill -9 during a request, start again, stop."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

pytestmark = pytest.mark.slow


@contextmanager
def started(port: int, folder) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "condit.cli", "serve", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        try:
            yield process
        finally:
            process.kill()


def test_a_killed_server_leaves_nothing_and_starts_again(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, body = f"http://127.0.0.1:{port}", {"prompt": "a red apple", "seed": 1, "num_inference_steps": 2}
    with started(port, tmp_path) as process:
        assert "<title>condit</title>" in httpx.get(url).text
        first = httpx.post(f"{url}/v1/images/generations", json=body, timeout=120).json()
        failed: list[Exception] = []

        def ask() -> None:
            try:
                httpx.post(f"{url}/v1/images/generations", json={**body, "num_inference_steps": 100}, timeout=120)
            except httpx.HTTPError as error:
                failed.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(1.5)
        process.send_signal(signal.SIGKILL)
        asking.join(30)
        assert len(failed) == 1
    assert list(tmp_path.iterdir()) == []
    with started(port, tmp_path) as process:
        again = httpx.post(f"{url}/v1/images/generations", json=body, timeout=120).json()
        assert again["data"][0]["b64_json"] == first["data"][0]["b64_json"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr is not None
        log = process.stderr.read()
        assert "Traceback" not in log and "red apple" not in log and '"status": 200' in log
