"""diffusion/schedules.py against diffusers' scheduler and its own anchors."""

import math

import numpy as np
import pytest
import torch

from condit.diffusion.schedules import flow_sigmas, flux_mu, logit_normal


def diffusers_sigmas(steps: int, *, shift: float, mu: float | None) -> torch.Tensor:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=mu is not None)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    assert isinstance(scheduler.sigmas, torch.Tensor)
    return scheduler.sigmas


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_with_a_fixed_shift_equal_diffusers(steps, shift):
    torch.testing.assert_close(flow_sigmas(steps, shift=shift), diffusers_sigmas(steps, shift=shift, mu=None))


@pytest.mark.parametrize("tokens", [64, 1024, 4096])
def test_sigmas_with_the_dynamic_shift_equal_diffusers(tokens):
    mu = flux_mu(tokens)
    torch.testing.assert_close(flow_sigmas(28, shift=math.exp(mu)), diffusers_sigmas(28, shift=1.0, mu=mu))


@pytest.mark.parametrize("tokens", [64, 256, 1000, 4096, 8192])
def test_mu_equals_diffusers_inside_and_outside_its_range(tokens):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    assert flux_mu(tokens) == pytest.approx(calculate_shift(tokens), abs=1e-12)


def test_mu_passes_through_its_two_points():
    assert flux_mu(256) == pytest.approx(0.5) and flux_mu(4096) == pytest.approx(1.15)


@pytest.mark.parametrize("shift", [0.5, 1.0, 4.0])
def test_levels_fall_from_one_to_zero(shift):
    sigmas = flow_sigmas(10, shift=shift)
    assert sigmas.shape == (11,) and sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1; found 0"):
        flow_sigmas(0)


def test_training_times_lie_around_the_shifted_middle_and_repeat():
    def draw() -> torch.Tensor:
        return logit_normal(4000, mean=1.0, generator=torch.Generator().manual_seed(0))

    assert torch.equal(draw(), draw())
    assert (draw() > 0).all() and (draw() < 1).all()
    assert float(draw().median()) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.02)  # 4000 draws
