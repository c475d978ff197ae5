"""The style judge: a small CNN that tells the icon styles apart, trained on real icons, independent of our CLIP.

It is the ruler of `condit evaluate`, no part of a model. To train it: `python -m condit_lab.suites.judge --icons DIR`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from condit.data.files import atomic_write
from condit.weights.files import load_strict, read_metadata, read_tensors, save_tensors
from condit_lab.icons.world import Icon, IconWorld, hash_fraction, on_white

log = logging.getLogger(__name__)

SIDE, INK_SIDE = 64, 58
JUDGE = Path(__file__).parent.parent / "assets" / "judge"
WEIGHTS = "judge.safetensors"
_NEVER_TRAINED_SHARE = 0.5

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
        x = torch.einsum("dc,bchw->bdhw", _YCC.to(images), images)
        moments = []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number >= 2:
                flat = x.flatten(2).float()
                moments += [flat.mean(2), flat.std(2)]
            x = F.max_pool2d(x, 2)
        return torch.cat(moments, 1)

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


def is_for_judge(icon: Icon) -> bool:
    """Whether the judge learned from this icon: the training split, and half the concepts of the never-trained style.
    The suite draws its references and targets of that style from the other half."""
    if icon.split == "style":
        return hash_fraction(f"judge/{icon.base}") < _NEVER_TRAINED_SHARE
    return icon.split == "train"


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


def read_framed(world: IconWorld) -> Tensor:
    """Every icon of the world as the judge sees it, (N, 64, 64, 3) uint8."""
    return torch.stack([torch.from_numpy(frame(on_white(world.rgba(i)))) for i in range(len(world))])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, scale, a little blur and noise: a style is none of these, and a decoder adds the last two. No mirror
    image: the side of the light is style."""
    count = len(images)
    scale = torch.empty(count).uniform_(0.95, 1.25, generator=generator)
    shift = torch.empty(count, 2).uniform_(-0.1, 0.1, generator=generator)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    blur = torch.empty(count, 1, 1, 1).uniform_(-0.5, 0.6, generator=generator).clamp(min=0)
    moved = torch.lerp(moved, F.avg_pool2d(moved, 3, 1, 1), blur)
    return moved + 0.02 * torch.randn(moved.shape, generator=generator)


def train(
    icons: str | Path,
    *,
    licences: Sequence[str] | None = None,
    steps: int = 3000,
    batch: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
) -> tuple[Judge, dict]:
    """A judge and its card. licences None = every style of the world, the share-alike ones too."""
    start = time.perf_counter()
    world = IconWorld.open(icons, licences=licences)
    styles = sorted({icon.style for icon in world.icons})
    framed, truth = read_framed(world), torch.tensor([styles.index(icon.style) for icon in world.icons])
    mine = torch.tensor([i for i, icon in enumerate(world.icons) if is_for_judge(icon)])
    if len(mine) < batch:
        raise ValueError(
            f"{icons} has {len(mine)} icons to train the judge on. It needs at least {batch}, better thousands."
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # module initialisation has no generator of its own
        judge = Judge(styles).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.15)
    for step in range(steps):
        chosen = mine[torch.randint(len(mine), (batch,), generator=generator)]
        images = augment(to_input(framed[chosen]), generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(images)
        loss = F.cross_entropy(logits.float(), truth[chosen], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            log.info("step %d of %d, loss %.3f, %.0f s", step, steps, float(loss.detach()), time.perf_counter() - start)
    card = {
        "what": "Style judge of condit evaluate: a ruler, no part of any model.",
        "data": f"{len(mine)} real icons: the training split, and half the concepts of the never-trained style",
        "licences": sorted({world.icons[i].licence for i in mine.tolist()}),
        "styles": styles,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "parameters": sum(p.numel() for p in judge.parameters()),
        "seconds": round(time.perf_counter() - start),
        "held_out": examine(judge.eval(), world.icons, framed, truth),
        "command": "python -m condit_lab.suites.judge --icons DIR",
    }
    return judge, card


def examine(judge: Judge, icons: Sequence[Icon], framed: Tensor, truth: Tensor) -> dict:
    """Accuracy on real icons that the judge has not seen: held-out concepts of every style, and of the never-trained
    style every icon that was kept from it. `confusion[i][j]`: share of style i taken for style j."""
    chosen = torch.tensor(
        [
            i
            for i, icon in enumerate(icons)
            if "concept" in icon.split or (icon.split == "style" and not is_for_judge(icon))
        ]
    )
    with torch.no_grad():
        said = torch.cat([judge(to_input(part)).argmax(1) for part in framed[chosen].split(256)])
    counts = torch.zeros(len(judge.styles), len(judge.styles))
    counts.index_put_((truth[chosen], said), torch.ones(len(said)), accumulate=True)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return {
        "icons": len(chosen),
        "accuracy": round(float((said == truth[chosen]).float().mean()), 4),
        "by_style": {name: round(float(shares[i, i]), 3) for i, name in enumerate(judge.styles)},
        "confusion": [[round(x, 3) for x in row] for row in shares.tolist()],
    }


def save(judge: Judge, card: dict, folder: Path) -> None:
    """Weights in fp16 and the card."""
    tensors = {name: x.half() if x.is_floating_point() else x for name, x in judge.state_dict().items()}
    save_tensors(folder / WEIGHTS, tensors, {"styles": judge.styles})
    text = json.dumps(card, indent=1)
    atomic_write(folder / "card.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m condit_lab.suites.judge", description="Train the style judge.")
    parser.add_argument("--icons", type=Path, required=True, help="icon world made by `condit data icons`")
    parser.add_argument("--out", type=Path, default=JUDGE, help="folder of the weights and the card")
    parser.add_argument("--licences", nargs="*", help="SPDX names; without it every style")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    judge, card = train(given.icons, licences=given.licences, steps=given.steps, seed=given.seed)
    save(judge, card, given.out)
    log.info("%s: %.3f on real held-out icons", given.out, card["held_out"]["accuracy"])


if __name__ == "__main__":
    main()
