"""Single files of Stable Diffusion: our rules against diffusers' converters, and the picture against the folder's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import condit
from condit.backbones.unet import PRESETS, UNet
from condit.drawing.pipeline import Pipeline
from condit.weights import original_sd
from condit.weights.load import identify
from condit.weights.original_sd import (
    ORIGINALS,
    find_tokenizer,
    load_original,
    open_clip_names,
    part,
    unet_names,
)
from condit.weights.vae import vae_names
from single_files import UNET, VAE, open_clip, original_unet_name, original_vae, single_file


@pytest.mark.parametrize("preset", ["sd15", "sd15-inpainting", "sdxl"])
def test_unet_rules_agree_with_diffusers_on_every_published_name(preset: str):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = PRESETS[preset]
    with torch.device("meta"):
        wanted = UNet(config).state_dict()
    original = {UNET + original_unet_name(n, config): t for n, t in wanted.items()}
    assert len(original) == len(wanted)
    fields = {"layers_per_block": 2, "addition_embed_type": config.addition_embed_type}
    theirs = convert_ldm_unet_checkpoint(dict(original), fields)
    ours = unet_names(part(original, UNET), config)
    assert ours.keys() == wanted.keys() == theirs.keys()
    assert all(ours[n] is theirs[n] is wanted[n] for n in wanted)


def test_vae_rules_agree_with_diffusers(make_sd):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(ORIGINALS["sd15"].vae))  # type: ignore[assignment]
    original = original_vae(vae)  # type: ignore[arg-type]
    theirs = convert_ldm_vae_checkpoint(dict(original), vae.config)  # type: ignore[union-attr]
    ours = vae_names({**part(original, VAE), "loss.logvar": torch.zeros(1)})
    assert len(ours) == 248
    assert ours.keys() == theirs.keys() == vae.state_dict().keys()  # type: ignore[union-attr]


def test_open_clip_rules_agree_with_diffusers(make_sd):
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    tower = make_sd("sdxl").text_encoder_2
    original = open_clip(tower.state_dict(), "x.")
    theirs = convert_open_clip_checkpoint(tower, dict(original), prefix="x.")
    ours = open_clip_names(part(original, "x."))
    assert ours.keys() == theirs.keys() == tower.state_dict().keys()
    for name, tensor in tower.state_dict().items():
        assert torch.equal(ours[name], tensor) and torch.equal(theirs[name], tensor)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_single_file_generates_what_its_folder_generates(make_sd, tmp_path: Path, kind: str):
    pipe = make_sd(kind)
    pipe.save_pretrained(tmp_path / kind)
    originals = single_file(pipe, tmp_path / "model.safetensors", kind)
    source = identify(tmp_path / "model.safetensors")
    assert source.kind == "stable-diffusion-file"
    parts = load_original(source.path, torch.float32, "model", originals, tokenizer=pipe.tokenizer)
    how = {"seed": 1, "num_inference_steps": 2, "output_type": "pt", "sampler": "ddim"}
    ours, folder = Pipeline(parts), condit.load(tmp_path / kind)
    assert torch.equal(ours("a red fox", **how).images, folder("a red fox", **how).images)


def test_deadiffs_checkpoint_can_be_loaded_as_a_base_model(make_sd, tmp_path: Path):
    """Lightning's wrapper, image maps inside the UNet, Q-Formers beside it: the base is what is left."""
    pipe = make_sd("sd15")
    pipe.save_pretrained(tmp_path / "sd15")
    originals = single_file(pipe, tmp_path / "plain.safetensors", "sd15")
    tensors = load_file(tmp_path / "plain.safetensors")
    for letter in "kv":
        texts = [name for name in tensors if name.endswith(f"attn2.to_{letter}.weight")]
        tensors |= {n.replace(f".to_{letter}", f".i_to_{letter}"): torch.randn(tensors[n].shape) for n in texts}
    tensors |= {"style_blip.query_tokens": torch.zeros(1, 2, 3), "content_proj_layer.dense1.bias": torch.zeros(2)}
    torch.save({"state_dict": tensors, "global_step": 5}, tmp_path / "deadiff_v1.ckpt")
    source = identify(tmp_path / "deadiff_v1.ckpt")
    assert source.kind == "stable-diffusion-file"
    parts = load_original(source.path, torch.float32, "model", originals, tokenizer=pipe.tokenizer)
    how = {"seed": 1, "num_inference_steps": 2, "output_type": "pt"}
    folder = condit.load(tmp_path / "sd15")
    assert torch.equal(Pipeline(parts)("a red fox", **how).images, folder("a red fox", **how).images)


def test_a_file_of_another_width_raises(make_sd, tmp_path: Path):
    pipe = make_sd("sd15")
    pipe.save_pretrained(tmp_path / "sd15")
    single_file(pipe, tmp_path / "model.safetensors", "sd15")
    with pytest.raises(ValueError, match="text of width 10.*sd15 reads text of width 768"):
        condit.load(tmp_path / "model.safetensors")


def test_other_files_are_not_taken_for_stable_diffusion(tmp_path: Path):
    save_file({"blocks.0.adaLN_modulation.1.weight": torch.zeros(1)}, tmp_path / "dit.safetensors")
    assert identify(tmp_path / "dit.safetensors").kind == identify(tmp_path).kind == "dit"
    assert identify("tiny").kind == "tiny"
    save_file({"up_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="No model"):
        identify(tmp_path / "other.safetensors")


def test_the_tokenizer_is_looked_for_in_the_files_and_in_the_models_folder(make_sd, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("CONDIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(original_sd, "cached_clip", lambda: None)
    with pytest.raises(FileNotFoundError, match="tokenizer.*vocab.json"):
        find_tokenizer(tmp_path / "model.safetensors", 0)
    wanted = make_sd("sd15").tokenizer
    wanted.save_pretrained(tmp_path / "home" / "models" / "tokenizer")
    first, second = (find_tokenizer(tmp_path / "model.safetensors", n) for n in (0, 1))
    assert first("a red fox").input_ids == wanted("a red fox").input_ids
    assert first.pad_token == wanted.pad_token and second.pad_token == "!"
    (tmp_path / "tokenizer").mkdir()  # transformers would make an empty tokenizer of it
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        find_tokenizer(tmp_path / "model.safetensors", 0)
