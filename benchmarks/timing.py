"""Ratios of running times in one process: every variant takes its turn, again and again, so that a slower minute of the
machine hits all of them."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """seconds: the median of all turns; low, high: the quartiles."""

    seconds: float
    low: float
    high: float


def measure(variants: Mapping[str, Callable[[], object]], *, turns: int = 9, warm: int = 2) -> dict[str, Timing]:
    """Median seconds of each variant, interleaved. `warm` calls before pay for compilation and caches."""
    if turns < 2:
        raise SystemExit(f"--turns is at least 2, for quartiles; found {turns}")
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        for _ in range(warm):
            call()
    for _ in range(turns):
        for name, call in variants.items():
            synchronise()
            started = time.perf_counter()
            call()
            synchronise()
            taken[name].append(time.perf_counter() - started)
    return {name: Timing(statistics.median(t), *quartiles(t)) for name, t in taken.items()}


def quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> str:
    """What the figures were measured on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{torch.get_num_threads()} threads of {name}, torch {torch.__version__}"


def table(title: str, timings: Mapping[str, Timing], *bases: str) -> str:
    """A Markdown table: milliseconds, and how many times faster than each of `bases`."""
    heads = " | ".join(f"times as fast as {base}" for base in bases)
    lines = [f"**{title}**", "", f"| variant | ms (quartiles) | {heads} |", "|---" * (2 + len(bases)) + "|"]
    for name, t in timings.items():
        ms = f"{1000 * t.seconds:.1f} ({1000 * t.low:.1f} to {1000 * t.high:.1f})"
        ratios = " | ".join(f"{timings[base].seconds / t.seconds:.2f}" for base in bases)
        lines.append(f"| {name} | {ms} | {ratios} |")
    return "\n".join([*lines, ""])


def save(path: Path, found: Mapping[str, Mapping[str, Timing]]) -> None:
    """All figures as JSON, beside what they were measured on."""
    rows = {title: {name: vars(t) for name, t in timings.items()} for title, timings in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "figures": rows}, indent=1) + "\n")
