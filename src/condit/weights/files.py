"""Weight files: safe to read, strict to load, whole or absent on disk."""

import contextlib
import difflib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from condit.data.files import atomic_write, fsync_path, parse_json, temporary_path, write_error
from condit.weights.pickles import arrays_in, read_pickle

Json = dict[str, Any]  # a JSON object: whoever reads a field knows its type
COMPLETE = "COMPLETE"  # the last file that save_folder writes: a folder without it is incomplete
# Types as safetensors writes them. Unknown ones raise KeyError, which readers of a file report.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32}
DTYPES |= {"I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "C64": torch.complex64}
_WRAPPER = "state_dict."
_HEADER_LIMIT = 100_000_000  # safetensors' own limit on its JSON header


def read_tensors(path: str | Path, device: Literal["cpu", "meta"] = "cpu") -> dict[str, Tensor]:
    """Name -> tensor on the CPU, or on "meta" (without data), from a safetensors file or a PyTorch file (.pt, .pth,
    .bin, .ckpt); the content decides which it is. Names in nested dictionaries are joined by dots; values that are not
    tensors are dropped. A PyTorch file is read with weights_only=True: one that would run code raises ValueError and
    runs nothing."""
    path = _existing(path)
    if _is_safetensors(path):
        try:
            with safe_open(path, framework="pt") as file:
                get = file.get_tensor if device == "cpu" else lambda name: _without_data(file.get_slice(name))
                return {name: get(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} is broken or cut off: {error}. Download it again") from error
    if arrays_in(path):
        raise ValueError(f"{path} is an .npz of numpy arrays, as ViT's authors publish: load it with load_vit")
    return read_pickle(path, device)


def _without_data(part: Any) -> Tensor:
    """A slice of safetensors, which has no types of its own."""
    return torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")


def names_in(path: Path) -> list[str]:
    """Names of the tensors or arrays in a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return arrays_in(path) or list(read_tensors(path, "meta"))


def inner_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a PyTorch Lightning checkpoint, which keeps them under `state_dict`; other tensors unchanged."""
    inside = {name.removeprefix(_WRAPPER): t for name, t in tensors.items() if name.startswith(_WRAPPER)}
    return inside or dict(tensors)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; {} for other files, which have none."""
    path = _existing(path)
    if not _is_safetensors(path):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is broken or cut off: {error}. Download it again") from error


def own_fields(metadata: Mapping[str, str]) -> Json:
    """The fields of a class that condit wrote into a file's metadata; {} without any, as in a model's part, where the
    entry is a plain name."""
    try:
        fields = parse_json(metadata.get("condit", "{}"))
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def load_strict(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str | Path,
    what_is: Callable[[Mapping[str, Tensor]], str | None] | None = None,
    assign: bool = False,
) -> None:
    """Load all of `tensors` into all of `module`, or nothing: ValueError with a readable difference. what_is(tensors)
    guesses at another model; assign=True takes the tensors themselves (for meta modules)."""
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    held = {name: tuple(value.shape) for name, value in tensors.items()}
    missing = [name for name in wanted if name not in held]
    unexpected = [name for name in held if name not in wanted]
    shapes = [name for name in wanted if name in held and wanted[name] != held[name]]
    if missing or unexpected or shapes:
        lines = [f"{source} does not fit {type(module).__name__} ({len(wanted)} tensors wanted, {len(held)} found)"]
        lines += [f"{len(missing)} missing (first: {_first(missing)})"] if missing else []
        near = difflib.get_close_matches(missing[0], unexpected, 2) if missing else []
        lines += [f"nearest to {missing[0]}: {', '.join(near)}"] if near else []
        lines += [f"{len(unexpected)} unexpected (first: {_first(unexpected)})"] if unexpected else []
        if shapes:
            pairs = [f"{name} {held[name]} instead of {wanted[name]}" for name in shapes]
            lines.append(f"{len(shapes)} of another shape (first: {_first(pairs, 2)})")
        guess = what_is(tensors) if what_is is not None else None
        raise ValueError("; ".join(lines) + (f". It looks like {guess}" if guess else ""))
    check_values({name: tensors[name] for name, x in module.state_dict().items() if x.is_floating_point()}, source)
    module.load_state_dict(dict(tensors), strict=True, assign=assign)


# What code raises on a value of a kind that it does not expect, such as a configuration's list in place of a number.
_STRANGE = (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, AssertionError, RuntimeError)


@contextlib.contextmanager
def reading(source: object) -> Iterator[None]:
    """Turns errors of Python in what reads a user's file or folder into a ValueError that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # transformers' configurations raise huggingface_hub's StrictDataclass...Error, of no builtin class.
        if not isinstance(error, _STRANGE) and not type(error).__name__.startswith("StrictDataclass"):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{source} is broken or has values that condit does not read ({text}). Download it again."
        ) from error


@contextlib.contextmanager
def errors_of(source: object) -> Iterator[None]:
    """`reading`, and adds the name of the file to the ValueErrors that do not name it."""
    try:
        with reading(source):
            yield
    except ValueError as error:
        if str(error).startswith(str(source)):
            raise
        raise ValueError(f"{source}: {error}") from error


def check_values(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises ValueError, with its name, for a tensor that is not of floating-point numbers or holds NaN or infinity."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(
                f"{source}: {name!r} is {str(x.dtype).removeprefix('torch.')}; weights are floating-point."
            )
        if x.is_meta or not x.numel():
            continue
        # The extremes are NaN or infinite if any value is; unlike isfinite, they take one pass and no memory.
        if not all(end.isfinite() for end in (x.float() if x.itemsize == 1 else x).aminmax()):
            raise ValueError(f"{source}: {name!r} holds NaN or infinite values. The file is broken; download it again.")


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None) -> Path:
    """Write a safetensors file, whole or not at all. Metadata values that are not text become JSON."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        # safetensors refuses tied tensors; and a view would drag its whole base along.
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        plain[name] = value
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}

    def write(target: Path) -> None:
        target.touch()
        mode = stat.S_IMODE(target.stat().st_mode)  # by the umask; safetensors makes files for their owner only
        try:
            save_file(plain, target, metadata=texts or None)
            target.chmod(mode)
        except SafetensorError as error:  # it hides the OSError that we report
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error

    return atomic_write(path, write)


@contextlib.contextmanager
def save_folder(folder: str | Path) -> Iterator[Path]:
    """Yields an empty folder to fill; at the end it is synced, marked COMPLETE and replaces `folder`. A crash, an
    exception or a full disk leaves the old folder unchanged; open_folder reads either."""
    target = Path(folder).resolve()
    temporary = temporary_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*")):
            fsync_path(path)
        (temporary / COMPLETE).touch()
        fsync_path(temporary / COMPLETE)
        fsync_path(temporary)
        _swap(temporary, target)
    except OSError as error:
        raise write_error(error, target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, target: Path) -> None:
    # A folder that is not empty cannot be replaced in one rename: the old one gets a known name, from which open_folder
    # restores it if the machine stops between the two renames.
    previous = _previous(target)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(target, previous)
    try:
        os.rename(temporary, target)
    except OSError:
        if previous.exists():
            os.rename(previous, target)
        raise
    fsync_path(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def is_complete(folder: str | Path) -> bool:
    """Whether save_folder completed this folder."""
    return (Path(folder) / COMPLETE).is_file()


def open_folder(folder: str | Path) -> Path:
    """The folder, if it is complete; after a crash between save_folder's renames, the previous one, restored.
    FileNotFoundError without a folder, ValueError for an incomplete one."""
    target = Path(folder).resolve()
    if not target.exists() and is_complete(_previous(target)):
        os.rename(_previous(target), target)
    if not target.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    if not is_complete(target):
        raise ValueError(f"{folder} was not written to its end (it has no file {COMPLETE}); use an earlier one")
    return target


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a weight file")
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    return path


def _is_safetensors(path: Path) -> bool:
    """True for safetensors, False for a PyTorch file; ValueError for anything else."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` where it came from")
    if 0 < int.from_bytes(head[:8], "little") <= _HEADER_LIMIT and head[8:9] == b"{":
        return True
    if head.startswith((b"PK\x03\x04", b"\x80")):  # torch.save's zip, or a bare pickle as torch < 1.6 wrote it
        return False
    raise ValueError(f"{path} is neither safetensors nor a PyTorch file (it starts with {head[:8]!r})")


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
