"""The files of a trained adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from torch import Tensor

from condit.weights.files import save_tensors

ADAPTER = "adapter.safetensors"


class Exportable(Protocol):
    """An adapter: its tensors by published names, and the metadata that `load` reads."""

    def tensors(self) -> dict[str, Tensor]: ...

    def metadata(self) -> dict: ...


def export_adapter(adapter: Exportable, folder: Path, card: dict, **more: str) -> None:
    """Writes the weights in fp16 with their metadata, and the card."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half().contiguous() for k, v in adapter.tensors().items()}
    metadata = {**adapter.metadata(), **more}
    save_tensors(folder / ADAPTER, tensors, {"condit": json.dumps(metadata)})
    (folder / "card.json").write_text(json.dumps({**card, **metadata}, indent=1) + "\n")
