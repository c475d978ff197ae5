"""EDM: preconditioning, loss and deterministic sampler for pixels (Karras et al. 2022, arXiv:2206.00364), as DiffiT's
image-space model uses them (arXiv:2312.02139, appendix I.1).

Noise has the deviation sigma: x = x0 + sigma n. A denoiser D(x, sigma) estimates x0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from condit.diffusion.steps import Noise, OnStep, Predict, Step, finish_step

# F(x, c_noise): (B, C, H, W) and (B,) -> (B, C, H, W). D(x, sigma) likewise.
Network = Callable[[Tensor, Tensor], Tensor]
Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class EDM:
    """Table 1, last column. sigma_data: the deviation of the pixels; noise_mean, noise_std: of ln sigma in training."""

    sigma_data: float = 0.5
    noise_mean: float = -1.2
    noise_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self):
        if min(self.sigma_data, self.noise_std, self.sigma_min, self.rho) <= 0 or self.sigma_max <= self.sigma_min:
            raise ValueError(f"Deviations and rho must be positive and sigma_max above sigma_min; found {self}.")


def precondition(network: Network, edm: EDM) -> Denoiser:
    """D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4), Eq. 7. sigma (B,), above 0.

    In and out of the network have deviation 1 at every noise level, and with F = 0 it is the best linear denoiser.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.reshape(-1, *[1] * (x.ndim - 1))
        total = s**2 + edm.sigma_data**2
        skip, out, scale = edm.sigma_data**2 / total, s * edm.sigma_data / total.sqrt(), 1 / total.sqrt()
        return skip * x + out * network(scale * x, sigma.log() / 4).to(x.dtype)

    return denoise


def training_sigmas(n: int, edm: EDM, *, generator: torch.Generator) -> Tensor:
    """Noise levels to train at, (n,) float32: ln sigma ~ N(noise_mean, noise_std)."""
    return (edm.noise_mean + edm.noise_std * torch.randn(n, generator=generator)).exp()


def edm_loss(denoise: Denoiser, x0: Tensor, sigma: Tensor, noise: Tensor, edm: EDM) -> Tensor:
    """Squared error of the estimate, (B,) float32, weighted by 1 / c_out^2 (Eq. 8): 1 for the best linear denoiser."""
    s = sigma.reshape(-1, *[1] * (x0.ndim - 1))
    error = denoise(x0 + s * noise, sigma).float() - x0
    weight = (sigma**2 + edm.sigma_data**2) / (sigma * edm.sigma_data) ** 2
    return weight * error.square().flatten(1).mean(1)


def edm_path(steps: int, edm: EDM) -> EDMPath:
    """Falling noise levels (steps + 1,) float64 from sigma_max to sigma_min, evenly in sigma^(1/rho), then 0; Eq. 5."""
    if steps < 2:
        raise ValueError(f"num_inference_steps must be at least 2; found {steps}.")
    first, last = edm.sigma_max ** (1 / edm.rho), edm.sigma_min ** (1 / edm.rho)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return EDMPath((*((first + ramp * (last - first)) ** edm.rho).tolist(), 0.0))


@dataclass(frozen=True)
class EDMPath:
    """Levels (S + 1,): the deviation of the noise, falling to 0. A run starts from noise times sigmas[0]."""

    sigmas: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    def since(self, begin: int) -> EDMPath:
        return EDMPath(self.sigmas[begin:])

    def step(self, index: int) -> Step:
        return self.at(index, self.sigmas[index])

    def at(self, index: int, sigma: float) -> Step:
        """Step `index` at a level of its own."""
        return Step(index, len(self), sigma / (1 + sigma), sigma)


def heun(
    predict: Predict,
    x: Tensor,
    path: EDMPath,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's second-order steps of dx/dsigma = (x - D(x, sigma)) / sigma, Alg. 1 without churn; Euler to sigma 0.

    predict is the denoiser D, which estimates x0. x (B, C, H, W) is noise times sigmas[0]. 2
    steps - 1 predictions. Raises ValueError for eta, which this sampler does not support.
    """
    if eta:
        raise ValueError(f"Heun's sampler is deterministic and has no eta; found {eta}.")
    for i, (sigma, after) in enumerate(zip(path.sigmas, path.sigmas[1:], strict=False)):
        x0 = predict(x, path.step(i))
        direction = (x - x0) / sigma
        moved = x + (after - sigma) * direction
        if after > 0:
            x0_after = predict(moved, path.at(i, after))
            moved = x + (after - sigma) * (direction + (moved - x0_after) / after) / 2
        x = finish_step(on_step, i, moved, x0)
    return x
