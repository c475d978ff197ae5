"""Inversion on the exact score of a Gaussian mixture (every solver's error is then its own), and edits along a path."""

import math

import pytest
import torch
from torch import Tensor

from condit.diffusion.inversion import (
    FlowPath,
    alpha_sigma,
    ddim_path,
    dpm_path,
    edit_along,
    interleave,
    invert,
    round_trip_error,
    walk,
)
from condit.diffusion.schedules import flow_sigmas
from condit.diffusion.vp import Process

CUMPROD = Process(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear").alphas_cumprod
MODES = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
SPREAD = 0.3


def mixture_mean(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x_0 | x] for x_0 from 12 Gaussians of deviation SPREAD and x = alpha x_0 + sigma noise, in float64."""
    x, modes = x.double(), MODES.double()
    variance = (alpha * SPREAD) ** 2 + sigma**2
    weights = (-(x[:, None] - alpha * modes).square().sum(-1) / (2 * variance)).softmax(-1)
    return weights @ modes + alpha * SPREAD**2 / variance * (x - alpha * (weights @ modes))


def noise_of(x: Tensor, t: float) -> Tensor:
    low = min(int(t), 998)
    ratios = ((1 - CUMPROD) / CUMPROD).sqrt()
    alpha, sigma = (float(v) for v in alpha_sigma(torch.lerp(ratios[low], ratios[low + 1], t - low).double()))
    return ((x.double() - alpha * mixture_mean(x, alpha, sigma)) / sigma).float()


def velocity_of(x: Tensor, t: float) -> Tensor:
    """Of rectified flow: E[noise - x_0 | x]; at t = 0 the limit, for which a small t stands."""
    t = max(t, 1e-3)
    clean = mixture_mean(x, 1 - t, t)
    return ((x.double() - clean) / t).float()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    g = torch.Generator().manual_seed(1)
    return MODES[:6] + SPREAD * torch.randn(6, 64, generator=g)


def psnr(pictures: Tensor, steps: int, solver: str, *, order: int = 2, **how) -> float:
    path = ddim_path(CUMPROD, steps) if solver == "entered" else dpm_path(CUMPROD, steps, order=order)
    up = invert(noise_of, pictures, path, solver, **how)  # type: ignore[arg-type]
    return float(round_trip_error(up, walk(noise_of, up[0], path))[1].mean())


@pytest.mark.parametrize("steps", [10, 20])
def test_the_solvers_round_trips_stand_in_the_known_order(pictures, steps):
    first = psnr(pictures, steps, "first_order", order=1)
    second = psnr(pictures, steps, "dpmpp2m")
    once = psnr(pictures, steps, "fixed_point", order=1, iterations=1)
    thrice = psnr(pictures, steps, "fixed_point", order=1, iterations=3)
    exact = psnr(pictures, steps, "exact2m", iterations=5)
    assert second > first + 2  # dB, at equal network calls
    assert thrice > once > first + 3
    assert exact > second + 3


def test_more_steps_give_a_smaller_error(pictures):
    assert psnr(pictures, 40, "dpmpp2m") > psnr(pictures, 20, "dpmpp2m") > psnr(pictures, 10, "dpmpp2m")


@pytest.mark.parametrize(("solver", "calls"), [("first_order", 4), ("dpmpp2m", 4), ("fixed_point", 12)])
def test_a_solver_calls_the_network_as_often_as_documented(pictures, solver, calls):
    received = []
    invert(lambda x, t: received.append(t) or noise_of(x, t), pictures, dpm_path(CUMPROD, 4), solver, iterations=2)
    assert len(received) == calls


def test_a_trajectory_ends_in_the_image_bit_for_bit(pictures):
    up = invert(noise_of, pictures, dpm_path(CUMPROD, 6))
    assert up.shape == (7, 6, 64) and torch.equal(up[-1], pictures)


def test_a_flow_goes_up_and_comes_back_nearer_with_fixed_points(pictures):
    path = FlowPath(tuple(flow_sigmas(20, shift=3.0).tolist()))
    values = {}
    for solver in ("first_order", "entered", "fixed_point"):
        up = invert(velocity_of, pictures, path, solver)
        values[solver] = float(round_trip_error(up, walk(velocity_of, up[0], path))[1].mean())
    assert values["fixed_point"] > values["first_order"] + 10
    up = invert(velocity_of, pictures, path, "fixed_point")
    assert float(up[0].std()) == pytest.approx(1, abs=0.35)  # noise, too large by coarse steps
    with pytest.raises(ValueError, match="flow takes"):
        invert(velocity_of, pictures, path, "dpmpp2m")


def test_an_unknown_solver_and_an_impossible_number_of_steps_raise(pictures):
    with pytest.raises(ValueError, match="No solver 'euler'"):
        invert(noise_of, pictures, dpm_path(CUMPROD, 4), "euler")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 to 1000; found 0"):
        dpm_path(CUMPROD, 0)


def test_the_error_is_the_distance_and_its_decibels():
    up = torch.stack([torch.zeros(1, 2, 2), torch.tensor([[[0.0, 1.0], [2.0, 4.0]]])])
    back = up.clone()
    back[-1] += 0.4
    rms, decibels = round_trip_error(up, back)
    assert rms.item() == pytest.approx(0.4) and decibels.item() == pytest.approx(20 * math.log10(4 / 0.4))


# Edits


PATHS = {
    "dpmpp2m": dpm_path(CUMPROD, 6),
    "ddim": dpm_path(CUMPROD, 6, order=1),
    "flow": FlowPath(tuple(flow_sigmas(6).tolist())),
}


def predict(path, shift: float):
    """Sources see the mixture, targets a shifted one."""
    network = velocity_of if isinstance(path, FlowPath) else noise_of

    def call(x: Tensor, level: int) -> Tensor:
        out = network(x, path.time(level))
        out[1::2] += shift
        return out

    return call


@pytest.mark.parametrize("name", PATHS)
def test_a_target_with_the_sources_prediction_is_the_source_bit_for_bit(pictures, name):
    path = PATHS[name]
    up = invert(velocity_of if name == "flow" else noise_of, pictures, path, "first_order")
    assert torch.equal(edit_along(predict(path, 0.0), up, path), pictures)
    free = edit_along(predict(path, 0.0), up, path, anchored=False)
    assert not torch.equal(free, pictures)  # it only follows the prediction
    assert not torch.equal(edit_along(predict(path, 0.3), up, path), pictures)


@pytest.mark.parametrize("name", PATHS)
def test_where_the_mask_is_zero_the_target_is_the_source(pictures, name):
    """The solver's memory too: else the second-order term would carry the edit over the edge one step later."""
    path = PATHS[name]
    up = invert(velocity_of if name == "flow" else noise_of, pictures, path, "first_order")
    where = (torch.arange(64) < 20).float()
    seen = []

    def watched(x: Tensor, level: int) -> Tensor:
        seen.append(x)
        return predict(path, 0.3)(x, level)

    out = edit_along(watched, up, path, mask=lambda level: where)
    assert torch.equal(out[:, 20:], pictures[:, 20:]) and (out[:, :20] - pictures[:, :20]).abs().min() > 0
    for x in seen:
        assert torch.equal(x[0::2, 20:], x[1::2, 20:])


def test_the_source_is_set_back_to_its_trajectory_in_every_step(pictures):
    path, seen = PATHS["dpmpp2m"], []
    up = invert(noise_of, pictures, path)

    def watched(x: Tensor, level: int) -> Tensor:
        seen.append(x[0::2])
        return predict(path, 0.1)(x, level)

    edit_along(watched, up, path)
    assert torch.equal(torch.stack(seen), up[:-1])


def test_rows_are_interleaved():
    assert interleave(torch.tensor([0, 2]), torch.tensor([1, 3])).tolist() == [0, 1, 2, 3]
