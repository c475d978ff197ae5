"""Masks of a call: three masks are three masks, whether as a list or as one array, for every control and pipeline."""

import numpy as np
import pytest
import torch
from PIL import Image

from condit.data.images import load_masks, mask_list

OFF, ON = torch.zeros(32, 48), torch.ones(32, 48)
THREE = [OFF, ON, OFF]


@pytest.mark.parametrize("masks", [torch.stack(THREE), torch.stack(THREE)[:, None], torch.stack(THREE).numpy(), THREE])
def test_n_masks_as_one_array_are_n_masks(masks):
    assert torch.equal(load_masks(masks), torch.stack(THREE))


def test_one_mask_stays_one_mask():
    picture = np.zeros((32, 48, 3), np.uint8)
    for mask in (OFF, OFF[None], OFF.numpy(), picture, Image.fromarray(picture)):
        assert load_masks(mask).shape == (1, 32, 48)


@pytest.mark.parametrize("array", [torch.zeros(32, 48, 3), torch.zeros(3, 8, 4), np.zeros((3, 8, 3), np.float32)])
def test_a_shape_that_could_be_masks_or_an_image_is_refused(array):
    with pytest.raises(ValueError, match="could be .* masks or one image with channels"):
        mask_list(array)


@pytest.mark.parametrize("kind", ["ip", "omini"])
def test_three_masks_in_a_tensor_act_as_the_same_list(kind, make_pipe, make_ip, make_omini, pictures):
    pipe = make_pipe()
    adapter = {"ip": make_ip, "omini": make_omini}[kind](pipe)
    images = [
        pipe(["a", "b", "c"], controls=[adapter.control(pictures(1)[0], mask=mask)], seed=0, output_type="pt").images
        for mask in (torch.stack(THREE), THREE)
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize("kind", ["repaint", "edit"])
def test_three_masks_in_a_tensor_serve_three_images(kind, make_pipe, pictures):
    pipe, whole = make_pipe(), list(pictures(3))
    results = []
    for mask in (torch.stack(THREE), THREE):
        if kind == "edit":
            result = pipe.edit(whole, ["a"] * 3, ["b"] * 3, mask=mask, num_inference_steps=2, output_type="pt")
        else:
            result = pipe(["a"] * 3, image=whole, mask_image=mask, strength=0.5, seed=0, output_type="pt")
            assert len(result.recipe["mask_image"]) == 3
        results.append(result.images)
    assert torch.equal(*results)


def test_the_colour_of_a_mask_counts_by_its_luma(make_pipe, pictures):
    green = Image.new("RGB", (48, 32), (0, 255, 0))  # its red channel is 0
    pipe, how = make_pipe(), {"image": pictures(1)[0], "strength": 0.5, "seed": 0, "output_type": "pt"}
    images = [pipe("a", mask_image=mask, **how).images for mask in (green, ON)]
    assert torch.equal(*images)
