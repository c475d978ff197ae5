"""`condit evaluate folder`: any method's pictures measured, as a page, JSON and CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Weights:
    """Paths or hub names of what rulers read; None: those rulers are left out and named."""

    clip: str | None = None
    csd: str | None = None
    dino: str | None = None
    vgg: str | None = None
    lpips: str | None = None
    inception: str | None = None
    aesthetic: str | None = None


def evaluate_folder(
    output: Path,
    report: Path,
    *,
    content: Path | None = None,
    style: Path | None = None,
    weights: Weights | None = None,
    answers: Sequence[Mapping[str, object]] = (),
    baseline: str | None = None,
    axis: str | None = None,
    seed: int = 0,
) -> dict[str, object]:
    """Measures METHOD/STRENGTH/... under `output`, writes index.html, report.json, figures.csv and values.csv into
    `report`, and returns what report.json holds. answers: those of a preference study. baseline: the method whose
    curve the others are compared with. axis: the ruler of style across."""
    raise NotImplementedError
