"""The embedded UNet with its IP-Adapter in tow, as `joint.py` trains the MM-DiT: some rows of each batch leave the
style to a reference, the others do not pass through the adapter. Without it the model is the plain one.

On the frozen UNet an adapter of 16,000 images was still disregarded (docs/tiny.md): words reach a small network by its
canvas and its pooled vector, so its attention to the text, beside which the reference acts, has little to say.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from condit.controls.ip_reference import IPReference
from condit.data.icons import GROUPS
from condit.data.images import to_images
from condit.data.sheets import contact_sheet
from condit.diffusion.objectives import drop
from condit.encoders.image import TinyImage
from condit.latent_pipeline import LatentPipeline
from condit.training.adapters import ADAPTER, Referenced, export_adapter, style_batch, style_examples
from condit.training.denoising import errors, latents_of
from condit.training.icon_batches import IconSet
from condit.training.ip_adapter import new_adapter
from condit.training.loop import to_device
from condit.training.unet import PROCESS, UNetTask
from condit.weights.files import load_strict, read_tensors
from condit.weights.tiny import floats


class UNetJointTask(UNetTask):
    """`style_share` of the rows have a reference, of those `style_procedural` in a procedural style. init: as of the
    UNet; init_style: the folder of an earlier export of the adapter."""

    def __init__(
        self,
        icons: str,
        model: str,
        ui: str | None = None,
        *,
        init_style: str | None = None,
        style_share: float = 0.4,
        style_procedural: float = 0.15,
        **rest: Any,
    ):
        super().__init__(icons, model, ui, **rest)
        self.icons, self.ui, self.held_out = self.data.icons, self.data.ui, self.data.held_out
        self.unseen = IconSet.open(icons, splits=("style",), groups=GROUPS)
        self.style_share, self.style_procedural = style_share, style_procedural
        self.image = TinyImage(self.text.clip)
        self.ip = new_adapter(self.unet, self.image, "global", 4, None)
        if init_style is not None:
            load_strict(self.ip, floats(read_tensors(Path(init_style) / ADAPTER)), source=init_style)

    def batch(self, rng: random.Random, size: int) -> Referenced:
        """Rows without a reference first; `references` has those of the others."""
        styled = int(size * self.style_share)
        plain = super().batch(rng, size - styled)
        more = style_batch(self, rng, styled, self.style_procedural, most=1)
        images = torch.cat([plain.images, more.images])
        return Referenced(images, plain.captions + more.captions, more.references, more.counts)

    def forward(self, batch: Referenced, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            x0, text = latents_of(self.vae, batch.images, generator), self.text(batch.captions)
            features = self.image(batch.references[:, 0])
        t = torch.randint(PROCESS.num_train_timesteps, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        plain = len(x0) - len(features)
        features = features * ~drop(len(features), 0.1, generator).to(x0.device)[:, None]
        control = self.ip.reference(torch.cat([features.new_zeros(plain, features.shape[1]), features]))
        region = (torch.arange(len(x0), device=x0.device) >= plain).float()[:, None, None, None]
        loss = errors(self.parts, x0, noise, t, text, [control.inside(region)])
        parts = {"plain": loss[:plain], "styled": loss[plain:]}
        return loss.mean(), {name: round(float(part.detach().mean()), 4) for name, part in parts.items()}

    def validate(self) -> dict[str, float]:
        """The figures of the plain model; with one reference of the style, how much the error rises with another row's
        reference, and with none (in %)."""
        found, batch = super().validate(), to_device(style_examples(self, self.held_out, 128), self.device)
        x0, text = latents_of(self.vae, batch.images, None), self.text(batch.captions)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
        features = self.image(batch.references[:, 0])
        for share in (0.5, 0.75, 0.9):
            t = torch.full((len(x0),), round(share * (PROCESS.num_train_timesteps - 1)))
            right, wrong, none = (
                float(errors(self.parts, x0, noise, t, text, controls).mean())
                for controls in ([self.ip.reference(features)], [self.ip.reference(features.roll(7, 0))], [])
            )
            found[f"wrong_reference_{share}"] = round(100 * (wrong / right - 1), 1)
            found[f"no_reference_{share}"] = round(100 * (none / right - 1), 1)
        return found

    def sheet(self) -> Image.Image:
        """References, what is drawn without and with them, and the real icons: held-out combinations, then the
        never-trained style."""
        rows, labels, pipe = [], [], LatentPipeline(self.parts)
        for name, icons in (("held out", self.held_out), ("new style", self.unseen)):
            batch = to_device(style_examples(self, icons, 8), self.device)
            features = self.image(batch.references[:, 0])
            controls: list[list[IPReference]] = [[], [self.ip.reference(features)]]
            drawn = [pipe(batch.captions, controls=c, seed=0).images for c in controls]
            rows += [to_images(batch.references[:, 0]), *drawn, to_images(batch.images)]
            labels += [f"{name}: reference", "no reference", "drawn", "real"]
        return contact_sheet(rows, labels)

    def export(self, folder: Path, card: dict) -> None:
        """The UNet under `model`, as `condit.load` reads it, and the adapter under `style`."""
        super().export(folder / "model", card)
        export_adapter(self.ip, folder / "style", card)
