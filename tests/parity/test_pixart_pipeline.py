"""PixArt end to end against diffusers' pipelines, from the same folder, and edits of it."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import condit
from condit.controls.dit4edit import PRESETS, Blend, DiT4Edit
from condit.controls.token_merging import TokenMerging
from condit.drawing.pipeline import Pipeline

diffusers: Any = importlib.import_module("diffusers")  # its names are made when they are asked for
PROMPTS = ["a red fox", "the snow"]


@pytest.fixture(scope="module")
def pair(make_pixart, pairs):
    return pairs(make_pixart)


@pytest.fixture(scope="module")
def pipe(pair) -> Pipeline:
    return pair("alpha-512")[1]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    small = np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small.repeat(8, 0).repeat(8, 1))  # 56 wide, 40 high


@pytest.mark.parametrize("kind", ["alpha-512", "alpha-1024", "sigma"])
@pytest.mark.parametrize(
    "how",
    [
        {"guidance_scale": 4.5},
        {"guidance_scale": 1.0, "num_inference_steps": 16},
        {"guidance_scale": 3.0, "negative_prompt": "snow", "height": 24, "width": 40},
    ],
    ids=["guided", "plain", "rectangle"],
)
def test_text_to_image_equals_diffusers(pair, kind, how):
    theirs, ours = pair(kind)
    size = {"height": 32, "width": 32, **how}
    given = {"num_inference_steps": 4, **size}
    noise = torch.randn(2, 4, size["height"] // 2, size["width"] // 2, generator=torch.Generator().manual_seed(1))
    raw = {"clean_caption": False, "use_resolution_binning": False}
    if "negative_prompt" in given:  # diffusers repeats one for all
        theirs_given = {**given, "negative_prompt": [given["negative_prompt"]] * 2}
    else:
        theirs_given = {**given, "negative_prompt": [""] * 2}
    wanted = theirs(PROMPTS, latents=noise, output_type="latent", **theirs_given, **raw).images
    images = ours(PROMPTS, latents=noise, output_type="latent", **given).images
    assert wanted.std() > 0.05
    # Steps of a network that amplifies; sums in another order.
    torch.testing.assert_close(images, wanted, rtol=1e-5, atol=1e-4 * float(wanted.abs().max()))


def test_the_defaults_are_the_published_ones(pair):
    theirs, ours = pair("sigma")
    assert (ours.parts.steps, ours.parts.guidance, ours.parts.solver, ours.parts.text.limit) == (20, 4.5, "dpm++", 300)
    assert pair("alpha-512")[1].parts.text.limit == 120
    side = theirs.transformer.config.sample_size * theirs.vae_scale_factor
    assert ours.size == (side, side)


# Edits


HOW = {"num_inference_steps": 4, "output_type": "latent"}
EVERYTHING = [DiT4Edit(blend=Blend(start=0.0, layers=(0, 1))), TokenMerging(0.5, minimum=0)]


def test_an_edit_to_the_same_prompt_is_the_source_bit_for_bit(pipe, photo):
    edited = pipe.edit(photo, "a red fox", "a red fox", controls=EVERYTHING, **HOW)
    assert torch.equal(edited.images, edited.sources)
    other = pipe.edit(photo, "a red fox", "a snow fox", controls=EVERYTHING, **HOW)
    assert not torch.equal(other.images, other.sources)


def test_the_first_photo_keeps_its_shape_in_whole_tokens(pipe, photo):
    edited = pipe.edit(photo, "a fox", "a snow", controls=[PRESETS["swap"]], num_inference_steps=2)
    assert edited.images[0].size == (36, 28)  # 56 x 40 in the area of the model's 32 x 32, tokens of 4 px
    assert edited.grid == (7, 9)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_at_a_rectangle_and_a_row_equals_its_single_run(pipe, photo, name):
    targets = ["a red snow", "a red fox in the snow"] if name not in ("swap", "shape") else ["a red snow", "a snow fox"]
    batch = pipe.edit(photo, "a red fox", targets, controls=[PRESETS[name]], **HOW)
    assert batch.images.shape == (2, 4, 14, 18)
    alone = pipe.edit(batch.inversion, None, targets[1], controls=[PRESETS[name]], **HOW)
    scale = float(batch.images.abs().max())
    torch.testing.assert_close(batch.images[1:], alone.images, rtol=0, atol=1e-4 * scale)


def test_second_order_edits_and_first_order_ones_differ(pipe, photo):
    results = [
        pipe.edit(photo, "a fox", "a snow", solver=s, **HOW).images for s in ("dpmpp2m", "fixed_point", "entered")
    ]
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


def test_a_unet_cannot_be_edited_with(make_sd, tmp_path):
    make_sd("sd15").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="editing needs a transformer"):
        condit.load(tmp_path).edit(np.zeros((32, 32, 3), np.uint8), "a fox", "snow")


def test_a_transformer_of_another_kind_raises(pair, tmp_path):
    from condit.weights.pixart import pixart_config

    raw = dict(pair("alpha-512")[0].transformer.config)
    with pytest.raises(ValueError, match="norm_type = 'ada_norm_zero'"):
        pixart_config({**raw, "norm_type": "ada_norm_zero"}, "here")
    with pytest.raises(ValueError, match="cross_attention_dim"):
        pixart_config({**raw, "caption_channels": None}, "here")


def test_words_are_found_among_t5s_pieces(pipe):
    (words,) = pipe.parts.text.words(["A red fox"])
    assert words.words == ("a", "red", "fox") and words.places("fox") == (2,) and len(words.ids) == 4
