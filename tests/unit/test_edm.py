"""diffusion/edm.py: closed forms of Gaussian data, and diffusers' tables."""

import math

import pytest
import torch
from torch import Tensor

from condit.diffusion.edm import EDM, edm_loss, edm_path, heun, precondition, training_sigmas
from condit.diffusion.steps import by_timestep

DESIGN = EDM()


def ideal(mean: float, std: float):
    """The best denoiser of pixels that are N(mean, std)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1)
        return (std**2 * x + s**2 * mean) / (std**2 + s**2)

    return denoise


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return DESIGN.sigma_max * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


def error(steps: int, mean: float = 0.3, std: float = 0.5) -> float:
    """Of the sampler, to the ODE's solution: mean + (x - mean) std / sqrt(std^2 + sigma_max^2)."""
    exact = mean + (start() - mean) * std / math.sqrt(std**2 + DESIGN.sigma_max**2)
    return float((heun(by_timestep(ideal(mean, std)), start(), edm_path(steps, DESIGN)) - exact).abs().max())


def test_the_sampler_solves_the_ode_of_gaussian_data():
    errors = [error(steps) for steps in (18, 36, 72)]
    assert errors[0] < 0.1 and errors[2] < 0.01
    assert (
        3 < errors[0] / errors[1] < 6 and 3 < errors[1] / errors[2] < 6
    )  # of second order: a quarter for half the step


def test_the_mean_of_the_data_is_a_fixed_point():
    x = torch.full((1, 3, 4, 4), 0.3, dtype=torch.float64)
    torch.testing.assert_close(heun(by_timestep(ideal(0.3, 0.5)), x, edm_path(5, DESIGN)), x, rtol=0, atol=1e-12)


def test_steps_ask_twice_but_the_last_and_may_be_replaced():
    levels_seen: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        levels_seen.append(float(sigma[0]))
        return torch.zeros_like(x)

    seen: list[int] = []
    out = heun(by_timestep(denoise), start(), edm_path(4, DESIGN), on_step=lambda i, x, x0: seen.append(i))
    levels = edm_path(4, DESIGN).sigmas
    assert levels_seen == [levels[0], levels[1], levels[1], levels[2], levels[2], levels[3], levels[3]]
    assert seen == [0, 1, 2, 3] and float(out.abs().max()) < 1e-12  # it ends in the last estimate
    replaced = heun(
        by_timestep(denoise), start(), edm_path(4, DESIGN), on_step=lambda i, x, x0: x + 1 if i == 3 else None
    )
    torch.testing.assert_close(replaced, torch.ones_like(replaced))


def test_without_a_network_the_denoiser_is_the_best_linear_one():
    denoise = precondition(lambda x, c: torch.zeros_like(x), DESIGN)
    sigma = torch.tensor([0.01, 3.0], dtype=torch.float64)
    torch.testing.assert_close(denoise(start(), sigma), ideal(0.0, DESIGN.sigma_data)(start(), sigma))


def test_inputs_and_targets_of_the_network_have_deviation_one():
    g, seen = torch.Generator().manual_seed(0), []
    x0 = 0.5 * torch.randn(3, 3, 64, 64, generator=g)
    noise, sigma = torch.randn(x0.shape, generator=g), torch.tensor([0.01, 0.5, 40.0])

    def network(x: Tensor, c: Tensor) -> Tensor:
        seen.append((x, c))
        return torch.zeros_like(x)

    loss = edm_loss(precondition(network, DESIGN), x0, sigma, noise, DESIGN)
    torch.testing.assert_close(loss, torch.ones(3), rtol=0.05, atol=0)  # of 12,288 numbers, 3 sigma
    torch.testing.assert_close(seen[0][0].flatten(1).std(1), torch.ones(3), rtol=0.03, atol=0)
    torch.testing.assert_close(seen[0][1], sigma.log() / 4)


def test_the_true_target_makes_the_loss_zero():
    """F = (x0 - c_skip x) / c_out, Eq. 8."""
    g = torch.Generator().manual_seed(0)
    x0, noise, sigma = (
        torch.randn(2, 3, 4, 4, generator=g),
        torch.randn(2, 3, 4, 4, generator=g),
        torch.tensor([0.1, 9.0]),
    )
    s, d = sigma.reshape(-1, 1, 1, 1), DESIGN.sigma_data
    x = x0 + s * noise
    target = (x0 - d**2 / (s**2 + d**2) * x) / (s * d / (s**2 + d**2).sqrt())
    loss = edm_loss(precondition(lambda x, c: target, DESIGN), x0, sigma, noise, DESIGN)
    assert loss.max() < 1e-9  # rounding


def test_levels_and_factors_are_those_of_diffusers():
    from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler

    theirs = EDMEulerScheduler()
    theirs.set_timesteps(18)
    torch.testing.assert_close(torch.tensor(edm_path(18, DESIGN).sigmas), theirs.sigmas, rtol=1e-6, atol=0)
    x, y = start(torch.float32), torch.randn(2, 3, 4, 4)
    for sigma in (0.002, 0.7, 80.0):
        actual = precondition(lambda x, c: y, DESIGN)(x, torch.full((2,), sigma))
        torch.testing.assert_close(actual, theirs.precondition_outputs(x, y, torch.tensor(sigma)), rtol=1e-5, atol=1e-5)


def test_training_levels_have_the_given_distribution_of_logarithms():
    logs = training_sigmas(20_000, DESIGN, generator=torch.Generator().manual_seed(0)).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.03) and float(logs.std()) == pytest.approx(1.2, abs=0.03)


@pytest.mark.parametrize("wrong", [{"sigma_data": 0.0}, {"sigma_max": 0.001}, {"rho": -1.0}])
def test_a_design_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        EDM(**wrong)
    with pytest.raises(ValueError, match="at least 2"):
        edm_path(1, DESIGN)
