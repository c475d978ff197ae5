"""FlowEdit: editing without inversion (Kulikov et al. 2024, arXiv:2412.08629, Algorithm 1), a method of editing in one
file, for models whose paths are flows: FLUX.1 and `tiny`.

    condit edit apple.png "a red apple" "a green apple" --type none --method ./examples/flowedit.py:FlowEdit

    result = pipe.edit("apple.png", "a red apple", "a green apple", method=FlowEdit(), seed=0)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from condit.diffusion.inversion import interleave
from condit.diffusion.samplers import FlowPath
from condit.drawing.edit import EditRun


@dataclass(frozen=True)
class FlowEdit:
    """start: the share of the steps that are left out at the noisy end, 1 - n_max / T of the paper (FLUX.1: 4 of 28);
    end: the share of the steps, at the clean end, that sample the target alone (n_min / T). average: n_avg, how many
    noises each step averages over."""

    start: float = 0.15
    end: float = 0.0
    average: int = 1
    inverts = False

    def __post_init__(self):
        if not (0 <= self.start < 1 and 0 <= self.end < 1 and self.start + self.end < 1 and self.average >= 1):
            raise ValueError(f"start and end are shares of the steps, below 1 together; average is >= 1; found {self}.")

    def __call__(self, run: EditRun) -> Tensor:
        if not isinstance(run.path, FlowPath):
            raise ValueError("FlowEdit needs a model whose paths are flows: 'tiny' or FLUX.1.")
        sigmas, steps = run.path.sigmas, run.path.steps
        first, last = round(self.start * steps), steps - round(self.end * steps)
        edited = run.source
        for level in range(first, last):
            t, step = sigmas[level], sigmas[level + 1] - sigmas[level]
            direction = torch.zeros_like(edited)
            for _ in range(self.average):
                source = (1 - t) * run.source + t * run.noise()  # Eq. 6
                target = source + (edited - run.source)  # in this order equal prompts give the source bit for bit
                velocities = run.predict(interleave(source, target), level).unflatten(0, (-1, 2))
                direction = direction + (velocities[:, 1] - velocities[:, 0]) / self.average
            edited = bounded(edited + step * direction, run, level)
        if last == steps:
            return edited
        noise, t = run.noise(), sigmas[last]
        x = (1 - t) * run.source + t * noise + (edited - run.source)
        for level in range(last, steps):
            source = (1 - sigmas[level]) * run.source + sigmas[level] * noise
            velocity = run.predict(interleave(source, x), level)[1::2]
            x = x + (sigmas[level + 1] - sigmas[level]) * velocity
        return bounded(x, run, steps - 1)

    def describe(self) -> dict:
        return {"method": "FlowEdit", "start": self.start, "end": self.end, "average": self.average}


def bounded(edited: Tensor, run: EditRun, level: int) -> Tensor:
    """The source where a mask or a region keeps it."""
    mask = run.mask(level)
    return edited if mask is None else run.source + mask * (edited - run.source)
