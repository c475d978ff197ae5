"""diffusion/samplers.py: Euler's steps."""

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from condit.diffusion.objectives import to_velocity
from condit.diffusion.samplers import FlowPath, euler
from condit.diffusion.schedules import flow_sigmas


def flow_path(steps: int, *, shift: float = 1.0) -> FlowPath:
    return FlowPath(tuple(flow_sigmas(steps, shift=shift).tolist()))


X0, NOISE = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [1, 7])
def test_a_straight_flow_arrives_exactly_in_any_number_of_steps(steps):
    actual = euler(lambda x, step: NOISE - X0, NOISE, flow_path(steps, shift=2.0))
    torch.testing.assert_close(actual, X0, rtol=0, atol=1e-6)


def test_a_prediction_of_the_image_lands_on_it():
    def velocity(x, step):
        return to_velocity(X0, x, torch.tensor([step.time]), "x")

    torch.testing.assert_close(euler(velocity, NOISE, flow_path(20)), X0, rtol=0, atol=1e-5)


def test_eta_1_is_the_stochastic_sampling_of_diffusers():
    sigmas = flow_path(5, shift=2.5)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=list(sigmas.sigmas[:-1]))
    theirs, generators = NOISE, [torch.Generator().manual_seed(3) for _ in range(2)]
    for t in scheduler.timesteps:
        theirs = scheduler.step(theirs.sin(), t, theirs, generator=generators[0], return_dict=False)[0]
    actual = euler(
        lambda x, step: x.sin(),
        NOISE,
        sigmas,
        eta=1.0,
        noise=lambda x: torch.randn(NOISE.shape, generator=generators[1]),
    )
    torch.testing.assert_close(actual, theirs, rtol=0, atol=1e-6)


def test_any_eta_lands_on_a_known_image_and_0_is_the_plain_step():
    sigmas, generator = flow_path(4), torch.Generator().manual_seed(0)

    def noise(x):
        return torch.randn(NOISE.shape, generator=generator)

    def known(x, step):
        return to_velocity(X0, x, torch.tensor([step.time]), "x")

    assert torch.equal(euler(known, NOISE, sigmas), euler(known, NOISE, sigmas, eta=0.0, noise=noise))
    for eta in (0.5, 1.0):
        torch.testing.assert_close(euler(known, NOISE, sigmas, eta=eta, noise=noise), X0, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="needs noise="):
        euler(known, NOISE, sigmas, eta=0.5)


def test_the_network_predicts_once_a_step_at_its_level():
    received = []
    sigmas = flow_path(3)
    euler(lambda x, step: received.append((step.index, step.t)) or x, NOISE, sigmas)
    assert received == list(enumerate(sigmas.sigmas[:-1]))


def test_on_step_sees_each_result_and_may_replace_it():
    seen = []

    def on_step(i, x, x0):
        seen.append(i)
        return torch.zeros_like(x) if i == 1 else None

    actual = euler(lambda x, step: torch.ones_like(x), NOISE, FlowPath((1.0, 0.5, 0.25, 0.0)), on_step=on_step)
    assert seen == [0, 1, 2]
    torch.testing.assert_close(actual, torch.full_like(NOISE, -0.25))


def test_the_start_is_not_changed():
    start = NOISE.clone()
    euler(lambda x, step: x, start, flow_path(3))
    assert torch.equal(start, NOISE)
