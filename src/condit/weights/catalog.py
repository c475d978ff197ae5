"""The embedded models and adapters, the folder of downloaded ones, and adapters read from any of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from condit.data.files import hash_file
from condit.data.hub import HubName, why_local
from condit.data.messages import text
from condit.weights import deadiff
from condit.weights.files import Json, check_values, errors_of, load_strict, own_fields, read_metadata, read_tensors
from condit.weights.folders import only_weight_file
from condit.weights.guess import what_is
from condit.weights.hub_files import download_adapter
from condit.weights.lora_files import TEXT, peft_settings, published, text_alphas
from condit.weights.lora_text import text_pairs

if TYPE_CHECKING:
    from condit.controls.control import Where
    from condit.controls.host import Host
    from condit.controls.ip_projectors import IPParts
    from condit.encoders.image import CLIPImage

Kind = Literal["model", "ip-adapter", "omini", "deadiff"]
TINY = Path(__file__).parent.parent / "assets" / "tiny"
UNET = TINY.with_name("tiny-unet")
PIXART = TINY.with_name("tiny-pixart")
CLASSES = TINY.with_name("small-classes")


@dataclass(frozen=True)
class Entry:
    """One row of `condit models`: an embedded model or adapter and its folder."""

    kind: Kind
    summary: str
    licence: str
    path: Path

    @property
    def size_mb(self) -> float:
        """On disk."""
        files = [self.path] if self.path.is_file() else [f for f in self.path.rglob("*") if f.is_file()]
        return round(sum(f.stat().st_size for f in files) / 1e6, 2)


_LICENCE = "Apache-2.0; trained on icons under Apache-2.0, MIT, OFL-1.1 and CC-BY-4.0 (see ATTRIBUTION.md)"
_ROWS = {
    "tiny": Entry("model", "text to icon, 128 px, English and Chinese, MM-DiT", _LICENCE, TINY / "model"),
    "tiny/style": Entry("ip-adapter", "style of a reference, image embedding", _LICENCE, TINY / "style"),
    "tiny/style-tokens": Entry("omini", "style of a reference, tokens", _LICENCE, TINY / "style-tokens"),
    "tiny/subject": Entry("omini", "the concept as another hand drew it", _LICENCE, TINY / "subject"),
    "tiny/edges": Entry("omini", "follow given edges", _LICENCE, TINY / "edges"),
    "tiny/gray": Entry("omini", "colour a gray picture", _LICENCE, TINY / "gray"),
    "tiny-pixart": Entry("model", "text to icon, 128 px, PixArt; barely trained", _LICENCE, PIXART / "model"),
    "small-dit": Entry("model", "icons of a named style, 128 px, DiT", _LICENCE, CLASSES / "dit"),
    "small-diffit": Entry("model", "icons of a named style, 128 px, DiffiT", _LICENCE, CLASSES / "diffit"),
    "small-vit": Entry("model", "classifies the style of an icon, ViT", _LICENCE, CLASSES / "vit"),
    "tiny-unet": Entry(
        "model", "text to icon, 128 px, UNet of SDXL's blocks; barely trained", _LICENCE, UNET / "model"
    ),
    "tiny-unet/style": Entry("ip-adapter", "style of a reference, IP-Adapter of the UNet", _LICENCE, UNET / "style"),
    "tiny-unet/plus": Entry("ip-adapter", "an image as prompt, by the tower's hidden states", _LICENCE, UNET / "plus"),
    "tiny-unet/deadiff": Entry("deadiff", "style or content of a reference", _LICENCE, UNET / "deadiff"),
}
# A checkout may hold fewer models than the table: only those that exist.
MODELS: dict[str, Entry] = {name: entry for name, entry in _ROWS.items() if entry.path.exists()}


def models_folder() -> Path:
    """Where published files are expected: $CONDIT_HOME/models, else ~/.cache/condit/models. Nothing is downloaded."""
    home = os.environ.get("CONDIT_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "condit") / "models"


def describe_hash(folder: Path) -> str:
    """One short hash over the weight files of a model's folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return hashlib.sha256("".join(hash_file(file) for file in files).encode()).hexdigest()[:16]


# Adapters


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's file: its tensors, the configuration in its metadata, and the class that its tensors look like."""

    tensors: dict[str, Tensor]
    config: Json
    name: str
    hash: str
    guess: str
    text_tensors: Mapping[str, Tensor] = field(default_factory=dict)  # a LoRA's for text encoders, as the file has them

    def text_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each layer of text encoders that a LoRA updates; see `lora_text.text_pairs`."""
        return text_pairs(self.text_tensors)

    def load_into(
        self, module: nn.Module, tensors: Mapping[str, Tensor] | None = None, *, assign: bool = False
    ) -> None:
        """All tensors of the file, or those given, into all of a module; ValueError with a readable difference. assign:
        the module takes the tensors themselves."""
        load_strict(module, self.tensors if tensors is None else tensors, source=self.name, assign=assign)

    def ip_parts(
        self, source: object, pipe: Host, image_encoder: CLIPImage | str | Path | None, where: Where, head_dim: int
    ) -> IPParts:
        """Those of an IP-Adapter, fitted to a pipeline's model; for the arguments see `IPAdapter.load`."""
        from condit.weights.ip_load import ip_parts  # not for `condit models`

        if self.name in MODELS:
            source = MODELS[self.name].path
        elif HubName.of(source):
            source = self.name  # the same commit
        with errors_of(source):
            return ip_parts(self.tensors, self.config, source, pipe, image_encoder, where, head_dim)


# layout(tensors, peft's settings): a LoRA's tensors under the names of its backbone.
Layout = Callable[[Mapping[str, Tensor], Json], dict[str, Tensor]]
READERS = {"OminiControl": "condit.OminiControl or condit.StyleLoRA"}  # a LoRA's tensors fit both


def read_adapter(source: str | Path, method: str, layout: Layout = published) -> AdapterFile:
    """An adapter by catalog name, file, folder or name on a hub, for the class `method`. ValueError where there is
    none, or where its tensors are another class's."""
    path, name = locate_adapter(source)
    file = adapter_weights(path)
    tensors, metadata = read_tensors(file), read_metadata(file)
    if not tensors:
        raise ValueError(f"{source} holds no tensors. Is it cut off? Download it again.")
    # Numbers of positions and kohya's alpha may be integers.
    integers = (".alpha", "position_ids")
    check_values({n: t for n, t in tensors.items() if t.is_floating_point() or not n.endswith(integers)}, source)
    kind = what_is(tensors)
    if kind == "DEADiff":
        tensors = deadiff.adapter_tensors(tensors, source)
    encoders = {name: tensor for name, tensor in tensors.items() if name.startswith(TEXT)}
    if kind == "OminiControl":
        with errors_of(source):
            settings = peft_settings(path if path.is_dir() else None, metadata)
            encoders |= text_alphas(encoders, settings)
            tensors = layout(tensors, settings)
    if kind not in (method, "unknown"):
        reader, wanted = (READERS.get(name, f"condit.{name}") for name in (kind, method))
        first = repr(next(iter(tensors)))
        raise ValueError(text("other-class", source=source, reader=reader, wanted=wanted, first=first))
    return AdapterFile(tensors, own_fields(metadata), name, hash_file(file), kind, encoders)


def locate_adapter(source: str | Path) -> tuple[Path, str]:
    """The file or folder of an adapter by catalog name, path or name on a hub, and its name, on a hub with the commit.
    ValueError where there is none; for a hub's errors see `data.hub`."""
    name = str(source)
    if name in MODELS:
        return MODELS[name].path, name
    if Path(source).exists():
        return Path(source), name
    if name.split("/")[0] not in MODELS and (asked := HubName.of(source)) is not None:
        path, hub = download_adapter(asked)
        return path, str(hub)
    embedded = ", ".join(n for n in MODELS if "/" in n) or "none"
    raise ValueError(text("no-adapter", name=repr(name), embedded=embedded, note=why_local(source)))


def adapter_weights(path: Path) -> Path:
    """An adapter's file, or the one in its folder. ValueError for a folder with none or several."""
    return only_weight_file(path, "an adapter folder")
