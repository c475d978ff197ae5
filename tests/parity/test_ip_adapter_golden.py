"""IP-Adapter against the official classes and diffusers; golden/ip_adapter holds what they computed. What is compared,
and how exactly: lab/src/condit_lab/parity/ip_adapter.py.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from condit.controls.control import region_levels, region_mask
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.ip_projectors import ImageProjection
from condit_lab.parity.ip_adapter import CHECKS, adapter_of, layers_of, reference
from condit_lab.parity.unets import golden_pipe, unet_of

FOLDER = Path(__file__).parent / "golden" / "ip_adapter"
VARIANTS = [("sd15", "global"), ("sd15", "plus"), ("sd15", "full"), ("sdxl", "global"), ("sdxl", "plus")]
every_variant = pytest.mark.parametrize(("tag", "variant"), VARIANTS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.what)
def test_the_recorded_tensors_are_reproduced(check):
    assert check.run(FOLDER).exceeding() == []


@every_variant
def test_strength_zero_is_the_plain_unet_and_every_recorded_layer_is_there(tag, variant):
    pipe = golden_pipe(FOLDER, tag)
    given = pipe.tensors("inputs")
    assert torch.equal(pipe.predict(given, reference(FOLDER, tag, variant, 0.0)), pipe.predict(given))
    paths = set(layers_of(pipe.tensors(variant)))
    assert paths <= set(adapter_of(FOLDER, tag, variant).sites) and (paths or variant == "full")


@pytest.mark.parametrize("tag", ["sd15", "sdxl"])
def test_a_bin_file_is_the_safetensors_file(tag):
    one, other = (adapter_of(FOLDER, tag, "global", ending).state_dict() for ending in ("bin", "safetensors"))
    assert list(one) == list(other) and all(torch.equal(t, other[n]) for n, t in one.items())


@every_variant
def test_what_was_read_is_saved_under_the_same_names(tag, variant):
    file = load_file(golden_pipe(FOLDER, tag).file(f"{variant}_adapter.safetensors"))
    saved = adapter_of(FOLDER, tag, variant).tensors()
    assert saved.keys() == file.keys() and all(torch.equal(t, file[n]) for n, t in saved.items())


def test_a_mask_on_every_level_is_the_mask_on_that_grid():
    mask = golden_pipe(FOLDER, "sd15").tensors("regional_diffusers")["masks_a"][:, 0]
    for n, level in region_levels(mask, (16, 16), "bicubic").items():
        side = round(n**0.5)
        assert torch.equal(level, region_mask(mask, (side, side), mode="bicubic"))


def test_training_changes_the_adapter_alone():
    unet = unet_of(golden_pipe(FOLDER, "sd15").config["unet"], FOLDER / "sd15_unet.safetensors")
    sizes = 12, unet.config.cross_attention_dim, 4
    adapter = IPAdapter.new(unet, IPConfig(sizes[0], sizes[2], sizes[1]), projector=ImageProjection(*sizes))
    pipe = golden_pipe(FOLDER, "sd15")
    given = pipe.tensors("inputs")
    control = pipe.at_work(adapter.reference(given["clip_image_embeds"]), len(given["sample"]))
    unet(given["sample"], given["timestep"].expand(2).float(), given["text_embeds"], controls=control).sum().backward()
    assert all(p.grad is None for p in unet.parameters()) and all(p.grad is not None for p in adapter.parameters())


def test_images_of_any_shape_come_to_the_encoders_square():
    encoder = golden_pipe(FOLDER, "sd15").image
    assert encoder is not None
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))
    crop, squash, pad = (encoder.pixels([picture], fit) for fit in ("crop", "squash", "pad"))  # type: ignore[arg-type]
    assert crop.shape == squash.shape == pad.shape == (1, 3, 28, 28)
    assert not torch.equal(crop, squash) and not torch.equal(squash, pad)
    with pytest.raises(ValueError, match="fit must be"):
        encoder.pixels([picture], "stretch")  # type: ignore[arg-type]
