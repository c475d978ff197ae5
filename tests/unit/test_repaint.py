"""Image to image and inpainting, on every family that reads prompts."""

import numpy as np
import pytest
import torch
from PIL import Image

HOW = {"seed": 0, "num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture(params=["flow", "sd15", "pixart"])
def pipe(request, make_pipe, make_latent, make_pixart):
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


def test_an_image_is_a_start_and_less_strength_stays_nearer_to_it(pipe, pictures):
    given = Image.fromarray(pictures(1)[0]).resize(pipe.size[::-1])
    plain = pipe("a fox", **HOW).images
    near, far = (pipe("a fox", image=given, strength=s, **HOW).images for s in (0.25, 1.0))
    clean = pipe.encode_images(pipe.read_images(given, None))
    assert not torch.equal(near, plain) and not torch.equal(near, far)
    assert (near - clean).norm() < (far - clean).norm()


def test_outside_the_mask_the_latents_are_those_of_the_image(pipe, pictures):
    given = Image.fromarray(pictures(1)[0]).resize(pipe.size[::-1])
    clean = pipe.encode_images(pipe.read_images(given, None))
    for strength in (None, 0.5):
        out = pipe("a fox", image=given, mask_image=mask_of(pipe), strength=strength, **HOW).images
        under = left_half(out, pipe)
        torch.testing.assert_close(out[~under], clean[~under], rtol=0, atol=1e-6)
        assert not torch.allclose(out[under], clean[under], atol=1e-3)
