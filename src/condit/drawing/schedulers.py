"""Samplers by the names of diffusers and A1111; those that condit does not have run through diffusers' schedulers."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condit.diffusion.steps import Noise, OnStep, Predict, Step, finish_step
from condit.diffusion.vp import Process

TABLE = Path(__file__).parent.parent / "assets" / "samplers.toml"


@dataclass(frozen=True)
class Scheduler:
    """A scheduler of diffusers: its class, its options, and whether it may take Karras' sigmas."""

    cls: str
    options: Mapping[str, object]
    karras: bool = False


@cache
def samplers() -> dict[str, str | Scheduler]:
    """Spelling without case, spaces and signs -> condit's own name, or a scheduler."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    table: dict[str, str | Scheduler] = {}
    for name, row in rows.items():
        if isinstance(row, str):
            table[spelt(name)] = row
            continue
        scheduler = Scheduler(row.pop("class"), {k: v for k, v in row.items() if k != "karras"}, "karras" in row)
        table[spelt(name)] = scheduler
        table.setdefault(spelt(scheduler.cls), scheduler)
        if scheduler.karras:
            options = {**scheduler.options, "use_karras_sigmas": True}
            table[spelt(f"{name} Karras")] = replace(scheduler, options=options)
    return table


def spelt(name: str) -> str:
    """A sampler's name without case and separators: "DPM++ 2M" and "dpm++_2m" are one."""
    return re.sub(r"[\s_-]", "", name.lower())


def find_sampler(name: str, own: Sequence[str]) -> str | Scheduler:
    """One of condit's `own` samplers, or a scheduler, by any name. Raises ValueError with the nearest for others."""
    if name in own:
        return name
    known = samplers()
    if spelt(name) in known:
        return known[spelt(name)]
    displayed = [*own, *tomllib.loads(TABLE.read_text(encoding="utf-8"))]
    near = get_close_matches(spelt(name), {spelt(other): other for other in displayed}, n=1, cutoff=0.5)
    hint = f" Did you mean {next(other for other in displayed if spelt(other) == near[0])!r}?" if near else ""
    raise ValueError(f"sampler must be one of {', '.join(displayed)}; found {name!r}.{hint}")


@dataclass(frozen=True, eq=False)
class SchedulerPath:
    """The steps of a scheduler. level (S + 1,): the share of the image's variance before each step and at the end; x of
    the run has unit variance, as condit's own samplers have it. start: the factor on unit noise. sigmas: whether the
    scheduler's own x is x0 + sigma eps."""

    scheduler: Any
    process: Process
    timesteps: Tensor
    level: Tensor
    sigmas: bool
    start: float = 1.0
    begin: int = 0

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, index: int) -> Step:
        time = float(self.timesteps[index])
        return Step(index, len(self), time / self.process.num_train_timesteps, time)

    def since(self, begin: int) -> SchedulerPath:
        return replace(self, timesteps=self.timesteps[begin:], level=self.level[begin:], begin=self.begin + begin)

    def factor(self, index: int) -> float:
        """What multiplies the scheduler's x before step `index` to give the run's."""
        return float(self.level[index]) ** 0.5 if self.sigmas else 1.0


def scheduler_path(
    found: Scheduler, process: Process, steps: int, timesteps: Sequence[int] | None = None
) -> SchedulerPath:
    """The steps of a scheduler over a process."""
    import diffusers

    if timesteps is not None:
        raise ValueError(f"{found.cls} chooses its own timesteps: leave timesteps= out, or use ddim, dpm++ or euler.")
    kind = getattr(diffusers, found.cls)
    fields = {**asdict(process), **found.options}
    if fields["timestep_spacing"] in (None, "ldm"):
        del fields["timestep_spacing"]
    known = inspect.signature(kind.__init__).parameters
    scheduler = kind(**{name: value for name, value in fields.items() if name in known})
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.double().cpu()
    if hasattr(scheduler, "sigmas"):
        level = 1 / (1 + scheduler.sigmas.double().cpu()[: len(times)].square())
    else:
        level = process.alphas_cumprod.double()[times.long().clamp(0, process.num_train_timesteps - 1)]
    level = torch.cat([level, level.new_ones(1)])
    sigmas = hasattr(scheduler, "is_scale_input_called")
    start = float(scheduler.init_noise_sigma) * (float(level[0]) ** 0.5 if sigmas else 1.0)
    return SchedulerPath(scheduler, process, times, level, sigmas, start)


def run_scheduler(
    predict: Predict,
    x: Tensor,
    path: SchedulerPath,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """x (B, ...) at the path's first level -> at its end. Fresh noise comes from a generator for each image, seeded by
    the image's own noise, so that an image does not depend on its batch."""
    scheduler, accepted = path.scheduler, inspect.signature(path.scheduler.step).parameters
    options: dict[str, object] = {"eta": eta} if "eta" in accepted and eta else {}
    if "generator" in accepted and noise is not None:
        firsts = noise(x).flatten(1)[:, 0].float().cpu().view(torch.int32).tolist()
        options["generator"] = [torch.Generator().manual_seed(first % 2**31) for first in firsts]
    if path.begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(path.begin)
    x = x / path.factor(0)
    times = scheduler.timesteps[path.begin :]
    for i, time in enumerate(times):
        output = predict(scheduler.scale_model_input(x, time), path.step(i))
        x = scheduler.step(output, time, x, return_dict=False, **options)[0]
        factor = path.factor(i + 1)
        moved = x * factor
        after = finish_step(on_step, i, moved, moved)
        x = x if after is moved else after / factor
    return x
