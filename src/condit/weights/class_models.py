"""Names and paths to the parts of a class model: DiT and DiffiT, which draw classes, and ViT, which tells them.

A published name stands for a file, as its authors call it, in the models folder ($CONDIT_HOME/models, else
~/.cache/condit/models); nothing is fetched. Any other file or folder is told by its tensors. Class names stand beside
the weights: `NAME.labels.json` or, in a folder, labels.json (a list, or index -> name); `labels` in the metadata of a
safetensors file; `id2label` in config.json or model_index.json. A model of 1000 classes without names has those of
ImageNet.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from condit.backbones.diffit import DiffiT
from condit.backbones.diffit_image import DiffiTImage
from condit.backbones.dit import DiT
from condit.backbones.vit import Resize, ViT
from condit.data.imagenet import ClassNames, imagenet
from condit.diffusion.edm import EDM
from condit.diffusion.gaussian import Prediction
from condit.weights import diffit, dit
from condit.weights.catalog import MODELS
from condit.weights.diffit import load_diffit, load_diffit_image
from condit.weights.dit import load_dit
from condit.weights.files import arrays_in, atomic_write, hash_file, read_metadata, read_tensors
from condit.weights.vae import load_vae
from condit.weights.vit import load_vit

Kind = Literal["dit", "diffit", "diffit-image", "vit"]


@dataclass(frozen=True)
class Published:
    """Weights of a paper's authors: `file` as they call it, `home` where it is."""

    kind: Kind
    file: str
    home: str


_DIT = "github.com/facebookresearch/DiT"
_DIFFIT = "huggingface.co/nvidia/DiffiT (CC-BY-NC-SA-4.0)"
_VIT = "github.com/google-research/vision_transformer (imagenet21k+imagenet2012)"
_VIT_21K = "github.com/google-research/vision_transformer (imagenet21k)"
PUBLISHED: dict[str, Published] = {
    "dit-xl-2-256": Published("dit", "DiT-XL-2-256x256.pt", _DIT),
    "dit-xl-2-512": Published("dit", "DiT-XL-2-512x512.pt", _DIT),
    "diffit-256": Published("diffit", "diffit_256.safetensors", _DIFFIT),
    "diffit-512": Published("diffit", "diffit_512.safetensors", _DIFFIT),
    "vit-b-16": Published("vit", "ViT-B_16.npz", _VIT),  # at 384 px, like all without -224
    "vit-b-16-224": Published("vit", "ViT-B_16-224.npz", _VIT),
    "vit-b-32": Published("vit", "ViT-B_32.npz", _VIT),
    "vit-l-16": Published("vit", "ViT-L_16.npz", _VIT),
    "vit-l-16-224": Published("vit", "ViT-L_16-224.npz", _VIT),
    "vit-l-32": Published("vit", "ViT-L_32.npz", _VIT),
    "vit-h-14": Published("vit", "ViT-H_14.npz", _VIT_21K),
    "vit-base-patch16-224": Published("vit", "vit-base-patch16-224", "huggingface.co/google/vit-base-patch16-224"),
}
_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.npz")
# Pieces of names that one architecture has; the first that is found tells it. load_* refuses what only looks like it.
_SIGNS: dict[str, Kind] = {
    r"^encoder\.\d+\.blocks\.\d+\.block\.attn\.qkv_temb\.": "diffit-image",
    r"(^|\.)blocks\.\d+\.attn\.qkv_temb\.": "diffit",
    r"(^|\.)blocks\.\d+\.adaLN_modulation\.": "dit",
    r"^transformer_blocks\.\d+\.norm1\.emb\.class_embedder\.": "dit",
    r"/MultiHeadDotProductAttention_\d/": "vit",
    r"^patch_embed\.proj\.": "vit",
    r"\.attention\.attention\.query\.": "vit",
    r"^(vit\.)?(encoder\.)?layers?\.\d+\.attention\.q_proj\.": "vit",
}


@dataclass(frozen=True)
class ClassParts:
    """What draws classes. guidance, power: the defaults published for it; power 0 is a constant scale."""

    name: str
    hash: str
    backbone: DiT | DiffiT
    vae: Any  # None: latents only
    labels: ClassNames | None
    guidance: float
    power: float
    place: Path  # beside which an autoencoder is looked for
    predicts: Prediction = "noise"


@dataclass(frozen=True)
class PixelParts:
    """What draws pixels: the image-space DiffiT, unconditional, at the size (height, width) that it was trained on."""

    name: str
    hash: str
    backbone: DiffiTImage
    edm: EDM
    size: tuple[int, int]


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes what a ViT was trained on: (x - mean) / std of values 0 ... 1 at `size` (height, width).

    crop None: squashed to the size; else the middle of a picture whose sides cover size / crop.
    """

    size: tuple[int, int]
    resample: Image.Resampling
    antialias: bool = True
    crop: float | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ClassifierParts:
    """What tells classes."""

    name: str
    hash: str
    model: ViT
    labels: ClassNames | None
    preprocess: Preprocess


# Which model


def models_folder() -> Path:
    """Where published files are looked for."""
    home = os.environ.get("CONDIT_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "condit") / "models"


def recognise(source: str | Path) -> tuple[Kind, Path] | None:
    """What a published name or a path holds, and where; None if it is no class model, by its tensors.

    FileNotFoundError for a published name whose file is not in the models folder."""
    published = PUBLISHED.get(str(source))
    if published is not None:
        path = models_folder() / published.file
        if not path.exists():
            raise FileNotFoundError(
                f"no weights for {str(source)!r}: {published.file} is expected in {path.parent}. Fetch it from "
                f"{published.home} and put it there (CONDIT_HOME moves the folder), or pass its path."
            )
        return published.kind, path
    path = MODELS[str(source)].path if str(source) in MODELS else Path(source)
    if not path.exists():
        return None
    file = weight_file(path)
    kind = None if file is None else kind_of(names_in(file))
    return None if kind is None else (kind, path)


def kind_of(names: Iterable[str]) -> Kind | None:
    """The architecture whose tensors are called so."""
    names = list(names)
    return next((kind for sign, kind in _SIGNS.items() if any(re.search(sign, name) for name in names)), None)


def looks_like(path: Path) -> str:
    """A guess in words at a file that no pipeline reads, for an error's text; empty without one."""
    file = weight_file(path) if path.exists() else None
    if file is None:
        return ""
    names = dict.fromkeys(names_in(file), torch.empty(0))
    found = (diffit if any(".qkv_temb." in name for name in names) else dit).guess(names)
    return f" It looks like {found}." if found else ""


def weight_file(path: Path) -> Path | None:
    """The file itself, or the first weight file of a folder or of its `transformer`."""
    if not path.is_dir():
        return path
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    return next((file for pattern in _PATTERNS for file in sorted(folder.glob(pattern))), None)


def names_in(file: Path) -> list[str]:
    """Names of the tensors; of a pickle, which tells nothing before it is read, by reading it."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError):
        pass
    return arrays_in(file) or list(read_tensors(file))


# Parts


def load_class_parts(
    name: str, kind: Kind, path: Path, *, vae: Any = None, dtype: torch.dtype | None = None
) -> ClassParts:
    """A DiT or DiffiT with its autoencoder. vae: None (the folder `vae` beside the weights, if there is one), a folder
    of an autoencoder, "tiny" for the embedded one, or a module; an embedded model has "tiny". dtype None: that of the
    file, float32 for the vae and for embedded models."""
    dtype = torch.float32 if dtype is None and name in MODELS else dtype
    file = weight_file(path)
    assert file is not None  # `recognise` has read it
    backbone = load_dit(path) if kind == "dit" else load_diffit(file)
    c = backbone.config
    if vae is None:
        beside = (path if path.is_dir() else path.parent) / "vae"
        vae = beside if beside.is_dir() else "tiny" if name in MODELS else None
    if isinstance(vae, str | Path):
        vae = load_vae(vae).to(dtype or torch.float32)
    if vae is not None and vae.config.latent_channels != c.in_channels:
        raise ValueError(
            f"the autoencoder has {vae.config.latent_channels} latent channels, {name} draws {c.in_channels}. "
            "DiT and DiffiT were trained on that of Stable Diffusion 1 (stabilityai/sd-vae-ft-ema)."
        )
    guidance, power = 4.0, 0.0  # sample.py of DiT; its figures were measured at 1.5
    if kind == "diffit":  # arXiv:2312.02139, section 5.8, and the release's command lines
        guidance, power = (4.4, 4.0) if max(c.latent) <= 32 else (1.49, 0.0)
    return ClassParts(
        name=name,
        hash=hash_file(file),
        backbone=backbone.requires_grad_(False).to(dtype or next(backbone.parameters()).dtype),
        vae=None if vae is None else vae.eval().requires_grad_(False),
        labels=read_labels(path, c.num_classes or 0),
        guidance=guidance,
        power=power,
        place=path if path.is_dir() else path.parent,
        predicts=_beside(file.parent, "config.json").get("condit", {}).get("predicts", "noise"),  # condit's trainer
    )


def load_pixel_parts(name: str, path: Path, *, dtype: torch.dtype | None = None) -> PixelParts:
    """An image-space DiffiT as `save_diffit` wrote it; noise levels and size from the config.json of condit's trainer,
    else EDM's and the papers' sizes. dtype None: the file's."""
    file = weight_file(path)
    assert file is not None  # `recognise` has read it
    model = load_diffit_image(file)
    model = model.requires_grad_(False).to(dtype or next(model.parameters()).dtype)
    told = _beside(file.parent, "config.json").get("condit", {})
    side = 8 * 2 ** (len(model.config.blocks) - 1)  # 64 px of four resolutions, 32 of three: Tables S.2 and S.3
    height, width = told.get("size", (side, side))
    return PixelParts(name, hash_file(file), model, EDM(**told.get("edm", {})), (height, width))


def load_classifier_parts(name: str, path: Path, *, dtype: torch.dtype | None = None) -> ClassifierParts:
    """A ViT with its class names and its preprocessing. dtype None: the file's, float32 for an embedded model."""
    dtype = torch.float32 if dtype is None and name in MODELS else dtype
    file = weight_file(path)
    assert file is not None  # `recognise` has read it
    model = load_vit(path)
    model = model.requires_grad_(False).to(dtype or next(model.parameters()).dtype)
    labels = read_labels(path, model.config.classes)
    return ClassifierParts(name, hash_file(file), model, labels, read_preprocess(path, model))


# What stands beside the weights


def write_labels(path: str | Path, labels: Sequence[str]) -> Path:
    """Put the names of a model's classes beside its file, or into its folder; `condit.load` reads them."""
    text = json.dumps(list(labels), ensure_ascii=False, indent=1)
    return atomic_write(_labels_file(Path(path)), lambda target: target.write_text(text, encoding="utf-8"))


def _labels_file(path: Path) -> Path:
    return path / "labels.json" if path.is_dir() else path.with_suffix(".labels.json")


def read_labels(path: Path, classes: int) -> ClassNames | None:
    """Names of `classes` classes from beside the weights; ValueError if there are too few."""
    found, where = _find_labels(path)
    # transformers writes LABEL_0, LABEL_1, ... where nobody has named the classes.
    if found and all(re.fullmatch(r"LABEL_\d+", text) for text in found.values()):
        found = None
    if found is None:
        return imagenet() if classes == 1000 else None
    missing = [i for i in range(classes) if i not in found]
    if missing:
        raise ValueError(f"{where} has {len(found)} class names, none for {missing[0]}; the model has {classes}.")
    return ClassNames.of(found[i] for i in range(classes))


def _find_labels(path: Path) -> tuple[dict[int, str] | None, Path]:
    beside, file = _labels_file(path), weight_file(path)
    if beside.is_file():
        return _numbered(_read_json(beside), beside), beside
    if file is not None and (text := _metadata(file).get("labels")):
        return _numbered(json.loads(text), file), file
    for folder in dict.fromkeys((path if path.is_dir() else path.parent, (file or path).parent)):
        for config in (folder / "config.json", folder / "model_index.json"):
            if names := _beside(config.parent, config.name).get("id2label"):
                return _numbered(names, config), config
    return None, path


def _metadata(file: Path) -> dict[str, str]:
    return {} if zipfile.is_zipfile(file) else read_metadata(file)  # an .npz is no weight file to `read_metadata`


def _numbered(names: Any, where: Path) -> dict[int, str]:
    pairs = enumerate(names) if isinstance(names, list) else names.items() if isinstance(names, dict) else ()
    try:
        found = {int(key): text for key, text in pairs}
    except ValueError:
        found = {}
    if not found or not all(isinstance(text, str) for text in found.values()):
        raise ValueError(f"{where}: class names are a list of strings, or an object from number to string.")
    return found


def read_preprocess(path: Path, model: ViT) -> Preprocess:
    """That of the flavour, as its publishers evaluate; with resampling, mean and deviation of the folder, if it has."""
    c = model.config
    side = c.image_size
    found = _evaluation(c.flavour.resize, (side, side) if isinstance(side, int) else side)
    transformers = _beside(path, "preprocessor_config.json")
    timm = _beside(path, "config.json").get("pretrained_cfg", {})
    if "resample" in transformers:
        found = replace(found, resample=Image.Resampling(transformers["resample"]))
    if "interpolation" in timm:
        sampling = Image.Resampling[timm["interpolation"].upper()]
        found = replace(found, resample=sampling, crop=timm.get("crop_pct", found.crop))
    if transformers.get("do_normalize") is False:
        return replace(found, mean=(0.0,) * 3, std=(1.0,) * 3)
    mean = transformers.get("image_mean") or timm.get("mean") or found.mean
    std = transformers.get("image_std") or timm.get("std") or found.std
    return replace(found, mean=tuple(mean), std=tuple(std))


def _evaluation(resize: Resize, size: tuple[int, int]) -> Preprocess:
    """By the rule that positions are resized by, which tells the publication."""
    if resize == "linear_aligned":  # the authors: tf.image.resize, which does not smooth
        return Preprocess(size, Image.Resampling.BILINEAR, antialias=False)
    if resize == "bicubic_antialias":  # timm; its files at 384 px are evaluated without a margin
        return Preprocess(size, Image.Resampling.BICUBIC, crop=0.9 if min(size) < 384 else 1.0)
    return Preprocess(size, Image.Resampling.BILINEAR)  # transformers


def _beside(path: Path, name: str) -> dict[str, Any]:
    return _read_json(path / name) if (path / name).is_file() else {}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
