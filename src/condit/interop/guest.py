"""A diffusers pipeline that takes condit's controls and has the interface that adapters need."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.backbones.unet import UNet, UNetConfig
from condit.controls.control import Control, check_controls
from condit.controls.wrap import unwrapped
from condit.data.images import ImageSource
from condit.drawing.references import describe_source, read_references
from condit.encoders.image import CLIPImage, ImageEncoder, TextTower
from condit.encoders.text import Text
from condit.encoders.vae import encode_tokens, pack, scale_shift
from condit.interop.flux import FLUX
from condit.interop.lend import NativePipeline, PipelineFamily, call_arguments, classes, host_of, native, plain
from condit.interop.unet import STABLE_DIFFUSION
from condit.weights.catalog import AdapterFile
from condit.weights.clip_towers import load_image_encoder, load_text_tower
from condit.weights.lora_unet import adapter_for

FAMILIES: tuple[PipelineFamily, ...] = (FLUX, STABLE_DIFFUSION)
PIPELINES = tuple(name for family in FAMILIES for name in family.pipelines)
# Hooks of diffusers on single layers, which run with controls too. All others act on blocks.
LAYER_HOOKS = {"layerwise_casting", "peft_autocast_disable"}


def attach(pipe: object, *, size: tuple[int, int] | None = None, image: ImageEncoder | None = None) -> Guest:
    """A `Guest` on one of diffusers' PIPELINES.

    size: (height, width) in pixels at which references are read, by default the pipeline's own (1024 x 1024 for
    FLUX.1); pass the size with which an OminiControl was trained. An aligned condition has the size of the generated
    image. image: the image encoder of an IP-Adapter; adapters with an encoder in their folder need none. ValueError for
    another pipeline, network or size.
    """
    family = next((family for family in FAMILIES if set(family.pipelines) & classes(pipe)), None)
    if family is None:
        raise ValueError(f"attach takes diffusers' {', '.join(PIPELINES)}; found {type(pipe).__name__}.")
    network = getattr(pipe, family.part)
    if family.model not in classes(plain(network)):
        raise ValueError(
            f"The {family.part} of this {type(pipe).__name__} must be diffusers' {family.model}; found "
            f"{type(network).__name__}."
        )
    pipeline = cast("NativePipeline", pipe)
    guest = Guest(pipeline, family, size or family.size(pipeline), image)
    if any(s <= 0 or s % guest.pixels for s in guest.size):
        raise ValueError(f"size must be (height, width), multiples of {guest.pixels}; found {size}.")
    return guest


class Guest:
    """A diffusers pipeline that takes `controls`, with the interface of a condit pipeline for adapters. It has no state
    of a call: calls, guests and the pipeline itself are independent, though they share all weights."""

    def __init__(self, pipe: NativePipeline, family: PipelineFamily, size: tuple[int, int], image: ImageEncoder | None):
        self._pipe: NativePipeline | None = pipe
        self.family, self.size, self.image = family, size, image
        self.name = Path(pipe.name_or_path or type(pipe).__name__).name
        try:
            self._config: MMDiTConfig | UNetConfig | ValueError = family.config_of(plain(self.network))
        except ValueError as error:  # without controls every network runs
            self._config = error

    @property
    def config(self) -> MMDiTConfig | UNetConfig:
        """condit's configuration of the network. ValueError for a network that takes no controls."""
        if isinstance(self._config, ValueError):
            raise self._config
        return self._config

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Release the pipeline, which is unchanged. A later call raises ValueError."""
        self._pipe = None

    @property
    def pipe(self) -> NativePipeline:
        """diffusers' pipeline. ValueError after `detach`."""
        if self._pipe is None:
            raise ValueError("This guest is detached from its pipeline. Use condit.interop.attach(pipe) again.")
        return self._pipe

    @property
    def network(self) -> nn.Module:
        """diffusers' network, perhaps compiled."""
        return getattr(self.pipe, self.family.part)

    def __call__(
        self,
        *args: object,
        controls: Sequence[Control] = (),
        image_guidance_scale: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """The pipeline's call, with its own arguments and result, and `controls` of adapters loaded for this guest.
        image_guidance_scale guides the controls separately from the text, as in condit's own pipelines.

        n references serve n prompts. In the prediction for a negative prompt every control is its `negative()`.
        Raises TypeError for an argument that the pipeline does not have, ValueError for a control of another model,
        with a step cache or group offloading, or on more than one device.
        """
        pipe = self.pipe
        refuse_strangers(controls, self)
        host = host_of(pipe)
        # This precedes offloading, which loads the network and unloads the autoencoder.
        # A proxy, as in a circle of references a call's keys and values would outlive it.
        proxy = cast("NativePipeline", weakref.proxy(host))
        arguments = {**call_arguments(pipe, args, kwargs), "image_guidance_scale": image_guidance_scale}
        if image_guidance_scale is not None and arguments.get("guidance_rescale"):
            raise ValueError(
                "guidance_rescale has no meaning with image_guidance_scale on a guest. Leave one of them out."
            )
        stand_in = self.family.stand_in(self, proxy, tuple(controls), arguments)
        # diffusers' setattr would write the stand-in's class into the configuration.
        vars(host).update(
            {self.family.part: stand_in},
            scheduler=copy.deepcopy(pipe.scheduler),  # it counts its steps
            maybe_free_model_hooks=pipe.maybe_free_model_hooks,  # offloading puts its hooks on the pipeline's parts
        )
        return host(*args, **kwargs)

    @property
    def backbone(self) -> MMDiT | UNet:
        """condit's network without weights of its own, constructed each time, as layers may have been replaced."""
        return self.family.borrow(self.network)

    @property
    def dtype(self) -> torch.dtype:
        return native(self.network).dtype

    @property
    def device(self) -> torch.device:
        """The device on which the pipeline computes; offloaded weights are elsewhere."""
        return self.pipe._execution_device

    @property
    def pixels(self) -> int:
        """Pixels of a token's side."""
        return self.family.cells * self.pipe.vae_scale_factor

    # The interface for adapters

    adapts_text = False  # diffusers encodes the prompt

    def adapter_file(self, source: str | Path, method: str, *, ignore_text: bool = False) -> AdapterFile:
        """`weights.lora_unet.adapter_for` for this network."""
        return adapter_for(self.backbone, source, method, ignore_text=ignore_text)

    def read_images(
        self,
        reference: ImageSource | Sequence[ImageSource],
        annotator: str | None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """References as (n, 3, H, W) in [-1, 1] at `size` (None: the guest's), after the annotator, if any."""
        return read_references(reference, annotator, size or self.size, self.pixels).to(self.device)

    @torch.no_grad()
    def encode_condition(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Images (n, 3, H, W) -> packed tokens of the pipeline's autoencoder and their grid (rows, columns): the mode
        of its posterior, or a sample by `generator`. FLUX.1 only."""
        images = images.to(self.pipe.vae.dtype)
        tokens = encode_tokens(self.pipe.vae, images, generator, sample=generator is not None).to(self.dtype)
        return tokens, (images.shape[-2] // self.pixels, images.shape[-1] // self.pixels)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> float32 latents as the network reads them: the mode of each posterior."""
        vae = self.pipe.vae
        scale, shift = scale_shift(vae)
        # The images stay on the guest's device: an offloaded autoencoder is moved there by its hook.
        modes = [vae.encode(image[None]).latent_dist.mode() for image in images.to(vae.dtype)]
        latents = (torch.cat(modes).float() - shift) * scale
        return pack(latents) if self.family.cells == 2 else latents

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Text:
        """The output of the guest's text encoders."""
        if self.family.cells == 2:
            tokens, pooled, _ = self.pipe.encode_prompt(prompt=list(prompts), prompt_2=None, device=self.device)
            return Text(tokens, pooled)
        tokens, _, *rest = self.pipe.encode_prompt(
            prompt=list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Text(tokens, rest[0] if rest else tokens.new_zeros(len(tokens), 0))

    def image_encoder(self, folder: str | Path) -> CLIPImage:
        """A CLIP image tower from its folder, on the guest's device."""
        return load_image_encoder(folder).to(self.device)

    def text_tower(self, folder: str | Path | None = None) -> TextTower | None:
        """A CLIP text tower with projection from its folder; None: that of the pipeline, if it has one (SDXL)."""
        if folder is not None:
            return load_text_tower(folder).to(self.device)
        tower: nn.Module | None = getattr(self.pipe, "text_encoder_2", None)
        if tower is None or not hasattr(tower, "text_projection"):
            return None
        return TextTower(tower, self.pipe.tokenizer_2)

    def describe_source(self, reference: Any) -> list:
        """The description of a reference for a recipe."""
        return describe_source(reference)


def refuse_strangers(controls: Sequence[Control], guest: Guest) -> None:
    """ValueError unless the guest's network supports every control, and its layers are available."""
    family, network = guest.family, plain(guest.network)
    for control in check_controls(controls):
        why = family.refusal(network, control)
        if why is not None:
            raise ValueError(f"{type(control).__name__} {why}")
    for inner in (inner for control in controls for inner in unwrapped(control)):
        adapter: Any = getattr(inner, "adapter", None)
        bound = getattr(adapter, "_pipe", [None])[0]
        if bound is None:
            continue
        config = bound.config if isinstance(bound, Guest) else bound.backbone.config
        if config != guest.config:
            raise ValueError(
                f"{type(adapter).__name__} {adapter.name!r} was loaded for {bound.name}, whose {family.part} is not "
                f"like that of {guest.name}. Load it with {type(adapter).__name__}.load(file, guest)."
            )
    if not controls:
        return
    if getattr(network, "_parallel_config", None) is not None:
        raise ValueError(f"This {family.part} is split over devices; controls need it on one device.")
    for module in network.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if "group_offloading" in hooks:
            raise ValueError(
                "Group offloading loads layers with diffusers' blocks, which do not run with controls. Use "
                "enable_model_cpu_offload() or enable_sequential_cpu_offload()."
            )
        unknown = sorted(hooks.keys() - LAYER_HOOKS)
        if unknown:
            raise ValueError(
                f"This {family.part} has diffusers' hook {unknown[0]!r} (a step cache?), which skips or changes "
                f"blocks; with controls other blocks run, and ignore it. Call pipe.{family.part}.disable_cache(), "
                "or leave the controls out."
            )
