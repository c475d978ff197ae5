"""The best of several images of one prompt, by the embedded CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from condit.data.images import ImageSource, to_tensor
from condit.encoders.clip import CONCEPT, STYLE, embed_image, embed_text, token_ids
from condit.weights.catalog import MODELS
from condit.weights.tiny import load_clip


@torch.no_grad()
def scores(images: Sequence[Image.Image], prompt: str, styles: Sequence[ImageSource] = ()) -> Tensor:
    """How well images fit their prompt, (n,) in [-2, 2]: the cosine of image and prompt in the concept part of the
    embedded CLIP's space, plus that of their style parts; with style references, that of image and references.

    It ranks images of one prompt. It is not a measure of quality: the embedded models were conditioned on this CLIP.
    """
    clip, tokenizer = load_clip(MODELS["tiny"].path / "clip")
    side = clip.config.vision_config.image_size

    def embedded(sources: Sequence[ImageSource]) -> Tensor:
        return embed_image(clip, torch.stack([to_tensor(source, side, fit="pad") for source in sources]))[1]

    text = embed_text(clip, token_ids(tokenizer, [prompt]))[1]
    style = embedded(styles).mean(0, keepdim=True) if styles else text
    drawn = embedded(images)
    return (drawn[:, CONCEPT] * text[:, CONCEPT]).sum(-1) + (drawn[:, STYLE] * style[:, STYLE]).sum(-1)


def best(images: Sequence[Image.Image], prompt: str, count: int, styles: Sequence[ImageSource] = ()) -> list[int]:
    """The numbers of the `count` images with the highest `scores`, best first. ValueError for a count of more images
    than there are."""
    if not 1 <= count <= len(images):
        raise ValueError(f"count is {count}; expected 1 to {len(images)}, the number of images.")
    return scores(images, prompt, styles).argsort(descending=True, stable=True)[:count].tolist()
