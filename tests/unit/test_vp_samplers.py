"""Every solver against diffusers' scheduler of that name, on a network that is a fixed function."""

import importlib
import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from condit.diffusion.steps import image_noise
from condit.diffusion.vp import Process, add_noise, make_path
from condit.diffusion.vp_samplers import ddim_step, dpm_step, estimate, sample

diffusers: Any = importlib.import_module("diffusers")  # its names are made when they are asked for
SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PIXART: dict[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
THEIRS = {
    "ddim": diffusers.DDIMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
}
CASES = [
    ("ddim", {**SD, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}),
    ("ddim", {**SD, "clip_sample": False}),
    ("ddim", {**SD, "clip_sample": False, "timestep_spacing": "trailing"}),
    ("ddim", {**SD, "clip_sample": False, "timestep_spacing": "linspace"}),
    ("ddim", {**PIXART, "clip_sample": False}),
    ("dpm++", SD),
    ("dpm++", {**SD, "use_karras_sigmas": True}),
    ("dpm++", {**SD, "timestep_spacing": "leading", "steps_offset": 1}),
    ("dpm++", {**SD, "timestep_spacing": "trailing", "euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    ("dpm++", {**PIXART, "final_sigmas_type": "sigma_min"}),
    ("dpm++", {**PIXART, "final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("euler", SD),
    ("euler", {**SD, "timestep_spacing": "leading", "steps_offset": 1}),
    ("euler", {**SD, "timestep_spacing": "trailing"}),
    ("euler", {**SD, "use_karras_sigmas": True}),
    ("euler", {**SD, "timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": True}),
    ("euler-ancestral", SD),
    ("euler-ancestral", {**SD, "timestep_spacing": "leading", "steps_offset": 1}),
]
NAMES = [f"{solver}-{i}" for i, (solver, _) in enumerate(CASES)]
NOISE = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def network(x: Tensor, t: float) -> Tensor:
    """Stands for a network: nearly the noise, as a trained one, and different at every place and time."""
    return 0.9 * NOISE + 0.3 * torch.sin(2 * x + t / 200)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (7, 8)]


def diffusers_run(solver: str, config: dict, steps: int, eta: float = 0.0) -> tuple[Tensor, Tensor]:
    scheduler = THEIRS[solver](**config)
    scheduler.set_timesteps(steps)
    x, drawn, how = NOISE * scheduler.init_noise_sigma, generators(), {}
    if solver == "ddim":
        how = {"eta": eta, "generator": drawn}
    elif solver == "euler-ancestral":
        how = {"generator": drawn}
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(output, t, x, **how).prev_sample
    return x, scheduler.timesteps


def our_run(solver, config: dict, steps: int, eta: float = 0.0) -> tuple[Tensor, Tensor]:
    process = Process.from_config(config)
    path = make_path(process, solver, steps)
    noise = image_noise(generators())
    x = sample(lambda x, step: network(x, step.time), NOISE * path.start, path, eta=eta, noise=noise)
    return x, path.timesteps


@pytest.mark.parametrize(("solver", "config"), CASES, ids=NAMES)
@pytest.mark.parametrize(("steps", "prediction"), list(product((1, 5, 20), ("epsilon", "v_prediction"))))
def test_solver_equals_diffusers(solver: str, config: dict, steps: int, prediction: str):
    config = {**config, "prediction_type": prediction}
    wanted, times = diffusers_run(solver, config, steps)
    found, our_times = our_run(solver, config, steps)
    torch.testing.assert_close(our_times.float(), times.float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)  # theirs are coefficients in float32, ours in 64


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_noise_equals_diffusers(eta: float):
    wanted, _ = diffusers_run("ddim", CASES[0][1], 8, eta)
    found, _ = our_run("ddim", CASES[0][1], 8, eta)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    assert (found - our_run("ddim", CASES[0][1], 8)[0]).abs().max() > 0.01


def test_zero_terminal_snr_equals_diffusers():
    config = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    wanted, _ = diffusers_run("euler", config, 6)
    # Theirs stands at sigma 4096 in float32 after the first steps.
    torch.testing.assert_close(our_run("euler", config, 6)[0], wanted, rtol=1e-4, atol=1e-4)


def test_first_order_of_dpm_solver_is_ddim():
    x = 2 * NOISE
    found = estimate(network(x, 500), x, 0.3, "epsilon")
    torch.testing.assert_close(dpm_step(x, found.x0, 0.3, 0.6), ddim_step(found, 0.3, 0.6))


def test_a_step_of_ddim_is_undone_by_the_step_back():
    x = 2 * NOISE
    found = estimate(network(x, 500), x, 0.3, "epsilon")
    there = ddim_step(found, 0.3, 0.6)
    back = ddim_step(estimate(found.eps, there, 0.6, "epsilon"), 0.6, 0.3)
    torch.testing.assert_close(back, x)


def test_add_noise_equals_diffusers():
    scheduler = diffusers.DDIMScheduler(**SD)
    wanted = scheduler.add_noise(NOISE, NOISE.flip(0), torch.tensor([601, 601]))
    level = Process.from_config(SD).alphas_cumprod[601]
    torch.testing.assert_close(add_noise(NOISE, NOISE.flip(0), level), wanted)


def test_second_half_of_a_path_begins_where_the_first_ends():
    path = make_path(Process(), "euler", 10)
    assert torch.equal(path.since(4).level[0], path.after[3])
    assert math.isclose(float(path.after[-1]), 1.0)


@pytest.mark.parametrize(
    "config", [{"thresholding": True}, {"algorithm_type": "sde-dpmsolver++"}, {"prediction_type": "flow_prediction"}]
)
def test_a_scheduler_that_asks_for_more_is_refused(config: dict):
    with pytest.raises(ValueError, match=next(iter(config))):
        Process.from_config(config)
