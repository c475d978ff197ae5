"""EDM: preconditioning, loss and deterministic sampler for pixels (Karras et al. 2022, arXiv:2206.00364), as DiffiT's
image-space model uses them (arXiv:2312.02139, appendix I.1).

Noise is told by its deviation sigma: x = x0 + sigma n. A denoiser D(x, sigma) estimates x0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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


def edm_sigmas(steps: int, edm: EDM) -> Tensor:
    """Falling noise levels (steps + 1,) float64 from sigma_max to sigma_min, evenly in sigma^(1/rho), then 0; Eq. 5."""
    if steps < 2:
        raise ValueError(f"num_inference_steps must be at least 2; found {steps}.")
    first, last = edm.sigma_max ** (1 / edm.rho), edm.sigma_min ** (1 / edm.rho)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return torch.cat([(first + ramp * (last - first)) ** edm.rho, ramp.new_zeros(1)])


def heun(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    on_step: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Heun's second-order steps of dx/dsigma = (x - D(x, sigma)) / sigma, Alg. 1 without churn; Euler to sigma 0.

    x (B, C, H, W) stands at sigmas[0], so it is noise times that. 2 steps - 1 predictions. on_step(i, x, x0) may give
    another x.
    """

    def slope(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        x0 = denoise(x, torch.full((len(x),), sigma, dtype=x.dtype, device=x.device))
        return (x - x0) / sigma, x0

    levels = sigmas.tolist()
    for i, (sigma, after) in enumerate(zip(levels, levels[1:], strict=False)):
        direction, x0 = slope(x, sigma)
        moved = x + (after - sigma) * direction
        if after > 0:
            moved = x + (after - sigma) * (direction + slope(moved, after)[0]) / 2
        replaced = None if on_step is None else on_step(i, moved, x0)
        x = moved if replaced is None else replaced
    return x
