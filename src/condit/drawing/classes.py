"""Class-conditional diffusion: DiT (arXiv:2212.09748) and DiffiT (arXiv:2312.02139). Latents are (B, C, h, w)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, SupportsIndex, cast

import torch
from torch import Tensor

from condit.backbones.diffit import DiffiT
from condit.controls.control import Act, Control, Run
from condit.diffusion.gaussian import Gaussian, add_noise, gaussian
from condit.diffusion.gaussian_samplers import ancestral, ddim
from condit.diffusion.guidance import guide_channels, power_cosine_scale
from condit.diffusion.steps import Path, Step
from condit.drawing.model import (
    Conditions,
    Layout,
    Network,
    Sampler,
    check_shape,
    latent_cell,
    module_device,
    module_dtype,
)
from condit.drawing.settings import Settings
from condit.encoders.vae import decode_latents, encode_latents
from condit.weights.class_models import ClassParts

SAMPLERS = {"ancestral": ancestral, "ddim": ddim}


class ClassModel:
    """See `condit.drawing.model.Model`. A condition is a tensor (B,) of class numbers, in which the null class is
    last; None for an unconditional model."""

    reads: Literal["prompt", "class", "nothing"] = "class"
    supports = frozenset({"guidance_scale", "guidance_power", "guidance_channels", "sampler", "eta", "strength"})
    kinds = ("pil", "pt", "np", "latent")
    fewest_steps = 2  # the variance of the last step is that of the one before it
    repaints, fixed_size, inversion = False, False, None

    def __init__(self, parts: ClassParts):
        self.parts, self.backbone, self.labels = parts, parts.backbone, parts.labels

    def to(self, device: str | torch.device) -> None:
        for part in (self.backbone, self.parts.vae):
            if part is not None:
                part.to(device)

    @property
    def classes(self) -> int:
        """The number of classes; 0 for an unconditional model."""
        return self.backbone.config.num_classes or 0

    @property
    def guidable(self) -> bool:
        """Whether the model has learned a null class."""
        return bool(self.classes and self.backbone.config.class_dropout_prob)

    # Values of a call

    def settings(self, requested: Settings, prompt: object) -> Settings:
        """guidance_scale, guidance_power: as published for this model; power p > 0 is DiffiT's schedule, which lets the
        scale rise from 1, and 0 a constant scale. guidance_channels None: 3 of 4, as in the published figures,
        and all for other numbers of channels. eta: the noise of "ddim", from 0 to 1, as much as "ancestral" adds."""
        parts = self.parts
        if requested.guidance_scale not in (None, 1) and not self.guidable:
            raise ValueError(
                f"{parts.name} was trained without a null class, so nothing can be guided. Leave guidance_scale out."
            )
        channels, guided = self.backbone.config.in_channels, self.guidable
        if guided and all(index is None for index in self.indices(prompt)):
            requested, guided = replace(requested, guidance_scale=1.0), False  # both predictions would be the same
        settings = requested.filled(
            num_inference_steps=250,
            guidance_scale=parts.guidance if guided else 1.0,
            guidance_power=parts.power,
            guidance_channels=3 if channels == 4 else "all",
            sampler="ancestral",
            eta=0.0,
        )
        if settings.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be 'ancestral' or 'ddim'; found {settings.sampler!r}.")
        if settings.eta is None or not 0 <= settings.eta <= 1 or (settings.eta and settings.sampler != "ddim"):
            raise ValueError(
                f"eta is the noise of sampler='ddim', 0 to 1; found {settings.eta} with sampler={settings.sampler!r}."
            )
        count = settings.guidance_channels
        if count != "all" and (not isinstance(count, int) or not 1 <= count <= channels):
            raise ValueError(
                f"guidance_channels must be 'all' or a number from 1 to the latent's {channels}, as the published 3; "
                f"found {count!r}."
            )
        return settings

    def describe(self, prompt: object, negative: object, settings: Settings) -> dict[str, object]:
        indices = self.indices(prompt)
        return {
            "label": [None if i is None else self.label(i) for i in indices],
            "class": indices,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.scale,
            "guidance_power": float(settings.guidance_power or 0),
            "guidance_channels": settings.guidance_channels,
            "sampler": settings.sampler,
            "eta": settings.eta,
            "height": settings.height,
            "width": settings.width,
        }

    def count(self, prompt: object) -> int:
        return len(self.indices(prompt))

    def conditions(self, prompt: object, negative: object, settings: Settings) -> Conditions[Tensor | None]:
        if negative is not None:
            raise ValueError(f"{self.parts.name} reads classes and no negative prompt. Leave it out.")
        rows = [index for index in self.indices(prompt) for _ in range(settings.copies)]
        labels = torch.tensor([self.classes if row is None else row for row in rows])

        def condition(positive: bool) -> Tensor | None:
            if not self.classes:
                return None
            chosen = labels if positive else torch.full_like(labels, self.classes)
            return chosen.to(module_device(self.backbone))

        return condition

    def indices(self, label: object) -> list[int | None]:
        """Class numbers from one name, number or None, a list of them, or a tensor."""
        labels = label.tolist() if isinstance(label, Tensor) else label
        labels = [labels] if isinstance(labels, str) or not isinstance(labels, Sequence) else list(labels)
        if not labels:
            raise ValueError("No label in the list; give a class, or None for an image of no class.")
        return [self.index(item) for item in labels]

    def index(self, label: object) -> int | None:
        """The number of a class by name or number. Raises ValueError for an unknown class."""
        name = self.parts.name
        if label is None:
            if self.classes and not self.guidable:
                raise ValueError(f"{name} was trained with classes only: give one of its {self.classes} labels.")
            return None
        if not self.classes:
            raise ValueError(f"{name} is unconditional and has no class {label!r}. Leave the label out.")
        if isinstance(label, str) and self.labels is not None:
            return self.labels.index(label)
        try:
            value = int(label) if isinstance(label, str) and label.isdecimal() else label
            index = operator.index(cast("SupportsIndex", value))
        except TypeError:
            index = -1
        if not 0 <= index < self.classes or isinstance(label, bool):
            names = " It came without class names: see labels.json in condit.weights.class_models."
            raise ValueError(
                f"No class {label!r}: {name} has the classes 0 to {self.classes - 1}."
                f"{names if self.labels is None else ''}"
            )
        return index

    def label(self, index: int) -> str:
        """The name of a class, or its number if it has none."""
        return str(index) if self.labels is None else self.labels.label(index)

    def refuse(self, control: Control) -> str | None:
        if control.acts & {"join", "omit"}:
            return (
                f"joins tokens to the sequence, and {self.parts.name} takes none. Use a control that wraps attention."
            )
        return None

    # Sizes

    @property
    def size(self) -> tuple[int, int]:
        rows, columns = self.backbone.config.latent
        return rows * self.cell, columns * self.cell

    @property
    def cell(self) -> int:
        """Pixels of a latent cell's side; 8, as in all published ones, without an autoencoder."""
        return 8 if self.parts.vae is None else latent_cell(self.parts.vae)

    @property
    def token(self) -> int:
        return self.cell * self.backbone.config.patch_size

    def cells_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return self.backbone.config.in_channels, size[0] // self.cell, size[1] // self.cell

    # Latents

    def check_output(self, output_type: str) -> None:
        if self.parts.vae is None and output_type != "latent":
            raise ValueError(
                f"{self.parts.name} was loaded without an autoencoder. Put the folder of its AutoencoderKL "
                f"(stabilityai/sd-vae-ft-ema) as {self.parts.place / 'vae'}, load with vae=..., or ask for "
                "output_type='latent'."
            )

    def encode(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        self.check_output("pil")  # it needs the autoencoder too
        return encode_latents(self.parts.vae, images, generators)

    def decode(self, latents: Tensor, layout: Layout) -> Tensor:
        return decode_latents(self.parts.vae, latents)

    def arrange(self, cells: Tensor, layout: Layout) -> Tensor:
        return cells

    def check_latents(self, latents: Tensor, layout: Layout) -> Tensor:
        return check_shape(latents, (layout.batch, *self.cells_shape(layout.size)))

    def first(self, noise: Tensor, path: Path) -> Tensor:
        return noise

    def noised(self, x0: Tensor, noise: Tensor, path: Gaussian, level: int) -> Tensor:
        return add_noise(path, x0, torch.tensor(len(path) - 1 - level), noise)

    # A run

    def process(self, steps: int) -> Gaussian:
        """The training's process with its timesteps spread evenly over so many, as the official samplers do.

        The error of a small network that predicts x0 exceeds the noise of the last steps, so there it learns variances
        far above both bounds, and more so in a process of fewer steps: they are clamped to the bounds."""
        learned = "bounded" if self.parts.predicts == "x0" else "learned"
        variance = learned if self.backbone.config.learn_sigma else "large"
        return gaussian(respacing=str(steps), predicts=self.parts.predicts, variance=variance)

    def path(self, settings: Settings, layout: Layout) -> tuple[Sampler, Path]:
        return SAMPLERS[settings.sampler or "ancestral"], self.process(settings.steps)

    def draws_noise(self, settings: Settings) -> bool:
        return settings.sampler == "ancestral" or bool(settings.eta)

    def step_at(self, t: float) -> Step:
        return Step(0, 1, t, round(t * 1000, 6))

    def sides(self, settings: Settings, controlled: bool) -> list[tuple[bool, bool]]:
        return [(True, True)] if settings.scale == 1 else [(True, True), (False, False)]

    def run(self, condition: object, layout: Layout, settings: Settings, controls: Sequence[Control]) -> Run:
        channels, pooled = (
            self.backbone.config.in_channels,
            torch.zeros(layout.batch, 0, device=module_device(self.backbone)),
        )
        return Run(self.backbone, layout.batch, layout.grid, pooled, None, channels, memory=layout.memory)

    def joins(self, settings: Settings, acts: frozenset[Act]) -> bool:
        return not acts  # with controls the halves run one after the other

    def network(
        self, conditions: Sequence[Tensor | None], layout: Layout, settings: Settings, extra: Tensor | None = None
    ) -> Network:
        """The backbone with its classes and, for DiffiT, its biases, which do not depend on the step."""
        known = [labels for labels in conditions if labels is not None]
        labels, dtype = torch.cat(known) if known else None, module_dtype(self.backbone)
        backbone: Callable[..., Tensor] = self.backbone
        if isinstance(self.backbone, DiffiT):
            backbone = partial(self.backbone, biases=self.backbone.biases(layout.grid))

        def output(x: Tensor, step: Step, controls: Sequence[Control]) -> Tensor:
            times = torch.full((len(x),), step.time, device=x.device)
            return backbone(x.to(dtype), times, labels, controls=controls).float()

        return output

    def guide(self, outputs: Sequence[Tensor], step: Step, settings: Settings) -> Tensor:
        """Guides the first channels of the latent, usually three (see `guidance.class_guidance`)."""
        channels = self.backbone.config.in_channels
        guided = channels if settings.guidance_channels == "all" else int(settings.guidance_channels or channels)
        scale: float | Tensor = settings.scale
        if settings.guidance_power:
            times = torch.full((len(outputs[0]),), step.time, device=outputs[0].device)
            scale = power_cosine_scale(times, settings.scale, power=settings.guidance_power)[:, None, None, None]
        return guide_channels(outputs[0], outputs[1], scale, guided)
