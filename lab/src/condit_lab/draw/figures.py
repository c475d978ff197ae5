"""What a run measures on the way: velocity errors on fixed drawings under fixed noise, and sheets of samples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from condit.data.images import to_images
from condit.data.sheets import contact_sheet
from condit.diffusion.objectives import add_noise, flow_loss
from condit_lab.draw.code import on_white, to_planes
from condit_lab.draw.data import Drawings
from condit_lab.draw.model import DrawModel

LEVELS = (0.2, 0.5, 0.7, 0.9, 1.0)
WRONG_WORDS = 0.9  # the level at which another icon's words are tried
SAMPLE = 192
CHUNK = 32
WORDS = ("red apple", "rocket", "cat", "house", "pizza", "bicycle", "coffee", "一棵树")
STYLES = ("noto style", "fluent 3d style", "twemoji style", "fluent high contrast style")


@dataclass(frozen=True)
class Probe:
    """Fixed drawings: planes (n, 4, H, W) and the ids of their plain captions."""

    name: str
    planes: Tensor
    ids: Tensor


def make_probes(model: DrawModel, drawings: Drawings, *, sample: int = SAMPLE) -> list[Probe]:
    """Of the core icons that are trained on ("train") and held out ("held"), and trained ones outside it ("world")."""
    wanted = {
        "train": [i for i, r in enumerate(drawings.rows) if r.split == "train" and r.core],
        "held": [i for i, r in enumerate(drawings.rows) if r.split == "held-out" and r.core],
        "world": [i for i, r in enumerate(drawings.rows) if r.split == "train" and not r.core],
    }
    probes = []
    for name, rows in wanted.items():
        chosen = random.Random(0).sample(rows, min(sample, len(rows)))
        if chosen:
            ids = model.text.ids([drawings.rows[i].captions[0] for i in chosen])
            probes.append(Probe(name, to_planes(drawings.rgba(chosen)), ids))
    return probes


@torch.no_grad()
def errors(model: DrawModel, probes: Sequence[Probe]) -> dict[str, float]:
    """`NAME_error_T` of the velocity, `NAME_wrong_words_0.9`: its rise in % with another icon's words, and
    `NAME_share_T`: the error in units of `RgbaCode.blind_error`."""
    device, figures = model.ids.device, {}
    for probe in probes:
        x0 = torch.cat([model.code.encode(p.to(device)) for p in probe.planes.split(CHUNK)])
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(device)
        ids = probe.ids.to(device)
        for level in LEVELS:
            right = velocity_error(model, x0, noise, ids, level)
            figures[f"{probe.name}_error_{level}"] = round(right, 4)
            figures[f"{probe.name}_share_{level}"] = round(right / model.code.blind_error(level), 4)
            if level == WRONG_WORDS:
                wrong = velocity_error(model, x0, noise, ids.roll(7, 0), level)
                figures[f"{probe.name}_wrong_words_{level}"] = round(100 * (wrong / right - 1), 1)
    return figures


def velocity_error(model: DrawModel, x0: Tensor, noise: Tensor, ids: Tensor, level: float) -> float:
    errors = []
    for x, e, words in zip(x0.split(CHUNK), noise.split(CHUNK), ids.split(CHUNK), strict=True):
        t = torch.full((len(x),), level, device=x.device)
        errors.append(flow_loss(model.predict(add_noise(x, e, t), t, model.text(words)), x, e, t, "x"))
    return float(torch.cat(errors).mean())


def draw(
    model: DrawModel, prompts: Sequence[str], *, steps: int = 20, guidance: float = 3.0, shift: float = 2.5, seed=0
) -> Tensor:
    """Planes (B, 4, 128, 128), in chunks."""
    device, ids, empty = model.ids.device, model.text.ids(list(prompts)), model.text.ids([""])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps + 1, len(ids), len(model.ids), 4 * model.config.components, generator=generator)
    parts = [
        model.draw(i.to(device), n.to(device), empty=empty.to(device), steps=steps, guidance=guidance, shift=shift)
        for i, n in zip(ids.split(CHUNK), noise.split(CHUNK, 1), strict=True)
    ]
    return torch.cat(parts).cpu()


def sheet(model: DrawModel, drawings: Drawings) -> Image.Image:
    """Everyday words in four styles; held-out and trained drawings drawn from their captions, beside the real ones."""
    prompts = [f"{word}, {style}" for style in STYLES for word in WORDS]
    drawn = to_images(on_white(draw(model, prompts)))
    rows = [drawn[i : i + len(WORDS)] for i in range(0, len(drawn), len(WORDS))]
    labels = list(STYLES)
    for split in ("held-out", "train"):
        some = [i for i, row in enumerate(drawings.rows) if row.split == split]
        chosen = random.Random(1).sample(some, min(len(WORDS), len(some)))
        if chosen:
            rows.append(to_images(on_white(draw(model, [drawings.rows[i].captions[0] for i in chosen]))))
            rows.append(to_images(on_white(to_planes(drawings.rgba(chosen)))))
            labels += [f"{split}, drawn", f"{split}, real"]
    return contact_sheet(rows, labels=labels)
