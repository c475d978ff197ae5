"""Which files of a repository a loader reads: one copy of each weight, and nothing of other frameworks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from condit.data.hub import WEIGHTS, HubName, RemoteFile, Repository, open_repository
from condit.weights.files import Json
from condit.weights.folders import ENDINGS, choose_weights, read_json

NETWORKS = ("transformer", "unet")
TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
PARTS = (*NETWORKS, *TEXT, "vae", "scheduler")
# Files that each of these parts has, beside its weights.
SMALL = {"tokenizer": "vocab.json", "tokenizer_2": "vocab.json", "scheduler": "scheduler_config.json"}
COMPONENTS = (*TEXT, "vae", "scheduler")
# What a single file is loaded with, if it is in the same folder of the repository.
BESIDE: Mapping[str, Sequence[str]] = {"flux-file": COMPONENTS, "stable-diffusion-file": ("tokenizer", "tokenizer_2")}
_ADAPTER = ("safetensors", "bin", "pt", "pth", "ckpt")
_USUAL = ("model.", "pytorch_model.", "adapter.")  # beginnings of names that are the model of a folder


def download_model(name: HubName, check: Callable[[Json], None], variant: str | None = None) -> tuple[Path, HubName]:
    """A model's folder or file on disk, and its name at a commit. check(model_index.json or config.json) raises for
    what condit does not load, before weights are downloaded. variant: of the weights ("fp16"), of parts that have
    it."""
    repository = open_repository(name)
    if file := named_file(repository):
        return repository.fetch([file]) / file, repository.name
    settings = index_of(repository)
    check(settings)
    offered = replace(repository, files=of_variant(repository.files, variant))
    return repository.fetch(model_files(offered, name.path, settings)) / name.path, repository.name


def index_of(repository: Repository) -> Json:
    """The fields of a model's model_index.json, else of its config.json; {} without both."""
    paths = (inside(repository.name.path, file) for file in ("model_index.json", "config.json"))
    index = next((path for path in paths if path in repository.files), None)
    return {} if index is None else read_json(repository.fetch([index]) / index)


def copy_headers(name: HubName, folder: Path) -> Path:
    """A model in `folder` with its configurations, and with weights that have a header and no data. ValueError for
    weights without headers (.bin)."""
    repository = open_repository(name)
    if file := named_file(repository):
        paths = [file, *component_files(repository, parent(file), COMPONENTS)]
    else:
        paths = model_files(repository, name.path, index_of(repository))
    heavy = [path for path in paths if path.endswith(WEIGHTS)]
    light = repository.fetch([path for path in paths if path not in heavy])
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path in heavy:
            repository.copy_header(path, folder / path)
        else:
            shutil.copy(light / path, folder / path)
    return folder / name.path


def download_beside(name: HubName, parts: Sequence[str]) -> None:
    """Parts in the folder of a single file, those that are there."""
    repository, folder = open_repository(name), parent(name.path)
    repository.fetch(component_files(repository, folder, parts))


def download_adapter(name: HubName) -> tuple[Path, HubName]:
    """An adapter's file, or its folder if that has one safetensors file, and its name at a commit."""
    repository = open_repository(name)
    if file := named_file(repository):
        return repository.fetch([file]) / file, repository.name
    (chosen,) = weights(repository, name.path, _ADAPTER)
    path = repository.fetch([chosen, *notes(repository, name.path)]) / chosen
    return path.parent if path.suffix == ".safetensors" else path, repository.name


def local_folder(source: str | Path, parts: Sequence[str] = ()) -> str | Path:
    """What is no hub name, unchanged. Else the folder on disk: with these parts, if it has one of them, or as a part
    itself (an autoencoder, an image encoder)."""
    name = HubName.of(source)
    if name is None:
        return source
    repository = open_repository(name)
    files = component_files(repository, name.path, parts)
    return repository.fetch(files or part_files(repository, name.path)) / name.path


def encoder_beside(source: object) -> Path | None:
    """The folder image_encoder next to an adapter's file, on disk or in its repository; None without one."""
    name = HubName.of(source)
    if name is None:
        folder = Path(str(source)).parent / "image_encoder"
        return folder if folder.is_dir() else None
    repository, folder = open_repository(name), inside(parent(name.path), "image_encoder")
    if not in_folder(repository, folder):
        return None
    return repository.fetch(part_files(repository, folder)) / folder


# Plans


def model_files(repository: Repository, folder: str, index: Json) -> list[str]:
    """The files of a model in a folder of a repository ("": its root) with this model_index.json, or without one: the
    parts that a loader reads; where there is no network among them, the weights of the folder itself. FileNotFoundError
    for a part without files, ValueError for the weights of several models."""
    parts = [part for part in PARTS if isinstance(index.get(part), list) and index[part][0]]
    parts = parts or [part for part in PARTS if in_folder(repository, inside(folder, part))]
    own = [] if any(part in NETWORKS for part in parts) else weights(repository, folder, ENDINGS)
    files = [path for part in parts for path in part_files(repository, inside(folder, part))]
    return [*notes(repository, folder), *own, *files]


def component_files(repository: Repository, folder: str, parts: Sequence[str]) -> list[str]:
    """The files of those of the parts that the folder has; of a network its configuration alone."""
    present = [part for part in parts if in_folder(repository, inside(folder, part))]
    files = [path for part in present for path in part_files(repository, inside(folder, part))]
    config = inside(folder, "transformer/config.json")
    return [*files, config] if files and config in repository.files else files


def part_files(repository: Repository, folder: str) -> list[str]:
    """Configuration and weights of a part in its folder. FileNotFoundError without them."""
    small, part = notes(repository, folder), PurePosixPath(folder).name
    needed = inside(folder, SMALL.get(part, "config.json"))
    if needed not in repository.files and not (small and part.startswith("tokenizer")):
        raise repository.missing(needed)
    return small if part in SMALL else [*small, *weights(repository, folder, ENDINGS[:2])]


def of_variant(files: Mapping[str, RemoteFile], variant: str | None) -> dict[str, RemoteFile]:
    """The files without those of which the same folder has a variant."""
    having = {parent(path) for path in files if variant is not None and f".{variant}" in PurePosixPath(path).name}
    return {
        path: file
        for path, file in files.items()
        if parent(path) not in having or not path.endswith(WEIGHTS) or f".{variant}" in path
    }


def weights(repository: Repository, folder: str, endings: tuple[str, ...]) -> list[str]:
    """One copy of the weights in a folder. FileNotFoundError without any, ValueError for those of several models."""
    names, where = in_folder(repository, folder), f"{repository.where}, folder {folder or '/'}"
    chosen = choose_weights(names, where, endings)
    if not chosen:
        raise repository.missing(inside(folder, "*.safetensors"))
    if len(chosen) > 1 and "-of-" not in chosen[0]:
        usual = [name for name in chosen if name.startswith(_USUAL)]
        if len(usual) != 1:
            example = replace(repository.name, path=inside(folder, chosen[0]))
            raise ValueError(
                f"{where} holds {len(chosen)} weight files: {', '.join(chosen[:8])}. Name one of them, as in "
                f"'{example}' or with weight_name=."
            )
        chosen = usual
    return [inside(folder, name) for name in chosen]


def notes(repository: Repository, folder: str) -> list[str]:
    """The small files of a folder: configurations, vocabularies, names of classes."""
    ends = (".json", ".txt", ".model")
    return [inside(folder, name) for name in in_folder(repository, folder) if name.endswith(ends)]


# Paths


def named_file(repository: Repository) -> str | None:
    """The file that the name asks for, None for a folder. FileNotFoundError if it is not there."""
    path = repository.name.path
    if path not in repository.files and path.endswith(WEIGHTS):
        raise repository.missing(path)
    return path if path in repository.files else None


def in_folder(repository: Repository, folder: str) -> list[str]:
    """The names of the files directly in a folder."""
    return [PurePosixPath(path).name for path in repository.files if parent(path) == folder]


def parent(path: str) -> str:
    return path.rpartition("/")[0]


def inside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
