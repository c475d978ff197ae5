"""Pictures of prompts in latents: Stable Diffusion 1.x, 2.x, SDXL and whatever else comes as `LatentParts`.

Text to image, image to image and inpainting by one call. Each picture has a generator of its own for all its noise, so
it does not depend on the batch it was drawn in. The latents of every solver have unit variance at full noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from condit.controls.control import Control, Pair, Run, Step, check_controls, match_batch
from condit.controls.sides import sides
from condit.data.images import to_images
from condit.diffusion.gaussian_samplers import image_noise
from condit.diffusion.guidance import guide, guide_text_image, rescale
from condit.diffusion.vp import Process, Solver, make_path, step_count, with_sampler
from condit.diffusion.vp_samplers import sample
from condit.drawing import edit as editing
from condit.drawing.image_to_image import Images, check_picture, repainted, skipped, start_of
from condit.drawing.pipeline import Result, check_counts, check_size, image_generators, negative_prompts
from condit.drawing.references import describe_source, read_references
from condit.encoders.image import CLIPImage, TextTower, TinyImage, TinyWords
from condit.encoders.text import Text, join_texts
from condit.encoders.vae import decode_latents, encode_latents
from condit.nn.lora import LowRank, together
from condit.weights.catalog import AdapterFile
from condit.weights.clip_towers import load_image_encoder, load_text_tower
from condit.weights.latent_models import Frame, LatentParts, Network
from condit.weights.lora_unet import adapter_for

if TYPE_CHECKING:
    from condit.diffusion.inversion import Solver as InversionSolver
    from condit.drawing.edit import Editor

Prompt = str | Sequence[str] | Text
Sampler = Literal["ddim", "ddim-ldm", "dpm++", "dpm++-karras", "euler", "euler-karras", "euler-ancestral"]
Callback = Callable[["LatentPipeline", int, float, dict], dict | None]


@dataclass(frozen=True)
class Branch:
    """One side of the guidance: a text and the controls that act in it."""

    text: Text
    controls: tuple[Control, ...]


class LatentPipeline:
    """A loaded model. It is not changed by a call: controls are values that a call receives."""

    def __init__(self, parts: LatentParts):
        self.parts = parts
        self.name, self.image = parts.name, parts.image
        self.backbone: Any = parts.backbone

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

    @property
    def pixels(self) -> int:
        """Pixels of a latent cell's side."""
        config = self.parts.vae.config
        return config.patch if hasattr(config, "patch") else 2 ** (len(config.block_out_channels) - 1)

    @property
    def patch(self) -> int:
        """Latent cells of a token's side: 1 on UNets."""
        return getattr(self.backbone.config, "patch_size", 1)

    @property
    def repaints(self) -> bool:
        """Whether it is an inpainting model, which reads the mask and the picture around it beside the latents."""
        return self.backbone.config.in_channels == 2 * self.channels + 1

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.parts.vae.config.latent_channels

    def to(self, device: str | torch.device) -> LatentPipeline:
        """Move every part, in place; returns the pipeline."""
        for part in (self.backbone, self.parts.text, self.parts.vae, self.image):
            if isinstance(part, torch.nn.Module):
                part.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt,
        negative_prompt: Prompt | None = None,
        *,
        controls: Sequence[Control] = (),
        image: Images | None = None,
        mask_image: Images | None = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        image_guidance_scale: float | None = None,
        guidance_in_one_call: bool = True,
        sampler: Sampler | None = None,
        eta: float = 0.0,
        clip_skip: int | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "pt", "latent"] = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> Result:
        """Draw. Arguments as in diffusers; `seed` is sugar: image i has noise of seed + i, drawn on the CPU.

        prompt: words, or a `Text` that was encoded before. image: start from it, changed by `strength` in (0, 1]
        (None: 0.8, with a mask 1); mask_image: repaint where it is white. guidance_scale 1 makes one prediction a step,
        not two; guidance_in_one_call False makes them one after the other, in half the memory. image_guidance_scale, if
        given, guides the controls apart from the text: none + s_T (text - none) + s_I (text and controls - text).
        sampler None: the model's own; "ddim-ldm": DDIM with the steps of the released Stable Diffusion and DEADiff.
        timesteps: the steps themselves, falling, instead of their number. eta: DDIM's noise, 0 to 1. latents: the first
        noise (B, C, h, w), of unit variance. original_size, crops_coords_top_left, target_size: what SDXL is told, in
        pixels.
        """
        steps = step_count(num_inference_steps, timesteps, self.parts.steps)
        scale = self.parts.guidance if guidance_scale is None else guidance_scale
        size = height or self.parts.size[0], width or self.parts.size[1]
        count = _count(prompt)
        self.check(size, steps, num_images_per_prompt, output_type, controls)
        if strength is None:
            strength = 0.8 if image is not None and mask_image is None else 1.0
        check_picture(self, image, mask_image, strength)
        solver, process = self.solver(sampler, eta)
        path = make_path(process, solver, steps, timesteps=timesteps)
        path = path.since(skipped(len(path), strength))
        batch = count * num_images_per_prompt
        texts = self.texts(prompt, negative_prompt, count, num_images_per_prompt, clip_skip)
        branches = self.branches(texts, tuple(controls), batch, size, scale, image_guidance_scale)
        seeds, generators = image_generators(batch, seed, generator)
        start = start_of(self, image, mask_image, strength, size, path, generators, latents)
        frame = Frame(size, original_size or size, crops_coords_top_left, target_size or size)
        predict = self.predictor(branches, frame, len(path), process, start.beside, guidance_in_one_call)

        def denoise(x: Tensor, t: float, i: int) -> Tensor:
            found = predict(x, t, i)
            if len(found) == 1:
                return found[0]
            if len(found) == 2:
                guided = guide(found[0], found[1], scale)
            else:
                guided = guide_text_image(found[0], found[1], found[2], scale, image_guidance_scale or 0.0)
            return rescale(guided, found[0], guidance_rescale) if guidance_rescale else guided

        def on_step(i: int, x: Tensor, x0: Tensor) -> Tensor:
            x = repainted(x, start, path, i)
            if callback_on_step_end is None:
                return x
            told = callback_on_step_end(self, i, float(path.timesteps[i]), {"latents": x}) or {}
            return told.get("latents", x)

        noise = image_noise(generators)
        x = sample(solver, process, denoise, start.x, path, eta=eta, noise=noise, on_step=on_step)
        recipe = {
            "model": self.name,
            "hash": self.parts.hash,
            "prompt": _words(prompt),
            "negative_prompt": _words(negative_prompt),
            "num_inference_steps": steps,
            "timesteps": None if timesteps is None else list(timesteps),
            "sampler": sampler or solver + ("-karras" if process.use_karras_sigmas else ""),
            "eta": eta,
            "guidance_scale": scale,
            "guidance_rescale": guidance_rescale,
            "image_guidance_scale": image_guidance_scale,
            "clip_skip": clip_skip,
            "height": size[0],
            "width": size[1],
            "original_size": list(frame.original),
            "crops_coords_top_left": list(frame.crop),
            "target_size": list(frame.target),
            "image": None if image is None else describe_source(image),
            "mask_image": None if mask_image is None else describe_source(mask_image),
            "strength": None if image is None else strength,
            "seeds": seeds,
            "controls": [c.describe() for c in controls],
        }
        return Result(self.decode(x, output_type), seeds, recipe)

    edit, invert = editing.edit, editing.invert

    def editor(self, solver: InversionSolver | None = None, iterations: int | None = None) -> Editor:
        """What `edit` and `invert` work with; None: its own defaults."""
        from condit.drawing.edit_noise import NoiseEditor

        return NoiseEditor(self, "dpmpp2m" if solver is None else solver, 3 if iterations is None else iterations)

    # At the door

    def check(
        self, size: tuple[int, int], steps: int, copies: int, output_type: str, controls: Sequence[Control]
    ) -> None:
        check_size(size, self.pixels * self.patch)
        check_counts(steps, copies, output_type)
        for control in check_controls(controls):
            if type(control).streams is not Control.streams or type(control).fill is not Control.fill:
                raise ValueError(
                    f"{type(control).__name__} joins tokens to the sequence, and {self.name} takes none. "
                    "Use a control that wraps attention, such as IPAdapter."
                )

    def solver(self, sampler: Sampler | None, eta: float) -> tuple[Solver, Process]:
        """The solver and the process with its levels, of a sampler's name."""
        if sampler is None and self.parts.solver is None:
            raise ValueError(f"The scheduler of {self.name} is none of ours: give sampler=, one of {_SAMPLERS}.")
        name = sampler or self.parts.solver or ""
        found, process = with_sampler(self.parts.process, name)
        if (sampler is not None and sampler not in _SAMPLERS) or found not in get_args(Solver):
            raise ValueError(f"sampler must be one of {_SAMPLERS}; found {sampler!r}.")
        if not 0 <= eta <= 1 or (eta and found != "ddim"):
            raise ValueError(f"eta is the noise of sampler='ddim', 0 to 1; found {eta} with {found!r}.")
        return found, process  # type: ignore[return-value]

    def negatives(self, negative: str | Sequence[str] | None, n: int) -> list[str]:
        """n negative prompts from one, several or none."""
        return negative_prompts(negative, n)

    # What a run needs

    def texts(
        self, prompt: Prompt, negative: Prompt | None, count: int, copies: int, clip_skip: int | None
    ) -> Callable[[bool], Text]:
        """text(positive): a row for each picture, encoded when first asked for."""

        @cache
        def text(positive: bool) -> Text:
            if positive:
                found = self.encode_text(prompt, clip_skip)
            elif negative is None and self.parts.zero_negative:
                found = text(True).each(torch.zeros_like)
                return found
            else:
                # As diffusers, whose clip_skip leaves the negative prompt alone.
                found = self.encode_text("" if negative is None else negative, None)
            if len(found.tokens) not in (1, count):
                raise ValueError(
                    f"{len(found.tokens)} negative prompts for {count} prompts. Give one, or as many as prompts."
                )
            return found.each(lambda part: match_batch(part, count, "prompt").repeat_interleave(copies, 0))

        return text

    def encode_text(self, prompt: Prompt, clip_skip: int | None = None) -> Text:
        """Words through the model's own text encoder; a `Text` as it is."""
        if not isinstance(prompt, Text):
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            how = {} if clip_skip is None else {"clip_skip": clip_skip}
            prompt = self.parts.text(prompts, **how)
        return prompt.to(self.device, self.dtype)

    def branches(
        self,
        text: Callable[[bool], Text],
        controls: tuple[Control, ...],
        batch: int,
        size: tuple[int, int],
        scale: float,
        image_scale: float | None,
        edit: Pair | None = None,
        memory: dict | None = None,
    ) -> list[Branch]:
        """Positive first; then text alone (if the controls have a scale of their own); then neither."""
        side, memory = self.pixels * self.patch, {} if memory is None else memory
        grid = size[0] // side, size[1] // side

        def branch(positive: bool, acting: Sequence[Control | None]) -> Branch:
            said = text(positive)
            given = {"memory": memory, "edit": edit}
            run = Run(self.backbone, batch, grid, said.pooled, None, self.channels, **given)  # type: ignore[arg-type]
            return Branch(said, tuple(c.prepare(run) for c in acting if c is not None))

        absent = [c.negative() for c in controls]
        found = [branch(True, controls)]
        if image_scale is not None and controls:
            found.append(branch(True, absent))
        if scale != 1.0 or len(found) > 1:
            found.append(branch(False, absent))
        return found

    def predictor(
        self,
        branches: Sequence[Branch],
        frame: Frame,
        steps: int,
        process: Process,
        beside: Tensor | None,
        in_one_call: bool,
    ) -> Callable[[Tensor, float, int], list[Tensor]]:
        """predict(x, t, i): what every branch predicts in step i, each (B, C, h, w) in float32."""

        @cache
        def network(*which: int) -> Network:
            return self.parts.tell(self.backbone, join_texts([branches[i].text for i in which]), frame)

        def run(told: Network, x: Tensor, t: float, lora: LowRank | None, controls: Sequence[Control]) -> Tensor:
            if beside is not None:
                x = torch.cat([x, beside.repeat(len(x) // len(beside), 1, 1, 1)], 1)
            times = torch.full((len(x),), t, device=x.device)
            return told(x.to(self.dtype), times, lora, controls).float()

        def predict(x: Tensor, t: float, i: int) -> list[Tensor]:
            step = Step(i, steps, t / process.num_train_timesteps)
            active = [[c for c in (control.at(step) for control in b.controls) if c is not None] for b in branches]
            loras = [together(control.lora() for control in controls) for controls in active]
            merging = any(type(c).merging is not Control.merging for controls in active for c in controls)
            if in_one_call and len(branches) > 1 and not merging and not any(lora is not None for lora in loras):
                # A LoRA knows no rows, and merged tokens are one side's, so with one the branches run apart.
                whole = torch.cat([x] * len(branches))
                out = run(network(*range(len(branches))), whole, t, None, sides(active))
                return list(out.chunk(len(branches)))
            return [run(network(n), x, t, loras[n], active[n]) for n in range(len(branches))]

        return predict

    def decode(self, latents: Tensor, output_type: str) -> Any:
        """Latents (B, C, h, w) -> pictures, a tensor (B, 3, H, W) in [-1, 1], or the latents."""
        if output_type == "latent":
            return latents
        if not torch.isfinite(latents).all():
            raise ValueError("The sampler produced NaN. Lower the strengths or guidance, or use dtype=torch.float32.")
        images = decode_latents(self.parts.vae, latents)
        return images if output_type == "pt" else to_images(images)

    # What adapters ask of a pipeline

    def adapter_file(self, source: str | Path, method: str, *, ignore_text: bool = False) -> AdapterFile:
        """As `weights.lora_unet.adapter_for` reads it."""
        return adapter_for(self.backbone, source, method, ignore_text=ignore_text)

    def read_images(self, reference: Images, annotator: str | None, size: tuple[int, int] | None = None) -> Tensor:
        """References as (n, 3, H, W) in [-1, 1] at `size` (None: the model's), annotated if asked for."""
        return read_references(reference, annotator, size or self.size, self.pixels).to(self.device)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w) in float32: of each the mode of its posterior, or a
        sample by its own generator."""
        return encode_latents(self.parts.vae, images, generators)

    def image_encoder(self, folder: str | Path) -> CLIPImage:
        """A CLIP image tower from its folder, where the model computes."""
        return load_image_encoder(folder).to(self.device)

    def text_tower(self, folder: str | Path | None = None) -> TextTower | TinyWords | None:
        """A CLIP text tower with projection from its folder; None: the model's own, if it has one (SDXL's second, and
        the embedded UNet's)."""
        if folder is not None:
            return load_text_tower(folder).to(self.device)
        if isinstance(self.image, TinyImage):
            return TinyWords(self.image, self.parts.text.tokenizer)  # type: ignore[union-attr]
        own = [pair for pair in zip(*towers_of(self.parts.text), strict=True) if hasattr(pair[1], "text_projection")]
        return TextTower(own[-1][1], own[-1][0]) if own else None

    def describe_source(self, reference: Any) -> list:
        """What a recipe keeps of a reference."""
        return describe_source(reference)


_SAMPLERS = get_args(Sampler)


def towers_of(text: Any) -> tuple[list, list]:
    """The tokenizers and encoders of a text encoder, where it is made of them."""
    return list(getattr(text, "tokenizers", [])), list(getattr(text, "encoders", []))


def _count(prompt: Prompt) -> int:
    if isinstance(prompt, Text):
        return len(prompt.tokens)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompt must be a string or a list of strings; found {prompts!r}.")
    return len(prompts)


def _words(prompt: Prompt | None) -> list[str] | None:
    """For a recipe: the words; None for text that came encoded."""
    if prompt is None or isinstance(prompt, Text):
        return None
    return [prompt] if isinstance(prompt, str) else list(prompt)
