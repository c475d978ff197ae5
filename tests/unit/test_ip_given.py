"""controls/ip_input.py: what a call gives an IP-Adapter, and what is said of what cannot be or would act nowhere."""

import numpy as np
import pytest
import torch

from condit.controls.control import When
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.ip_reference import IPReference
from condit.drawing.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipe(make_latent) -> Pipeline:
    return make_latent("sd15")


@pytest.fixture(scope="module")
def adapter(pipe) -> IPAdapter:
    """Of the pipeline's own encoder of 12 numbers."""
    return IPAdapter.new(pipe, IPConfig(12, 3, 12)).requires_grad_(False)


STRENGTH = "strength must be a finite number, one for each image, or numbers by prefix"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"strength": "0.5"}, "is a number; found str"),
        ({"strength": float("nan")}, STRENGTH),
        ({"strength": []}, STRENGTH),
        ({"strength": {"mid_block": None}}, STRENGTH),
        ({"scaling": "V"}, "scaling must be one of 'V only', .* found 'V'"),
        ({"mask_mode": "nearest"}, "mask_mode must be one of 'area', .* found 'nearest'"),
        ({"weights": [1, -1]}, "divides by the sum of weights, which is 0"),
        ({"when": 0.5}, r"when must be condit.When, or a pair \(start, end\)"),
        ({"when": (0.6, 0.4)}, "0 <= start < end <= 1"),
        ({"where": "up_blocks.1"}, r"matches none of .* The layers of a module are 'up_blocks.1.\*'"),
        ({"shortcut": 1.0}, "shortcut= is for FaceID-Plus v2"),
        ({"lora_scale": 0.5}, "lora_scale= is for FaceID's LoRA"),
        ({"content": torch.zeros(3, 12)}, "content for 3 images, references for 1"),
    ],
)
def test_an_impossible_control_raises_when_it_is_made(adapter, pictures, how, message):
    with pytest.raises(ValueError, match=message):
        adapter.control([pictures(2)], combine="mean", **how)


@pytest.mark.parametrize("strength", [np.float32(0.5), torch.tensor(0.5), np.float64(0.5)])
def test_a_number_of_any_library_is_a_strength(adapter, pictures, strength):
    assert adapter.control(pictures(1)[0], strength=strength).strength == 0.5


def test_a_pair_is_limited_to_its_part_of_the_schedule(adapter, pictures):
    assert adapter.control(pictures(1)[0], when=(0.2, 0.8)).when == When(0.2, 0.8)


def test_a_control_of_another_model_raises(adapter, pictures, make_latent, make_pipe):
    """It would act at the layers that happen to have the same path, or nowhere at all."""
    control = adapter.control(pictures(1)[0])
    assert isinstance(control, IPReference)
    for other in (make_latent("sdxl"), make_pipe()):
        with pytest.raises(ValueError, match="has no layer 'down_blocks.0.*made for another model"):
            other("a fox", controls=[control], seed=0)


def test_controls_that_are_none_raise(pipe, adapter, pictures, make_pipe):
    control = adapter.control(pictures(1)[0])
    for drawing in (pipe, make_pipe()):
        for given, message in (
            (control, r"controls=\[...\]; found IPReference"),
            ([adapter], "made by adapter.control.*found IPAdapter"),
            (["ref.png"], "made by adapter.control.*found str"),
        ):
            with pytest.raises(ValueError, match=message):
                drawing("a fox", controls=given, seed=0)
