"""The style judge: a small CNN that tells icon styles apart. A ruler, no part of any model.

The laboratory trains it (`python -m condit_lab.suites.judge --icons DIR`) on real icons, apart from the embedded CLIP.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from condit.weights.files import load_strict, read_metadata, read_tensors

SIDE, INK_SIDE = 64, 58
JUDGE = Path(__file__).parent.parent / "assets" / "judge"
WEIGHTS = "judge.safetensors"

# Luma and two colour differences (ITU-R 601): the styles differ in line and in palette, so both stand apart.
_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])


class Judge(nn.Module):
    """Four convolution stages on 64 px; mean and deviation of the last two, so that places in it count little."""

    def __init__(self, styles: Sequence[str], widths: tuple[int, int, int, int] = (32, 64, 128, 160)):
        super().__init__()
        self.styles = list(styles)
        inputs = (3, *widths[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.SiLU())
            for i, o in zip(inputs, widths, strict=True)
        )
        self.head = nn.Linear(2 * (widths[-1] + widths[-2]), len(self.styles))

    def forward(self, images: Tensor) -> Tensor:
        """Framed images (B, 3, 64, 64), 0 = white to 1 = no light -> logits (B, styles)."""
        return self.head(self.statistics(images).to(self.head.weight.dtype))

    def statistics(self, images: Tensor) -> Tensor:
        """What the head sees: means and deviations of the last two stages, (B, 3, 64, 64) -> (B, 448)."""
        flat = [x.flatten(2).float() for x in self.maps(images)[2:]]
        return torch.cat([y for x in flat for y in (x.mean(2), x.std(2))], 1)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Outputs of the four stages, (B, 3, 64, 64) -> (B, C, 64, 64) to (B, C', 8, 8)."""
        x = torch.einsum("dc,bchw->bdhw", _YCC.to(images), images)
        maps: list[Tensor] = []
        for stage in self.stages:
            maps.append(stage(F.max_pool2d(maps[-1], 2) if maps else x))
        return maps

    @torch.no_grad()
    def probabilities(self, images: Tensor, among: Collection[str] | None = None, batch: int = 256) -> Tensor:
        """Pictures (B, 3, H, W) uint8 on white -> (B, styles), rows sum to 1. among: styles that may be answers."""
        return self.choose(self.head(self.features(images, batch)), among)

    @torch.no_grad()
    def features(self, images: Tensor, batch: int = 256) -> Tensor:
        """Pictures (B, 3, H, W) uint8 on white -> (B, 448): how they are drawn, whatever the styles are called."""
        return torch.cat([self.statistics(to_input(part)).float() for part in _framed(images).split(batch)])

    def choose(self, logits: Tensor, among: Collection[str] | None = None) -> Tensor:
        """Logits (B, styles) -> probabilities; styles that are not among the answers have none."""
        closed = torch.tensor([among is not None and style not in among for style in self.styles])
        return logits.float().masked_fill(closed, -torch.inf).softmax(1)


def _framed(images: Tensor) -> Tensor:
    return torch.stack([torch.from_numpy(frame(x)) for x in images.permute(0, 2, 3, 1).numpy()])


def frame(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture on white (H, W, 3) with its ink scaled to 90 % of 64 px, (64, 64, 3): framing cannot tell the style.

    Found from the pixels, not from alpha, so that drawn and real pictures go the same way."""
    ink = 255 - rgb.min(-1) > 24  # fainter than a tenth is the decoder's noise
    # A row needs two pixels: one speck must not move the frame.
    rows, columns = np.flatnonzero(ink.sum(1) > 1), np.flatnonzero(ink.sum(0) > 1)
    picture = Image.fromarray(rgb)
    if rows.size and columns.size:
        picture = picture.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    scale = INK_SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(picture.resize(size, Image.Resampling.LANCZOS), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return np.array(canvas)


def to_input(framed: Tensor) -> Tensor:
    """uint8 (B, 64, 64, 3) -> (B, 3, 64, 64); white becomes 0, as the convolutions' padding is."""
    return (255 - framed.permute(0, 3, 1, 2).float()) / 255


def load_judge(folder: str | Path = JUDGE) -> Judge:
    """The committed judge, or one trained by `train`."""
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        raise ValueError(f"There is no judge at {file}. Train one: python -m condit_lab.suites.judge --icons DIR.")
    judge = Judge(json.loads(read_metadata(file)["styles"]))
    tensors = {name: x.float() if x.is_floating_point() else x for name, x in read_tensors(file).items()}
    load_strict(judge, tensors, source=file)
    return judge.eval().requires_grad_(False)


def read_card(folder: str | Path = JUDGE) -> dict:
    """What the judge was trained on, and its accuracy and confusion on real icons that it has not seen."""
    return json.loads((Path(folder) / "card.json").read_text(encoding="utf-8"))
