"""Time of a whole process that generates one image with the embedded model, of two checkouts in turn.

    git worktree add ../before REVISION
    python benchmarks/cold_start.py ../before [--turns 5] [--arguments "--style ref.png"]

Both run with the Python that runs this script. After one uncounted run each, every turn runs the old and the new
checkout once, so that a slower minute of the machine hits both; ratios are formed turn by turn. Processor time (user
and system, all threads) is the steadier figure on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent.parent
SCRIPT = "import sys, condit; from condit.cli import main; print(condit.__file__); sys.exit(main())"


@dataclass(frozen=True)
class Run:
    """Seconds of one process."""

    wall: float
    processor: float


def run(checkout: Path, arguments: Sequence[str], image: Path) -> Run:
    """One `condit generate`, from the start of Python to its end. Raises SystemExit if it fails or runs other code."""
    source = checkout.resolve() / "src"
    command = [sys.executable, "-c", SCRIPT, "generate", "a red apple", *arguments, "-o", str(image)]
    before, started = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(source)})
    wall, after = time.perf_counter() - started, os.times()
    if done.returncode or not Path(done.stdout.split("\n")[0]).is_relative_to(source):
        raise SystemExit(f"{checkout}: no image from {source}: {done.stdout}{done.stderr}")
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(wall, spent)


def compare(old: Path, new: Path, arguments: Sequence[str], turns: int) -> tuple[list[tuple[Run, Run]], bool]:
    """The runs of each turn, and whether both checkouts generate the same pixels."""
    with tempfile.TemporaryDirectory() as folder:
        images = [Path(folder) / name for name in ("old.png", "new.png")]

        def turn() -> tuple[Run, Run]:
            return run(old, arguments, images[0]), run(new, arguments, images[1])

        turn()
        runs = [turn() for _ in range(turns)]
        pixels = [Image.open(image).convert("RGB").tobytes() for image in images]
    return runs, pixels[0] == pixels[1]


def line(name: str, old: Sequence[float], new: Sequence[float]) -> str:
    ratios = [after / before for before, after in zip(old, new, strict=True)]
    columns = [(min(values), statistics.median(values)) for values in (old, new, ratios)]
    return f"{name:<12}" + "".join(f"{low:9.2f} {middle:7.2f}" for low, middle in columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout to compare with")
    parser.add_argument("--new", type=Path, default=HERE, help="the other checkout [default: this one]")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--arguments", default="", help="more arguments of `condit generate`")
    given = parser.parse_args()
    if given.turns < 1:
        raise SystemExit(f"--turns is at least 1; found {given.turns}")
    runs, same = compare(given.old, given.new, shlex.split(given.arguments), given.turns)
    print(f"{'seconds':<12}{'old: min, median':>17}{'new: min, median':>17}{'new / old':>17}")
    print(line("wall", [old.wall for old, _ in runs], [new.wall for _, new in runs]))
    print(line("processor", [old.processor for old, _ in runs], [new.processor for _, new in runs]))
    print("the images are equal" if same else "the images differ")


if __name__ == "__main__":
    main()
