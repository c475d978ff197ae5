"""PyTorch files, which are pickles, and archives: read without running code, and bounded before they are inflated."""

import argparse
import itertools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor

# A file may hold this many bytes of tensors, or this many times its own size.
INFLATED_BYTES, INFLATED_FACTOR = 64_000_000, 8
MAX_DEPTH, MAX_NAMES = 16, 1_000_000  # of the dictionaries in a PyTorch file
_NO_ARCHIVE = (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError)


def read_pickle(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a PyTorch file, see `files.read_tensors`."""
    check_archive(path)
    if b"bytearray" in _pickle_bytes(path):  # which torch would allocate, at any size
        raise ValueError(f"{path} holds more than tensors (bytearray): refused. Use a safetensors file")
    tensors = _flatten(_read_pickle(path, device), path)
    _check_size(sum(t.numel() * t.element_size() for t in tensors.values()), path)
    return tensors


def check_archive(path: Path) -> None:
    """ValueError for a zip archive that declares much more data than it holds: its entries are inflated in memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(entry.file_size for entry in archive.infolist())
    except _NO_ARCHIVE:
        return  # its reader reports what is broken
    _check_size(declared, path)


def _check_size(declared: int, path: Path) -> None:
    limit = max(INFLATED_BYTES, INFLATED_FACTOR * path.stat().st_size)
    if declared > limit:
        raise ValueError(
            f"{path} has {path.stat().st_size / 1e6:.3g} MB and declares {declared / 1e6:.3g} MB of tensors; at most "
            f"{limit / 1e6:.3g} MB are read. Save it again without compression"
        )


def _pickle_bytes(path: Path) -> bytes:
    """The pickle of an archive; of an older file its first megabytes, which the pickle begins."""
    try:
        with zipfile.ZipFile(path) as archive:
            return b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".pkl"))
    except _NO_ARCHIVE:
        with open(path, "rb") as file:
            return file.read(INFLATED_BYTES)


def arrays_in(path: Path) -> list[str]:
    """Names of the arrays in an .npz; [] for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except _NO_ARCHIVE:
        return []


class _Placeholder:
    """Replaces a harmless class in a checkpoint, which is never imported."""


def _harmless() -> list:
    """The classes that published training files contain besides tensors: argparse.Namespace (DiT), the class of a
    callback as a key (Lightning), numbers of numpy (both)."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    callback = "callbacks.model_checkpoint.ModelCheckpoint"
    lightning = [(_Placeholder, f"{package}.{callback}") for package in ("pytorch_lightning", "lightning.pytorch")]
    old = (scalar, "numpy.core.multiarray.scalar")  # before numpy 2
    return [argparse.Namespace, scalar, old, np.dtype, *kinds, *lightning]


def _read_pickle(path: Path, device: str) -> object:
    try:
        # The open file, not its name: torch reads a path by its ending. Its warnings (protocol 4) do not help users.
        with (
            open(path, "rb") as file,
            torch.serialization.safe_globals(_harmless()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location=device, weights_only=True)
    except UnpicklingError as error:
        blocked = re.search(
            r"(?:GLOBAL|Unsupported (?:global|class|operand)|class) *:? *(?:GLOBAL +)?([\w.]+)", str(error)
        )
        what = f" ({blocked[1]})" if blocked else ""
        raise ValueError(
            f"{path} holds more than tensors{what}, and reading it could run code: refused. "
            "Use a safetensors file, or convert it if you trust its origin"
        ) from error
    except Exception as error:  # readers of broken pickles raise many types
        raise ValueError(f"{path} is broken or cut off: {error}. Download it again") from error


def _flatten(value: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a dictionary of tensors")
    tensors: dict[str, Tensor] = {}

    numbers = itertools.count(1)

    def walk(prefix: str, part: Mapping, depth: int) -> None:
        for name, item in part.items():
            if next(numbers) > MAX_NAMES or depth > MAX_DEPTH:
                raise ValueError(f"{path} holds more than {MAX_NAMES} names or dictionaries {MAX_DEPTH} deep: refused")
            if isinstance(item, Tensor) and item.layout == torch.strided:
                tensors[f"{prefix}{name}"] = item
            elif isinstance(item, Mapping):
                walk(f"{prefix}{name}.", item, depth + 1)

    walk("", value, 0)
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return tensors
