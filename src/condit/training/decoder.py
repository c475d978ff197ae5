"""Training of the embedded decoder as a finisher: it turns what the model draws into what an icon looks like.

A squared error asks for the mean of all pictures that a code may stand for. Where the code is uncertain, as those of a
small model are, that mean is blurred. So a critic stands beside the error: a convolutional network that tells decoded
patches from those of icons (PatchGAN, arXiv:1611.07004), a picture and its icon side by side (arXiv:1807.00734),
weighed by the ratio of the gradients (arXiv:2012.09841, section 3.1). The linear code is not touched, so models and
adapters trained on it stay valid.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.diffusion.guidance import guide
from condit.diffusion.objectives import add_noise, to_velocity
from condit.diffusion.samplers import euler
from condit.diffusion.schedules import flow_sigmas
from condit.encoders.vae import PatchAutoencoder, encode_tokens, scale_shift, unpack
from condit.training.latent import LatentTask, Pictures
from condit.training.loop import fast_precision
from condit.training.text_to_image import GRID, SHIFT, image_stream
from condit.weights.load import load_tiny

# Codes of icons at these noise levels, drawn back in so many steps; and pictures drawn from words.
REDRAW_FROM, REDRAW_STEPS = (0.3, 0.65), 3
DRAW_STEPS, DRAW_GUIDANCE = 10, 3.0
# A drawn picture has no truth; its thumbnail must stay the one that its code says.
THUMBNAIL = 8


class Critic(nn.Module):
    """Images (B, 3, 128, 128) -> how real each place looks (B, 1, 16, 16); it sees 46 x 46 pixels of each."""

    def __init__(self, width: int = 32):
        super().__init__()
        sizes = (3, width, 2 * width, 4 * width)
        down = [nn.Conv2d(i, o, 4, stride=2, padding=1) for i, o in zip(sizes, sizes[1:], strict=False)]
        self.layers = nn.ModuleList([*down, nn.Conv2d(sizes[-1], sizes[-1], 3, padding=1)])
        self.norms = nn.ModuleList([nn.Identity(), *(nn.GroupNorm(8, n) for n in (*sizes[2:], sizes[-1]))])
        self.head = nn.Conv2d(sizes[-1], 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.leaky_relu(norm(layer(x)), 0.2)
        return self.head(x).float()


@dataclass
class Finished(Pictures):
    """drawn (D, N, C): codes of pictures that the model drew from words alone."""

    drawn: Tensor


class DecoderTask(LatentTask):
    """The decoder against absolute error and a critic, on codes with noise, redrawn codes and drawn ones."""

    def __init__(
        self,
        icons: str,
        *,
        init: str,
        model: str,
        refine: tuple[int, ...] = (64, 32),
        pool: int = 3000,
        critic: float = 0.5,
        noise: float = 0.3,
        procedural_share: float = 0.2,
    ):
        """init: the latent to go on with; model: the folder of a model on its code, which draws `pool` pictures once.

        refine: `PatchAutoencoderConfig.refine`. critic: the share of the critic's gradient beside the error's.
        """
        super().__init__(icons, init=init, noise=noise, procedural_share=procedural_share)
        parts = load_tiny("tiny", Path(model), torch.float32)
        self.transformer, self.text = parts.backbone.requires_grad_(False), parts.text.requires_grad_(False)
        if not self.vae.config.refine and refine:
            grown = PatchAutoencoder(replace(self.vae.config, refine=tuple(refine)))
            missing = grown.load_state_dict(self.vae.state_dict(), strict=False)
            assert not missing.unexpected_keys and all(k.startswith("refiner.") for k in missing.missing_keys)
            self.vae = grown
        self.critic, self.share_of_critic, self.pool_size = Critic(), critic, pool
        self.pool: Tensor | None = None

    @torch.no_grad()
    def draw_pool(self, chunk: int = 50) -> Tensor:
        """Codes (pool, N, C) drawn from training captions."""
        rng, pool = random.Random("pool"), []
        while sum(map(len, pool)) < self.pool_size:
            captions = [self.icons.caption(rng, rng.randrange(len(self.icons)), p_no_style=0.1) for _ in range(chunk)]
            text, empty = self.text(captions), self.text([""] * chunk)
            ids = torch.zeros(text.tokens.shape[1], 3, device=self.device)

            def velocity(x: Tensor, sigma: Tensor, i: int, sides=(text, empty), ids=ids) -> Tensor:
                t = sigma.to(x.device).expand(len(x))
                c, u = (
                    to_velocity(self.transformer(image_stream(x, t, s), s.tokens, ids).float(), x, t, "x")
                    for s in sides
                )
                return guide(c, u, DRAW_GUIDANCE)

            generator = torch.Generator().manual_seed(rng.getrandbits(60))
            channels = 4 * self.vae.config.latent_channels
            noise = torch.randn(chunk, GRID[0] * GRID[1], channels, generator=generator).to(self.device)
            pool.append(euler(velocity, noise, flow_sigmas(DRAW_STEPS, shift=SHIFT)).cpu())
        return torch.cat(pool)[: self.pool_size]

    def batch(self, rng: random.Random, size: int) -> Finished:
        """A quarter of the codes are drawn ones; the others are those of `LatentTask`."""
        if self.pool is None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_precision() == "bf16"):
                self.pool = self.draw_pool()
        few = size // 4
        known = super().batch(rng, size - few)
        drawn = self.pool[[rng.randrange(len(self.pool)) for _ in range(few)]]
        return Finished(known.images, known.captions, drawn)

    @torch.no_grad()
    def codes(self, batch: Pictures, generator: torch.Generator) -> Tensor:
        """Of half of the pictures as the model draws them back, so that the decoder learns its faults."""
        noisy, half = super().codes(batch, generator), len(batch.images) // 2
        clean = encode_tokens(self.vae, batch.images[-half:])
        return torch.cat([noisy[:-half], self.redrawn(clean, batch.captions[-half:], generator)])

    def redrawn(self, x0: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
        """Tokens (B, N, C) of icons with noise, drawn back by the model: near the icons, with the model's faults."""
        text, (low, high) = self.text(captions), REDRAW_FROM
        t = (low + (high - low) * torch.rand(len(x0), generator=generator)).to(x0.device)
        x = add_noise(x0, torch.randn(x0.shape, generator=generator).to(x0.device), t)
        ids = torch.zeros(text.tokens.shape[1], 3, device=x.device)
        for step in range(REDRAW_STEPS):
            now = t * (1 - step / REDRAW_STEPS)
            found = self.transformer(image_stream(x, now, text), text.tokens, ids).float()
            x = x - (t / REDRAW_STEPS)[:, None, None] * to_velocity(found, x, now, "x")
        return x

    def forward(self, batch: Finished, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        codes = torch.cat([self.codes(batch, generator), batch.drawn])
        scale, shift = scale_shift(self.vae)
        z, known = unpack(codes, GRID) / scale + shift, len(batch.images)
        decoded = self.vae.decode(z).sample.float()
        with torch.no_grad():
            thumbnails = F.avg_pool2d(self.vae.linear(z[known:]).float().clamp(-1, 1), THUMBNAIL)
        error = (decoded[:known] - batch.images).abs().mean()
        if len(batch.drawn):
            error = error + (F.avg_pool2d(decoded[known:], THUMBNAIL) - thumbnails).abs().mean()

        # Each picture beside an icon, its own where it has one: what both have in common says nothing.
        beside = torch.cat([batch.images, batch.images[: len(batch.drawn)]])
        self.critic.requires_grad_(False)
        behind = F.softplus(self.critic(beside) - self.critic(decoded)).mean()
        self.critic.requires_grad_(True)
        by_error, by_critic = (torch.autograd.grad(x, decoded, retain_graph=True)[0].norm() for x in (error, behind))
        weight = self.share_of_critic * (by_error / (by_critic + 1e-8)).clamp(max=100.0)
        real, fake = self.critic(torch.cat([beside, decoded.detach()])).chunk(2)
        judged = F.softplus(fake - real).mean()
        return error + weight * behind + judged, {
            "error": round(float(error.detach()), 4),
            "told": round(float((real > fake).float().mean()), 3),  # by the critic; 0.5 is chance
        }
