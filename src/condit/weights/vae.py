"""Autoencoders from disk: condit's own patch code, diffusers' AutoencoderKL, and the names that the authors of Stable
Diffusion and FLUX.1 give the same network in single files."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from condit.encoders.vae import Autoencoder, PatchAutoencoder, PatchAutoencoderConfig
from condit.weights.catalog import MODELS
from condit.weights.files import Json, inner_state, load_strict, read_tensors
from condit.weights.folders import WEIGHTS, floats, read_config, read_folder, read_json
from condit.weights.hub_files import local_folder

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

Net = TypeVar("Net", bound=nn.Module)
# The authors' names -> diffusers', in order. `up` counts from the finest level there, from the coarsest in diffusers.
_RULES = (
    (r"^(en|de)coder\.norm_out\.", r"\1coder.conv_norm_out."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.", r".mid_block.attentions.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
)
# Early files of diffusers name the attention of the middle block so.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_PREFIXES = ("first_stage_model.", "vae.", "")  # before the names in files of whole pipelines
# FLUX.1's, where no config.json says it.
FLUX: Json = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "norm_num_groups": 32, "use_quant_conv": False}
FLUX |= {"use_post_quant_conv": False}


def load_vae(source: str | Path) -> Any:
    """A frozen autoencoder in float32: "tiny" for the embedded one, its folder, or a folder that holds it as `vae`.
    Strict: ValueError where tensors are missing, or for another kind of network."""
    tiny = str(source) == "tiny" and "tiny" in MODELS
    folder = MODELS["tiny"].path if tiny else Path(local_folder(source, ["vae"]))
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no autoencoder (no config.json). Expected: 'tiny', an exported `PatchAutoencoder`, or the "
            "`vae` folder of a Stable Diffusion as diffusers saves it."
        )
    config = read_json(folder / "config.json")
    kind = config.get("_class_name", "PatchAutoencoder" if "patch" in config else "AutoencoderKL")
    if kind == "PatchAutoencoder":
        return load_latent(folder).requires_grad_(False)
    if kind != "AutoencoderKL":
        raise ValueError(f"{folder} holds a {kind}; expected a PatchAutoencoder or an AutoencoderKL.")
    return frozen(load_autoencoder(folder), torch.float32)


def load_latent(folder: str | Path) -> PatchAutoencoder:
    """condit's `PatchAutoencoder` from config.json and its weights, in float32."""
    folder = Path(folder)
    vae = PatchAutoencoder(PatchAutoencoderConfig(**read_config(folder)))
    load_strict(vae, floats(read_tensors(folder / WEIGHTS)), source=folder)
    return vae.eval()


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """diffusers' AutoencoderKL from its folder, strictly."""
    return make_autoencoder(read_json(folder / "config.json"), read_folder(folder), folder)


def chosen_autoencoder(vae: Autoencoder | str | Path, config: Json) -> AutoencoderKL:
    """An autoencoder given for a model whose own has this configuration: itself, its folder, or a single file in
    diffusers' names or the authors' (vae-ft-mse-840000-ema-pruned.safetensors)."""
    if not isinstance(vae, str | Path):
        return copy.deepcopy(cast("AutoencoderKL", vae))  # the pipeline sets its own dtype
    path = Path(vae)
    if path.is_dir():
        return load_autoencoder(path / "vae" if (path / "vae").is_dir() else path)
    tensors = inner_state(read_tensors(path))
    own = autoencoder_tensors(tensors)
    return make_autoencoder(config, vae_names(own) if own else tensors, path)


def make_autoencoder(config: Json, tensors: Mapping[str, Tensor], source: str | Path) -> AutoencoderKL:
    """diffusers' AutoencoderKL from tensors in diffusers' names, strictly."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
    assert isinstance(vae, AutoencoderKL)  # not a pair with unused settings, which is returned on demand
    renamed = {}
    for name, tensor in tensors.items():
        old = re.match(r"(.*\.attentions\.\d\.)(query|key|value|proj_attn)\.(.*)", name)
        name = f"{old[1]}{_OLD_ATTENTION[old[2]]}.{old[3]}" if old else name
        renamed[name] = _as_linear(name, tensor)
    load_strict(vae, renamed, source=source, assign=True)
    return vae


def load_flux_vae(place: Path, dtype: torch.dtype, inside: Mapping[str, Tensor] | None = None) -> AutoencoderKL:
    """FLUX.1's autoencoder, frozen: from a folder of diffusers or a file in the authors' names. `inside`: tensors in
    these names from another file; `place` is then the folder whose config.json counts, if it has one."""
    if inside is None and place.is_dir():
        return frozen(load_autoencoder(place), dtype)
    tensors = autoencoder_tensors(read_tensors(place)) if inside is None else dict(inside)
    if not tensors:
        raise ValueError(f"{place} holds no autoencoder in FLUX.1's names (encoder.conv_in, decoder.up.0 ...).")
    folder = place if place.is_dir() else place.parent / "vae"
    config = read_config(folder) if (folder / "config.json").is_file() else FLUX
    return frozen(make_autoencoder({**config, **infer_sizes(tensors, place)}, vae_names(tensors), place), dtype)


def frozen(network: Net, dtype: torch.dtype) -> Net:
    """In evaluation mode, without gradients."""
    nn.Module.to(network, dtype)  # diffusers' own `to` warns without reason
    return network.eval().requires_grad_(False)


# The authors' names


def autoencoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of an autoencoder in the authors' names, without a prefix; {} without one."""
    prefix = next((p for p in _PREFIXES if f"{p}encoder.down.0.block.0.conv1.weight" in tensors), None)
    if prefix is None:
        return {}
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {name: t for name, t in own.items() if name.startswith(("encoder.", "decoder.", "quant_", "post_quant_"))}


def vae_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors: the authors' names -> diffusers'. What training leaves behind (the loss, a moving
    average of the weights) is dropped."""
    levels = _levels(tensors)
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(("loss.", "model_ema.")):
            continue
        for old, new in _RULES:
            name = re.sub(old, new, name)
        name = re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", name)
        renamed[name] = _as_linear(name, tensor)
    return renamed


def infer_sizes(tensors: Mapping[str, Tensor], source: Path) -> Json:
    """What the shapes, in the authors' names, say of diffusers' configuration. ValueError if parts are missing."""
    levels = _levels(tensors)
    try:
        widths = tuple(len(tensors[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels))
        latent = len(tensors["encoder.conv_out.weight"]) // 2
    except KeyError as error:
        raise ValueError(f"{source} is no whole autoencoder of FLUX.1: {error} is missing.") from None
    blocks = {int(name.split(".")[4]) for name in tensors if name.startswith("encoder.down.0.block.")}
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": len(blocks),
        "latent_channels": latent,
    }


def _levels(tensors: Mapping[str, Tensor]) -> int:
    return 1 + max((int(name.split(".")[2]) for name in tensors if name.startswith("encoder.down.")), default=0)


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    """Attention has 1 x 1 convolutions in old files, linear layers in diffusers."""
    return tensor[:, :, 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor
