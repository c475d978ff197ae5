"""The layouts of published IP-Adapters, recognised by their tensors: `.bin` and `.safetensors` of h94/IP-Adapter and
its relatives, raw training checkpoints, XLabs' FLUX files and InstantX's SD3.5 files. All are read under the names
`image_proj.*` and `ip_adapter.N.*`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condit.controls.control import Where
from condit.controls.ip_input import Form
from condit.controls.ip_projectors import Layer
from condit.nn.attention import Site
from condit.nn.lora import LoRA

# (pattern, replacement), the first that fits. The left sides are the spellings found in the wild.
SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"^image_proj_model\.", "image_proj."),  # tutorial_train.py's checkpoints
    (r"^adapter_modules\.", "ip_adapter."),
    (r"^ip_adapter_proj_model\.", "image_proj."),  # XLabs
    (r"^double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.", r"ip_adapter.\1.to_\2_ip."),
)
# InstantX's SD3.5 projector, whose blocks diffusers renames.
TIMED: tuple[tuple[str, str], ...] = (
    (r"^layers\.(\d+)\.0\.norm1\.", r"layers.\1.ln0."),
    (r"^layers\.(\d+)\.0\.norm2\.", r"layers.\1.ln1."),
    (r"^layers\.(\d+)\.0\.to_out\.", r"layers.\1.attn.to_out.0."),
    (r"^layers\.(\d+)\.0\.to_(q|kv)\.", r"layers.\1.attn.to_\2."),
    (r"^layers\.(\d+)\.1\.0\.", r"layers.\1.adaln_norm."),
    (r"^layers\.(\d+)\.1\.1\.", r"layers.\1.ff.net.0.proj."),
    (r"^layers\.(\d+)\.1\.3\.", r"layers.\1.ff.net.2."),
    (r"^layers\.(\d+)\.2\.1\.", r"layers.\1.adaln_proj."),
)
# The projector of a "plus" file in diffusers' names -> the official ones.
PLUS: tuple[tuple[str, str], ...] = (
    (r"^layers\.(\d+)\.ln0\.", r"layers.\1.0.norm1."),
    (r"^layers\.(\d+)\.ln1\.", r"layers.\1.0.norm2."),
    (r"^layers\.(\d+)\.attn\.to_(q|k|v|kv|out)\.(0\.)?", r"layers.\1.0.to_\2."),
    (r"^layers\.(\d+)\.ff\.0\.", r"layers.\1.1.0."),
    (r"^layers\.(\d+)\.ff\.1\.net\.0\.proj\.", r"layers.\1.1.1."),
    (r"^layers\.(\d+)\.ff\.1\.net\.2\.", r"layers.\1.1.3."),
)
BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL", 4096: "FLUX.1", 2432: "SD 3.5"}


@dataclass(frozen=True)
class IPFile:
    """A file in one spelling: the projector's tensors, those of each layer by its number, and a LoRA's (FaceID)."""

    projector: dict[str, Tensor]
    layers: dict[int, dict[str, Tensor]]
    lora: dict[str, Tensor]
    others: dict[str, Tensor]

    @property
    def text_width(self) -> int:
        """Width of the tokens that K', V' read."""
        return next(iter(self.layers.values()))["to_k_ip.weight"].shape[1]


def read_layout(tensors: Mapping[str, Tensor], source: object) -> IPFile:
    """Sort the tensors of a file. ValueError where it is no whole IP-Adapter."""
    named = {respelt(name): t for name, t in tensors.items() if not name.startswith("unet.")}
    projector = {n.removeprefix("image_proj."): t for n, t in named.items() if n.startswith("image_proj.")}
    if "time_embedding.linear_1.weight" in projector:
        projector = {respelt(name, TIMED): t for name, t in projector.items()}
    elif "layers.0.attn.to_q.weight" in projector:
        projector = official_plus(projector)
    layers: dict[int, dict[str, Tensor]] = {}
    lora: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in named.items():
        found = re.fullmatch(r"ip_adapter\.(\d+)\.(.+)", name)
        if found and "_lora." in found[2]:
            lora[f"{found[1]}.{found[2]}"] = tensor
        elif found:
            layers.setdefault(int(found[1]), {})[found[2]] = tensor
        elif not name.startswith("image_proj."):
            others[name] = tensor
    if not projector or not layers:
        lacking = "projector (image_proj.*)" if not projector else "K', V' (ip_adapter.N.*)"
        first = next(iter(tensors), "nothing")
        raise ValueError(f"{source}: no {lacking}; the first tensor is {first!r}. Expected an IP-Adapter.")
    for number, parts in layers.items():
        for part in ("to_k_ip.weight", "to_v_ip.weight"):
            if part not in parts:
                raise ValueError(f"{source}: ip_adapter.{number} has no {part}. The file is broken; fetch it again.")
    return IPFile(projector, dict(sorted(layers.items())), lora, others)


def official_plus(projector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A "plus" projector in diffusers' names under the official ones, which keep keys and values in one matrix."""
    named = {respelt(name, PLUS): tensor for name, tensor in projector.items()}
    for name in [name for name in named if name.endswith(".0.to_k.weight")]:
        value = named.pop(name.replace("to_k", "to_v"))
        named[name.replace("to_k", "to_kv")] = torch.cat([named.pop(name), value])
    return named


def respelt(name: str, spellings: Sequence[tuple[str, str]] = SPELLINGS) -> str:
    for pattern, replacement in spellings:
        changed, count = re.subn(pattern, replacement, name, count=1)
        if count:
            return changed
    return name


# Where its layers belong


def form_of(file: IPFile, sites: Sequence[Site]) -> Form:
    """UNets attend to the text apart ("cross"). On an MM-DiT biases tell XLabs' adapters, which add after a block."""
    if any(site.kind == "cross" for site in sites):
        return "cross"
    return "residual" if "to_k_ip.bias" in next(iter(file.layers.values())) else "joint"


def fit_layers(
    file: IPFile, layers: Sequence[Layer], text_width: int, where: Where, source: object, model: str
) -> dict[int, dict[str, Tensor]]:
    """The layers of a file that `where` asks for. ValueError where the file was made for another base, or lacks layers
    inside a module whose others it has; modules it lacks altogether are inactive (an adapter of some blocks)."""
    by_number = {layer.number: layer for layer in layers}
    if file.text_width != text_width:
        theirs, ours = (f" ({BASES[w]})" if w in BASES else "" for w in (file.text_width, text_width))
        raise ValueError(
            f"{source} reads tokens of width {file.text_width}{theirs}; the text of {model} has width "
            f"{text_width}{ours}. It was made for another base."
        )
    strange = sorted(set(file.layers) - set(by_number))
    if strange:
        raise ValueError(
            f"{source} has K', V' number {strange[0]}; {model} has {len(layers)} layers for it, numbered "
            f"{layers[0].number} to {layers[-1].number}. It was made for another base."
        )
    for number, parts in file.layers.items():
        rows, layer = parts["to_k_ip.weight"].shape[0], by_number[number]
        if rows != layer.width:
            raise ValueError(
                f"{source}: K', V' number {number} have width {rows}; {layer.path} of {model} has {layer.width}. "
                "It was made for another base."
            )
    present = {layer.path.split(".transformer_blocks.")[0] for n, layer in by_number.items() if n in file.layers}
    holes = [
        layer
        for layer in layers
        if layer.number not in file.layers and layer.path.split(".transformer_blocks.")[0] in present
        and ".transformer_blocks." in layer.path
    ]  # fmt: skip
    if holes:
        raise ValueError(f"{source} lacks K', V' number {holes[0].number} ({holes[0].path}), but has its neighbours.")
    return {n: parts for n, parts in file.layers.items() if Site(by_number[n].path, "cross", 0) in where}


# FaceID's LoRA: of every attention layer, the picture's too


def face_lora(tensors: Mapping[str, Tensor], paths: Sequence[str], backbone: nn.Module, source: object) -> LoRA:
    """From `N.to_q_lora.down.weight`, N the place among all attention layers; alpha is the rank. ValueError where it
    does not fit the backbone."""
    named = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight", name)
        if found is None or int(found[1]) >= len(paths):
            raise ValueError(f"{source}: {name!r} belongs to no attention layer. It was made for another base.")
        part = "to_out.0" if found[2] == "out" else f"to_{found[2]}"
        named[f"{paths[int(found[1])]}.{part}.lora_{'A' if found[3] == 'down' else 'B'}.weight"] = tensor.float()
    lora = LoRA.from_tensors(named)
    lora.check_fits(backbone, source, "the model")
    return lora
