"""DiT4Edit (arXiv:2411.03286) has no public code: its pieces against tensors of the code that they come from, diffusers
(PixArt, inversion), tomesd (token merging) and prompt-to-prompt (maps). Differences are relative to the largest value.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from condit.backbones.pixart import PixArt, PixArtConfig
from condit.controls.dit4edit import in_window
from condit.controls.edit_maps import (
    blend_mask,
    exchange,
    refinement_index,
    refinement_table,
    replacement_table,
    word_steps,
)
from condit.controls.token_merging import corner_order, match
from condit.diffusion.inversion import ddim_path, dpm_path, invert, walk
from condit.diffusion.vp import Process
from condit.encoders.words import Words
from condit_lab.parity.check import Check, Differences, compare, difference, recorded_features

TOLERANCE = 1e-5  # the fixtures' own


def facts(folder: Path, name: str):
    return json.loads((folder / f"{name}_config.json").read_text())


def read(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


# Inversion


@cache
def pixart_of(folder: Path) -> PixArt:
    fields = facts(folder, "inversion")["model"]
    network = PixArt(PixArtConfig(**{k: v for k, v in fields.items() if k in PixArtConfig.__dataclass_fields__}))
    network.load_state_dict(read(folder, "pixart_weights"), strict=True)
    network.adaln_single.emb.features = recorded_features(folder.parent / "dit")
    return network.requires_grad_(False)


def compare_pixart(folder: Path, name: str) -> Differences:
    """inversion: one prediction, all channels."""
    t = read(folder, name)
    out = pixart_of(folder)(t["x0"], torch.full((len(t["x0"]),), 500), t["caption"], t["caption_mask"])
    return {"forward_t500": difference(out, t["forward_t500"], relative=True)}


def compare_inversion(folder: Path, name: str) -> Differences:
    """inversion: every state up and down, timesteps and levels, by DPM-Solver++ with either end, and by DDIM."""
    t, out = read(folder, name), {}
    for key in sorted(k.removesuffix(".invert") for k in t if k.endswith(".invert")):
        solver, _, steps = key.rpartition(".")
        out |= {f"{key}.{what}": value for what, value in states(folder, t, solver, int(steps)).items()}
    return out


def states(folder: Path, t: dict[str, Tensor], solver: str, steps: int) -> Differences:
    cumprod = Process(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear").alphas_cumprod
    path = ddim_path(cumprod, steps) if solver == "ddim" else dpm_path(cumprod, steps, to_zero=solver == "dpmpp2m")
    key, times, network = f"{solver}.{steps}", [], pixart_of(folder)
    own = path
    if solver != "ddim":
        # The recorded levels: the square root of float32 differs between processors in its last bit, which the first
        # step of an inversion turns into 3e-5.
        path = replace(path, ratios=t[f"{key}.invert_sigmas"].flip(0))

    def predict(x: Tensor, time: float) -> Tensor:
        times.append(time)
        out = network(x, torch.full((len(x),), time), t["caption"], t["caption_mask"])
        return out[:, :4]  # the noise; the others are variance

    up = invert(predict, t["x0"], path, "entered" if solver == "ddim" else "dpmpp2m").flip(0)
    out = {"invert_t": float(times != t[f"{key}.invert_t"].tolist())}
    times.clear()
    down = walk(predict, t[f"{key}.invert"][-1], path)
    out["sample_t"] = float(times != t[f"{key}.sample_t"].tolist())
    for what, ours in (("invert", up), ("sample", down)):
        pairs = zip(ours, t[f"{key}.{what}"], strict=True)
        out |= {f"{what} {i}": difference(x, expected, relative=True) for i, (x, expected) in enumerate(pairs)}
    if solver != "ddim":
        begins = torch.stack([own.ratio(i) for i in range(steps, -1, -1)])
        ends = torch.stack([own.ratio(i, ending=True) for i in range(steps + 1)])
        out["invert_sigmas"] = difference(begins, t[f"{key}.invert_sigmas"], relative=True)
        out["sample_sigmas"] = difference(ends, t[f"{key}.sample_sigmas"], relative=True)
    return out


# Token merging


def compare_merging(folder: Path, name: str) -> Differences:
    """token_merge: tokens merged and put back."""
    t, outputs = read(folder, name), {}
    for i, case in enumerate(facts(folder, name)):
        metric, value = t[f"{i}.metric"], t[f"{i}.value"]
        order = corner_order((case["height"], case["width"]), (case["stride_y"], case["stride_x"]))
        pairs = match(metric, order, case["ratio"])
        outputs[f"{i}.merged_metric"] = pairs.merge(metric)
        outputs[f"{i}.merged_value"] = pairs.merge(value)
        outputs[f"{i}.unmerged_value"] = pairs.unmerge(outputs[f"{i}.merged_value"])
    return compare(outputs, {k: x for k, x in t.items() if "merged_" in k}, relative=True)


# Prompt-to-prompt


class Toy:
    """The pairs of prompts of the fixture, as its toy tokenizer cuts them: begin, pieces of some letters, end."""

    def __init__(self, folder: Path, name: str):
        self.facts, self.tensors = facts(folder, name), read(folder, name)

    def words(self, prompt: str, ids: list[int]) -> Words:
        words, tokens, at = tuple(prompt.split(" ")), [], 1
        for word in words:
            pieces = -(-len(word) // self.facts["piece_chars"])
            tokens.append(tuple(range(at, at + pieces)))
            at += pieces
        assert at + 1 == len(ids)
        return Words(prompt, words, tuple(tokens), tuple(ids), self.facts["max_len"])

    def pair(self, kind: str, number: int) -> tuple[Words, Words]:
        row = self.facts[kind][number]
        return self.words(row["source"], row["source_ids"]), self.words(row["target"], row["target_ids"])


def compare_tables(folder: Path, name: str) -> Differences:
    """p2p: which token of the target reads which of the source, of every pair."""
    toy, tables = Toy(folder, name), {}
    for i in range(len(toy.facts["replace"])):
        tables[f"replace.{i}.mapper"] = replacement_table(*toy.pair("replace", i))[None]
    for i in range(len(toy.facts["refine"])):
        source, target = toy.pair("refine", i)
        index, weight = refinement_index(source.ids, target.ids, target.length)
        tables |= {f"refine.{i}.mapper": index[None], f"refine.{i}.alphas": weight[None]}
    recorded = {k: x for k, x in toy.tensors.items() if k.endswith((".mapper", ".alphas"))}
    return compare(tables, recorded, relative=True)


def compare_maps(folder: Path, name: str) -> Differences:
    """p2p: the maps of the first pair in every step, exchanged as by replacement and by refinement."""
    toy, maps = Toy(folder, name), {}
    steps, t = toy.facts["num_steps"], toy.tensors
    for kind in ("replace", "refine"):
        source, target = toy.pair(kind, 0)
        if kind == "refine":
            table, weight = refinement_table(source, target)
        else:
            table, weight = replacement_table(source, target), torch.ones(target.length)
        gates = word_steps(steps, 0.5, {}, target.length)
        maps[f"{kind}.alpha_time"] = gates.reshape(t[f"{kind}.alpha_time"].shape)
        old, new = t[f"{kind}.cross_in"].unflatten(0, (2, 1, -1))  # prompts, images, heads
        own, other = t[f"{kind}.self_in"].unflatten(0, (2, 1, -1))
        for step in range(steps):
            exchanged = exchange(old, new, table[None], weight[None], gates[step])
            kept = own if in_window(step, steps, (0.0, 0.4)) else other
            maps[f"{kind}.cross_out.{step}"] = torch.cat([old, exchanged]).flatten(0, 1)
            maps[f"{kind}.self_out.{step}"] = torch.cat([own, kept]).flatten(0, 1)
    recorded = {k: x for k, x in t.items() if "_out." in k or k.endswith(".alpha_time")}
    return compare(maps, recorded, relative=True)


def compare_words(folder: Path, name: str) -> Differences:
    """p2p: maps of a word made stronger, and the local blend with the words that it is of."""
    toy = Toy(folder, name)
    t, (source, target) = toy.tensors, toy.pair("replace", 0)
    factors = torch.ones(target.length)
    factors[list(target.places(target.words[-1]))] = 2.5
    select = torch.zeros_like(t["blend.word_select"])
    for row, words, word in zip(select, (source, target), toy.facts["blend_words"], strict=True):
        row[list(words.places(word))] = 1
    x, side = t["blend.x"], round(t["blend.word_maps"].shape[-1] ** 0.5)
    size = x.shape[-2], x.shape[-1]
    mask = blend_mask(t["blend.word_maps"][None], (side, side), threshold=toy.facts["blend_threshold"], size=size)
    outputs = {
        "equalizer": factors.reshape(t["equalizer"].shape),
        "reweight.out": (t["reweight.in"][None] * factors).reshape(t["reweight.out"].shape),
        "blend.word_select": select,
        "blend.out": torch.cat([x[:1], x[:1] + mask[:, None] * (x[1:] - x[:1])]),
    }
    return compare(outputs, {k: x for k, x in t.items() if k in outputs}, relative=True)


_DIFFUSERS, _P2P = "diffusers 0.42.1", "prompt-to-prompt"
_INVERSION, _MAPS = "inversion*.safetensors", "p2p*.safetensors"
CHECKS = (
    Check("PixArt's prediction", _DIFFUSERS, TOLERANCE, _INVERSION, compare_pixart),
    Check("inversion and sampling, every state", _DIFFUSERS, TOLERANCE, _INVERSION, compare_inversion),
    Check("merged and unmerged tokens", "tomesd", TOLERANCE, "token_merge*.safetensors", compare_merging),
    Check("alignments of prompts", _P2P, TOLERANCE, _MAPS, compare_tables),
    Check("exchanged maps in every step", _P2P, TOLERANCE, _MAPS, compare_maps),
    Check("reweighted maps, local blend", _P2P, TOLERANCE, _MAPS, compare_words),
)
INPUTS = ("*_config", "pixart_weights")
