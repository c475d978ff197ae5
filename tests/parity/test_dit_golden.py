"""DiT (arXiv:2212.09748) against golden/dit, tensors written by the official code on tiny random networks.

One function per kind of fixture reads it from a folder and returns (name, largest difference) of everything recorded in
it. Differences are relative to the largest value where untrained networks let values grow (losses, gradients, samples).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from condit.backbones.dit import PRESETS, DiT, DiTConfig, Frame, sincos_positions, unpatchify
from condit.diffusion import gaussian as g
from condit.diffusion.guidance import class_guidance, guide_channels
from condit.nn.layers import modulated_norm, timestep_features

GOLDEN = Path(__file__).parent / "golden" / "dit"
TOLERANCE = 1e-5  # the official explicit and fused attention differ by 1.5e-6 themselves
# Where samples are clipped, the first x0 is a difference of numbers 157 times as large as what is left of it.
CLIPPED_TOLERANCE = 5e-4
TABLE_TOLERANCE = 1e-12  # float64
Differences = list[tuple[str, float]]


def difference(found: Tensor, expected: Tensor, *, relative: bool = False) -> float:
    """The largest one; inf for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    largest = expected.double().abs().max().item() if relative else 1.0
    return (found.detach().double() - expected.double()).abs().max().item() / (largest or 1.0)


def read(folder: Path, name: str) -> tuple[dict, dict[str, Tensor]]:
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def read_model(folder: Path, name: str) -> DiT:
    facts, tensors = read(folder, name)
    model = DiT(DiTConfig(**facts["config"]))
    model.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    return model.eval()


@torch.no_grad()
def compare_model(folder: Path, name: str) -> Differences:
    """A model_* fixture: counts, every activation, the output, guidance, label dropout."""
    facts, tensors = read(folder, name)
    model, x, t, y = read_model(folder, name), *(tensors[f"input.{part}"] for part in "xty")
    counts = [(v.numel(), v.requires_grad) for v in model.parameters()]
    found = {
        "output.eps_sigma": model(x, t, y),
        "output.t_embed_fractional": model.t_embedder(tensors["input.t_fractional"]),
        **activations(model, x, t, y),
    }
    if model.config.class_dropout_prob:
        dropped = torch.where(tensors["input.force_drop_ids"] == 1, model.null_label, y)
        found["output.y_embed_forced_drop"] = model.y_embedder(dropped)
        found |= guided(model, x, t, y, [k for k in tensors if k.startswith("output.cfg_")])
    left = {k for k in tensors if k.startswith(("act.", "output."))} - found.keys()
    return [
        ("num_parameters", float(sum(n for n, _ in counts) - facts["num_parameters"])),
        ("num_trainable", float(sum(n for n, trained in counts if trained) - facts["num_trainable"])),
        *((key, difference(value, tensors[key])) for key, value in found.items()),
        *((key, float("inf")) for key in left),  # recorded, but not compared
    ]


def activations(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> dict[str, Tensor]:
    frame = Frame(model.embed(t, y))
    found = {
        "act.patch_tokens": model.x_embedder(x),
        "act.t_sinusoid": timestep_features(t),
        "act.t_embed": model.t_embedder(t),
        "act.y_embed": model.y_embedder(y),
    }
    tokens = found["act.patch_tokens"] + model.positions(model.config.grid)
    first = model.blocks[0]
    shift, scale, gate, shift_mlp, scale_mlp, _ = first.adaLN_modulation(frame)  # type: ignore[operator]
    attended = first.attn(modulated_norm(tokens, shift, scale), frame)[0]  # type: ignore[operator]
    between = tokens + gate * attended
    found["act.block.0.attn"] = attended
    found["act.block.0.mlp"] = first.mlp(modulated_norm(between, shift_mlp, scale_mlp))  # type: ignore[operator]
    for i, block in enumerate(model.blocks):
        tokens = found[f"act.block.{i}"] = block(tokens, frame)
    found["act.final_tokens"] = model.final_layer(tokens, frame)
    assert torch.equal(
        unpatchify(found["act.final_tokens"], model.config.grid, model.config.patch_size), model(x, t, y)
    )
    return found


def guided(model: DiT, x: Tensor, t: Tensor, y: Tensor, names: list[str]) -> dict[str, Tensor]:
    """The official output holds both halves; ours is the first. The second has the unconditional variance."""
    unconditional = model(x, t)
    found = {}
    for name in names:
        ours = class_guidance(model, y, model.null_label, float(name.removeprefix("output.cfg_")))(x, t)
        found[name] = torch.cat([ours, torch.cat([ours[:, :3], unconditional[:, 3:]], 1)])
    return found


def process_of(options: dict, respacing: str | None = None) -> g.Gaussian:
    fixed = "small" if options.get("sigma_small") else "large"
    return g.gaussian(
        options.get("noise_schedule", "linear"),
        respacing=respacing,
        predicts="x0" if options.get("predict_xstart") else "noise",
        variance="learned" if options["learn_sigma"] else fixed,
    )


def compare_diffusion(folder: Path, name: str) -> Differences:
    """A diffusion_* fixture: losses, gradients, one step's statistics, five-step samples, an inversion step."""
    facts, tensors = read(folder, name)
    model = read_model(folder, facts["model_fixture"])
    return [
        *compare_losses(model, facts, tensors),
        *compare_statistics(model, facts, tensors),
        *compare_samples(model, facts, tensors),
        *compare_inversion(model, facts, tensors),
    ]


def compare_losses(model: DiT, facts: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    x0, noise, i, y = (tensors[f"input.{part}"] for part in ("x_start", "noise", "t", "y"))
    for variant, options in facts["variants"].items():
        kind = "rescaled_kl" if options.get("use_kl") else "mse"
        kind = "rescaled_mse" if options.get("rescale_learned_sigmas") else kind
        loss = g.training_loss(lambda x, t: model(x, t, y), process_of(options), x0, i, noise, kind=kind)
        for part in ("loss", "mse", "vb"):
            value, key = getattr(loss, part), f"loss.{variant}.{part}"
            if (value is None) != (key not in tensors):
                yield key, float("inf")
            elif value is not None:
                yield key, difference(value, tensors[key], relative=True)
        if variant == "default":
            model.zero_grad()
            loss.loss.mean().backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    for key in (k for k in tensors if k.startswith("grad.")):
        gradient = gradients[key.removeprefix("grad.")]
        yield key, float("inf") if gradient is None else difference(gradient, tensors[key], relative=True)
    norms = [-1.0 if gradients[k] is None else gradients[k].norm().item() for k in facts["grad_norm_order"]]  # type: ignore[union-attr]
    yield "grad_norms", difference(torch.tensor(norms), tensors["grad_norms"], relative=True)


@torch.no_grad()
def compare_statistics(model: DiT, facts: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    x0, noise, i, y = (tensors[f"input.{part}"] for part in ("x_start", "noise", "t", "y"))
    process = process_of(facts["variants"]["default"])
    x = g.add_noise(process, x0, i, noise)
    yield "q_sample", difference(x, tensors["q_sample"])
    yield "prior_bpd", difference(g.prior_bits(process, x0), tensors["prior_bpd"])
    found = {"q_posterior": g.posterior(process, x0, x, i)}
    for clip in (0, 1):
        found[f"p_mean_variance.clip_{clip}"] = g.reverse(process, model(x, i, y), x, i, clip=bool(clip))
    names = {"log_variance_clipped": "log_variance", "pred_xstart": "x0"}
    for key in (k for k in tensors if k.startswith(tuple(found))):
        prefix, _, part = key.rpartition(".")
        value = getattr(found[prefix], names.get(part, part)).expand_as(tensors[key])
        yield key, difference(value, tensors[key], relative=True)


@torch.no_grad()
def compare_samples(model: DiT, facts: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    z, y, noises, scale = *(tensors[f"sample.{k}"] for k in ("z", "y", "step_noise")), facts["sampling"]["cfg_scale"]
    process, n = process_of(facts["variants"]["default"], facts["sampling"]["respacing"]), len(z)
    yield "sample.timesteps", difference(process.timesteps.flip(0), tensors["sample.timesteps"])

    def network(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, y)

    def both_halves(x: Tensor, t: Tensor) -> Tensor:
        """The official doubled batch, of which the second half has noise and variances of its own."""
        half, null = x[:n], torch.full_like(y, model.null_label)
        conditional, unconditional = model(torch.cat([half, half]), t, torch.cat([y, null])).chunk(2)
        kept = guide_channels(conditional, unconditional, scale, 3)
        return torch.cat([kept, torch.cat([kept[:, :3], unconditional[:, 3:]], 1)])

    one_half = class_guidance(model, y, model.null_label, scale)
    samplers: dict[str, Callable] = {
        "ddpm": g.ancestral,
        "ddpm_clip": lambda *a, **k: g.ancestral(*a, **k, clip=True),
        "ddim_eta0": g.ddim,
        "ddim_eta1": lambda *a, **k: g.ddim(*a, **k, eta=1.0),
    }
    for name, sampler in samplers.items():
        x, x0 = trajectory(sampler, both_halves, torch.cat([z, z]), process, noises)
        expected = tensors[f"sample.{name}.x"]
        yield f"sample.{name}.x", stepwise(x, expected)
        yield f"sample.{name}.pred_xstart", stepwise(x0, tensors[f"sample.{name}.pred_xstart"])
        x, _ = trajectory(sampler, one_half, z, process, noises[:, :n])
        yield f"sample.{name}.x, first half alone", stepwise(x, expected[:, :n])
    x, _ = trajectory(g.ancestral, network, z, process, noises[:, :n])
    yield "sample.ddpm_nocfg.x", stepwise(x, tensors["sample.ddpm_nocfg.x"])


def trajectory(
    sampler: Callable, denoise: g.Denoise, x: Tensor, process: g.Gaussian, noises: Tensor
) -> tuple[Tensor, Tensor]:
    """x and x0 after every step, (steps, B, C, H, W)."""
    numbers, seen = iter(noises), []
    sampler(denoise, x, process, noise=lambda _: next(numbers), on_step=lambda _, x, x0: seen.append((x, x0)))
    return torch.stack([x for x, _ in seen]), torch.stack([x0 for _, x0 in seen])


def stepwise(found: Tensor, expected: Tensor) -> float:
    return max(difference(f, e, relative=True) for f, e in zip(found, expected, strict=True))


@torch.no_grad()
def compare_inversion(model: DiT, facts: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    z, y, i = tensors["sample.z"], tensors["sample.y"], tensors["ddim_reverse.t_index"]
    process = process_of(facts["variants"]["default"], facts["sampling"]["respacing"])
    found = g.ddim_reverse_step(process, model(z, process.timesteps[i], y), z, i)
    yield "ddim_reverse.x", difference(found.x, tensors["ddim_reverse.x"], relative=True)


def compare_schedules(folder: Path) -> Differences:
    """schedules: every table, relative to its largest value."""
    facts, tensors = read(folder, "schedules")
    respacings = {key.replace(",", "_"): key for key in facts["respaced_timesteps"]}
    found = []
    for key, expected in tensors.items():
        schedule, steps, table = (key.split(".") + [""])[:3]
        if steps.startswith("respaced_"):
            process = g.gaussian(schedule, respacing=respacings[steps.removeprefix("respaced_")])  # type: ignore[arg-type]
            table = table.replace("timestep_map", "timesteps")
        else:
            process = g.gaussian(schedule, steps=int(steps))  # type: ignore[arg-type]
        found.append((key, difference(getattr(process, table), expected, relative=True)))
    return found


def compare_positions(folder: Path) -> Differences:
    """pos_embed: the position tables in float64."""
    facts, tensors = read(folder, "pos_embed")
    return [
        (key, difference(sincos_positions((case["grid"], case["grid"]), case["dim"]), tensors[key]))
        for case in facts["cases"]
        for key in [f"grid{case['grid']}_dim{case['dim']}"]
    ]


def compare_layout(folder: Path, name: str, preset: str) -> Differences:
    """layout_*: 0 where names, their order, shapes and the count of parameters are those of the released network."""
    facts = json.loads((folder / f"{name}.json").read_text())
    with torch.device("meta"):
        state = DiT(PRESETS[preset]).state_dict()
    names_differ = list(facts["keys"]) != list(state)
    shapes_differ = sum(facts["keys"].get(key) != list(value.shape) for key, value in state.items())
    count = sum(value.numel() for value in state.values())
    return [("keys", float(names_differ)), ("shapes", float(shapes_differ)), ("count", count - facts["num_parameters"])]


def check(differences: Differences, tolerance: float) -> None:
    assert differences
    allowed = {
        name: CLIPPED_TOLERANCE if name.startswith("sample.ddpm_clip.") else tolerance for name, _ in differences
    }
    assert {name: value for name, value in differences if not value <= allowed[name]} == {}


@pytest.mark.parametrize("name", ["model_a", "model_b", "model_c"])
def test_network_equals_the_official_one_in_every_activation(name):
    check(compare_model(GOLDEN, name), TOLERANCE)


@pytest.mark.parametrize("name", ["diffusion_a", "diffusion_c"])
def test_losses_gradients_and_five_step_samples_equal_the_official_ones(name):
    check(compare_diffusion(GOLDEN, name), TOLERANCE)


def test_schedules_and_respacings_equal_the_official_tables():
    check(compare_schedules(GOLDEN), TABLE_TOLERANCE)


def test_positions_equal_the_official_table():
    check(compare_positions(GOLDEN), TABLE_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "preset"), [("layout_dit_xl_2_256", "DiT-XL/2"), ("layout_dit_xl_2_512", "DiT-XL/2-512")]
)
def test_names_and_shapes_equal_the_released_networks(name, preset):
    check(compare_layout(GOLDEN, name, preset), 0)
