"""The pipeline: check a call, set up the sides of the guidance, walk a path with `predict` and controls, decode.

One class serves all families of models; their differences are in `flow.py`, `vp.py`, `classes.py`, `pixels.py`.
N prompts and N references become N images; each has its own generator, so it does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path as FilePath
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from condit.controls.control import Apart, Control, check_controls
from condit.data.imagenet import ClassNames
from condit.data.images import mask_list, to_images
from condit.diffusion.steps import Noise, PartPath, Predict, Step, draw
from condit.drawing import edit as editing
from condit.drawing import pretrained
from condit.drawing.batch import Draft, Guided, predictor, walk
from condit.drawing.callbacks import Callback, after_step, check_inputs, steps_bar
from condit.drawing.families import AnyParts, Offload, make_model
from condit.drawing.model import Conditions, Layout, Model, Side, TextModel, module_device, module_dtype
from condit.drawing.references import describe_source, find_fill, read_references
from condit.drawing.repaint import Images, check_picture, share_changed, skipped, start_of
from condit.drawing.settings import Settings, check_counts, check_size, check_supported, image_generators
from condit.drawing.text_lora import with_text_loras
from condit.encoders.image import CLIPImage, TextTower, TinyImage, TinyTextTower
from condit.encoders.text import ClipText, Text, given_text
from condit.nn.offload import check_device
from condit.weights.catalog import AdapterFile
from condit.weights.clip_towers import load_image_encoder, load_text_tower
from condit.weights.lora_unet import adapter_for

Prompt = str | Sequence[str] | Text
Label = str | int | None
OutputType = Literal["pil", "pt", "np", "latent"]


@dataclass(frozen=True)
class Result:
    """Images of a call, by `output_type`; see `Pipeline.decode`."""

    images: Any
    seeds: list[int | None]
    recipe: dict


class Pipeline:
    """A loaded model. A call does not change it: controls are arguments of a call.

    offload (FLUX.1): text encoder and autoencoder ("encoders"), or the transformer's blocks too ("blocks"), stay on the
    CPU and are copied to the device when they compute.
    """

    def __init__(self, parts: AnyParts, *, offload: Offload | None = None):
        self.model: Model = make_model(parts, offload)
        self.parts, self.offload = self.model.parts, offload
        self.name: str = parts.name
        self.adapts_text = isinstance(getattr(parts, "text", None), ClipText)
        self.image: CLIPImage | TinyImage | None = getattr(parts, "image", None)

    from_pretrained = classmethod(pretrained.from_pretrained)
    save_pretrained = pretrained.save_pretrained

    @property
    def text_model(self) -> TextModel:
        """The model of a pipeline with prompts. Raises ValueError for others."""
        if self.model.reads != "prompt":
            raise ValueError(f"{self.name} does not support prompts. Use tiny, FLUX.1, PixArt, ...")
        return cast("TextModel", self.model)

    @property
    def backbone(self) -> Any:
        """The network; it may be replaced, by `torch.compile` for instance."""
        return self.model.backbone

    @backbone.setter
    def backbone(self, backbone: nn.Module) -> None:
        self.model.backbone = backbone

    @property
    def size(self) -> tuple[int, int]:
        """The default height and width in pixels of images and references."""
        return self.model.size

    @property
    def pixels(self) -> int:
        """Pixels of a token's side."""
        return self.model.token

    @property
    def labels(self) -> ClassNames | None:
        """The class names of a class model, if it has them."""
        return getattr(self.parts, "labels", None)

    @property
    def dtype(self) -> torch.dtype:
        return module_dtype(self.backbone)

    @property
    def device(self) -> torch.device:
        return module_device(self.backbone)

    def to(self, device: str | torch.device) -> Pipeline:
        """Move every part, in place; returns the pipeline. Raises ValueError for an absent device."""
        check_device(device)
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | Label | Sequence[Label] | Tensor = None,
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
        guidance_rescale: float | None = None,
        guidance_power: float | None = None,
        guidance_channels: int | Literal["all"] | None = None,
        guidance_in_one_call: bool | None = None,
        image_guidance_scale: float | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        clip_skip: int | None = None,
        max_sequence_length: int | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        progress: bool = False,
        label: Label | Sequence[Label] | Tensor = None,
    ) -> Result:
        """Generate images. Arguments as in diffusers; `seed` is short for generators: image i has seed + i, and its
        noise is sampled on the CPU. Raises ValueError for an argument that the model does not support.

        prompt: words, or encoded `Text`; for DiT and DiffiT a class by name or number, None for no class. image: start
        from it, changed by `strength` in (0, 1] (None: 0.8, with a mask 1); mask_image: repaint where it is white.
        guidance_scale 1 makes one prediction per step, not two; guidance_in_one_call False makes them in sequence, with
        half the memory. image_guidance_scale guides the controls separately from the text: none + s_T (text - none) +
        s_I (text and controls - text). guidance_power, guidance_channels: DiffiT's schedule, and how many channels of
        the latent are guided. sampler, eta, clip_skip: None for the model's own ("ddim-ldm": the steps of the released
        Stable Diffusion and DEADiff); eta is the share of a step's noise that is new. timesteps: the steps themselves,
        falling, instead of their number. max_sequence_length: of T5's tokens, FLUX.1. prompt_embeds and the like: the
        text as `encode_text` gives it. progress: show the steps, on a terminal or in a notebook as a bar. latents: the
        first noise. original_size, crops_..., target_size: SDXL's conditions, in pixels. label: prompt, for classes."""
        requested = Settings(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_power=guidance_power,
            guidance_channels=guidance_channels,
            guidance_in_one_call=guidance_in_one_call,
            image_guidance_scale=image_guidance_scale,
            sampler=sampler,
            eta=eta,
            strength=strength,
            clip_skip=clip_skip,
            max_sequence_length=max_sequence_length,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
            copies=num_images_per_prompt,
        )
        prompt = given_text(label if prompt is None else prompt, prompt_embeds, pooled_prompt_embeds)
        negative_prompt = given_text(negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds)
        check_inputs(callback_on_step_end_tensor_inputs)
        random = {"seed": seed, "generator": generator, "latents": latents}
        pictures = {"image": image, "mask_image": mask_image}
        draft = self.begin(
            requested, prompt, negative_prompt, controls=controls, output_type=output_type, **pictures, **random
        )
        callback, names = callback_on_step_end, callback_on_step_end_tensor_inputs
        with steps_bar(len(draft.path), draft.rows, shown=progress) as advance:
            (x,) = walk(self, [draft], after_step(self, draft.path, draft.guided.sides, callback, names, advance))
        return Result(self.decode(x, draft.guided.layout.size, output_type), draft.seeds, draft.recipe)

    @torch.no_grad()
    def begin(
        self,
        requested: Settings,
        prompt: Prompt | Label | Sequence[Label] | Tensor = None,
        negative_prompt: Prompt | None = None,
        *,
        controls: Sequence[Control] = (),
        image: Images | None = None,
        mask_image: Images | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> Draft:
        """A call before its first step, for `drawing.batch.walk`: everything is checked, then prepared."""
        model, count = self.model, self.model.count(prompt)
        settings = self.settle(requested, prompt, output_type)
        controls = self.sized(controls, settings.size)
        check_picture(self.name, model, image, mask_image, settings.strength)
        strength = share_changed(settings, mask_image) if image is not None else 1.0
        layout = self.layout(count * settings.copies, settings.size, controls)
        seeds, generators = image_generators(layout.batch, seed, generator)
        chosen, path = model.path(settings, layout)
        if image is not None:
            path = cast("PartPath", path).since(skipped(len(path), strength))
        conditions = with_text_loras(model, controls).conditions(prompt, negative_prompt, settings)
        sides = self.sides(conditions, controls, layout, settings)
        start = start_of(self, image, mask_image, strength, layout, path, generators, latents)
        if latents is not None and not model.draws_noise(settings):
            seeds: list[int | None] = [None] * layout.batch  # the seeds were not used
        recipe = {
            "model": self.name,
            "hash": self.parts.hash,
            **model.describe(prompt, negative_prompt, settings),
            **({} if image is None else {"image": describe_source(image), "strength": strength}),
            **({} if mask_image is None else {"mask_image": describe_source(mask_list(mask_image))}),
            "seeds": seeds,
            "controls": [c.describe() for c in controls],
        }
        guided, fill = Guided(sides, layout, settings, start.extra), find_fill(controls, layout.grid)
        read = settings.scale if getattr(self.backbone.config, "guidance_embeds", False) else None
        return Draft(guided, chosen, path, start, generators, seeds, fill, recipe, read)

    edit, invert = editing.edit, editing.invert

    @torch.no_grad()
    def predict(
        self,
        x: Tensor,
        t: float,
        prompt: Prompt | Label | Sequence[Label] | Tensor = None,
        negative_prompt: Prompt | None = None,
        *,
        controls: Sequence[Control] = (),
        guidance_scale: float = 1.0,
        image_guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """One (guided) prediction for latents x (B, ...) at noise level t in [0, 1], where 1 is noise alone.

        x is float32, as `output_type="latent"` returns it. FLUX.1 and `tiny` predict the velocity; Stable
        Diffusion, PixArt, DiT and DiffiT noise or v (with the variance's channels); the image-space DiffiT the image.
        """
        scales = {"guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale}
        scales = scales if "guidance_scale" in self.model.supports else {}  # a model without guidance
        requested = Settings(height=height, width=width, num_inference_steps=2, **scales)  # type: ignore[arg-type]
        settings = self.settle(requested, prompt, "latent" if "latent" in self.model.kinds else "pt")
        controls = self.sized(controls, settings.size)
        layout = self.layout(len(x), settings.size, controls)
        settings = replace(settings, copies=layout.batch // self.model.count(prompt))
        conditions = with_text_loras(self.model, controls).conditions(prompt, negative_prompt, settings)
        sides = self.sides(conditions, controls, layout, settings)
        return self.predictor(sides, layout, settings)(x.float().to(self.device), self.model.step_at(t))

    # The parts of a call

    def settle(self, requested: Settings, prompt: object, output_type: str) -> Settings:
        """The settings of a call with the model's defaults. Raises ValueError for unsupported ones."""
        model = self.model
        check_supported(self.name, requested, model.supports)
        height, width = model.size
        requested = requested.filled(height=height, width=width)
        check_size(requested.size, model.token)
        settings = model.settings(requested, prompt)
        check_counts(settings.steps, settings.copies, output_type, fewest=model.fewest_steps, kinds=model.kinds)
        model.check_output(output_type)
        return settings

    def sized(self, controls: Sequence[Control], size: tuple[int, int]) -> tuple[Control, ...]:
        """The controls of a call at its size. Raises ValueError for one that cannot act on this model."""
        for control in check_controls(controls):
            reason = self.model.refuse(control)
            if reason is not None:
                raise ValueError(f"{type(control).__name__} {reason}")
        return tuple(control.sized(size, self) for control in controls)

    def layout(self, batch: int, size: tuple[int, int], controls: Sequence[Control] = ()) -> Layout:
        """The layout of a run; controls may leave cells out."""
        grid = size[0] // self.model.token, size[1] // self.model.token
        fill = find_fill(controls, grid)
        return Layout(batch, size, grid, None if fill is None else fill.cells.to(self.device))

    def sides(
        self, conditions: Conditions, controls: Sequence[Control], layout: Layout, settings: Settings
    ) -> list[Side]:
        """The sides of the guidance, each with the controls of this run."""
        negative = [control.negative() for control in controls]
        sides = []
        for positive, present in self.model.sides(settings, bool(controls)):
            condition = conditions(positive)
            acting = [c for c in (controls if present else negative) if c is not None]
            run = self.model.run(condition, layout, settings, acting)
            run = replace(run, apart=self.apart(condition, layout, settings))
            sides.append(Side(condition, tuple(control.prepare(run) for control in acting)))
        return sides

    def apart(self, condition: object, layout: Layout, settings: Settings) -> Apart:
        """A separate prediction for a control (`Run.apart`)."""
        network = cache(lambda text: self.model.network([text or condition], layout, settings))

        def predict(
            x0: Tensor, noise: Tensor, step: Step, controls: Sequence[Control] = (), text: Text | None = None
        ) -> Tensor:
            return network(text)(self.text_model.noised_at(x0, noise, step), step, controls)

        return predict

    def predictor(self, sides: Sequence[Side], layout: Layout, settings: Settings) -> Predict:
        """predict(x, step): the guided prediction, the only call to the network."""
        return predictor(self.model, [Guided(sides, layout, settings)])

    def noise(self, layout: Layout, generators: Sequence[torch.Generator]) -> Noise:
        """Standard normal noise as the network reads it, each image from its own generator."""
        shape = self.model.cells_shape(layout.size)
        return lambda x: self.model.arrange(draw(shape, generators), layout).to(x.device)

    @torch.no_grad()
    def decode(self, latents: Tensor, size: tuple[int, int] | None = None, output_type: OutputType = "pil") -> Any:
        """Latents of images of `size` (None: the model's) -> PIL images, (B, 3, H, W) in [-1, 1] ("pt"), a float32
        array (B, H, W, 3) in [0, 1] ("np"), or as they are."""
        if output_type == "latent":
            return latents
        if not torch.isfinite(latents).all():
            raise ValueError("The sampler produced NaN. Lower the strengths or guidance, or use dtype=torch.float32.")
        images = self.model.decode(latents, self.layout(len(latents), size or self.size))
        if output_type == "np":
            return ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).float().cpu().numpy()
        return images if output_type == "pt" else to_images(images)

    # For adapters: controls.host.Host

    @torch.no_grad()
    def encode_text(self, prompt: Prompt, clip_skip: int | None = None) -> Text:
        """Prompts through the model's own text encoder, on its device; a `Text` is moved there."""
        return self.text_model.encode_text(prompt, clip_skip)

    def adapter_file(self, source: str | FilePath, method: str, *, ignore_text: bool = False) -> AdapterFile:
        """The tensors and the configuration of an adapter by name, file or folder."""
        return adapter_for(self.backbone, source, method, ignore_text=ignore_text)

    def read_images(self, reference: Images, annotator: str | None, size: tuple[int, int] | None = None) -> Tensor:
        """References as (n, 3, H, W) in [-1, 1] at `size` (None: the model's), annotated by `annotator`."""
        return read_references(reference, annotator, size or self.size, self.pixels).to(self.device)

    @torch.no_grad()
    def encode_condition(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Images (n, 3, H, W) through the model's own autoencoder: latents in its dtype and their grid of tokens (rows,
        columns). They are the mode of the posterior, or a sample by `generator`."""
        tokens = self.text_model.encode_together(images, generator).to(self.dtype)
        return tokens, (images.shape[-2] // self.pixels, images.shape[-1] // self.pixels)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> float32 latents: each posterior's mode, or a sample by its generator."""
        return self.model.encode(images, generators)

    def image_encoder(self, folder: str | FilePath) -> CLIPImage:
        """A CLIP image tower from its folder, where the model computes."""
        return load_image_encoder(folder).to(self.device)

    def text_tower(self, folder: str | FilePath | None = None) -> TextTower | TinyTextTower | None:
        """A CLIP text tower with projection from its folder; None: the model's own (SDXL's second, `tiny-unet`'s)."""
        if folder is not None:
            return load_text_tower(folder).to(self.device)
        text = self.parts.text
        if isinstance(self.image, TinyImage):
            return TinyTextTower(self.image, text.tokenizer)
        pairs = zip(getattr(text, "tokenizers", []), getattr(text, "encoders", []), strict=True)
        own = [(tokenizer, encoder) for tokenizer, encoder in pairs if hasattr(encoder, "text_projection")]
        return TextTower(own[-1][1], own[-1][0]) if own else None

    describe_source = staticmethod(describe_source)
