"""drawing/pipeline.py: what a call promises and refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from condit.controls.control import Control
from condit.drawing.pipeline import Pipeline
from condit.drawing.settings import image_generators
from condit.nn.attention import Attend, Call


@pytest.fixture(scope="module")
def pipe(make_pipe) -> Pipeline:
    return make_pipe()


def noise_of(pipe: Pipeline, generators: list[torch.Generator]) -> Tensor:
    """The first noise of 32 x 48 pixels."""
    return pipe.noise(pipe.layout(len(generators), (32, 48)), generators)(torch.empty(0))


def latents(pipe: Pipeline, prompt: str | list[str] = "a fox", **how) -> Tensor:
    return pipe(prompt, **{"seed": 0, "output_type": "latent", **how}).images


# What comes back


def test_images_come_as_pil_tensors_or_latents(pipe):
    (picture,) = pipe("a fox", seed=0).images
    assert isinstance(picture, Image.Image) and picture.size == (48, 32)
    tensor = pipe("a fox", seed=0, output_type="pt").images
    assert tensor.shape == (1, 3, 32, 48) and tensor.abs().max() <= 1
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    torch.testing.assert_close(pixels, (tensor[0] + 1) * 127.5, rtol=0, atol=0.51)  # rounded to bytes
    assert latents(pipe).shape == (1, 24, 16)


def test_the_recipe_holds_what_repeats_the_image(pipe):
    result = pipe(["a fox", "snow"], "fog", seed=3, num_inference_steps=2, guidance_scale=2.0)
    assert result.seeds == [3, 4]
    assert result.recipe == {
        "model": "random",
        "hash": "0" * 16,
        "prompt": ["a fox", "snow"],
        "negative_prompt": ["fog", "fog"],
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "image_guidance_scale": None,
        "eta": 0.0,
        "height": 32,
        "width": 48,
        "seeds": [3, 4],
        "controls": [],
    }


def test_the_callback_sees_every_step_and_may_replace_the_latents(pipe):
    seen = []

    def callback(given, i, t, kept):
        assert given is pipe
        seen.append((i, round(t, 3)))
        return {"latents": torch.zeros_like(kept["latents"])} if i == 2 else None

    assert not latents(pipe, callback_on_step_end=callback).any()
    assert [i for i, _ in seen] == [0, 1, 2] and seen[0][1] == 1.0


# Seeds


def test_image_i_starts_from_seed_plus_i_whatever_the_batch(pipe):
    seeds, generators = image_generators(3, 7, None)
    noise = noise_of(pipe, generators)
    for i in range(3):
        alone, generators = image_generators(1, 7 + i, None)
        assert alone == seeds[i : i + 1] == [7 + i]
        assert torch.equal(noise_of(pipe, generators), noise[i : i + 1])


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_row_of_a_batch_equals_its_single_run(pipe, eta):
    batch = latents(pipe, ["a fox", "snow"], num_images_per_prompt=2, seed=5, eta=eta)
    for i, prompt in enumerate(["a fox", "a fox", "snow", "snow"]):
        torch.testing.assert_close(batch[i : i + 1], latents(pipe, prompt, seed=5 + i, eta=eta), rtol=0, atol=1e-4)


def test_eta_draws_fresh_noise_by_the_seed_and_is_the_models_own_by_default(pipe, monkeypatch):
    plain, fresh = latents(pipe, seed=5), latents(pipe, seed=5, eta=1.0)
    assert torch.equal(plain, latents(pipe, seed=5, eta=0.0))
    assert not torch.equal(plain, fresh) and torch.equal(fresh, latents(pipe, seed=5, eta=1.0))
    monkeypatch.setattr(pipe.model, "parts", replace(pipe.parts, eta=1.0))
    assert torch.equal(latents(pipe, seed=5), fresh) and pipe("a fox", seed=5).recipe["eta"] == 1.0
    given = noise_of(pipe, [torch.Generator().manual_seed(9)])
    drawn = pipe("a fox", seed=5, latents=given, output_type="latent")
    assert drawn.seeds == [5] and not torch.equal(drawn.images, latents(pipe, seed=6, latents=given))
    with pytest.raises(ValueError, match="eta must be 0 to 1"):
        pipe("a fox", eta=1.5)


def test_a_seed_means_the_noise_of_a_generator_of_that_seed(pipe):
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(latents(pipe, seed=None, generator=generator), latents(pipe, seed=5))


def test_one_generator_draws_the_images_in_turn_and_a_list_one_each(pipe):
    one = noise_of(pipe, image_generators(2, None, torch.Generator().manual_seed(5))[1])
    each = noise_of(pipe, [torch.Generator().manual_seed(s) for s in (5, 6)])
    assert torch.equal(one[0], each[0]) and not torch.equal(one[1], each[1])


def test_without_a_seed_images_differ_and_can_be_repeated(pipe):
    first, second = (pipe("a fox", output_type="latent") for _ in range(2))
    assert not torch.equal(first.images, second.images)
    assert torch.equal(latents(pipe, seed=first.seeds[0]), first.images)


def test_the_global_generator_is_left_alone(pipe):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    pipe("a fox")
    assert torch.equal(torch.get_rng_state(), state)


def test_given_latents_are_the_start(pipe):
    noise = noise_of(pipe, [torch.Generator().manual_seed(9)])
    assert torch.equal(latents(pipe, seed=None, latents=noise), latents(pipe, seed=9))


# Guidance


class Count(Control):
    """Counts predictions; stays in every branch."""

    def __init__(self):
        self.calls = 0

    def around(self, call: Call, attend: Attend) -> Tensor:
        self.calls += call.site.index == 0
        return attend(call)

    def negative(self) -> Control:
        return self


@pytest.mark.parametrize(("scale", "image_scale", "predictions"), [(1.0, None, 1), (3.0, None, 2), (3.0, 1.5, 3)])
def test_a_step_costs_as_many_predictions_as_its_guidance_needs(pipe, scale, image_scale, predictions):
    count = Count()
    latents(pipe, controls=[count], guidance_scale=scale, image_guidance_scale=image_scale, num_inference_steps=1)
    assert count.calls == predictions


def test_a_distilled_model_predicts_once_and_twice_to_guide_its_controls(make_pipe):
    pipe = make_pipe(guidance_embeds=True, distilled=True)
    for image_scale, predictions in ((None, 1), (1.5, 2)):
        count = Count()
        latents(pipe, controls=[count], image_guidance_scale=image_scale, num_inference_steps=1)
        assert count.calls == predictions


def test_the_distilled_guidance_is_an_input_of_the_model(make_pipe):
    pipe = make_pipe(guidance_embeds=True, distilled=True)
    assert not torch.equal(latents(pipe, guidance_scale=1.0), latents(pipe, guidance_scale=4.0))


@pytest.mark.parametrize("distilled", [False, True])
def test_image_guidance_zero_is_the_empty_reference(make_pipe, make_ip, pictures, distilled):
    pipe = make_pipe(guidance_embeds=distilled, distilled=distilled)
    control = make_ip(pipe).control(pictures(1)[0])
    off = latents(pipe, controls=[control], image_guidance_scale=0.0)
    empty = latents(pipe, controls=[control.negative()], image_guidance_scale=0.0)
    torch.testing.assert_close(off, empty, rtol=0, atol=1e-5)
    assert (off - latents(pipe, controls=[control])).abs().max() > 1e-2


def test_a_negative_prompt_acts_and_the_empty_one_is_the_default(pipe):
    assert torch.equal(latents(pipe, negative_prompt=""), latents(pipe))
    assert not torch.equal(latents(pipe, negative_prompt="fog"), latents(pipe))


def test_each_prompt_may_have_its_own_negative(pipe):
    both = latents(pipe, ["a fox", "snow"], negative_prompt=["fog", "rain"])
    alone = latents(pipe, "snow", negative_prompt="rain", seed=1)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)


def test_the_canvas_of_the_text_reaches_the_backbone(pipe):
    class OtherCanvas(torch.nn.Module):
        def forward(self, prompts):
            text = pipe.parts.text(prompts)
            return replace(text, canvas=-text.canvas)

    other = Pipeline(replace(pipe.parts, text=OtherCanvas()))
    assert not torch.equal(latents(other), latents(pipe))


def test_an_x_prediction_is_turned_into_a_velocity(make_pipe):
    pipe = make_pipe(prediction="x")
    kept: list[Tensor] = []

    hook = pipe.backbone.register_forward_hook(lambda module, inputs, out: kept.append(out))
    generated = latents(pipe, guidance_scale=1.0, num_inference_steps=2)
    hook.remove()
    torch.testing.assert_close(generated, kept[-1], rtol=0, atol=1e-5)  # the last step lands on the last prediction


# What is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": []}, "prompt must be a string"),
        ({"prompt": ["a", 3]}, "prompt must be a string"),
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 to 1000; found 0"),
        ({"num_inference_steps": 1001}, "found 1001"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1; found 0"),
        ({"height": 36}, "multiples of 8 up to 4096; found 36 x 48"),
        ({"height": -32}, "found -32 x 48"),
        ({"width": 8192}, "found 32 x 8192"),
        ({"output_type": "numpy"}, "output_type must be 'pil', 'pt', 'np' or 'latent'; found 'numpy'"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"seed": 0, "generator": torch.Generator()}, "Give seed or generator, not both"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1 images"),
        ({"controls": "tiny/style"}, "made by adapter.control"),
        ({"latents": torch.zeros(1, 16, 4, 6)}, r"packed tokens of shape \(1, 24, 16\); found \(1, 16, 4, 6\)"),
    ],
)
def test_a_wrong_argument_raises_before_anything_is_generated(pipe, given, message):
    forwards = []
    hook = pipe.backbone.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a fox", **given})
    hook.remove()
    assert not forwards


def test_the_embedded_model_refuses_other_sizes(make_pipe):
    with pytest.raises(ValueError, match="tiny generates 32 x 48; found 48 x 48"):
        make_pipe(name="tiny")("a fox", height=48)


def test_an_image_of_nan_raises(pipe):
    with pytest.raises(ValueError, match="NaN"):
        pipe("a fox", latents=torch.full((1, 24, 16), torch.nan))


# What adapters ask for


def test_another_size_is_generated_by_a_model_without_a_canvas(make_pipe):
    assert make_pipe(canvas=False)("a fox", height=16, width=40).images[0].size == (40, 16)


def test_references_are_read_at_the_models_size_in_minus_one_to_one(pipe):
    loaded = pipe.read_images([Image.new("RGB", (7, 9), "white"), np.zeros((4, 4, 3), np.uint8)], None)
    assert loaded.shape == (2, 3, 32, 48)
    assert torch.equal(loaded[0], torch.ones(3, 32, 48)) and torch.equal(loaded[1], -torch.ones(3, 32, 48))


def test_an_annotator_makes_the_condition_image(pipe, pictures):
    gray = pipe.read_images(pictures(1)[0], "gray")
    assert torch.equal(gray[:, 0], gray[:, 1]) and torch.equal(gray[:, 0], gray[:, 2])


def test_a_condition_is_encoded_by_the_models_own_autoencoder(pipe, pictures):
    images = pipe.read_images(pictures(2), None)
    tokens, grid = pipe.encode_condition(images)
    assert grid == (4, 6) and tokens.shape == (2, 24, 16)


def test_a_source_is_described_by_path_and_content(pipe, pictures, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(pictures(1)[0]).save(path)
    (from_file,), (from_array,) = pipe.describe_source(str(path)), pipe.describe_source(pictures(1)[0])
    assert from_file == {"path": str(path), **from_array} and len(from_array["sha256"]) == 16
    assert len(pipe.describe_source([str(path), [path, path]])) == 3
