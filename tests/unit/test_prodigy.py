"""training/prodigy.py: a step size found, whatever the scale of the problem."""

import copy

import pytest
import torch

from condit.training.prodigy import Prodigy


def solve(optimizer_of, *, scale: float = 1.0, steps: int = 400) -> tuple[float, torch.Tensor]:
    """Distance left to the solution of a quadratic, as a share of the first, and d."""
    torch.manual_seed(0)
    solution = scale * torch.randn(8)
    curvature = torch.linspace(0.5, 2, 8)
    x = torch.nn.Parameter(torch.zeros(8))
    optimizer = optimizer_of([x])
    for _ in range(steps):
        optimizer.zero_grad()
        (curvature * (x - solution).square()).sum().backward()
        optimizer.step()
    return float((x.detach() - solution).norm() / solution.norm()), optimizer.param_groups[0].get("d", 0.0)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 100.0])
def test_it_finds_the_size_of_its_steps_over_four_orders_of_magnitude(scale):
    left, d = solve(lambda p: Prodigy(p), scale=scale)
    assert left < 0.05 and 0.02 * scale < d < 4 * scale
    # One step size of Adam serves one scale.
    assert scale == 1e-2 or solve(lambda p: torch.optim.Adam(p, lr=1e-4), scale=scale)[0] > 0.5


def test_d_grows_only_and_starts_small():
    x = torch.nn.Parameter(torch.zeros(3))
    optimizer, seen = Prodigy([x]), []
    for _ in range(200):
        optimizer.zero_grad()
        (x - 1).square().sum().backward()
        optimizer.step()
        seen.append(optimizer.param_groups[0]["d"])
    assert seen[0] == 1e-6 and seen == sorted(seen) and seen[-1] > 0.05


def test_the_first_two_steps_equal_algorithm_4_by_hand():
    """One weight: w0 = 0, loss (w - 1)^2, d0 = 1e-6, lr 1, betas (0.9, 0.999), without corrections."""
    x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Prodigy([x], safeguard_warmup=False, bias_correction=False, eps=0.0)
    d, m, v, s, r, w = 1e-6, 0.0, 0.0, 0.0, 0.0, 0.0
    beta3 = 0.999**0.5
    for _ in range(2):
        g = 2 * (w - 1)
        r = beta3 * r + (d / 1e-6) * d * g * (0 - w)
        m = 0.9 * m + 0.1 * d * g
        v = 0.999 * v + 0.001 * d * d * g * g
        s = beta3 * s + (d / 1e-6) * d * g
        new = max(d, r / abs(s))
        w -= d * m / v**0.5
        d = new
        optimizer.zero_grad()
        (x - 1).square().sum().backward()
        optimizer.step()
    assert float(x.detach()) == pytest.approx(w, rel=1e-5) and optimizer.param_groups[0]["d"] == pytest.approx(
        d, rel=1e-5
    )


def test_a_run_goes_on_from_its_saved_state_bit_by_bit():
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.randn(4))
    optimizer = Prodigy([x], weight_decay=0.01)

    def step(p, o):
        o.zero_grad()
        (p - 3).square().sum().backward()
        o.step()

    for _ in range(5):
        step(x, optimizer)
    y = torch.nn.Parameter(x.detach().clone())
    other = Prodigy([y], weight_decay=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        step(x, optimizer)
        step(y, other)
    assert torch.equal(x, y) and optimizer.param_groups[0]["d"] == other.param_groups[0]["d"]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="d0 > 0"):
        Prodigy([torch.nn.Parameter(torch.zeros(1))], d0=0)


@pytest.mark.parametrize("safeguard", [True, False])
def test_it_equals_the_authors_package_where_that_is_installed(safeguard):
    package = pytest.importorskip("prodigyopt")
    weights = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    how = {"weight_decay": 0.01, "safeguard_warmup": safeguard}
    ours = Prodigy([weights[0]], bias_correction=True, **how)
    theirs = package.Prodigy([weights[1]], use_bias_correction=True, **how)
    for _ in range(30):
        for p, optimizer in zip(weights, (ours, theirs), strict=True):
            optimizer.zero_grad()
            (p - torch.arange(5)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(*weights)
