"""Short variants of one method, for the papers' ablations: trained from equal seeds for equal steps, kept, measured on
the same held-out icons, told as a page and in the places of docs/claims.md."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from timing import machine
from torch import Tensor

from condit.data.files import atomic_write
from condit.rulers.statistics import Interval, bootstrap, ratio
from condit.training.loop import Loop, LoopConfig, Task
from condit_lab.suites.claims import Claim, Measured, block
from condit_lab.suites.sets import mark_of

SAVE_SECONDS = 60
Trained = TypeVar("Trained", bound=Task)


@dataclass(frozen=True)
class Question:
    """A claim of a paper, and the trials that answer it. name: of its place in docs/claims.md."""

    name: str
    title: str
    trials: tuple[str, ...]
    paper: str

    def text(self, figures: Sequence[Measured], shortest: str, *, note: str, command: str) -> str:
        """What stands in its place; shortest: the command that a reader would give."""
        return block(Claim(self.paper, shortest), figures, note=note, command=command)


@dataclass(frozen=True)
class Found:
    """error: with the right condition; wrong, none: errors with another icon's and without one, over the error."""

    error: Interval
    wrong: Interval | None
    none: Interval | None

    @classmethod
    def of(cls, right: Tensor, wrong: Tensor, none: Tensor, clusters: Sequence | None = None) -> Found:
        """Errors (n,) of the same icons; clusters: as in `statistics.bootstrap`."""
        return cls(bootstrap(right, clusters), ratio(wrong, right, clusters), ratio(none, right, clusters))


def parser(description: str | None, *, model: str, steps: int, out: str) -> argparse.ArgumentParser:
    """What every study can be asked for."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--icons", required=True, help="an icon world made by `condit data icons`")
    found.add_argument("--model", default=model, help="folder of the embedded model")
    found.add_argument("--steps", type=int, default=steps)
    found.add_argument("--batch", type=int, default=32)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--count", type=int, default=256, help="held-out icons")
    found.add_argument("--only", help="trials, separated by commas")
    found.add_argument("--claims", type=Path, help="a page like docs/claims.md whose places are filled")
    found.add_argument("--threads", type=int, help="of the CPU")
    found.add_argument("--out", type=Path, default=Path(out))
    return found


def parse(found: argparse.ArgumentParser, trials: Sequence[str], arguments: list[str] | None) -> argparse.Namespace:
    """The arguments with `names`, the trials that are wanted."""
    given = found.parse_args(arguments)
    given.names = list(trials) if given.only is None else [name.strip() for name in given.only.split(",")]
    unknown = [name for name in given.names if name not in trials]
    if unknown:
        found.error(f"no trial {unknown[0]!r}; there are {', '.join(trials)}")
    return given


def command_of(script: str, arguments: list[str] | None) -> str:
    return shlex.join(["python", f"benchmarks/{script}.py", *(sys.argv[1:] if arguments is None else arguments)])


def train(task: Trained, config: LoopConfig, folder: Path, key: object) -> Trained:
    """The task after its steps, with averaged weights. What was trained before is read, and what was stopped goes on,
    if `key` (all that a run depends on beside its config, as JSON) is the same; else it is trained anew."""
    mark, kept = mark_of([key, config.model_dump()]), folder / "mark.txt"
    if not kept.is_file() or kept.read_text() != mark:
        (folder / "state.pt").unlink(missing_ok=True)
    loop = Loop(task, config, folder)
    kept.write_text(mark)
    loop.model.train()
    saved = time.monotonic()
    while loop.step < config.steps:
        loop.train_step(loop.make_batch(loop.step))
        loop.step += 1
        if loop.step == config.steps or time.monotonic() - saved > SAVE_SECONDS:
            loop.save()
            saved = time.monotonic()
    with torch.no_grad():
        for name, parameter in loop.parameters.items():
            parameter.copy_(loop.average.shadow[name])
    return task.eval()


def cell(interval: Interval | None, *, percent: bool = False) -> str:
    if interval is None:
        return "-"
    values = (interval.value, interval.low, interval.high)
    if percent:
        return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * (v - 1) for v in values))
    return "{:.4f} ({:.4f} to {:.4f})".format(*values)


def table(rows: Mapping[str, Found], what: str = "condition") -> str:
    lines = [f"| variant | n | error | another's {what}, % | none, % |", "|---|---|---|---|---|"]
    for name, f in rows.items():
        cells = cell(f.error), cell(f.wrong, percent=True), cell(f.none, percent=True)
        lines.append(f"| {name} | {f.error.n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def keep(folder: Path, said: Mapping, page: str) -> None:
    """claims.json and claims.md in the folder of a study."""
    text = json.dumps({**said, "machine": machine()}, indent=1) + "\n"
    atomic_write(folder / "claims.json", lambda path: path.write_text(text))
    atomic_write(folder / "claims.md", lambda path: path.write_text(page))
