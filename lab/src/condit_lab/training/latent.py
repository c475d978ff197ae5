"""Training of the embedded latent: principal components first, then the residual decoder."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from condit.data.sheets import contact_sheet
from condit.diffusion.objectives import add_noise, to_velocity
from condit.encoders.vae import PatchAutoencoder, PatchAutoencoderConfig, encode_tokens, scale_shift, unpack
from condit.training.loop import Task
from condit.weights.files import save_tensors
from condit.weights.tiny import load_tiny
from condit.weights.vae import load_latent
from condit_lab.icons.procedural import Procedural
from condit_lab.icons.world import TRAIN_LICENCES
from condit_lab.training.icon_batches import IconSet, procedural
from condit_lab.training.text_to_image import image_stream


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB; images in [-1, 1]."""
    mse = (a.float() - b.float()).clamp(-2, 2).square().flatten(1).mean(1) / 4
    return float((-10 * mse.clamp(min=1e-10).log10()).mean())


# A model's samples for the decoder: codes of icons at these noise levels, drawn back in so many steps.
REDRAW_FROM, REDRAW_STEPS = (0.3, 0.65), 3


@dataclass
class LatentBatch:
    """images (B, 3, H, W) in [-1, 1] and a caption each; procedural ones have none."""

    images: Tensor
    captions: list[str]


class LatentTask(Task):
    """Decoder of a `PatchAutoencoder`: squared error, from codes with noise on them, so that it also cleans samples."""

    def __init__(
        self,
        icons: str,
        *,
        channels: int = 32,
        whiten: float = 0.5,
        noise: float = 0.05,
        procedural_share: float = 0.2,
        init: str | None = None,
        model: str | None = None,
    ):
        """noise: largest deviation of the noise on the code, in the units that the model sees.

        init: a latent whose code is kept, so that models trained on it stay valid; only the decoder is trained.
        model: the folder of a model on that code. Half of the codes are then drawn by it from icons with much noise, so
        that the decoder learns the model's own faults.
        """
        super().__init__()
        self.transformer = self.text = None
        if model is not None:
            parts = load_tiny("tiny", Path(model), torch.float32)
            self.transformer, self.text = parts.backbone.requires_grad_(False), parts.text.requires_grad_(False)
        self.icons = IconSet.open(icons, licences=TRAIN_LICENCES, splits=("train",))
        self.held_out = IconSet.open(icons, licences=TRAIN_LICENCES, splits=("concept",))
        self.unseen = IconSet.open(icons, splits=("style",))
        self.noise, self.share = noise, procedural_share
        if init is not None:
            self.vae = load_latent(init)
            return
        self.vae = PatchAutoencoder(PatchAutoencoderConfig(latent_channels=channels, whiten=whiten))
        chosen = random.Random(0).sample(range(len(self.icons)), min(3000, len(self.icons)))
        self.vae.fit(self.icons.images(chosen))
        codes = self.vae.encode(self.icons.images(chosen[:500])).latent_dist.mode()
        self.vae.config = replace(self.vae.config, scaling_factor=round(1 / float(codes.std()), 4))

    def batch(self, rng: random.Random, size: int) -> LatentBatch:
        chosen = [rng.randrange(len(self.icons)) for _ in range(size)]
        few = int(size * self.share)
        drawn = [procedural(Procedural.sample(rng), self.icons.rgba[[i]]) for i in chosen[:few]]
        captions = [""] * few + [self.icons.caption(rng, i, p_no_style=0.1) for i in chosen[few:]]
        return LatentBatch(torch.cat([*drawn, self.icons.images(chosen[few:])]), captions)

    def forward(self, batch: LatentBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            x = encode_tokens(self.vae, batch.images)
            sigma = self.noise * torch.rand(len(x), 1, 1, generator=generator)
            x = x + (sigma * torch.randn(x.shape, generator=generator)).to(x.device)
            if self.transformer is not None:
                half = len(x) // 2
                clean = encode_tokens(self.vae, batch.images[-half:])
                x = torch.cat([x[:-half], self.redrawn(clean, batch.captions[-half:], generator)])
        rows, columns = (side // (2 * self.vae.config.patch) for side in batch.images.shape[-2:])
        scale, shift = scale_shift(self.vae)
        decoded = self.vae.decode(unpack(x, (rows, columns)) / scale + shift).sample.float()
        error = (decoded - batch.images).square().flatten(1).mean(1)
        return (error + 1e-4).log().mean(), {"mse": float(error.detach().mean())}

    def redrawn(self, x0: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
        """Tokens (B, N, C) of icons with noise, drawn back by the model: near the icons, with the model's faults."""
        assert self.transformer is not None and self.text is not None
        text, (low, high) = self.text(captions), REDRAW_FROM
        t = (low + (high - low) * torch.rand(len(x0), generator=generator)).to(x0.device)
        x = add_noise(x0, torch.randn(x0.shape, generator=generator).to(x0.device), t)
        ids = torch.zeros(text.tokens.shape[1], 3, device=x.device)
        for step in range(REDRAW_STEPS):
            now = t * (1 - step / REDRAW_STEPS)
            velocity = self.transformer(image_stream(x, now, text), text.tokens, ids).float()
            x = x - (t / REDRAW_STEPS)[:, None, None] * to_velocity(velocity, x, now, "x")
        return x

    def decoded(self, icons: IconSet, count: int) -> tuple[Tensor, Tensor, Tensor]:
        x = icons.images(random.Random(1).sample(range(len(icons)), min(count, len(icons)))).to(self.device)
        z = self.vae.encode(x).latent_dist.mode()
        return x, self.vae.linear(z), self.vae.decode(z).sample

    def validate(self) -> dict[str, float]:
        figures = {}
        for name, icons in (("held_out", self.held_out), ("unseen_style", self.unseen)):
            x, linear, full = self.decoded(icons, 256)
            figures[f"psnr_{name}_linear"], figures[f"psnr_{name}"] = psnr(x, linear), psnr(x, full)
        return {k: round(v, 2) for k, v in figures.items()}

    def sheet(self) -> Image.Image:
        from condit.data.images import to_images

        rows = []
        for icons in (self.held_out, self.unseen):
            rows += [to_images(t.clamp(-1, 1)) for t in self.decoded(icons, 12)]
        return contact_sheet(rows, labels=["real", "linear", "decoder"] * 2)

    def export(self, folder: Path, card: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.half() for k, v in self.vae.state_dict().items()}
        save_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, {"condit": "PatchAutoencoder"})
        config = {"_class_name": "PatchAutoencoder", **dataclasses.asdict(self.vae.config)}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
