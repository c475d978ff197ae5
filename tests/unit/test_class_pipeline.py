"""drawing/classes.py: class-conditional generation with DiT and DiffiT."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import condit
from class_models import DIFFIT, DIT, NAMES, draw, write, write_vae
from condit.backbones.diffit import DiffiT
from condit.controls.control import Control, Step
from condit.diffusion.gaussian import gaussian
from condit.diffusion.gaussian_samplers import ancestral
from condit.diffusion.guidance import class_guidance, power_cosine_scale
from condit.diffusion.steps import by_timestep, image_noise
from condit.drawing.pipeline import Pipeline, Result
from condit.encoders.vae import PatchAutoencoder, PatchAutoencoderConfig
from condit.nn.attention import Attend, Call
from condit.weights.files import save_tensors
from condit.weights.folders import WEIGHTS


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dit")
    write(folder)
    write_vae(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(home) -> Pipeline:
    return condit.load(home / "model.safetensors")


@pytest.fixture(scope="module")
def diffit(tmp_path_factory) -> Pipeline:
    return condit.load(write(tmp_path_factory.mktemp("diffit"), DIFFIT))


# Drawing


def test_images_come_as_pil_tensors_or_latents(pipe):
    (picture,) = pipe("snail", seed=0, num_inference_steps=2).images
    assert isinstance(picture, Image.Image) and picture.size == (32, 32)
    tensor = draw(pipe, output_type="pt")
    assert tensor.shape == (1, 3, 32, 32) and tensor.abs().max() <= 1
    vae, latents = pipe.parts.vae, draw(pipe)
    assert vae.config.scaling_factor == 0.18215 and latents.shape == (1, 4, 4, 4)
    assert torch.equal(tensor, vae.decode(latents / 0.18215).sample.clamp(-1, 1))


def test_names_and_numbers_mean_the_same_class(pipe):
    named = draw(pipe, ["golden retriever", "Red Fox", None])
    assert torch.equal(named, draw(pipe, [1, 2, None]))
    assert torch.equal(named, draw(pipe, ["1", np.int64(2), None]))
    # Equal to the last bit in batches of one size only.
    assert torch.equal(draw(pipe, ["golden retriever", "Red Fox"]), draw(pipe, torch.tensor([1, 2])))
    assert not torch.equal(draw(pipe, 1), draw(pipe, 2))


def test_a_drawing_is_the_official_sampler_over_the_official_guidance(pipe):
    model = pipe.backbone
    noise = image_noise([torch.Generator().manual_seed(seed) for seed in (7, 8)])
    start = noise(torch.empty(2, 4, 4, 4))
    for channels, given in ((3, 3), (None, "all")):
        generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
        noise = image_noise(generators)
        assert torch.equal(noise(start), start)
        denoise = class_guidance(model, torch.tensor([1, 2]), 5, 4.0, channels=channels)
        with torch.no_grad():
            expected = ancestral(by_timestep(denoise), start, gaussian(respacing="5"), noise=noise)
        actual = draw(pipe, [1, 2], seed=7, num_inference_steps=5, guidance_channels=given)
        assert torch.equal(actual, expected)  # 4.0 is the default of the official sample.py


def test_diffit_generates_with_its_power_cosine_schedule_and_forms_its_biases_once(diffit, monkeypatch):
    formed, received = [], []
    biases, forward = type(diffit.backbone).biases, type(diffit.backbone).forward
    monkeypatch.setattr(DiffiT, "biases", lambda self, grid: formed.append(grid) or biases(self, grid))
    monkeypatch.setattr(DiffiT, "forward", lambda self, *a, **k: received.append(k["biases"]) or forward(self, *a, **k))
    actual = draw(diffit, num_inference_steps=4)
    assert formed == [(2, 2)] and len(received) == 4 and all(given is received[0] for given in received)
    g = torch.Generator().manual_seed(0)
    noise = image_noise([g])
    start = noise(torch.empty(1, 4, 4, 4))
    network = lambda x, t, y: forward(diffit.backbone, x, t, y)  # noqa: E731
    denoise = class_guidance(network, torch.tensor([1]), 5, lambda t: power_cosine_scale(t, 4.4))
    with torch.no_grad():
        expected = ancestral(by_timestep(denoise), start, gaussian(respacing="4"), noise=noise)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, draw(diffit, num_inference_steps=4, guidance_power=0.0))


@pytest.mark.parametrize("side", [32, 64])
def test_published_guidance_follows_the_size_of_diffit(side, tmp_path):
    parts = condit.load(write(tmp_path, replace(DIFFIT, input_size=side, hidden_size=8, num_heads=1))).parts
    assert (parts.guidance, parts.power) == ((4.4, 4.0) if side == 32 else (1.49, 0.0))


def test_ddim_adds_no_noise_at_eta_0_and_does_at_eta_1(pipe):
    first = draw(pipe, sampler="ddim")
    start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first, draw(pipe, sampler="ddim", seed=9, latents=start))
    noisy = draw(pipe, sampler="ddim", eta=1.0, latents=start)
    assert not torch.equal(noisy, draw(pipe, sampler="ddim", eta=1.0, latents=start, seed=9))
    assert not torch.equal(first, draw(pipe))


def test_the_callback_sees_every_step_and_may_replace_the_latents(pipe):
    seen = []

    def callback(given, i, t, kept):
        assert given is pipe
        seen.append((i, t))
        return {"latents": torch.zeros_like(kept["latents"])} if i == 2 else None

    assert not draw(pipe, callback_on_step_end=callback).any()
    assert seen == [(0, 999.0), (1, 500.0), (2, 0.0)]


def test_the_recipe_holds_what_repeats_the_image(pipe):
    result = pipe(["snail", None], seed=3, num_inference_steps=2, output_type="latent")
    assert isinstance(result, Result) and result.seeds == [3, 4]
    assert len(result.recipe.pop("hash")) == 16 and result.recipe.pop("model").endswith("model.safetensors")
    assert result.recipe == {
        "label": ["snail", None],
        "class": [3, None],
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "guidance_power": 0.0,
        "guidance_channels": 3,
        "sampler": "ancestral",
        "eta": 0.0,
        "height": 32,
        "width": 32,
        "seeds": [3, 4],
        "controls": [],
    }


# Seeds


@pytest.mark.parametrize("which", ["pipe", "diffit"])
def test_a_row_of_a_batch_equals_its_single_run(which, request):
    pipe = request.getfixturevalue(which)
    batch = draw(pipe, [1, None], num_images_per_prompt=2, seed=5)
    for i, label in enumerate([1, 1, None, None]):
        alone = draw(pipe, [label, 3], seed=5 + i)[:1]  # beside a class, so that both are guided
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-5, atol=1e-4)  # other sums in a larger batch


def test_a_repeat_is_bit_equal_and_the_global_generator_is_left_alone(pipe):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = pipe(1, num_inference_steps=3, output_type="latent")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draw(pipe, seed=first.seeds[0]), first.images)
    generators = [torch.Generator().manual_seed(s) for s in (4, 5)]
    assert torch.equal(draw(pipe, [1, 2], seed=None, generator=generators), draw(pipe, [1, 2], seed=4))


# Guidance


def rows_seen(pipe: Pipeline, label: Any, **how) -> list[int]:
    seen: list[int] = []
    hook = pipe.backbone.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    draw(pipe, label, num_inference_steps=2, **how)
    hook.remove()
    return seen


def test_the_batch_is_doubled_only_where_something_is_guided(pipe, diffit):
    assert rows_seen(pipe, [1, 2]) == [4, 4]
    assert rows_seen(pipe, [1, 2], guidance_scale=1.0) == [2, 2]
    assert rows_seen(diffit, [1, 2], guidance_scale=1) == [2, 2]
    assert rows_seen(pipe, [None, None]) == [2, 2]


def test_without_a_class_the_null_class_is_generated(pipe):
    assert torch.equal(draw(pipe, None), draw(pipe, [None], guidance_scale=1.0))
    assert not torch.equal(draw(pipe, None), draw(pipe, 0, guidance_scale=1.0))


@pytest.mark.parametrize("config", [DIT, DIFFIT])
def test_an_unconditional_model_generates_and_knows_no_class(config, tmp_path):
    config = replace(config, num_classes=0, learn_sigma=False)
    model = condit.load(write(tmp_path, config, names=None))
    assert draw(model, None, num_images_per_prompt=2).shape == (2, 4, 4, 4)
    with pytest.raises(ValueError, match="is unconditional and has no class 1"):
        draw(model, 1)
    with pytest.raises(ValueError, match="without a null class"):
        draw(model, None, guidance_scale=4.0)


def test_a_model_without_a_null_class_is_not_guided(tmp_path):
    model = condit.load(write(tmp_path, replace(DIT, class_dropout_prob=0.0)))
    assert rows_seen(model, 1) == [1, 1]
    with pytest.raises(ValueError, match="trained with classes only: give one of its 5 labels"):
        draw(model, None)
    with pytest.raises(ValueError, match="without a null class"):
        draw(model, 1, guidance_scale=2.0)


def test_three_channels_are_guided_of_four_and_all_of_other_latents(pipe, tmp_path):
    assert torch.equal(draw(pipe), draw(pipe, guidance_channels=3))
    wide = condit.load(write(tmp_path, replace(DIT, in_channels=6)))
    assert torch.equal(draw(wide), draw(wide, guidance_channels="all"))
    assert not torch.equal(draw(wide), draw(wide, guidance_channels=3))


def test_an_export_of_the_trainer_says_what_it_predicts(tmp_path):
    path = write(tmp_path / "transformer", replace(DIT, learn_sigma=False), names=None)
    noise = draw(condit.load(path), sampler="ddim")
    fields = {"id2label": dict(enumerate(NAMES)), "condit": {"predicts": "x0"}}
    (path.parent / "config.json").write_text(json.dumps(fields))
    pipe, kept = condit.load(tmp_path), []
    hook = pipe.backbone.register_forward_hook(lambda module, inputs, out: kept.append(out))
    generated = draw(pipe, "snail", sampler="ddim", guidance_scale=1.0)
    hook.remove()
    assert not torch.equal(generated, noise)
    torch.testing.assert_close(generated, kept[-1], rtol=0, atol=1e-5)  # the last step lands on the last prediction


def test_learned_variances_are_bounded_where_the_image_is_predicted(pipe, tmp_path):
    assert pipe.model.process(10).variance == "learned"  # as published
    path = write(tmp_path / "transformer", DIT, names=None)
    fields = {"id2label": dict(enumerate(NAMES)), "condit": {"predicts": "x0"}}
    (path.parent / "config.json").write_text(json.dumps(fields))
    assert condit.load(tmp_path).model.process(10).variance == "bounded"


# Sizes


@pytest.mark.parametrize("which", ["pipe", "diffit"])
def test_a_rectangle_is_generated(which, request):
    assert draw(request.getfixturevalue(which), height=32, width=48).shape == (1, 4, 4, 6)


# Controls


class Shift(Control):
    """Adds to what attention finds; counts the batches it sees and its steps."""

    def __init__(self, keeps: bool, seen: list):
        self.keeps, self.seen = keeps, seen

    def at(self, step: Step) -> Control:
        self.seen.append((step.index, step.count, round(step.t, 3)))
        return self

    def around(self, call: Call, attend: Attend) -> Tensor:
        return attend(call) + 1

    def negative(self) -> Control | None:
        return self if self.keeps else None


def test_a_control_acts_and_is_absent_from_the_unconditional_half_if_it_says_so(pipe):
    kept, gone = [], []
    both, one = (draw(pipe, 1, controls=[Shift(keeps, seen)]) for keeps, seen in ((True, kept), (False, gone)))
    assert not torch.equal(both, draw(pipe, 1)) and not torch.equal(both, one)
    assert gone == [(0, 3, 0.999), (1, 3, 0.5), (2, 3, 0.0)] and len(kept) == 6


def test_halves_one_after_the_other_equal_the_doubled_batch(pipe):
    class Nothing(Control):
        def negative(self) -> Control:
            return self

    generated = draw(pipe, controls=[Nothing()])
    torch.testing.assert_close(generated, draw(pipe), rtol=1e-5, atol=1e-4)  # other sums in a larger batch


class Joins(Control):
    def streams(self):
        return ()


# What is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label": "golden retreiver"}, r"No class 'golden retreiver' among 5. Near: 'golden retriever' \(1\)"),
        ({"label": 5}, "No class 5: .* has the classes 0 to 4"),
        ({"label": -1}, "No class -1"),
        ({"label": True}, "No class True"),
        ({"label": 1.0}, "No class 1.0"),
        ({"label": []}, "No label in the list"),
        ({"height": 40}, "multiples of 16 up to 4096; found 40 x 32"),
        ({"width": 0}, "found 32 x 0"),
        ({"num_inference_steps": 1}, "num_inference_steps must be 2 to 1000; found 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1; found 0"),
        ({"sampler": "euler"}, "sampler must be 'ancestral' or 'ddim'; found 'euler'"),
        ({"eta": 0.5}, "eta is the noise of sampler='ddim'"),
        ({"output_type": "numpy"}, "output_type must be 'pil', 'pt', 'np' or 'latent'; found 'numpy'"),
        ({"guidance_channels": 0}, "guidance_channels must be 'all' or a number from 1 to the latent's 4"),
        ({"guidance_channels": 5}, "the latent's 4, as the published 3; found 5"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number; found 2.5"),
        ({"seed": 0, "generator": torch.Generator()}, "Give seed or generator, not both"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1 images"),
        ({"latents": torch.zeros(1, 4, 2, 2)}, r"latents must be noise of shape \(1, 4, 4, 4\); found \(1, 4, 2, 2\)"),
        ({"controls": [Joins()]}, "Joins joins tokens to the sequence"),
        ({"controls": Joins()}, "found Joins"),
    ],
)
def test_a_wrong_argument_raises_before_anything_is_generated(pipe, given, message):
    forwards = []
    hook = pipe.backbone.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match=message):
        pipe(**{"label": 1, **given})
    hook.remove()
    assert not forwards


def test_an_image_of_nan_raises(pipe):
    with pytest.raises(ValueError, match="NaN"):
        pipe(1, num_inference_steps=2, latents=torch.full((1, 4, 4, 4), torch.nan))


def test_without_an_autoencoder_there_are_latents_only(tmp_path, home):
    path = write(tmp_path)
    with pytest.raises(ValueError, match=r"without an autoencoder.*vae=\.\.\."):
        condit.load(path)(1)
    assert draw(condit.load(path, vae=home / "vae"), output_type="pt").shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="4 latent channels, .* has 3"):
        condit.load(write(tmp_path, replace(DIT, in_channels=3)), vae=home)


def test_the_patch_autoencoder_of_condit_serves_too(tmp_path):
    config = PatchAutoencoderConfig(patch=4, latent_channels=4, width=8, depth=1)
    save_tensors(tmp_path / "vae" / WEIGHTS, PatchAutoencoder(config).state_dict())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(asdict(config)))
    assert draw(condit.load(write(tmp_path)), output_type="pt").shape == (1, 3, 16, 16)
