"""Pictures with classes: the icon world by style, concept or group, or a folder with one subfolder a class."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from condit.data.files import hash_fraction
from condit.data.images import load_image, to_tensor
from condit.training.plugins import icon_world

log = logging.getLogger(__name__)

Label = Literal["style", "base", "group"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
HELD_OUT_SHARE = 0.1  # of a folder


@dataclass(frozen=True)
class Pictures:
    """`read(indices)` gives (B, 3, H, W) in [-1, 1]. labels: a class number each. `key` tells other data apart."""

    names: list[str]
    labels: list[int]
    read: Callable[[Sequence[int]], Tensor]
    key: str

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Labelled:
    """`classes` are the names of the labels 0, 1, ...; none for unlabelled pictures. `held_out` may be empty."""

    classes: list[str]
    train: Pictures
    held_out: Pictures


def open_labelled(
    icons: str | None, folder: str | None, *, label: Label, size: tuple[int, int], held_out: str
) -> Labelled:
    """One of both sources. `label` and `held_out` (a split) are the icon world's; a folder has its own."""
    if (icons is None) == (folder is None):
        raise ValueError(
            f"Pictures come from `icons` (an icon world) or from `folder` (one subfolder a class); found icons = "
            f"{icons!r} and folder = {folder!r}. Give one of the two under [data]."
        )
    if icons is not None:
        return icon_world().labelled(icons, label, size, held_out=held_out)  # type: ignore[attr-defined]
    return from_folder(str(folder), size)


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """A recipe's `size`, a side or [height, width], in pixels."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size is a side or [height, width] in pixels; found {size!r}.")
    return sides[0], sides[1]


def check_sizes(config: object, sizes: Mapping[str, Any]) -> None:
    """ValueError for a field of a recipe's `sizes` whose value is of another kind than the configuration's. A field
    that there is not fails where it is replaced."""
    for name, value in sizes.items():
        known = getattr(config, name, None)
        kinds = (int, float) if isinstance(known, float) else (type(known),)
        if known is not None and type(value) not in kinds:
            raise ValueError(f"sizes.{name} is of the kind of {known!r}; found {value!r}.")


def id2label(classes: Sequence[str]) -> dict[str, str]:
    """Class names as transformers and diffusers write them into config.json."""
    return {str(i): name for i, name in enumerate(classes)}


def from_folder(folder: str | Path, size: tuple[int, int]) -> Labelled:
    """One subfolder a class, its name the class's; pictures that lie flat have no classes. A tenth is held out, chosen
    by the files' names, so that more files move none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"No folder {folder}. Expected: a folder of pictures, or one with a subfolder for each class.")
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    flat, classes = [p for p in inside if is_picture(p)], [p for p in inside if p.is_dir()]
    if flat and classes:
        raise ValueError(
            f"{folder} holds pictures ({flat[0].name}, ...) beside subfolders ({classes[0].name}, ...). Put every "
            "picture into its class's subfolder, or take the subfolders away for training without classes."
        )
    files = [(file, 0) for file in flat]
    for number, path in enumerate(classes):
        found = [file for file in sorted(path.rglob("*")) if is_picture(file)]
        if not found:
            raise ValueError(f"The class folder {path} holds no picture ({', '.join(SUFFIXES)}). Fill or remove it.")
        files += [(file, number) for file in found]
    if not files:
        raise ValueError(f"{folder} holds no picture ({', '.join(SUFFIXES)}), neither flat nor in subfolders.")
    train, held = split(folder, files)
    log.info("%s: %d pictures, %d of them held out, %d classes.", folder, len(files), len(held), len(classes))
    return Labelled([p.name for p in classes], of_files(folder, train, size), of_files(folder, held, size))


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def split(folder: Path, files: list[tuple[Path, int]]) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """(training, held out); every class keeps at least one picture in training."""

    def place(item: tuple[Path, int]) -> float:
        return hash_fraction(f"held out/{item[0].relative_to(folder).as_posix()}")

    last = {number: max((item for item in files if item[1] == number), key=place) for _, number in files}
    held = [place(item) < HELD_OUT_SHARE and item != last[item[1]] for item in files]
    parts = ([item for item, is_held in zip(files, held, strict=True) if is_held == wanted] for wanted in (False, True))
    return next(parts), next(parts)


def of_files(folder: Path, files: list[tuple[Path, int]], size: tuple[int, int]) -> Pictures:
    """Files read when they are asked for. The key goes by name, bytes and time: hashing a large set takes minutes."""
    names = [file.relative_to(folder).as_posix() for file, _ in files]
    told = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, (file, _) in zip(names, files, strict=True)]

    def read(indices: Sequence[int]) -> Tensor:
        return torch.stack([read_picture(files[i][0], size) for i in indices])

    return Pictures(names, [n for _, n in files], read, hashlib.sha256(repr((size, told)).encode()).hexdigest())


def read_picture(file: Path, size: tuple[int, int]) -> Tensor:
    """The middle of a picture at `size`, (3, H, W) in [-1, 1]; ValueError with its name if it is broken or tiny."""
    picture = load_image(file)
    if 2 * picture.height < size[0] or 2 * picture.width < size[1]:
        raise ValueError(
            f"{file} is {picture.width} x {picture.height} pixels; at {size[1]} x {size[0]} it would be blown up more "
            "than twice. Remove it, or train at a smaller `size`."
        )
    return to_tensor(picture, size, fit="crop")
