"""An adapter as a folder with a model card, and that folder as a repository on the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from condit.controls.host import Saved, save_adapter
from condit.data.files import atomic_write
from condit.data.hub import HubName, push_folder


def save_pretrained(adapter: Saved, folder: str | Path, *, license: str | None = None, place: str = "") -> Path:
    """Writes adapter.safetensors, in the adapter's own precision, and the model card README.md; `load(folder, pipe)`
    reads them. license: as the hub names it ("apache-2.0"); place: the repository that the card names."""
    file = save_adapter(adapter, folder)
    write_card(file.parent, adapter.metadata(), base_of(adapter), license=license, place=place)
    return file.parent


def push_to_hub(
    adapter: Saved,
    repo: str,
    *,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload an adapter",
) -> str:
    """Writes `save_pretrained`'s folder into a repository ("owner/name"), which is made if there is none, and returns
    the address of the commit. token: None for HF_TOKEN, or that of `hf auth login`. PermissionError without write
    access."""
    with TemporaryDirectory() as folder:
        save_pretrained(adapter, folder, license=license, place=repo)
        return push_folder(Path(folder), repo, private=private, token=token, message=message)


def base_of(adapter: object) -> str:
    """The name of the pipeline that an adapter was loaded or made for; "" without one."""
    pipe = getattr(adapter, "_pipe", [None])[0]
    return "" if pipe is None else pipe.name


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
        rows="\n".join(f"| {key} | {json.dumps(value)} |" for key, value in metadata.items() if value is not None),
    )
    card = f"---\n{header.to_yaml()}\n---\n\n{text}"
    atomic_write(folder / "README.md", lambda target: target.write_text(card, encoding="utf-8"))
