"""condit's controls on diffusers' FLUX pipelines, with their offloading, quantised weights, ControlNets and masks.

    with condit.interop.attach(pipe, size=(512, 512)) as guest:
        omini = condit.OminiControl.load("canny.safetensors", guest)
        image = guest("a house", controls=[omini.control("edges.png")], height=512, width=512).images[0]

A call runs the pipeline's own `__call__` on a shallow copy of it, in which a `Controlled` stands for the transformer.
At a step where a control acts, it runs condit's MM-DiT over the transformer's own linear layers and norms; at every
other step, the transformer. No weight is copied and nothing patched, so there is nothing to put back.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.controls.control import Control, Run, Step
from condit.data.images import ImageSource
from condit.encoders.image import CLIPImage
from condit.encoders.vae import encode_tokens
from condit.nn.attention import Site
from condit.nn.layers import RMSNorm
from condit.nn.lora import Linear, LoRA
from condit.nn.streams import Stream
from condit.references import describe_source, read_references
from condit.weights.catalog import AdapterFile, read_adapter
from condit.weights.clip_towers import load_image_encoder

# Their tokens are the noisy image and nothing else. Kontext's hold references too; Fill and Control stack channels.
PIPELINES = (
    "FluxPipeline",
    "FluxImg2ImgPipeline",
    "FluxInpaintPipeline",
    "FluxControlNetPipeline",
    "FluxControlNetImg2ImgPipeline",
    "FluxControlNetInpaintPipeline",
)


def attach(pipe: Any, *, size: tuple[int, int] | None = None, image: Any = None) -> Guest:
    """A `Guest` on one of diffusers' PIPELINES.

    size: (height, width) in pixels at which references are read, by default the pipeline's own (1024 x 1024 for
    FLUX.1); give the size that an OminiControl was trained at. A condition that lies on the picture has the size that
    the call draws. image: the image encoder of an IP-Adapter, images (B, 3, H, W) in [-1, 1] -> features (B, E), with E
    as its `features`. ValueError for another pipeline.
    """
    if not set(PIPELINES) & classes(pipe):
        raise ValueError(f"attach takes diffusers' {', '.join(PIPELINES)}; found {type(pipe).__name__}.")
    if "FluxTransformer2DModel" not in classes(plain(pipe.transformer)):
        raise ValueError(
            f"The transformer of this {type(pipe).__name__} must be diffusers' FluxTransformer2DModel; found "
            f"{type(pipe.transformer).__name__}."
        )
    side = pipe.default_sample_size * pipe.vae_scale_factor
    guest = Guest(pipe, size or (side, side), image)
    if any(s <= 0 or s % guest.pixels for s in guest.size):
        raise ValueError(f"size must be (height, width), multiples of {guest.pixels}; found {size}.")
    return guest


class Guest:
    """A diffusers pipeline that takes `controls`; to adapters it is what a condit `Pipeline` is. It holds no state of a
    call: two calls, two guests and the pipeline itself never see each other, though they share every weight."""

    def __init__(self, pipe: Any, size: tuple[int, int], image: Any):
        self._pipe, self.size, self.image = pipe, size, image
        self.name = Path(pipe.name_or_path or type(pipe).__name__).name
        self.config = config_of(plain(pipe.transformer))

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

    def __call__(self, *args: Any, controls: Sequence[Control] = (), **given: Any) -> Any:
        """The pipeline's own call, with its arguments and its result, and `controls` of adapters loaded for this guest.

        n references serve n prompts. In the prediction for a negative prompt (`true_cfg_scale`) every control is its
        `negative()`. ValueError for a control of another model, and beside group offloading or several devices.
        """
        pipe = self.pipe
        refuse_strangers(controls, self)
        if controls:  # here, before offloading brings the transformer in and sends the autoencoder away
            size = drawn_size(pipe, args, given, self.pixels)
            controls = [control.sized(size, self) for control in controls]
        host = copy.copy(pipe)
        transformer = Controlled(
            pipe.transformer, tuple(controls), predictions_a_step(pipe, args, given), lambda: host.num_timesteps
        )
        # Not by setattr: diffusers would write the stand-in's class into the configuration.
        vars(host).update(
            transformer=transformer,
            scheduler=copy.deepcopy(pipe.scheduler),  # it counts its steps
            maybe_free_model_hooks=pipe.maybe_free_model_hooks,  # offloading places its hooks on the pipeline's parts
        )
        return host(*args, **given)

    @property
    def backbone(self) -> MMDiT:
        """The transformer as condit's, without weights of its own; made anew, as its layers may have been replaced."""
        return borrow(self.pipe.transformer)

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.transformer.dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes; under offloading its weights rest elsewhere."""
        return self.pipe._execution_device

    @property
    def pixels(self) -> int:
        """Pixels of a token's side."""
        return 2 * self.pipe.vae_scale_factor

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
        """References as (n, 3, H, W) in [-1, 1] at `size` (None: the guest's), annotated if asked for."""
        return read_references(reference, annotator, size or self.size, self.pixels).to(self.device)

    @torch.no_grad()
    def encode_condition(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Images (n, 3, H, W) through the pipeline's autoencoder: packed tokens and their grid (rows, columns). They
        are the mode of its posterior, or drawn from it by `generator`."""
        images = images.to(self.pipe.vae.dtype)
        tokens = encode_tokens(self.pipe.vae, images, generator, sample=generator is not None).to(self.dtype)
        return tokens, (images.shape[-2] // self.pixels, images.shape[-1] // self.pixels)

    def image_encoder(self, folder: str | Path) -> CLIPImage:
        """A CLIP image tower from its folder, where the model computes."""
        return load_image_encoder(folder).to(self.device)

    def describe_source(self, reference: Any) -> list:
        """What a recipe keeps of a reference."""
        return describe_source(reference)


@dataclass(frozen=True)
class Inputs:
    """The arguments of diffusers' `FluxTransformer2DModel.forward` by name. timestep (B,) in [0, 1], 0 = clean."""

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    pooled_projections: Tensor
    timestep: Tensor
    img_ids: Tensor
    txt_ids: Tensor
    guidance: Tensor | None = None
    joint_attention_kwargs: Mapping[str, Any] | None = None
    controlnet_block_samples: Sequence[Tensor] | None = None
    controlnet_single_block_samples: Sequence[Tensor] | None = None
    return_dict: bool = True
    controlnet_blocks_repeat: bool = False

    def __post_init__(self):
        if self.joint_attention_kwargs:
            raise ValueError(
                f"joint_attention_kwargs {sorted(self.joint_attention_kwargs)} have no effect beside controls. For an "
                "image prompt use condit.IPAdapter; for the weight of a LoRA use pipe.set_adapters."
            )


class Controlled(nn.Module):
    """Stands for a transformer during one call of a pipeline, and counts its predictions: first the prompt's, then, if
    there are two a step, the negative prompt's. A module, because diffusers looks among modules for its device."""

    def __init__(self, native: nn.Module, controls: tuple[Control, ...], predictions: int, steps: Callable[[], int]):
        super().__init__()
        absent = tuple(c for c in (control.negative() for control in controls) if c is not None)
        self.native, self.predictions, self.steps = native, predictions, steps
        self.sides: list[tuple[Control, ...]] = [controls, absent][:predictions]
        self.backbone = borrow(native) if controls else None
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("native"), name)

    def forward(self, **given: Any) -> Any:
        """As the transformer's. `prepare` runs at each side's first prediction, where its prompt is known."""
        index, side = divmod(self.calls, self.predictions)
        self.calls += 1
        if self.backbone is None:
            return self.native(**given)
        if index >= self.steps():
            raise RuntimeError(f"{self.calls} predictions in {self.steps()} steps: this diffusers is not understood.")
        inputs = Inputs(**given)
        with Onloaded(self.native):
            if index == 0:
                run = run_of(self.backbone, inputs)
                self.sides[side] = tuple(control.prepare(run) for control in self.sides[side])
            step = Step(index, self.steps(), float(inputs.timestep[0]))
            acting = [c for c in (control.at(step) for control in self.sides[side]) if c is not None]
            if acting:
                return predict(self.backbone, inputs, acting)
        return self.native(**given)


def predict(backbone: MMDiT, inputs: Inputs, acting: Sequence[Control]) -> Any:
    """A prediction by condit's MM-DiT, in diffusers' two forms."""
    ids = without_batch(inputs.img_ids)
    image = Stream(inputs.hidden_states, ids, inputs.timestep, inputs.pooled_projections, inputs.guidance)
    out = backbone(
        image,
        inputs.encoder_hidden_states,
        without_batch(inputs.txt_ids),
        conditions=[stream for control in acting for stream in control.streams()],
        controls=[*acting, Residuals(residuals(backbone, inputs))],
    )
    if not inputs.return_dict:
        return (out,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=out)


def run_of(backbone: MMDiT, inputs: Inputs) -> Run:
    """What controls may know of the call. The grid is read off the positions."""
    ids = without_batch(inputs.img_ids)
    grid = int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1
    if grid[0] * grid[1] != len(ids):
        raise ValueError(f"{len(ids)} image tokens on a grid of {grid[0]} x {grid[1]}: a full grid is expected.")
    batch, channels = len(inputs.hidden_states), backbone.config.in_channels
    return Run(backbone, batch, grid, inputs.pooled_projections, inputs.guidance, channels)


def without_batch(ids: Tensor) -> Tensor:
    """Positions (N, 3); older pipelines give (B, N, 3), the same for every image."""
    return ids[0] if ids.ndim == 3 else ids


# ControlNets


@dataclass(frozen=True)
class Residuals(Control):
    """What a ControlNet adds after each block, (B, N, dim) by the path of the block's attention."""

    after: Mapping[str, Tensor]

    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        return self.after.get(site.path)


def residuals(backbone: MMDiT, inputs: Inputs) -> dict[str, Tensor]:
    """n samples over L blocks: each serves ceil(L / n) neighbours; or, repeated (XLabs), every n-th block."""
    split = backbone.config.num_layers
    found = {}
    for sites, samples, repeat in (
        (backbone.sites[:split], inputs.controlnet_block_samples, inputs.controlnet_blocks_repeat),
        (backbone.sites[split:], inputs.controlnet_single_block_samples, False),
    ):
        if samples is None or len(samples) == 0:
            continue
        each = -(-len(sites) // len(samples))
        for i, site in enumerate(sites):
            found[site.path] = samples[i % len(samples) if repeat else i // each]
    return found


# The transformer's layers, lent


class Borrowed(Linear):
    """A `Linear` that leaves the product to another model's layer: quantised, offloaded or with a LoRA of diffusers."""

    def __init__(self, native: nn.Module, like: Linear):
        nn.Module.__init__(self)  # no weights of its own
        self.native, self.path = native, like.path
        self.in_features, self.out_features = like.in_features, like.out_features

    def forward(self, input: Tensor, lora: LoRA | None = None) -> Tensor:
        if lora is None:
            return self.native(input)
        # A condition sees the base and its own LoRA: a style that diffusers loaded acts on text and noisy image only.
        # The official code does so in the layers that it adapts; in the others such a style reaches conditions too.
        y = self.base(input)
        delta = lora.delta(self.path, input)
        return y if delta is None else y + delta

    @property
    def base(self) -> nn.Module:
        """The layer inside peft's wrapper, if there is one."""
        return self.native.get_base_layer() if hasattr(self.native, "get_base_layer") else self.native  # type: ignore[operator]


def borrow(transformer: nn.Module) -> MMDiT:
    """condit's MM-DiT over the layers of diffusers' transformer, whose names are the same."""
    transformer = plain(transformer)
    with torch.device("meta"):
        backbone = MMDiT(config_of(transformer))
    for path, module in list(backbone.named_modules()):
        if isinstance(module, Linear | RMSNorm):
            parent, _, name = path.rpartition(".")
            native = transformer.get_submodule(path)
            backbone.get_submodule(parent).add_module(
                name, Borrowed(native, module) if isinstance(module, Linear) else native
            )
    return backbone.eval()


def config_of(transformer: Any) -> MMDiTConfig:
    """The configuration of diffusers' transformer as ours; the fields have the same names."""
    given = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    unknown = sorted(fields.keys() - MMDiTConfig.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"The transformer's configuration has {unknown[0]!r}, which FLUX.1's does not. Another model?")
    return MMDiTConfig(**fields)


class Onloaded:
    """Runs the hook with which accelerate brings an offloaded module to its device, as the module's forward would."""

    def __init__(self, module: nn.Module):
        self.module = plain(module)
        self.hook: Any = getattr(self.module, "_hf_hook", None)

    def __enter__(self) -> None:
        if self.hook is not None:
            self.hook.pre_forward(self.module)

    def __exit__(self, *_: object) -> None:
        if self.hook is not None:
            self.hook.post_forward(self.module, None)


def plain(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, if there is one."""
    return getattr(module, "_orig_mod", module)


# What is checked at the door


def classes(value: object) -> set[str]:
    """Names of the diffusers classes that `value` is of. By name: importing them all takes seconds."""
    return {c.__name__ for c in type(value).__mro__ if c.__module__.startswith("diffusers.")}


def arguments(pipe: Any, args: tuple, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the pipeline's call by name, with its defaults. TypeError for a strange one."""
    call = inspect.signature(type(pipe).__call__).bind(pipe, *args, **given)
    call.apply_defaults()
    return call.arguments


def drawn_size(pipe: Any, args: tuple, given: Mapping[str, Any], pixels: int) -> tuple[int, int]:
    """Height and width that a call draws, by diffusers' rule."""
    named, side = arguments(pipe, args, given), pipe.default_sample_size * pipe.vae_scale_factor
    height, width = ((named.get(name) or side) // pixels * pixels for name in ("height", "width"))
    return height, width


def predictions_a_step(pipe: Any, args: tuple, given: Mapping[str, Any]) -> int:
    """2 with `true_cfg_scale` and a negative prompt, by diffusers' rule; else 1. TypeError for a strange argument."""
    named = arguments(pipe, args, given)
    embedded = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    negative = named.get("negative_prompt") is not None or all(named.get(name) is not None for name in embedded)
    return 2 if named.get("true_cfg_scale", 1.0) > 1 and negative else 1


def refuse_strangers(controls: Sequence[Control], guest: Guest) -> None:
    """ValueError unless every control fits the guest's transformer, and its layers can be lent."""
    for control in controls:
        if not isinstance(control, Control):
            raise ValueError(f"controls are made by adapter.control(...); found {type(control).__name__}.")
        if control.fill() is not None or type(control).lora is not Control.lora:
            raise ValueError(
                f"{type(control).__name__} leaves cells out or adapts the noisy tokens, which a guest does not. Use "
                "diffusers' own inpainting and LoRA loading, or condit.load(folder)."
            )
        adapter = getattr(control, "adapter", None)
        bound = None if adapter is None else adapter._pipe[0]
        if adapter is None or bound is None:
            continue
        config = bound.config if isinstance(bound, Guest) else bound.backbone.config
        if config != guest.config:
            raise ValueError(
                f"{type(adapter).__name__} {adapter.name!r} was loaded for {bound.name}, whose transformer is not like "
                f"that of {guest.name}. Load it with {type(adapter).__name__}.load(file, guest)."
            )
    if not controls:
        return
    transformer = plain(guest.pipe.transformer)
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError("This transformer is spread over several devices; controls need it on one.")
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook("group_offloading") is not None:
            raise ValueError(
                "Group offloading brings layers in by blocks, which a control does not run. Use "
                "enable_model_cpu_offload() or enable_sequential_cpu_offload()."
            )
