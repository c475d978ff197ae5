"""Jobs by engine and number of workers: pictures a second, what an engine adds to a picture, the wait for the first
one, and memory over the length of a job.

    python benchmarks/scale.py --rows 24 --steps 4 --ray            # some minutes
    python benchmarks/scale.py --rows 400 --blank                   # pictures that cost nothing: the engine's own time

Configurations take turns, so that all of them see the same machine; read their ratios. Each turn draws into an empty
folder, and each worker computes with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from PIL import Image

from condit.cli.options import ModelOptions
from condit.cli.rows import StudioOpener
from condit.data.images import save_image
from condit.jobs.local import Rank
from condit.jobs.plan import Drawer, Job, Place, Row, RowResult, Save
from condit.jobs.run import Engine, engine_of, run
from condit.jobs.work import WorkerTask

PROMPTS = ("a red apple", "a penguin", "a guitar", "a rocket", "a key", "a mushroom")


@dataclass(frozen=True)
class Turn:
    """One job. first: seconds to its first picture; rate: pictures a second after the first; megabytes: of all its
    processes after a quarter of the pictures and at the end."""

    first: float
    rate: float
    megabytes: tuple[float, float]


def blank(place: Place) -> Drawer:
    """Pictures without a model."""
    return Drawer(blank_picture)


def blank_picture(work: Mapping[str, object]) -> list[Save]:
    return [partial(save_image, Image.new("RGB", (64, 64)))]


def job_of(folder: Path, rows: int, steps: int | None) -> Job:
    """A job of the embedded model, or of blank pictures."""
    made = []
    for seed in range(rows):
        work = {"prompt": PROMPTS[seed % len(PROMPTS)], "seed": seed, "model": "tiny", "steps": steps}
        made.append(Row(str(seed), (f"{seed}.png",), work, ({"text": work["prompt"]},)))
    return Job(folder, tuple(made), blank if steps is None else StudioOpener(ModelOptions()))


def resident() -> float:
    """Megabytes of this process, of its children, and of the actors of a cluster that it has started."""
    parents, sizes = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except (OSError, ValueError):
            continue  # it has ended
        pid = int(status.parent.name)
        parents[pid], sizes[pid] = int(lines["PPid"]), int(lines.get("VmRSS", "0").split()[0]) / 1024
    total = 0.0
    for pid in sizes:
        above = pid
        while above not in (0, 1, os.getpid()):
            above = parents.get(above, 0)
        total += sizes[pid] if above == os.getpid() else 0
    return total


def timed(engine: Engine, times: list[float], sizes: list[float]) -> Engine:
    """The engine, which notes the time of each result, and memory after a quarter of them and at the end."""

    def draw(task: WorkerTask, rows: Sequence[Row]) -> Generator[RowResult, None, None]:
        for result in engine(task, rows):
            times.append(time.perf_counter())
            if len(times) in (max(1, len(rows) // 4), len(rows)):
                sizes.append(resident())
            yield result

    return draw


def turn(engine: Engine, rows: int, steps: int | None) -> Turn:
    times, sizes = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        outcome = run(job_of(Path(folder) / "job", rows, steps), timed(engine, times, sizes))
    assert len(outcome.made) == rows and not outcome.errors
    return Turn(times[0] - begun, (rows - 1) / (times[-1] - times[0]), (sizes[0], sizes[-1]))


def table(turns: Mapping[str, Sequence[Turn]]) -> str:
    """A row for each configuration; the first is the measure of the others."""
    lines = ["| engine, workers | pictures/s | ratio | s to the first | MB at a quarter | MB at the end |"]
    lines += ["|---|---|---|---|---|---|"]
    base = [t.rate for t in next(iter(turns.values()))]
    for name, own in turns.items():
        ratio = median(t.rate / first for t, first in zip(own, base, strict=True))
        quarter, end = (median(t.megabytes[i] for t in own) for i in (0, 1))
        first, rate = median(t.first for t in own), median(t.rate for t in own)
        lines.append(f"| {name} | {rate:.2f} | {ratio:.2f} | {first:.1f} | {quarter:.0f} | {end:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24, help="pictures of a job")
    parser.add_argument("--steps", type=int, default=4, help="steps of the embedded model")
    parser.add_argument("--blank", action="store_true", help="pictures without a model")
    parser.add_argument("--turns", type=int, default=3, help="jobs of each configuration")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ray", action="store_true", help="also Ray, on a cluster that is started first")
    parser.add_argument("--out", type=Path, help="a .json file for the figures")
    arguments = parser.parse_args()
    engines = {f"local, {n}": engine_of("local", n, Rank()) for n in arguments.workers}
    if arguments.ray:
        import ray

        os.environ.setdefault("RAY_worker_niceness", "0")  # as the engine does
        begun = time.perf_counter()
        ray.init(include_dashboard=False, log_to_driver=False)
        print(f"Ray has started after {time.perf_counter() - begun:.1f} s", flush=True)
        engines |= {f"ray, {n}": engine_of("ray", n, Rank()) for n in arguments.workers}
    turns: dict[str, list[Turn]] = {name: [] for name in engines}
    for number in range(arguments.turns):
        for name, engine in engines.items():
            turns[name].append(turn(engine, arguments.rows, None if arguments.blank else arguments.steps))
            print(f"turn {number + 1}, {name}: {turns[name][-1]}", flush=True)
    print(f"\n{table(turns)}")
    if arguments.out is not None:
        figures = {name: [asdict(t) for t in own] for name, own in turns.items()}
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
