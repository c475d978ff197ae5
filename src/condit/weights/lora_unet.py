"""LoRA files for Stable Diffusion's UNet, in the layout of `weights/lora_files.py`: diffusers' names or the authors',
with dots or underscores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from condit.backbones.unet import UNet, UNetConfig
from condit.nn.lora import Conv, Linear, Pointwise
from condit.weights.catalog import AdapterFile, read_adapter
from condit.weights.files import Json
from condit.weights.lora_files import published, updates
from condit.weights.original_sd import unet_name

PREFIXES = ("base_model.model.", "unet.", "lora_unet_", "diffusion_model.")


def adapter_for(backbone: nn.Module, source: str | Path, method: str, *, ignore_text: bool = False) -> AdapterFile:
    """An adapter by name, file or folder. A LoRA of a UNet has the UNet's paths; ignore_text drops its tensors for text
    encoders."""
    layout = partial(unet_lora, unet=backbone) if isinstance(backbone, UNet) else published
    return read_adapter(source, method, partial(layout, ignore_text=ignore_text))


def unet_lora(
    tensors: Mapping[str, Tensor], settings: Json | None, unet: UNet, *, ignore_text: bool = False
) -> dict[str, Tensor]:
    """The tensors of a LoRA file under the UNet's own paths. ValueError for a layer that the UNet does not have and,
    unless `ignore_text`, for text encoders."""
    layers = {p.replace(".", "_"): (p, m) for p, m in unet.named_modules() if isinstance(m, Linear | Pointwise | Conv)}
    adapted: dict[str, Tensor] = {}
    for update in updates(tensors, ignore_text=ignore_text):
        path, layer = layers.get(spelt(update.module, unet.config), ("", None))
        convolves, kernel = isinstance(layer, Conv), max(update.a.shape[2:], default=1)
        if layer is None or (kernel > 1 and not convolves):
            raise ValueError(
                f"{update.module!r}: this UNet takes no LoRA there. Was it made for another base, such as SD 1.5 "
                "instead of SDXL?"
            )
        a = update.a.flatten(1) if not convolves else update.a if update.a.ndim == 4 else update.a[..., None, None]
        adapted |= replace(update, a=a).tensors(path, settings)
    return adapted


def spelt(module: str, config: UNetConfig) -> str:
    """diffusers' path of a module with underscores, from any of the layouts."""
    name = module
    while (prefix := next((p for p in PREFIXES if name.startswith(p)), None)) is not None:
        name = name.removeprefix(prefix)
    name = name.replace(".", "_")
    places = r"(input_blocks|output_blocks)_(\d+)_(\d)(?:_(.*))?", r"(middle_block)_(\d)_(.*)"
    ends = r"(time_embed|out)_(\d)", r"(label_emb)_(\d)_(\d)"
    match = next((m for pattern in (*places, *ends) if (m := re.fullmatch(pattern, name))), None)
    if match is not None:
        # in_layers_2 is a module and a number, to_q and proj_in are not.
        inner = re.sub(r"^((?:in|emb|out)_layers)_(\d)$", r"\1.\2", match.groups()[-1] or "")
        place = ".".join([*match.groups()[:-1], *([inner] if inner else []), ""])
        name = unet_name(place, config).removesuffix(".")
    return name.replace(".", "_")
