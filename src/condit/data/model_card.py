"""The model card of an adapter, README.md with the header that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from condit.data.files import atomic_write
from condit.data.hub import HubName


def write_card(
    folder: Path, metadata: Mapping[str, object], base: str, *, license: str | None = None, place: str = ""
) -> None:
    """README.md with the header that the hub reads. base: the name of the model that the adapter is for, on a hub with
    its commit; the header has it only if it is a repository."""
    from huggingface_hub import ModelCardData

    method, name = str(metadata["method"]), HubName.of(base)
    header = ModelCardData(
        base_model=name.repo if name is not None and not name.modelscope else None,
        library_name="condit",
        license=license,
        pipeline_tag="text-to-image",
        tags=["condit", method.lower()],
    )
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    text = template.format(
        title=place or folder.name,
        article="An" if method[0] in "AEIOU" else "A",
        method=method,
        base=f" for {base}" if base else "",
        model=base or "BASE MODEL",
        place=place or "FOLDER",
        reference="" if method == "StyleLoRA" else '"reference.png"',
        rows="\n".join(f"| {key} | {json.dumps(value)} |" for key, value in metadata.items() if value is not None),
    )
    card = f"---\n{header.to_yaml()}\n---\n\n{text}"
    atomic_write(folder / "README.md", lambda target: target.write_text(card, encoding="utf-8"))
