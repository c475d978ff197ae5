"""Guests run the network apart for a control: examples/reference_only.py on pipelines of diffusers and of condit."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import condit
from condit.backbones.mmdit import MMDiTConfig
from condit.controls.control import When
from condit.controls.stylealigned import StyleAligned
from condit.controls.styleid import StyleID
from condit.interop import attach
from device_cases import example, shaken

CONFIG = MMDiTConfig(
    in_channels=8,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
)
PICTURE = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
GIVEN: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "height": 32, "width": 32}


@pytest.fixture(scope="module")
def reference_only() -> ModuleType:
    return example("reference_only")


@pytest.fixture(scope="module")
def pairs(make_flux, make_sd, tmp_path_factory) -> Callable[[str], tuple[Any, condit.Pipeline]]:
    """diffusers' pipeline and condit's over equal weights, by name."""
    made = {}

    def get(name: str) -> tuple[Any, condit.Pipeline]:
        if name not in made:
            theirs = make_flux(CONFIG, dynamic=True) if name == "flux" else make_sd(name)
            shaken(theirs.transformer if name == "flux" else theirs.unet, 0.1)
            theirs.set_progress_bar_config(disable=True)
            folder = tmp_path_factory.mktemp("apart") / name
            theirs.save_pretrained(folder)
            made[name] = theirs, condit.load(folder, dtype=torch.float32)
        return made[name]

    return get


def start(name: str) -> torch.Tensor:
    shape = (2, 64, 8) if name == "flux" else (2, 4, 16, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def drawn(pipe: Any, name: str, controls: Any = None, **given: Any) -> torch.Tensor:
    named = {"latents": start(name), **GIVEN, **given} | ({} if controls is None else {"controls": controls})
    if name == "flux" and isinstance(pipe, condit.Pipeline):
        pipe.parts.text.limit = 32
    elif name == "flux":
        named["max_sequence_length"] = 32
    return pipe(["a red fox", "in the snow"], **named).images


@pytest.mark.parametrize("name", ["flux", "sd15", "sdxl"])
def test_reference_only_on_a_guest_equals_condits_own_pipeline(pairs, reference_only, name):
    theirs, ours = pairs(name)
    guidance = {"guidance_scale": 3.5}
    plain = drawn(theirs, name, **guidance)
    with attach(theirs, size=(32, 32)) as guest:
        control = reference_only.ReferenceOnly([PICTURE, PICTURE[::-1].copy()], strength=0.7)
        actual = drawn(guest, name, [control], **guidance)
        assert torch.equal(drawn(guest, name, [replace(control, strength=0.0)], **guidance), plain)
        late = drawn(guest, name, [replace(control, when=When(0.5, 1))], **guidance)
    expected = drawn(ours, name, [control], **guidance)
    # Sums in another order, amplified by guided steps of a random network.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    assert (actual - plain).abs().max() > 1e-2 and not torch.equal(late, actual)


@pytest.mark.parametrize("name", ["flux", "sd15", "sdxl"])
def test_stylealigned_and_styleid_on_a_guest_equal_those_on_condits_own_pipeline(pairs, name):
    """The guest of FLUX.1 encodes more tokens than `drawn` allows here, so there the words are those of the image."""
    theirs, ours = pairs(name)
    how: dict[str, Any] = {"prompt": None} if name == "flux" else {}
    controls = [StyleAligned(PICTURE, 0.5, **how), StyleID(PICTURE[::-1].copy(), 0.7, content=PICTURE, **how)]
    with attach(theirs, size=(32, 32)) as guest:
        actual = drawn(guest, name, controls, guidance_scale=3.5)
        worded = drawn(guest, name, [StyleAligned(PICTURE, prompt="snow")], guidance_scale=3.5)
    expected = drawn(ours, name, controls, guidance_scale=3.5)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-4)
    assert torch.isfinite(worded).all() and not torch.equal(worded, actual)


def test_a_reference_takes_the_size_of_the_image_that_image_to_image_starts_from(pairs, reference_only):
    diffusers: Any = importlib.import_module("diffusers")
    theirs, _ = pairs("sd15")
    host = diffusers.StableDiffusionImg2ImgPipeline(**theirs.components, requires_safety_checker=False)
    host.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(2))
    with attach(host) as guest:
        result = [
            guest(
                "a fox",
                image=picture,
                controls=controls,
                num_inference_steps=4,
                output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).images
            for controls in ([], [reference_only.ReferenceOnly(PICTURE)])
        ]
    assert result[1].shape == (1, 4, 12, 20) and not torch.equal(*result)


@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_an_argument_that_the_pipeline_does_not_have_is_named(pairs, name):
    theirs, _ = pairs(name)
    with attach(theirs, size=(32, 32)) as guest, pytest.raises(TypeError, match="has no argument guidance, stepz"):
        guest("a fox", guidance=3.5, stepz=2)


@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_an_argument_of_the_network_that_controls_do_not_support_is_named(pairs, monkeypatch, reference_only, name):
    theirs, _ = pairs(name)
    module = importlib.import_module(f"condit.interop.{'flux' if name == 'flux' else 'unet'}")
    stand_in = module.ControlledTransformer if name == "flux" else module.ControlledUNet
    forward = stand_in.forward
    monkeypatch.setattr(stand_in, "forward", lambda self, *a, **given: forward(self, *a, **given, newest=1))
    with attach(theirs, size=(32, 32)) as guest, pytest.raises(TypeError, match="passes newest to its network"):
        drawn(guest, name, [reference_only.ReferenceOnly(PICTURE)])
