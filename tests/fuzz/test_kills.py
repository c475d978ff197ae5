"""kill -9 at random moments: resumed commands end with the files of an uninterrupted run, byte for byte.

    pytest -m slow tests/fuzz/test_kills.py             # 100 kills of each command; KILLS=10 for fewer

What is compared without its times: `seconds` and `images_per_s` in log.jsonl, state.pt and card.json."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from condit.cli import main

KILLS = int(os.environ.get("KILLS", "100"))
TIMES = {"seconds", "images_per_s"}
RECIPE = """
task = "classify"
[data]
folder = "classes"
size = 16
sizes = { patch_size = 8, dim = 16, depth = 1, heads = 2, mlp_dim = 16 }
[train]
steps = 12
batch = 4
precision = "no"
warmup = 2
log_every = 1
save_minutes = 0
"""


def train(folder: Path) -> list[str]:
    return ["train", "recipe.toml", "-o", str(folder), *(["--resume"] if folder.exists() else [])]


def draw(folder: Path) -> list[str]:
    small = ["--per-subject", "2", "-n", "2", "--steps", "1"]
    return ["data", "draw", "--subjects", "subjects.txt", "--styles", "styles.txt", *small, "-o", str(folder)]


def generate(folder: Path) -> list[str]:
    return ["generate", "--from", "rows.jsonl", "--steps", "1", "-o", str(folder)]


@pytest.fixture
def inputs(tmp_path, monkeypatch, random_tiny) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (16, 16), (60 * k, 90, 200)).save(tmp_path / "classes" / name / f"{k}.png")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    rows = [{"prompt": "a fox", "seed": seed, "count": 2} for seed in range(0, 12, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "subjects.txt").write_text("a fox\na rocket\nan apple\n")
    (tmp_path / "styles.txt").write_text("flat\noutline\npixels\n")
    return tmp_path


def run(arguments: list[str], kill_after: float | None = None) -> bool:
    """A command in a process of its own, forked so that nothing is imported again. Whether it ended before it was
    killed. Its output is shown if it fails."""
    log = Path("output.txt")
    child = os.fork()
    if child == 0:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(handle, number)
        sys.stdout = sys.stderr = open(handle, "w")  # noqa: SIM115 - pytest's own are replaced
        try:
            main(arguments)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    end = None if kill_after is None else time.monotonic() + kill_after
    while True:
        pid, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            assert code == 0, f"exit code {code}: {log.read_text()}"
            return True
        if end is not None and time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.001)


def without_times(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list | tuple) else value


def content(file: Path) -> object:
    if file.name == "state.pt":
        return without_times(torch.load(file, weights_only=True))
    if file.suffix == ".json":
        return without_times(json.loads(file.read_text()))
    if file.name == "log.jsonl":
        return [without_times(json.loads(line)) for line in file.read_text().splitlines()]
    return file.read_bytes()


def files(folder: Path) -> dict[str, object]:
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("command", [train, draw, generate], ids=["train", "data draw", "generate --from"])
def test_every_resume_after_a_kill_gives_the_files_of_an_uninterrupted_run(command, inputs, monkeypatch):
    resumes_equal_the_whole_run(command, inputs, KILLS, seed=0)


def resumes_equal_the_whole_run(command: Callable[[Path], list[str]], inputs: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    whole, moments, done, folder = inputs / "whole", random.Random(seed), 0, inputs / "run-0"
    run(command(whole))  # imports of the first run are not measured
    start = time.monotonic()
    run(command(inputs / "measured"))
    duration, expected, ended = time.monotonic() - start, files(whole), 0
    assert files(inputs / "measured") == expected
    while done < kills:
        if not run(command(folder), moments.uniform(0, duration)):
            done += 1
            (inputs / "kills.txt").write_text(f"{done} of {kills} kills, {ended} runs ended equal")
            continue
        assert files(folder) == expected
        ended += 1
        folder = inputs / f"run-{ended}"
    run(command(folder))
    assert files(folder) == expected
    print(f"{done} kills, {ended + 1} runs that ended equal, {duration:.2f} s for a whole one")
