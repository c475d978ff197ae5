"""Training of DiffiT's image-space model (arXiv:2312.02139, appendix I.1): EDM's preconditioning and loss on pixels
(Karras et al. 2022, arXiv:2206.00364), without classes.

Of EDM's augmentations only mirroring is implemented: the others need the augmentation as a condition, and DiffiT's
paper does not describe how the network would take it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from condit.backbones.diffit_image import IMAGE_PRESETS, DiffiTImage, DiffiTImageConfig
from condit.data.images import to_images
from condit.data.sheets import SheetCell, contact_sheet
from condit.diffusion.edm import EDM, edm_loss, edm_path, heun, precondition, training_sigmas
from condit.diffusion.steps import by_timestep
from condit.training.classify import in_memory, to_float
from condit.training.fields import Data, Number, Sizes
from condit.training.labelled import Size, build, height_width, open_labelled, with_sizes
from condit.training.loop import Task
from condit.weights.diffit import save_diffit
from condit.weights.folders import WEIGHTS

SAMPLING_STEPS = 18


@dataclass
class Pixels:
    x0: Tensor  # (B, 3, H, W) in [-1, 1]


class PixelData(Data):
    """Images come from `icons` or from `folder` (with or without subfolders); `size` is a side or (height, width) in
    pixels.

    backbone: a preset of the U-shape, or "DiffiTImage" with `sizes`, the fields of its config. edm: fields of `EDM`.
    checkpointing saves memory and computes each block twice.
    """

    backbone: str = "DiffiTImage"
    sizes: Sizes = {}
    icons: str | None = None
    folder: str | None = None
    size: Size = 32
    flip: bool = True
    edm: Mapping[str, Number] = {}
    checkpointing: bool = False


class PixelTask(Task):
    """Task "pixels" of a recipe. All images are kept in memory in 8 bits."""

    data_type = PixelData

    def __init__(self, data: PixelData):
        super().__init__()
        self.checkpointing = data.checkpointing
        self.size, self.flip, self.edm = height_width(data.size), data.flip, EDM(**data.edm)
        config = configure(data.backbone, data.sizes, self.size)
        labelled = open_labelled(data.icons, data.folder, label="style", size=self.size, held_out="combo")
        self.images, self.held_images = in_memory(labelled.train)[0], in_memory(labelled.held_out)[0]
        self.network = build(DiffiTImage, config)

    def compiled(self) -> list[nn.Module]:
        return [self.network]

    def shards(self) -> tuple[str, Sequence[nn.Module]]:
        return "network", [*self.network.encoder, *self.network.decoder]

    def batch(self, rng: random.Random, size: int) -> Pixels:
        chosen = [rng.randrange(len(self.images)) for _ in range(size)]
        x0 = to_float(self.images[chosen])
        mirrored = torch.tensor([self.flip and rng.random() < 0.5 for _ in chosen])
        return Pixels(torch.where(mirrored[:, None, None, None], x0.flip(-1), x0))

    def forward(self, batch: Pixels, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        sigma = training_sigmas(len(batch.x0), self.edm, generator=generator).to(batch.x0.device)
        noise = torch.randn(batch.x0.shape, generator=generator).to(batch.x0.device)
        # Dropout samples on the device. The step gives its seed, so a resumed run samples the same.
        seed = int(torch.randint(2**62, (), generator=generator))
        dropout = torch.Generator(batch.x0.device).manual_seed(seed)
        return self.loss(batch.x0, sigma, noise, dropout).mean(), {}

    def loss(self, x0: Tensor, sigma: Tensor, noise: Tensor, dropout: torch.Generator | None = None) -> Tensor:
        network = partial(self.network, generator=dropout, checkpointing=self.checkpointing)
        denoise = precondition(network, self.edm)
        return edm_loss(denoise, x0, sigma, noise, self.edm)

    def validate(self) -> dict[str, float]:
        """The loss on n held-out images at fixed noise levels, evenly spread over their distribution."""
        n = min(256, len(self.held_images))
        if n == 0:
            return {}
        generator, chosen = torch.Generator().manual_seed(0), random.Random(0).sample(range(len(self.held_images)), n)
        x0 = to_float(self.held_images[chosen])
        noise, evenly = torch.randn(x0.shape, generator=generator), (torch.arange(n) + 0.5) / n
        sigma = (self.edm.noise_mean + self.edm.noise_std * torch.special.ndtri(evenly)).exp()
        rows = [part.to(self.device) for part in (x0, sigma, noise)]
        losses = torch.cat([self.loss(*part) for part in zip(*(row.split(64) for row in rows), strict=True)])
        return {"loss": round(float(losses.mean()), 4), "n": n}

    @torch.no_grad()
    def generate(self, count: int, *, seed: int = 0) -> list[Image.Image]:
        """Generates images in 18 steps of the deterministic sampler."""
        shape = count, self.network.config.in_channels, *self.size
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        predict, path = by_timestep(precondition(self.network, self.edm)), edm_path(SAMPLING_STEPS, self.edm)
        return to_images(heun(predict, noise * path.sigmas[0], path).clamp(-1, 1))

    def sheet(self) -> Image.Image:
        """Two rows of eight generated images, one row of real images."""
        rows: list[list[SheetCell | Image.Image | None]] = [list(self.generate(8, seed=seed)) for seed in range(2)]
        real = to_images(to_float(self.images[:8]))
        rows.append([SheetCell(image, "", is_input=True) for image in real])
        return contact_sheet(rows, labels=["seed 0", "seed 1", "real"])

    def export(self, folder: Path, card: dict) -> None:
        """model.safetensors with its configuration, config.json with noise levels and size, card.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_diffit(self.network, folder / WEIGHTS)
        fields = {"_class_name": "DiffiTImage", "condit": {"size": self.size, "edm": asdict(self.edm)}}
        (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def configure(backbone: str, sizes: Mapping[str, object], size: tuple[int, int]) -> DiffiTImageConfig:
    """A preset of the U-shape, or "DiffiTImage", with some `sizes` replaced, for images of `size`."""
    presets = {"DiffiTImage": DiffiTImageConfig(), **IMAGE_PRESETS}
    if backbone not in presets:
        raise ValueError(f"No backbone {backbone!r} for pixels. Known: {', '.join(presets)}.")
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
    config = with_sizes(presets[backbone], tuples)
    if config.in_channels != 3:
        raise ValueError(f"Images have 3 channels; sizes.in_channels is {config.in_channels}.")
    if size[0] % config.stride or size[1] % config.stride:
        raise ValueError(
            f"Images of {size} do not divide into windows: with {len(config.blocks)} resolutions and window "
            f"{config.window}, `size` must be multiples of {config.stride}."
        )
    return config
