"""Image encoders: images -> features for image prompts. Text towers in the same space are here too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from condit.encoders.clip import embed_image, embed_text, style_statistics, token_ids
from condit.encoders.clip_model import Clip
from condit.encoders.clip_patches import ClipPatches, TowerSizes
from condit.encoders.clip_tokenizer import ClipTokenizer
from condit.encoders.pickling import picklable_state
from condit.encoders.prompts import warn_cut

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, PreTrainedTokenizerBase


class ImageEncoder(Protocol):
    """Images (B, 3, H, W) in [-1, 1] -> features (B, features), for an adapter's image prompt."""

    features: int

    def __call__(self, images: Tensor) -> Tensor: ...


class TinyImage(nn.Module):
    """The embedded CLIP's image tower: its embedding (256) and the statistics of two middle layers (768).

    states: width of the output of `hidden`."""

    features = 256 + 768
    embedding = slice(0, 256)  # the part in the space of the text tower
    gain = 11.3  # scales that part, whose halves have unit length, to about unit variance

    def __init__(self, clip: Clip):
        super().__init__()
        self.clip = clip
        vision = clip.config.vision_config
        self.size, self.states = vision.image_size, vision.hidden_size

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, 1024)."""
        hidden, embedding = embed_image(self.clip, self._sized(images))
        return torch.cat([embedding.float() * self.gain, style_statistics(hidden)], -1)

    @torch.no_grad()
    def hidden(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> the states of the last layer but one (B, 65, 192), as in `CLIPImage`."""
        return self.clip.vision_model(self._sized(images)).hidden_states[-2].float()

    def zeros(self) -> Tensor:
        """An image of zeros, which is gray: the empty reference for adapters that read hidden states."""
        return torch.zeros(1, 3, self.size, self.size, device=self.clip.device)

    def _sized(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True)
        return images.clamp(-1, 1)

    def patches(self) -> ClipPatches:
        """All tokens of the same tower, for Q-Formers; pixels stay in [-1, 1]."""
        return ClipPatches(self.clip.vision_model, mean=(0.5,) * 3, std=(0.5,) * 3)


class TinyTextTower(nn.Module):
    """The embedded CLIP's text tower: phrases -> vectors in the space of `TinyImage`'s features. The part for the
    statistics of middle layers is 0."""

    def __init__(self, image: TinyImage, tokenizer: ClipTokenizer):
        super().__init__()
        self.image, self.tokenizer = image, tokenizer

    @torch.no_grad()
    def forward(self, phrases: Sequence[str]) -> Tensor:
        """Phrases -> (n, 1024)."""
        clip = self.image.clip
        words = embed_text(clip, token_ids(self.tokenizer, list(phrases)).to(clip.device))[1].float()
        return F.pad(words * self.image.gain, (0, self.image.features - words.shape[-1]))


# CLIP's image towers of published adapters

Fit = Literal["crop", "squash", "pad"]


@dataclass(frozen=True)
class EncoderSize:
    """Sizes of a CLIP image tower: width of its states and of its embeddings, number of tokens, side in pixels."""

    hidden: int
    projection: int
    tokens: int
    side: int

    def describe(self) -> str:
        """ "CLIP ViT-H/14 (hidden states 1280, image embeddings 1024)"."""
        names = [name for name, widths in TOWERS.items() if widths == (self.hidden, self.projection)]
        name = f"CLIP {names[0]}" if names else "a CLIP"
        return f"{name} (hidden states {self.hidden}, image embeddings {self.projection})"


# name -> width of the hidden states, width of the image embeddings
TOWERS: dict[str, tuple[int, int]] = {
    "ViT-H/14": (1280, 1024),  # laion/CLIP-ViT-H-14-laion2B-s32B-b79K; h94/IP-Adapter models/image_encoder
    "ViT-bigG/14": (1664, 1280),  # laion/CLIP-ViT-bigG-14-laion2B-39B-b160k; sdxl_models/image_encoder
    "ViT-L/14": (1024, 768),  # openai/clip-vit-large-patch14; XLabs' FLUX adapters
}


def encoders_of(width: int, what: Literal["hidden", "projection"]) -> str:
    """The known towers with this width: "ViT-H/14 (1024-d embeddings, 1280-d hidden states)"."""
    index = 0 if what == "hidden" else 1
    names = [n for n, widths in TOWERS.items() if widths[index] == width]
    return ", ".join(f"{n} ({TOWERS[n][1]}-d embeddings, {TOWERS[n][0]}-d hidden states)" for n in names)


class CLIPImage(nn.Module):
    """A CLIP image tower with projection, and its preprocessing."""

    def __init__(self, model: CLIPVisionModelWithProjection):
        super().__init__()
        self.model = model
        c = cast("TowerSizes", model.config)
        self.size = EncoderSize(c.hidden_size, c.projection_dim, (c.image_size // c.patch_size) ** 2 + 1, c.image_size)

    __getstate__ = picklable_state

    @property
    def features(self) -> int:
        """Width of the embeddings."""
        return self.size.projection

    @property
    def states(self) -> int:
        """Width of the output of `hidden`."""
        return self.size.hidden

    def pixels(self, images: Sequence[Image.Image], fit: Fit = "crop") -> Tensor:
        """RGB images -> (n, 3, S, S), normalised. crop: the shortest edge to S, bicubic, then the centre, as published;
        squash: the whole image; pad: the whole image on black. Raises ValueError for another fit."""
        from transformers import CLIPImageProcessorPil

        s = self.size.side
        if fit not in ("crop", "squash", "pad"):
            raise ValueError(f"fit must be 'crop', 'squash' or 'pad'; found {fit!r}.")
        if fit == "squash":
            images = [image.resize((s, s), Image.Resampling.BICUBIC) for image in images]
        if fit == "pad":
            images = [ImageOps.pad(image, (s, s), Image.Resampling.BICUBIC) for image in images]
        processor = CLIPImageProcessorPil(size={"shortest_edge": s}, crop_size={"height": s, "width": s})
        return processor(list(images), return_tensors="pt")["pixel_values"]

    def zeros(self) -> Tensor:
        """Zeros after normalisation, an image of CLIP's mean colour (1, 3, S, S): the empty reference for adapters that
        read hidden states."""
        return torch.zeros(1, 3, self.size.side, self.size.side)

    def black(self) -> Tensor:
        """A black image (1, 3, S, S): the empty reference for FLUX's adapters."""
        return self.pixels([Image.new("RGB", (self.size.side, self.size.side))])

    @torch.no_grad()
    def embeds(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) -> projected embeddings (n, E), not normalised."""
        return self.model(self._moved(pixels)).image_embeds

    @torch.no_grad()
    def hidden(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) -> states of the last layer but one (n, L, H), without the final norm."""
        return self.model(self._moved(pixels), output_hidden_states=True).hidden_states[-2]

    def _moved(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.model.device, self.model.dtype)


# Text tower trained with each image tower of `TOWERS`: width of the states, width of the projected embeddings.
TEXT_TWINS: dict[str, tuple[int, int]] = {
    "ViT-H/14": (1024, 1024),
    "ViT-bigG/14": (1280, 1280),  # SDXL's second text encoder
    "ViT-L/14": (768, 768),  # Stable Diffusion 1.x has it without its projection
}


class TextTower(nn.Module):
    """A CLIP text tower with projection: phrases -> vectors in the space of its image tower's embeddings."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.model, self.tokenizer = cast("CLIPTextModelWithProjection", model), tokenizer
        c = cast("TowerSizes", model.config)
        self.hidden, self.projection = c.hidden_size, c.projection_dim

    __getstate__ = picklable_state

    @torch.no_grad()
    def forward(self, phrases: Sequence[str]) -> Tensor:
        """Phrases -> embeddings (n, E), not normalised. Phrases are truncated and padded; padding has no effect on the
        tokens before it."""
        limit = self.tokenizer.model_max_length
        warn_cut(self.tokenizer, phrases, limit)
        batch = self.tokenizer(
            list(phrases), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        return self.model(batch["input_ids"].to(self.model.device)).text_embeds

    def check_twin(self, size: EncoderSize) -> None:
        """ValueError unless this text tower was trained with an image tower of this size."""
        widths = self.hidden, self.projection
        expected = [TEXT_TWINS[name] for name, tower in TOWERS.items() if tower == (size.hidden, size.projection)]
        if self.projection != size.projection or any(twin != widths for twin in expected):
            names = [name for name, twin in TEXT_TWINS.items() if twin == widths]
            name = f"CLIP {names[0]}" if names else "a CLIP"
            raise ValueError(
                f"The text tower is {name} (states {self.hidden}, embeddings {self.projection}); the adapter's image "
                f"tower is {size.describe()}. Words can be subtracted only with the text tower of the same CLIP."
            )
