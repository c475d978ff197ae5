"""Icons with captions: what every text-to-image task trains on, validates on and shows."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from condit.data.images import to_images
from condit.data.sheets import contact_sheet
from condit_lab.icons.captions import plain_caption
from condit_lab.icons.procedural import Procedural
from condit_lab.icons.world import GROUPS, TRAIN_LICENCES
from condit_lab.training.clip import procedural_caption
from condit_lab.training.icon_batches import IconSet, procedural


@dataclass
class Captioned:
    images: Tensor  # (B, 3, H, W)
    captions: list[str]


@dataclass
class CaptionedIcons:
    """Icons to train on and held-out combinations of concept and style; `ui`: icons of interfaces, a share of each
    batch; `procedural_share` of it is redrawn in random procedural styles."""

    icons: IconSet
    held_out: IconSet
    ui: IconSet | None
    ui_share: float
    procedural_share: float

    @classmethod
    def open(
        cls, icons: str, ui: str | None = None, *, ui_share: float = 0.1, procedural_share: float = 0.25
    ) -> CaptionedIcons:
        train, held_out = (
            IconSet.open(icons, splits=(split,), groups=GROUPS, licences=TRAIN_LICENCES) for split in ("train", "combo")
        )
        more = IconSet.open(ui, splits=("train",)) if ui else None
        return cls(train, held_out, more, ui_share if ui else 0.0, procedural_share)

    def batch(self, rng: random.Random, size: int) -> Captioned:
        images, captions = [], []
        for _ in range(int(size * self.ui_share)):
            assert self.ui is not None
            i = rng.randrange(len(self.ui))
            images.append(self.ui.images([i]))
            captions.append(self.ui.caption(rng, i, p_no_style=0.1))
        for _ in range(int(size * self.procedural_share)):
            i, style = rng.randrange(len(self.icons)), Procedural.sample(rng)
            images.append(procedural(style, self.icons.rgba[[i]]))
            captions.append(procedural_caption(self.icons, rng, i, style) if rng.random() > 0.1 else "")
        chosen = [rng.randrange(len(self.icons)) for _ in range(size - len(images))]
        images.append(self.icons.images(chosen))
        captions += [self.icons.caption(rng, i, p_no_style=0.15, p_tags=0.2) for i in chosen]
        return Captioned(torch.cat(images), captions)

    def examples(self, most: int = 192) -> Captioned:
        """Held-out combinations under their plain captions, the same ones each time."""
        chosen = random.Random(0).sample(range(len(self.held_out)), min(most, len(self.held_out)))
        captions = [plain_caption(self.held_out.icons[i]) for i in chosen]
        return Captioned(self.held_out.images(chosen), captions)

    def sheet(self, draw: Callable[[list[str]], list[Image.Image]]) -> Image.Image:
        """Words of users over four styles, and two rows of held-out combinations beside the real icon."""
        words = ["red apple", "rocket", "cat face", "house", "pizza", "guitar", "一朵花", "sunny beach"]
        styles = ["noto style", "fluent 3d style", "twemoji style", "fluent high contrast style"]
        rows = [draw([f"{w}, {s}" for w in words]) for s in styles]
        chosen = list(range(0, len(self.held_out), max(1, len(self.held_out) // 8)))[:8]
        rows.append(draw([plain_caption(self.held_out.icons[i]) for i in chosen]))
        rows.append(to_images(self.held_out.images(chosen)))
        return contact_sheet(rows, labels=[*styles, "held out", "real"])
