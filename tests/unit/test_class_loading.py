"""weights/class_models.py: what a file of class models is, its class names, and what is refused."""

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import save_file

import condit
from class_models import DIFFIT, DIT, NAMES, draw, randomise, write, write_vae
from condit.backbones.diffit import DiffiT
from condit.backbones.dit import DiT, DiTConfig
from condit.drawing.classes import ClassModel
from condit.drawing.pipeline import Pipeline
from condit.weights.class_models import ClassParts, write_labels
from condit.weights.dit import save_dit
from condit.weights.files import read_metadata, read_tensors
from condit.weights.load import kind_of_tensors


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dit")
    write(folder)
    write_vae(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(home) -> Pipeline:
    return condit.load(home / "model.safetensors")


def test_a_published_name_is_loaded_from_its_file_in_the_models_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDIT_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    with pytest.raises(FileNotFoundError, match="DiT-XL-2-256x256.pt is expected in .*facebookresearch/DiT.*its path"):
        condit.load("dit-xl-2-256")
    model = DiT(DiTConfig(input_size=4, hidden_size=384, depth=1, num_heads=6))  # a published width tells the heads
    save_dit(model, tmp_path / "models" / "DiT-XL-2-256x256.pt")
    loaded = condit.load("dit-xl-2-256")
    assert (
        isinstance(loaded, Pipeline)
        and loaded.name == "dit-xl-2-256"
        and cast("ClassModel", loaded.model).classes == 1000
    )
    assert cast("ClassModel", loaded.model).index("golden retriever") == 207
    write(tmp_path, DIFFIT).rename(tmp_path / "models" / "diffit_512.safetensors")
    assert isinstance(condit.load("diffit-512").backbone, DiffiT)


def test_the_tensors_tell_every_layout_of_dit(tmp_path):
    model = DiT(DIT)
    randomise(model)
    save_dit(model, tmp_path / "dit" / "transformer", layout="diffusers")
    save_dit(model, tmp_path / "dit.safetensors")
    folder, file = condit.load(tmp_path / "dit"), condit.load(tmp_path / "dit.safetensors")
    assert torch.equal(draw(folder, 2), draw(file, "2")) and folder.labels is None
    with pytest.raises(ValueError, match="came without class names"):
        draw(folder, "tench")


@pytest.mark.parametrize("place", ["sidecar", "folder", "config", "model_index", "metadata"])
def test_class_names_are_read_from_the_folder_of_the_weights(place, tmp_path):
    path = write(tmp_path, names=None)
    numbered = {str(i): name for i, name in enumerate(NAMES)}
    if place == "sidecar":
        write_labels(path, NAMES)
    elif place == "folder":
        write_labels(tmp_path, NAMES)
    elif place == "metadata":
        save_file(read_tensors(path), path, {**read_metadata(path), "labels": json.dumps(NAMES)})
    else:
        text = json.dumps({"id2label": numbered})
        (tmp_path / ("config.json" if place == "config" else "model_index.json")).write_text(text)
    for source in (
        (path, tmp_path) if place not in ("folder", "sidecar") else (path if place == "sidecar" else tmp_path,)
    ):
        assert condit.load(source).model.index("red fox") == 2


def test_too_few_class_names_raise(tmp_path):
    with pytest.raises(ValueError, match=r"model.labels.json has 2 class names, none for 2; the model has 5"):
        condit.load(write(tmp_path, names=NAMES[:2]))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.0.attn.qkv_temb.weight", "diffit"),
        ("module.blocks.3.adaLN_modulation.1.weight", "dit"),
        ("encoder.0.blocks.0.block.attn.qkv_temb.weight", "diffit-image"),
        ("final_layer.adaLN_modulation.1.weight", None),  # FLUX of its authors, whose blocks have other names
        ("down_blocks.0.attentions.0.proj_in.weight", None),
    ],
)
def test_only_class_models_are_recognised(name, kind):
    assert kind_of_tensors([name]) == kind


def test_a_file_of_something_else_raises_with_a_guess(tmp_path):
    save_file({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="It looks like a UNet of diffusers.*dit-xl-2-256"):
        condit.load(tmp_path / "unet.safetensors")


def test_an_autoencoder_is_for_models_that_draw_classes(tmp_path):
    with pytest.raises(ValueError, match="vae= is for Stable Diffusion, DiT and DiffiT"):
        condit.load("tiny", vae=tmp_path)


def test_the_embedded_model_is_still_a_pipeline_of_prompts():
    from condit.weights.catalog import MODELS

    if "tiny" not in MODELS:
        pytest.skip("no embedded model in this checkout")
    assert isinstance(condit.load("tiny"), Pipeline)


def test_parts_may_be_made_by_hand():
    model = DiT(DIT).eval().requires_grad_(False)
    parts = ClassParts("mine", "0" * 16, model, None, None, 4.0, 0.0, Path("."))
    assert draw(Pipeline(parts)).shape == (1, 4, 4, 4)
