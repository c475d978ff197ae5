"""The rows of docs/files.md: layouts of LoRA files, each with a check on a generated sample."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_layouts as layouts
from condit.backbones.unet import UNet
from condit.controls.style_lora import StyleLoRA
from condit.interop.unet import config_of
from condit.nn.lora import Conv, Linear, LoRA, Pointwise
from condit.weights.catalog import AdapterFile
from condit.weights.files import save_tensors
from condit.weights.lora_files import published
from condit.weights.lora_unet import adapter_for

WIDTH = 3072  # of FLUX.1, which diffusers' converters expect


@dataclass(frozen=True)
class Row:
    """layout and base as the table names them; test: what the sample is compared with, or the words of the refusal."""

    layout: str
    base: str
    result: str  # "exact" or "refused"
    test: str
    check: "Callable[[World], None]"

    @property
    def id(self) -> str:
        return f"{self.base}: {self.layout}"


@dataclass
class World:
    """Pipelines of diffusers by kind, made once, and a folder for the sample of a row."""

    make: Callable[[str], Any]
    made: dict[str, Any]
    folder: Path

    def theirs(self, kind: str) -> Any:
        if kind not in self.made:
            self.made[kind] = self.make(kind)
        return self.made[kind]

    def ours(self, kind: str) -> UNet:
        unet = self.theirs(kind).unet
        with torch.random.fork_rng():
            backbone = UNet(config_of(unet))
        backbone.load_state_dict(unet.state_dict())
        return backbone.eval().requires_grad_(False)


@dataclass(frozen=True)
class Bare:
    """A host of a LoRA: the network alone."""

    backbone: nn.Module
    name: str = "a random model"
    device: str = "cpu"
    adapts_text: bool = False
    dtype: torch.dtype = torch.float32

    def adapter_file(self, source: Path, method: str, *, ignore_text: bool = False) -> AdapterFile:
        return adapter_for(self.backbone, source, method, ignore_text=ignore_text)


# UNets

Make = Callable[[UNet], Mapping[str, Tensor]]
LORA = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6, "unet.target_modules": ["to_q"]})}
RS = {
    "lora_adapter_metadata": json.dumps(
        {"unet.r": 2, "unet.lora_alpha": 6, "unet.use_rslora": True, "unet.target_modules": ["to_q"]}
    )
}


def load(world: World, kind: str, make: Make, metadata: dict | None = None, **how: Any) -> tuple[UNet, LoRA]:
    unet = world.ours(kind)
    save_tensors(world.folder / "lora.safetensors", make(unet), metadata)
    return unet, StyleLoRA.load(world.folder / "lora.safetensors", Bare(unet), **how).lora  # type: ignore[arg-type]


def layers_of(unet: UNet) -> dict[str, Linear | Pointwise | Conv]:
    return {path: m for path, m in unet.named_modules() if isinstance(m, Linear | Pointwise | Conv)}


def input_of(layer: Linear | Pointwise | Conv) -> Tensor:
    g = torch.Generator().manual_seed(5)
    size = (1, layer.in_channels, 5, 5) if isinstance(layer, Conv) else (1, 3, layer.in_features)
    return torch.randn(size, generator=g)


def equals_diffusers(world: World, kind: str, make: Make, metadata: dict | None, count: int) -> None:
    """Every layer of the UNet computes what diffusers' layer computes with the LoRA that its loader made."""
    unet, lora = load(world, kind, make, metadata)
    assert len(lora.keys) >= count
    theirs = world.theirs(kind)
    theirs.load_lora_weights(world.folder, weight_name="lora.safetensors")
    try:
        for path, layer in layers_of(unet).items():
            x, other = input_of(layer), theirs.unet.get_submodule(path)
            wanted = other(x.mT[..., None])[..., 0].mT if isinstance(layer, Pointwise) else other(x)
            torch.testing.assert_close(layer(x, lora), wanted, rtol=1e-5, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}")
            assert (path in lora.keys) == ((layer(x) - wanted).abs().max() > 1e-3), path
    finally:
        theirs.unload_lora_weights()


def equals_formula(world: World, kind: str, make: Make, formula: Callable, metadata: dict | None = None) -> None:
    """Every layer of the LoRA computes what the layer computes with the weight and bias of formula(weight, path)."""
    unet, lora = load(world, kind, make, metadata)
    layers = layers_of(unet)
    assert lora.keys
    for path in lora.keys:
        layer = layers[path]
        x, (weight, bias) = input_of(layer), formula(layer.weight, path)
        bias = layer.bias if bias is None else bias if layer.bias is None else layer.bias + bias
        if isinstance(layer, Conv):
            wanted = F.conv2d(x, weight, bias, layer.stride, layer.padding)
        else:
            wanted = F.linear(x, weight.flatten(1), bias)
        torch.testing.assert_close(layer(x, lora), wanted, rtol=1e-5, atol=1e-4, msg=lambda m, p=path: f"{p}: {m}")


def refuses(world: World, kind: str, make: Make, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load(world, kind, make)


def parts(unet: UNet, endings: tuple[str, ...] = layouts.LINEAR) -> layouts.Parts:
    return layouts.parts_of(unet, endings)


def spelt_as_kohya(unet: UNet, endings: tuple[str, ...]) -> dict[str, Tensor]:
    xl = unet.config.addition_embed_type is not None
    return layouts.kohya(parts(unet, endings), layouts.authors(unet) if xl else lambda path: path)


def update(parts: layouts.Parts, path: str, weight: Tensor) -> Tensor:
    return weight + (parts[path].b @ parts[path].a.flatten(1)).reshape(weight.shape)


def dora_formula(own: layouts.Parts) -> Callable:
    def formula(weight: Tensor, path: str) -> tuple[Tensor, None]:
        updated = update(own, path, weight).flatten(1)
        scaled = updated / updated.norm(dim=1, keepdim=True) * 1.5 * weight.flatten(1).norm(dim=1, keepdim=True)
        return scaled.reshape(weight.shape), None

    return formula


def check_dora(world: World, kind: str) -> None:
    own = parts(world.ours(kind), layouts.LINEAR + layouts.LOCON)
    equals_formula(world, kind, lambda unet: layouts.dora(own, unet), dora_formula(own))


def check_vector(world: World, kind: str) -> None:
    """peft's names of a DoRA."""

    def make(unet: UNet) -> dict[str, Tensor]:
        tensors = layouts.diffusers(parts(unet))
        vectors = {p: 1.5 * unet.get_parameter(f"{p}.weight").flatten(1).norm(dim=1) for p in parts(unet)}
        return tensors | {f"unet.{p}.lora_magnitude_vector": v for p, v in vectors.items()}

    equals_formula(world, kind, make, dora_formula(parts(world.ours(kind))))


def check_tucker(world: World, kind: str) -> None:
    wide = ("conv1", "conv2")
    given = layouts.tucker(parts(world.ours(kind), wide))

    def formula(weight: Tensor, path: str) -> tuple[Tensor, None]:
        name = f"lora_unet_{path.replace('.', '_')}.lora_"
        down, mid, up = (given[f"{name}{part}.weight"] for part in ("down", "mid", "up"))
        return weight + 2 * torch.einsum("or,rshw,si->oihw", up[..., 0, 0], mid, down[..., 0, 0]), None

    equals_formula(world, kind, lambda unet: given, formula)


def check_comfy(world: World, kind: str) -> None:
    given = layouts.comfy(parts(world.ours(kind)))
    own = parts(world.ours(kind))

    def formula(weight: Tensor, path: str) -> tuple[Tensor, Tensor]:
        return update(own, path, weight), given[f"lora_unet_{path.replace('.', '_')}.diff_b"]

    equals_formula(world, kind, lambda unet: given, formula)


def check_text(world: World, kind: str) -> None:
    def make(unet: UNet) -> dict[str, Tensor]:
        name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
        return layouts.kohya(parts(unet)) | {f"{name}.lora_down.weight": torch.ones(2, 4)}

    refuses(world, kind, make, "also adapts a text encoder")
    assert load(world, kind, make, ignore_text=True)[1].rank == layouts.RANK


def one(name: str, *shape: int) -> Make:
    return lambda unet: {f"lora_unet_down_blocks_0_attentions_0_proj_in.{name}": torch.ones(shape)}


def columns(unet: UNet) -> dict[str, Tensor]:
    tensors = layouts.kohya(parts(unet, ("attn1.to_q",)))
    name = next(iter(tensors)).split(".")[0]
    return tensors | {f"{name}.dora_scale": torch.ones(1, tensors[f"{name}.lora_down.weight"].shape[1])}


BY_DIFFUSERS, BY_HAND = "`load_lora_weights`, every layer's output", "the formula, every layer's output"
NAMED = {"sd15": "SD 1.x", "sdxl": "SDXL"}


def unet_rows(kind: str) -> list[Row]:
    base = NAMED[kind]

    def same(layout: str, make: Make, metadata: dict | None = None, count: int = 8) -> Row:
        check = partial(equals_diffusers, kind=kind, make=make, metadata=metadata, count=count)
        return Row(layout, base, "exact", BY_DIFFUSERS, check)

    def formula(layout: str, check: Callable) -> Row:
        return Row(layout, base, "exact", BY_HAND, partial(check, kind=kind))

    def refused(layout: str, make: Make, words: str) -> Row:
        return Row(layout, base, "refused", words, partial(refuses, kind=kind, make=make, words=words))

    every = layouts.LINEAR + layouts.LOCON + (layouts.ADDED if kind == "sdxl" else ())
    peft = lambda unet: layouts.diffusers(parts(unet, ("to_q",)))  # noqa: E731
    rows = [
        same("diffusers and peft: `unet.PATH.lora_A.weight`", lambda unet: layouts.diffusers(parts(unet))),
        same("the same with `unet.lora_alpha` in its metadata", peft, LORA, 2),
        same("rsLoRA of peft", peft, RS, 2),
        same("diffusers, 2023: `PATH.processor.to_q_lora.down.weight`", lambda unet: layouts.processors(parts(unet))),
        same("kohya's sd-scripts", lambda unet: spelt_as_kohya(unet, layouts.LINEAR)),
        same(
            "LoCon: convolutions, embeddings (LCM-LoRA, Lightning)", lambda unet: spelt_as_kohya(unet, every), None, 20
        ),
    ]
    if kind == "sdxl":
        return rows
    return [
        *rows,
        formula("LoCon with `lora_mid` (LyCORIS, Tucker)", check_tucker),
        formula("DoRA: `dora_scale` of outputs (LyCORIS, kohya)", check_dora),
        formula("DoRA: `lora_magnitude_vector` (peft)", check_vector),
        formula("`diff_b`, differences of biases (ComfyUI)", check_comfy),
        Row(
            "a LoRA that also adapts a text encoder",
            base,
            "refused",
            "also adapts a text encoder; `ignore_text=True` loads the rest",
            partial(check_text, kind=kind),
        ),
        refused("DoRA of inputs (LyCORIS without `wd_on_output`)", columns, "one of each input"),
        refused("LoHa", one("hada_w1_a", 8, 2), "It is of LoHa"),
        refused("LoKr", one("lokr_w1", 2, 2), "It is of LoKr"),
        refused("whole differences `.diff`", one("diff", 8, 8), "changes of whole weights"),
        refused(
            "a LoRA of another model",
            lambda unet: layouts.kohya({"no.such": layouts.Part(torch.ones(2, 8), torch.ones(8, 2))}),
            "takes no LoRA there",
        ),
    ]


# FLUX.1


def converter(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    from diffusers.loaders import lora_conversion_utils

    return getattr(lora_conversion_utils, name)


def equals_converter(
    world: World, given: Callable[[], dict[str, Tensor]], name: str, same_as: Callable | None = None
) -> None:
    """Every update is that of diffusers' converter, on a random input. same_as: the file that is given to it, where it
    has none for this spelling."""
    lora = LoRA.from_tensors(published(given()))
    wanted = converter(name)(given() if same_as is None else same_as())
    wanted = {n.removeprefix("transformer."): t for n, t in wanted.items()}
    paths = {n.removesuffix(".lora_A.weight") for n in wanted if n.endswith(".lora_A.weight")}
    assert paths == lora.keys.keys()
    for path in paths:
        a, b = wanted[f"{path}.lora_A.weight"], wanted[f"{path}.lora_B.weight"]
        x = torch.randn(2, a.shape[1], generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(lora.delta(path, x), x @ a.mT @ b.mT, rtol=1e-4, atol=1e-3)


def own_names(a: str, b: str, spell: Callable[[str], str]) -> dict[str, Tensor]:
    return layouts.random_pairs(layouts.flux_shapes(WIDTH), a, b, spell)


def kohya_flux() -> dict[str, Tensor]:
    return own_names("lora_down", "lora_up", lambda name: "lora_unet_" + name.replace(".", "_"))


def comfy_flux() -> dict[str, Tensor]:
    return own_names("lora_A", "lora_B", lambda name: f"diffusion_model.{name}")


def refuses_flux(world: World, names: Mapping[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        published({name: torch.ones(shape) for name, shape in names.items()})


def check_flux_text(world: World) -> None:
    names = ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text_encoders.t5xxl.x.lora_A.weight")
    text = {name: torch.ones(2, 4) for name in names}
    with pytest.raises(ValueError, match="also adapts a text encoder"):
        published(kohya_flux() | text)
    assert published(kohya_flux() | text, ignore_text=True).keys() == published(kohya_flux()).keys()


def check_flux_settings(world: World) -> None:
    """diffusers' own folder of a tiny FLUX with rsLoRA: the metadata's alpha over the root of the rank."""
    tensors = {"transformer.x.lora_A.weight": torch.ones(4, 8), "transformer.x.lora_B.weight": torch.ones(8, 4)}
    settings = {"r": 4, "lora_alpha": 6.0, "use_rslora": True}
    assert LoRA.from_tensors(published(tensors, settings)).scales == {"x": pytest.approx(3.0)}


KOHYA = "_convert_kohya_flux_lora_to_diffusers"
CONTROL = {"img_in.lora_A.weight": (2, 128), "double_blocks.0.img_attn.norm.query_norm.scale": (128,)}


def flux_rows() -> list[Row]:
    def same(layout: str, given: Callable, name: str, same_as: Callable | None = None) -> Row:
        check = partial(equals_converter, given=given, name=name, same_as=same_as)
        return Row(layout, "FLUX.1", "exact", f"`{name}`, every update", check)

    def refused(layout: str, words: str, names: Mapping[str, tuple[int, ...]]) -> Row:
        return Row(layout, "FLUX.1", "refused", words, partial(refuses_flux, names=names, words=words))

    return [
        same("kohya's sd-scripts: `lora_unet_double_blocks_*`", kohya_flux, KOHYA),
        same("ComfyUI, fal: `diffusion_model.double_blocks.*`", comfy_flux, KOHYA, kohya_flux),
        same("OneTrainer: `lora_transformer_*`", partial(layouts.one_trainer, WIDTH), KOHYA),
        same("XLabs: `processor.qkv_lora1`", partial(layouts.xlabs, WIDTH), "_convert_xlabs_flux_lora_to_diffusers"),
        Row("rsLoRA of peft", "FLUX.1", "exact", "the formula", check_flux_settings),
        Row(
            "a LoRA that also adapts CLIP or T5",
            "FLUX.1",
            "refused",
            "also adapts a text encoder; `ignore_text=True` loads the rest",
            check_flux_text,
        ),
        refused("control LoRAs of FLUX.1's authors", "a control LoRA of FLUX.1's authors", CONTROL),
        refused("LoKr", "It is of LoKr", {"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": (2, 2)}),
    ]
