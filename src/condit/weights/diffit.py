"""Files of DiffiT (arXiv:2312.02139): those of nvidia/DiffiT (diffit_256.safetensors, diffit_512.safetensors) and ours.

A release file is the flat state dict of the latent model, 346 tensors. 28 of them are the index buffers
`blocks.i.attn.relative_position_index` (15 MB at 256 px, 235 MB at 512 px), which our model does without: they are
compared on reading and may be written on saving, so that the official class loads our files strictly too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condit.backbones.diffit import PRESETS, DiffiT, DiffiTConfig
from condit.backbones.diffit_image import DiffiTImage, DiffiTImageConfig
from condit.weights.catalog import what_is
from condit.weights.files import load_strict, own_fields, read_metadata, read_tensors, save_tensors

INDEX, TABLE = ".attn.relative_position_index", ".attn.relative_position_bias_table"


def load_diffit(path: str | Path) -> DiffiT:
    """The latent model of a release file or of one of ours, or of the folder with one, strictly; sizes are read off the
    tensors.

    ValueError with the missing names and a guess if the file is another model's. In evaluation mode, the file's dtype.
    """
    path = file_of(path)
    return diffit_of(read_tensors(path), source=path, own=own_config(path, "DiffiT"))


def file_of(path: str | Path) -> Path:
    """A file as it is; of a folder, such as the trainer's export, its only safetensors file or its transformer's."""
    path = Path(path)
    if not path.is_dir():
        return path
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(f"{folder} holds {len(found)} safetensors files; the folder of a DiffiT holds one.")
    return found[0]


def diffit_of(tensors: Mapping[str, Tensor], *, source: str | Path, own: Mapping[str, Any] | None = None) -> DiffiT:
    """`load_diffit` for tensors that are read already; `source` names them in errors, `own` are a config's fields."""
    config = DiffiTConfig(**own) if own else config_of(tensors)
    with torch.device("meta"):
        model = DiffiT(config)
    load_strict(model, without_indices(tensors, config, source), source=source, what_is=guess, assign=True)
    return model.eval()


def load_diffit_image(path: str | Path) -> DiffiTImage:
    """The image-space model of a file or folder of ours, strictly, in evaluation mode; there are no official files."""
    path = file_of(path)
    with torch.device("meta"):
        model = DiffiTImage(DiffiTImageConfig(**own_config(path, "DiffiTImage")))
    load_strict(model, read_tensors(path), source=path, what_is=guess, assign=True)
    return model.eval()


def save_diffit(model: DiffiT | DiffiTImage, path: str | Path, *, indices: bool = False) -> Path:
    """One safetensors file; of the latent model under the release's names. `indices` adds the release's index buffers,
    without which the official class refuses a file; ours needs none."""
    tensors = dict(model.state_dict())
    if indices and isinstance(model.config, DiffiTConfig):
        for i in range(model.config.depth):
            # A copy a layer, as released: safetensors stores no tied tensors.
            tensors[f"blocks.{i}{INDEX}"] = relative_position_index(model.config.grid)
    config = {"class": type(model).__name__, **asdict(model.config)}
    return save_tensors(path, tensors, {"condit": config})


def own_config(path: str | Path, name: str) -> dict[str, Any]:
    """The config that `save_diffit` wrote for a model of this class name; {} if the file holds none."""
    config = own_fields(read_metadata(path))
    if config.get("class") != name:
        return {}
    known = (DiffiTConfig if name == "DiffiT" else DiffiTImageConfig).__dataclass_fields__
    unknown = sorted(config.keys() - known.keys() - {"class"})
    if unknown:
        raise ValueError(f"{path}: its config has {unknown[0]!r}, which {name} does not. Written by a later version?")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}


def config_of(tensors: Mapping[str, Tensor]) -> DiffiTConfig:
    """Sizes of a release file, read off its tensors. The last row of the label table counts as the null class, as in
    every released network. Where the tensors tell nothing, XL/2, so that the difference to it can be told."""
    try:
        dim, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        out = tensors["final_layer.linear.weight"].shape[0]
        labels = tensors.get("y_embedder.embedding_table.weight")
        return DiffiTConfig(
            input_size=math.isqrt(tensors["pos_embed"].shape[1]) * patch,
            patch_size=patch,
            in_channels=channels,
            hidden_size=dim,
            depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
            num_heads=tensors[f"blocks.0{TABLE}"].shape[1],
            mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / dim,
            num_classes=0 if labels is None else labels.shape[0] - 1,
            learn_sigma=out == 2 * channels * patch**2,
        )
    except (KeyError, IndexError, ValueError):
        return PRESETS["DiffiT-XL/2"]


def relative_position_index(grid: tuple[int, int]) -> Tensor:
    """The release's index buffer (T, T) int64 of a token grid: which row of the bias table belongs to (query, key)."""
    rows, columns = grid
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    offset_row, offset_column = row[:, None] - row + rows - 1, column[:, None] - column + columns - 1
    return offset_row * (2 * columns - 1) + offset_column


def without_indices(tensors: Mapping[str, Tensor], config: DiffiTConfig, source: str | Path) -> dict[str, Tensor]:
    """The learned tensors; ValueError if an index buffer numbers the offsets otherwise than our bias does."""
    expected = relative_position_index(config.grid)
    names = {f"blocks.{i}{INDEX}" for i in range(config.depth)}
    for name in names & tensors.keys():
        if not torch.equal(tensors[name].to(expected.dtype), expected):
            raise ValueError(
                f"{source}: {name} {tuple(tensors[name].shape)} is not the index of a grid of {config.grid} tokens, "
                f"{tuple(expected.shape)}. The bias tables would be read wrongly, so the file is refused."
            )
    # Indices of blocks that the model does not have stay among the tensors, and load_strict tells them.
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def guess(tensors: Mapping[str, Tensor]) -> str | None:
    """What a file is that did not load, told from its tensors; None if nothing is recognised."""
    signs = {
        ".block.attn.qkv_temb.": "an image-space DiffiT; load it with load_diffit_image",
        ".attn.qkv_temb.": "a latent DiffiT; load it with load_diffit",
        ".adaLN_modulation.": "a DiT (its blocks are conditioned by adaLN), not a DiffiT",
        "transformer_blocks.": "a transformer in diffusers' layout; DiffiT has none there",
        "cls_token": "a ViT",
        "mlp.w12.": "a rewrite of DiffiT with SwiGLU: another model under the same name",
    }
    for sign, what in signs.items():
        if any(sign in name for name in tensors):
            return what
    adapter = what_is(tensors)
    return None if adapter == "unknown" else f"a file for condit.{adapter}"
