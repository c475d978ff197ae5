"""What must run on a device: pipelines of all families, controls, edits, guests, on tiny random models.

A case takes a `Kit`, which builds models where they are to run, and returns a tensor.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from condit.backbones.diffit import DiffiT, DiffiTConfig
from condit.backbones.diffit_image import DiffiTImage, DiffiTImageConfig
from condit.backbones.dit import DiT, DiTConfig
from condit.controls.control import Control, When
from condit.controls.dit4edit import Blend, DiT4Edit
from condit.controls.instantstyle import InstantStyle
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.style_lora import StyleLoRA
from condit.controls.token_merging import TokenMerging
from condit.diffusion.edm import EDM
from condit.drawing.pipeline import Pipeline
from condit.nn.lora import Linear, LoRA, linear_shapes
from condit.weights.class_models import ClassParts, PixelParts
from pretend import Watch, within

HALF = np.zeros((32, 48), np.uint8)
HALF[:, :24] = 255
MERGING = TokenMerging(0.5, minimum=0, mlp=True)
BLEND = Blend(start=0.0, layers=(0, 1))
EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"device_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@dataclass(frozen=True)
class Kit:
    """Models and adapters on a device; `make` holds the fixtures of conftest.py by name."""

    make: dict[str, Any]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    watch: Watch | None = None

    def placed(self, module: Any) -> Any:
        return module.to(self.device, self.dtype)

    def at(self, pipe: Pipeline) -> Pipeline:
        pipe.backbone.to(self.dtype)
        return pipe.to(self.device)

    def flow(self, *, offload: Any = None, **how: Any) -> Pipeline:
        pipe = self.make["pipe"](**{"blocks": 1, **how})
        return self.at(pipe if offload is None else Pipeline(pipe.parts, offload=offload))

    def latent(self, kind: str = "sd15", **how: Any) -> Pipeline:
        return self.at(self.make["latent"](kind, **how))

    def pixart(self) -> Pipeline:
        return self.at(self.make["pixart"](self.make["pipe"]()))

    def classes(self, kind: str = "dit") -> Pipeline:
        sizes: Any = {"input_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 4, "num_classes": 5}
        with seeded():
            model = DiT(DiTConfig(**sizes)) if kind == "dit" else DiffiT(DiffiTConfig(**sizes))
        vae = self.make["pipe"]().parts.vae
        parts = ClassParts(kind, "0" * 16, shaken(model), vae, None, 4.0, 1.0, Path("."))
        return self.at(Pipeline(parts))

    def pixels(self) -> Pipeline:
        with seeded():
            model = DiffiTImage(DiffiTImageConfig(blocks=(1, 1), widths=(32, 32), window=4, time_dim=16, head_dim=16))
        return self.at(Pipeline(PixelParts("pixels", "0" * 16, shaken(model, 0.02), EDM(), (16, 16))))

    def ip(self, pipe: Pipeline) -> IPAdapter:
        with seeded():
            if not hasattr(pipe.backbone.config, "cross_attention_dim"):
                return self.placed(self.make["ip"](pipe))
            adapter = IPAdapter.new(pipe, IPConfig(12, 3, pipe.backbone.config.cross_attention_dim))
        return self.placed(shaken(adapter, 0.3))

    def omini(self, pipe: Pipeline, **config: Any) -> Any:
        with seeded():
            return self.placed(self.make["omini"](pipe, **config))

    def style(self, pipe: Pipeline) -> StyleLoRA:
        targets = [path for path, module in pipe.backbone.named_modules() if isinstance(module, Linear)][:6]
        with seeded():
            lora = LoRA(linear_shapes(pipe.backbone, targets), 2)
        return StyleLoRA(self.placed(shaken(lora, 0.2)), frozenset(lora.keys))

    def pictures(self, n: int = 1) -> list[np.ndarray]:
        return self.make["pictures"](n)


@contextmanager
def seeded() -> Iterator[None]:
    """The same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def shaken(module: nn.Module, scale: float = 0.1) -> Any:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g).to(p))
    return module.eval().requires_grad_(False)


def generate(pipe: Pipeline, controls: list[Control] | None = None, prompt: Any = "a red fox", **how: Any) -> Tensor:
    given = {"seed": 0, "num_inference_steps": 2, "output_type": "pt", **how}
    return pipe(prompt, controls=controls or [], **given).images


CASES: dict[str, Callable[[Kit], Tensor]] = {}


def case(name: str) -> Callable:
    def add(function: Callable[[Kit], Tensor]) -> Callable[[Kit], Tensor]:
        CASES[name] = function
        return function

    return add


# Families of models


def families() -> dict[str, Callable[[Kit], Tensor]]:
    plain: dict[str, Callable[[Kit], Tensor]] = {
        "flow": lambda kit: generate(kit.flow()),
        "flow, eta": lambda kit: generate(kit.flow(), eta=0.5),
        "flow, distilled": lambda kit: generate(kit.flow(guidance_embeds=True, distilled=True)),
        "flow, x0": lambda kit: generate(kit.flow(prediction="x0")),
        "flow, offload encoders": lambda kit: generate(kit.flow(offload="encoders")),
        "flow, image to image": lambda kit: generate(kit.flow(), image=kit.pictures()[0], strength=0.7),
        "flow, inpainting": lambda kit: generate(kit.flow(), image=kit.pictures()[0], mask_image=HALF),
        "inpainting model": lambda kit: generate(
            kit.latent("sd15-inpainting"), image=kit.pictures()[0], mask_image=HALF
        ),
        "SDXL": lambda kit: generate(kit.latent("sdxl"), guidance_rescale=0.5),
        "PixArt": lambda kit: generate(kit.pixart()),
        "DiT": lambda kit: generate(kit.classes(), None, 1),
        "DiT, ddim": lambda kit: generate(kit.classes(), None, 1, sampler="ddim", eta=0.5),
        "DiT, no class": lambda kit: generate(kit.classes(), None, [1, None]),
        "DiffiT": lambda kit: generate(kit.classes("diffit"), None, 1),
        "pixels": lambda kit: generate(kit.pixels(), None, None),
    }
    plain["UNet, ddim-ldm"] = lambda kit: generate(kit.latent(), sampler="ddim-ldm", num_inference_steps=7)
    for sampler in ("ddim", "dpm++", "dpm++-karras", "euler", "euler-karras", "euler-ancestral"):
        plain[f"UNet, {sampler}"] = partial(
            lambda kit, name: generate(kit.latent(), sampler=name, num_inference_steps=3), name=sampler
        )
    plain["UNet, ddim, eta"] = lambda kit: generate(kit.latent(), sampler="ddim", eta=0.5)
    plain["UNet, image to image"] = lambda kit: generate(
        kit.latent(), image=kit.pictures()[0], mask_image=HALF, strength=0.7
    )
    return plain


CASES |= families()


@case("predict and encode_condition")
def predict(kit: Kit) -> Tensor:
    pipe = kit.flow()
    control = kit.omini(pipe).control(kit.pictures()[0])
    tokens, _ = pipe.encode_condition(pipe.read_images(kit.pictures()[0], None))
    return pipe.predict(tokens.float(), 0.5, "a fox", controls=[control], guidance_scale=3.0)


@case("predict, UNet and DiT")
def predict_others(kit: Kit) -> Tensor:
    unet, dit = kit.latent(), kit.classes()
    x = unet.encode_images(unet.read_images(kit.pictures()[0], None))
    first = unet.predict(x, 0.5, "a fox", guidance_scale=3.0)
    return torch.cat([first.flatten(), dit.predict(x[:, :, :4, :4], 0.5, 1, guidance_scale=3.0).flatten()])


# Controls


def controlled(build: str, make: Callable[[Kit, Pipeline], list[Control]], **how: Any) -> Callable[[Kit], Tensor]:
    def run(kit: Kit) -> Tensor:
        pipe = getattr(kit, build)(**how.get("pipe", {}))
        given = {k: v for k, v in how.items() if k != "pipe"}
        with kit.watch.relaxed() if kit.watch else nullcontext():
            controls = make(kit, pipe)
        return generate(pipe, controls, **given)

    return run


def ip_by(**how: Any) -> Callable[[Kit, Pipeline], list[Control]]:
    return lambda kit, pipe: [kit.ip(pipe).control(kit.pictures()[0], **how)]


def omini_by(adapter: dict[str, Any] | None = None, **how: Any) -> Callable[[Kit, Pipeline], list[Control]]:
    return lambda kit, pipe: [kit.omini(pipe, **(adapter or {})).control(kit.pictures()[0], **how)]


def deadiff_by(**how: Any) -> Callable[[Kit, Pipeline], list[Control]]:
    def make(kit: Kit, pipe: Pipeline) -> list[Control]:
        adapter = kit.make["deadiff"](pipe).to(kit.device)
        adapter.tower.to(kit.device)
        return [adapter.control(kit.pictures()[0], **how)]

    return make


def reference_only(kit: Kit, pipe: Pipeline) -> list[Control]:
    return [example("reference_only").ReferenceOnly(kit.pictures()[0], 0.6)]


def everything(kit: Kit, pipe: Pipeline) -> list[Control]:
    image = kit.pictures()[0]
    left = kit.omini(pipe, independent=True, delta=(0, -6))
    return [
        kit.ip(pipe).control(image, strength=0.6, mask=HALF),
        kit.omini(pipe).control(image, strength=0.5),
        left.control(image, mask=HALF),
        kit.style(pipe).control(0.7),
    ]


CURVE = When(0.0, 1.0, lambda x: 1 - x / 2)
INDEPENDENT: dict[str, Any] = {"independent": True, "delta": (0, -6)}
CONTROLS: dict[str, Callable[[Kit], Tensor]] = {
    "IP-Adapter": controlled("flow", ip_by(strength=0.6)),
    "IP-Adapter, curve and region": controlled("flow", ip_by(when=CURVE, mask=HALF)),
    "IP-Adapter, strengths by layer": controlled("flow", ip_by(strength={"": 0.5})),
    "IP-Adapter, strengths by image": controlled(
        "flow",
        lambda kit, pipe: [kit.ip(pipe).control(kit.pictures(2), strength=[0.3, 0.8])],
        prompt=["a fox", "a cat"],
    ),
    "IP-Adapter, UNet": controlled("latent", ip_by(strength=0.6, mask=HALF), image_guidance_scale=2.0),
    "IP-Adapter, UNet, two calls": controlled("latent", ip_by(), guidance_in_one_call=False),
    "InstantStyle": controlled(
        "latent",
        lambda kit, pipe: [InstantStyle(kit.ip(pipe)).control(style=kit.pictures()[0], when=CURVE)],
        pipe={"kind": "sd15"},
    ),
    "OminiControl, joint": controlled("flow", omini_by(), image_guidance_scale=1.5),
    "OminiControl, strength": controlled("flow", omini_by(strength=0.6, text_bias=False, when=CURVE)),
    "OminiControl, independent": controlled("flow", omini_by(INDEPENDENT, strength=0.6)),
    "OminiControl, independent, region": controlled("flow", omini_by(INDEPENDENT, strength=0.6, mask=HALF)),
    "OminiControl, first step": controlled("flow", omini_by(cached="first-step", strength=0.6, mask=HALF)),
    "OminiControl, not cached": controlled("flow", omini_by(INDEPENDENT, cached=False)),
    "OminiControl, distilled": controlled(
        "flow", omini_by(), pipe={"guidance_embeds": True, "distilled": True}, image_guidance_scale=1.5
    ),
    "OminiControl, fill": controlled("flow", omini_by(fill=HALF), eta=0.5),
    "OminiControl, fill, independent": controlled("flow", omini_by({"independent": True}, fill=HALF)),
    "OminiControl, posterior": controlled(
        "flow", lambda kit, pipe: [kit.omini(pipe).control(kit.pictures()[0]).sampled(torch.Generator().manual_seed(1))]
    ),
    "OminiControl, offload encoders": controlled("flow", omini_by(), pipe={"offload": "encoders"}),
    "DEADiff": controlled("latent", deadiff_by(strength=0.7, mask=HALF)),
    "DEADiff, attention": controlled("latent", deadiff_by(strength=0.7, acts="attention", when=CURVE)),
    "style LoRA": controlled("flow", lambda kit, pipe: [kit.style(pipe).control(0.5, when=CURVE)]),
    "style LoRA, official": controlled(
        "flow", lambda kit, pipe: [kit.style(pipe).control(0.5, official=True), *omini_by()(kit, pipe)]
    ),
    "style LoRA, UNet": controlled("latent", lambda kit, pipe: [kit.style(pipe).control(0.5)]),
    "token merging": controlled("flow", lambda kit, pipe: [MERGING, *ip_by(mask=HALF)(kit, pipe)]),
    "token merging, PixArt": controlled("pixart", lambda kit, pipe: [MERGING]),
    "token merging, DiT": controlled("classes", lambda kit, pipe: [replace(MERGING, every=2)], prompt=1),
    "all together": controlled("flow", everything),
    "reference only, flow": controlled("flow", reference_only),
    "reference only, UNet": controlled("latent", reference_only),
    "reference only, PixArt": controlled("pixart", reference_only),
}
CASES |= CONTROLS

# Edits


def edited(build: str, controls: Callable[[Kit, Pipeline], list[Control]] | None = None, **how: Any) -> Callable:
    def run(kit: Kit) -> Tensor:
        pipe = getattr(kit, build)(**how.get("pipe", {}))
        given = {"num_inference_steps": 2, "iterations": 1, "output_type": "pt"}
        given |= {k: v for k, v in how.items() if k not in ("pipe", "method")}
        if "method" in how:
            method = how["method"]()
            given["method"] = _Strict(method, kit.watch) if kit.watch else method
        acting = [] if controls is None else controls(kit, pipe)
        return pipe.edit(kit.pictures()[0], "a red fox", "a red cat", controls=acting, **given).images

    return run


@dataclass(frozen=True)
class _Strict:
    """A method of editing whose steps must not wait."""

    method: Any
    watch: Watch

    @property
    def inverts(self) -> bool:
        return self.method.inverts

    def __call__(self, run: Any) -> Tensor:
        return within(self.watch.strict, self.method)(run)

    def describe(self) -> dict:
        return self.method.describe()


def all_of_dit4edit(kit: Kit, pipe: Pipeline) -> list[Control]:
    return [DiT4Edit(blend=BLEND, reweight={"cat": 1.5}, self_steps=(0, 1), record=True), replace(MERGING, ratio=0.3)]


def kv_edit(kit: Kit, pipe: Pipeline) -> list[Control]:
    return [DiT4Edit(self_form="kv", self_steps=(0, 1), cross_until=0.4)]


EDITS: dict[str, Callable[[Kit], Tensor]] = {
    "edit, plain": edited("flow", maps=True),
    "edit, offload encoders": edited("flow", all_of_dit4edit, pipe={"offload": "encoders"}),
    "edit, mask": edited("flow", kv_edit, mask=HALF, anchored=False),
    "edit, IP-Adapter": edited("flow", ip_by(mask=HALF)),
    "edit, OminiControl": edited("flow", omini_by(INDEPENDENT)),
    "edit, FlowEdit": edited("flow", method=lambda: example("flowedit").FlowEdit(end=0.3), mask=HALF),
    "edit, reference only": edited("flow", reference_only),
}
for solver in ("first_order", "entered", "fixed_point"):
    EDITS[f"edit, flow, {solver}"] = edited("flow", all_of_dit4edit, solver=solver)
for solver in ("first_order", "dpmpp2m", "entered", "fixed_point", "exact2m"):
    EDITS[f"edit, PixArt, {solver}"] = edited("pixart", all_of_dit4edit, solver=solver)
EDITS["edit, PixArt, 2M"] = edited("pixart", kv_edit, mask=HALF, solver="dpmpp2m", num_inference_steps=16)
CASES |= EDITS

# Blocks that rest on the CPU are copied for their turn: the copies are all that waits.
MOVING: dict[str, Callable[[Kit], Tensor]] = {
    "offload blocks": lambda kit: generate(kit.flow(offload="blocks")),
    "offload blocks, OminiControl": controlled("flow", omini_by(INDEPENDENT), pipe={"offload": "blocks"}),
    "offload blocks, edit": edited("flow", all_of_dit4edit, pipe={"offload": "blocks"}),
}
