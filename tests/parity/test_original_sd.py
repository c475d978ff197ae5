"""Single files of Stable Diffusion: our rules against diffusers' converters, and the picture against the folder's."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import condit
from condit.backbones.unet import CROSS_UP, PRESETS, UNet, UNetConfig
from condit.diffusion.vp import Process
from condit.drawing.pipeline import Pipeline
from condit.weights import original_sd
from condit.weights.load import identify
from condit.weights.original_sd import (
    ORIGINALS,
    Original,
    Tower,
    find_tokenizer,
    load_original,
    open_clip_names,
    part,
    unet_names,
)
from condit.weights.vae import vae_names

UNET, VAE = "model.diffusion_model.", "first_stage_model."
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_unet_name(name: str, c: UNetConfig) -> str:
    """The authors' name of a tensor of diffusers' UNet."""
    for new, old in ENDS.items():
        if name.startswith(new + "."):
            return old + name.removeprefix(new)
    mid = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
    if mid:
        number = 1 if mid[1] == "attentions" else 2 * int(mid[2])
        return f"middle_block.{number}.{inside(mid[3]) if mid[1] == 'resnets' else mid[3]}"
    matches = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
    assert matches is not None, name
    level, layer, rest = int(matches[2]), int(matches[4]), matches[5]
    down = matches[1] == "down"
    a_level = c.layers_per_block + 1
    number = level * a_level + layer + 1 if down else level * a_level + layer
    place = f"{'input' if down else 'output'}_blocks"
    if matches[3] == "resnets":
        return f"{place}.{number}.0.{inside(rest)}"
    if matches[3] == "attentions":
        return f"{place}.{number}.1.{rest}"
    if matches[3] == "downsamplers":
        return f"{place}.{(level + 1) * a_level}.0.{rest.replace('conv.', 'op.')}"
    behind = 2 if c.up_block_types[level] == CROSS_UP else 1
    return f"{place}.{(level + 1) * a_level - 1}.{behind}.{rest}"


def inside(name: str) -> str:
    new = next(n for n in RESNET if name.startswith(n + "."))
    return RESNET[new] + name.removeprefix(new)


def original_vae_name(name: str, levels: int) -> str:
    name = re.sub(r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)", r"encoder.down.\1", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
    name = re.sub(r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1.", name)
    name = name.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
    name = (
        name.replace(".resnets.", ".block.").replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    )
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def original_vae(vae: torch.nn.Module) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)  # type: ignore[union-attr,arg-type]
    tensors = {VAE + original_vae_name(n, levels): t for n, t in vae.state_dict().items()}
    # What is a linear today was a 1 x 1 convolution.
    return {n: t[:, :, None, None] if ".attn_1." in n and t.ndim == 2 else t for n, t in tensors.items()}


def open_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A text tower of transformers under OpenCLIP's names."""
    state = {n.removeprefix("text_model."): t for n, t in state.items()}
    values = {"logit_scale": torch.ones(())}
    for name, tensor in state.items():
        if re.search(r"self_attn\.[kv]_proj", name):
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            name = re.sub(r"self_attn\.q_proj\.", "attn.in_proj_", name)
        name = name.replace("encoder.layers.", "transformer.resblocks.").replace("layer_norm", "ln_")
        name = name.replace("self_attn.out_proj", "attn.out_proj").replace("fc1", "c_fc").replace("fc2", "c_proj")
        name = name.replace("embeddings.token_embedding.", "token_embedding.").replace("final_ln_", "ln_final")
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
        if name == "text_projection.weight":
            name, tensor = "text_projection", tensor.mT.contiguous()
        values[name] = tensor
    return {prefix + name: tensor for name, tensor in values.items()}


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


def single_file(pipe, path: Path, kind: str) -> dict[str, Original]:
    """Writes a pipeline of diffusers as one file; returns what is to be known of it."""
    config = condit.load(path.parent / kind).backbone.config
    tensors = {UNET + original_unet_name(n, config): t for n, t in pipe.unet.state_dict().items()} | original_vae(
        pipe.vae
    )
    flat = {n.removeprefix("text_model."): t for n, t in pipe.text_encoder.state_dict().items()}
    first = "conditioner.embedders.0.transformer." if kind == "sdxl" else "cond_stage_model.transformer."
    tensors |= {f"{first}text_model.{n}": t for n, t in flat.items()}
    tensors[f"{first}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors |= {"model_ema.decay": torch.ones(()), "alphas_cumprod": torch.ones(3)}
    towers = [Tower(first, pipe.text_encoder.config.to_dict())]
    if kind == "sdxl":
        second = "conditioner.embedders.1.model."
        tensors |= open_clip(pipe.text_encoder_2.state_dict(), second)
        towers.append(Tower(second, pipe.text_encoder_2.config.to_dict(), open_clip=True))
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path)
    return {kind: Original(config, dict(pipe.vae.config), tuple(towers), Process())}


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_single_file_generates_what_its_folder_generates(make_sd, tmp_path: Path, kind: str):
    pipe = make_sd(kind)
    pipe.save_pretrained(tmp_path / kind)
    originals = single_file(pipe, tmp_path / "model.safetensors", kind)
    actual = identify(tmp_path / "model.safetensors")
    assert actual.kind == "stable-diffusion-file"
    parts = load_original(actual.path, torch.float32, "model", originals, tokenizer=pipe.tokenizer)
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
    actual = identify(tmp_path / "deadiff_v1.ckpt")
    assert actual.kind == "stable-diffusion-file"
    parts = load_original(actual.path, torch.float32, "model", originals, tokenizer=pipe.tokenizer)
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
