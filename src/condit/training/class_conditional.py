"""Training of DiT (arXiv:2212.09748) and DiffiT (arXiv:2312.02139) on latents of images, with or without classes.

The recipe of DiT: latents sampled from a frozen autoencoder, horizontal flips, dropped labels, uniform timesteps,
squared error plus the variational bound that trains the variance. DiffiT publishes no training code, so its loss and
data are DiT's here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from condit.backbones import diffit, dit
from condit.backbones.diffit import DiffiT, DiffiTConfig
from condit.backbones.dit import DiT, DiTConfig
from condit.data.images import to_images
from condit.data.sheets import SheetCell, contact_sheet
from condit.diffusion.gaussian import Loss, Prediction, gaussian, training_loss
from condit.diffusion.gaussian_samplers import ddim
from condit.diffusion.guidance import class_guidance
from condit.diffusion.steps import by_timestep
from condit.encoders.vae import decode_latents
from condit.training.fields import Data, Sizes
from condit.training.labelled import Label, Size, build, height_width, id2label, open_labelled, with_sizes
from condit.training.latent_cache import encode
from condit.training.loop import Task
from condit.weights.diffit import save_diffit
from condit.weights.dit import save_dit
from condit.weights.folders import WEIGHTS
from condit.weights.vae import load_vae

AdaLN = Literal["zero", "plain"]
BACKBONES: dict[str, DiTConfig | DiffiTConfig] = {
    "DiT": DiTConfig(),
    "DiffiT": DiffiTConfig(),
    **dit.PRESETS,
    **diffit.PRESETS,
}
# Fields that follow from the data and from other arguments.
DERIVED = ("input_size", "in_channels", "num_classes", "gates", "zero_init")


@dataclass
class Latents:
    x0: Tensor  # (B, C, h, w)
    labels: Tensor  # (B,) int64


def configure(
    backbone: str,
    sizes: Mapping[str, object],
    *,
    adaln: AdaLN | None,
    latent: Sequence[int],
    classes: int,
) -> DiTConfig | DiffiTConfig:
    """A preset, or "DiT" and "DiffiT", with some `sizes` replaced, for a latent (C, h, w)."""
    if backbone not in BACKBONES:
        raise ValueError(f"No backbone {backbone!r}. Known: {', '.join(BACKBONES)}.")
    derived = [name for name in DERIVED if name in sizes]
    if derived:
        raise ValueError(f"sizes.{derived[0]} follows from the data and from `adaln`; leave it out.")
    channels, *sides = latent
    config = replace(BACKBONES[backbone], in_channels=channels, num_classes=classes)
    patch = sizes.get("patch_size", config.patch_size)
    if not isinstance(patch, int) or isinstance(patch, bool) or patch < 1:
        raise ValueError(f"sizes.patch_size must be an int of at least 1; found {patch!r}.")
    if sides[0] % patch or sides[1] % patch:
        raise ValueError(
            f"The latents are {sides[0]} x {sides[1]}, which patches of {patch} do not divide. "
            "Change `size` (of the images) or sizes.patch_size."
        )
    side = sides[0] if sides[0] == sides[1] else (sides[0], sides[1])
    config = with_sizes(replace(config, input_size=side), sizes)
    if adaln is None:
        return config
    if not isinstance(config, DiTConfig) or adaln not in ("zero", "plain"):
        raise ValueError(f"adaln is 'zero' or 'plain', for DiT only; found {adaln!r} with {backbone!r}.")
    return replace(config, gates=adaln == "zero", zero_init=adaln == "zero")


class ClassConditionalData(Data):
    """Images come from `icons` (their class: `label`) or from `folder`; `size` is a side or (height, width) in pixels.

    backbone: a preset, or "DiT" and "DiffiT" with `sizes`, the fields of their config. vae: the name or folder of an
    autoencoder. cache: a folder of latents, shared by runs on the same images. adaln: "zero", or "plain" for the
    ablation of Table 4. predicts: "x0" for an autoencoder whose tokens are wider than the network.
    """

    backbone: str
    sizes: Sizes = {}
    icons: str | None = None
    folder: str | None = None
    label: Label = "style"
    size: Size = 128
    vae: str = "tiny"
    cache: str | None = None
    flip: bool = True
    adaln: AdaLN | None = None
    predicts: Prediction = "noise"
    checkpointing: bool = False


class ClassConditionalTask(Task):
    """Task "class-conditional" of a recipe. Latents are encoded once."""

    data_type = ClassConditionalData

    def __init__(self, data: ClassConditionalData):
        super().__init__()
        self.size, self.flip, self.checkpointing = height_width(data.size), data.flip, data.checkpointing
        predicts = data.predicts
        labelled = open_labelled(data.icons, data.folder, label=data.label, size=self.size, held_out="combo")
        self.classes = labelled.classes
        self.vae = load_vae(data.vae)
        self.latents = encode(self.vae, labelled.train, flip=data.flip, cache=data.cache)
        self.held_out = encode(self.vae, labelled.held_out, flip=False, cache=data.cache)
        latent = self.latents.moments.shape[3:]
        if any(side % cells for side, cells in zip(self.size, latent[1:], strict=True)):
            raise ValueError(f"Images of {self.size} do not divide into latents of {latent[1:]}. Change `size`.")
        config = configure(data.backbone, data.sizes, adaln=data.adaln, latent=latent, classes=len(self.classes))
        token = config.patch_size**2 * config.in_channels
        if predicts == "noise" and token > config.hidden_size:
            raise ValueError(
                f"A token holds {token} values of noise, more than a network of width {config.hidden_size} can "
                "predict: samples would stay noisy. Set predicts = 'x0', a greater width or a smaller patch."
            )
        self.network = build(DiT, config) if isinstance(config, DiTConfig) else build(DiffiT, config)
        variance = "learned" if config.learn_sigma else "large"
        self.process = gaussian(predicts=predicts, variance=variance)
        self.sampling = gaussian(respacing="ddim25", predicts=predicts, variance=variance)

    @property
    def device(self) -> torch.device:
        return self.network.pos_embed.device

    def compiled(self) -> list[nn.Module]:
        return [self.network]

    def shards(self) -> tuple[str, Sequence[nn.Module]]:
        return "network", [*self.network.blocks]

    def batch(self, rng: random.Random, size: int) -> Latents:
        chosen = [rng.randrange(len(self.latents)) for _ in range(size)]
        views = [int(self.flip and rng.random() < 0.5) for _ in chosen]
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        return Latents(self.latents.sample(chosen, views, generator), self.latents.labels[chosen])

    def forward(self, batch: Latents, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        i = torch.randint(len(self.process), (len(batch.x0),), generator=generator)
        noise = torch.randn(batch.x0.shape, generator=generator).to(batch.x0.device)
        labels = self.network.drop_labels(batch.labels, generator=generator) if self.classes else None
        loss = self.loss(batch.x0, i, noise, labels)
        return loss.loss.mean(), parts(loss)

    def loss(self, x0: Tensor, i: Tensor, noise: Tensor, labels: Tensor | None) -> Loss:
        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.network(x, t, labels, checkpointing=self.checkpointing)

        return training_loss(denoise, self.process, x0, i, noise)

    def validate(self) -> dict[str, float]:
        """On n held-out images with fixed noise and evenly spread timesteps: the loss, its parts, and by how many
        percent the squared error rises with the next class's label (`wrong_class`)."""
        n = min(256, len(self.held_out))
        if n == 0:
            return {}
        generator = torch.Generator().manual_seed(0)
        chosen = random.Random(0).sample(range(len(self.held_out)), n)
        x0, labels = self.held_out.mean(chosen), self.held_out.labels[chosen]
        noise, i = torch.randn(x0.shape, generator=generator), (torch.arange(n) + 0.5) / n * len(self.process)
        wrong = (labels + 1) % max(len(self.classes), 1)

        def mean(labels: Tensor) -> dict[str, float]:
            figures = []
            for rows in torch.arange(n).split(64):
                y = labels[rows].to(self.device) if self.classes else None
                loss = self.loss(x0[rows].to(self.device), i[rows].long(), noise[rows].to(self.device), y)
                figures += [{"loss": float(loss.loss.mean()), **parts(loss)}] * len(rows)
            return {name: sum(row[name] for row in figures) / n for name in figures[0]}

        figures = mean(labels)
        if len(self.classes) > 1:
            figures["wrong_class"] = 100 * (mean(wrong)["mse"] / figures["mse"] - 1)
        return {**{name: round(value, 4) for name, value in figures.items()}, "n": n}

    @torch.no_grad()
    def generate(self, labels: Sequence[int], *, guidance: float = 3.0, seed: int = 0) -> list[Image.Image]:
        """Generates one image for each label in 25 DDIM steps; an unconditional network ignores the labels."""
        shape = (len(labels), *self.latents.moments.shape[3:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        denoise = self.network
        if self.classes:
            y = torch.tensor(labels, device=self.device)
            guided = self.network.config.class_dropout_prob > 0
            null, scale = (self.network.null_label, guidance) if guided else (0, 1.0)
            denoise = class_guidance(self.network, y, null, scale, channels=None)
        return to_images(decode_latents(self.vae, ddim(by_timestep(denoise), noise, self.sampling)))

    def sheet(self) -> Image.Image:
        """Up to eight classes: three generated images of each, and a real image."""
        count = min(8, len(self.classes)) or 8
        shown = [i * len(self.classes) // count for i in range(count)]
        rows: list[list[SheetCell | Image.Image | None]] = [list(self.generate(shown, seed=seed)) for seed in range(3)]
        firsts = [self.latents.labels.tolist().index(label) for label in shown]
        real = to_images(decode_latents(self.vae, self.latents.mean(firsts).to(self.device)))
        names = [self.classes[label] if self.classes else "" for label in shown]
        rows.append([SheetCell(image, name, is_input=True) for image, name in zip(real, names, strict=True)])
        return contact_sheet(rows, labels=["seed 0", "seed 1", "seed 2", "real"])

    def export(self, folder: Path, card: dict) -> None:
        """transformer/ with the official names, config.json with the classes' names (`id2label`); card.json."""
        inside, config = folder / "transformer", self.network.config
        inside.mkdir(parents=True, exist_ok=True)
        if isinstance(self.network, DiT):
            save_dit(self.network, inside / WEIGHTS)
        else:
            save_diffit(self.network, inside / WEIGHTS)
        fields = {
            "_class_name": type(self.network).__name__,
            **asdict(config),
            # diffusers' names of the same, by which load_dit reads a folder.
            "num_attention_heads": config.num_heads,
            "sample_size": config.input_size,
            "id2label": id2label(self.classes),
            "condit": {"predicts": self.process.predicts, "variance": self.process.variance, "size": self.size},
        }
        (inside / "config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def parts(loss: Loss) -> dict[str, float]:
    """Squared error and variational bound, for the log."""
    named = {"mse": loss.mse, "vb": loss.vb}
    return {name: float(value.detach().mean()) for name, value in named.items() if value is not None}
