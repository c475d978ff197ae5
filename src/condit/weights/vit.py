"""ViT weights: the authors' .npz (both numberings), timm's and transformers' layouts, read and written strictly.

The tensors give a file's layout and the sizes of its model. Only .npz files give the number of heads; elsewhere it
comes from config.json, from the published widths, or from the caller."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from condit.backbones.vit import FLAVOURS, PRESETS, Flavour, ViT, ViTConfig, resize_positions
from condit.weights.files import (
    atomic_write,
    load_strict,
    own_fields,
    read_metadata,
    read_tensors,
    save_folder,
    save_tensors,
)
from condit.weights.folders import read_json, tuples, weight_files
from condit.weights.guess import guess
from condit.weights.pickles import arrays_in, check_archive
from condit.weights.vit_layouts import (
    JAX,
    Layout,
    State,
    depth_of,
    find_layout,
    names_in_layout,
    required,
    to_layout,
    to_native,
)

_HEADS = {config.dim: config.heads for config in PRESETS.values()}
_ACTIVATIONS = {"gelu": "exact", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "quick_gelu": "quick"}


def what_is(tensors: Mapping[str, Tensor]) -> str | None:
    """A guess in words at the model with these tensors, for error messages; None without one."""
    model, layout = guess(tensors), find_layout(tensors)
    if layout is None or (model is not None and not model.startswith("a ViT;")):
        return model
    return f"a ViT in the layout {layout!r}, but incomplete or with other parts"


@dataclass(frozen=True)
class Hints:
    """What the tensors do not give: from a file's metadata, its config.json or the caller."""

    heads: int | None = None
    image_size: int | tuple[int, int] | None = None  # a table that is not square
    classifier: Literal["token", "gap", "unpooled"] | None = None
    flavour: Flavour | None = None


def load_vit(source: str | Path, *, heads: int | None = None) -> ViT:
    """The model in a file or folder, in evaluation mode; see `read_vit`."""
    config, state = read_vit(source, heads=heads)
    with torch.device("meta"):
        model = ViT(config)
    load_strict(model, state, source=source, assign=True)
    return model.eval()


def read_vit(
    source: str | Path, *, heads: int | None = None, device: Literal["cpu", "meta"] = "cpu"
) -> tuple[ViTConfig, State]:
    """Configuration and `ViT` state of a file (.npz, safetensors or PyTorch) or of a folder with one, in any layout.
    Dropout is 0. device "meta": without data. ValueError with missing and unexpected names unless all tensors fit."""
    tensors, hints = read_any(Path(source), device)
    layout = find_layout(tensors)
    if layout is None:
        raise ValueError(
            _refusal(source, tensors, "is no ViT in the layout of its authors, of timm or of transformers")
        )
    if layout.startswith("transformers"):
        tensors = {name.removeprefix("vit."): x for name, x in tensors.items()}
    state, rest = to_native(tensors, layout)
    if layout.startswith("transformers") and "head.weight" in state:
        # Its classifier reads the class token past a pooler; ours would read the pooler.
        rest |= {name: tensors[name] for name in tensors if name.startswith("pooler.")}
        state = {name: x for name, x in state.items() if not name.startswith("pre_logits.")}
    needed = (name for native in required(state) for name in names_in_layout(native, layout))
    missing = [name for name in needed if name not in tensors]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        reason = f"misses {len(missing)} tensors of the layout {layout!r} (first: {shown})"
        raise ValueError(_refusal(source, tensors, reason))
    heads = _heads_of(tensors, layout) or heads or hints.heads
    config = _infer(state, replace(hints, heads=heads), layout, source)
    with torch.device("meta"):
        model = ViT(config)
    load_strict(model, state | rest, source=source, what_is=what_is, assign=True)
    return config, state


def save_vit(path: str | Path, config: ViTConfig, state: Mapping[str, Tensor], *, layout: Layout) -> Path:
    """Write a `ViT` state: "npz" (numbering of the released archives) and "linen" as .npz, "timm" as safetensors,
    "transformers" as a folder with config.json. ValueError where a layout cannot describe what the model computes; only
    "timm" keeps the rule by which positions are resized."""
    _check_layout(config, layout)
    with torch.device("meta"):
        model = ViT(config)
    load_strict(model, state, source="The state to save", assign=True)
    tensors = to_layout(state, layout, config.heads)
    path = Path(path)
    if layout in JAX:
        # numpy has no bf16.
        arrays = {name: (x.float() if x.dtype is torch.bfloat16 else x).cpu().numpy() for name, x in tensors.items()}
        return atomic_write(path, lambda target: _write_npz(target, arrays))
    if layout == "timm":
        hints = Hints(config.heads, config.image_size, config.classifier, config.flavour)
        return save_tensors(path, tensors, {"condit": asdict(hints)})  # in a key that timm does not read
    with save_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(_transformers_config(config), indent=2), encoding="utf-8")
        prefix = "vit." if config.classes else ""
        named = {name if name.startswith("classifier.") else prefix + name: x for name, x in tensors.items()}
        save_tensors(folder / "model.safetensors", named, {"format": "pt"})
    return path


def for_finetuning(
    config: ViTConfig, state: Mapping[str, Tensor], *, classes: int, image_size: int | tuple[int, int] | None = None
) -> tuple[ViTConfig, State]:
    """Configuration and state for fine-tuning (section 3.2): one linear layer of zeros replaces both layers of the
    pre-training head, and the position table is resized to `image_size` (None: it stays)."""
    size = config.image_size if image_size is None else image_size
    new = replace(config, classes=classes, representation_size=None, image_size=size)
    kept = {name: x for name, x in state.items() if not name.startswith(("pre_logits.", "head."))}
    kept["pos_embed"] = resize_positions(state["pos_embed"], config.grid, new.grid, config.flavour.resize)
    if classes:
        kept["head.weight"] = state["pos_embed"].new_zeros(classes, config.dim)
        kept["head.bias"] = state["pos_embed"].new_zeros(classes)
    return new, kept


# Reading


def read_any(source: Path, device: Literal["cpu", "meta"]) -> tuple[State, Hints]:
    """The tensors or arrays of a file or folder of any layout, and what it says of them."""
    if source.is_dir():
        tensors: State = {}
        hints = Hints()
        for file in weight_files(source, ("safetensors", "bin", "npz")):
            more, hints = read_any(file, device)
            tensors |= more
        config = source / "config.json"
        return tensors, (_transformers_hints(config) if config.is_file() else None) or hints
    if not source.is_file():
        raise FileNotFoundError(f"no weight file at {source}")
    if arrays_in(source):
        return _read_npz(source, device), Hints()
    return read_tensors(source, device), _own_hints(read_metadata(source))


def _own_hints(metadata: Mapping[str, str]) -> Hints:
    """What `save_vit` wrote into the metadata of a file with timm's names."""
    fields = tuples(own_fields(metadata))
    if "flavour" not in fields:
        return Hints()
    return Hints(fields["heads"], fields["image_size"], fields["classifier"], Flavour(**fields["flavour"]))


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """As np.savez does, which would take an array named `file` or `allow_pickle` for its own argument."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _read_npz(source: Path, device: str) -> State:
    check_archive(source)
    try:
        with np.load(source, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]).to(device) for name in archive.files}
    except Exception as error:  # zip files and arrays can be broken in many ways
        if "pickle" in str(error):
            raise ValueError(f"{source} holds Python objects, and reading them could run code: refused.") from error
        raise ValueError(f"{source} is broken or holds no plain numbers: {error}. Download it again.") from error


def _transformers_hints(file: Path) -> Hints | None:
    """What a folder's config.json gives beyond its tensors; None if it is not transformers'. ValueError for a network
    that is not a ViT."""
    fields = tuples(read_json(file))
    kind = fields.get("model_type")
    if kind is None:
        return None
    if kind != "vit":
        raise ValueError(f"{file} describes a {kind!r}; expected a 'vit'.")
    act = fields.get("hidden_act", "gelu")
    if act not in _ACTIVATIONS:
        raise ValueError(f"{file} has hidden_act {act!r}; supported are {', '.join(_ACTIVATIONS)}.")
    flavour = replace(FLAVOURS["transformers"], gelu=_ACTIVATIONS[act], eps=fields.get("layer_norm_eps", 1e-12))
    return Hints(fields.get("num_attention_heads", 12), fields.get("image_size", 224), None, flavour)


def _refusal(source: str | Path, tensors: Mapping[str, Tensor], reason: str) -> str:
    model = what_is(tensors)
    looks = f". It looks like {model}" if model else ""
    return f"{source} {reason}; {len(tensors)} tensors found: {', '.join(list(tensors)[:3])}, ...{looks}"


# Configuration


def _heads_of(tensors: Mapping[str, Tensor], layout: str) -> int | None:
    """Only the authors' arrays give it: the query bias is (heads, head dim)."""
    bias = tensors[names_in_layout("blocks.0.attn.qkv.bias", layout)[0]] if layout in JAX else None
    return bias.shape[0] if bias is not None and bias.ndim == 2 else None


def _infer(state: State, hints: Hints, layout: str, source: str | Path) -> ViTConfig:
    positions, kernel = state["pos_embed"], state["patch_embed.proj.weight"]
    if positions.ndim != 3 or kernel.ndim != 4:
        raise ValueError(
            f"{source}: the position table has shape {tuple(positions.shape)} and the patch embedding "
            f"{tuple(kernel.shape)}; expected three and four dimensions."
        )
    dim, has_cls, fc_norm = positions.shape[-1], "cls_token" in state, "fc_norm.weight" in state
    heads = hints.heads or _HEADS.get(dim)
    if heads is None:
        raise ValueError(
            f"{source} does not give its number of heads, and no published ViT has width {dim}. Give heads=."
        )
    rows, patch = positions.shape[1] - has_cls, kernel.shape[-1]
    size = hints.image_size or math.isqrt(rows) * patch
    config = ViTConfig(
        patch_size=patch,
        image_size=size,
        dim=dim,
        depth=depth_of(state),
        heads=heads,
        mlp_dim=state["blocks.0.mlp.fc1.bias"].numel(),
        classes=state["head.bias"].numel() if "head.bias" in state else 0,
        representation_size=state["pre_logits.fc.bias"].numel() if "pre_logits.fc.bias" in state else None,
        classifier=hints.classifier or ("gap" if fc_norm or not has_cls else "token"),
        class_token=has_cls,
        fc_norm=fc_norm,
        in_channels=kernel.shape[1],
        flavour=hints.flavour or FLAVOURS["jax" if layout in JAX else layout.removesuffix("5")],
    )
    if math.prod(config.grid) != rows:
        raise ValueError(
            f"{source} has positions for {rows} patches; an image of {size} pixels in patches of {patch} has a grid of "
            f"{config.grid}. If the table is not square, put image_size as [height, width] into config.json."
        )
    return config


def _check_layout(config: ViTConfig, layout: Layout) -> None:
    """ValueError for a model that a reader of the layout would compute differently."""
    f, jax = config.flavour, FLAVOURS["jax"]
    if layout == "timm":
        return
    if layout in JAX and (f.gelu, f.eps) != (jax.gelu, jax.eps):
        raise ValueError(
            f"An .npz has no place for gelu {f.gelu!r} and eps {f.eps}: its readers take {jax.gelu!r} and {jax.eps}. "
            "If you accept that, pass replace(config, flavour=FLAVOURS['jax'])."
        )
    usual = "token" if config.class_token else "gap"
    if config.fc_norm or (config.classifier != usual and (config.classifier != "unpooled" or config.classes)):
        raise ValueError(
            f"The layout {layout!r} cannot describe classifier {config.classifier!r} with "
            f"class_token={config.class_token}, fc_norm={config.fc_norm}. Use 'timm', where condit notes them."
        )
    if layout == "transformers" and not config.class_token:
        raise ValueError("transformers' ViT has a class token; this model has none. Use the layout 'timm'.")
    if layout == "transformers" and config.classes and config.representation_size is not None:
        raise ValueError("transformers' ViT has a pooler or a classifier, not both. Use 'timm', or drop one of them.")


def _transformers_config(config: ViTConfig) -> dict[str, object]:
    act = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.flavour.gelu)
    size = config.image_size
    fields: dict[str, object] = {
        "architectures": ["ViTForImageClassification" if config.classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "image_size": size if isinstance(size, int) else list(size),
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "hidden_act": act,
        "layer_norm_eps": config.flavour.eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": True,
    }
    if config.classes:
        fields["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.classes)}
        fields["label2id"] = {f"LABEL_{i}": i for i in range(config.classes)}
    if config.representation_size is not None:
        fields |= {"pooler_output_size": config.representation_size, "pooler_act": "tanh"}
    return fields
