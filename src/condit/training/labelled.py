"""Images with classes: the icon world by style, concept or group, or a folder with one subfolder for each class."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from condit.data.files import hash_fraction
from condit.data.images import load_image, to_tensor
from condit.drawing.references import MAX_SIDE
from condit.training.plugins import icon_world
from condit.weights.folders import MAX_LAYERS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)

C = TypeVar("C", bound="DataclassInstance")
M = TypeVar("M", bound=nn.Module)
Label = Literal["style", "base", "group"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_WIDTH = 65_536
HELD_OUT_SHARE = 0.1  # of a folder


@dataclass(frozen=True)
class Images:
    """`read(indices)` returns (B, 3, H, W) in [-1, 1]. labels: class numbers. key: a hash of the data."""

    names: list[str]
    labels: list[int]
    read: Callable[[Sequence[int]], Tensor]
    key: str

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Labelled:
    """classes: the names of the labels 0, 1, ...; empty for images without labels. `held_out` may be empty."""

    classes: list[str]
    train: Images
    held_out: Images


def open_labelled(
    icons: str | None, folder: str | None, *, label: Label, size: tuple[int, int], held_out: str
) -> Labelled:
    """The images of one source. `label` and `held_out` (a split) apply to icons; folders have their own classes."""
    if (icons is None) == (folder is None):
        raise ValueError(
            f"Images come from `icons` (an icon world) or from `folder` (one subfolder for each class); found icons = "
            f"{icons!r} and folder = {folder!r}. Set one of the two under [data]."
        )
    if icons is not None:
        return icon_world().labelled(icons, label, size, held_out=held_out)
    return from_folder(str(folder), size)


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """A recipe's `size`, a side or [height, width], in pixels."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in sides):
        raise ValueError(f"size is a side or [height, width] in pixels, at most {MAX_SIDE}; found {size!r}.")
    return sides[0], sides[1]


Size = Annotated[int | Sequence[int], AfterValidator(height_width)]


def with_sizes(config: C, sizes: Mapping[str, object]) -> C:
    """A network's configuration with a recipe's `sizes` replaced. Raises ValueError for an unknown name or another type
    of value."""
    known = {field.name: getattr(config, field.name) for field in fields(config)}
    for name, value in sizes.items():
        if name not in known:
            raise ValueError(f"sizes.{name} is not a field of {type(config).__name__}; expected {', '.join(known)}.")
        default = known[name]
        types = (int, float) if isinstance(default, float) else (type(default),)
        if default is not None and type(value) not in types:
            raise ValueError(f"sizes.{name} must have the type of {default!r}; found {value!r}.")
        limit = MAX_LAYERS if name in ("depth", "blocks") else MAX_WIDTH
        if any(not 0 <= n <= limit for n in (value if isinstance(value, list | tuple) else [value]) if type(n) is int):
            raise ValueError(f"sizes.{name} holds numbers from 0 to {limit}; found {value!r}.")
    return replace(config, **sizes)


def build(make: Callable[[C], M], config: C) -> M:
    """The network of a configuration. Raises ValueError, before anything is allocated, for one whose training this
    machine's memory cannot hold."""
    with torch.device("meta"):
        count = sum(p.numel() for p in make(config).parameters())
    # On a GPU the CPU holds the weights alone, else gradients, two moments and averaged weights too.
    need, here = 4 * count * (1 if torch.cuda.is_available() else 5), machine_memory()
    if need > here:
        raise ValueError(
            f"{make.__name__} of these sizes has {count / 1e6:,.0f} million weights, and training it takes "
            f"{need / 1e9:,.1f} GB; this machine has {here / 1e9:.1f} GB. Give smaller `sizes` under [data]."
        )
    return make(config)


def machine_memory() -> float:
    """Bytes; infinity where the system does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def id2label(classes: Sequence[str]) -> dict[str, str]:
    """Class names as transformers and diffusers write them into config.json."""
    return {str(i): name for i, name in enumerate(classes)}


def from_folder(folder: str | Path, size: tuple[int, int]) -> Labelled:
    """A folder with one subfolder for each class, or with images only, which then have no classes. The hash of a file's
    name decides whether it is held out (a tenth of them), so that adding files does not move others."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"No folder {folder}. Expected: a folder of images, or one with a subfolder for each class.")
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    flat, classes = [p for p in inside if is_image(p)], [p for p in inside if p.is_dir()]
    if flat and classes:
        raise ValueError(
            f"{folder} holds both images ({flat[0].name}, ...) and subfolders ({classes[0].name}, ...). Move every "
            "image into its class's subfolder, or remove the subfolders to train without classes."
        )
    files = [(file, 0) for file in flat]
    for number, path in enumerate(classes):
        in_class = [file for file in sorted(path.rglob("*")) if is_image(file)]
        if not in_class:
            raise ValueError(f"The class folder {path} holds no image ({', '.join(SUFFIXES)}). Fill or remove it.")
        files += [(file, number) for file in in_class]
    if not files:
        raise ValueError(f"{folder} and its subfolders hold no image ({', '.join(SUFFIXES)}).")
    train, held = split(folder, files)
    log.info("%s: %d images, %d of them held out, %d classes.", folder, len(files), len(held), len(classes))
    return Labelled([p.name for p in classes], of_files(folder, train, size), of_files(folder, held, size))


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def split(folder: Path, files: list[tuple[Path, int]]) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """(training, held out); every class keeps at least one image in training."""

    def place(item: tuple[Path, int]) -> float:
        return hash_fraction(f"held out/{item[0].relative_to(folder).as_posix()}")

    last = {number: max((item for item in files if item[1] == number), key=place) for _, number in files}
    held = [place(item) < HELD_OUT_SHARE and item != last[item[1]] for item in files]
    parts = ([item for item, is_held in zip(files, held, strict=True) if is_held == wanted] for wanted in (False, True))
    return next(parts), next(parts)


def of_files(folder: Path, files: list[tuple[Path, int]], size: tuple[int, int]) -> Images:
    """Images that are read on demand. The key hashes names, sizes and times: hashing a large set takes minutes."""
    names = [file.relative_to(folder).as_posix() for file, _ in files]
    stats = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, (file, _) in zip(names, files, strict=True)]

    def read(indices: Sequence[int]) -> Tensor:
        return torch.stack([read_image(files[i][0], size) for i in indices])

    return Images(names, [n for _, n in files], read, hashlib.sha256(repr((size, stats)).encode()).hexdigest())


def read_image(file: Path, size: tuple[int, int]) -> Tensor:
    """The centre of an image at `size`, (3, H, W) in [-1, 1]. Raises ValueError with its name if it is broken or less
    than half as large."""
    image = load_image(file)
    if 2 * image.height < size[0] or 2 * image.width < size[1]:
        raise ValueError(
            f"{file} is {image.width} x {image.height} pixels; {size[1]} x {size[0]} would enlarge it more than twice. "
            "Remove it, or train at a smaller `size`."
        )
    return to_tensor(image, size, fit="crop")
