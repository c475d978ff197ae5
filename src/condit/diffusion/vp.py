"""The discrete variance-preserving process of Stable Diffusion and PixArt, and the levels that a sampler visits.

A level is alpha_bar, the share of the image's variance that is left: x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
(Ho et al. 2020, arXiv:2006.11239, Eq. 4). Samplers that are written for x0 + sigma eps (Karras et al. 2022,
arXiv:2206.00364) run on the same x here, as sigma^2 = (1 - alpha_bar) / alpha_bar. Timesteps and levels are those of
diffusers' schedulers, to the rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from condit.diffusion.gaussian import beta_schedule
from condit.diffusion.steps import Step

Prediction = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "trailing", "linspace", "ldm"]
Solver = Literal["ddim", "dpm++", "euler", "euler-ancestral"]

# Fields of a scheduler's file that are not supported -> the values that do not change the process.
_AS_BUILT: dict[str, tuple] = {
    "trained_betas": (None,),
    "thresholding": (False,),
    "clip_sample": (False,),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "algorithm_type": ("dpmsolver++",),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
}


@dataclass(frozen=True)
class Process:
    """Fields of diffusers' scheduler_config.json; the defaults are Stable Diffusion's, betas and offset.

    timestep_spacing None: that of the solver (leading for DDIM, linspace for the others); "ldm", for DDIM only, is that
    of the first latent diffusion code (see `spaced`). set_alpha_to_one is DDIM's end: the image itself, or level 0 of
    the training. final_sigmas_type, lower_order_final, euler_at_final are those of DPM-Solver++.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"] = "scaled_linear"
    prediction_type: Prediction = "epsilon"
    timestep_spacing: Spacing | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    use_karras_sigmas: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lower_order_final: bool = True
    euler_at_final: bool = False
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        if self.prediction_type not in Prediction.__args__:
            raise ValueError(f"prediction_type must be one of {Prediction.__args__}; found {self.prediction_type!r}.")
        if self.timestep_spacing not in (None, *Spacing.__args__):
            raise ValueError(f"timestep_spacing must be one of {Spacing.__args__}; found {self.timestep_spacing!r}.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Process:
        """From the content of a scheduler_config.json; missing fields have diffusers' defaults."""
        for name, known in _AS_BUILT.items():
            if name in config and config[name] not in known:
                raise ValueError(f"The scheduler has {name} = {config[name]!r}; supported: {known[0]!r}.")
        defaults = {
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "steps_offset": 0,
            "set_alpha_to_one": config.get("_class_name") != "PNDMScheduler",
        }
        values = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        return cls(**{**defaults, **values})

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """Levels (num_train_timesteps,), falling, in float32 as diffusers has them."""
        steps = self.num_train_timesteps
        if self.beta_schedule == "scaled_linear":
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, steps) ** 2
        elif self.beta_schedule == "linear":
            betas = torch.linspace(self.beta_start, self.beta_end, steps)
        elif self.beta_schedule == "squaredcos_cap_v2":
            betas = beta_schedule("squaredcos_cap_v2", steps).float()
        else:
            raise ValueError(
                f"No beta_schedule {self.beta_schedule!r}: 'scaled_linear', 'linear', 'squaredcos_cap_v2'."
            )
        levels = (1 - betas).cumprod(0)
        return zero_terminal_snr(levels) if self.rescale_betas_zero_snr else levels


def with_sampler(process: Process, sampler: str) -> tuple[str, Process]:
    """The solver of a sampler's name, and the process with the levels that the name asks for: "-karras" sigmas, or the
    timesteps and the end of the released samplers of latent diffusion, "ddim-ldm"."""
    if sampler == "ddim-ldm":
        return "ddim", replace(process, timestep_spacing="ldm", set_alpha_to_one=False)
    if sampler.endswith("-karras"):
        return sampler.removesuffix("-karras"), replace(process, use_karras_sigmas=True)
    return sampler, process


def zero_terminal_snr(levels: Tensor) -> Tensor:
    """Levels stretched so that the last is (nearly) noise alone (Lin et al. 2023, arXiv:2305.08891, Alg. 1)."""
    root = levels.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return torch.cat([root[:-1].square(), root.new_full((1,), 2.0**-24)])  # not 0: 1 / alpha_bar must be finite


@dataclass(frozen=True, eq=False)
class VPPath:
    """The S steps of a run. Step i begins at level[i], where the network takes timesteps[i], and ends at after[i]; all
    (S,) float64, on the CPU. `start`: the factor on unit noise at which the run begins."""

    process: Process
    solver: Solver
    timesteps: Tensor
    level: Tensor
    after: Tensor
    start: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, index: int) -> Step:
        time = float(self.timesteps[index])
        return Step(index, len(self), time / self.process.num_train_timesteps, time)

    def rows(self) -> list[tuple[Step, float, float]]:
        """(step, level, after) of each step."""
        ends = zip(self.level.tolist(), self.after.tolist(), strict=True)
        return [(self.step(i), level, after) for i, (level, after) in enumerate(ends)]

    def since(self, begin: int) -> VPPath:
        """The steps from number `begin` on."""
        parts = (part[begin:] for part in (self.timesteps, self.level, self.after))
        return VPPath(self.process, self.solver, *parts, start=self.start)


def make_path(process: Process, solver: Solver, steps: int, *, timesteps: Sequence[int] | None = None) -> VPPath:
    """The steps of a solver over a process, from noise to image. timesteps: these, falling, instead of `steps` that
    are spaced by the process."""
    if timesteps is not None:
        check_timesteps(process, timesteps)
        steps = len(timesteps)
    if not 1 <= steps <= process.num_train_timesteps:
        raise ValueError(f"num_inference_steps must be 1 to {process.num_train_timesteps}; found {steps}.")
    levels = process.alphas_cumprod.double()
    if solver == "ddim":
        return ddim_steps(process, levels, steps, timesteps)
    spacing = process.timestep_spacing or "linspace"
    if spacing == "ldm":
        raise ValueError(f"timestep_spacing 'ldm' is that of DDIM; found the solver {solver!r}.")
    if timesteps is not None:
        times = torch.tensor(timesteps, dtype=torch.float64)
    elif solver == "dpm++":
        # One level more than steps is spaced; the last is left out.
        times = spaced(process, spacing, steps + (spacing != "trailing")).round()[:steps]
    else:
        times = spaced(process, spacing, steps).float().double()
    table = (1 / levels - 1).sqrt().float().double()
    sigmas = interpolate(table, times)
    if process.use_karras_sigmas and solver != "euler-ancestral":
        ends = (table[-1], table[0]) if solver == "dpm++" else (sigmas[0], sigmas[-1])
        sigmas = karras(float(ends[0]), float(ends[1]), steps)
        times = times_of(sigmas, table)
        if solver == "dpm++" and process.beta_schedule != "squaredcos_cap_v2":
            times = times.round()
    last = table[0] if solver != "euler-ancestral" and process.final_sigmas_type == "sigma_min" else 0 * table[0]
    level = 1 / (1 + torch.cat([sigmas, last[None]]).float().double().square())
    start = 1.0 if solver == "dpm++" or spacing == "leading" else float((1 - level.min()).sqrt())
    return VPPath(process, solver, times, level[:-1], level[1:], start)


def step_count(steps: int | None, timesteps: Sequence[int] | None, default: int) -> int:
    """The number of steps. Raises ValueError if a number and a list disagree."""
    if timesteps is None:
        return default if steps is None else steps
    if steps not in (None, len(timesteps)):
        raise ValueError(f"num_inference_steps is {steps}, but timesteps has {len(timesteps)}: leave one of them out.")
    return len(timesteps)


def check_timesteps(process: Process, timesteps: Sequence[int]) -> None:
    """Raises ValueError unless they are a falling list of the process's timesteps."""
    last = process.num_train_timesteps - 1
    falling = all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))
    if not len(timesteps) or not falling or timesteps[-1] < 0 or timesteps[0] > last:
        raise ValueError(f"timesteps must be a falling list of numbers from {last} to 0; found {list(timesteps)}.")
    if process.use_karras_sigmas:
        raise ValueError("Karras sigmas choose their own timesteps: leave timesteps= out, or use another sampler.")


def ddim_steps(process: Process, levels: Tensor, steps: int, timesteps: Sequence[int] | None) -> VPPath:
    """DDIM's steps. Spaced by diffusers' rules a step goes T // steps back; otherwise it ends where the next begins."""
    end = levels.new_tensor(1.0) if process.set_alpha_to_one else levels[0]
    if timesteps is not None or process.timestep_spacing == "ldm":
        times = spaced(process, "ldm", steps) if timesteps is None else torch.tensor(timesteps, dtype=torch.float64)
        level = levels[times.long()]
        return VPPath(process, "ddim", times, level, torch.cat([level[1:], end[None]]))
    times = spaced(process, process.timestep_spacing or "leading", steps).round()
    before = times.long() - process.num_train_timesteps // steps
    after = torch.where(before < 0, end, levels[before.clamp(min=0)])
    return VPPath(process, "ddim", times, levels[times.long()], after)


def spaced(process: Process, spacing: Spacing, steps: int) -> Tensor:
    """Timesteps (steps,), falling, float64 (Lin et al. 2023, arXiv:2305.08891, Table 2).

    "ldm" is the rule of the released samplers of latent diffusion, DEADiff's among them: every T // steps up to T, plus
    one. If steps does not divide T these are more than `steps` (7 of 1000: 995, 853, ..., 1, which are 8).
    """
    total, n = process.num_train_timesteps, torch.arange(steps, dtype=torch.float64)
    if spacing == "ldm":
        times = torch.arange(0, total, total // steps, dtype=torch.float64).flip(0) + 1
        if times[0] >= total:
            # The released code reads beyond its table here and fails.
            raise ValueError(f"The spacing 'ldm' has no {steps} steps: they would begin at {times[0]:g} of {total}.")
        return times
    if spacing == "linspace":
        return (n * ((total - 1) / max(steps - 1, 1))).flip(0)
    if spacing == "leading":
        return (n * (total // steps)).flip(0) + process.steps_offset
    return (total - n * (total / steps)).round() - 1


def interpolate(table: Tensor, times: Tensor) -> Tensor:
    """Entries of a table (T,) at real numbered places (S,), the ends kept beyond them."""
    times = times.clamp(0, len(table) - 1)
    low = times.floor().long().clamp(max=len(table) - 2)
    return table[low] + (times - low) * (table[low + 1] - table[low])


def karras(highest: float, lowest: float, steps: int, *, rho: float = 7.0) -> Tensor:
    """Sigmas (steps,), falling (Karras et al. 2022, arXiv:2206.00364, Eq. 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (highest ** (1 / rho) + ramp * (lowest ** (1 / rho) - highest ** (1 / rho))) ** rho


def times_of(sigmas: Tensor, table: Tensor) -> Tensor:
    """The places of sigmas in a rising table (T,), in between by their logarithms."""
    logs, places = table.log(), sigmas.clamp(min=1e-10).log()
    low = (torch.searchsorted(logs, places, right=True) - 1).clamp(0, len(table) - 2)
    return low + ((places - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, 1)


def add_noise(x0: Tensor, noise: Tensor, level: Tensor | float) -> Tensor:
    """x at a level, for images (B, ...)."""
    level = float(level)
    return level**0.5 * x0 + (1 - level) ** 0.5 * noise


def training_pair(process: Process, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x at the timesteps t (B,), and what a network is to predict from it: the noise, or v = sqrt(alpha_bar) eps -
    sqrt(1 - alpha_bar) x0 (Salimans and Ho 2022, arXiv:2202.00512); both (B, C, h, w)."""
    if process.prediction_type == "sample":
        raise ValueError("Networks are trained to predict the noise or v here; found prediction_type 'sample'.")
    level = process.alphas_cumprod[t].to(x0)[:, None, None, None]
    x = level.sqrt() * x0 + (1 - level).sqrt() * noise
    return x, noise if process.prediction_type == "epsilon" else level.sqrt() * noise - (1 - level).sqrt() * x0
