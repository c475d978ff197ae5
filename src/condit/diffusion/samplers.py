"""Rectified flow (Esser et al. 2024, arXiv:2403.03206): its levels and Euler's sampler."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from condit.diffusion.steps import Noise, OnStep, Predict, Step, finish_step


@dataclass(frozen=True)
class FlowPath:
    """Levels (S + 1,) falling from 1 to 0, where x_t = (1 - t) x_0 + t noise. The network predicts the velocity."""

    sigmas: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    def step(self, index: int) -> Step:
        return Step(index, len(self), self.sigmas[index], self.sigmas[index])

    def since(self, begin: int) -> FlowPath:
        """The steps from number `begin` on."""
        return FlowPath(self.sigmas[begin:])

    # As a path of an edit (diffusion/inversion.py)

    @property
    def steps(self) -> int:
        return len(self)

    def time(self, level: int) -> float:
        return self.sigmas[level]

    def at(self, time: float) -> Step:
        return Step(0, 1, time, time)

    def kept(self, x: Tensor, output: Tensor, level: int) -> Tensor:
        """What a multistep solver stores: the velocity."""
        return output

    def move(self, x: Tensor, output: Tensor, start: int, end: int, earlier: object = None) -> Tensor:
        """Euler's step between two levels, up or down."""
        return x + (self.sigmas[end] - self.sigmas[start]) * output

    def multistep(self, start: int, end: int) -> bool:
        return False


def euler(
    predict: Predict,
    x: Tensor,
    path: FlowPath,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler steps of the flow dx/dt = v, from the path's first level to its last.

    eta: the share of a step's noise that is new instead of kept from the prediction: 0 is the ordinary
    differential equation, 1 diffusers' `stochastic_sampling`. All have the same marginals; with new noise a small
    network can correct earlier steps. Raises ValueError unless 0 <= eta <= 1, and where `noise` is missing.
    """
    if not 0 <= eta <= 1 or (eta and noise is None):
        raise ValueError(f"eta must be 0 to 1, and above 0 it needs noise=; found eta {eta}, noise {noise}.")
    for i in range(len(path)):
        now, then = path.sigmas[i], path.sigmas[i + 1]
        v = predict(x, path.step(i))
        clean = x - now * v
        if eta and noise is not None:
            kept = x + (1 - now) * v
            x = (1 - then) * clean + then * ((1 - eta**2) ** 0.5 * kept + eta * noise(x))
        else:
            x = x + (then - now) * v
        x = finish_step(on_step, i, x, clean)
    return x
