"""Pairs, a random FLUX.1 and small tasks for the training of OminiControl."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from condit.backbones.mmdit import MMDiTConfig
from condit.training.omini import OminiTask
from condit.training.omini_data import OminiData

SIZE = 16, 24  # 4 x 6 cells of 4 pixels
WORDS = ["a red fox in the snow", "snow", "a fox", "the red snow", "red", "a snow fox"]


def write_pairs(folder: Path, count: int = 6) -> Path:
    """Pictures of coloured rectangles, a reference of role "subject" beside each."""
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        for name in ("t", "s"):
            small = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
            Image.fromarray(small.repeat(4, 0).repeat(4, 1)).save(folder / f"{name}{i}.png")
        text = WORDS[i % len(WORDS)]
        rows.append({"file_name": f"t{i}.png", "subject_file_name": f"s{i}.png", "text": text})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_flux(make_flux: Callable, folder: Path) -> str:
    """A random FLUX.1 in the layout of diffusers."""
    config = MMDiTConfig(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = make_flux(config, dynamic=True)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    pipe.save_pretrained(folder)
    return str(folder)


SUBJECT = {"role": "subject", "delta": [0, -6]}
GRAY = {"role": "target", "annotator": "gray"}


def make(flux: str, pairs: str, *conditions: dict, **how) -> OminiTask:
    torch.manual_seed(0)
    given = {"height": 16, "width": 24, "text_tokens": 8, "held_out": 2, "draw": 0, "dtype": "float32"}
    return OminiTask(
        OminiData(**{"model": flux, "pairs": pairs, "conditions": conditions or (SUBJECT,), **given, **how})
    )


def shake(task: OminiTask) -> OminiTask:
    """Adapters that do something."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in task.model.adapters.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return task
