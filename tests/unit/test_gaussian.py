"""diffusion/gaussian.py: schedules, losses, samplers; and the guidance of classes (diffusion/guidance.py)."""

import math

import pytest
import torch
from torch import Tensor

from condit.diffusion import gaussian as g
from condit.diffusion import gaussian_samplers as samplers
from condit.diffusion.guidance import class_guidance, guide_channels, power_cosine_scale
from condit.diffusion.steps import by_timestep, draw, image_noise

X0 = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(1))
FIXED = g.gaussian(respacing="10", variance="large")
LEARNED = g.gaussian(respacing="10")


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def knowing(process: g.Gaussian, x0: Tensor) -> g.Denoise:
    """The network that knows the image: its noise is the one that leads from x0 to x."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        i = torch.searchsorted(process.timesteps, t.long())
        alpha_bar = g.at(process.alphas_cumprod.double(), i, x)
        return (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    return denoise


# Schedules


@pytest.mark.parametrize("name", ["linear", "quad", "warmup10", "warmup50"])
@pytest.mark.parametrize("steps", [100, 1000])
def test_schedules_rise_between_the_scaled_ends(name, steps):
    betas = g.beta_schedule(name, steps)
    assert betas.dtype == torch.float64 and len(betas) == steps
    assert betas[0].item() == pytest.approx(1e-4 * 1000 / steps) and betas[-1].item() == pytest.approx(20 / steps)
    assert (betas.diff() >= -1e-15).all()


def test_the_other_official_schedules_have_their_shapes():
    quad, linear = g.beta_schedule("quad", 3), g.beta_schedule("linear", 3)
    assert quad[1].sqrt().item() == pytest.approx((quad[0].sqrt() + quad[2].sqrt()).item() / 2)
    assert linear[1].item() == pytest.approx((linear[0] + linear[2]).item() / 2)
    assert g.beta_schedule("const", 50).tolist() == pytest.approx([0.4] * 50)
    assert g.beta_schedule("jsd", 4).tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])
    assert (g.beta_schedule("warmup10", 100)[10:] == 0.2).all() and (g.beta_schedule("warmup50", 100)[:49] < 0.2).all()
    assert g.beta_schedule("squaredcos_cap_v2", 1000)[-1] == 0.999


def test_an_unknown_schedule_raises_with_the_known_ones():
    with pytest.raises(ValueError, match="'cosine'.*squaredcos_cap_v2"):
        g.beta_schedule("cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 step; found 0"):
        g.beta_schedule("linear", 0)


@pytest.mark.parametrize(
    ("respacing", "expected"),
    [
        (None, list(range(10))),
        ("", list(range(10))),
        ("10", list(range(10))),
        ("4", [0, 3, 6, 9]),
        ("3", [0, 4, 9]),  # 4.5 rounds to the even neighbour
        ("1", [0]),
        ("2,1", [0, 4, 5]),
        ([1, 1, 2], [0, 4, 7, 9]),  # the first of three sections is one longer
        ("ddim5", [0, 2, 4, 6, 8]),
        ("ddim1", [0]),
    ],
)
def test_respacing_keeps_the_official_timesteps(respacing, expected):
    assert list(g.respaced_timesteps(10, respacing)) == expected


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("ddim6", "No whole stride over 10 timesteps gives 6"),
        ("11", "Section 1 of '11' has 10 timesteps; 11 cannot"),
        ("5,6", "Section 2"),
        ("0", "0 cannot be kept"),
        ("fast", "'250', '10,15,20' or 'ddim50'; found 'fast'"),
        ("ddim", "found 'ddim'"),
    ],
)
def test_a_respacing_that_cannot_be_is_refused(respacing, message):
    with pytest.raises(ValueError, match=message):
        g.respaced_timesteps(10, respacing)


def test_a_shorter_process_has_the_noise_levels_of_the_trained_one():
    full, short = g.gaussian(), g.gaussian(respacing="10,20,7")
    torch.testing.assert_close(short.alphas_cumprod, full.alphas_cumprod[short.timesteps], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="At least 2 steps"):
        g.gaussian(respacing="1")


def test_tables_stay_in_float64_and_what_meets_images_is_float32():
    assert LEARNED.sqrt_recipm1_alphas_cumprod.dtype == LEARNED.posterior_log_variance_clipped.dtype == torch.float64
    assert g.at(LEARNED.alphas_cumprod, torch.tensor([0, 9, 3]), X0).dtype == torch.float32
    assert g.at(LEARNED.alphas_cumprod, torch.tensor([0, 9, 3]), X0).shape == (3, 1, 1, 1)


# One step


def test_noise_of_level_i_and_back():
    i = torch.tensor([0, 5, 9])
    x = g.add_noise(FIXED, X0, i, NOISE)
    actual = g.reverse(FIXED, NOISE, x, i)
    # At the last level alpha_bar is 4e-5: x0 is a difference of numbers 157 times as large.
    torch.testing.assert_close(actual.x0, X0, rtol=0, atol=1e-3)
    torch.testing.assert_close(actual.mean, g.posterior(FIXED, X0, x, i).mean, rtol=0, atol=1e-3)


def test_learned_variances_run_between_the_two_bounds():
    i = torch.tensor([1, 5, 9])
    results = [
        g.reverse(LEARNED, torch.cat([NOISE, torch.full_like(NOISE, v)], 1), X0, i).log_variance[:, 0, 0, 0]
        for v in (-1.0, 0.0, 1.0)
    ]
    torch.testing.assert_close(results[0].double(), LEARNED.posterior_variance[i].log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[2].double(), LEARNED.betas[i].log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[1], (results[0] + results[2]) / 2, rtol=1e-6, atol=1e-6)


def test_bounded_variances_stay_between_the_two_bounds():
    process, i = g.gaussian(respacing="10", variance="bounded"), torch.tensor([1, 5, 9])
    beyond = [torch.cat([NOISE, torch.full_like(NOISE, v)], 1) for v in (-7.0, 0.5, 7.0)]
    results = [g.reverse(process, output, X0, i).variance[:, 0, 0, 0].double() for output in beyond]
    torch.testing.assert_close(results[0], process.posterior_variance[i], rtol=1e-6, atol=0)
    torch.testing.assert_close(results[2], process.betas[i], rtol=1e-6, atol=0)
    inside = g.reverse(g.gaussian(respacing="10"), beyond[1], X0, i).variance[:, 0, 0, 0].double()
    torch.testing.assert_close(results[1], inside, rtol=0, atol=0)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_fixed_variances_are_the_bounds(variance):
    process = g.gaussian(respacing="10", variance=variance)
    actual = g.reverse(process, NOISE, X0, torch.tensor([0, 4, 9]))
    expected = process.betas if variance == "large" else process.posterior_variance
    torch.testing.assert_close(actual.variance[1:, 0, 0, 0].double(), expected[[4, 9]], rtol=1e-6, atol=0)
    # At step 0 the logarithm is that of the posterior's second entry: its own would be minus infinity.
    assert actual.log_variance[0].item() == pytest.approx(process.posterior_variance[1].log().item())


def test_clip_bounds_the_estimate_and_nothing_else():
    i = torch.tensor([2, 5, 9])
    free, clipped = (g.reverse(FIXED, NOISE, 3 * X0, i, clip=clip) for clip in (False, True))
    assert torch.equal(clipped.x0, free.x0.clamp(-1, 1)) and free.x0.abs().max() > 1
    assert torch.equal(clipped.log_variance, free.log_variance)


@pytest.mark.parametrize(("process", "channels"), [(LEARNED, 4), (FIXED, 8)])
def test_an_output_that_does_not_fit_the_variance_raises(process, channels):
    output = torch.zeros(3, channels, 6, 5)
    with pytest.raises(ValueError, match=r"must put out.*learn_sigma must fit"):
        g.reverse(process, output, X0, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="learn_sigma"):
        g.training_loss(lambda x, t: output, process, X0, torch.zeros(3, dtype=torch.long), NOISE)


# Losses


def test_the_bound_trains_the_variance_alone():
    output = torch.randn(3, 8, 6, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    i = torch.tensor([0, 5, 9])
    vb = g.training_loss(lambda x, t: output, LEARNED, X0, i, NOISE).vb
    assert vb is not None
    (gradient,) = torch.autograd.grad(vb.sum(), output)
    assert gradient[:, :4].abs().max() == 0 and gradient[:, 4:].abs().amin((1, 2, 3)).min() > 0
    mse = g.training_loss(lambda x, t: output, LEARNED, X0, i, NOISE).mse
    assert mse is not None
    (gradient,) = torch.autograd.grad(mse.sum(), output)
    assert gradient[:, 4:].abs().max() == 0
    kl = g.training_loss(lambda x, t: output, LEARNED, X0, i, NOISE, kind="kl").loss
    (gradient,) = torch.autograd.grad(kl.sum(), output)
    assert gradient[:, :4].abs().max() > 0


def test_the_network_receives_the_trained_timestep():
    timesteps = []
    process = g.gaussian(respacing="10", predicts="x0", variance="small")
    loss = g.training_loss(lambda x, t: timesteps.append(t) or X0, process, X0, torch.tensor([0, 5, 9]), NOISE)
    assert timesteps[0].tolist() == process.timesteps[[0, 5, 9]].tolist() == [0, 555, 999]
    assert loss.loss.tolist() == [0, 0, 0] and loss.vb is None


def test_kinds_of_loss_differ_by_their_weights():
    output, i = torch.randn(3, 8, 6, 5, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 5, 9])
    plain, rescaled, kl, rescaled_kl = (
        g.training_loss(lambda x, t: output, LEARNED, X0, i, NOISE, kind=kind)
        for kind in ("mse", "rescaled_mse", "kl", "rescaled_kl")
    )
    assert plain.vb is not None and rescaled.vb is not None and plain.mse is not None
    torch.testing.assert_close(plain.loss, plain.mse + plain.vb)
    torch.testing.assert_close(rescaled.vb, plain.vb * 10 / 1000)
    torch.testing.assert_close(kl.loss, plain.vb)
    torch.testing.assert_close(rescaled_kl.loss, kl.loss * 10)
    assert kl.mse is None


def test_the_decoder_gives_all_256_pixel_values_the_mass_one():
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, log_scale in [(0.1, -2.0), (-0.95, -3.0), (1.2, 0.0)]:
        nll = g.decoder_nll(values, torch.tensor(mean).double(), torch.tensor(log_scale).double())
        assert nll.neg().exp().sum().item() == pytest.approx(1, abs=1e-8)


def test_equal_normals_have_no_distance_and_others_the_known_one():
    zero = torch.zeros(4)
    assert g.kl_normal(zero, zero, zero, zero).abs().max() == 0
    actual = g.kl_normal(zero + 1, zero + math.log(4), zero, zero)  # (s^2 - 1 - ln s^2 + m^2) / 2
    torch.testing.assert_close(actual, zero + (4 - 1 - math.log(4) + 1) / 2)


def test_the_prior_costs_next_to_nothing():
    assert (g.prior_bits(g.gaussian(), X0) < 1e-4).all()


# Samplers


def test_ddim_with_the_true_noise_arrives_at_the_image():
    actual = samplers.ddim(by_timestep(knowing(FIXED, X0)), NOISE, FIXED)
    torch.testing.assert_close(actual, X0, rtol=0, atol=1e-4)


def test_ancestral_steps_with_the_true_noise_arrive_at_the_image():
    noise = image_noise(generators(1, 2, 3))
    torch.testing.assert_close(
        samplers.ancestral(by_timestep(knowing(FIXED, X0)), NOISE, FIXED, noise=noise), X0, rtol=0, atol=1e-4
    )


def test_inversion_ends_where_ddim_begins():
    process = g.gaussian(respacing="ddim50", variance="small")
    start = g.add_noise(process, X0, torch.tensor([0, 0, 0]), NOISE)
    noise = samplers.ddim_invert(by_timestep(knowing(process, X0)), start, process)
    expected = g.add_noise(process, X0, torch.tensor([49] * 3), NOISE)
    torch.testing.assert_close(noise, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(samplers.ddim(by_timestep(knowing(process, X0)), noise, process), X0, rtol=0, atol=1e-3)


def test_inversion_and_back_returns_the_image_the_closer_the_more_steps():
    def error(respacing: str) -> float:
        process = g.gaussian(respacing=respacing, variance="small")

        def denoise(x: Tensor, t: Tensor) -> Tensor:  # the exact one if images are normal with variance 0.25
            alpha_bar = g.at(process.alphas_cumprod, torch.searchsorted(process.timesteps, t.long()), x)
            return x * (1 - alpha_bar).sqrt() / (0.25 * alpha_bar + 1 - alpha_bar)

        back = samplers.ddim(by_timestep(denoise), samplers.ddim_invert(by_timestep(denoise), X0, process), process)
        return (back - X0).abs().max().item() / X0.abs().max().item()

    assert error("1000") < 0.01
    assert error("1000") < error("100") / 5  # of first order


def test_the_last_reverse_step_ends_in_pure_noise():
    actual = samplers.ddim_reverse_step(FIXED, NOISE, X0, torch.tensor([9] * 3))
    torch.testing.assert_close(actual.x, NOISE, rtol=0, atol=1e-4)


def shrinking(x: Tensor, t: Tensor) -> Tensor:
    """Any network, with variances: its output depends on image and time."""
    return torch.cat([0.9 * x, torch.tanh(x)], 1) * (1 + t.float()[:, None, None, None] / 1000)


@pytest.mark.parametrize("eta", [None, 0.7])
def test_an_image_does_not_depend_on_its_batch(eta):
    def sample(*seeds: int) -> Tensor:
        made = generators(*seeds)
        start, noise = draw((4, 6, 5), made), image_noise(made)
        if eta is None:
            return samplers.ancestral(by_timestep(shrinking), start, LEARNED, noise=noise)
        return samplers.ddim(by_timestep(shrinking), start, LEARNED, noise=noise, eta=eta)

    together = sample(5, 6, 7)
    for row, seed in enumerate((5, 6, 7)):
        assert torch.equal(together[row], sample(seed)[0])
    assert torch.equal(sample(7, 5)[1], together[0])


def test_ddim_generates_noise_only_for_a_positive_eta():
    def none(x: Tensor) -> Tensor:
        raise AssertionError("asked for noise")

    assert torch.equal(
        samplers.ddim(by_timestep(shrinking), NOISE, LEARNED, noise=none),
        samplers.ddim(by_timestep(shrinking), NOISE, LEARNED),
    )
    with pytest.raises(ValueError, match="eta 0.5 adds noise"):
        samplers.ddim(by_timestep(shrinking), NOISE, LEARNED, eta=0.5)


def test_generators_must_be_as_many_as_images():
    with pytest.raises(ValueError, match="found 2 for 3 images"):
        samplers.ancestral(by_timestep(shrinking), NOISE, LEARNED, noise=image_noise(generators(1, 2)))


@pytest.mark.parametrize("name", ["ancestral", "ddim", "ddim_invert"])
def test_on_step_sees_every_step_and_may_replace_it(name):
    seen, received = [], []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        received.append((t.tolist(), x.abs().max().item()))
        return shrinking(x, t)

    def on_step(number: int, x: Tensor, x0: Tensor) -> Tensor | None:
        seen.append((number, x.shape, x0.shape))
        return torch.zeros_like(x) if number == 3 else None

    kwargs = {"noise": image_noise(generators(1, 2, 3))} if name == "ancestral" else {}
    getattr(samplers, name)(by_timestep(denoise), NOISE, LEARNED, on_step=on_step, **kwargs)
    steps = 9 if name == "ddim_invert" else 10
    assert seen == [(n, X0.shape, X0.shape) for n in range(steps)]
    order = LEARNED.timesteps.tolist()[:9] if name == "ddim_invert" else LEARNED.timesteps.tolist()[::-1]
    assert [t for t, _ in received] == [[t] * 3 for t in order]
    assert received[4][1] == 0 and received[3][1] > 0


def test_the_start_is_not_changed():
    start = NOISE.clone()
    samplers.ancestral(by_timestep(shrinking), start, LEARNED, noise=image_noise(generators(1, 2, 3)))
    assert torch.equal(start, NOISE)


# Guidance


class Network:
    """Adds the label to every channel; counts the rows that it is asked for."""

    def __init__(self):
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.rows.append(len(x))
        return torch.cat([x, x], 1) + y[:, None, None, None]


LABELS, T = torch.tensor([1, 2, 3]), torch.tensor([999, 500, 0])


@pytest.mark.parametrize(("channels", "guided"), [(3, 3), (None, 4), (1, 1), (9, 4)])
def test_guidance_moves_its_channels_from_the_null_class_and_leaves_the_rest(channels, guided):
    actual = class_guidance(Network(), LABELS, 10, 4.0, channels=channels)(X0, T) - torch.cat([X0, X0], 1)
    labels = LABELS[:, None, None, None].float()
    expected = labels.expand_as(actual).clone()
    expected[:, :guided] = 10 + 4 * (labels - 10)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_scale_one_asks_for_no_second_prediction():
    network = Network()
    actual = class_guidance(network, LABELS, 10, 1.0)(X0, T)
    class_guidance(network, LABELS, 10, 1.5)(X0, T)
    assert network.rows == [3, 6]
    assert torch.equal(actual, network(X0, T, LABELS))


def test_a_scale_may_depend_on_the_timestep():
    actual = class_guidance(Network(), LABELS, 10, lambda t: power_cosine_scale(t, 4.0), channels=None)(X0, T)
    for row, scale in enumerate(power_cosine_scale(T, 4.0).tolist()):
        alone = class_guidance(Network(), LABELS[row : row + 1], 10, scale, channels=None)(
            X0[row : row + 1], T[row : row + 1]
        )
        torch.testing.assert_close(actual[row], alone[0], rtol=0, atol=1e-5)


def test_guided_images_do_not_depend_on_their_batch():
    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return shrinking(x, t) + 0.1 * y[:, None, None, None]

    def sample(labels: list[int], seeds: list[int]) -> Tensor:
        made = generators(*seeds)
        denoise = class_guidance(network, torch.tensor(labels), 10, 4.0)
        return samplers.ancestral(by_timestep(denoise), draw((4, 6, 5), made), LEARNED, noise=image_noise(made))

    together = sample([1, 2, 3], [5, 6, 7])
    for row in range(3):
        torch.testing.assert_close(together[row], sample([row + 1], [row + 5])[0], rtol=1e-5, atol=1e-5)


def test_guide_channels_takes_a_scale_for_each_image():
    scale = torch.tensor([0.0, 1.0, 2.0])[:, None, None, None]
    actual = guide_channels(X0, NOISE, scale, 4)
    torch.testing.assert_close(actual, torch.stack([NOISE[0], X0[1], 2 * X0[2] - NOISE[2]]), rtol=0, atol=1e-5)
