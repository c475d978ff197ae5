"""A model's folder on disk: its JSON files, and which of its files hold the weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from condit.data.files import parse_json, read_bounded
from condit.weights.files import Json, own_fields, read_metadata, read_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name for the weights of a part
MAX_LAYERS = 1000
MAX_JSON_BYTES = 100_000_000
_DEPTH = re.compile(r"layers|depth|num_blocks")  # names of fields that count layers
_PLAIN = re.compile(r"[^.]+\.\w+")  # a name without a variant such as fp16
_SHARD = re.compile(r"-(\d+)-of-(\d+)")
ENDINGS = ("safetensors", "bin", "pt", "pth", "npz")


def read_json(path: Path) -> Json:
    """An object. FileNotFoundError without the file, ValueError if it is not JSON, or describes a network of more than
    MAX_LAYERS layers, which would take hours to build."""
    value = read_any_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    for name, field in value.items():
        numbers = field if isinstance(field, list) else [field]
        if _DEPTH.search(name) and any(isinstance(n, int) and n > MAX_LAYERS for n in numbers):
            raise ValueError(f"{path}: {name} is {str(field)[:40]}; at most {MAX_LAYERS} layers are supported.")
    return value


def read_any_json(path: Path) -> object:
    """The value in a file. Raises as `read_json` does."""
    try:
        data = read_bounded(path, MAX_JSON_BYTES)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES / 1e6:g} MB")
        return parse_json(data)
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path.name} at {path.parent}: is it a folder in diffusers' layout?") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def optional_json(path: Path) -> Json:
    """`read_json`, or {} without the file."""
    return read_json(path) if path.is_file() else {}


def check_tokenizer(folder: Path, *names: str) -> None:
    """FileNotFoundError unless the folder has tokenizer.json, or all of the older files `names`."""
    absent = [name for name in names if not (folder / name).is_file()]
    if absent and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"no tokenizer at {folder}: expected tokenizer.json or {' and '.join(names)}.")


def read_config(folder: Path) -> Json:
    """config.json without the keys that say who wrote it, with tuples for lists."""
    config = read_json(folder / "config.json")
    return tuples({name: value for name, value in config.items() if not name.startswith("_") and name != "condit"})


def tuples(fields: Mapping[str, object]) -> Json:
    """JSON has lists where our configurations have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def own_config(path: str | Path, name: str, config: type) -> Json:
    """The fields of the dataclass `config` that condit's `save_*` wrote into a file for a model of class `name`; {} for
    other files. ValueError for a field that the dataclass does not have."""
    fields = own_fields(read_metadata(path))
    if fields.pop("class", None) != name:
        return {}
    unknown = sorted(fields.keys() - config.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"{path}: its config has {unknown[0]!r}, which {name} does not. Written by a later version?")
    return tuples(fields)


def network_folder(folder: Path) -> Path:
    """The folder `transformer` of a pipeline's folder, or the folder itself without one."""
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def first_weight_file(path: Path) -> Path | None:
    """A file itself; of a folder the first weight file of its network; None without one."""
    if not path.is_dir():
        return path
    folder = network_folder(path)
    return next((file for ending in ENDINGS for file in sorted(folder.glob(f"*.{ending}"))), None)


def only_weight_file(path: str | Path, what: str) -> Path:
    """A file itself; of a folder its only safetensors file. ValueError for a folder with none or several; `what` names
    such a folder in the message."""
    path = Path(path)
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{path} holds {len(files)} safetensors files; {what} holds one.")
    return files[0]


def choose_weights(names: Collection[str], where: object, endings: tuple[str, ...] = ENDINGS[:2]) -> list[str]:
    """The weights among the names of a folder's files, one file or several shards: by the first ending that there is,
    full precision before a variant (fp16), diffusers' own name before others, one file before shards; [] without any.
    ValueError for several variants, FileNotFoundError for a missing shard; `where` names the folder in the message."""
    for ending in endings:
        files = sorted(name for name in names if name.endswith(f".{ending}"))
        files = [name for name in files if name.startswith(Path(WEIGHTS).stem)] or files
        plain = [name for name in files if _PLAIN.fullmatch(_SHARD.sub("", name))]
        variants = {_SHARD.sub("", name).split(".")[1] for name in files if name not in plain}
        if len(variants) > 1 and not plain:
            found = ", ".join(sorted(variants))
            raise ValueError(f"{where} holds several variants: {found}. Leave one of them there.")
        chosen = plain or files
        if whole := [name for name in chosen if not _SHARD.search(name)]:
            return whole
        for name, match in ((name, match) for name in chosen if (match := _SHARD.search(name))):
            shards = [
                name.replace(match[0], f"-{i:0{len(match[1])}d}-of-{match[2]}") for i in range(1, int(match[2]) + 1)
            ]
            if absent := [shard for shard in shards if shard not in names]:
                raise FileNotFoundError(f"no {absent[0]} at {where}, one of {int(match[2])} files of these weights.")
        if chosen:
            return chosen
    return []


def weight_files(folder: Path, endings: tuple[str, ...] = ENDINGS[:2]) -> list[Path]:
    """`choose_weights` of a folder. FileNotFoundError without weights."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if chosen := choose_weights(names, folder, endings):
        return [folder / name for name in chosen]
    wanted = " or ".join(f"*.{ending}" for ending in endings)
    raise FileNotFoundError(f"{folder} holds no weights: expected a {wanted} file.")


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a part."""
    return {name: tensor for file in weight_files(folder) for name, tensor in read_tensors(file).items()}


def floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fp16 storage to fp32: the embedded models run in fp32 on CPUs."""
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
