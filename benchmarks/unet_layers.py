"""Which layers of the embedded UNet do the work: error on held-out icons without what a part adds, against all parts.

    python benchmarks/unet_layers.py --icons data/icons [--model FOLDER] [--count 96] [--share 0.9]

Of a block: what its resnets and transformers add to what passes by. Of a layer of cross-attention: what the words say
through it. The rise of the error in %, with the interval over icons.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from trials import keep

from condit.backbones.unet import Resnet, Transformer, UNet
from condit.controls.control import Control
from condit.rulers.statistics import Interval, ratio
from condit.training.denoising import errors, latents_of, load_base
from condit.weights.latent_models import LatentParts
from condit_lab.training.captioned import CaptionedIcons
from condit_lab.training.unet import Silence


@dataclass(frozen=True)
class Held:
    """Noised icons and their words."""

    x0: Tensor  # (B, C, h, w)
    noise: Tensor
    t: Tensor  # (B,)
    captions: list[str]


def held_out(parts: LatentParts, icons: str, count: int, share: float) -> Held:
    """share: of the schedule, 0 to 1; the same timestep for all."""
    examples = CaptionedIcons.open(icons, None, ui_share=0, procedural_share=0).examples(count)
    with torch.no_grad():
        x0 = latents_of(parts.vae, examples.images, None)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((len(x0),), round(share * (parts.process.num_train_timesteps - 1)))
    return Held(x0, noise, t, list(examples.captions))


@contextlib.contextmanager
def without(unet: UNet, path: str) -> Iterator[None]:
    """The resnets and transformers of a block add nothing."""
    parts = [m for m in unet.get_submodule(path).modules() if isinstance(m, Resnet | Transformer)]
    last = [p for m in parts for p in (m.conv2 if isinstance(m, Resnet) else m.proj_out).parameters()]
    kept = [p.detach().clone() for p in last]
    try:
        for p in last:
            nn.init.zeros_(p)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(last, kept, strict=True):
                p.copy_(value)


def rises(parts: LatentParts, held: Held) -> dict[str, Interval]:
    """Block or layer -> the rise of the error in % without it."""
    unet = parts.backbone
    assert isinstance(unet, UNet)

    @torch.no_grad()
    def error(controls: list[Control]) -> Tensor:
        return errors(parts, held.x0, held.noise, held.t, parts.text(held.captions), controls)

    whole, found = error([]), {}

    def add(name: str, less: Tensor) -> None:
        rise = ratio(less, whole)
        assert rise is not None  # no error is 0
        value, low, high = (100 * (x - 1) for x in (rise.value, rise.low, rise.high))
        found[name] = Interval(value, low, high, rise.n)

    levels = len(unet.config.block_out_channels)
    for path in (*(f"down_blocks.{i}" for i in range(levels)), "mid_block", *(f"up_blocks.{i}" for i in range(levels))):
        with without(unet, path):
            add(path, error([]))
    for site in unet.sites:
        if site.kind == "cross":
            quiet = Silence({site.path: torch.zeros(len(held.x0), 1, 1, 1)})
            add(f"words at {site.path.split('.transformer_blocks')[0]}", error([quiet]))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", required=True, help="an icon world made by `condit data icons`")
    parser.add_argument("--model", default="tiny-unet", help="a name, or the folder of an export")
    parser.add_argument("--count", type=int, default=96, help="held-out icons")
    parser.add_argument("--share", type=float, default=0.9, help="of the schedule: how much noise")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/unet-layers"))
    asked = parser.parse_args(arguments)
    parts = load_base(asked.model, "this study")
    found = rises(parts, held_out(parts, asked.icons, asked.count, asked.share))
    rows = [f"| {name} | {x.value:+.1f} | {x.low:+.1f} to {x.high:+.1f} |" for name, x in found.items()]
    page = "\n".join([f"| without, at {asked.share:g} | error, % | 95 % interval |", "|---|---|---|", *rows, ""])
    print(page)
    keep(asked.out, {name: vars(x) for name, x in found.items()}, page)


if __name__ == "__main__":
    main()
