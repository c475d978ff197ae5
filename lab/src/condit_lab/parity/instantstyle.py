"""InstantStyle (arXiv:2404.02733) against fixtures: tensors written by the official classes, and by
ComfyUI_IPAdapter_plus for its weight types. Tolerances are those of the fixtures' README.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from condit.controls.control import Control, Run, Step, Where
from condit.controls.host import Host
from condit.controls.instantstyle import EASES, STAGES, InstantStyle, block_weights, modules_of
from condit.controls.instantstyle import preset as blocks_of
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.ip_projectors import Layer
from condit.nn.attention import Call, Site, join_heads, sdpa, split_heads
from condit_lab.parity.check import Check, Differences, compare, difference
from condit_lab.parity.unets import CALL, TOKENS, TRAJECTORY, golden_pipe

SETS = {"all": "all", "style": "style", "layout": "layout", "style_layout": "style+layout"}  # the fixture's -> ours


@cache
def style_of(folder: Path, tag: str, variant: str, preset: str = "all") -> InstantStyle:
    pipe = golden_pipe(folder, tag)
    return InstantStyle.load(
        pipe.file(f"{variant}_adapter.safetensors"), cast("Host", pipe), preset=preset, head_dim=pipe.head_dim
    )


def parts_of(name: str) -> tuple[str, str]:
    tag, variant, _ = name.split("_")
    return tag, variant


def embedded(folder: Path, tag: str, style: InstantStyle, preset: str, scale: float) -> Control:
    """Of the fixture's features, in the blocks of a preset."""
    pipe = golden_pipe(folder, tag)
    given, hidden = pipe.tensors("inputs"), style.adapter.config.feature == "hidden"
    embeds = given["clip_hidden_penultimate" if hidden else "clip_image_embeds"]
    return style.adapter.control(embeds=embeds, strength=scale, where=blocks_of(preset, pipe.backbone))


def sets_of(folder: Path, tag: str) -> list[str]:
    return [name for name in SETS if name in golden_pipe(folder, tag).config["target_blocks"]]


@torch.no_grad()
def compare_tokens(folder: Path, name: str) -> Differences:
    """*_blocks: the projector's tokens."""
    tag, variant = parts_of(name)
    pipe, style = golden_pipe(folder, tag), style_of(folder, tag, variant)
    given = pipe.tensors("inputs")["clip_hidden_penultimate" if variant == "plus" else "clip_image_embeds"]
    return {"tokens": difference(style.adapter.tokens(given), pipe.tensors(f"{variant}_blocks")["tokens"])}


def compare_blocks(folder: Path, name: str) -> Differences:
    """*_blocks: one prediction of every preset at every strength."""
    tag, variant = parts_of(name)
    pipe, style, outputs = golden_pipe(folder, tag), style_of(folder, tag, variant), {}
    recorded, given = pipe.tensors(f"{variant}_blocks"), pipe.tensors("inputs")
    for key in recorded.keys() - {"tokens"}:
        preset, _, scale = key.partition("/")
        control = embedded(folder, tag, style, SETS[preset], float(scale.rpartition("scale_")[2]))
        outputs[key] = pipe.predict(given, control)
    plain = {"noise_pred/no_adapter": difference(pipe.predict(given), given["noise_pred/no_adapter"])}
    return plain | compare(outputs, {k: x for k, x in recorded.items() if k != "tokens"})


def compare_layers(folder: Path, name: str) -> Differences:
    """*_blocks: how many layers of a preset stand on one side only."""
    tag, variant = parts_of(name)
    official = golden_pipe(folder, tag).config["selected_attn2_processors"]
    return {
        preset: float(
            len(
                {f"{path}.processor" for path in style_of(folder, tag, variant, SETS[preset]).adapter.sites}
                ^ set(official[f"{variant}/{preset}"])
            )
        )
        for preset in sets_of(folder, tag)
    }


@torch.no_grad()
def compare_subtraction(folder: Path, name: str) -> Differences:
    """*_ddim: features of the image, with the words' subtracted, as tokens; the negative side is not shifted."""
    tag, variant = parts_of(name)
    pipe, style = golden_pipe(folder, tag), style_of(folder, tag, variant)
    t = pipe.tensors(f"{variant}_ddim")
    image, adapter = Image.fromarray(t["image_uint8"].numpy()), style.adapter
    assert pipe.image is not None
    read = adapter.features([image])
    outputs = {"pixel_values": pipe.image.pixels([image])}
    if variant == "global":
        outputs["clip_image_embeds"] = read
    for run in runs_of(t):
        content = run.partition("/content_")[2]
        less = read if content == "none" else read - float(content) * t["content_text_embed"]
        outputs[f"{run}/image_tokens"] = adapter.tokens(less)
        outputs[f"{run}/uncond_image_tokens"] = adapter.tokens(adapter.nothing(read))
    recorded = {k: x for k, x in t.items() if k.endswith("image_tokens") or k in outputs}
    return compare(outputs, recorded)


def runs_of(t: Mapping[str, Tensor]) -> list[str]:
    return sorted({name.split("/latents")[0] for name in t if "/latents/" in name})


def compare_trajectories(folder: Path, name: str) -> Differences:
    """*_ddim: the official generate() with presets and subtracted words."""
    tag, variant = parts_of(name)
    pipe, style, outputs = golden_pipe(folder, tag), style_of(folder, tag, variant), {}
    t = pipe.tensors(f"{variant}_ddim")
    image, strength = Image.fromarray(t["image_uint8"].numpy()), pipe.config["ddim"]["adapter_scale"]
    for run in runs_of(t):
        preset, _, content = run.partition("/content_")
        words = {} if content == "none" else {"content": t["content_text_embed"], "content_scale": float(content)}
        control = style.control(image, preset=SETS[preset], strength=strength, **words)
        outputs |= {f"{run}/latents/step_{i + 1}": x for i, x in enumerate(pipe.ddim(t, control))}
    return compare(outputs, {k: x for k, x in t.items() if "/latents/" in k})


# ComfyUI's weight types


class Tokens(nn.Module):
    """A projector that is given tokens."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


class Comfy:
    """The fixture of one attention layer, which stands at any place of a network of n of them."""

    def __init__(self, folder: Path, name: str):
        self.tensors, self.facts = (
            load_file(folder / f"{name}.safetensors"),
            json.loads((folder / f"{name}.json").read_text()),
        )
        self.weight, self.heads = self.facts["base_weight_in_tensors"], self.facts["heads"]
        self.networks = sorted(int(key.removeprefix("layers")) for key in self.facts["index_to_block"])

    def places(self, n: int) -> list[str]:
        return self.facts["index_to_block"][f"layers{n}"]

    def sites(self, n: int) -> list[Site]:
        """In the order of the checkpoint, which is not that of execution: the middle stands last."""
        ordered = sorted(self.places(n), key=lambda path: path.startswith("mid"))
        return [Site(f"{path}.transformer_blocks.0.attn2", "cross", i) for i, path in enumerate(ordered)]

    def adapter(self, n: int) -> IPAdapter:
        t = self.tensors
        tokens, dim = t["cond_tokens"].shape[-2:]
        layers = [Layer(i, site.path, len(t["to_k_ip"]), self.heads) for i, site in enumerate(self.sites(n))]
        config = IPConfig(dim, tokens, dim, form="cross", feature="hidden")
        adapter = IPAdapter(config, layers, projector=Tokens(tokens))
        for pair in adapter.ip_adapter.values():
            pair.to_k_ip.weight.data = t["to_k_ip"]  # type: ignore[union-attr]
            pair.to_v_ip.weight.data = t["to_v_ip"]  # type: ignore[union-attr]
        return adapter.requires_grad_(False)

    def call(self, n: int, place: int, row: int) -> Call:
        path = f"{self.places(n)[place]}.transformer_blocks.0.attn2"
        q, k, v = (split_heads(self.tensors[name][row : row + 1], self.heads) for name in ("q", "text_k", "text_v"))
        return Call(q, k, v, Site(path, "cross", 0), image=slice(0, q.shape[2]), plain=q)

    def branch(self, n: int, place: int, **how) -> Tensor:
        """What the image branch adds at a place, for the unconditional and the conditional row."""
        t = self.tensors
        later = {name: how.pop(name) for name in ("mask", "mask_mode", "scaling") if name in how}
        control = replace(self.adapter(n).reference(t["cond_tokens"], empty=t["uncond_tokens"], **how), **later)
        rows, network = [], SimpleNamespace(sites=self.sites(n))
        for row, side in enumerate((control.negative(), control)):
            run = Run(network, 1, GRID, torch.zeros(1, 0), None, 4)  # type: ignore[arg-type]
            acting, call = side.prepare(run).at(Step(0, 1, 1.0)), self.call(n, place, row)
            out = sdpa(call) if acting is None else acting.around(call, sdpa)
            rows.append(join_heads(out) - t["text_out"][row : row + 1])
        return torch.cat(rows)

    def precise(self, n: int, kind: str) -> tuple[dict[int, float], list[int]]:
        """Of a precise type: the fixture's weights, and the places whose features are pushed away."""
        weights = {11: {3: 0.8, 6: 0.8}, 16: {4: 0.2, 5: 0.8, 9: 0.8}}[n]
        layout = [3] if n == 11 else [4, 5]
        return weights, layout if kind.startswith("style") else [place for place in weights if place not in layout]


GRID = 4, 6  # of the fixture's 24 queries


def compare_text(folder: Path, name: str) -> Differences:
    """comfy_*: the text's attention alone, from which the branch is told apart."""
    comfy = Comfy(folder, name)
    output = torch.cat([join_heads(sdpa(comfy.call(comfy.networks[0], 0, row))) for row in range(2)])
    return {"text_out": difference(output, comfy.tensors["text_out"])}


def compare_weight_types(folder: Path, name: str) -> Differences:
    """comfy_*: the weight of every type at every place, and what the branch adds there."""
    comfy, results = Comfy(folder, name), {}
    numbers: Differences = {}
    for n in comfy.networks:
        numbers[f"layers{n}/places"] = float(modules_of(comfy.sites(n)) != comfy.places(n))
        for kind in (*EASES, *STAGES):
            weights, table = block_weights(kind, comfy.sites(n), comfy.weight).strength, comfy.facts[f"layers{n}"][kind]
            for place, module in enumerate(comfy.places(n)):
                numbers[f"layers{n}/{kind}/weight {place}"] = abs(weights[module] - comfy.weight * table[place])
            for key in (k for k in comfy.tensors if k.startswith(f"layers{n}/{kind}/t")):
                results[key] = comfy.branch(n, int(key.rpartition("/t")[2]), strength=weights)
        for kind in ("style transfer precise", "composition precise"):
            weights, away = comfy.precise(n, kind)
            how = {
                "strength": {comfy.places(n)[place]: weight for place, weight in weights.items()},
                "against": Where(tuple(f"{comfy.places(n)[place]}.*" for place in away)),
            }
            results |= {f"layers{n}/{kind}/t{place}": comfy.branch(n, place, **how) for place in weights}
    for key in (k for k in comfy.tensors if k.startswith("embeds_scaling/")):
        results[key] = comfy.branch(11, 0, strength=comfy.weight, scaling=key.removeprefix("embeds_scaling/"))
    mask = {"mask": comfy.tensors["mask"], "mask_mode": "bilinear"}
    results["masked/linear"] = comfy.branch(11, 0, strength=comfy.weight, **mask)
    outputs = ("layers", "embeds_scaling/", "masked/")
    return numbers | compare(results, {k: x for k, x in comfy.tensors.items() if k.startswith(outputs)})


def compare_choices(folder: Path, name: str) -> Differences:
    """comfy_*: the types that choose blocks by a table."""
    comfy, out = Comfy(folder, name), {}
    for n in comfy.networks:
        for kind, table in comfy.facts["dict_weight_types"][f"layers{n}"].items():
            composition, boost = 0.3, 0.6
            chosen = block_weights(kind, comfy.sites(n), comfy.weight, composition=composition, boost=boost).strength
            words = {"w": comfy.weight, "w_comp": composition, "0.25*w_comp": 0.25 * composition}
            words |= {"w (or style boost)": boost, "w (or composition boost)": boost}
            expected = {int(t): words[x] if isinstance(x, str) else x * comfy.weight for t, x in table.items()}
            if kind == "composition precise":
                expected[6] = boost
            ours = {comfy.places(n).index(module): weight for module, weight in chosen.items()}
            same = ours.keys() == expected.keys()
            out[f"layers{n}/{kind}"] = max(abs(ours[t] - expected[t]) for t in ours) if same else float("inf")
    return out


_CODE, _COMFY = "official code", "ComfyUI_IPAdapter_plus"
_BLOCKS, _DDIM, _TYPES = "*_blocks.safetensors", "*_ddim.safetensors", "comfy_*.safetensors"
CHECKS = (
    Check("tokens", _CODE, TOKENS, _BLOCKS, compare_tokens),
    Check("UNet with every preset at every strength", _CODE, CALL, _BLOCKS, compare_blocks),
    Check("layers of every preset", _CODE, 0, _BLOCKS, compare_layers),
    Check("tokens, with and without words subtracted", _CODE, TOKENS, _DDIM, compare_subtraction),
    Check("4 guided DDIM steps, presets and subtraction", _CODE, TRAJECTORY, _DDIM, compare_trajectories),
    Check("text's attention", _COMFY, 1e-6, _TYPES, compare_text),
    Check("weight types, scalings, a bilinear mask", _COMFY, TOKENS, _TYPES, compare_weight_types),
    Check("weight types that choose blocks", _COMFY, 1e-6, _TYPES, compare_choices),
)
INPUTS = ("*_config", "*_unet", "*_clip_vision", "*_adapter", "*_inputs")
