"""Training of the style judge (`condit.rulers.judge`): `python -m condit_lab.suites.judge --icons DIR`."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from condit.data.files import atomic_write
from condit.rulers.judge import JUDGE, WEIGHTS, Judge, frame, to_input
from condit.weights.files import save_tensors
from condit_lab.icons.world import Icon, IconWorld, hash_fraction, on_white

log = logging.getLogger(__name__)

_NEVER_TRAINED_SHARE = 0.5


def is_for_judge(icon: Icon) -> bool:
    """Whether the judge learned from this icon: the training split, and half the concepts of the never-trained style.
    The suite draws its references and targets of that style from the other half."""
    if icon.split == "style":
        return hash_fraction(f"judge/{icon.base}") < _NEVER_TRAINED_SHARE
    return icon.split == "train"


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
