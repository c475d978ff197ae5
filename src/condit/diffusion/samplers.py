"""Samplers: pure functions over `velocity(x, sigma)`; no hidden state."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, Tensor, int], Tensor]


def euler(
    velocity: Velocity,
    latents: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 0.0,
    noise: Callable[[], Tensor] | None = None,
    on_step: Callable[[int, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Euler steps of the flow dx/dsigma = v. `velocity(x, sigma, i)` with sigma 0-d; sigmas (S + 1,), falling.

    latents stand at sigmas[0]; returns them at sigmas[-1]. `on_step(i, x)` sees each result and may replace it.
    eta: the share of a step's noise that is drawn afresh, by `noise()` of the shape of latents, instead of what the
    network took for noise: 0 is the ordinary differential equation, 1 diffusers' `stochastic_sampling`. All have the
    same marginals; fresh noise gives a network the occasion to mend what it has drawn.
    """
    if not 0 <= eta <= 1 or (eta and noise is None):
        raise ValueError(f"eta must be 0 to 1, and above 0 it needs noise=; found eta {eta}, noise {noise}.")
    for i in range(len(sigmas) - 1):
        now, then = sigmas[i], sigmas[i + 1]
        v = velocity(latents, now, i)
        if eta and noise is not None:
            clean, found = latents - now * v, latents + (1 - now) * v
            latents = (1 - then) * clean + then * ((1 - eta**2) ** 0.5 * found + eta * noise())
        else:
            latents = latents + (then - now) * v
        if on_step is not None:
            replaced = on_step(i, latents)
            latents = latents if replaced is None else replaced
    return latents
