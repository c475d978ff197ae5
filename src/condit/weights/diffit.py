"""Files of DiffiT (arXiv:2312.02139): those of nvidia/DiffiT (diffit_256.safetensors, diffit_512.safetensors) and ours.

A release file is the flat state dict of the latent model, 346 tensors. 28 of them are the index buffers
`blocks.i.attn.relative_position_index` (15 MB at 256 px, 235 MB at 512 px), which our model computes instead: reading
compares them, and saving can write them so that the official class loads our files strictly too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from condit.backbones.diffit import PRESETS, DiffiT, DiffiTConfig
from condit.backbones.diffit_image import DiffiTImage, DiffiTImageConfig
from condit.nn.layers import Uninitialised
from condit.weights.files import Json, load_strict, read_tensors, save_tensors
from condit.weights.folders import network_folder, only_weight_file, own_config
from condit.weights.guess import guess

INDEX, TABLE = ".attn.relative_position_index", ".attn.relative_position_bias_table"


def load_diffit(path: str | Path) -> DiffiT:
    """The latent model in a release file, in one of ours, or in a folder with one of them, strictly; the shapes of the
    tensors give its sizes. In evaluation mode, in the file's dtype. ValueError with the missing names and a guess if
    the file is another model's."""
    path = file_of(path)
    return diffit_of(read_tensors(path), source=path, config=own_config(path, "DiffiT", DiffiTConfig))


def file_of(path: str | Path) -> Path:
    """A file itself; of a folder, such as the trainer's export, its only safetensors file or its transformer's."""
    path = Path(path)
    return only_weight_file(network_folder(path) if path.is_dir() else path, "the folder of a DiffiT")


def diffit_of(tensors: Mapping[str, Tensor], *, source: str | Path, config: Json | None = None) -> DiffiT:
    """`load_diffit` for tensors in memory. source: names them in errors. config: fields of `DiffiTConfig`; None or {}:
    by the shapes."""
    c = DiffiTConfig(**config) if config else config_of(tensors)
    with torch.device("meta"), Uninitialised():
        model = DiffiT(c)
    load_strict(model, without_indices(tensors, c, source), source=source, what_is=guess, assign=True)
    return model.eval()


def load_diffit_image(path: str | Path) -> DiffiTImage:
    """The image-space model in a file or folder of ours, strictly, in evaluation mode; there are no official files."""
    path = file_of(path)
    with torch.device("meta"), Uninitialised():
        model = DiffiTImage(DiffiTImageConfig(**own_config(path, "DiffiTImage", DiffiTImageConfig)))
    load_strict(model, read_tensors(path), source=path, what_is=guess, assign=True)
    return model.eval()


def save_diffit(model: DiffiT | DiffiTImage, path: str | Path, *, indices: bool = False) -> Path:
    """Write one safetensors file; the latent model's has the release's names. indices: with the release's index
    buffers, without which the official class refuses a file."""
    tensors = dict(model.state_dict())
    if indices and isinstance(model.config, DiffiTConfig):
        for i in range(model.config.depth):
            # One copy per layer, as released: safetensors stores no tied tensors.
            tensors[f"blocks.{i}{INDEX}"] = relative_position_index(model.config.grid)
    config = {"class": type(model).__name__, **asdict(model.config)}
    return save_tensors(path, tensors, {"condit": config})


def config_of(tensors: Mapping[str, Tensor]) -> DiffiTConfig:
    """The sizes that the shapes of a release file give. The last row of the label table is the null class, as in every
    released network. XL/2 for tensors that give no sizes: `load_strict` then reports the difference to it."""
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
    """The learned tensors. ValueError if an index buffer numbers the offsets in another order than our bias does."""
    expected = relative_position_index(config.grid)
    names = {f"blocks.{i}{INDEX}" for i in range(config.depth)}
    for name in names & tensors.keys():
        if not torch.equal(tensors[name].to(expected.dtype), expected):
            raise ValueError(
                f"{source}: {name} {tuple(tensors[name].shape)} is not the index of a grid of {config.grid} tokens, "
                f"{tuple(expected.shape)}. The bias tables would be read wrongly, so the file is refused."
            )
    # Indices of blocks that the model does not have remain, and load_strict reports them.
    return {name: tensor for name, tensor in tensors.items() if name not in names}
