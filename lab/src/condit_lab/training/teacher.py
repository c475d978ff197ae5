"""The embedded MM-DiT as teacher of the smaller embedded networks: where there is much noise, the clean latent to find
is the one that it finds.

That is a mean over all that may be drawn there and has no chance in it, as the icon's own has, so that a short run
learns more (docs/tiny.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from condit.diffusion.vp import Process
from condit.encoders.vae import pack, unpack
from condit.weights.tiny import load_tiny
from condit_lab.training.text_to_image import GRID, image_stream


class Teacher(nn.Module):
    """model: the folder of a finished MM-DiT, frozen. It teaches from `above` on, a level of noise, noise / (noise +
    picture); 1: nowhere."""

    def __init__(self, model: str | Path, process: Process, above: float):
        super().__init__()
        if not 0 <= above <= 1:
            raise ValueError(f"taught_from must be a noise level from 0 to 1; found {above}.")
        teacher = load_tiny("tiny", Path(model), torch.float32)
        self.backbone, self.text = teacher.backbone, teacher.text
        self.process, self.above = process, above
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, x0: Tensor, noise: Tensor, t: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Latents and noise (B, C, h, w) at timesteps t (B,) -> where there is enough noise, another x0, and the noise
        by which it becomes the same x."""
        if self.above == 1:
            return x0, noise
        a, s = alpha_sigma(self.process, t, x0)
        x, level = a * x0 + s * noise, s / (a + s)
        rows = (level.flatten() > self.above).nonzero()[:, 0]
        if not len(rows):
            return x0, noise
        text = self.text([captions[i] for i in rows.tolist()])
        # The flow's own units: (1 - level) x0 + level noise.
        stream = image_stream(pack((x / (a + s))[rows]), level.flatten()[rows], text)  # type: ignore[arg-type]
        prediction = self.backbone(stream, text.tokens, torch.zeros(text.tokens.shape[1], 3, device=x.device))
        x0 = x0.index_copy(0, rows, unpack(prediction.float(), GRID))
        return x0, (x - a * x0) / s


def alpha_sigma(process: Process, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x = alpha x0 + sigma noise at timesteps t (B,), (B, 1, 1, 1)."""
    level = process.alphas_cumprod[t].to(x)[:, None, None, None]
    return level.sqrt(), (1 - level).sqrt()
