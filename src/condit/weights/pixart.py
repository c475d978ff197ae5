"""PixArt-alpha and -Sigma from disk: folders in diffusers' layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from condit.backbones.pixart import PixArt, PixArtConfig
from condit.controls.control import Control
from condit.data.files import hash_file
from condit.diffusion.vp import Process
from condit.encoders.text import T5Text, Text
from condit.nn.layers import Uninitialised
from condit.nn.lora import LowRank
from condit.weights.files import Json, load_strict
from condit.weights.folders import check_tokenizer, read_folder, read_json, weight_files
from condit.weights.latent_models import Frame, LatentNetwork, LatentParts, rows_of
from condit.weights.stable_diffusion import SOLVERS
from condit.weights.vae import frozen, load_autoencoder

if TYPE_CHECKING:
    from transformers import T5EncoderModel

# Fields of a transformer's config.json that are fixed in this network; another value is another network.
_FIXED = {
    "norm_type": ("ada_norm_single",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "attention_type": ("default", None),
    "double_self_attention": (False,),
    "only_cross_attention": (False,),
    "use_linear_projection": (False,),
    "num_vector_embeds": (None,),
}
LIMITS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # text tokens, as in diffusers


def load_pixart(folder: Path, dtype: torch.dtype, name: str) -> LatentParts:
    """The parts in a folder with model_index.json. ValueError where one is missing or is not PixArt's."""
    kind = str(read_json(folder / "model_index.json").get("_class_name"))
    if kind not in LIMITS:
        raise ValueError(f"{folder} is a {kind}; supported are {', '.join(LIMITS)}.")
    network, vae = load_transformer(folder / "transformer"), load_autoencoder(folder / "vae")
    text = load_t5_text(folder, LIMITS[kind])
    if text.t5.config.d_model != network.config.caption_channels:
        raise ValueError(
            f"{folder}: text of width {text.t5.config.d_model} for a network that reads "
            f"{network.config.caption_channels}. Another model?"
        )
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    for module in (network, text, vae):
        frozen(module, dtype)
    side = network.config.sample_size * 2 ** (len(vae.config["block_out_channels"]) - 1)
    return LatentParts(
        name=name,
        hash=hash_file(weight_files(folder / "transformer")[0]),
        backbone=network,
        text=text,
        vae=vae,
        image=None,
        process=Process.from_config(scheduler),
        solver=SOLVERS.get(scheduler.get("_class_name", "")),
        size=(side, side),
        steps=20,
        guidance=4.5,
        tell=tell_pixart,
    )


def load_transformer(folder: Path) -> PixArt:
    """The network, strictly."""
    config = pixart_config(read_json(folder / "config.json"), folder)
    with torch.device("meta"), Uninitialised():
        network = PixArt(config)
    load_strict(network, read_folder(folder), source=folder, assign=True)
    return network


def pixart_config(raw: Json, source: str | Path) -> PixArtConfig:
    """The configuration in a config.json of diffusers. ValueError for another network's."""
    for field, known in _FIXED.items():
        if field in raw and raw[field] not in known:
            raise ValueError(f"{source}: the transformer has {field} = {raw[field]!r}; PixArt's has {known[0]!r}.")
    config = PixArtConfig(**{field: raw[field] for field in PixArtConfig.__dataclass_fields__ if field in raw})
    if raw.get("cross_attention_dim") not in (None, config.dim) or not raw.get("caption_channels"):
        raise ValueError(
            f"{source}: cross_attention_dim {raw.get('cross_attention_dim')} and caption_channels "
            f"{raw.get('caption_channels')} are not PixArt's, which projects the text to its own width."
        )
    return config


def load_t5_text(folder: Path, limit: int) -> T5Text:
    """Tokenizer and encoder, strictly."""
    from transformers import AutoTokenizer

    check_tokenizer(folder / "tokenizer", "spiece.model")
    t5 = load_t5(folder / "text_encoder")
    return T5Text(t5, AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True), limit=limit)


def load_t5(encoder: Path) -> T5EncoderModel:
    """transformers' T5 encoder from its folder, strictly."""
    from transformers import T5Config, T5EncoderModel

    # Not from_pretrained: it draws a progress bar, and fills missing tensors with random numbers.
    with torch.device("meta"), Uninitialised():
        t5 = T5EncoderModel(T5Config.from_dict(read_json(encoder / "config.json")))
    tensors = read_folder(encoder)
    # One table with two names, of which a file holds one.
    table = next((tensors[n] for n in ("shared.weight", "encoder.embed_tokens.weight") if n in tensors), None)
    wanted = t5.state_dict()
    if table is not None:
        tensors |= {n: table for n in ("shared.weight", "encoder.embed_tokens.weight") if n in wanted}
    load_strict(t5, {n: t for n, t in tensors.items() if not n.startswith("decoder.")}, source=encoder, assign=True)
    t5.encoder.embed_tokens.weight = t5.shared.weight  # one parameter again, so that a conversion makes one copy
    return t5


def tell_pixart(network: PixArt, text: Text, frame: Frame | Sequence[Frame]) -> LatentNetwork:
    """PixArt with a text: the noise that it predicts, without its learned variance, which no solver here reads."""
    size = None
    if network.config.sized:
        sizes = [f.size for f in rows_of(frame, len(text.tokens))]
        size = torch.tensor(sizes, device=text.tokens.device, dtype=text.tokens.dtype)

    def predict(x: Tensor, t: Tensor, lora: LowRank | None, controls: Sequence[Control]) -> Tensor:
        out = network(x, t, text.tokens, text.mask, size=size, lora=lora, controls=controls)
        return out[:, : x.shape[1]]

    return predict
