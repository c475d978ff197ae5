"""`condit train` on tars under torchrun, as two machines, of which one loses its process."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from condit.data.files import atomic_write
from condit.data.pairs import Pair
from condit.pairs.sets import SetForm, write_set
from condit.training.run import train
from condit.weights.files import read_tensors

STEPS = 8
RECIPE = """
task = "ip-adapter"

[data]
model = "tiny-unet"
pairs = "set"
shares = [1, 0, 0]

[train]
steps = {steps}
batch = 2
batches = 2
log_every = 1
precision = "no"
save_minutes = 0.0
sheet_minutes = 1000.0
"""


def pair(n: int) -> Pair:
    pixels = np.random.default_rng(n).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    target, reference = (Image.fromarray(p).resize((128, 128)) for p in pixels)
    return Pair(target, f"number {n}", {"style": (reference,)})


@pytest.fixture
def recipe(tmp_path) -> Path:
    write_set(
        tmp_path, tmp_path / "set", lambda on_error: ((str(n), pair(n)) for n in range(12)), {}, SetForm(shard_rows=4)
    )
    return atomic_write(tmp_path / "recipe.toml", lambda path: path.write_text(RECIPE.format(steps=STEPS)))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_machine(recipe: Path, out: Path, port: int, said: Path) -> subprocess.Popen:
    """torchrun as on one of two machines, with one process."""
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=10"]
    command += [*rendezvous, "-m", "condit.cli", "train", str(recipe), "-o", str(out), "--resume"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with open(said, "w") as errors:
        return subprocess.Popen(command, env=environment, stderr=errors)


def steps_of(out: Path) -> list[int]:
    log = out / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [row["step"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_a_lost_process_is_started_again_and_no_step_is_lost_or_made_twice(recipe, tmp_path):
    out, port = tmp_path / "two", free_port()
    said = [tmp_path / f"machine-{n}" for n in range(2)]
    machines = [start_machine(recipe, out, port, file) for file in said]
    try:
        deadline = time.monotonic() + 240
        while len(steps_of(out)) < 3 and time.monotonic() < deadline:
            assert all(machine.poll() is None for machine in machines), said[0].read_text()
            time.sleep(0.05)
        (worker,) = psutil.Process(machines[1].pid).children()
        worker.kill()
        for machine in machines:
            machine.wait(timeout=400)
    finally:
        for machine in machines:
            for child in psutil.Process(machine.pid).children(recursive=True) if machine.poll() is None else ():
                child.kill()
            machine.kill()
    outputs = [file.read_text() for file in said]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert any("Resumed" in output for output in outputs)
    assert steps_of(out) == list(range(1, STEPS + 1))
    train(recipe, out=tmp_path / "one")
    one, two = (read_tensors(next((tmp_path / name / "export").glob("*.safetensors"))) for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)  # sums of gradients in another order
