"""DEADiff (arXiv:2403.06951) against fixtures: tensors written by the released modules (UNet, attention, DDIM sampler,
projection) and by LAVIS (Q-Former, image tower). Differences are relative to the largest value.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from condit.backbones.unet import UNet, UNetAttention, UNetBlock, UNetConfig, UNetContext
from condit.controls.control import Control, Run, Step
from condit.controls.deadiff import DEADiff, DEADiffConfig, DEADiffReference
from condit.controls.deadiff_layers import Name, cross_shapes, layer_table
from condit.diffusion.vp import Process, make_path, with_sampler
from condit.diffusion.vp_samplers import ddim
from condit.encoders.clip_patches import ClipPatches
from condit.encoders.qformer import QFormer, QFormerConfig
from condit.nn.attention import Site
from condit.weights.deadiff import IMAGE_MAP, place_in_diffusers, split
from condit.weights.original_sd import part as under
from condit.weights.original_sd import unet_names
from condit_lab.parity.check import Check, Differences, compare, difference, part

TOLERANCE, SAMPLER_TOLERANCE = 1e-5, 5e-5  # the fixtures' own


def facts(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def read(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


# The Q-Former


def published_qformer(folder: Path) -> dict[str, Tensor]:
    """The fixture's tensors under the names of a full checkpoint."""

    def full(name: str) -> str:
        projection = name.startswith("proj_layer.")
        return name.replace("proj_layer.", "style_proj_layer.") if projection else f"style_blip.{name}"

    return {full(name): x for name, x in read(folder, "qformer_weights").items()}


@cache
def qformer_of(folder: Path) -> QFormer:
    tensors = part(split(published_qformer(folder)).adapter, "style.")
    qformer = QFormer(QFormerConfig.of(tensors, heads=facts(folder, "qformer_config")["heads"]))
    qformer.load_state_dict(tensors, strict=True)
    return qformer.eval().requires_grad_(False)


@cache
def tower_of(folder: Path) -> ClipPatches:
    heads = facts(folder, "qformer_config")["vision_heads"]
    return ClipPatches.of(split(published_qformer(folder)).tower, heads=heads)


def compare_qformer(folder: Path, name: str) -> Differences:
    """qformer_io: tower and norm, all states, queries alone, projected tokens, a batch of padded text."""
    io, tower, qformer = read(folder, name), tower_of(folder), qformer_of(folder)
    tokens = tower.tokens(io["image"])
    outputs = {"vision_features": qformer.ln_vision(tokens), "queries_without_text": qformer.read(tokens)}
    for ending in ("", "_padded"):
        ids, mask = io[f"input_ids{ending}"], io[f"attention_mask{ending}"]
        states = qformer.read(tokens, ids, mask)
        outputs[f"last_hidden{ending}"] = states
        outputs[f"multimodal_embeds{ending}"] = states[:, : qformer.config.queries]
        outputs[f"ctx_tokens{ending}"] = qformer(tokens, ids, mask)
    inputs = ("image", "input_ids", "attention_mask")
    recorded = {k: x for k, x in io.items() if not k.startswith(inputs)}
    return compare({k: x for k, x in outputs.items() if k in recorded}, recorded, relative=True)


def compare_preparation(folder: Path, name: str) -> Differences:
    """preprocess*: references of any size to the tower's input, as in training."""
    t, patches = read(folder, name), ClipPatches(tower_of(folder).tower, blocks=2)
    patches.size = 224
    recorded = {k: x for k, x in t.items() if k.startswith("out")}
    return compare({k: patches.prepare(t[k.replace("out", "in")]) for k in recorded}, recorded, relative=True)


# Joint attention


def control_at(site: Site, maps: dict[str, Tensor], tokens: Tensor, strength: float) -> Control:
    """A control of one layer from the fixture's maps."""
    kv = {site.path: (tokens @ maps["i_to_k.weight"].mT, tokens @ maps["i_to_v.weight"].mT)}
    control = DEADiffReference(kv=kv, table={site.path: "style"}, adapter=None, strength={"style": strength})  # type: ignore[arg-type]
    acting = control.at(Step(0, 1, 1.0))
    assert acting is not None
    return acting


@torch.no_grad()
def compare_attention(folder: Path, name: str) -> Differences:
    """attention: one layer with every weight of the image's tokens, with zero tokens and without; one block."""
    t, outputs = read(folder, name), {}
    (width, context), site = t["w.to_k.weight"].shape, Site("attn2", "cross", 0)
    # The file does not tell its heads: of 8 in the public set, of 6 elsewhere.
    maps, heads = part(t, "w."), width // 8 if width % 8 == 0 and width % 6 else width // 6
    layer = UNetAttention(width, context, heads, site)
    layer.load_state_dict({k: x for k, x in maps.items() if not k.startswith("i_")}, strict=True)
    text = {site.path: layer.keys_values(t["text"], None)}
    for key in (k for k in t if k.startswith("out.")):
        kind = key.removeprefix("out.")
        tokens = torch.zeros_like(t["image"]) if kind == "zeros" else t["image"]
        strength = float(kind[1:]) if kind.startswith("w") else 1.0
        controls = () if kind == "none" else (control_at(site, maps, tokens, strength),)
        outputs[key] = layer(t["x"], UNetContext(t["x"], text, None, controls))
    weights = part(t, "block.")
    block = UNetBlock(width, heads, context, "block")
    block.load_state_dict({k: x for k, x in weights.items() if ".i_to_" not in k}, strict=True)
    text = {block.attn2.site.path: block.attn2.keys_values(t["text"], None)}
    for key in (k for k in t if k.startswith("block_out.w")):
        strength = float(key.removeprefix("block_out.w"))
        control = control_at(block.attn2.site, part(weights, "attn2."), t["image"], strength)
        outputs[key] = block(t["x"], UNetContext(t["x"], text, None, (control,)))
    return compare(outputs, {k: x for k, x in t.items() if k.startswith(("out.", "block_out."))}, relative=True)


# The UNet


@cache
def published_unet(folder: Path) -> dict[str, Tensor]:
    """The fixture's UNet under the names of a full checkpoint."""
    shards = [read(folder, f"unet_weights_{i}") for i in range(facts(folder, "unet_config")["weight_shards"])]
    return {f"model.diffusion_model.{name}": x for shard in shards for name, x in shard.items()}


@cache
def unet_of(folder: Path) -> UNet:
    c = facts(folder, "unet_config")["config"]
    config = UNetConfig(
        block_out_channels=tuple(c["model_channels"] * m for m in c["channel_mult"]),
        attention_head_dim=c["num_heads"],
        cross_attention_dim=c["context_dim"],
        sample_size=8,
    )
    unet = UNet(config)
    base = {name: x for name, x in published_unet(folder).items() if not IMAGE_MAP.fullmatch(name)}
    unet.load_state_dict(unet_names(under(base, "model.diffusion_model."), config), strict=True)
    return unet.eval().requires_grad_(False)


@cache
def adapter_of(folder: Path) -> DEADiff:
    """The image maps of the fixture; its tokens are given, so the Q-Formers are empty."""
    small = QFormerConfig(queries=4, width=20, layers=1, heads=2, hidden=8, image_width=8, vocabulary=8, positions=8)
    adapter = DEADiff(DEADiffConfig(), QFormer(small), QFormer(small), cross_shapes(unet_of(folder)))
    missing, unexpected = adapter.load_state_dict(split(published_unet(folder)).adapter, strict=False)
    assert not unexpected and all(name.startswith(("style.", "content.")) for name in missing)
    return adapter.requires_grad_(False)


def compare_layers(folder: Path, name: str) -> Differences:
    """unet_io: which layers take style and which content, in the order of the forward."""
    order = facts(folder, "unet_config")["attention_order"]
    places = [(f"{place_in_diffusers(row['module'])}.transformer_blocks.0.attn2", row["branch"]) for row in order]
    return {"layers": float(list(layer_table(unet_of(folder).sites).items()) != places)}


# The sets of a mode; the unconditional side has zero tokens of both.
SETS: dict[str, tuple[Name, ...] | None] = {
    "both": ("style", "content"),
    "split_text": ("style", "content"),
    "style_only": ("style",),
    "content_only": ("content",),
    "uncond": (),
    "no_image": None,
}


def controls_of(folder: Path, mode: str, strength: float = 1.0) -> list[Control]:
    """What a pipeline call hands to the UNet in a mode of the fixture."""
    io, sets = read(folder, "unet_io"), SETS[mode]
    if sets is None:
        return []
    tokens: dict[Name, Tensor] = {name: io[name] for name in sets or ("style",)}
    text = io["text_content"] if mode == "split_text" else None
    strengths: dict[Name, float] = {"style": strength, "content": strength}
    control = replace(adapter_of(folder).reference(tokens, strength=strengths), content_text=text)
    control = control if sets else control.negative()
    run = Run(unet_of(folder), len(io["x"]), (io["x"].shape[2], io["x"].shape[3]), io["x"], None, 4)  # type: ignore[arg-type]
    acting = control.prepare(run).at(Step(0, 1, 1.0))
    return [] if acting is None else [acting]


@torch.no_grad()
def compare_unet(folder: Path, name: str) -> Differences:
    """unet_io: the whole UNet in every mode."""
    io, outputs = read(folder, name), {}
    for key in (k for k in io if k.startswith("out.")):
        mode, _, weight = key.removeprefix("out.").partition(".w")
        controls = controls_of(folder, mode, float(weight or 1))
        outputs[key] = unet_of(folder)(io["x"], io["t"], io["text"], controls=controls)
    return compare(outputs, io, "out.", relative=True)


@torch.no_grad()
def compare_sampler(folder: Path, name: str) -> Differences:
    """ddim_cfg: every step of the released sampler, guided; the unconditional side has zero tokens and the negative
    text."""
    t, io, settings = read(folder, name), read(folder, "unet_io"), facts(folder, f"{name}_config")
    solver, process = with_sampler(Process(), "ddim-ldm")
    assert solver == "ddim"
    path, unet = make_path(process, solver, settings["steps"]), unet_of(folder)
    out = {"timesteps": difference(path.timesteps.flip(0), t["timesteps"])}
    for key in (k.removesuffix(".final") for k in t if k.endswith(".final")):
        mode, _, weight = key.partition(".w")
        sides = [
            (io["text"], controls_of(folder, mode, float(weight))),
            (t["negative_text"], controls_of(folder, "uncond", float(weight))),
        ]

        def denoise(x: Tensor, step: Step, sides=sides) -> Tensor:
            at = torch.full((len(x),), step.time)
            cond, uncond = (unet(x, at, text, controls=controls) for text, controls in sides)
            return uncond + settings["guidance"] * (cond - uncond)

        steps = [io["x"]]
        final = ddim(denoise, io["x"], path, on_step=lambda i, x, x0, steps=steps: steps.append(x))
        out[f"{key}.trajectory"] = difference(torch.stack(steps), t[f"{key}.trajectory"], relative=True)
        out[f"{key}.final"] = difference(final, t[f"{key}.final"], relative=True)
    return out


_MODULES = "released modules"
CHECKS = (
    Check("image tower, Q-Former, projection", _MODULES, TOLERANCE, "qformer_io.safetensors", compare_qformer),
    Check("references enlarged, copied, shrunk", _MODULES, TOLERANCE, "preprocess*.safetensors", compare_preparation),
    Check("joint attention, a transformer block", _MODULES, TOLERANCE, "attention.safetensors", compare_attention),
    Check("layers of style and content", _MODULES, 0, "unet_io.safetensors", compare_layers),
    Check("UNet in every mode", _MODULES, TOLERANCE, "unet_io.safetensors", compare_unet),
    Check("guided DDIM, every step", _MODULES, SAMPLER_TOLERANCE, "ddim_cfg.safetensors", compare_sampler),
)
INPUTS = ("*_config", "*_weights*")
