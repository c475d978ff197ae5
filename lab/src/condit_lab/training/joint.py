"""Text-to-icon with the style adapter in tow: some rows of each batch leave the style to a reference.

An adapter on a frozen model needs a model that can be steered by more than words. A large one saw millions of
styles; the embedded one saw a few dozen, so it learns here that a style may come from elsewhere. Rows without a
reference do not pass through the adapter: without it the model is the plain one (docs/tiny.md).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condit.diffusion.objectives import add_noise, drop, flow_loss
from condit.encoders.image import TinyImage
from condit.encoders.vae import encode_tokens
from condit.training.export import ADAPTER, export_adapter
from condit.training.loop import to_device
from condit_lab.training.adapters import amplified, load_style_adapter, new_style_adapter
from condit_lab.training.referenced import (
    Referenced,
    reference_features,
    style_batch,
    style_examples,
    style_table,
)
from condit_lab.training.text_to_image import TextToImageTask, training_times


class JointTask(TextToImageTask):
    """`style_share` of the rows have one or two references, of those `style_procedural` in a procedural style.

    init: as of the base, with its adapter if it has one."""

    def __init__(
        self,
        icons: str,
        clip: str,
        latent: str,
        ui: str | None = None,
        *,
        init: str | None = None,
        style_share: float = 0.35,
        style_procedural: float = 0.35,
        **rest: Any,
    ):
        super().__init__(icons, clip, latent, ui, init=init, **rest)
        self.style_share, self.style_procedural = style_share, style_procedural
        self.image = TinyImage(self.text.clip)
        self.ip = new_style_adapter(self.transformer)
        if init is not None and (file := Path(init) / "style" / ADAPTER).is_file():
            load_style_adapter(self.ip, file)
        self.table = style_table(self)

    def batch(self, rng: random.Random, size: int) -> Referenced:
        """Rows without a reference first; `references`, `counts` and `known` speak of the others."""
        styled = int(size * self.style_share)
        plain = super().batch(rng, size - styled)
        more = style_batch(self, rng, styled, self.style_procedural, most=2, pictures=False)
        images = torch.cat([plain.images, more.images])
        return Referenced(images, plain.captions + more.captions, more.references, more.counts, more.known)

    def forward(self, batch: Referenced, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            x0 = encode_tokens(self.vae, batch.images)
            text = self.text(batch.captions)
        t = training_times(len(x0), generator, self.t_mean, self.t_std).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        features = reference_features(self, batch)
        plain = len(x0) - len(features)
        kept = ~drop(len(features), 0.1, generator).to(x0.device)
        control = self.ip.reference(torch.cat([features.new_zeros(plain, features.shape[1]), features * kept[:, None]]))
        region = (torch.arange(len(x0), device=x0.device) >= plain).float()[:, None, None, None]
        output = self.predict(add_noise(x0, noise, t), t, text, [control.within(region)])
        loss = flow_loss(output, x0, noise, t, "x")
        parts = {"plain": loss[:plain], "styled": loss[plain:]}
        return loss.mean(), {name: round(float(part.detach().mean()), 4) for name, part in parts.items()}

    def validate(self) -> dict[str, float]:
        """The figures of the plain model; with one reference of the style, its error and how much it rises with another
        row's reference (in %)."""
        batch: Referenced = to_device(style_examples(self, self.held_out, 128), self.device)
        x0, text = encode_tokens(self.vae, batch.images), self.text(batch.captions)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
        features = reference_features(self, batch)
        figures = super().validate()
        for level in (0.7, 0.9):
            t = torch.full((len(x0),), level, device=x0.device)
            x_t = add_noise(x0, noise, t)
            right, wrong = (
                float(flow_loss(self.predict(x_t, t, text, [self.ip.reference(f)]), x0, noise, t, "x").mean())
                for f in (features, features.roll(7, 0))
            )
            figures[f"wrong_reference_{level}"] = round(100 * (wrong / right - 1), 1)
        return figures

    def export(self, folder: Path, card: dict) -> None:
        super().export(folder, card)
        export_adapter(amplified(self.ip), folder / "style", card)
