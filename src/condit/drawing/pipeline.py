"""The pipeline: encode, sample, decode; N prompts and N references become N images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from condit.controls.control import Control, Pair, Run, Step, check_controls
from condit.data.images import ImageSource, to_images
from condit.diffusion.gaussian_samplers import draw
from condit.diffusion.guidance import guide, guide_text_image
from condit.diffusion.objectives import to_velocity
from condit.diffusion.samplers import euler
from condit.diffusion.schedules import flow_sigmas
from condit.drawing import edit as editing
from condit.drawing.references import MAX_SIDE, describe_source, find_fill, read_references
from condit.encoders.image import CLIPImage
from condit.encoders.text import Text
from condit.encoders.vae import decode_tokens, encode_tokens, pack
from condit.nn.lora import sum_loras
from condit.nn.offload import OffloadedBlocks, on_device, with_blocks
from condit.nn.streams import Stream, grid_ids
from condit.weights.catalog import AdapterFile, read_adapter
from condit.weights.clip_towers import load_image_encoder
from condit.weights.load import Parts

if TYPE_CHECKING:
    from condit.diffusion.inversion import Solver
    from condit.drawing.edit import Editor

MAX_STEPS = 1000
Offload = Literal["encoders", "blocks"]


@dataclass(frozen=True)
class Result:
    """Images of a call: PIL images, or a tensor (B, 3, H, W) in [-1, 1], or latents, by `output_type`."""

    images: Any
    seeds: list[int | None]
    recipe: dict


@dataclass(frozen=True)
class Branch:
    """One side of the guidance: a text and the controls that act in it."""

    text: Text
    controls: tuple[Control, ...]
    guidance: Tensor | None


class Pipeline:
    """A loaded model. It is not changed by a call: controls are values that a call receives.

    offload: text encoder and autoencoder ("encoders"), or the transformer's blocks too ("blocks"), rest on the CPU and
    are copied to the device for their turn.
    """

    def __init__(self, parts: Parts, *, offload: Offload | None = None):
        if offload not in (None, "encoders", "blocks"):
            raise ValueError(f"offload must be 'encoders', 'blocks' or None; found {offload!r}.")
        self.parts, self.offload = parts, offload
        self.name, self.backbone, self.image = parts.name, parts.backbone, parts.image
        if offload == "blocks":
            self.backbone = with_blocks(parts.backbone, OffloadedBlocks)
            self.parts = replace(parts, backbone=self.backbone)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels at which it draws, and reads references, unless told otherwise."""
        return self.parts.size

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def to(self, device: str | torch.device) -> Pipeline:
        """Move every part, in place; returns the pipeline."""
        moving = (self.image,) if self.offload else (self.parts.text, self.parts.vae, self.image)
        for part in moving:
            if part is not None:
                part.to(device)
        if self.offload == "blocks":
            for part in self.backbone.children():
                part.move(device) if isinstance(part, OffloadedBlocks) else part.to(device)
        else:
            self.backbone.to(device)
        return self

    def on_duty(self, part: Any) -> Any:
        """The text encoder or the autoencoder where it computes."""
        return on_device(part, self.device) if self.offload and isinstance(part, nn.Module) else part

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        controls: Sequence[Control] = (),
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "pt", "latent"] = "pil",
        callback_on_step_end: Callable[[Pipeline, int, float, dict], dict | None] | None = None,
    ) -> Result:
        """Draw. Arguments as in diffusers; `seed` is sugar: image i starts from noise of seed + i, drawn on the CPU.
        eta: the share of each step's noise that is drawn afresh (`diffusion/samplers.py`); None: the model's own.

        guidance_scale 1 makes one prediction a step, not two. image_guidance_scale, if given, guides the controls apart
        from the text: none + s_T (text - none) + s_I (text and controls - text).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        steps = self.parts.steps if num_inference_steps is None else num_inference_steps
        scale = self.parts.guidance if guidance_scale is None else guidance_scale
        eta = self.parts.eta if eta is None else eta
        height, width = height or self.parts.size[0], width or self.parts.size[1]
        self.check(prompts, steps, height, width, num_images_per_prompt, output_type)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be 0 to 1; found {eta}.")
        batch = len(prompts) * num_images_per_prompt
        grid = height // self.pixels, width // self.pixels
        negative = self.negatives(negative_prompt, len(prompts))
        controls = [control.sized((height, width), self) for control in check_controls(controls)]
        fill = find_fill(controls, grid)
        cells = None if fill is None else fill.cells.to(self.device)
        branches = self.branches(
            prompts, negative, tuple(controls), batch, grid, scale, image_guidance_scale, num_images_per_prompt, cells
        )
        seeds, generators = image_generators(batch, seed, generator)
        if latents is not None and not eta:
            seeds: list[int | None] = [None] * batch  # no number has drawn anything
        start = self.noise(grid, generators) if latents is None else self.given(latents, batch, grid)
        ids = grid_ids(*grid).to(self.device)
        if cells is not None:
            start, ids = start[:, cells], ids[cells]
        sigmas = flow_sigmas(steps, shift=self.parts.shift_of(len(ids)))
        image_scale = 1.0 if image_guidance_scale is None else image_guidance_scale

        def velocity(x: Tensor, sigma: Tensor, i: int) -> Tensor:
            return self.guided(branches, x, sigma, ids, Step(i, steps, float(sigma)), scale, image_scale)

        def on_step(i: int, x: Tensor) -> Tensor | None:
            if callback_on_step_end is None:
                return None
            return (callback_on_step_end(self, i, float(sigmas[i]), {"latents": x}) or {}).get("latents")

        def noise() -> Tensor:
            drawn = self.noise(grid, generators)
            return drawn if cells is None else drawn[:, cells]

        tokens = euler(velocity, start, sigmas, eta=eta, noise=noise, on_step=on_step)
        if fill is not None:
            tokens = fill.complete(tokens)
        recipe = {
            "model": self.name,
            "hash": self.parts.hash,
            "prompt": prompts,
            "negative_prompt": negative,
            "num_inference_steps": steps,
            "guidance_scale": scale,
            "image_guidance_scale": image_guidance_scale,
            "eta": eta,
            "height": height,
            "width": width,
            "seeds": seeds,
            "controls": [c.describe() for c in controls],
        }
        return Result(self.decode(tokens, grid, output_type), seeds, recipe)

    edit, invert = editing.edit, editing.invert

    def editor(self, solver: Solver | None = None, iterations: int | None = None) -> Editor:
        """What `edit` and `invert` work with; None: its own defaults."""
        from condit.drawing.edit_flow import FlowEditor

        return FlowEditor(self, "fixed_point" if solver is None else solver, 2 if iterations is None else iterations)

    def check(
        self, prompts: list[str], steps: int, height: int, width: int, copies: int = 1, output_type: str = "pil"
    ) -> None:
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompt must be a string or a list of strings; found {prompts!r}.")
        check_counts(steps, copies, output_type)
        check_size((height, width), self.pixels)
        if self.name == "tiny" and (height, width) != self.parts.size:
            raise ValueError(
                f"{self.name} draws {self.parts.size[0]} x {self.parts.size[1]}; found {height} x {width}."
            )

    @property
    def pixels(self) -> int:
        """Pixels of a token's side."""
        vae = self.parts.vae
        return 2 * (vae.config.patch if hasattr(vae.config, "patch") else 2 ** (len(vae.config.block_out_channels) - 1))

    def negatives(self, negative: str | Sequence[str] | None, n: int) -> list[str]:
        if self.parts.distilled and negative:
            raise ValueError(
                f"{self.name} has its guidance inside the model, with no unconditional prediction: a negative prompt "
                "has no effect. Leave it out."
            )
        return negative_prompts(negative, n)

    def branches(
        self,
        prompts: list[str],
        negative: list[str],
        controls: tuple[Control, ...],
        batch: int,
        grid: tuple[int, int],
        scale: float,
        image_scale: float | None,
        copies: int,
        cells: Tensor | None,
        edit: Pair | None = None,
        memory: dict | None = None,
    ) -> list[Branch]:
        """Positive first; then text alone (if the controls have a scale of their own); then neither."""
        memory = {} if memory is None else memory  # what the controls of this call share over the branches

        def branch(texts: list[str], acting: Sequence[Control | None]) -> Branch:
            text = self.encode_text(texts, copies)
            leak = sum_loras(c.leak() for c in acting if c is not None)
            if cells is not None and text.canvas is not None:
                text = replace(text, canvas=text.canvas[:, cells])
            guidance = None
            if self.backbone.config.guidance_embeds:
                guidance = torch.full((batch,), float(scale), device=self.device, dtype=self.dtype)
            channels = self.backbone.config.in_channels
            run = Run(self.backbone, batch, grid, text.pooled, guidance, channels, cells, leak, memory, edit)
            return Branch(text, tuple(c.prepare(run) for c in acting if c is not None), guidance)

        absent = [c.negative() for c in controls]
        found = [branch(prompts, controls)]
        if self.parts.distilled:
            # Guidance is inside the model; a second prediction exists only to guide the controls.
            return found + ([branch(prompts, absent)] if image_scale not in (None, 1.0) else [])
        if image_scale is not None and controls:
            found.append(branch(prompts, absent))
        if scale != 1.0 or len(found) > 1:
            found.append(branch(negative, absent))
        return found

    def guided(
        self,
        branches: Sequence[Branch],
        x: Tensor,
        sigma: Tensor,
        ids: Tensor,
        step: Step,
        scale: float,
        image_scale: float,
    ) -> Tensor:
        """Velocity of all branches together."""
        found = [self.predict(branch, x, sigma, ids, step) for branch in branches]
        if len(found) == 1:
            return found[0]
        if len(found) == 2:
            return guide(found[0], found[1], image_scale if self.parts.distilled else scale)
        return guide_text_image(found[0], found[1], found[2], scale, image_scale)

    def predict(self, branch: Branch, x: Tensor, sigma: Tensor, ids: Tensor, step: Step) -> Tensor:
        """Velocity of one branch, (B, N, C) in float32: the state of the sampler stays in float32."""
        t = sigma.to(self.device).expand(len(x))
        active = [c for c in (control.at(step) for control in branch.controls) if c is not None]
        tokens = x.to(self.dtype)
        if branch.text.canvas is not None:
            tokens = torch.cat([tokens, branch.text.canvas.to(self.dtype)], -1)
        lora = sum_loras(control.lora() for control in active)
        image = Stream(tokens, ids, t.to(self.dtype), branch.text.pooled, branch.guidance, lora)
        conditions = [stream for control in active for stream in control.streams()]
        text_ids = torch.zeros(branch.text.tokens.shape[1], 3, device=self.device)
        out = self.backbone(image, branch.text.tokens, text_ids, conditions=conditions, controls=active)
        return to_velocity(out.float(), x, t, self.parts.prediction)  # type: ignore[arg-type]

    def encode_text(self, prompts: list[str], copies: int = 1) -> Text:
        text = self.on_duty(self.parts.text)(prompts)
        index = torch.arange(len(prompts)).repeat_interleave(copies).to(text.pooled.device)
        text = text.rows(index)
        return replace(text, tokens=text.tokens.to(self.dtype), pooled=text.pooled.to(self.dtype))

    def noise(self, grid: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor:
        """Packed noise (B, N, C) in float32, each image from its own generator: a row does not know its batch."""
        return pack(draw((self.channels, 2 * grid[0], 2 * grid[1]), generators)).to(self.device)

    def given(self, latents: Tensor, batch: int, grid: tuple[int, int]) -> Tensor:
        """Packed latents of the caller, checked, in float32."""
        expected = (batch, grid[0] * grid[1], 4 * self.channels)
        if tuple(latents.shape) != expected:
            raise ValueError(f"latents must be packed tokens {expected}; found {tuple(latents.shape)}.")
        return latents.float().to(self.device)

    @property
    def channels(self) -> int:
        """Of a latent, before it is packed."""
        return (self.backbone.config.out_channels or self.backbone.config.in_channels) // 4

    def decode(self, tokens: Tensor, grid: tuple[int, int], output_type: str) -> Any:
        if output_type == "latent":
            return tokens
        if not torch.isfinite(tokens).all():
            raise ValueError("The sampler produced NaN. Lower the strengths or guidance, or use dtype=torch.float32.")
        dtype = next(self.parts.vae.parameters()).dtype
        images = decode_tokens(self.on_duty(self.parts.vae), tokens.to(dtype), grid).float()
        return images if output_type == "pt" else to_images(images)

    # What adapters ask of a pipeline.

    def adapter_file(self, source: str | Path, method: str) -> AdapterFile:
        """The tensors and the configuration of an adapter by name, file or folder."""
        return read_adapter(source, method)

    def read_images(
        self,
        reference: ImageSource | Sequence[ImageSource],
        annotator: str | None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """References as (n, 3, H, W) in [-1, 1] at `size` (None: the model's), annotated if asked for."""
        return read_references(reference, annotator, size or self.size, self.pixels).to(self.device)

    @torch.no_grad()
    def encode_condition(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Images (n, 3, H, W) through the model's own autoencoder: packed tokens and their grid (rows, columns). They
        are the mode of its posterior, or drawn from it by `generator`."""
        dtype = next(self.parts.vae.parameters()).dtype
        vae = self.on_duty(self.parts.vae)
        encoded = encode_tokens(vae, images.to(dtype), generator, sample=generator is not None)
        tokens = encoded.to(self.dtype)
        return tokens, (images.shape[-2] // self.pixels, images.shape[-1] // self.pixels)

    def image_encoder(self, folder: str | Path) -> CLIPImage:
        """A CLIP image tower from its folder, where the model computes."""
        return load_image_encoder(folder).to(self.device)

    def describe_source(self, reference: Any) -> list:
        """What a recipe keeps of a reference."""
        return describe_source(reference)


def check_size(size: tuple[int, int], side: int) -> None:
    """ValueError unless height and width are multiples of `side`, which is what the model's smallest part covers."""
    if any(pixels % side or not 0 < pixels <= MAX_SIDE for pixels in size):
        raise ValueError(f"height and width must be multiples of {side} up to {MAX_SIDE}; found {size[0]} x {size[1]}.")


def check_counts(
    steps: int, copies: int, output_type: str, *, fewest: int = 1, kinds: Sequence[str] = ("pil", "pt", "latent")
) -> None:
    """ValueError for numbers of steps (`fewest`: the sampler's) and of pictures, or a kind of output, that none is."""
    if not isinstance(steps, Integral) or not fewest <= steps <= MAX_STEPS:
        raise ValueError(f"num_inference_steps must be {fewest} to {MAX_STEPS}; found {steps}.")
    if not isinstance(copies, Integral) or copies < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1; found {copies}.")
    if output_type not in kinds:
        named = f"{', '.join(map(repr, kinds[:-1]))} or {kinds[-1]!r}"
        raise ValueError(f"output_type must be {named}; found {output_type!r}.")


def negative_prompts(negative: str | Sequence[str] | None, n: int) -> list[str]:
    """n negative prompts from one, several or none."""
    found = [negative or ""] * n if negative is None or isinstance(negative, str) else list(negative)
    if len(found) != n:
        raise ValueError(f"{len(found)} negative prompts for {n} prompts. Give one, or as many as prompts.")
    return found


def image_generators(
    batch: int, seed: int | None, generator: torch.Generator | Sequence[torch.Generator] | None
) -> tuple[list[int | None], list[torch.Generator]]:
    """A generator an image, and the seeds: image i has seed + i (None: a random start), or one that was given."""
    if generator is not None and seed is not None:
        raise ValueError("Give seed or generator, not both.")
    if generator is not None:
        given = [generator] * batch if isinstance(generator, torch.Generator) else list(generator)
        if len(given) != batch:
            raise ValueError(f"{len(given)} generators for {batch} images.")
        return [None] * batch, given
    first = torch.Generator().seed() % 2**31 if seed is None else seed  # torch.seed() would reseed everybody
    return [first + i for i in range(batch)], [torch.Generator().manual_seed(first + i) for i in range(batch)]
