"""The parts of a text-to-image model over latents, whatever its network: a UNet, a transformer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from condit.controls.control import Control
from condit.diffusion.vp import Process, Solver
from condit.encoders.text import Text
from condit.nn.lora import LowRank
from condit.weights.catalog import MODELS
from condit.weights.class_models import models_folder, names_in

Kind = Literal["stable-diffusion", "stable-diffusion-file", "pixart", "icon-unet", "icon-pixart"]

# Folders (diffusers' layout) or files (the original layout) in the models folder, and where they are published.
PUBLISHED: dict[str, tuple[tuple[str, ...], str]] = {
    "sd15": (
        ("stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors", "v1-5-pruned.safetensors"),
        "huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    "sdxl": (
        ("stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors"),
        "huggingface.co/stabilityai/stable-diffusion-xl-base-1.0",
    ),
    "pixart-alpha-512": (("PixArt-XL-2-512x512",), "huggingface.co/PixArt-alpha/PixArt-XL-2-512x512"),
    "pixart-alpha-1024": (("PixArt-XL-2-1024-MS",), "huggingface.co/PixArt-alpha/PixArt-XL-2-1024-MS"),
    "pixart-sigma-1024": (("PixArt-Sigma-XL-2-1024-MS",), "huggingface.co/PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
}
# Of a pipeline's class in model_index.json, by its beginning: what is read as which kind.
_CLASSES: dict[str, Kind | None] = {
    "StableDiffusion3": None,
    "StableDiffusion": "stable-diffusion",
    "PixArt": "pixart",
    "IconPixArt": "icon-pixart",
    "IconUNet": "icon-unet",  # ours: on the latent and the text tower of "tiny"
}
_ORIGINAL = "model.diffusion_model.input_blocks.0.0.weight"


@dataclass(frozen=True)
class LatentModel:
    """What a name or a path holds: a folder in diffusers' layout, or a single file in the original one."""

    kind: Kind
    name: str
    path: Path


def recognise(source: str | Path) -> LatentModel | None:
    """A published name or a path of a model over latents; None for anything else. Folders are told by model_index.json,
    files by their tensors. FileNotFoundError for a published name that is not in the models folder."""
    name, path = str(source), Path(source)
    if name in PUBLISHED:
        places, home = PUBLISHED[name]
        path = next((p for p in (models_folder() / place for place in places) if p.exists()), None)
        if path is None:
            raise FileNotFoundError(
                f"no weights for {name!r}: {' or '.join(places)} is expected in {models_folder()}. Fetch it from "
                f"{home} and put it there (CONDIT_HOME moves the folder), or pass its path."
            )
    if name in MODELS:
        path = MODELS[name].path
    if not path.exists():
        return None
    if path.is_file():
        called = name if name in PUBLISHED else path.stem
        names = names_in(path)
        known = _ORIGINAL in names or f"state_dict.{_ORIGINAL}" in names  # the latter in Lightning's checkpoints
        return LatentModel("stable-diffusion-file", called, path) if known else None
    if not (path / "model_index.json").is_file():
        return None
    kind = str(json.loads((path / "model_index.json").read_text(encoding="utf-8")).get("_class_name"))
    found: Kind | None = next((value for start, value in _CLASSES.items() if kind.startswith(start)), None)
    called = name if name in PUBLISHED or name in MODELS else path.name
    return None if found is None else LatentModel(found, called, path)


@dataclass(frozen=True)
class Frame:
    """What a network may be told of the picture, in pixels (height, width): its own size, that of the original before
    it was cropped, the corner (top, left) of the crop, the size aimed at (SDXL, arXiv:2307.01952, section 2.2)."""

    size: tuple[int, int]
    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


def rows_of(frame: Frame | Sequence[Frame], count: int) -> Sequence[Frame]:
    """A frame for each of `count` rows."""
    return [frame] * count if isinstance(frame, Frame) else frame


class Network(Protocol):
    """A network that knows its text: latents (B, C, h, w), timesteps (B,) -> prediction (B, latent channels, h, w)."""

    def __call__(self, x: Tensor, t: Tensor, lora: LowRank | None, controls: Sequence[Control]) -> Tensor: ...


# tell(backbone, text, frame): the network of a run. What does not change from step to step is computed here. One frame
# for all, or one a row.
Tell = Callable[[Any, Text, Frame | Sequence[Frame]], Network]


@dataclass(frozen=True)
class LatentParts:
    """What a `LatentPipeline` is made of.

    solver None: the published scheduler is none of ours. zero_negative: where no negative prompt is given the text is
    zeros, not that of "" (SDXL). image: an image encoder or None.
    """

    name: str
    hash: str
    backbone: nn.Module
    text: Callable[..., Text]
    vae: Any
    image: Any
    process: Process
    solver: Solver | None
    size: tuple[int, int]
    steps: int
    guidance: float
    tell: Tell
    zero_negative: bool = False


def tell_unet(unet: Any, text: Text, frame: Frame | Sequence[Frame]) -> Network:
    """Stable Diffusion's UNet with a text, whose keys and values are projected once a run."""
    sizes = None
    if unet.config.addition_embed_type is not None:
        told = [[*f.original, *f.crop, *f.target] for f in rows_of(frame, len(text.tokens))]
        sizes = torch.tensor(told, device=text.tokens.device)
    pooled = None if sizes is None else text.pooled
    keys_values = unet.text_keys_values(text.tokens)

    def network(x: Tensor, t: Tensor, lora: LowRank | None, controls: Sequence[Control]) -> Tensor:
        known = keys_values if lora is None else text.tokens  # a LoRA changes the projections too, step by step
        return unet(x, t, known, pooled=pooled, sizes=sizes, lora=lora, controls=controls)

    return network
