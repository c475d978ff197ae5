"""Image classification by ViT (arXiv:2010.11929), and its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from condit.backbones.vit import Features
from condit.data.images import ImageSource, load_image
from condit.weights.class_models import ClassifierParts, Preprocess


@dataclass(frozen=True)
class Prediction:
    """A class of an image and its probability."""

    label: str
    index: int
    probability: float


class ViTPipeline:
    """A loaded ViT with its class names and the preprocessing that it was trained on."""

    def __init__(self, parts: ClassifierParts):
        self.parts = parts
        self.name, self.model, self.labels = parts.name, parts.model, parts.labels

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> ViTPipeline:
        """Move the model, in place; returns the pipeline."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def classify(self, images: ImageSource | Sequence[ImageSource], *, top_k: int = 5) -> list[list[Prediction]]:
        """For every image its `top_k` most probable classes, in order; a single image is a list of one."""
        if not self.model.config.classes or self.model.config.classifier == "unpooled":
            raise ValueError(f"{self.name} has no head for one class per image. Use features().")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1; found {top_k}.")
        probabilities = self.model(self.preprocess(images)).float().softmax(-1).cpu()
        values, indices = probabilities.topk(min(top_k, probabilities.shape[-1]))
        return [
            [Prediction(self.label(i), i, p) for i, p in zip(row, values[n].tolist(), strict=True)]
            for n, row in enumerate(indices.tolist())
        ]

    @torch.no_grad()
    def features(self, images: ImageSource | Sequence[ImageSource]) -> Features:
        """Tokens after the last norm: patches (B, rows * columns, D) row by row, and the class token (B, D)."""
        return self.model.features(self.preprocess(images))

    def label(self, index: int) -> str:
        """The name of a class; its number where it has none."""
        return str(index) if self.labels is None else self.labels.label(index)

    def preprocess(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """(B, 3, H, W) at the model's size, as its publisher evaluates, on the model's device."""
        if self.model.config.in_channels != 3:
            raise ValueError(f"{self.name} needs {self.model.config.in_channels} channels; images have 3.")
        sources = cast("list[ImageSource]", list(images) if isinstance(images, list | tuple) else [images])
        if not sources:
            raise ValueError("No image in the list; give at least one.")
        batch = torch.stack([prepare(load_image(source), self.parts.preprocess) for source in sources])
        return batch.to(self.device, self.dtype)


def prepare(image: Image.Image, how: Preprocess) -> Tensor:
    """An RGB image as (3, H, W) float32, normalised."""
    height, width = how.size
    if how.crop is not None:
        image = _middle(image, how)
    elif how.antialias and image.size != (width, height):
        image = image.resize((width, height), how.resample)
    x = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
    if x.shape[1:] != how.size:  # tf.image.resize neither smooths nor rounds; Pillow would do both
        x = F.interpolate(x[None], how.size, mode="bilinear", align_corners=False)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (how.mean, how.std))
    return (x / 255 - mean) / std


def _middle(image: Image.Image, how: Preprocess) -> Image.Image:
    """timm's evaluation: sides scaled to cover size / crop, then the middle."""
    height, width = how.size
    tall, wide = (floor(side / (how.crop or 1.0)) for side in how.size)
    if tall * image.width >= wide * image.height:
        wide = int(tall * image.width / image.height)
    else:
        tall = int(wide * image.height / image.width)
    left, top = round((wide - width) / 2), round((tall - height) / 2)
    scaled = image if image.size == (wide, tall) else image.resize((wide, tall), how.resample)
    return scaled.crop((left, top, left + width, top + height))
