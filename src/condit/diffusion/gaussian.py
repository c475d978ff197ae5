"""Gaussian diffusion with learned variances, as DiT trains and samples it (Peebles & Xie 2022, arXiv:2212.09748).

The process is that of DDPM (Ho et al. 2020, arXiv:2006.11239) with the learned variances and the hybrid loss of Nichol
& Dhariwal 2021 (arXiv:2102.09672) and the sampler of DDIM (Song et al. 2020, arXiv:2010.02502). Time has two names: `i`
counts the steps of a (respaced) process from its clean end; `t = process.timesteps[i]` is the network's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from condit.diffusion.steps import Step

TRAINED_STEPS = 1000

Schedule = Literal["linear", "squaredcos_cap_v2", "quad", "const", "jsd", "warmup10", "warmup50"]
Prediction = Literal["noise", "x0"]
Variance = Literal["learned", "bounded", "large", "small"]
LossKind = Literal["mse", "rescaled_mse", "kl", "rescaled_kl"]

# denoise(x, t): images (B, C, H, W) and timesteps (B,) int64 of the trained process -> the network's output.
Denoise = Callable[[Tensor, Tensor], Tensor]


def beta_schedule(name: Schedule = "linear", steps: int = 1000) -> Tensor:
    """Noise variances (steps,) in float64. The ends 1e-4 and 0.02 of 1000 steps are scaled by 1000 / steps."""
    if steps < 1:
        raise ValueError(f"A diffusion process needs at least 1 step; found {steps}.")
    start, end = 1e-4 * 1000 / steps, 0.02 * 1000 / steps
    if name == "linear":
        return _line(start, end, steps)
    if name == "quad":
        return _line(start**0.5, end**0.5, steps) ** 2
    if name == "const":
        return _line(end, end, steps)
    if name == "jsd":
        return 1 / _line(steps, 1, steps)
    if name in ("warmup10", "warmup50"):
        rising = int(steps * int(name.removeprefix("warmup")) / 100)
        return torch.cat([_line(start, end, rising), _line(end, end, steps - rising)])
    if name == "squaredcos_cap_v2":  # arXiv:2102.09672, Eq. 17; never used by DiT's releases

        def alpha_bar(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)]
        return torch.tensor(betas, dtype=torch.float64)
    raise ValueError(f"No noise schedule {name!r}; there are {', '.join(Schedule.__args__)}.")


def _line(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


def respaced_timesteps(steps: int, respacing: str | Sequence[int] | None) -> tuple[int, ...]:
    """The timesteps that a shorter process keeps, rising. None or "": all.

    "250": 250 spread evenly, both ends included. "10,15,20": so many in each of three equal sections. "ddim50": every
    n-th from 0, with the whole n that gives exactly 50.
    """
    if respacing is None or respacing == "":
        return tuple(range(steps))
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        count = _whole(respacing.removeprefix("ddim"), respacing)
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == count:
                return tuple(range(0, steps, stride))
        raise ValueError(f"No whole stride over {steps} timesteps gives {count} of them ({respacing!r}).")
    counts = [_whole(part, respacing) for part in (respacing.split(",") if isinstance(respacing, str) else respacing)]
    kept: list[int] = []
    begin = 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"Section {section + 1} of {respacing!r} has {size} timesteps; {count} cannot be kept.")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):  # summed, not multiplied: the official rounding depends on it
            kept.append(begin + round(position))
            position += stride
        begin += size
    return tuple(kept)


def _whole(text: str | int, respacing: object) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"Respacing is '250', '10,15,20' or 'ddim50'; found {respacing!r}.") from None


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A process of N steps: betas (N,) float64 and the timestep (N,) int64 that is the network's input at each.

    predicts: what the network's first C channels are. variance: "learned" (C further channels interpolate between the
    two bounds, or extrapolate), "bounded" (the same, kept between them), or one of the bounds: "large" (beta) or
    "small" (that of the posterior). All tables stay in float64."""

    betas: Tensor
    timesteps: Tensor
    predicts: Prediction = "noise"
    variance: Variance = "learned"

    def __len__(self) -> int:
        return len(self.betas)

    def step(self, index: int) -> Step:
        """Step `index` of a sampler, which begins at the noisy end."""
        time = float(self.timesteps[len(self) - 1 - index])
        return Step(index, len(self), time / TRAINED_STEPS, time)

    def since(self, begin: int) -> Gaussian:
        """The process without its `begin` noisiest levels. Raises ValueError if fewer than 2 levels are left."""
        kept = len(self) - begin
        if kept < 2:
            raise ValueError(f"{kept} of {len(self)} steps is left, and 2 are needed. Raise strength or the steps.")
        return replace(self, betas=self.betas[:kept], timesteps=self.timesteps[:kept])

    @property
    def learns_variance(self) -> bool:
        """Whether the network puts out 2 C channels."""
        return self.variance in ("learned", "bounded")

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        return (1 - self.betas).cumprod(0)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        return torch.cat([self.betas.new_ones(1), self.alphas_cumprod[:-1]])

    @cached_property
    def alphas_cumprod_next(self) -> Tensor:
        return torch.cat([self.alphas_cumprod[1:], self.betas.new_zeros(1)])

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> Tensor:
        return (1 / self.alphas_cumprod).sqrt()

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> Tensor:
        return (1 / self.alphas_cumprod - 1).sqrt()

    @cached_property
    def posterior_variance(self) -> Tensor:
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> Tensor:
        """Entry 0, the logarithm of 0, is replaced by entry 1."""
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @cached_property
    def large_variance(self) -> Tensor:
        """beta, with the posterior's entry 1 first: beta_0 is not a bound of the last step."""
        return torch.cat([self.posterior_variance[1:2], self.betas[1:]])

    @cached_property
    def posterior_mean_coef1(self) -> Tensor:
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Tensor:
        return (1 - self.alphas_cumprod_prev) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)


def gaussian(
    schedule: Schedule = "linear",
    *,
    steps: int = 1000,
    respacing: str | Sequence[int] | None = None,
    predicts: Prediction = "noise",
    variance: Variance = "learned",
) -> Gaussian:
    """DiT's process. Training: the defaults; sampling: respacing="250" (ancestral) or "ddim50" and the like."""
    for name, value, known in (
        ("predicts", predicts, get_args(Prediction)),
        ("variance", variance, get_args(Variance)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; found {value!r}.")
    kept = torch.tensor(respaced_timesteps(steps, respacing))
    if len(kept) < 2:
        raise ValueError(
            f"At least 2 steps are needed, as the first step's variance is the second's; found {len(kept)}."
        )
    remaining = (1 - beta_schedule(schedule, steps)).cumprod(0)[kept]
    before = torch.cat([remaining.new_ones(1), remaining[:-1]])
    return Gaussian(1 - remaining / before, kept, predicts, variance)


def at(table: Tensor, i: Tensor, x: Tensor) -> Tensor:
    """Entries i (B,) of a table in float32 on x's device, shaped to broadcast against x (B, ...).

    i may be on the CPU, which has float64 everywhere, or on x's device. For i of no dimension the entry stays where i
    is: on the CPU it is a number to x's device, and nothing is copied in a step.
    """
    if i.ndim == 0:
        return table.to(i.device)[i].float()
    return table.to(i.device)[i].float().to(x.device).reshape(-1, *[1] * (x.ndim - 1))


def add_noise(process: Gaussian, x0: Tensor, i: Tensor, noise: Tensor) -> Tensor:
    """q(x_i | x0): sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise."""
    alpha_bar = process.alphas_cumprod
    return at(alpha_bar.sqrt(), i, x0) * x0 + at((1 - alpha_bar).sqrt(), i, x0) * noise


@dataclass(frozen=True)
class Normal:
    """A Gaussian over images; all broadcast to (B, C, H, W). `x0` is the estimate of the image that it is built on."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0: Tensor


def posterior(process: Gaussian, x0: Tensor, x: Tensor, i: Tensor) -> Normal:
    """q(x_{i-1} | x_i, x0)."""
    return Normal(
        mean=at(process.posterior_mean_coef1, i, x) * x0 + at(process.posterior_mean_coef2, i, x) * x,
        variance=at(process.posterior_variance, i, x),
        log_variance=at(process.posterior_log_variance_clipped, i, x),
        x0=x0,
    )


def reverse(process: Gaussian, output: Tensor, x: Tensor, i: Tensor, *, clip: bool = False) -> Normal:
    """p(x_{i-1} | x_i) from the network's output (B, C or 2 C, H, W). clip: x0 to [-1, 1], for pixels, not latents."""
    check_output(process, output, x)
    prediction = output[:, : x.shape[1]].float()
    if process.learns_variance:
        fraction = (output[:, x.shape[1] :].float() + 1) / 2  # -1 ... 1 in training; the official code does not clamp
        fraction = fraction.clamp(0, 1) if process.variance == "bounded" else fraction
        low, high = at(process.posterior_log_variance_clipped, i, x), at(process.betas.log(), i, x)
        log_variance = fraction * high + (1 - fraction) * low
        variance = log_variance.exp()
    elif process.variance == "large":
        variance, log_variance = at(process.large_variance, i, x), at(process.large_variance.log(), i, x)
    else:
        variance = at(process.posterior_variance, i, x)
        log_variance = at(process.posterior_log_variance_clipped, i, x)
    x0 = prediction
    if process.predicts == "noise":
        x0 = at(process.sqrt_recip_alphas_cumprod, i, x) * x
        x0 = x0 - at(process.sqrt_recipm1_alphas_cumprod, i, x) * prediction
    if clip:
        x0 = x0.clamp(-1, 1)
    return Normal(posterior(process, x0, x, i).mean, variance, log_variance, x0)


def check_output(process: Gaussian, output: Tensor, x: Tensor) -> None:
    """Raises ValueError unless a network's output has the channels that the process's kind of variance needs."""
    channels = x.shape[1] * (2 if process.learns_variance else 1)
    if output.shape != (x.shape[0], channels, *x.shape[2:]):
        raise ValueError(
            f"With variance {process.variance!r} the network must put out {(x.shape[0], channels, *x.shape[2:])} for "
            f"{tuple(x.shape)}; found {tuple(output.shape)}. The network's learn_sigma must fit the process's variance."
        )


# Losses


@dataclass(frozen=True)
class Loss:
    """Of each image, (B,) float32. `loss` is what is trained; mse and vb are its parts, None if there are none."""

    loss: Tensor
    mse: Tensor | None = None
    vb: Tensor | None = None


def training_loss(
    denoise: Denoise, process: Gaussian, x0: Tensor, i: Tensor, noise: Tensor, *, kind: LossKind = "mse"
) -> Loss:
    """The hybrid loss at steps i (B,): squared error, plus the variational bound in bits where the variance is learned.

    The bound sees the mean detached, so it trains the variance alone (arXiv:2102.09672, section 3.1). "rescaled_mse"
    weights it by N / 1000; "kl" is the bound alone, through mean and variance, and "rescaled_kl" N times that.
    """
    x = add_noise(process, x0, i, noise)
    output = denoise(x, process.timesteps.to(i.device)[i].to(x.device)).float()
    check_output(process, output, x)
    if kind in ("kl", "rescaled_kl"):
        vb = variational_bound(process, output, x0, x, i)
        return Loss(vb * len(process) if kind == "rescaled_kl" else vb)
    prediction, variance = output.split([x.shape[1], output.shape[1] - x.shape[1]], 1)
    mse = _mean((prediction - (noise if process.predicts == "noise" else x0)).square())
    if not process.learns_variance:
        return Loss(mse, mse)
    vb = variational_bound(process, torch.cat([prediction.detach(), variance], 1), x0, x, i)
    if kind == "rescaled_mse":
        vb = vb * (len(process) / 1000)
    return Loss(mse + vb, mse, vb)


def variational_bound(process: Gaussian, output: Tensor, x0: Tensor, x: Tensor, i: Tensor) -> Tensor:
    """One term of the bound, (B,), in bits per dimension: KL(q || p), at i = 0 the decoder's -log p(x0 | x)."""
    true, predicted = posterior(process, x0, x, i), reverse(process, output, x, i)
    kl = _mean(kl_normal(true.mean, true.log_variance, predicted.mean, predicted.log_variance))
    nll = _mean(decoder_nll(x0, predicted.mean, 0.5 * predicted.log_variance))
    return torch.where(i.to(x.device) == 0, nll, kl) / math.log(2)


def prior_bits(process: Gaussian, x0: Tensor) -> Tensor:
    """KL of the last q(x_N | x0) from a standard normal, (B,), in bits per dimension: the bound's untrained part."""
    last = torch.full((len(x0),), len(process) - 1)
    mean = at(process.alphas_cumprod.sqrt(), last, x0) * x0
    log_variance = at((1 - process.alphas_cumprod).log(), last, x0)
    return _mean(kl_normal(mean, log_variance, torch.zeros_like(x0), torch.zeros_like(x0))) / math.log(2)


def kl_normal(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, ..) || N(other, ..)) elementwise, in nats."""
    ratio = log_variance - other_log_variance
    distance = (mean - other_mean).square() * (-other_log_variance).exp()
    return 0.5 * (ratio.exp() - 1 - ratio + distance)


def decoder_nll(x0: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log of a normal's mass in the bin of 8-bit pixels around x0, elementwise, in nats; bins at +-1 are open.

    The official training does this for latents too.
    """
    inverse = (-log_scale).exp()
    upper = _approximate_cdf(inverse * (x0 - mean + 1 / 255))
    lower = _approximate_cdf(inverse * (x0 - mean - 1 / 255))
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return -mass.clamp(min=1e-12).log()


def _approximate_cdf(z: Tensor) -> Tensor:
    """The standard normal's, by tanh; the official loss uses this approximation."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
