"""DiffiT's latent model (arXiv:2312.02139) against fixtures: tensors written by the official release (NVlabs/DiffiT,
March 2026; its licence is non-commercial, so they serve verification only). The paper's U-shape has no official code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from condit.backbones.diffit import PRESETS, DiffiT, DiffiTBlock, DiffiTContext
from condit.diffusion.gaussian import Variance, gaussian, training_loss
from condit.diffusion.gaussian_samplers import ancestral
from condit.diffusion.guidance import class_guidance, power_cosine_scale
from condit.diffusion.steps import by_timestep
from condit.weights.diffit import INDEX, diffit_of, relative_position_index
from condit_lab.parity.check import Check, Differences, difference, layout_differences, part, recorded_features

TOLERANCE = 1e-5  # the fused kernel sums in another order: 1e-6 measured on outputs up to 2


def facts_of(golden: Path, name: str) -> dict:
    return json.loads((golden / f"{name}.json").read_text())


def load(golden: Path, name: str) -> tuple[DiffiT, dict[str, Tensor]]:
    """The fixture's network through the reader of release files, and the fixture's tensors."""
    tensors, config = load_file(golden / f"{name}.safetensors"), facts_of(golden, name)["config"]
    model = diffit_of(part(tensors, "state."), source=golden / f"{name}.safetensors", config=config)
    model.t_embedder.features = recorded_features(golden.parent / "dit")
    return model, tensors


def variance_of(model: DiffiT) -> Variance:
    return "learned" if model.config.learn_sigma else "large"


def scale_of(golden: Path, name: str, scale: float, power: float) -> float | Callable[[Tensor], Tensor]:
    """The released rule: a power cosine for small latents, a constant for large ones."""
    constant = facts_of(golden, name)["guidance"] == "constant"
    return scale if constant else partial(power_cosine_scale, scale=scale, power=power)


@torch.no_grad()
def compare_activations(golden: Path, name: str) -> Differences:
    """Patches, condition token, the attention of block 0, every block, final layer, output."""
    model, t = load(golden, name)
    x, grid = t["input.x"], model.config.grid
    context = DiffiTContext(model.embed(t["input.t"], t["input.y"]), grid)
    activations = {"patch_tokens": model.x_embedder(x), "cond": context.time}
    tokens = (activations["patch_tokens"] + model.positions(grid))[:, None]
    first = model.blocks[0]
    assert isinstance(first, DiffiTBlock)
    activations["block.0.attn"] = first.attn(first.norm1(tokens), context)[0][:, 0]
    for i, block in enumerate(model.blocks):
        tokens = block(tokens, context)
        activations[f"block.{i}"] = tokens[:, 0]
    activations["final_tokens"] = model.final_layer(tokens[:, 0])
    left = {what for what in t if what.startswith("act.")} - {f"act.{what}" for what in activations}
    return {
        **{what: difference(y, t[f"act.{what}"]) for what, y in activations.items()},
        "output": difference(model(x, t["input.t"], t["input.y"]), t["output.eps_sigma"]),
        **dict.fromkeys(left, math.inf),  # recorded, but not compared
    }


@torch.no_grad()
def compare_guidance(golden: Path, name: str) -> Differences:
    """Three guided channels of noise; the rest of each half is its own."""
    model, t = load(golden, name)
    x, time, y = t["input.x"], t["input.t"], t["input.y"]
    cases = facts_of(golden, name).get("guidance_cases", [])
    if not model.config.class_dropout_prob:
        return {"nothing to guide without a null class": float(len(cases))}
    unconditional = model(x, time)
    out = {}
    for case in cases:
        scale = scale_of(golden, name, case["scale"], case["power"])
        guided = class_guidance(model, y, model.null_label, scale)(x, time)
        both = torch.cat([guided, torch.cat([guided[:, :3], unconditional[:, 3:]], 1)])
        key = f"cfg_{case['scale']}_pow_{case['power']}"
        out[key] = difference(both, t[f"output.{key}"])
    return out


def compare_loss(golden: Path, name: str) -> Differences:
    """The loss per image and its parts, and gradients of the mean."""
    model, t = load(golden, name)
    denoise = partial(model, y=t["input.y"])
    process = gaussian(variance=variance_of(model))
    loss = training_loss(denoise, process, t["input.x"], t["input.t"], t["input.noise"])
    loss.loss.mean().backward()
    parts = {"loss": loss.loss, "mse": loss.mse, "vb": loss.vb}
    out = {what: difference(x, t[f"loss.{what}"], relative=True) for what, x in parts.items() if x is not None}
    out |= dict.fromkeys({f"loss.{what}" for what in part(t, "loss.")} - {f"loss.{what}" for what in out}, math.inf)
    for key, expected in part(t, "grad.").items():
        gradient = model.get_parameter(key).grad
        out[f"gradient of {key}"] = math.inf if gradient is None else difference(gradient, expected, relative=True)
    return out


@torch.no_grad()
def compare_trajectory(golden: Path, name: str) -> Differences:
    """Guided ancestral sampling, x after each of 5 steps. The official sampler carries a second half along, which it
    neither shows to the network nor keeps."""
    model, t = load(golden, name)
    if "sample.ddpm.x" not in t:  # without a null class nothing is guided
        return {"no trajectory recorded": float(bool(model.config.class_dropout_prob))}
    settings = facts_of(golden, name)["sampling"]
    process = gaussian(steps=settings["diffusion_steps"], respacing=settings["respacing"], variance=variance_of(model))
    scale = scale_of(golden, name, settings["cfg_scale"], settings["scale_pow"])
    denoise = class_guidance(model, t["input.y"][:2], model.null_label, scale)
    draws, seen = iter(t["sample.step_noise"][:, :2]), []
    x = t["input.x"][:2]
    ancestral(by_timestep(denoise), x, process, noise=lambda _: next(draws), on_step=lambda i, x, x0: seen.append(x))
    steps = enumerate(zip(seen, t["sample.ddpm.x"][:, :2], strict=True))
    return {
        "timesteps": difference(process.timesteps.flip(0), t["sample.timesteps"]),
        **{f"step {i}": difference(x, expected, relative=True) for i, (x, expected) in steps},
    }


_RELEASED = {"layout_diffit_256": "DiffiT-XL/2", "layout_diffit_512": "DiffiT-XL/2-512"}


def compare_layout(golden: Path, name: str) -> Differences:
    """layout_*: names, shapes and the count of parameters are those of the released class, with its index buffers."""
    facts, config = facts_of(golden, name), PRESETS[_RELEASED[name]]
    with torch.device("meta"):
        state = DiffiT(config).state_dict()
    count = sum(x.numel() for x in state.values())
    index = relative_position_index(config.grid)
    written = state | {f"blocks.{i}{INDEX}": index for i in range(config.depth)}
    return layout_differences(written, facts["keys"]) | {
        "number of parameters": abs(float(count - facts["num_parameters"]))
    }


_RELEASE, _LATENT = "official release", "latent_*.safetensors"
CHECKS = (
    Check("every activation and the output", _RELEASE, TOLERANCE, _LATENT, compare_activations),
    Check("guided outputs, both schedules", _RELEASE, TOLERANCE, _LATENT, compare_guidance),
    Check("loss and gradients (relative)", _RELEASE, TOLERANCE, _LATENT, compare_loss),
    Check("5 steps of guided DDPM (relative)", _RELEASE, TOLERANCE, _LATENT, compare_trajectory),
    Check("names and shapes of DiffiT-XL/2, 256 and 512 px", _RELEASE, 0, "layout_*.json", compare_layout),
)
INPUTS: tuple[str, ...] = ()
