"""Inversion: from an image to noise whose sampling reproduces it, and edits along that path.

DDIM inversion (Dhariwal & Nichol 2021, arXiv:2105.05233, appendix F), DPM-Solver++ 2M backwards (Lu et al. 2022,
arXiv:2211.01095, Alg. 2), exact inversion of 2M (Hong et al. 2023, arXiv:2311.18387), rectified flow backwards, and the
stored trajectory of DiT4Edit here (in the manner of Ju et al. 2023, arXiv:2310.01506).

A *path* is a sequence of noise levels 0 ... S, level 0 the noisiest and level S the image. Samplers walk it down (to
larger numbers), inversion walks it up. `network(x, t)` predicts noise on a `NoisePath`, velocity on a `FlowPath`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from condit.diffusion.samplers import FlowPath
from condit.diffusion.steps import Step
from condit.diffusion.vp_samplers import ddim_step, estimate

Network = Callable[[Tensor, float], Tensor]
Solver = Literal["first_order", "dpmpp2m", "entered", "fixed_point", "exact2m"]


class EditPath(Protocol):
    """Noise levels and the step between two of them."""

    @property
    def steps(self) -> int: ...

    def time(self, level: int) -> float: ...

    # The step of a sampler that begins at a level.
    def step(self, index: int) -> Step: ...

    # A step of its own at any time.
    def at(self, time: float) -> Step: ...

    def kept(self, x: Tensor, output: Tensor, level: int) -> Tensor: ...

    def move(self, x: Tensor, output: Tensor, start: int, end: int, earlier: Earlier | None = None) -> Tensor: ...

    def multistep(self, start: int, end: int) -> bool: ...


@dataclass(frozen=True)
class Earlier:
    """What a multistep solver stores: the clean estimate at an earlier level."""

    kept: Tensor
    level: int


@dataclass(frozen=True)
class NoisePath:
    """Variance-preserving diffusion: x_t = alpha x_0 + sigma noise at each level, and the network's timestep there.

    ratios (S + 1,) are sigma / alpha in float32, falling. order 2 is DPM-Solver++ 2M (midpoint), 1 is DDIM. to_zero:
    samplers end at sigma = 0, below the last level, where inversion begins (diffusers' `final_sigmas_type="zero"`).
    """

    ratios: Tensor
    times: tuple[float, ...]
    cumprod: Tensor
    order: int = 2
    to_zero: bool = False

    @property
    def steps(self) -> int:
        return len(self.ratios) - 1

    def time(self, level: int) -> float:
        return self.times[level]

    def step(self, index: int) -> Step:
        return Step(index, self.steps, self.times[index] / len(self.cumprod), self.times[index])

    def at(self, time: float) -> Step:
        return Step(0, 1, time / len(self.cumprod), time)

    def ratio(self, level: int, *, ending: bool = False) -> Tensor:
        """sigma / alpha of a level, 0-d; `ending`: where a sampler ends."""
        zero = ending and self.to_zero and level == self.steps
        return torch.zeros(()) if zero else self.ratios[level]

    def kept(self, x: Tensor, output: Tensor, level: int) -> Tensor:
        """The clean estimate D = (x - sigma eps) / alpha."""
        alpha, sigma = alpha_sigma(self.ratio(level))
        return (x - sigma * output) / alpha

    def multistep(self, start: int, end: int) -> bool:
        """Whether 2M takes its second-order step from start to end; the first step never does.

        The last one does not below 15 steps, nor down to sigma = 0, where the step is infinite in log-SNR.
        """
        last = end in (0, self.steps)
        return self.order == 2 and not (last and (self.steps < 15 or (self.to_zero and end == self.steps)))

    def move(self, x: Tensor, output: Tensor, start: int, end: int, earlier: Earlier | None = None) -> Tensor:
        """x at `end` from noise prediction `output` at `start`: DDIM; 2M's first step, or with `earlier` its second.

        With l = log(alpha / sigma), h = l_end - l_start, r = (l_start - l_earlier) / h:
        x_end = sigma_end / sigma_start x - alpha_end (e^-h - 1) (D + (D - D_earlier) / (2 r)).
        """
        ratio, ratio_end = self.ratio(start), self.ratio(end, ending=end > start)
        if self.order == 1:
            return first_order(x, output, ratio, ratio_end)
        (_, s), (a_end, s_end) = alpha_sigma(ratio), alpha_sigma(ratio_end)
        h = log_snr(ratio_end) - log_snr(ratio)
        # Terms and float32 as in diffusers: near t = 0 large terms cancel, so that `vp_samplers.dpm_step`, which is
        # exact, differs by 2e-5 on the way up.
        weight, clean = a_end * (torch.exp(-h) - 1.0), self.kept(x, output, start)
        moved = (s_end / s) * x - weight * clean
        if earlier is None:
            return moved
        r = (log_snr(ratio) - log_snr(self.ratio(earlier.level))) / h
        return moved - 0.5 * weight * ((1.0 / r) * (clean - earlier.kept))

    def between(self, time: float) -> Tensor:
        """sigma / alpha at any timestep, linear between the trained ones, as in diffusers."""
        ratios = ((1 - self.cumprod) / self.cumprod).sqrt()
        low = min(int(time), len(ratios) - 2)
        return torch.lerp(ratios[low], ratios[low + 1], time - low)


def alpha_sigma(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma, alpha^2 + sigma^2 = 1."""
    alpha = 1 / (ratio**2 + 1).sqrt()
    return alpha, ratio * alpha


def log_snr(ratio: Tensor) -> Tensor:
    """l = log(alpha / sigma) as diffusers rounds it."""
    alpha, sigma = alpha_sigma(ratio)
    return alpha.log() - sigma.log()


def level_of(ratio: Tensor) -> float:
    """alpha_bar of sigma / alpha."""
    return float(1 / (1 + ratio.double() ** 2))


def first_order(x: Tensor, noise: Tensor, ratio: Tensor, ratio_end: Tensor) -> Tensor:
    """DDIM between two levels, up or down."""
    level = level_of(ratio)
    return ddim_step(estimate(noise, x, level, "epsilon"), level, level_of(ratio_end))


def noise_path(cumprod: Tensor, times: Tensor, order: int, to_zero: bool) -> NoisePath:
    chosen = cumprod[times]
    return NoisePath(((1 - chosen) / chosen).sqrt().float(), tuple(map(float, times.tolist())), cumprod, order, to_zero)


def dpm_path(cumprod: Tensor, steps: int, *, order: int = 2, to_zero: bool = True) -> NoisePath:
    """Levels of DPM-Solver++ ("linspace" spacing): timesteps 999 ... 0, rounded; level S is t = 0."""
    check_steps(steps, len(cumprod))
    # Rounded on the way up, as diffusers does.
    times = torch.linspace(0, len(cumprod) - 1, steps + 1, dtype=torch.float64).round().long().flip(0)
    return noise_path(cumprod, times, order, to_zero)


def ddim_path(cumprod: Tensor, steps: int) -> NoisePath:
    """Levels of diffusers' DDIM pair ("leading" spacing, offset 0): 900, 800, ..., 0 for ten steps; the image has the
    last one's level too.

    It never reaches t = 999, so its round trip is easier than on `dpm_path`. Invert it with solver "entered".
    """
    check_steps(steps, len(cumprod))
    times = torch.arange(steps).flip(0) * (len(cumprod) // steps)
    return noise_path(cumprod, torch.cat([times, times[-1:]]), 1, False)


def check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"num_inference_steps must be 1 to {most}; found {steps}.")


def walk(network: Network, x: Tensor, path: EditPath) -> Tensor:
    """Sample: from level 0 down to level S. Returns all levels, (S + 1, ...)."""
    levels, earlier = [x], None
    for level in range(path.steps):
        out = network(x, path.time(level))
        use = earlier if path.multistep(level, level + 1) else None
        following = path.move(x, out, level, level + 1, use)
        earlier, x = Earlier(path.kept(x, out, level), level), following
        levels.append(x)
    return torch.stack(levels)


def invert(
    network: Network,
    x0: Tensor,
    path: EditPath,
    solver: Solver = "dpmpp2m",
    *,
    iterations: int = 3,
    fine: int = 5,
    rho: float = 1.0,
) -> Tensor:
    """From the image up to the noise. Returns all levels (S + 1, ...), the noisiest first, the last of them x0.

    "first_order": explicit, one network call at the level before the step. "dpmpp2m": 2M with the levels already
    passed, as diffusers' `DPMSolverMultistepInverseScheduler`. "entered": one call at the level after it, as diffusers'
    DDIM inversion. "fixed_point": x <- step(x0, network(x)), `iterations` times after an explicit estimate. "exact2m":
    `exact_step`, with `fine` steps of DDIM a level and `iterations` corrections by `rho`. Network calls a level: 1, 1,
    1, 1 + iterations, 2 fine + 1 + iterations."""
    if isinstance(path, FlowPath) and solver in ("dpmpp2m", "exact2m"):
        raise ValueError(
            f"{solver!r} inverts a diffusion of noise; a flow takes 'first_order', 'entered' or 'fixed_point'."
        )
    if solver not in ("first_order", "dpmpp2m", "entered", "fixed_point", "exact2m"):
        raise ValueError(f"No solver {solver!r}: first_order, dpmpp2m, entered, fixed_point or exact2m.")
    x, levels, earlier = x0, [x0], None
    for level in range(path.steps, 0, -1):
        if solver == "exact2m":
            assert isinstance(path, NoisePath)
            x = exact_step(network, x, path, level, fine=fine, iterations=iterations, rho=rho)
        elif solver == "entered":
            x = path.move(x, network(x, path.time(level - 1)), level, level - 1)
        else:
            out = network(x, path.time(level))
            second = solver == "dpmpp2m" and path.multistep(level, level - 1)
            following = path.move(x, out, level, level - 1, earlier if second else None)
            earlier = Earlier(path.kept(x, out, level), level)
            for _ in range(iterations if solver == "fixed_point" else 0):
                following = path.move(x, network(following, path.time(level - 1)), level, level - 1)
            x = following
        levels.append(x)
    return torch.stack(levels[::-1])


def exact_step(
    network: Network, x: Tensor, path: NoisePath, level: int, *, fine: int, iterations: int, rho: float
) -> Tensor:
    """The x at level - 1 from which 2M steps to `x` at `level` (Hong et al. 2023, section 4).

    The step down also uses D at level - 2, which fine DDIM steps upwards estimate. Then x <- x - rho (F(x) -
    x_level) with F the step down, and a smaller rho in rows whose residual grows.
    """
    guess = fine_ddim(network, x, path, path.time(level), path.time(level - 1), fine)
    earlier = None
    if level >= 2 and path.multistep(level - 1, level):
        above = fine_ddim(network, guess, path, path.time(level - 1), path.time(level - 2), fine)
        earlier = Earlier(path.kept(above, network(above, path.time(level - 2)), level - 2), level - 2)
    best, least, step = guess, torch.full_like(row_norm(guess), torch.inf), torch.full_like(row_norm(guess), rho)
    pull = torch.zeros_like(guess)  # F(best) - x
    for _ in range(iterations):
        down = path.move(guess, network(guess, path.time(level - 1)), level - 1, level, earlier)
        residual = row_norm(down - x)
        better = residual < least
        # A row whose residual grew goes back to its best x and tries half the step: F may be steep between modes.
        step = torch.where(better, step, step / 2)
        best, pull = torch.where(better, guess, best), torch.where(better, down - x, pull)
        least = torch.where(better, residual, least)
        guess = best - step * pull
    return guess


def row_norm(x: Tensor) -> Tensor:
    """(B, ...) -> (B, 1, ...): the norm of each row."""
    return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))


def fine_ddim(network: Network, x: Tensor, path: NoisePath, start: float, end: float, count: int) -> Tensor:
    """Explicit DDIM between two timesteps in `count` steps."""
    times = torch.linspace(start, end, count + 1, dtype=torch.float64).tolist()
    for now, following in zip(times[:-1], times[1:], strict=True):
        x = first_order(x, network(x, now), path.between(now), path.between(following))
    return x


def round_trip_error(trajectory: Tensor, again: Tensor) -> tuple[Tensor, Tensor]:
    """The error of `walk` from a trajectory's noise: root mean square (B,), and PSNR in dB
    with the image's range as peak (B,)."""
    x0, back = trajectory[-1].flatten(1).float(), again[-1].flatten(1).float()
    error = (back - x0).square().mean(1)
    peak = x0.amax(1) - x0.amin(1)
    return error.sqrt(), 10 * (peak.square() / error.clamp(min=1e-20)).log10()


def edit_along(
    predict: Callable[[Tensor, int], Tensor],
    trajectory: Tensor,
    path: EditPath,
    *,
    anchored: bool = True,
    mask: Callable[[int], Tensor | None] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample a target next to a source that follows its stored trajectory (S + 1, B, ...); returns the target (B, ...).

    predict(x, level) sees sources and targets in turn, (2 B, ...): source 0, target 0, source 1, ... The source is set
    back to the trajectory in every step. `anchored`: the target gets the same correction, so it moves by the difference
    of the two predictions, and where both are equal the target is the source, bit for bit. mask(level): where the
    target may differ after this step, (B, ...) in [0, 1], or None; it applies to the solver's memory too.
    """
    target, earlier = trajectory[0], None
    for level in range(path.steps):
        x = interleave(trajectory[level], target)
        out = predict(x, level)
        use = earlier if path.multistep(level, level + 1) else None
        source_end, target = path.move(x, out, level, level + 1, use).unflatten(0, (-1, 2)).unbind(1)
        kept = path.kept(x, out, level)
        if anchored:
            target = trajectory[level + 1] + (target - source_end)
        where = None if mask is None else mask(level)
        if where is not None:
            target = trajectory[level + 1] + where * (target - trajectory[level + 1])
            source_kept, target_kept = kept.unflatten(0, (-1, 2)).unbind(1)
            kept = interleave(source_kept, source_kept + where * (target_kept - source_kept))
        earlier = Earlier(kept, level)
        if on_step is not None:
            on_step(level, target)
    return target


def interleave(source: Tensor, target: Tensor) -> Tensor:
    """(B, ...) twice -> (2 B, ...): source 0, target 0, source 1, ..."""
    return torch.stack([source, target], 1).flatten(0, 1)
