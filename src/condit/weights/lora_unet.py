"""LoRA files for Stable Diffusion's UNet, in the layout of `weights/lora_files.py`. Supported are diffusers, peft,
kohya's sd-scripts (paths with underscores), and SDXL's in the authors' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from condit.backbones.unet import UNet, UNetConfig
from condit.nn.lora import Linear, Pointwise
from condit.weights.catalog import AdapterFile, read_adapter
from condit.weights.files import Json
from condit.weights.lora_files import TEXT, modules, peft_alpha
from condit.weights.original_sd import unet_name

PREFIXES = ("base_model.model.", "unet.", "lora_unet_", "diffusion_model.")


def adapter_for(backbone: nn.Module, source: str | Path, method: str, *, ignore_text: bool = False) -> AdapterFile:
    """An adapter by name, file or folder. A LoRA of a UNet has the UNet's paths; ignore_text drops its tensors for text
    encoders."""
    if not isinstance(backbone, UNet):
        return read_adapter(source, method)
    return read_adapter(source, method, partial(unet_lora, unet=backbone, ignore_text=ignore_text))


def unet_lora(
    tensors: Mapping[str, Tensor], settings: Json | None, unet: UNet, *, ignore_text: bool = False
) -> dict[str, Tensor]:
    """The tensors of a LoRA file under the UNet's own paths. ValueError for layers that take no LoRA here (convolutions
    of 3 x 3) and, unless `ignore_text`, for text encoders."""
    if ignore_text:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(TEXT)}
    paths = {p.replace(".", "_"): p for p, m in unet.named_modules() if isinstance(m, Linear | Pointwise)}
    adapted: dict[str, Tensor] = {}
    for module, a, b, alpha in modules({_today(name): tensor for name, tensor in tensors.items()}):
        path = paths.get(spelt(module, unet.config))
        if path is None or max(a.shape[2:], default=1) > 1 or max(b.shape[2:], default=1) > 1:
            raise ValueError(
                f"{module!r}: this UNet takes no LoRA there. Supported are linear layers and 1 x 1 convolutions of "
                "transformers, embeddings and clocks; a LoCon's convolutions and other models' layers are not. Was it "
                "made for another base, such as SD 1.5 instead of SDXL?"
            )
        alpha = peft_alpha(path, settings) if alpha is None and settings else alpha
        adapted[f"transformer.{path}.lora_A.weight"] = a.flatten(1)
        adapted[f"transformer.{path}.lora_B.weight"] = b.flatten(1)
        if alpha is not None:
            adapted[f"transformer.{path}.alpha"] = alpha
    return adapted


def spelt(module: str, config: UNetConfig) -> str:
    """diffusers' path of a module with underscores, from any of the layouts."""
    name = module
    while (prefix := next((p for p in PREFIXES if name.startswith(p)), None)) is not None:
        name = name.removeprefix(prefix)
    authors = re.match(r"(input_blocks|output_blocks)[._](\d+)[._](\d)[._](.*)", name)
    middle = re.match(r"(middle_block)[._](\d)[._](.*)", name)
    if match := authors or middle:
        name = unet_name(".".join(match.groups()), config)
    return name.replace(".", "_")


def _today(name: str) -> str:
    """diffusers' first layout kept LoRAs in attention processors."""
    name = re.sub(r"\.processor\.(to_\w+?)_lora\.(down|up)\.", r".\1.lora_\2.", name)
    return re.sub(r"\.to_out\.lora_", ".to_out.0.lora_", name)
