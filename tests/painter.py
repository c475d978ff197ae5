"""Drawers for the tests of jobs, in a module, so that other processes find them: the seed is the colour."""

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from condit.data.images import save_image
from condit.jobs.local import Rank
from condit.jobs.plan import Drawer, Job, Place, Row, Save
from condit.jobs.run import engine_of, run


@dataclass(frozen=True)
class Painter:
    """pause: seconds of a picture. Words of a row's prompt: "broken" raises, "deadly" ends the process, "full" meets a
    full disk. log: a folder in which each picture that is drawn leaves a file with its name."""

    pause: float = 0.0
    log: str | None = None
    weights: str = "00"
    absent: bool = False

    def __call__(self, place: Place) -> Drawer:
        if self.absent:
            raise FileNotFoundError("no model at here/there")
        return Drawer(self.draw, {"hash": self.weights})

    def draw(self, work: Mapping[str, object]) -> list[Save]:
        prompt, seed, count = str(work["prompt"]), int(str(work["seed"])), int(str(work["count"]))
        if self.log is not None:
            Path(self.log, f"{prompt}-{time.monotonic_ns()}-{os.getpid()}").touch()
        time.sleep(self.pause)
        if "broken" in prompt:
            raise RuntimeError("the picture is not finite")
        if "deadly" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if "full" in prompt:
            return [no_space] * count
        colours = [(seed + k).to_bytes(4, "big")[1:] for k in range(count)]
        return [partial(save_image, Image.new("RGB", (16, 16), tuple(colour))) for colour in colours]


def no_space(path: Path) -> None:
    raise OSError(28, f"no space left while writing {path}")


def job_of(folder: Path, prompts: list[str], painter: Painter | None = None, count: int = 2, **how) -> Job:
    """A job of these prompts, `count` pictures each."""
    rows = []
    for number, prompt in enumerate(prompts):
        work = {"prompt": prompt, "seed": 1000 * number, "count": count}
        files = tuple(f"images/{prompt.replace(' ', '-')}-{k}.png" for k in range(count))
        lines = tuple({"text": prompt, "seed": 1000 * number + k} for k in range(count))
        rows.append(Row(f"rows.jsonl:{number + 1}", files, work, lines))
    return Job(folder, tuple(rows), painter or Painter(), **how)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without locks."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if not path.name.startswith(".")}


def drive() -> None:
    """A driver in a process of its own: FOLDER ENGINE WORKERS ROWS PAUSE LOG in sys.argv."""
    folder, engine, workers, rows, pause, log = sys.argv[1:]
    job = job_of(Path(folder), foxes(int(rows)), Painter(float(pause), log))
    run(job, engine_of("ray" if engine == "ray" else "local", int(workers), Rank()))


def foxes(count: int) -> list[str]:
    return [f"fox {number}" for number in range(count)]
