"""An adapter as a folder with a model card, and that folder as a repository on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from condit.controls.host import Saved, save_adapter
from condit.data.hub import push_folder
from condit.data.model_card import write_card


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
    return str(getattr(adapter, "base", "")) if pipe is None else pipe.name
