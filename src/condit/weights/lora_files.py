"""LoRA files of other tools, in one layout: `transformer.PATH.lora_A.weight`, `.lora_B.weight`, `.alpha`, `.bias` (what
is added to the layer's) and `.magnitude` (DoRA's norms of rows), with PATH in diffusers' names. Read are diffusers of
all years, peft, kohya's sd-scripts, LyCORIS's LoCon, OneTrainer, ComfyUI, XLabs and FLUX's own names (docs/files.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from condit.data.files import parse_json
from condit.weights.files import Json
from condit.weights.flux_names import DOUBLE, SINGLE, WHOLE, parts
from condit.weights.folders import optional_json

PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_")
TEXT = ("lora_te", "text_encoder")
# The end of a tensor's name -> what it is.
ENDS = {
    r"\.(lora_A|lora_down|lora\.down)(\.[^.]+)?\.weight": "A",
    r"\.(lora_B|lora_up|lora\.up)(\.[^.]+)?\.weight": "B",
    r"\.lora_mid\.weight": "mid",  # LyCORIS, between A and B
    r"\.alpha": "alpha",
    r"\.(lora_B|lora_up)(\.[^.]+)?\.bias": "bias",
    r"\.diff_b": "whole bias",
    r"\.dora_scale": "dora",  # LyCORIS: of the outputs (out, 1, ...), or of the inputs (1, in, ...)
    r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?": "magnitude",
}
# Older spellings -> those of ENDS: diffusers of 2023 kept LoRAs in attention processors, XLabs keeps them there.
OLD = (
    (r"\.processor\.(to_\w+?)_lora\.(down|up)\.", r".\1.lora_\2."),
    (r"\.to_out\.lora_", ".to_out.0.lora_"),
    (r"double_blocks\.(\d+)\.processor\.(qkv|proj)_lora1\.", r"double_blocks.\1.img_attn.\2.lora_"),
    (r"double_blocks\.(\d+)\.processor\.(qkv|proj)_lora2\.", r"double_blocks.\1.txt_attn.\2.lora_"),
    (r"single_blocks\.(\d+)\.processor\.qkv_lora\.", r"single_blocks.\1.qkv.lora_"),
    (r"single_blocks\.(\d+)\.processor\.proj_lora\.", r"single_blocks.\1.linear2.lora_"),
)
# Files that are something else, by a piece of a name ($: at its end) -> what they are.
OTHERS = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".glora_": "GLoRA",
    "_norm.scale": "a control LoRA of FLUX.1's authors, which also adds input channels and replaces norms",
    ".diff$": "changes of whole weights or norms (.diff)",
    ".set_weight": "whole weights (.set_weight)",
}
# Diffusers' own paths as kohya's underscores spell them.
OURS = re.compile(r"(single_transformer_blocks|transformer_blocks)_(\d+)_(.+)")
SUFFIXES = {path.replace(".", "_"): path for paths in (*DOUBLE.values(), *SINGLE.values()) for path in paths}
OUTSIDE = {path.replace(".", "_"): path for path in WHOLE.values()}


@dataclass(frozen=True)
class Update:
    """The update of a module by its name in the file: A (rank, in, ...), alpha, and what has a row for each output:
    "lora_B.weight" (out, rank), "bias" (out,), "magnitude" (out,)."""

    module: str
    a: Tensor
    alpha: Tensor | None
    rows: dict[str, Tensor]

    def tensors(self, path: str, settings: Json | None, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """In the published layout, under a path and, where its matrix is cut, with the rows of that path. settings:
        peft's. ValueError for a variant of LoRA that the settings name and the tensors lack."""
        alpha = peft_alpha(path, settings, self) if self.alpha is None and settings else self.alpha
        rows = dict(self.rows if rows is None else rows)
        if "bias" in rows:  # in peft's layer it is multiplied as B is
            rows["bias"] = rows["bias"] * (1 if alpha is None else float(alpha) / len(self.a))
        if "whole bias" in rows:
            rows["bias"] = rows.pop("whole bias") + rows.get("bias", 0)
        named = {"lora_A.weight": self.a, **rows} | ({} if alpha is None else {"alpha": alpha})
        return {f"transformer.{path}.{name}": tensor for name, tensor in named.items()}


def published(
    tensors: Mapping[str, Tensor], settings: Json | None = None, *, ignore_text: bool = False
) -> dict[str, Tensor]:
    """The tensors of a LoRA file of FLUX.1 in the published layout. settings: peft's configuration, for alpha where
    there is no tensor of it. ignore_text drops the tensors for text encoders, which changes the LoRA. ValueError for a
    name that is not a LoRA's and, unless `ignore_text`, for a text encoder's: they are not adapted here."""
    adapted: dict[str, Tensor] = {}
    for update in updates(tensors, ignore_text=ignore_text):
        cut = {kind: dict(targets(update.module, rows, update.a.shape[1])) for kind, rows in update.rows.items()}
        for path in cut["lora_B.weight"]:
            adapted |= update.tensors(path, settings, {kind: by_path[path] for kind, by_path in cut.items()})
    return adapted


def peft_alpha(path: str, settings: Json, update: Update) -> Tensor | None:
    """Alpha of a path in peft's configuration: of the first `alpha_pattern` that its end matches, else `lora_alpha`.
    rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) divides it by the root of the rank: alpha / sqrt(r) is that of
    alpha sqrt(r) in a plain LoRA."""
    if settings.get("use_dora") and "magnitude" not in update.rows:
        raise ValueError(f"{path}: peft's use_dora is set, and the file has no lora_magnitude_vector. Is it cut off?")
    patterns = settings.get("alpha_pattern") or {}
    matches = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", path))
    alpha = next(matches, settings.get("lora_alpha"))
    root = math.sqrt(len(update.a)) if settings.get("use_rslora") else 1.0
    return None if alpha is None else torch.tensor(float(alpha) * root)


def text_alphas(tensors: Mapping[str, Tensor], settings: Json) -> dict[str, Tensor]:
    """Alpha of each layer of text encoders, which diffusers keeps in the metadata under the name of the encoder."""
    alphas: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, kind = kind_of(name)
        encoder, _, path = module.partition(".")
        own = {n.removeprefix(f"{encoder}."): value for n, value in settings.items() if n.startswith(f"{encoder}.")}
        if kind == "A" and own and f"{module}.alpha" not in tensors:
            alpha = peft_alpha(path, own, Update(module, tensor, None, {}))
            alphas |= {} if alpha is None else {f"{module}.alpha": alpha}
    return alphas


def peft_settings(folder: Path | None, metadata: Mapping[str, str]) -> Json:
    """peft's configuration: `adapter_config.json` in the file's folder, or as diffusers keeps it in the file itself,
    where its names begin with that of the network."""
    if folder is not None and (settings := optional_json(folder / "adapter_config.json")):
        return settings
    settings = parse_json(metadata.get("lora_adapter_metadata", "{}"))
    if not isinstance(settings, dict):
        raise ValueError(f"lora_adapter_metadata holds a {type(settings).__name__}; expected a JSON object.")
    return {re.sub(r"^(transformer|unet)\.", "", name): value for name, value in settings.items()}


def updates(tensors: Mapping[str, Tensor], *, ignore_text: bool = False) -> Iterator[Update]:
    """The updates of a LoRA file. ValueError for a name of another layout, a text encoder's, or a single matrix."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(TEXT):
            if ignore_text:
                continue
            raise ValueError(
                f"{name!r}: this LoRA also adapts a text encoder, which condit leaves as it is. Load it with "
                "ignore_text=True if its other part is to be used alone."
            )
        module, kind = kind_of(name)
        if kind is None and not tensor.any():
            continue  # extracted LoRAs keep differences that are zero
        if kind is None:
            known = next((text for piece, text in OTHERS.items() if piece in f"{name}$"), None)
            raise ValueError(
                f"{name!r} is in no LoRA layout that condit reads (docs/files.md)."
                + (f" It is of {known}." if known else "")
                + " Use a plain LoRA of the same, or merge it into the model with the tool that made it."
            )
        modules.setdefault(module, {})[kind] = tensor
    for module, matrices in modules.items():
        if not {"A", "B"} <= matrices.keys():
            if any(matrices[kind].any() for kind in matrices.keys() - {"alpha"}):
                raise ValueError(f"{module!r} has only its {next(iter(matrices))} matrix. Is the file cut off?")
            continue
        yield assembled(module, matrices)


def kind_of(name: str) -> tuple[str, str | None]:
    """A tensor's module and what of it the tensor is; None if it is no part of a LoRA."""
    for pattern, new in OLD:
        name = re.sub(pattern, new, name)
    for end, kind in ENDS.items():
        if match := re.fullmatch(f"(.+?){end}", name):
            return match[1], kind
    return name, None


def assembled(module: str, matrices: Mapping[str, Tensor]) -> Update:
    """One module's tensors, by what they are. ValueError for a DoRA of columns."""
    alpha, sizes = matrices.get("alpha"), [tuple(matrices[side].shape) for side in "AB"]
    if min(map(len, sizes)) < 2 or (alpha is not None and alpha.numel() != 1):
        raise ValueError(f"{module!r} has matrices of shape {sizes[0]} and {sizes[1]}, and alpha {alpha}; no LoRA has.")
    a, b = matrices["A"], matrices["B"].flatten(1)
    if "mid" in matrices:  # a convolution in three factors, (r, in, 1, 1), (r, r, h, w) and B: the first two are A
        a = torch.einsum("rshw,si->rihw", matrices["mid"].float(), a.float().flatten(1)).to(a)
    if "dora" in matrices and matrices["dora"].shape[0] != len(b):
        raise ValueError(
            f"{module!r}: the dora_scale of its DoRA has shape {tuple(matrices['dora'].shape)}: one of each input, as "
            f"LyCORIS writes them without wd_on_output. Supported is one of each of the {len(b)} outputs."
        )
    each = {"bias": "bias", "whole bias": "whole bias", "magnitude": "magnitude", "dora": "magnitude"}
    rows = {"lora_B.weight": b} | {kind: matrices[name].flatten() for name, kind in each.items() if name in matrices}
    wrong = next((kind for kind, values in rows.items() if len(values) != len(b)), None)
    if wrong is not None:
        raise ValueError(f"{module!r}: {len(rows[wrong])} rows of its {wrong} for {len(b)} of B. Is the file cut off?")
    return Update(module, a, alpha, rows)


def targets(module: str, rows: Tensor, width: int) -> list[tuple[str, Tensor]]:
    """Diffusers' paths of a module, and its rows that belong to each. width: of A, which in blocks is the model's
    wherever a matrix is cut."""
    name = module
    while (prefix := next((p for p in PREFIXES if name.startswith(p)), None)) is not None:
        name = name.removeprefix(prefix)
    if (match := OURS.fullmatch(name)) is not None and match[3] in SUFFIXES:
        return [(f"{match[1]}.{match[2]}.{SUFFIXES[match[3]]}", rows)]
    if name in OUTSIDE:
        return [(OUTSIDE[name], rows)]
    return parts(name, rows, width) or [(name, rows)]
