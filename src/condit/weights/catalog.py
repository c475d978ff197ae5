"""What there is: the embedded models and adapters, and the published ones that the same calls load from a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from condit.weights import deadiff
from condit.weights.files import hash_file, load_strict, own_fields, read_metadata, read_tensors
from condit.weights.lora_files import peft_settings, published

if TYPE_CHECKING:
    from condit.controls.control import Where
    from condit.controls.ip_adapter import IPParts

Kind = Literal["model", "ip-adapter", "omini", "deadiff"]
TINY = Path(__file__).parent.parent / "assets" / "tiny"
UNET = TINY.with_name("tiny-unet")
PIXART = TINY.with_name("tiny-pixart")
CLASSES = TINY.with_name("small-classes")


@dataclass(frozen=True)
class Entry:
    """One row of `condit models`. `path` is where an embedded one lies; size in MB on disk."""

    kind: Kind
    summary: str
    licence: str
    path: Path

    @property
    def size_mb(self) -> float:
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
    "small-vit": Entry("model", "tells the style of an icon, ViT", _LICENCE, CLASSES / "vit"),
    "tiny-unet": Entry(
        "model", "text to icon, 128 px, UNet of SDXL's blocks; barely trained", _LICENCE, UNET / "model"
    ),
    "tiny-unet/style": Entry("ip-adapter", "style of a reference, IP-Adapter of the UNet", _LICENCE, UNET / "style"),
    "tiny-unet/plus": Entry("ip-adapter", "a picture as prompt, by the tower's states", _LICENCE, UNET / "plus"),
    "tiny-unet/deadiff": Entry("deadiff", "style or content of a reference", _LICENCE, UNET / "deadiff"),
}
# Only what is really here: a checkout may hold fewer models than this table.
MODELS: dict[str, Entry] = {name: entry for name, entry in _ROWS.items() if entry.path.exists()}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read: its tensors, what its file says of it, and what the tensors look like."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    name: str
    hash: str
    guess: str

    def load_into(
        self, module: nn.Module, tensors: Mapping[str, Tensor] | None = None, *, assign: bool = False
    ) -> None:
        """All tensors of the file, or those given, into all of a module; ValueError with a readable difference. assign:
        the module takes the tensors themselves."""
        load_strict(module, self.tensors if tensors is None else tensors, source=self.name, assign=assign)

    def ip_parts(self, source: object, pipe: Any, image_encoder: Any, where: Where, head_dim: int) -> IPParts:
        """Those of an IP-Adapter, fitted to a pipeline's model; for the arguments see `IPAdapter.load`."""
        from condit.weights.ip_load import ip_parts  # not for `condit models`

        return ip_parts(self.tensors, self.config, source, pipe, image_encoder, where, head_dim)


# layout(tensors, peft's settings): a LoRA's tensors under the names of the backbone that it is for.
Layout = Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]


READERS = {"OminiControl": "condit.OminiControl or condit.StyleLoRA"}  # a LoRA does not tell which


def read_adapter(source: str | Path, method: str, layout: Layout = published) -> AdapterFile:
    """An adapter by catalog name, file or folder. Told by its tensors; another method's file is refused."""
    name = str(source)
    path = MODELS[name].path if name in MODELS else Path(source)
    if not path.exists():
        near = ", ".join(n for n in MODELS if "/" in n) or "none"
        raise ValueError(
            f"No adapter {name!r}: neither a file nor one of the embedded ones ({near}). Hub names are not resolved: "
            "download the file and give its path."
        )
    file = adapter_weights(path) if path.is_dir() else path
    tensors, metadata = read_tensors(file), read_metadata(file)
    config = own_fields(metadata)
    guess = what_is(tensors)
    if guess == "DEADiff":
        tensors = deadiff.adapter_tensors(tensors, source)
    if guess == "OminiControl":
        tensors = layout(tensors, peft_settings(path if path.is_dir() else None, metadata))
    if guess not in (method, "unknown"):
        found, wanted = (READERS.get(kind, f"condit.{kind}") for kind in (guess, method))
        raise ValueError(f"{source} is for {found}, not {wanted}: first tensor {next(iter(tensors))!r}.")
    return AdapterFile(tensors, config, name, hash_file(file), guess)


def adapter_weights(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(f"{folder} holds {len(found)} safetensors files; an adapter folder holds one.")
    return found[0]


def what_is(tensors: Mapping[str, Tensor]) -> str:
    """The class that reads these tensors: "DEADiff", "IPAdapter", "OminiControl" or "unknown"."""
    if deadiff.is_published(tensors) or any(n.startswith(("style.qformer.", "content.qformer.")) for n in tensors):
        return "DEADiff"
    if any(".lora_A." in n or ".lora_down." in n or ".lora.down." in n for n in tensors):
        return "OminiControl"
    spelt = ("image_proj.", "image_proj_model.", "ip_adapter_proj_model.", "adapter_modules.")
    if any(n.startswith(spelt) or ".to_k_ip." in n for n in tensors):
        return "IPAdapter"
    return "unknown"


def describe_hash(folder: Path) -> str:
    """One short hash over the weight files of a model folder."""
    import hashlib

    files = sorted(folder.rglob("*.safetensors"))
    return hashlib.sha256("".join(hash_file(f) for f in files).encode()).hexdigest()[:16]
