"""Image to image and inpainting, on every family with latents."""

import numpy as np
import pytest
import torch
from PIL import Image

import condit
from class_models import DIFFIT, DIT, write, write_vae
from condit.diffusion.gaussian import add_noise, gaussian
from condit.diffusion.gaussian_samplers import ddim
from condit.drawing.settings import Settings

HOW = {"seed": 0, "num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture(params=["flow", "sd15", "pixart", "dit", "diffit"])
def pipe(request, make_pipe, make_latent, make_pixart, tmp_path):
    if request.param in ("dit", "diffit"):
        write_vae(tmp_path)
        return condit.load(write(tmp_path, DIT if request.param == "dit" else DIFFIT, ["a fox", *"1234"]))
    if request.param == "sd15":
        return make_latent("sd15")
    return make_pixart(make_pipe()) if request.param == "pixart" else make_pipe()


def mask_of(pipe) -> Image.Image:
    """White on the left half."""
    height, width = pipe.size
    white = np.zeros((height, width), np.uint8)
    white[:, : width // 2] = 255
    return Image.fromarray(white)


def left_half(latents: torch.Tensor, pipe) -> torch.Tensor:
    """Whether an element of the latents (B, ...) lies under the mask."""
    rows, columns = pipe.size[0] // pipe.pixels, pipe.size[1] // pipe.pixels
    if latents.ndim == 3:
        return ((torch.arange(rows * columns) % columns) < columns // 2)[:, None].expand_as(latents)
    return (torch.arange(latents.shape[-1]) < latents.shape[-1] // 2).expand_as(latents)


def encoded(pipe, image: Image.Image) -> torch.Tensor:
    """The sample of the image's posterior that a call with seed 0 takes."""
    return pipe.encode_images(pipe.read_images(image, None), [torch.Generator().manual_seed(0)])


def test_an_image_is_a_start_and_less_strength_stays_nearer_to_it(pipe, pictures):
    given = Image.fromarray(pictures(1)[0]).resize(pipe.size[::-1])
    plain = pipe("a fox", **HOW).images
    near, far = (pipe("a fox", image=given, strength=s, **HOW).images for s in (0.5, 1.0))
    clean = encoded(pipe, given)
    assert not torch.equal(near, plain) and not torch.equal(near, far)
    assert (near - clean).norm() < (far - clean).norm()


def test_outside_the_mask_the_latents_are_those_of_the_image(pipe, pictures):
    given = Image.fromarray(pictures(1)[0]).resize(pipe.size[::-1])
    clean = encoded(pipe, given)
    for strength in (None, 0.5):
        out = pipe("a fox", image=given, mask_image=mask_of(pipe), strength=strength, **HOW).images
        under = left_half(out, pipe)
        torch.testing.assert_close(out[~under], clean[~under], rtol=0, atol=1e-6)
        assert not torch.allclose(out[under], clean[under], atol=1e-3)


def test_image_to_image_of_a_class_model_is_the_rest_of_its_sampler_from_the_noised_image(tmp_path, pictures):
    write_vae(tmp_path)
    pipe = condit.load(write(tmp_path, DIT))
    given, how = Image.fromarray(pictures(1)[0]).resize((32, 32)), {**HOW, "num_inference_steps": 5, "sampler": "ddim"}
    found = pipe(1, image=given, strength=0.6, **how)
    assert found.recipe["strength"] == 0.6 and len(found.recipe["image"]) == 1
    generator = torch.Generator().manual_seed(0)
    x0 = pipe.encode_images(pipe.read_images(given, None), [generator])
    noise = torch.randn(1, 4, 4, 4, generator=generator)
    whole = gaussian(respacing="5")
    x = add_noise(whole, x0, torch.tensor([2]), noise)  # three of five levels, counted from the clean end
    path = whole.since(2)
    assert torch.equal(path.alphas_cumprod, whole.alphas_cumprod[:3]) and [path.step(0).time] == [whole.step(2).time]
    settings = Settings(num_inference_steps=5, sampler="ddim")
    draft = pipe.begin(settings, 1, seed=0, output_type="latent")
    predict = pipe.predictor(draft.guided.sides, draft.guided.layout, draft.guided.settings)
    torch.testing.assert_close(found.images, ddim(predict, x, path), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="1 of 5 steps is left, and 2 are needed. Raise strength"):
        pipe(1, image=given, strength=0.2, **how)
    (tmp_path / "bare").mkdir()
    bare = condit.load(write(tmp_path / "bare", DIT))
    with pytest.raises(ValueError, match="loaded without an autoencoder"):
        bare(1, image=given, **how)
