"""Calls that share a batch: the network computes all their rows at once, and each row equals that of a call of its own.

A `Draft` is a call that is checked and prepared. Its references, text and noise are made for it alone; only the steps
are shared, so a draft does not depend on which others it meets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from condit.controls.control import Control, Fill
from condit.controls.wrap import sides as joined_sides
from condit.diffusion.steps import Noise, OnStep, Path, Predict, Step
from condit.drawing.model import Layout, Model, Sampler, Side
from condit.drawing.repaint import Reader, Start, repainted
from condit.drawing.settings import Settings

# What acts on a whole batch: tokens in the sequence, cells left out, a low-rank update, merged tokens.
SHARED = frozenset({"join", "omit", "adapt", "merge"})


class Guided(NamedTuple):
    """The sides of a call's guidance. extra: channels that an inpainting model reads with the latents."""

    sides: Sequence[Side]
    layout: Layout
    settings: Settings
    extra: Tensor | None = None


class Walker(Reader, Protocol):
    """The pipeline of drafts."""

    def noise(self, layout: Layout, generators: Sequence[torch.Generator]) -> Noise: ...


@dataclass(frozen=True)
class Draft:
    """A call before its first step. recipe: of its images; guidance: the scale, where the network reads it (FLUX)."""

    guided: Guided
    sampler: Sampler
    path: Path
    start: Start
    generators: Sequence[torch.Generator]
    seeds: list[int | None]
    fill: Fill | None
    recipe: dict
    guidance: float | None = None

    @property
    def rows(self) -> int:
        """The number of its images."""
        return self.guided.layout.batch

    @property
    def alone(self) -> bool:
        """Whether it needs a batch of its own, because a control acts on all rows."""
        controls = [control for side in self.guided.sides for control in side.controls]
        return any(control.acts & SHARED for control in controls) or self.fill is not None

    def fits(self, other: Draft) -> bool:
        """Whether both may share a batch: same size, steps and sampler, and text of the same length. Prompts, seeds,
        guidance, controls and images may differ."""
        if self.alone or other.alone or len(self.path) != len(other.path) or self.guidance != other.guidance:
            return False
        mine, theirs = (
            replace(d.guided.settings, guidance_scale=None, image_guidance_scale=None, strength=None, copies=1)
            for d in (self, other)
        )
        conditions = [d.guided.sides[0].condition for d in (self, other)]
        shapes = [getattr(c, "tokens", c) for c in conditions]
        return mine == theirs and (shapes[0] is None or shapes[0].shape[1:] == shapes[1].shape[1:])


def predictor(model: Model, calls: Sequence[Guided], dropped: Collection[int] = ()) -> Predict:
    """predict(x, step): the guided predictions for the rows of all calls, the only call to the network. Calls whose
    number is in `dropped` are not computed; their rows are 0."""
    counts = [call.layout.batch for call in calls]

    @cache
    def network(parts: tuple[tuple[int, int], ...]):
        first, chosen = calls[parts[0][0]], [calls[number] for number, _ in parts]
        extra = [call.extra for call in chosen if call.extra is not None]
        conditions = [calls[number].sides[side].condition for number, side in parts]
        return model.network(conditions, first.layout, first.settings, torch.cat(extra) if extra else None)

    def predict(x: Tensor, step: Step) -> Tensor:
        rows = x.split(counts)
        active = {
            (number, i): [c for c in (control.at(step) for control in side.controls) if c is not None]
            for number, call in enumerate(calls)
            if number not in dropped
            for i, side in enumerate(call.sides)
        }
        outputs: dict[tuple[int, int], Tensor] = {}
        for parts in together(model, calls, active):
            sizes = [counts[number] for number, _ in parts]
            controls = [active[part] for part in parts]
            joined = controls[0] if len(parts) == 1 else joined_sides(controls, sizes)
            output = network(parts)(torch.cat([rows[number] for number, _ in parts]), step, joined)
            outputs |= zip(parts, output.split(sizes), strict=True)
        guided: dict[int, Tensor] = {}
        for number, call in enumerate(calls):
            of_sides = [outputs[part] for part in active if part[0] == number]
            if of_sides:
                several = len(of_sides) > 1
                guided[number] = model.guide(of_sides, step, call.settings) if several else of_sides[0]
        shape = next(iter(guided.values())).shape[1:]
        return torch.cat([guided.get(i, x.new_zeros(count, *shape)) for i, count in enumerate(counts)])

    return predict


def together(
    model: Model, calls: Sequence[Guided], active: Mapping[tuple[int, int], Sequence[Control]]
) -> list[tuple[tuple[int, int], ...]]:
    """The (call, side) pairs of each run of the network: all of them, or those of each side of the guidance in turn."""
    acts = frozenset().union(*(control.acts for controls in active.values() for control in controls))
    # A LoRA applies to all rows of a batch, merged tokens are those of one side: the sides then run in turn.
    if model.joins(calls[0].settings, acts):
        return [tuple(active)]
    numbers = sorted({side for _, side in active})
    return [tuple(part for part in active if part[1] == number) for number in numbers]


def walk(
    pipe: Walker, drafts: Sequence[Draft], on_step: OnStep | None = None, dropped: Collection[int] = ()
) -> list[Tensor]:
    """Latents of each draft, generated in one batch. on_step receives the rows of all drafts in order, and may add the
    numbers of drafts to `dropped`: they are not computed from the next step on. The drafts must fit each other."""
    first, counts = drafts[0], [draft.rows for draft in drafts]
    path, repaints = first.path, any(draft.start.kept is not None for draft in drafts)

    def after(i: int, x: Tensor, x0: Tensor) -> Tensor:
        if repaints:
            parts = zip(drafts, x.split(counts), strict=True)
            x = torch.cat([repainted(pipe, rows, draft.start, path, i) for draft, rows in parts])
        replaced = None if on_step is None else on_step(i, x, x0)
        return x if replaced is None else replaced

    predict = predictor(pipe.model, [draft.guided for draft in drafts], dropped)
    noise = pipe.noise(first.guided.layout, [g for draft in drafts for g in draft.generators])
    eta = first.guided.settings.eta or 0.0
    start = torch.cat([draft.start.x for draft in drafts])
    x = first.sampler(predict, start, path, eta=eta, noise=noise, on_step=after)
    return [x if first.fill is None else first.fill.complete(x)] if len(drafts) == 1 else list(x.split(counts))
