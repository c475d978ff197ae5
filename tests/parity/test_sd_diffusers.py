"""Stable Diffusion end to end against diffusers' pipelines: the same folder, the same noise, the same picture."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import condit
from condit.drawing.pipeline import Pipeline

diffusers: Any = importlib.import_module("diffusers")  # its names are made when they are asked for
PROMPTS = ["a red fox", "in the snow"]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def assert_equal(actual: Tensor, wanted: Tensor) -> None:
    # Sums in another order, over a few steps of a network that amplifies; values reach 10.
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)


def generators(n: int, seed: int = 5) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def picture(seed: int = 3, size: tuple[int, int] = (48, 40)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    return Image.fromarray(small.repeat(8, 0).repeat(8, 1))


def white(size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A mask whose right part is to be painted."""
    mask = np.zeros(size, np.uint8)
    mask[:, size[1] // 2 - 3 :] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def pair(make_sd, pairs):
    return pairs(make_sd)


def images(pipe, *args, **how) -> Tensor:
    return torch.from_numpy(pipe(*args, output_type="np", **how).images).permute(0, 3, 1, 2) * 2 - 1


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "how",
    [
        {"guidance_scale": 6.0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0, "negative_prompt": ["snow", "a fox"]},
        {"guidance_scale": 3.0, "height": 24, "width": 40},
        {"guidance_scale": 3.0, "num_images_per_prompt": 2},
    ],
)
def test_text_to_image_equals_diffusers(pair, kind: str, how: dict):
    theirs, ours = pair(kind)
    n = 2 * how.get("num_images_per_prompt", 1)
    given = {"num_inference_steps": 3, **how}
    wanted = images(theirs, PROMPTS, generator=generators(n), **given)
    generated = ours(PROMPTS, generator=generators(n), output_type="pt", **given).images
    assert wanted.std() > 0.05
    assert_equal(generated, wanted)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_latents_equal_diffusers(pair, kind: str):
    theirs, ours = pair(kind)
    given = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"}
    wanted = theirs(PROMPTS, generator=generators(2), **given).images
    assert_equal(ours(PROMPTS, generator=generators(2), **given).images, wanted)


@pytest.mark.parametrize("sampler", ["dpm++", "dpm++-karras", "euler", "euler-ancestral", "ddim"])
def test_every_sampler_equals_diffusers_scheduler(pair, sampler: str):
    theirs, ours = pair("sdxl")
    made = {
        "dpm++": diffusers.DPMSolverMultistepScheduler,
        "dpm++-karras": diffusers.DPMSolverMultistepScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
        "ddim": diffusers.DDIMScheduler,
    }[sampler]
    config = {**SD, "timestep_spacing": "leading", "steps_offset": 1}
    config |= {"use_karras_sigmas": True} if sampler.endswith("karras") else {}
    config |= {"clip_sample": False, "set_alpha_to_one": False} if sampler == "ddim" else {}
    other = diffusers.StableDiffusionXLPipeline(**{**theirs.components, "scheduler": made(**config)})
    other.set_progress_bar_config(disable=True)
    eta = {"eta": 0.7} if sampler == "ddim" else {}
    given = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "latent", **eta}
    wanted = other(PROMPTS, generator=generators(2), **given).images
    generated = ours(PROMPTS, generator=generators(2), sampler=sampler, **given).images
    assert_equal(generated, wanted)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_image_to_image_equals_diffusers(pair, kind: str, strength: float):
    theirs, ours = pair(kind)
    made = diffusers.StableDiffusionXLImg2ImgPipeline if kind == "sdxl" else diffusers.StableDiffusionImg2ImgPipeline
    other = made.from_pipe(theirs)
    other.set_progress_bar_config(disable=True)
    given = {"strength": strength, "num_inference_steps": 4, "guidance_scale": 4.0}
    pictures = [picture(1).resize((32, 32)), picture(2).resize((32, 32))]
    wanted = images(other, PROMPTS, image=pictures, generator=generators(2), **given)
    generated = ours(PROMPTS, image=pictures, generator=generators(2), output_type="pt", **given).images
    assert_equal(generated, wanted)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd15-inpainting"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_equals_diffusers(pair, kind: str, strength: float):
    theirs, ours = pair(kind)
    made = diffusers.StableDiffusionXLInpaintPipeline if kind == "sdxl" else diffusers.StableDiffusionInpaintPipeline
    other = made.from_pipe(theirs)
    other.set_progress_bar_config(disable=True)
    given = {"strength": strength, "num_inference_steps": 4, "guidance_scale": 4.0, "height": 32, "width": 32}
    how = {"image": picture(), "mask_image": white()}
    wanted = images(other, PROMPTS[0], generator=generators(1), **how, **given)
    generated = ours(PROMPTS[0], generator=generators(1), output_type="pt", **how, **given).images
    assert_equal(generated, wanted)
    if kind != "sd15-inpainting":
        latents = ours.encode_images(ours.read_images(picture(), None), generators(1))
        drawn = ours(PROMPTS[0], generator=generators(1), output_type="latent", **how, **given).images
        kept = (slice(None), slice(None), slice(None), slice(0, 6))  # left of the mask
        torch.testing.assert_close(drawn[kept], latents[kept])


def test_sdxl_receives_the_sizes_of_the_call(pair):
    theirs, ours = pair("sdxl")
    given = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    sizes = {"original_size": (512, 300), "crops_coords_top_left": (3, 40), "target_size": (900, 1024)}
    wanted = theirs(PROMPTS, generator=generators(2), **given, **sizes).images
    generated = ours(PROMPTS, generator=generators(2), **given, **sizes).images
    assert_equal(generated, wanted)
    assert (generated - ours(PROMPTS, generator=generators(2), **given).images).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_sdxl_clip_skip_equals_diffusers(pair, guidance: float):
    theirs, ours = pair("sdxl")
    given = {"num_inference_steps": 2, "guidance_scale": guidance, "clip_skip": 1, "output_type": "latent"}
    wanted = theirs(PROMPTS, generator=generators(2), negative_prompt=["", "fox"], **given).images
    generated = ours(PROMPTS, ["", "fox"], generator=generators(2), **given).images
    assert_equal(generated, wanted)


def test_clip_skip_takes_the_states_of_an_earlier_layer_after_the_final_norm(pair):
    theirs, ours = pair("sd15")
    ids = theirs.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    tower = getattr(theirs.text_encoder, "text_model", theirs.text_encoder)
    states = theirs.text_encoder(ids, output_hidden_states=True).hidden_states
    for skip in (1, 2):
        wanted = tower.final_layer_norm(states[-1 - skip])
        torch.testing.assert_close(ours.parts.text(PROMPTS, clip_skip=skip).tokens, wanted)
    torch.testing.assert_close(ours.parts.text(PROMPTS).tokens, tower.final_layer_norm(states[-1]))


def test_guidance_rescale_equals_diffusers(pair):
    theirs, ours = pair("sdxl")
    given = {"num_inference_steps": 3, "guidance_scale": 8.0, "guidance_rescale": 0.7, "output_type": "latent"}
    wanted = theirs(PROMPTS, generator=generators(2), **given).images
    assert_equal(ours(PROMPTS, generator=generators(2), **given).images, wanted)


def test_a_folder_of_half_precision_is_read(make_sd, tmp_path: Path):
    theirs = make_sd("sd15").to(torch.float16)
    theirs.save_pretrained(tmp_path, variant="fp16")
    ours = condit.load(tmp_path)
    assert isinstance(ours, Pipeline) and ours.dtype == torch.float32
    wanted = theirs.unet.state_dict()["conv_in.weight"].float()
    assert torch.equal(ours.backbone.state_dict()["conv_in.weight"], wanted)
    assert condit.load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def command(capsys, *arguments: str) -> tuple[int | str | None, str, str]:
    from condit.cli import main

    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return end.value.code, *capsys.readouterr()


def test_generate_loads_a_folder_and_its_image_is_replayed(make_sd, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_sd("sd15").save_pretrained(tmp_path / "sd")
    picture().save("start.png")
    white().save("mask.png")
    arguments = ["generate", "a red fox", "--model", "sd", "--steps", "3", "--sampler", "dpm++", "--seed", "2"]
    repaint = ["--image", "start.png", "--mask", "mask.png", "--change", "0.7", "--height", "24", "-o", "fox.png"]
    code, _, errors = command(capsys, *arguments, *repaint)
    assert code == 0, errors
    recipe = load_recipe("fox.png")
    assert recipe["request"]["sampler"] == "dpm++" and recipe["run"]["strength"] == 0.7
    code, _, errors = command(capsys, "replay", "fox.png")
    assert code == 0 and "the image is identical" in errors
    how = {"num_inference_steps": 3, "sampler": "dpm++", "seed": 2, "height": 24}
    direct = condit.load(tmp_path / "sd")("a red fox", image="start.png", mask_image="mask.png", strength=0.7, **how)
    assert direct.images[0].tobytes() == Image.open("fox.png").tobytes()
    code, _, errors = command(capsys, "generate", "a fox", "--model", "sd", "--sampler", "nonsense")
    assert code == 1 and "sampler must be one of" in errors


def load_recipe(path: str) -> dict[str, Any]:
    from condit.data.images import read_recipe

    return read_recipe(path)
