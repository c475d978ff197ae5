"""Random models in the official layouts, loaded by name from the hub on loopback (tests/hub_server.py)."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import condit
from condit.backbones.mmdit import MMDiTConfig
from condit.data.images import read_recipe

TWINS = {
    "unet/diffusion_pytorch_model.bin": "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors": "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/pytorch_model.bin": "text_encoder/model.safetensors",
    "v1-5-pruned.safetensors": "unet/diffusion_pytorch_model.safetensors",
    "safety_checker/model.safetensors": "text_encoder/model.safetensors",
}


def latents(pipe: Any, **how) -> Tensor:
    return pipe("a red fox", seed=3, num_inference_steps=2, output_type="latent", **how).images


@pytest.fixture(scope="module")
def sd(make_sd, tmp_path_factory) -> Path:
    """A Stable Diffusion in diffusers' layout."""
    make_sd("sd15").save_pretrained(folder := tmp_path_factory.mktemp("hub") / "sd")
    return folder


@pytest.fixture(scope="module")
def flux(make_flux, tmp_path_factory) -> Path:
    config = MMDiTConfig(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6),
    )
    make_flux(config, dynamic=False).save_pretrained(folder := tmp_path_factory.mktemp("hub") / "flux")
    return folder


def as_published(folder: Path) -> dict[str, bytes]:
    """The folder's files with the copies in other formats that repositories hold."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {**files, **{twin: files[name] for twin, name in TWINS.items()}}


def test_a_model_is_loaded_by_name_and_its_recipe_loads_the_same_commit(hub, sd):
    commit = hub.add("me/sd", as_published(sd))
    pipe = condit.load("me/sd")
    assert torch.equal(latents(pipe), latents(condit.load(sd)))
    downloads = {line.split(f"/{commit}/")[1] for line in hub.requests if f"resolve/{commit}/" in line}
    assert not downloads & TWINS.keys() and {"model_index.json", "unet/config.json"} <= downloads
    recipe = pipe("a red fox", seed=0, num_inference_steps=1).recipe
    assert recipe["model"] == pipe.name == f"me/sd@{commit}"
    # The repository moves on; the recipe does not.
    newer = as_published(sd)
    newer["unet/diffusion_pytorch_model.safetensors"] = changed(sd / "unet" / "diffusion_pytorch_model.safetensors")
    hub.add("me/sd", newer)
    assert torch.equal(latents(condit.load(recipe["model"])), latents(pipe))
    assert not torch.equal(latents(condit.load("me/sd")), latents(pipe))


def changed(file: Path) -> bytes:
    from safetensors.torch import load_file, save

    return save({name: tensor * 1.5 for name, tensor in load_file(file).items()}, {"format": "pt"})


def lora_file(file: Path) -> Path:
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 8, generator=g), torch.randn(8, 2, generator=g)
    save_file({f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}, file)
    return file


def test_a_style_lora_is_loaded_by_name_for_a_model_by_name(hub, sd, tmp_path):
    lora_file(tmp_path / "x.safetensors")
    hub.add("me/sd", sd)
    files = {"sub/x.safetensors": (tmp_path / "x.safetensors").read_bytes(), "sub/y.safetensors": b""}
    commit = hub.add("me/styles", files)
    pipe = condit.load("me/sd")
    wanted = latents(pipe, controls=[condit.StyleLoRA.load(tmp_path / "x.safetensors", pipe).control()])
    for style in (
        condit.StyleLoRA.load("me/styles/sub/x.safetensors", pipe),
        condit.StyleLoRA.load("me/styles", pipe, subfolder="sub", weight_name="x.safetensors"),
    ):
        control = style.control()
        assert torch.equal(latents(pipe, controls=[control]), wanted)
        assert control.describe()["adapter"] == f"me/styles@{commit}/sub/x.safetensors"
    with pytest.raises(ValueError, match="holds 2 weight files: x.safetensors, y.safetensors. Name one .*weight_name="):
        condit.StyleLoRA.load("me/styles", pipe, subfolder="sub")


def test_flux_is_loaded_by_name_and_a_single_file_takes_its_components_from_a_repository(hub, flux, authors):
    commit = hub.add("me/flux", flux)
    pipe = condit.load("me/flux", dtype=torch.float32)
    assert pipe.name == f"me/flux@{commit}"
    names = authors(dict(pipe.backbone.state_dict()))
    from safetensors.torch import save

    hub.add("me/single", {"flux1-mine.safetensors": save(names)})
    single = condit.load("me/single/flux1-mine.safetensors", components="me/flux", dtype=torch.float32)
    assert torch.equal(latents(single), latents(pipe)) and single.name.endswith("/flux1-mine.safetensors")
    whole = {p.relative_to(flux).as_posix(): p.read_bytes() for p in flux.rglob("*") if p.is_file()}
    hub.add("me/both", {**whole, "flux1-mine.safetensors": save(names)})
    assert torch.equal(latents(condit.load("me/both/flux1-mine.safetensors", dtype=torch.float32)), latents(pipe))


def test_a_local_folder_contacts_nobody(sd, flux, monkeypatch, tmp_path):
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(sd.parent.parent)
    Path("me").symlink_to(sd.parent, target_is_directory=True)
    for source in (sd, str(sd), "me/sd", flux):  # "me/sd" could be a repository, but it is a folder here
        latents(condit.load(source))
    Path("me").unlink()
    # A folder as ModelScope downloads it.
    shutil.copytree(sd, tmp_path / "stable-diffusion-v1___5")
    for name in ("configuration.json", ".mdl", ".msc"):
        (tmp_path / "stable-diffusion-v1___5" / name).write_text("{}")
    latents(condit.load(tmp_path / "stable-diffusion-v1___5"))


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_an_error_names_the_file_that_a_folder_lacks(kind, sd, flux, tmp_path):
    whole = {"sd": sd, "flux": flux}[kind]
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    needless = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "model_index.json")
    needless += ("scheduler_config.json",) if kind == "flux" else ()  # FLUX.1's own is known
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in needless):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises((ValueError, OSError)) as error:
            condit.load(folder)
        said = str(error.value)
        assert file.name in said or f"*{file.suffix}" in said, said
        assert file.parent.name in said, said
        file.write_bytes(content)


def test_the_command_line_takes_names_and_replays_the_commit(hub, sd, tmp_path, monkeypatch, capsys):
    from condit.cli import main

    monkeypatch.chdir(tmp_path)
    commit = hub.add("me/sd", sd)
    style = hub.add("me/style", {"x.safetensors": lora_file(tmp_path / "x.safetensors").read_bytes()})
    with pytest.raises(SystemExit) as end:
        main(["generate", "a red fox", "-m", "me/sd", "--lora", "me/style:0.7", "--steps", "2", "-o", "fox.png"])
    assert end.value.code == 0, capsys.readouterr().err
    recipe: Any = read_recipe("fox.png")
    assert recipe["request"]["model"] == f"me/sd@{commit}"
    assert recipe["request"]["references"][0]["path"] == f"me/style@{style}"
    newer = {p.relative_to(sd).as_posix(): p.read_bytes() for p in sd.rglob("*") if p.is_file()}
    newer["unet/diffusion_pytorch_model.safetensors"] = changed(sd / "unet" / "diffusion_pytorch_model.safetensors")
    hub.add("me/sd", newer)
    hub.add("me/style", {"x.safetensors": b"another"})
    with pytest.raises(SystemExit) as end:
        main(["replay", "fox.png"])
    assert "the image is identical" in capsys.readouterr().err


def test_the_command_line_takes_an_adapter_by_name(hub, random_tiny, tmp_path, monkeypatch, capsys):
    from condit.cli import main

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("ref.png")
    commit = hub.add("me/style", random_tiny / "style")
    with pytest.raises(SystemExit) as end:
        main(["generate", "a red apple", "--steps", "2", "--control", "me/style@main=ref.png", "-o", "a.png"])
    assert end.value.code == 0, capsys.readouterr().err
    recipe: Any = read_recipe("a.png")
    assert recipe["request"]["references"][0]["use"] == f"me/style@{commit}"
    with pytest.raises(SystemExit) as end:
        main(["generate", "a red apple", "--control", "me/nothing=ref.png", "-o", "b.png"])
    assert end.value.code == 1 and "no repository" in capsys.readouterr().err


def test_an_image_encoder_beside_an_adapters_file_is_downloaded_when_it_is_needed(hub):
    from condit.weights.hub_files import encoder_beside

    files = {"models/x.safetensors": b"x", "models/image_encoder/config.json": json.dumps({"hidden_size": 8}).encode()}
    weights = {f"models/image_encoder/{name}": b"w" for name in ("model.safetensors", "pytorch_model.bin")}
    hub.add("me/ip", {**files, **weights})
    folder = encoder_beside("me/ip/models/x.safetensors")
    assert folder is not None and sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    hub.add("me/alone", {"models/x.safetensors": b"x"})
    assert encoder_beside("me/alone/models/x.safetensors") is None
