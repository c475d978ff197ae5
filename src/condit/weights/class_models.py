"""The parts of class models from disk: DiT and DiffiT, which generate classes, and ViT, which classifies.

Class names come with the weights: `NAME.labels.json` next to a file or labels.json in a folder (a list, or index ->
name); `labels` in the metadata of a safetensors file; `id2label` in config.json or model_index.json. A model of 1000
classes without names has those of ImageNet."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from PIL import Image
from torch import nn

from condit.backbones.diffit import DiffiT
from condit.backbones.diffit_image import DiffiTImage
from condit.backbones.dit import DiT
from condit.backbones.vit import Resize, ViT
from condit.data.files import hash_file, parse_json
from condit.data.imagenet import ClassNames, imagenet
from condit.diffusion.edm import EDM
from condit.diffusion.gaussian import Prediction
from condit.weights.catalog import MODELS
from condit.weights.diffit import load_diffit, load_diffit_image
from condit.weights.dit import load_dit
from condit.weights.files import Json, atomic_write, read_metadata
from condit.weights.folders import first_weight_file, optional_json, read_any_json
from condit.weights.vae import load_vae
from condit.weights.vit import load_vit

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class ClassParts:
    """What a `ClassPipeline` is made of. vae: None for latents only. guidance, power: the published defaults; power 0
    is a constant scale. place: the folder next to which an autoencoder is expected."""

    name: str
    hash: str
    backbone: DiT | DiffiT
    vae: Any
    labels: ClassNames | None
    guidance: float
    power: float
    place: Path
    predicts: Prediction = "noise"


@dataclass(frozen=True)
class PixelParts:
    """What a `PixelPipeline` is made of: the image-space DiffiT, unconditional, at its training size (height,
    width)."""

    name: str
    hash: str
    backbone: DiffiTImage
    edm: EDM
    size: tuple[int, int]


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes a ViT's input: (x - mean) / std of values 0 ... 1 at `size` (height, width).

    crop None: the image is squashed to the size; else the middle of an image whose sides cover size / crop.
    """

    size: tuple[int, int]
    resample: Image.Resampling
    antialias: bool = True
    crop: float | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ClassifierParts:
    """What a `ViTPipeline` is made of."""

    name: str
    hash: str
    model: ViT
    labels: ClassNames | None
    preprocess: Preprocess


def load_class_parts(
    name: str, kind: Literal["dit", "diffit"], path: Path, *, vae: Any = None, dtype: torch.dtype | None = None
) -> ClassParts:
    """A DiT or DiffiT with its autoencoder. vae: an autoencoder, its folder, or "tiny" for the embedded one; None: the
    folder `vae` next to the weights, if there is one, and "tiny" for an embedded model. dtype None: the file's, float32
    for the autoencoder and for embedded models. ValueError for an autoencoder with other channels than the latents."""
    dtype = torch.float32 if dtype is None and name in MODELS else dtype
    file, place = _weights(path), path if path.is_dir() else path.parent
    backbone = load_dit(path) if kind == "dit" else load_diffit(file)
    c = backbone.config
    if vae is None:
        vae = place / "vae" if (place / "vae").is_dir() else "tiny" if name in MODELS else None
    if isinstance(vae, str | Path):
        vae = load_vae(vae).to(dtype or torch.float32)
    if vae is not None and vae.config.latent_channels != c.in_channels:
        raise ValueError(
            f"the autoencoder has {vae.config.latent_channels} latent channels, {name} has {c.in_channels}. DiT and "
            "DiffiT were trained on that of Stable Diffusion 1 (stabilityai/sd-vae-ft-ema)."
        )
    guidance, power = 4.0, 0.0  # sample.py of DiT; its figures were measured at 1.5
    if kind == "diffit":  # arXiv:2312.02139, section 5.8, and the release's command lines
        guidance, power = (4.4, 4.0) if max(c.latent) <= 32 else (1.49, 0.0)
    return ClassParts(
        name=name,
        hash=hash_file(file),
        backbone=_frozen(backbone, dtype),
        vae=None if vae is None else vae.eval().requires_grad_(False),
        labels=read_labels(path, c.num_classes or 0),
        guidance=guidance,
        power=power,
        place=place,
        predicts=_trainer_settings(file).get("predicts", "noise"),
    )


def load_pixel_parts(name: str, path: Path, *, dtype: torch.dtype | None = None) -> PixelParts:
    """An image-space DiffiT as `save_diffit` wrote it; noise levels and size from the config.json of condit's trainer,
    else EDM's and the papers' sizes. dtype None: the file's."""
    file = _weights(path)
    model = _frozen(load_diffit_image(file), dtype)
    settings = _trainer_settings(file)
    side = 8 * 2 ** (len(model.config.blocks) - 1)  # 64 px of four resolutions, 32 of three: Tables S.2 and S.3
    height, width = settings.get("size", (side, side))
    return PixelParts(name, hash_file(file), model, EDM(**settings.get("edm", {})), (height, width))


def load_classifier_parts(name: str, path: Path, *, dtype: torch.dtype | None = None) -> ClassifierParts:
    """A ViT with its class names and its preprocessing. dtype None: the file's, float32 for an embedded model."""
    dtype = torch.float32 if dtype is None and name in MODELS else dtype
    model = _frozen(load_vit(path), dtype)
    labels = read_labels(path, model.config.classes)
    return ClassifierParts(name, hash_file(_weights(path)), model, labels, read_preprocess(path, model))


def _weights(path: Path) -> Path:
    file = first_weight_file(path)
    if file is None:
        raise FileNotFoundError(f"{path} holds no weight file.")
    return file


def _frozen(model: Net, dtype: torch.dtype | None) -> Net:
    return model.requires_grad_(False).to(dtype or next(model.parameters()).dtype)


def _trainer_settings(file: Path) -> Json:
    """What condit's trainer noted in the config.json next to a file."""
    return optional_json(file.parent / "config.json").get("condit", {})


# Class names


def write_labels(path: str | Path, labels: Sequence[str]) -> Path:
    """Write the names of a model's classes next to its file, or into its folder; `condit.load` reads them."""
    text = json.dumps(list(labels), ensure_ascii=False, indent=1)
    return atomic_write(_labels_file(Path(path)), lambda target: target.write_text(text, encoding="utf-8"))


def _labels_file(path: Path) -> Path:
    return path / "labels.json" if path.is_dir() else path.with_suffix(".labels.json")


def read_labels(path: Path, classes: int) -> ClassNames | None:
    """The names of `classes` classes; None where a model has none. ValueError if there are too few."""
    names, where = _find_labels(path)
    # transformers writes LABEL_0, LABEL_1, ... where nobody has named the classes.
    if names and all(re.fullmatch(r"LABEL_\d+", name) for name in names.values()):
        names = None
    if names is None:
        return imagenet() if classes == 1000 else None
    missing = [i for i in range(classes) if i not in names]
    if missing:
        raise ValueError(f"{where} has {len(names)} class names, none for {missing[0]}; the model has {classes}.")
    return ClassNames.of(names[i] for i in range(classes))


def _find_labels(path: Path) -> tuple[dict[int, str] | None, Path]:
    labels, file = _labels_file(path), first_weight_file(path)
    if labels.is_file():
        return _numbered(read_any_json(labels), labels), labels
    # An .npz has no metadata.
    if file is not None and not zipfile.is_zipfile(file) and (text := read_metadata(file).get("labels")):
        return _numbered(parse_json(text), file), file
    for folder in dict.fromkeys((path if path.is_dir() else path.parent, (file or path).parent)):
        for config in (folder / "config.json", folder / "model_index.json"):
            if names := optional_json(config).get("id2label"):
                return _numbered(names, config), config
    return None, path


def _numbered(names: object, where: Path) -> dict[int, str]:
    pairs = enumerate(names) if isinstance(names, list) else names.items() if isinstance(names, dict) else ()
    try:
        numbered = {int(key): name for key, name in pairs}
    except ValueError:
        numbered = {}
    if not numbered or not all(isinstance(name, str) for name in numbered.values()):
        raise ValueError(f"{where}: class names are a list of strings, or an object from number to string.")
    return numbered


# Preprocessing


def read_preprocess(path: Path, model: ViT) -> Preprocess:
    """The preprocessing with which the publishers of a ViT's flavour evaluate; resampling, mean and deviation are the
    folder's, if it notes them."""
    c = model.config
    side = c.image_size
    preprocess = _evaluation(c.flavour.resize, (side, side) if isinstance(side, int) else side)
    transformers = optional_json(path / "preprocessor_config.json")
    timm = optional_json(path / "config.json").get("pretrained_cfg", {})
    if "resample" in transformers:
        preprocess = replace(preprocess, resample=Image.Resampling(transformers["resample"]))
    if "interpolation" in timm:
        resample = Image.Resampling[timm["interpolation"].upper()]
        preprocess = replace(preprocess, resample=resample, crop=timm.get("crop_pct", preprocess.crop))
    if transformers.get("do_normalize") is False:
        return replace(preprocess, mean=(0.0,) * 3, std=(1.0,) * 3)
    mean = transformers.get("image_mean") or timm.get("mean") or preprocess.mean
    std = transformers.get("image_std") or timm.get("std") or preprocess.std
    return replace(preprocess, mean=tuple(mean), std=tuple(std))


def _evaluation(resize: Resize, size: tuple[int, int]) -> Preprocess:
    """By the rule for resizing positions, in which the publications differ."""
    if resize == "linear_aligned":  # the authors: tf.image.resize, which does not smooth
        return Preprocess(size, Image.Resampling.BILINEAR, antialias=False)
    if resize == "bicubic_antialias":  # timm; its files at 384 px are evaluated without a margin
        return Preprocess(size, Image.Resampling.BICUBIC, crop=0.9 if min(size) < 384 else 1.0)
    return Preprocess(size, Image.Resampling.BILINEAR)  # transformers
