"""diffusion/objectives.py: the flow between picture and noise."""

import pytest
import torch

from condit.diffusion.objectives import SMALLEST_T, add_noise, drop, flow_loss, to_velocity

X0, NOISE = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.1, 0.5, 0.9])


def test_time_zero_is_the_image_and_time_one_the_noise():
    assert torch.equal(add_noise(X0, NOISE, torch.zeros(3)), X0)
    assert torch.equal(add_noise(X0, NOISE, torch.ones(3)), NOISE)


def test_each_sample_has_its_own_time():
    actual = add_noise(X0, NOISE, T)
    for i, t in enumerate(T):
        torch.testing.assert_close(actual[i], (1 - t) * X0[i] + t * NOISE[i])


def test_the_true_velocity_is_noise_minus_image_in_both_predictions():
    x_t = add_noise(X0, NOISE, T)
    assert torch.equal(to_velocity(NOISE - X0, x_t, T, "velocity"), NOISE - X0)
    torch.testing.assert_close(to_velocity(X0, x_t, T, "x"), NOISE - X0, rtol=0, atol=1e-5)  # division by 0.1


def test_the_velocity_of_an_image_stays_finite_at_time_zero():
    converted = to_velocity(X0 + 1, X0, torch.zeros(3), "x")
    torch.testing.assert_close(converted, torch.full_like(X0, -1 / SMALLEST_T))


@pytest.mark.parametrize("prediction", ["velocity", "x"])
def test_the_loss_is_the_squared_error_of_the_velocity(prediction):
    x_t = add_noise(X0, NOISE, T)
    output = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))
    error = to_velocity(output, x_t, T, prediction) - (NOISE - X0)
    expected = error.square().mean((1, 2))
    actual = flow_loss(output, X0, NOISE, T, prediction)
    assert actual.shape == (3,)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)  # x_t - x0 cancels digits at t = 0.1


def test_the_loss_of_the_truth_is_zero_and_in_float32():
    assert not flow_loss(NOISE - X0, X0, NOISE, T).any()
    assert flow_loss(X0.bfloat16(), X0, NOISE, T, "x").dtype == torch.float32


def test_drop_repeats_with_its_generator_and_keeps_its_rate():
    draws = [drop(2000, 0.1, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*draws) and draws[0].dtype == torch.bool
    assert float(draws[0].float().mean()) == pytest.approx(0.1, abs=0.02)
    assert not drop(100, 0.0, torch.Generator()).any() and drop(100, 1.0, torch.Generator()).all()
