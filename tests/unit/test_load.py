"""load.py: what a name, a folder or a file is, and which options it takes."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

import condit
from condit.weights.catalog import MODELS, Entry
from condit.weights.load import (
    FOLDERS,
    LOADERS,
    OPTIONS,
    PUBLISHED,
    TENSORS,
    FluxKind,
    LatentKind,
    identify,
    load_parts,
)

UNET = "model.diffusion_model.input_blocks.0.0.weight"


def file_of(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(1) for name in names}, path)
    return path


def folder_of(folder: Path, pipeline: str) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return folder


def test_every_kind_in_the_tables_has_a_loader():
    rows = [row.kind for row in PUBLISHED.values()]
    kinds = {*rows, *FOLDERS.values(), *TENSORS.values()} - {None}
    kinds |= {*get_args(FluxKind), *get_args(LatentKind)}
    assert kinds == LOADERS.keys()
    assert {kind for kinds, _ in OPTIONS.values() for kind in kinds} <= LOADERS.keys()


@pytest.mark.parametrize(
    ("pipeline", "kind"),
    [
        ("FluxPipeline", "flux"),
        ("FluxFillPipeline", "flux"),
        ("StableDiffusionPipeline", "stable-diffusion"),
        ("StableDiffusionXLInpaintPipeline", "stable-diffusion"),
        ("PixArtSigmaPipeline", "pixart"),
        ("IconUNetPipeline", "tiny-unet"),
        ("IconPixArtPipeline", "tiny-pixart"),
    ],
)
def test_a_folder_is_identified_by_its_pipelines_class(pipeline: str, kind: str, tmp_path: Path):
    model = identify(folder_of(tmp_path / "model", pipeline))
    assert (model.kind, model.path, model.label) == (kind, tmp_path / "model", "model")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (UNET, "stable-diffusion-file"),
        (f"state_dict.{UNET}", "stable-diffusion-file"),
        ("double_blocks.0.img_attn.qkv.weight", "flux-file"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "flux-file"),
        ("ema.blocks.0.adaLN_modulation.1.weight", "dit"),
        ("blocks.0.attn.qkv_temb.weight", "diffit"),
        ("encoder.0.blocks.0.block.attn.qkv_temb.weight", "diffit-image"),
        ("patch_embed.proj.weight", "vit"),
    ],
)
def test_a_file_is_identified_by_its_tensors_alone_or_in_a_folder(name: str, kind: str, tmp_path: Path):
    file = file_of(tmp_path / "model" / "a.safetensors", "other", name)
    assert identify(file).kind == kind and identify(file).label == "a"
    folder = identify(str(tmp_path / "model"))
    assert folder.kind == kind and folder.name == str(tmp_path / "model")
    # Loaders of single files are given the file, loaders of networks the folder, which may hold class names.
    assert folder.path == (file if kind.endswith("-file") else tmp_path / "model")


def test_a_published_name_is_the_first_of_its_files_in_the_models_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CONDIT_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"v1-5.* or .*pruned.safetensors is expected in .*models.*huggingface"):
        identify("sd15")
    file = file_of(tmp_path / "models" / "v1-5-pruned.safetensors", UNET)
    model = identify("sd15")
    assert (model.kind, model.path, model.label) == ("stable-diffusion-file", file, "sd15")
    folder_of(tmp_path / "models" / "stable-diffusion-v1-5", "StableDiffusionPipeline")
    assert identify("sd15").kind == "stable-diffusion"


def test_an_embedded_model_is_identified_by_its_name(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(MODELS, "mine", Entry("model", "", "", folder_of(tmp_path / "model", "IconUNetPipeline")))
    (tmp_path / "bare").mkdir()
    monkeypatch.setitem(MODELS, "bare", Entry("model", "", "", tmp_path / "bare"))
    monkeypatch.setitem(MODELS, "bare/style", Entry("ip-adapter", "", "", tmp_path / "bare"))
    assert identify("mine").kind == "tiny-unet" and identify("mine").label == "mine"
    assert identify("bare").kind == "tiny"
    with pytest.raises(ValueError, match="No model 'bare/style'"):
        identify("bare/style")


@pytest.mark.parametrize("pipeline", ["StableDiffusion3Pipeline", "KandinskyPipeline"])
def test_a_folder_of_another_pipeline_is_refused_by_its_class(pipeline: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"It is a {pipeline}.*Known: .*dit-xl-2-256"):
        identify(folder_of(tmp_path / "model", pipeline))


def test_an_option_that_a_model_does_not_take_is_refused_before_loading(tmp_path: Path):
    flux = folder_of(tmp_path / "flux", "FluxPipeline")
    dit = file_of(tmp_path / "dit.safetensors", "blocks.0.adaLN_modulation.1.weight")
    with pytest.raises(ValueError, match=r"vae= is for Stable Diffusion, DiT and DiffiT; .* \(flux\) takes none"):
        condit.load(flux, vae="tiny")
    with pytest.raises(ValueError, match="components= is for a single file of FLUX.1"):
        load_parts(flux, components=flux)
    with pytest.raises(ValueError, match=r"offload= is for FLUX.1, .* \(dit\)"):
        condit.load(dit, offload="blocks")
    with pytest.raises(ValueError, match=r"quantize= is for FLUX.1, .* \(dit\)"):
        condit.load(dit, quantize="int8")
