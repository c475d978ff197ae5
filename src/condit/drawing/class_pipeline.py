"""Pictures of classes: DiT (arXiv:2212.09748) and DiffiT (arXiv:2312.02139), drawn in latents from noise.

Each picture has a generator of its own, for its first noise and for that of every step, so it does not depend on the
batch it was drawn in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from condit.backbones.diffit import DiffiT
from condit.controls.control import Control, Run, Step, check_controls
from condit.data.images import to_images
from condit.diffusion.gaussian import Denoise, Gaussian, gaussian
from condit.diffusion.gaussian_samplers import Noise, ancestral, ddim, image_noise
from condit.diffusion.guidance import class_guidance, power_cosine_scale
from condit.drawing.pipeline import Result, check_counts, check_size, image_generators
from condit.encoders.vae import decode_latents
from condit.weights.class_models import ClassParts

Label = str | int | None
Sampler = Literal["ancestral", "ddim"]
Callback = Callable[["ClassPipeline", int, float, dict], dict | None]


@dataclass(frozen=True)
class Drawing:
    """What a call asks for, checked. rows: the class of every picture, None for no class."""

    rows: list[int | None]
    size: tuple[int, int]  # pixels
    grid: tuple[int, int]  # rows and columns of tokens
    process: Gaussian
    scale: float
    power: float
    channels: int | None  # guided ones; None: all
    controls: tuple[Control, ...]


class ClassPipeline:
    """A loaded DiT or DiffiT. It is not changed by a call: controls are values that a call receives."""

    def __init__(self, parts: ClassParts):
        self.parts = parts
        self.name, self.backbone, self.labels = parts.name, parts.backbone, parts.labels

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def classes(self) -> int:
        """How many classes the model knows; 0 for an unconditional one."""
        return self.backbone.config.num_classes or 0

    @property
    def guidable(self) -> bool:
        """Whether the model knows what no class looks like."""
        return bool(self.classes and self.backbone.config.class_dropout_prob)

    @property
    def pixels(self) -> int:
        """Pixels of a latent's side; 8, as all published ones have, without an autoencoder."""
        if self.parts.vae is None:
            return 8
        config = self.parts.vae.config
        return config.patch if hasattr(config, "patch") else 2 ** (len(config.block_out_channels) - 1)

    @property
    def token(self) -> int:
        """Pixels of a token's side."""
        return self.pixels * self.backbone.config.patch_size

    def to(self, device: str | torch.device) -> ClassPipeline:
        """Move every part, in place; returns the pipeline."""
        for part in (self.backbone, self.parts.vae):
            if part is not None:
                part.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        label: Label | Sequence[Label] | Tensor = None,
        *,
        num_inference_steps: int = 250,
        guidance_scale: float | None = None,
        guidance_power: float | None = None,
        guidance_channels: int | Literal["all"] | None = None,
        sampler: Sampler = "ancestral",
        eta: float = 0.0,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        output_type: Literal["pil", "pt", "latent"] = "pil",
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        controls: Sequence[Control] = (),
    ) -> Result:
        """Draw classes, by name or number; None: of no class. `seed` is sugar: image i is drawn with seed + i.

        guidance_scale, guidance_power None: as published for this model; scale 1 makes one prediction a step, not two,
        and so does no class. Power p > 0 is DiffiT's schedule, which lets the scale rise from 1; 0 a constant scale.
        guidance_channels: how many of the latent's are guided; None: 3 of 4, which the published figures rest on, and
        all of any other number. eta: noise of "ddim", from 0, none, to 1, as "ancestral". latents: the first noise
        (B, C, h, w).
        """
        indices = [self.index(item) for item in _as_list(label)]
        self.check(sampler, eta, output_type, num_inference_steps, num_images_per_prompt, controls)
        scale = self.scale(guidance_scale, indices)
        size = self.size(height, width)
        drawing = Drawing(
            rows=[index for index in indices for _ in range(num_images_per_prompt)],
            size=size,
            grid=(size[0] // self.token, size[1] // self.token),
            process=self.process(num_inference_steps),
            scale=scale,
            power=self.parts.power if guidance_power is None else float(guidance_power),
            channels=_channels(guidance_channels, self.backbone.config.in_channels),
            controls=tuple(controls),
        )
        seeds, generators = image_generators(len(drawing.rows), seed, generator)
        noise = image_noise(generators)
        x = self.start(latents, drawing, noise)
        times = drawing.process.timesteps.flip(0).tolist()

        def on_step(i: int, x: Tensor, x0: Tensor) -> Tensor | None:
            if callback_on_step_end is None:
                return None
            return (callback_on_step_end(self, i, float(times[i]), {"latents": x}) or {}).get("latents")

        denoise = self.denoiser(drawing)
        if sampler == "ancestral":
            x = ancestral(denoise, x, drawing.process, noise=noise, on_step=on_step)
        else:
            x = ddim(denoise, x, drawing.process, eta=eta, noise=noise, on_step=on_step)
        recipe = {
            "model": self.name,
            "hash": self.parts.hash,
            "label": [None if i is None else self.label(i) for i in indices],
            "class": indices,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": scale,
            "guidance_power": drawing.power,
            "guidance_channels": "all" if drawing.channels is None else drawing.channels,
            "sampler": sampler,
            "eta": eta,
            "height": size[0],
            "width": size[1],
            "seeds": seeds,
            "controls": [c.describe() for c in controls],
        }
        return Result(self.decode(x, output_type), seeds, recipe)

    # At the door

    def index(self, label: Label) -> int | None:
        """The number of a class given by name or number; ValueError if the model does not know it."""
        if label is None:
            if self.classes and not self.guidable:
                raise ValueError(f"{self.name} was trained with classes only: give one of its {self.classes} labels.")
            return None
        if not self.classes:
            raise ValueError(f"{self.name} is unconditional, it knows no class {label!r}. Leave the label out.")
        if isinstance(label, str) and self.labels is not None:
            return self.labels.index(label)
        try:
            index = int(label) if isinstance(label, str) and label.isdecimal() else operator.index(label)  # type: ignore[arg-type]
        except TypeError:
            index = -1
        if not 0 <= index < self.classes or isinstance(label, bool):
            names = " It came without class names: see labels.json in condit.weights.class_models."
            raise ValueError(
                f"No class {label!r}: {self.name} has the classes 0 to {self.classes - 1}."
                f"{names if self.labels is None else ''}"
            )
        return index

    def label(self, index: int) -> str:
        """The name of a class; its number where it has none."""
        return str(index) if self.labels is None else self.labels.label(index)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels; those of the training where they are not given."""
        rows, columns = self.backbone.config.latent
        height = rows * self.pixels if height is None else height
        width = columns * self.pixels if width is None else width
        check_size((height, width), self.token)
        return height, width

    def scale(self, given: float | None, indices: Sequence[int | None]) -> float:
        """The guidance scale: 1 where both predictions would be the same."""
        if given not in (None, 1) and not self.guidable:
            raise ValueError(
                f"{self.name} was trained without a null class, so nothing can be guided. Leave guidance_scale out."
            )
        if not self.guidable or all(index is None for index in indices):
            return 1.0
        return self.parts.guidance if given is None else float(given)

    def check(
        self, sampler: str, eta: float, output_type: str, steps: int, copies: int, controls: Sequence[Control]
    ) -> None:
        if sampler not in ("ancestral", "ddim"):
            raise ValueError(f"sampler must be 'ancestral' or 'ddim'; found {sampler!r}.")
        if not 0 <= eta <= 1 or (eta and sampler != "ddim"):
            raise ValueError(f"eta is the noise of sampler='ddim', 0 to 1; found {eta} with sampler={sampler!r}.")
        check_counts(steps, copies, output_type, fewest=2)
        if self.parts.vae is None and output_type != "latent":
            raise ValueError(
                f"{self.name} was loaded without an autoencoder. Put the folder of its AutoencoderKL (stabilityai/"
                f"sd-vae-ft-ema) as {self.parts.place / 'vae'}, load with vae=..., or ask for output_type='latent'."
            )
        for control in check_controls(controls):
            if control.acts & {"join", "omit"}:
                raise ValueError(
                    f"{type(control).__name__} joins tokens to the sequence, and {self.name} takes none. "
                    "Use a control that wraps attention."
                )

    def process(self, steps: int) -> Gaussian:
        """The training's process with its timesteps spread evenly over so many, as the official samplers do.

        A small network that predicts x0 misses it at little noise by more than those steps' noise, so there it learns
        variances far above both bounds, which a process of fewer steps multiplies: they are kept between them."""
        learned = "bounded" if self.parts.predicts == "x0" else "learned"
        variance = learned if self.backbone.config.learn_sigma else "large"
        return gaussian(respacing=str(steps), predicts=self.parts.predicts, variance=variance)

    def start(self, latents: Tensor | None, drawing: Drawing, noise: Noise) -> Tensor:
        """The first noise (B, C, h, w) in float32, given or drawn."""
        height, width = drawing.size[0] // self.pixels, drawing.size[1] // self.pixels
        shape = len(drawing.rows), self.backbone.config.in_channels, height, width
        if latents is None:
            return noise(torch.empty(shape, device=self.device))
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must be noise of shape {shape}; found {tuple(latents.shape)}.")
        return latents.float().to(self.device)

    # A step

    def denoiser(self, drawing: Drawing) -> Denoise:
        """The guided prediction of a whole drawing: called once a step, from the first to the last."""
        network = self.network(drawing)
        if not self.classes:
            return lambda x, t: network(x, t, None)
        rows = [self.classes if row is None else row for row in drawing.rows]  # the null class stands last
        scale: float | Callable[[Tensor], Tensor] = drawing.scale
        if drawing.power and drawing.scale != 1:
            scale = partial(power_cosine_scale, scale=drawing.scale, power=drawing.power)
        labels = torch.tensor(rows, device=self.device)
        return class_guidance(network, labels, self.classes, scale, channels=drawing.channels)

    def network(self, drawing: Drawing) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The backbone with what holds for all steps: its biases, and the controls of either half of a guided batch."""
        backbone: Callable[..., Tensor] = self.backbone
        if isinstance(self.backbone, DiffiT):
            backbone = partial(self.backbone, biases=self.backbone.biases(drawing.grid))
        batch, steps = len(drawing.rows), len(drawing.process)
        present, absent = self.prepare(drawing)
        numbers = iter(range(steps))

        def predict(x: Tensor, t: Tensor, y: Tensor | None, controls: Sequence[Control], step: Step) -> Tensor:
            active = [c for c in (control.at(step) for control in controls) if c is not None]
            return backbone(x.to(self.dtype), t, y, controls=active).float()

        def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            number = next(numbers)
            step = Step(number, steps, float(drawing.process.timesteps[-1 - number]) / 1000)
            if y is None or not drawing.controls or len(x) == batch:
                return predict(x, t, y, present, step)
            # A control may be absent from the second half, so the halves go one after the other.
            first, second = zip(x.chunk(2), t.chunk(2), y.chunk(2), strict=True)
            return torch.cat([predict(*first, present, step), predict(*second, absent, step)])

        return network

    def prepare(self, drawing: Drawing) -> tuple[list[Control], list[Control]]:
        """The controls of this run beside the class, and beside no class."""
        batch, channels = len(drawing.rows), self.backbone.config.in_channels
        run = Run(self.backbone, batch, drawing.grid, torch.zeros(batch, 0), None, channels)  # type: ignore[arg-type]
        absent = [control.negative() for control in drawing.controls]
        return [c.prepare(run) for c in drawing.controls], [c.prepare(run) for c in absent if c is not None]

    def decode(self, latents: Tensor, output_type: str) -> Any:
        """Latents (B, C, h, w) -> pictures, a tensor (B, 3, H, W) in [-1, 1], or the latents."""
        if output_type == "latent":
            return latents
        if not torch.isfinite(latents).all():
            raise ValueError("The sampler produced NaN. Lower the guidance, or use dtype=torch.float32.")
        images = decode_latents(self.parts.vae, latents)
        return images if output_type == "pt" else to_images(images)


def _as_list(label: Label | Sequence[Label] | Tensor) -> list[Label]:
    given: Any = label
    given = given.tolist() if isinstance(given, Tensor) else given
    labels = [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)
    if not labels:
        raise ValueError("No label in the list; give a class, or None to draw of no class.")
    return labels


def _channels(given: int | str | None, channels: int) -> int | None:
    if given is None:
        return 3 if channels == 4 else None
    if given != "all" and (not isinstance(given, int) or not 1 <= given <= channels):
        raise ValueError(
            f"guidance_channels must be 'all' or a number from 1 to the latent's {channels}, as the published 3; found "
            f"{given!r}."
        )
    return None if given == "all" else int(given)
