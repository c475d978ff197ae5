"""Every solver against diffusers' scheduler of that name, on a network that is a fixed function."""

import importlib
import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from condit.diffusion.steps import image_noise
from condit.diffusion.vp import Process, add_noise, make_path, with_sampler
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


def diffusers_run(
    solver: str, config: dict, steps: int, eta: float = 0.0, timesteps: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    scheduler = THEIRS[solver](**config)
    if timesteps is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    x, drawn, how = NOISE * scheduler.init_noise_sigma, generators(), {}
    if solver == "ddim":
        how = {"eta": eta, "generator": drawn}
    elif solver == "euler-ancestral":
        how = {"generator": drawn}
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(output, t, x, **how).prev_sample
    return x, scheduler.timesteps


def our_run(
    solver, config: dict, steps: int, eta: float = 0.0, timesteps: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    process = Process.from_config(config)
    path = make_path(process, solver, steps, timesteps=timesteps)
    noise = image_noise(generators())
    x = sample(lambda x, step: network(x, step.time), NOISE * path.start, path, eta=eta, noise=noise)
    return x, path.timesteps


@pytest.mark.parametrize(("solver", "config"), CASES, ids=NAMES)
@pytest.mark.parametrize(("steps", "prediction"), list(product((1, 5, 20), ("epsilon", "v_prediction"))))
def test_solver_equals_diffusers(solver: str, config: dict, steps: int, prediction: str):
    config = {**config, "prediction_type": prediction}
    wanted, times = diffusers_run(solver, config, steps)
    actual, our_times = our_run(solver, config, steps)
    torch.testing.assert_close(our_times.float(), times.float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=2e-5)  # theirs are coefficients in float32, ours in 64


CUSTOM = [999, 850, 700, 431, 100, 7]


@pytest.mark.parametrize(
    ("solver", "config"), [("dpm++", SD), ("euler", SD), ("euler", {**SD, "timestep_spacing": "leading"})]
)
def test_given_timesteps_equal_diffusers(solver: str, config: dict):
    wanted, times = diffusers_run(solver, config, 0, timesteps=CUSTOM)
    actual, our_times = our_run(solver, config, 0, timesteps=CUSTOM)
    assert our_times.tolist() == times.tolist() == CUSTOM
    torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=2e-5)


def ldm_ddim(timesteps: list[int]) -> Tensor:
    """DDIM with eta 0 in float64: a step ends at the level of the next, the last one at level 0 of the training."""
    levels = Process().alphas_cumprod.double()
    x = NOISE.double()
    for t, after in zip(timesteps, [*timesteps[1:], 0], strict=True):
        eps, a, b = network(x, t), levels[t], levels[after]
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    return x.float()


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [(7, [995, 853, 711, 569, 427, 285, 143, 1]), (5, [801, 601, 401, 201, 1]), (1, [1]), (30, range(991, 0, -33))],
)
def test_the_released_spacing_takes_the_released_steps(steps: int, timesteps):
    """c = 1000 // steps, every c up to 1000, plus 1: more steps than asked for where steps does not divide 1000."""
    solver, process = with_sampler(Process(set_alpha_to_one=True), "ddim-ldm")
    path = make_path(process, solver, steps)  # type: ignore[arg-type]
    assert path.timesteps.tolist() == list(timesteps)
    x = sample(lambda x, step: network(x, step.time), NOISE, path)
    torch.testing.assert_close(x, ldm_ddim(list(timesteps)), rtol=2e-5, atol=2e-5)
    given = make_path(Process(), "ddim", 0, timesteps=list(timesteps))
    for name in ("timesteps", "level", "after"):
        assert torch.equal(getattr(path, name), getattr(given, name))


def test_where_steps_divide_the_training_both_spacings_are_one():
    _, released = with_sampler(Process(), "ddim-ldm")
    for steps in (5, 8, 50):
        ours, theirs = make_path(Process(), "ddim", steps), make_path(released, "ddim", steps)
        assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.after, theirs.after)


@pytest.mark.parametrize(
    ("solver", "process", "steps", "timesteps", "message"),
    [
        ("ddim", Process(), 0, [1, 5], "falling list"),
        ("ddim", Process(), 0, [], "falling list"),
        ("ddim", Process(), 0, [1000, 5], "falling list of numbers from 999 to 0"),
        ("euler", Process(use_karras_sigmas=True), 0, [900, 5], "Karras sigmas choose their own"),
        ("euler", Process(timestep_spacing="ldm"), 7, None, "'ldm' is that of DDIM"),
        ("ddim", Process(timestep_spacing="ldm"), 3, None, "has no 3 steps: they would begin at 1000 of 1000"),
    ],
)
def test_impossible_timesteps_are_refused(solver, process: Process, steps: int, timesteps, message: str):
    with pytest.raises(ValueError, match=message):
        make_path(process, solver, steps, timesteps=timesteps)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_noise_equals_diffusers(eta: float):
    wanted, _ = diffusers_run("ddim", CASES[0][1], 8, eta)
    actual, _ = our_run("ddim", CASES[0][1], 8, eta)
    torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=2e-5)
    assert (actual - our_run("ddim", CASES[0][1], 8)[0]).abs().max() > 0.01


def test_zero_terminal_snr_equals_diffusers():
    config = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    wanted, _ = diffusers_run("euler", config, 6)
    # Theirs stands at sigma 4096 in float32 after the first steps.
    torch.testing.assert_close(our_run("euler", config, 6)[0], wanted, rtol=1e-4, atol=1e-4)


def test_first_order_of_dpm_solver_is_ddim():
    x = 2 * NOISE
    estimated = estimate(network(x, 500), x, 0.3, "epsilon")
    torch.testing.assert_close(dpm_step(x, estimated.x0, 0.3, 0.6), ddim_step(estimated, 0.3, 0.6))


def test_a_step_of_ddim_is_undone_by_the_step_back():
    x = 2 * NOISE
    estimated = estimate(network(x, 500), x, 0.3, "epsilon")
    there = ddim_step(estimated, 0.3, 0.6)
    back = ddim_step(estimate(estimated.eps, there, 0.6, "epsilon"), 0.6, 0.3)
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
