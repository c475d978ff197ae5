"""FLUX.1 from disk: folders as diffusers saves them, and single files in its authors' names (flux1-dev.safetensors,
ae.safetensors, or a checkpoint that holds both).

The shapes of a single file's tensors give its sizes. What they do not give (how a head's channels are shared among the
axes, the autoencoder's norm groups and factors) is read from a config.json of the components' folder, or is FLUX.1's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from condit.backbones.mmdit import PRESETS, MMDiT, MMDiTConfig
from condit.data.files import hash_file
from condit.diffusion.schedules import DynamicShift
from condit.encoders.text import FluxText
from condit.weights.catalog import describe_hash
from condit.weights.files import load_strict, names_in, read_tensors
from condit.weights.flux_names import parts
from condit.weights.folders import check_tokenizer, read_config, read_folder, read_json
from condit.weights.guess import guess
from condit.weights.parts import Parts
from condit.weights.pixart import load_t5
from condit.weights.stable_diffusion import load_clip_text
from condit.weights.vae import autoencoder_tensors, load_flux_vae

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTextModel

PREFIX = "model.diffusion_model."  # before the transformer's names in files of whole pipelines
SIGN = re.compile(rf"({re.escape(PREFIX)})?double_blocks\.0\.img_attn\.qkv\.")


# Folders


def load_mmdit(folder: Path, convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict) -> MMDiT:
    """An MM-DiT from a folder in diffusers' layout, strictly. convert: applied to its tensors."""
    return build_mmdit(read_mmdit_config(folder), convert(read_folder(folder)), folder)


def read_mmdit_config(folder: Path) -> MMDiTConfig:
    """The config.json of diffusers' FLUX transformer. ValueError for another model's."""
    config = read_config(folder)
    unknown = sorted(config.keys() - MMDiTConfig.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"{folder}/config.json has {unknown[0]!r}, which FLUX's transformer does not. Another model?")
    return MMDiTConfig(**config)


def build_mmdit(config: MMDiTConfig, tensors: Mapping[str, Tensor], source: Path) -> MMDiT:
    with torch.device("meta"):
        backbone = MMDiT(config)
    load_strict(backbone, tensors, source=source, assign=True)
    return backbone.eval().requires_grad_(False)


def load_flux(folder: Path, dtype: torch.dtype, name: str) -> Parts:
    """The parts in a FLUX.1 folder as diffusers saves it."""
    backbone, vae = load_mmdit(folder / "transformer").to(dtype), load_flux_vae(folder / "vae", dtype)
    return assemble(name, describe_hash(folder), backbone, folder, vae, dtype)


def assemble(name: str, hash: str, backbone: MMDiT, components: Path, vae: AutoencoderKL, dtype: torch.dtype) -> Parts:
    """A pipeline's parts around a transformer: text encoders and scheduler from the folder `components`."""
    text = load_text(components, dtype)
    shift, dynamic, eta = read_schedule(components / "scheduler", dev=backbone.config.guidance_embeds)
    pixels = 2 ** (len(vae.config["block_out_channels"]) - 1) * 2
    side = 1024 if backbone.config.num_layers >= PRESETS["flux-dev"].num_layers else 8 * pixels
    return Parts(
        name=name,
        hash=hash,
        backbone=backbone,
        text=text,
        vae=vae,
        image=None,
        prediction="velocity",
        shift=shift,
        size=(side, side),
        steps=28 if backbone.config.guidance_embeds else 4,
        guidance=3.5,
        distilled=True,
        dynamic=dynamic,
        eta=eta,
    )


def load_text(folder: Path, dtype: torch.dtype) -> FluxText:
    """Both text encoders, strictly, and their tokenizers; frozen."""
    from transformers import AutoTokenizer

    check_tokenizer(folder / "tokenizer", "vocab.json", "merges.txt")
    check_tokenizer(folder / "tokenizer_2", "spiece.model")
    t5 = load_t5(folder / "text_encoder_2")
    for name, part in t5.named_modules():
        if not list(part.children()):  # in fp16, transformers keeps the outputs of T5's feed-forwards in fp32
            nn.Module.to(part, torch.float32 if dtype == torch.float16 and name.endswith(".wo") else dtype)
    clip = load_clip_text(folder / "text_encoder", projected=False)
    text = FluxText(
        cast("CLIPTextModel", nn.Module.to(clip, dtype)),
        AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        t5,
        AutoTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True),
    )
    return text.eval().requires_grad_(False)


_UNSUPPORTED = (
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
)


def read_schedule(folder: Path, *, dev: bool) -> tuple[float | None, DynamicShift, float]:
    """The shift of the noise levels in scheduler_config.json (a number, or None and how it grows with the image), and
    the sampler's eta. Without the file, those of FLUX.1-dev or schnell. ValueError for another schedule."""
    file = folder / "scheduler_config.json"
    if not file.is_file():
        return (None if dev else 1.0), DynamicShift(), 0.0
    config = read_json(file)
    wrong = next((name for name in _UNSUPPORTED if config.get(name)), None)
    if "FlowMatchEuler" not in config.get("_class_name", "FlowMatchEuler") or wrong:
        raise ValueError(
            f"{file} has {wrong or config['_class_name']!r}; condit runs FLUX.1 by Euler steps at shifted flow levels."
            " Use diffusers' pipeline with condit.interop.attach."
        )
    standard = DynamicShift()
    dynamic = DynamicShift(
        (config.get("base_image_seq_len", standard.base[0]), config.get("base_shift", standard.base[1])),
        (config.get("max_image_seq_len", standard.maximum[0]), config.get("max_shift", standard.maximum[1])),
        config.get("time_shift_type", "exponential"),
    )
    shift = None if config.get("use_dynamic_shifting") else float(config.get("shift", 1.0))
    return shift, dynamic, float(bool(config.get("stochastic_sampling")))


# Single files


def load_flux_file(file: Path, components: str | Path, dtype: torch.dtype, name: str) -> Parts:
    """The parts in a single file and, for what it lacks, in the folder `components` in diffusers' layout: text_encoder,
    tokenizer, text_encoder_2, tokenizer_2 and, unless the file holds an autoencoder, `vae` or ae.safetensors.
    ValueError for a missing one, or for a file that is not FLUX.1's."""
    folder = Path(components)
    place = check_components(file, folder)
    tensors = read_tensors(file)
    config = read_mmdit_config(folder / "transformer") if (folder / "transformer" / "config.json").is_file() else None
    backbone = flux_transformer(tensors, file, like=config).to(dtype)
    vae = load_flux_vae(place, dtype, autoencoder_tensors(tensors) or None)
    return assemble(name, hash_file(file), backbone, folder, vae, dtype)


def check_components(file: Path, folder: Path) -> Path:
    """The place of the autoencoder's file or configuration. ValueError that names what the folder lacks, before
    anything large is read."""
    missing = [n for n in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2") if not (folder / n).is_dir()]
    place = vae_place(folder)
    if autoencoder_tensors(dict.fromkeys(names_in(file), torch.empty(0))):
        place = folder / "vae"
    if missing or place is None:
        missing += [] if place else ["vae (or ae.safetensors)"]
        raise ValueError(
            f"{file.name} holds FLUX.1's transformer; {folder} lacks {', '.join(missing)}. Put the file next to these "
            "folders, as in the repository of FLUX.1-dev, or give the folder that has them as components=."
        )
    return place


def vae_place(folder: Path) -> Path | None:
    """diffusers' folder of the autoencoder, or a file in the authors' names."""
    if any((folder / "vae").glob("*.safetensors")) or any((folder / "vae").glob("*.bin")):
        return folder / "vae"
    return next((folder / name for name in ("ae.safetensors", "ae.sft") if (folder / name).is_file()), None)


def flux_transformer(tensors: Mapping[str, Tensor], source: Path, *, like: MMDiTConfig | None = None) -> MMDiT:
    """The transformer among a single file's tensors. like: the configuration in the components' folder."""
    own = transformer_tensors(tensors)
    config = infer_config(own, source, like)
    return build_mmdit(config, to_diffusers(own, config.dim, source), source)


def transformer_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the transformer, without the prefix that they have in files of several parts."""
    if any(name.startswith(PREFIX) for name in tensors):
        return {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    return dict(tensors)


def to_diffusers(tensors: Mapping[str, Tensor], width: int, source: str | Path) -> dict[str, Tensor]:
    """The transformer's tensors: the authors' names -> diffusers'. width: of the model. ValueError for a name that
    FLUX.1 does not have."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind in ("scale_weight", "scale_input", "weight_scale", "input_scale") or tensor.dtype == torch.uint8:
            raise ValueError(
                f"{source}: {name!r} belongs to quantised weights with scales of their own. Use the bf16 or plain fp8 "
                "file; condit.load(..., quantize=) makes it small."
            )
        placed = parts(module, tensor, width)
        if placed is None or kind not in ("weight", "bias", "scale"):
            raise ValueError(f"{source}: FLUX.1 has no {name!r}. Is this another model, or a variant with more parts?")
        for path, cut in placed:
            renamed[f"{path}.{'weight' if kind == 'scale' else kind}"] = cut
    return renamed


def infer_config(tensors: Mapping[str, Tensor], source: Path, like: MMDiTConfig | None = None) -> MMDiTConfig:
    """The sizes that the shapes of the authors' tensors give; `axes_dims_rope` is FLUX.1's, or that of `like` where it
    fits the heads. ValueError for incomplete tensors, or where `like` differs from them."""
    try:
        width, channels = tensors["img_in.weight"].shape
        head = len(next(t for n, t in tensors.items() if n.endswith(("query_norm.scale", "query_norm.weight"))))
        sizes = {
            "in_channels": channels,
            "out_channels": len(tensors["final_layer.linear.weight"]),
            "joint_attention_dim": tensors["txt_in.weight"].shape[1],
            "pooled_projection_dim": tensors["vector_in.in_layer.weight"].shape[1],
        }
    except (KeyError, StopIteration, ValueError) as error:
        looks = f" It looks like {text}." if (text := guess(tensors)) and "FLUX" not in text else ""
        raise ValueError(f"{source} is no whole transformer of FLUX.1: {error} is missing.{looks}") from None
    axes = next((c.axes_dims_rope for c in (like, MMDiTConfig()) if c and sum(c.axes_dims_rope) == head), None)
    if axes is None or width % head:
        raise ValueError(
            f"{source} has heads of {head} channels in a width of {width}; FLUX.1's have 128. For a model like it put "
            "its transformer/config.json, which says axes_dims_rope, into the components' folder."
        )

    def count(kind: str) -> int:
        return 1 + max((int(n.split(".")[1]) for n in tensors if n.startswith(f"{kind}_blocks.")), default=-1)

    config = MMDiTConfig(
        num_layers=count("double"),
        num_single_layers=count("single"),
        attention_head_dim=head,
        num_attention_heads=width // head,
        guidance_embeds=any(n.startswith("guidance_in.") for n in tensors),
        axes_dims_rope=axes,
        **sizes,
    )
    if like is None:
        return config
    # A configuration without out_channels has as many as in_channels.
    ours, theirs = ({**asdict(c), "out_channels": c.out_channels or c.in_channels} for c in (config, like))
    for name, value in ours.items():
        if value != theirs[name]:
            raise ValueError(
                f"{source} has {name} {value}, transformer/config.json in the components' folder {theirs[name]}. Is it "
                "the file of another FLUX.1 (dev, schnell, Fill)? Give the folder that belongs to it as components=."
            )
    return like
