"""The files of a trained adapter."""

from __future__ import annotations

import json
from pathlib import Path

from condit.controls.host import Saved
from condit.controls.publish import base_of
from condit.data.model_card import write_card
from condit.weights.files import save_tensors

ADAPTER = "adapter.safetensors"


def export_adapter(adapter: Saved, folder: Path, card: dict, *, model: str = "", **more: str) -> None:
    """Writes the weights in fp16 with their metadata, card.json, and the model card README.md, which names the
    base `model` ("": that of the adapter's pipeline)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half().contiguous() for k, v in adapter.tensors().items()}
    metadata = {**adapter.metadata(), **more}
    save_tensors(folder / ADAPTER, tensors, {"condit": json.dumps(metadata)})
    (folder / "card.json").write_text(json.dumps({**card, **metadata}, indent=1) + "\n")
    write_card(folder, {**metadata, **card}, model or base_of(adapter))
