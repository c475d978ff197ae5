"""What an adapter needs of the pipeline that it is loaded for: `drawing.Pipeline`, or a `Guest` on diffusers' own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from condit.controls.ip_input import References
from condit.controls.ip_projectors import IPParts
from condit.data.files import atomic_write
from condit.data.images import ImageSource
from condit.encoders.image import CLIPImage, TextTower, TinyTextTower
from condit.encoders.text import Text


def within(source: str | Path, *parts: str) -> str | Path:
    """A file in a folder or in a repository of a hub; empty parts are left out."""
    names = [part.strip("/") for part in parts if part]
    return Path(source, *names) if isinstance(source, Path) else "/".join([source, *names])


class AdapterTensors(Protocol):
    """An adapter's file: its tensors, its configuration, its name and the hash of its content."""

    @property
    def tensors(self) -> dict[str, Tensor]: ...
    @property
    def config(self) -> dict: ...
    @property
    def name(self) -> str: ...
    @property
    def hash(self) -> str: ...

    # A and B of each layer of text encoders that a LoRA updates, by the layer's name in the file.
    def text_pairs(self) -> dict[str, tuple[Tensor, Tensor]]: ...

    # All tensors of the file, or these, into all of a module. Raises ValueError where they differ.
    def load_into(
        self, module: nn.Module, tensors: Mapping[str, Tensor] | None = None, *, assign: bool = False
    ) -> None: ...

    # The file as parts of an IP-Adapter, fitted to the pipeline's network.
    def ip_parts(
        self, source: str | Path, pipe: Host, image_encoder: CLIPImage | str | Path | None, where: Any, head_dim: int
    ) -> IPParts: ...


class Saved(Protocol):
    """An adapter: its tensors by published names, and the metadata that `load` reads."""

    def tensors(self) -> dict[str, Tensor]: ...

    def metadata(self) -> dict: ...


def save_adapter(adapter: Saved, path: str | Path) -> Path:
    """Writes an adapter to a .safetensors file, or to `adapter.safetensors` in a folder, whole or not at all. Returns
    the file, which `load` reads."""
    from safetensors.torch import save_file

    file = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / "adapter.safetensors"
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in adapter.tensors().items()}
    metadata = {"condit": json.dumps(adapter.metadata())}
    return atomic_write(file, lambda target: save_file(tensors, target, metadata))


class Host(Protocol):
    """A pipeline as adapters see it."""

    @property
    def name(self) -> str: ...
    # Height and width in pixels at which references are read by default.
    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    # Pixels of a token's side.
    @property
    def pixels(self) -> int: ...

    # Whether `Control.text_lora` acts on its text encoders.
    @property
    def adapts_text(self) -> bool: ...

    # The network, an nn.Module with `sites` and `config`; its type is that of the family.
    @property
    def backbone(self) -> Any: ...

    # The image encoder of a model that has its own, or of a guest; None without one.
    @property
    def image(self) -> Any: ...

    # An adapter by name, file or folder, for the class `method`. Raises ValueError for another class's file.
    def adapter_file(self, source: str | Path, method: str, *, ignore_text: bool = False) -> AdapterTensors: ...

    # References as (n, 3, H, W) in [-1, 1] at `size` (height, width).
    def read_images(
        self, reference: ImageSource | Sequence[ImageSource], annotator: str | None, size: tuple[int, int] | None = None
    ) -> Tensor: ...

    # Images (n, 3, H, W) -> packed tokens (n, N, C) and their grid (rows, columns).
    def encode_condition(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[int, int]]: ...

    # Images (B, 3, H, W) in [-1, 1] -> float32 latents (B, ...) as the network reads them.
    def encode_images(self, images: Tensor, /) -> Tensor: ...

    def encode_text(self, prompts: Sequence[str], /) -> Text: ...
    def image_encoder(self, folder: str | Path) -> CLIPImage: ...
    def text_tower(self, folder: str | Path | None = None) -> TextTower | TinyTextTower | None: ...
    def describe_source(self, reference: References) -> list: ...
