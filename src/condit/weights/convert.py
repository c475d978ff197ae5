"""Adapters from one layout to another: LoRA files of diffusers, peft and kohya; others to safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from condit.weights.files import read_metadata, read_tensors, save_tensors
from condit.weights.guess import what_is
from condit.weights.lora_unet import adapter_for
from condit.weights.plan_networks import network_of

Layout = Literal["diffusers", "peft", "kohya"]


def convert_adapter(source: str | Path, target: Path, layout: Layout | None, base: str) -> Path:
    """Writes an adapter's file as safetensors and, if it is a LoRA, in a layout (None: as it is). base: the model that
    a LoRA is for, "flux" or a preset of a UNet ("sd15", "sdxl"). ValueError for a layout of another kind of adapter."""
    if layout is None:
        return save_tensors(target, read_tensors(source), read_metadata(source))
    if what_is(read_tensors(source)) != "OminiControl":
        raise ValueError(f"{source} is no LoRA; layouts ({layout}) are for LoRA files. Leave --to out.")
    network = nn.Identity() if base == "flux" else network_of(base, Path(base), {})
    tensors = adapter_for(network, source, "OminiControl").tensors
    return save_tensors(target, lora_as(tensors, layout, "transformer" if base == "flux" else "unet"))


def lora_as(tensors: Mapping[str, Tensor], layout: Layout, part: str) -> dict[str, Tensor]:
    """A LoRA of `weights/lora_files.py` in another layout. part: "unet" or "transformer". kohya keeps alpha; in the
    others B includes it. ValueError for a variant of LoRA that the layout cannot hold."""
    made: dict[str, Tensor] = {}
    for name, a in tensors.items():
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind not in ("lora_A", "lora_B", "alpha"):
            raise ValueError(f"{name}: this variant of LoRA has no place in the layout {layout!r}.")
        if kind != "lora_A":
            continue
        b, alpha = tensors[f"{module}.lora_B.weight"], tensors.get(f"{module}.alpha")
        path, rank = module.removeprefix("transformer."), a.shape[0]
        if layout == "kohya":
            key = f"lora_{part}_{path.replace('.', '_')}"
            made |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
            made[f"{key}.alpha"] = a.new_tensor(float(rank)) if alpha is None else alpha
            continue
        key = f"{part}.{path}" if layout == "diffusers" else f"base_model.model.{path}"
        factor = 1.0 if alpha is None else float(alpha) / rank
        made |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": (b.float() * factor).to(b)}
    return made
