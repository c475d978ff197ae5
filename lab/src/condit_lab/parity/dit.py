"""DiT (arXiv:2212.09748) against fixtures: tensors written by the official code on tiny random networks.

Differences are relative to the largest value where untrained networks let values grow (losses, gradients, samples).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from condit.backbones.dit import PRESETS, DiT, DiTBlock, DiTConfig, DiTContext
from condit.backbones.latent_transformer import sincos_positions, unpatchify
from condit.diffusion import gaussian as g
from condit.diffusion import gaussian_samplers as samplers
from condit.diffusion.guidance import class_guidance, guide_channels
from condit.diffusion.steps import by_timestep
from condit.nn.layers import modulated_norm
from condit_lab.parity.check import Check, Differences, difference, layout_differences, part, recorded_features

TOLERANCE = 1e-5  # the official explicit and fused attention differ by 1.5e-6 themselves
TABLE_TOLERANCE = 1e-12  # float64


def read(golden: Path, name: str) -> tuple[dict, dict[str, Tensor]]:
    return json.loads((golden / f"{name}.json").read_text()), load_file(golden / f"{name}.safetensors")


def read_model(golden: Path, name: str) -> DiT:
    facts, tensors = read(golden, name)
    model = DiT(DiTConfig(**facts["config"]))
    model.load_state_dict(part(tensors, "state."), strict=True)
    model.t_embedder.features = recorded_features(golden)
    return model.eval()


def read_diffusion(golden: Path, name: str) -> tuple[DiT, dict, dict[str, Tensor]]:
    facts, tensors = read(golden, name)
    return read_model(golden, facts["model_fixture"]), facts, tensors


@torch.no_grad()
def compare_model(golden: Path, name: str) -> Differences:
    """model_*: counts, every activation, the output, guidance, label dropout."""
    facts, tensors = read(golden, name)
    model, x, t, y = read_model(golden, name), *(tensors[f"input.{k}"] for k in "xty")
    counts = [(v.numel(), v.requires_grad) for v in model.parameters()]
    outputs = {
        "output.eps_sigma": model(x, t, y),
        "output.t_embed_fractional": model.t_embedder(tensors["input.t_fractional"]),
        **activations(model, x, t, y),
    }
    if model.config.class_dropout_prob:
        dropped = torch.where(tensors["input.force_drop_ids"] == 1, model.null_label, y)
        outputs["output.y_embed_forced_drop"] = model.y_embedder(dropped)
        outputs |= guided(model, x, t, y, [k for k in tensors if k.startswith("output.cfg_")])
    left = {k for k in tensors if k.startswith(("act.", "output."))} - outputs.keys()
    return {
        "num_parameters": abs(float(sum(n for n, _ in counts) - facts["num_parameters"])),
        "num_trainable": abs(float(sum(n for n, trained in counts if trained) - facts["num_trainable"])),
        **{key: difference(value, tensors[key]) for key, value in outputs.items()},
        **dict.fromkeys(left, math.inf),  # recorded, but not compared
    }


def activations(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> dict[str, Tensor]:
    context = DiTContext(model.embed(t, y))
    outputs = {
        "act.patch_tokens": model.x_embedder(x),
        "act.t_sinusoid": model.t_embedder.features(t, 256),
        "act.t_embed": model.t_embedder(t),
        "act.y_embed": model.y_embedder(y),
    }
    tokens = outputs["act.patch_tokens"] + model.positions(model.config.grid)
    first = model.blocks[0]
    assert isinstance(first, DiTBlock)
    shift, scale, gate, shift_mlp, scale_mlp, _ = first.adaLN_modulation(context)
    attended = first.attn(modulated_norm(tokens, shift, scale), context)[0]
    between = tokens + gate * attended
    outputs["act.block.0.attn"] = attended
    outputs["act.block.0.mlp"] = first.mlp(modulated_norm(between, shift_mlp, scale_mlp))
    for i, block in enumerate(model.blocks):
        tokens = outputs[f"act.block.{i}"] = block(tokens, context)
    outputs["act.final_tokens"] = model.final_layer(tokens, context)
    # The blocks walked here are the forward's.
    assert torch.equal(
        unpatchify(outputs["act.final_tokens"], model.config.grid, model.config.patch_size), model(x, t, y)
    )
    return outputs


def guided(model: DiT, x: Tensor, t: Tensor, y: Tensor, names: list[str]) -> dict[str, Tensor]:
    """The official output holds both halves; ours is the first. The second has the unconditional variance."""
    unconditional = model(x, t)
    outputs = {}
    for name in names:
        ours = class_guidance(model, y, model.null_label, float(name.removeprefix("output.cfg_")))(x, t)
        outputs[name] = torch.cat([ours, torch.cat([ours[:, :3], unconditional[:, 3:]], 1)])
    return outputs


def process_of(options: dict, respacing: str | None = None) -> g.Gaussian:
    fixed = "small" if options.get("sigma_small") else "large"
    return g.gaussian(
        options.get("noise_schedule", "linear"),
        respacing=respacing,
        predicts="x0" if options.get("predict_xstart") else "noise",
        variance="learned" if options["learn_sigma"] else fixed,
    )


def kind_of(options: dict) -> g.LossKind:
    """The official order: the bound alone goes before the weighted bound."""
    if options.get("use_kl"):
        return "rescaled_kl"
    return "rescaled_mse" if options.get("rescale_learned_sigmas") else "mse"


def compare_losses(golden: Path, name: str) -> Differences:
    """diffusion_*: losses of every variant; of the default one gradients, and their norms of every weight."""
    model, facts, tensors = read_diffusion(golden, name)
    x0, noise, i, y = (tensors[f"input.{k}"] for k in ("x_start", "noise", "t", "y"))
    differences = {}
    for variant, options in facts["variants"].items():
        loss = g.training_loss(lambda x, t: model(x, t, y), process_of(options), x0, i, noise, kind=kind_of(options))
        for term in ("loss", "mse", "vb"):
            value, key = getattr(loss, term), f"loss.{variant}.{term}"
            if (value is None) != (key not in tensors):
                differences[key] = math.inf
            elif value is not None:
                differences[key] = difference(value, tensors[key], relative=True)
        if variant == "default":
            model.zero_grad()
            loss.loss.mean().backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    for key in (k for k in tensors if k.startswith("grad.")):
        gradient = gradients[key.removeprefix("grad.")]
        differences[key] = math.inf if gradient is None else difference(gradient, tensors[key], relative=True)
    norms = [-1.0 if gradients[k] is None else gradients[k].norm().item() for k in facts["grad_norm_order"]]  # type: ignore[union-attr]
    return differences | {"grad_norms": difference(torch.tensor(norms), tensors["grad_norms"], relative=True)}


@torch.no_grad()
def compare_statistics(golden: Path, name: str) -> Differences:
    """diffusion_*: noising, posterior, the reverse step without clipping, the prior's bits, one inversion."""
    model, facts, tensors = read_diffusion(golden, name)
    x0, noise, i, y = (tensors[f"input.{k}"] for k in ("x_start", "noise", "t", "y"))
    process = process_of(facts["variants"]["default"])
    x = g.add_noise(process, x0, i, noise)
    out = {
        "q_sample": difference(x, tensors["q_sample"]),
        "prior_bpd": difference(g.prior_bits(process, x0), tensors["prior_bpd"]),
    }
    out |= normals("q_posterior", g.posterior(process, x0, x, i), tensors)
    out |= normals("p_mean_variance.clip_0", g.reverse(process, model(x, i, y), x, i), tensors)
    z, i, y = tensors["sample.z"], tensors["ddim_reverse.t_index"], tensors["sample.y"]
    process = process_of(facts["variants"]["default"], facts["sampling"]["respacing"])
    inverted = samplers.ddim_reverse_step(process, model(z, process.timesteps[i], y), z, i).x
    return out | {"ddim_reverse.x": difference(inverted, tensors["ddim_reverse.x"], relative=True)}


def normals(prefix: str, distribution: g.Normal, tensors: dict[str, Tensor]) -> Differences:
    """Every recorded field of a distribution."""
    names = {"log_variance_clipped": "log_variance", "pred_xstart": "x0"}
    out = {}
    for key in (k for k in tensors if k.startswith(f"{prefix}.")):
        field = key.rpartition(".")[2]
        value = getattr(distribution, names.get(field, field)).expand_as(tensors[key])
        out[key] = difference(value, tensors[key], relative=True)
    return out


@torch.no_grad()
def compare_samples(golden: Path, name: str) -> Differences:
    """diffusion_*: x and x0 after each of five steps by every sampler that does not clip, guided and unguided."""
    model, facts, tensors = read_diffusion(golden, name)
    z, y, noises = (tensors[f"sample.{k}"] for k in ("z", "y", "step_noise"))
    process = process_of(facts["variants"]["default"], facts["sampling"]["respacing"])
    x, _ = trajectory(samplers.ancestral, lambda x, t: model(x, t, y), z, process, noises[:, : len(z)])
    return {
        "sample.timesteps": difference(process.timesteps.flip(0), tensors["sample.timesteps"]),
        "sample.ddpm_nocfg.x": stepwise(x, tensors["sample.ddpm_nocfg.x"]),
        **compare_guided(golden, name, "ddpm", samplers.ancestral),
        **compare_guided(golden, name, "ddim_eta0", samplers.ddim),
        **compare_guided(golden, name, "ddim_eta1", partial(samplers.ddim, eta=1.0)),
    }


@torch.no_grad()
def compare_clipped_samples(golden: Path, name: str) -> Differences:
    """diffusion_*: the reverse step, and the sampler, that clip x0.

    At t = 999, x0 is a difference of numbers 157 times as large as what clipping leaves, and so is its rounding.
    Clipping enlarges no difference, so the fixtures' tolerance, a part of the step's largest value, applies to x0
    before it.
    Every step begins at the recorded x: a trajectory would add up the rounding of x0 at t = 999.
    """
    model, facts, tensors = read_diffusion(golden, name)
    i, y, x = tensors["input.t"], tensors["input.y"], tensors["q_sample"]
    process, output, key = process_of(facts["variants"]["default"]), model(x, i, y), "p_mean_variance.clip_1"
    step, whole = g.reverse(process, output, x, i, clip=True), g.reverse(process, output, x, i).x0
    return {
        **normals(key, step, tensors),
        f"{key}.pred_xstart": difference(step.x0, tensors[f"{key}.pred_xstart"], relative=True, whole=whole),
        **compare_guided(golden, name, "ddpm_clip", partial(samplers.ancestral, clip=True), clip=True),
    }


def compare_guided(golden: Path, name: str, key: str, sampler: Callable, *, clip: bool = False) -> Differences:
    """One guided sampler: with the official doubled batch, and its first half alone as we sample."""
    model, facts, tensors = read_diffusion(golden, name)
    z, y, noises = (tensors[f"sample.{k}"] for k in ("z", "y", "step_noise"))
    scale, n = facts["sampling"]["cfg_scale"], len(z)
    process = process_of(facts["variants"]["default"], facts["sampling"]["respacing"])

    def both_halves(x: Tensor, t: Tensor) -> Tensor:
        """The second half has noise and variances of its own."""
        half, null = x[:n], torch.full_like(y, model.null_label)
        conditional, unconditional = model(torch.cat([half, half]), t, torch.cat([y, null])).chunk(2)
        kept = guide_channels(conditional, unconditional, scale, 3)
        return torch.cat([kept, torch.cat([kept[:, :3], unconditional[:, 3:]], 1)])

    whole: list[g.Normal] = []  # the steps as they are without clipping

    def watched(x: Tensor, t: Tensor) -> Tensor:
        output = both_halves(x, t)
        place = torch.isin(process.timesteps, t).nonzero()[:, 0].expand(len(x))
        whole.append(g.reverse(process, output, x, place))
        return output

    expected = tensors[f"sample.{key}.x"]
    given = expected if clip else None
    x, x0 = trajectory(sampler, watched if clip else both_halves, torch.cat([z, z]), process, noises, given)
    alone = class_guidance(model, y, model.null_label, scale)
    half, _ = trajectory(sampler, alone, z, process, noises[:, :n], None if given is None else given[:, :n])
    return {
        f"sample.{key}.x": stepwise(x, expected, [step.mean for step in whole]),
        f"sample.{key}.pred_xstart": stepwise(x0, tensors[f"sample.{key}.pred_xstart"], [step.x0 for step in whole]),
        f"sample.{key}.x, first half alone": stepwise(half, expected[:, :n], [step.mean for step in whole]),
    }


def trajectory(
    sampler: Callable, denoise: g.Denoise, x: Tensor, process: g.Gaussian, noises: Tensor, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x and x0 after every step, (steps, B, C, H, W). given: what each step is followed by, instead of its own x."""
    numbers, seen = iter(noises), []

    def on_step(i: int, x: Tensor, x0: Tensor) -> Tensor | None:
        seen.append((x, x0))
        return None if given is None else given[i]

    sampler(by_timestep(denoise), x, process, noise=lambda _: next(numbers), on_step=on_step)
    return torch.stack([x for x, _ in seen]), torch.stack([x0 for _, x0 in seen])


def stepwise(ours: Tensor, expected: Tensor, whole: Sequence[Tensor] = ()) -> float:
    """The largest of the steps' differences, each as a part of its step's largest value."""
    return max(
        difference(f, e, relative=True, whole=w)
        for f, e, w in zip(ours, expected, whole or [None] * len(ours), strict=True)
    )


def compare_schedules(golden: Path, name: str) -> Differences:
    """schedules: every table."""
    facts, tensors = read(golden, name)
    respacings = {key.replace(",", "_"): key for key in facts["respaced_timesteps"]}
    tables = {}
    for key, expected in tensors.items():
        schedule, steps, table = (key.split(".") + [""])[:3]
        if steps.startswith("respaced_"):
            process = g.gaussian(schedule, respacing=respacings[steps.removeprefix("respaced_")])  # type: ignore[arg-type]
            table = table.replace("timestep_map", "timesteps")
        else:
            process = g.gaussian(schedule, steps=int(steps))  # type: ignore[arg-type]
        tables[key] = difference(getattr(process, table), expected)
    return tables


def compare_positions(golden: Path, name: str) -> Differences:
    """pos_embed: the position tables in float64."""
    facts, tensors = read(golden, name)
    return {
        key: difference(sincos_positions((case["grid"], case["grid"]), case["dim"]), tensors[key])
        for case in facts["cases"]
        for key in [f"grid{case['grid']}_dim{case['dim']}"]
    }


_RELEASED = {"layout_dit_xl_2_256": "DiT-XL/2", "layout_dit_xl_2_512": "DiT-XL/2-512"}


def compare_layout(golden: Path, name: str) -> Differences:
    """layout_*: names, their order, shapes and the count of parameters are those of the released network."""
    facts = json.loads((golden / f"{name}.json").read_text())
    with torch.device("meta"):
        state = DiT(PRESETS[_RELEASED[name]]).state_dict()
    return layout_differences(state, facts["keys"]) | {
        "order of names": float(list(facts["keys"]) != list(state)),
        "number of parameters": abs(float(sum(x.numel() for x in state.values()) - facts["num_parameters"])),
    }


_OFFICIAL, _MODELS, _DIFFUSIONS = "official code", "model_*.safetensors", "diffusion_*.safetensors"
CHECKS = (
    Check("every activation, output, guided output", _OFFICIAL, TOLERANCE, _MODELS, compare_model),
    Check("losses and gradients (relative)", _OFFICIAL, TOLERANCE, _DIFFUSIONS, compare_losses),
    Check("terms of one step, one inversion step", _OFFICIAL, TOLERANCE, _DIFFUSIONS, compare_statistics),
    Check("5 steps of DDPM and DDIM (relative)", _OFFICIAL, TOLERANCE, _DIFFUSIONS, compare_samples),
    Check("each of 5 steps of DDPM, x0 clipped (relative)", _OFFICIAL, TOLERANCE, _DIFFUSIONS, compare_clipped_samples),
    Check(
        "noise schedules, respacings (float64)", _OFFICIAL, TABLE_TOLERANCE, "schedules*.safetensors", compare_schedules
    ),
    Check("position tables (float64)", _OFFICIAL, TABLE_TOLERANCE, "pos_embed*.safetensors", compare_positions),
    Check("names and shapes of DiT-XL/2, 256 and 512 px", _OFFICIAL, 0, "layout_*.json", compare_layout),
)
INPUTS: tuple[str, ...] = ()
