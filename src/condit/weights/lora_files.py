"""LoRA files of other tools, in one layout: `transformer.PATH.lora_A.weight`, `.lora_B.weight` and `.alpha`, with PATH
in diffusers' names. Supported are diffusers, peft, kohya's sd-scripts and FLUX's own names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from condit.weights.files import Json
from condit.weights.flux_names import DOUBLE, SINGLE, parts
from condit.weights.folders import optional_json

PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_")
TEXT = ("lora_te", "text_encoder")
SIDES = {"lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B"}
NAME = re.compile(r"(?P<path>.+?)\.(?P<side>lora_[AB]|lora[._]down|lora[._]up)(?:\.[^.]+)?\.weight")
# Diffusers' own paths as kohya's underscores spell them.
OURS = re.compile(r"(single_transformer_blocks|transformer_blocks)_(\d+)_(.+)")
SUFFIXES = {path.replace(".", "_"): path for paths in (*DOUBLE.values(), *SINGLE.values()) for path in paths}


def published(tensors: Mapping[str, Tensor], settings: Json | None = None) -> dict[str, Tensor]:
    """The tensors of a LoRA file in the published layout. settings: peft's configuration, for alpha where there is no
    tensor of it. ValueError for a name that is not a LoRA's, or for a text encoder's: FLUX's are not adapted here, and
    half a LoRA is another one."""
    adapted: dict[str, Tensor] = {}
    for module, a, b, alpha in modules(tensors):
        for path, rows in targets(module, a, b):
            alpha = peft_alpha(path, settings) if alpha is None and settings else alpha
            adapted[f"transformer.{path}.lora_A.weight"] = a
            adapted[f"transformer.{path}.lora_B.weight"] = rows
            if alpha is not None:
                adapted[f"transformer.{path}.alpha"] = alpha
    return adapted


def peft_alpha(path: str, settings: Json) -> Tensor | None:
    """Alpha of a path in peft's configuration: of the first `alpha_pattern` that its end matches, else `lora_alpha`.
    ValueError for a variant of LoRA."""
    for name in ("use_rslora", "use_dora"):
        if settings.get(name):
            raise ValueError(f"peft's {name} is set: this is no plain LoRA, and condit reads plain ones only.")
    patterns = settings.get("alpha_pattern") or {}
    matches = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", path))
    alpha = next(matches, settings.get("lora_alpha"))
    return None if alpha is None else torch.tensor(float(alpha))


def peft_settings(folder: Path | None, metadata: Mapping[str, str]) -> Json:
    """peft's configuration: `adapter_config.json` in the file's folder, or as diffusers keeps it in the file itself."""
    if folder is not None and (settings := optional_json(folder / "adapter_config.json")):
        return settings
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    return {name.removeprefix("transformer."): value for name, value in settings.items()}


def modules(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """(module's name in the file, A, B, alpha) of every pair. ValueError for a name of another layout or a single
    matrix."""
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas = {name.removesuffix(".alpha"): t for name, t in tensors.items() if name.endswith(".alpha")}
    for name, tensor in tensors.items():
        if name.startswith(TEXT):
            raise ValueError(
                f"{name!r}: this LoRA also adapts a text encoder, which condit leaves as it is. For Stable "
                "Diffusion pass ignore_text=True to leave these tensors out, which changes the LoRA; for FLUX.1 remove "
                "them from the file."
            )
        if name.endswith(".alpha"):
            continue
        match = NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{name!r} is in no LoRA layout that condit reads (diffusers, peft, kohya, FLUX's own names). LoHa, "
                "LoKr, DoRA and xlabs files must be converted first."
            )
        pairs.setdefault(match["path"], {})[SIDES[match["side"]]] = tensor
    for path, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{path!r} has only its {next(iter(pair))} matrix. Is the file cut off?")
        alpha, sizes = alphas.get(path), [tuple(pair[side].shape) for side in "AB"]
        if min(map(len, sizes)) < 2 or (alpha is not None and alpha.numel() != 1):
            raise ValueError(
                f"{path!r} has matrices of shape {sizes[0]} and {sizes[1]}, and alpha {alpha}; no LoRA has."
            )
        yield path, pair["A"], pair["B"], alpha


def targets(module: str, a: Tensor, b: Tensor) -> list[tuple[str, Tensor]]:
    """Diffusers' paths of a module, and the rows of B that belong to each."""
    name = module
    while (prefix := next((p for p in PREFIXES if name.startswith(p)), None)) is not None:
        name = name.removeprefix(prefix)
    if (match := OURS.fullmatch(name)) is not None and match[3] in SUFFIXES:
        return [(f"{match[1]}.{match[2]}.{SUFFIXES[match[3]]}", b)]
    # A LoRA's B has the rows of the weight that it updates; its A has the width of the input, which in blocks is the
    # model's wherever a matrix is cut.
    return parts(name, b, a.shape[1]) or [(name, b)]
