"""A diffusers pipeline that takes condit's controls, as adapters see it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condit.controls.control import Control, check_controls
from condit.controls.wrap import unwrapped
from condit.data.images import ImageSource
from condit.drawing.references import describe_source, read_references
from condit.encoders.image import CLIPImage, TextTower
from condit.encoders.text import Text
from condit.encoders.vae import encode_tokens
from condit.interop.flux import FLUX
from condit.interop.lend import Family, arguments, classes, plain
from condit.interop.unet import STABLE_DIFFUSION
from condit.weights.catalog import AdapterFile
from condit.weights.clip_towers import load_image_encoder, load_text_tower
from condit.weights.lora_unet import adapter_for

FAMILIES: tuple[Family, ...] = (FLUX, STABLE_DIFFUSION)
PIPELINES = tuple(name for family in FAMILIES for name in family.pipelines)


def attach(pipe: Any, *, size: tuple[int, int] | None = None, image: Any = None) -> Guest:
    """A `Guest` on one of diffusers' PIPELINES.

    size: (height, width) in pixels at which references are read, by default the pipeline's own (1024 x 1024 for
    FLUX.1); give the size that an OminiControl was trained at. A condition that lies on the picture has the size that
    the call draws. image: the image encoder of an IP-Adapter, images (B, 3, H, W) in [-1, 1] -> features (B, E), with E
    as its `features`; one that comes beside the adapter's file needs none. ValueError for another pipeline.
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
    guest = Guest(pipe, family, size or family.size(pipe), image)
    if any(s <= 0 or s % guest.pixels for s in guest.size):
        raise ValueError(f"size must be (height, width), multiples of {guest.pixels}; found {size}.")
    return guest


class Guest:
    """A diffusers pipeline that takes `controls`; to adapters it is what a condit pipeline is. It holds no state of a
    call: two calls, two guests and the pipeline itself never see each other, though they share every weight."""

    def __init__(self, pipe: Any, family: Family, size: tuple[int, int], image: Any):
        self._pipe, self.family, self.size, self.image = pipe, family, size, image
        self.name = Path(pipe.name_or_path or type(pipe).__name__).name
        self.config = family.config_of(plain(self.network))

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Let go of the pipeline, which is as it was. A call afterwards is a ValueError."""
        self._pipe = None

    @property
    def pipe(self) -> Any:
        if self._pipe is None:
            raise ValueError("This guest has left its pipeline. Use condit.interop.attach(pipe) again.")
        return self._pipe

    @property
    def network(self) -> Any:
        """diffusers' own, perhaps compiled."""
        return getattr(self.pipe, self.family.part)

    def __call__(self, *args: Any, controls: Sequence[Control] = (), **given: Any) -> Any:
        """The pipeline's own call, with its arguments and its result, and `controls` of adapters loaded for this guest.

        n references serve n prompts. In the prediction for a negative prompt every control is its `negative()`.
        ValueError for a control of another model, and beside group offloading or several devices.
        """
        pipe = self.pipe
        refuse_strangers(controls, self)
        host = copy.copy(pipe)
        # Here, before offloading brings the network in and sends the autoencoder away.
        # A proxy: in a circle of references a call's keys and values would outlive it.
        stand_in = self.family.stand_in(self, weakref.proxy(host), tuple(controls), arguments(pipe, args, given))
        # Not by setattr: diffusers would write the stand-in's class into the configuration.
        vars(host).update(
            {self.family.part: stand_in},
            scheduler=copy.deepcopy(pipe.scheduler),  # it counts its steps
            maybe_free_model_hooks=pipe.maybe_free_model_hooks,  # offloading places its hooks on the pipeline's parts
        )
        return host(*args, **given)

    @property
    def backbone(self) -> Any:
        """The network as condit's, without weights of its own; made anew, as its layers may have been replaced."""
        return self.family.borrow(self.network)

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes; under offloading its weights rest elsewhere."""
        return self.pipe._execution_device

    @property
    def pixels(self) -> int:
        """Pixels of a token's side."""
        return self.family.cells * self.pipe.vae_scale_factor

    # What adapters ask of a pipeline.

    def adapter_file(self, source: str | Path, method: str, *, ignore_text: bool = False) -> AdapterFile:
        """As `weights.lora_unet.adapter_for` reads it."""
        return adapter_for(self.backbone, source, method, ignore_text=ignore_text)

    def read_images(
        self,
        reference: ImageSource | Sequence[ImageSource],
        annotator: str | None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """References as (n, 3, H, W) in [-1, 1] at `size` (None: the guest's), annotated if asked for."""
        return read_references(reference, annotator, size or self.size, self.pixels).to(self.device)

    @torch.no_grad()
    def encode_condition(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Images (n, 3, H, W) through the pipeline's autoencoder: packed tokens and their grid (rows, columns). They
        are the mode of its posterior, or drawn from it by `generator`. FLUX.1 only."""
        images = images.to(self.pipe.vae.dtype)
        tokens = encode_tokens(self.pipe.vae, images, generator, sample=generator is not None).to(self.dtype)
        return tokens, (images.shape[-2] // self.pixels, images.shape[-1] // self.pixels)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Text:
        """Prompts through the text encoders of a Stable Diffusion."""
        how = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        tokens, _, *rest = self.pipe.encode_prompt(prompt=list(prompts), device=self.device, **how)
        return Text(tokens, rest[0] if rest else tokens.new_zeros(len(tokens), 0))

    def image_encoder(self, folder: str | Path) -> CLIPImage:
        """A CLIP image tower from its folder, where the model computes."""
        return load_image_encoder(folder).to(self.device)

    def text_tower(self, folder: str | Path | None = None) -> TextTower | None:
        """A CLIP text tower with projection from its folder; None: the pipeline's own, if it has one (SDXL's)."""
        if folder is not None:
            return load_text_tower(folder).to(self.device)
        own: Any = getattr(self.pipe, "text_encoder_2", None)
        return TextTower(own, self.pipe.tokenizer_2) if hasattr(own, "text_projection") else None

    def describe_source(self, reference: Any) -> list:
        """What a recipe keeps of a reference."""
        return describe_source(reference)


def refuse_strangers(controls: Sequence[Control], guest: Guest) -> None:
    """ValueError unless every control fits the guest's network, and its layers can be lent."""
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
        raise ValueError(f"This {family.part} is spread over several devices; controls need it on one.")
    for module in network.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook("group_offloading") is not None:
            raise ValueError(
                "Group offloading brings layers in by blocks, which a control does not run. Use "
                "enable_model_cpu_offload() or enable_sequential_cpu_offload()."
            )
