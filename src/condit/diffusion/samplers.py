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
    on_step: Callable[[int, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Euler steps of the flow dx/dsigma = v. `velocity(x, sigma, i)` with sigma 0-d; sigmas (S + 1,), falling.

    latents stand at sigmas[0]; returns them at sigmas[-1]. `on_step(i, x)` sees each result and may replace it.
    """
    for i in range(len(sigmas) - 1):
        latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity(latents, sigmas[i], i)
        if on_step is not None:
            replaced = on_step(i, latents)
            latents = latents if replaced is None else replaced
    return latents
