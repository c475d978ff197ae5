"""Image encoders behind one call: images -> a feature for image prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from condit.encoders.clip import embed_image, embed_text, style_statistics, token_ids
from condit.encoders.clip_model import Clip
from condit.encoders.clip_patches import ClipPatches
from condit.encoders.clip_tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection


class TinyImage(nn.Module):
    """The embedded CLIP's image tower: its embedding (256) beside the statistics of two middle layers (768).

    states: width of what `hidden` gives."""

    features = 256 + 768
    embedding = slice(0, 256)  # the part that shares a space with the text tower
    gain = 11.3  # of that part: its two halves of unit length become entries of about unit variance

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
        """Images (B, 3, H, W) in [-1, 1] -> the states of the last layer but one (B, 65, 192), as of `CLIPImage`."""
        return self.clip.vision_model(self._sized(images)).hidden_states[-2].float()

    def zeros(self) -> Tensor:
        """A picture of zeros, which is gray: no reference, behind a reader of hidden states."""
        return torch.zeros(1, 3, self.size, self.size, device=self.clip.device)

    def _sized(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True)
        return images.clamp(-1, 1)

    def patches(self) -> ClipPatches:
        """The same tower read token by token, for Q-Formers; it takes pixels in [-1, 1] as they are."""
        return ClipPatches(self.clip.vision_model, mean=(0.5,) * 3, std=(0.5,) * 3)


class TinyWords(nn.Module):
    """The embedded CLIP's text tower as the twin of its image tower: words -> vectors in the space of `TinyImage`'s
    features. The statistics of middle layers have no words, so there they are 0."""

    def __init__(self, image: TinyImage, tokenizer: ClipTokenizer):
        super().__init__()
        self.image, self.tokenizer = image, tokenizer

    @torch.no_grad()
    def forward(self, phrases: Sequence[str]) -> Tensor:
        """Phrases -> (n, 1024)."""
        clip = self.image.clip
        words = embed_text(clip, token_ids(self.tokenizer, list(phrases)).to(clip.device))[1].float()
        return F.pad(words * self.image.gain, (0, self.image.features - words.shape[-1]))


# CLIP's image towers, for published adapters

Fit = Literal["crop", "squash", "pad"]


@dataclass(frozen=True)
class EncoderSize:
    """Widths of a CLIP image tower: of its states, of the projected embedding; how many states; side in pixels."""

    hidden: int
    projection: int
    tokens: int
    side: int

    def describe(self) -> str:
        known = [
            n for n, (hidden, projection) in TOWERS.items() if (hidden, projection) == (self.hidden, self.projection)
        ]
        name = f"CLIP {known[0]}" if known else "a CLIP"
        return f"{name} (hidden states {self.hidden}, image embeddings {self.projection})"


# name -> width of the hidden states, of the image embeddings
TOWERS: dict[str, tuple[int, int]] = {
    "ViT-H/14": (1280, 1024),  # laion/CLIP-ViT-H-14-laion2B-s32B-b79K; h94/IP-Adapter models/image_encoder
    "ViT-bigG/14": (1664, 1280),  # laion/CLIP-ViT-bigG-14-laion2B-39B-b160k; sdxl_models/image_encoder
    "ViT-L/14": (1024, 768),  # openai/clip-vit-large-patch14; XLabs' FLUX adapters
}


def encoders_of(width: int, what: Literal["hidden", "projection"]) -> str:
    """The known towers with this width: "ViT-H/14 (1024-d embeddings, 1280-d hidden states)"."""
    place = 0 if what == "hidden" else 1
    found = [n for n, widths in TOWERS.items() if widths[place] == width]
    return ", ".join(f"{n} ({TOWERS[n][1]}-d embeddings, {TOWERS[n][0]}-d hidden states)" for n in found)


def vision_config(folder: str | Path) -> dict[str, Any]:
    """config.json of an image tower, or of a whole CLIP. ValueError for a folder without one, or of another model."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"no config.json in {folder}; expected the folder of a CLIP image encoder.")
    config = json.loads(file.read_text(encoding="utf-8"))
    inner = {**config.get("vision_config", config)}
    inner.setdefault("projection_dim", config.get("projection_dim", 512))
    if config.get("vision_config") is not None:
        inner["projection_dim"] = config.get("projection_dim", 512)
    if "clip" not in str(config.get("model_type", "clip")):
        raise ValueError(f"{folder} is a {config['model_type']}; expected a CLIP image encoder.")
    return inner


def encoder_size(folder: str | Path) -> EncoderSize:
    """Read off config.json, before any weight."""
    c = vision_config(folder)
    side, patch = c.get("image_size", 224), c.get("patch_size", 32)
    return EncoderSize(c.get("hidden_size", 768), c["projection_dim"], (side // patch) ** 2 + 1, side)


class CLIPImage(nn.Module):
    """A CLIP image tower with projection, and its preprocessing."""

    def __init__(self, model: CLIPVisionModelWithProjection):
        super().__init__()
        self.model = model
        c: Any = model.config
        self.size = EncoderSize(c.hidden_size, c.projection_dim, (c.image_size // c.patch_size) ** 2 + 1, c.image_size)

    @property
    def features(self) -> int:
        """Width of the embeddings."""
        return self.size.projection

    @property
    def states(self) -> int:
        """Width of what `hidden` gives."""
        return self.size.hidden

    def pixels(self, images: Sequence[Image.Image], fit: Fit = "crop") -> Tensor:
        """RGB pictures -> (n, 3, S, S), normalised. crop: the shortest edge to S, bicubic, and the middle, as
        published; squash: the whole picture; pad: the whole picture on black."""
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
        """A picture of zeros after normalising, of CLIP's mean colour (1, 3, S, S): no reference, behind a reader of
        hidden states."""
        return torch.zeros(1, 3, self.size.side, self.size.side)

    def black(self) -> Tensor:
        """A black picture (1, 3, S, S): no reference for FLUX's adapters."""
        return self.pixels([Image.new("RGB", (self.size.side, self.size.side))])

    @torch.no_grad()
    def embeds(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) -> projected embeddings (n, E), of their own length."""
        return self.model(self._moved(pixels)).image_embeds

    @torch.no_grad()
    def hidden(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) -> the states of the last layer but one (n, L, H), without the final norm."""
        return self.model(self._moved(pixels), output_hidden_states=True).hidden_states[-2]

    def _moved(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.model.device, self.model.dtype)


# The twin of an image tower, whose words share its space: width of the states, of the projected embedding.
TEXT_TWINS: dict[str, tuple[int, int]] = {
    "ViT-H/14": (1024, 1024),
    "ViT-bigG/14": (1280, 1280),  # SDXL's second text encoder
    "ViT-L/14": (768, 768),  # Stable Diffusion 1.x has it without its projection
}


class TextTower(nn.Module):
    """A CLIP text tower with projection: words -> vectors in the space of its image tower's embeddings."""

    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        c: Any = model.config
        self.hidden, self.projection = c.hidden_size, c.projection_dim

    @torch.no_grad()
    def forward(self, phrases: Sequence[str]) -> Tensor:
        """Phrases -> embeddings (n, E), of their own length; cut and padded, which changes nothing before the end."""
        read = {"padding": "max_length", "max_length": self.tokenizer.model_max_length, "truncation": True}
        batch = self.tokenizer(list(phrases), return_tensors="pt", **read)
        return self.model(batch.input_ids.to(self.model.device)).text_embeds  # type: ignore[operator,arg-type]

    def check_twin(self, size: EncoderSize) -> None:
        """ValueError unless it was trained together with an image tower of this size."""
        known = [n for n, widths in TOWERS.items() if widths == (size.hidden, size.projection)]
        wrong = self.projection != size.projection or any(
            TEXT_TWINS[n] != (self.hidden, self.projection) for n in known
        )
        if wrong:
            ours = [n for n, widths in TEXT_TWINS.items() if widths == (self.hidden, self.projection)]
            name = f"CLIP {ours[0]}" if ours else "a CLIP"
            raise ValueError(
                f"The text tower is {name} (states {self.hidden}, embeddings {self.projection}); the adapter's image "
                f"tower is {size.describe()}. Words can be subtracted only in the space of its own twin."
            )
