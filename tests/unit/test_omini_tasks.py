"""controls/omini_tasks.py: the task of a file, by its metadata, by a published name, or as the caller gives it."""

import json
from dataclasses import replace

import pytest
import torch

from condit.controls.omini import OminiControl
from condit.controls.omini_tasks import TASKS
from condit.controls.style_lora import StyleLoRA
from condit.drawing.pipeline import Pipeline
from condit.weights.files import save_tensors


@pytest.fixture(scope="module")
def pipe(make_pipe) -> Pipeline:
    return make_pipe(guidance_embeds=True, distilled=True)


@pytest.fixture(scope="module")
def tensors(pipe, make_omini) -> dict[str, torch.Tensor]:
    return make_omini(pipe, rank=2).tensors()


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("subject_512", "subject-512"),
        ("subject_1024_beta", "subject"),
        ("canny", "canny"),
        ("simpsons", "art"),
        ("oye-cartoon", "cartoon"),
    ],
)
def test_a_published_file_has_the_task_of_its_name(pipe, tensors, tmp_path, name, task):
    path = save_tensors(tmp_path / f"{name}.safetensors", tensors)
    assert OminiControl.load(path, pipe).config == replace(TASKS[task], rank=2)


@pytest.mark.parametrize("name", ["subject", "mine", "canny-v2"])
def test_another_file_without_settings_needs_a_task_and_the_error_lists_them(pipe, tensors, tmp_path, name):
    path = save_tensors(tmp_path / f"{name}.safetensors", tensors)
    with pytest.raises(ValueError, match=r"does not say for which task.*load\(file, pipe, task\).*subject-512, sr"):
        OminiControl.load(path, pipe)
    assert OminiControl.load(path, pipe, "subject-512").config.delta == "right"


@pytest.mark.parametrize("settings", [{"delta": None}, {"delta": [1]}, {"delta": [0, 0], "scale": "2"}])
def test_broken_settings_of_a_file_are_refused(pipe, tensors, tmp_path, settings):
    path = save_tensors(tmp_path / "canny.safetensors", tensors, {"condit": settings})
    with pytest.raises(ValueError, match="metadata are broken.*Give the task"):
        OminiControl.load(path, pipe)
    assert OminiControl.load(path, pipe, "canny").config.task == "canny"


def test_the_recipe_records_task_delta_and_scale(pipe, make_omini, pictures):
    adapter = make_omini(pipe, task="mine", delta=(0, -6), scale=2.0)
    described = adapter.control(pictures(1)).describe()
    assert (described["task"], described["delta"], described["scale"]) == ("mine", [0, -6], 2.0)
    moved = adapter.control(pictures(1), delta="left").describe()
    assert moved["delta"] == "left"
    json.dumps(described)


def test_an_omini_adapter_is_not_read_as_a_style_lora(pipe, make_omini, tmp_path):
    adapter = make_omini(pipe)
    path = save_tensors(tmp_path / "a.safetensors", adapter.tensors(), {"condit": adapter.metadata()})
    with pytest.raises(ValueError, match="an OminiControl adapter, not a style LoRA"):
        StyleLoRA.load(path, pipe)


def test_a_unet_is_refused_with_the_class_for_style_loras(make_latent, tensors, tmp_path):
    path = save_tensors(tmp_path / "canny.safetensors", tensors)
    with pytest.raises(ValueError, match=r"UNet has none.*condit\.StyleLoRA"):
        OminiControl.load(path, make_latent("sd15"))
