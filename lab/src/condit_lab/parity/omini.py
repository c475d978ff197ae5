"""OminiControl (arXiv:2411.15098, 2503.08280) against fixtures: tensors written by the official code, both generations.

The official code runs every branch apart, ours runs them joined: sums are taken in another order, about 1.5e-6 on
outputs of deviation 1.3.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from condit.controls.control import Run, Step
from condit.controls.omini import OminiConfig, OminiControl, condition_stream
from condit.data.images import to_tensor
from condit.diffusion.objectives import add_noise, flow_loss
from condit.encoders.vae import encode_tokens, pack
from condit.nn.streams import Stream, grid_ids
from condit_lab.parity.check import Check, Differences, compare, difference, part
from condit_lab.parity.omini_golden import Golden, Seeded, read

TOLERANCE = 1e-5  # the fixtures' own


# What is compared


def compare_forward(folder: Path, name: str) -> Differences:
    """One prediction with one or two conditions; conditions never see each other but in one case."""
    g = read(folder)
    condition = g.condition
    later, earlier = "scale2_then_delta_trainer_order", "delta_then_scale2_inference_order"
    cases = {
        "native_no_condition": [],
        "no_condition": [],
        "aligned": [condition()],
        "aligned_independent": [condition(sees="self")],
        "subject_delta_minus_w": [condition("b")],
        "subject_delta_plus_w": [condition("b", "delta_plus_w")],
        "scale2": [condition("small", "scale2")],
        "scale2_delta_inference_order": [condition("small", earlier)],
        "scale2_delta_trainer_order": [condition("small", later)],
        "two_conditions": [condition(), condition("b")],
        "two_conditions_independent": [condition(sees="self"), condition("b", sees="self")],
        "two_conditions_no_group_mask": [condition(sees="all"), condition("b", sees="all")],
        "two_conditions_same_adapter": [condition(), condition("b", adapter="canny")],
    }
    return compare({f"out/{case}": g.predict(*cases[case]) for case in cases}, g.forward, "out/")


def compare_residuals(folder: Path, name: str) -> Differences:
    """The residual streams behind every block."""
    g, seen = read(folder), {}
    blocks: dict[str, nn.Module] = {f"double_{i}": b for i, b in enumerate(g.model.transformer_blocks)}
    blocks |= {f"single_{i}": b for i, b in enumerate(g.model.single_transformer_blocks)}
    hooks = [
        block.register_forward_hook(lambda _, __, out, name=name: seen.update({name: list(out)}))
        for name, block in blocks.items()
    ]
    g.predict(g.condition())
    for hook in hooks:
        hook.remove()
    streams = {}
    for block, xs in seen.items():
        if block.startswith("single"):  # text and image run as one stream there
            xs = [xs[0][:, : g.text_tokens], xs[0][:, g.text_tokens :], xs[1]]
        for branch, x in zip(("text", "image", "cond"), xs, strict=True):
            streams[f"hidden/aligned/{block}/{branch}"] = x
    return compare(streams, g.forward, "hidden/")


def compare_positions(folder: Path, name: str) -> Differences:
    g = read(folder)
    (height, width), small = g.grid, (g.grid[0] // 2, g.grid[1] // 2)
    delta = (0, -(width // 2))
    ids = {
        "aligned": grid_ids(*g.grid),
        "delta_minus_w": g.left,
        "delta_plus_w": grid_ids(height, width, delta=(0, width)),
        "scale2": grid_ids(*small, scale=2),
        "scale2_then_delta_trainer_order": grid_ids(*small, delta=delta, scale=2),
        "delta_then_scale2_inference_order": grid_ids(*small, delta=delta, scale=2, order="official-inference"),
    }
    return compare({f"ids/{key}": value for key, value in ids.items()}, g.forward, "ids/")


def compare_strengths(folder: Path, name: str) -> Differences:
    """gamma: as the first generation's code has it, as Eq. 5 of the paper, and on two conditions."""
    g, recorded = read(folder), read(folder).tensors(name)
    forms = {
        "v1_gamma_": lambda gamma: [g.condition(gamma=gamma)],
        "v1_subject_gamma_": lambda gamma: [g.condition("b", gamma=gamma)],
        "derived_paper_gamma_": lambda gamma: [g.condition(gamma=gamma, weight_text=False)],
        "derived_two_conditions_code_blocks_gamma_": lambda gamma: [
            g.condition(gamma=gamma),
            g.condition("b", gamma=gamma),
        ],
    }
    predictions = {
        "out/v1_gamma_none": g.predict(g.condition()),
        "out/v1_independent": g.predict(g.condition(sees="self")),
        "out/v1_no_union_attention": g.predict(),  # blocked both ways
        "out/v1_latent_lora": g.predict(g.condition(), image=g.image(lora=g.loras["canny"])),
    }
    for key in recorded.keys() - predictions.keys():
        form = next((form for form in forms if key.startswith(f"out/{form}")), None)
        if form is not None:
            predictions[key] = g.predict(*forms[form](float(key.removeprefix(f"out/{form}"))))
    return compare(predictions, recorded, "out/")


def compare_cache(folder: Path, name: str) -> Differences:
    """kv_cache: the cached keys and values, the passes that write and read them, and two caches that are wrong on
    purpose: of another prompt, and of conditions that see text and image."""
    g, recorded = read(folder), read(folder).tensors(name)
    later, controls = g.image(later=True), g.cached()
    outputs = {
        "out/write_pass": g.predict(controls=controls),
        "out/read_pass": g.predict(image=later, controls=controls),
        "out/full_recompute": g.predict(g.condition(sees="self"), g.condition("b", sees="self"), image=later),
        "out/read_pass_cache_from_other_pooled": g.predict(image=later, controls=g.cached("pooled_other")),
        "out/full_recompute_not_independent": g.predict(g.condition(), g.condition("b"), image=later),
        "out/read_pass_not_independent": first_step_cache(g)[1],
    }
    for number, control in enumerate(controls):
        assert control.memory is not None and list(control.memory) == [site.path for site in g.model.sites]
        for layer, (key, value) in enumerate(control.memory.values()):
            outputs[f"cache/attn_{layer}/cond_{number}/key"] = key
            outputs[f"cache/attn_{layer}/cond_{number}/value"] = value
    return compare(outputs, recorded)


def first_step_cache(g: Golden) -> tuple[Tensor, Tensor]:
    """Predictions of the first and of a later step, with the cache of the first one."""
    prepared = [replace(c, first_step=True).prepare(g.run()) for c in g.references(independent=False)]
    predictions = []
    for i in range(2):
        acting = tuple(c for c in (c.at(Step(i, 2, 1 - i / 2)) for c in prepared) if c is not None)
        streams = [stream for c in acting for stream in c.streams()]
        assert bool(streams) == (i == 0)  # a later step runs no condition
        predictions.append(g.predict(*streams, image=g.image(later=i == 1), controls=acting))
    return predictions[0], predictions[1]


def compare_encoding(folder: Path, name: str) -> Differences:
    """vae_encode: pixels, the posterior, packed tokens."""
    g, t = read(folder), read(folder).tensors(name)
    pixels = t["image"] if t["image"].shape[-1] == 3 else t["image"].movedim(0, -1)
    height, width = t["preprocessed"].shape[-2:]
    posterior = g.vae.encode(t["preprocessed"]).latent_dist
    shift, scaling = g.vae.config.shift_factor, g.vae.config.scaling_factor
    own = posterior.mean + posterior.std * t["noise"]
    outputs = {
        "preprocessed": to_tensor(pixels.numpy(), (height, width))[None],
        "mean": posterior.mean,
        "std": posterior.std,
        "tokens": pack((own - shift) * scaling),
        "ids": grid_ids(height // g.config["px"], width // g.config["px"]),
    }
    mode = encode_tokens(g.vae, t["preprocessed"], sample=False)
    return compare(outputs, {key: x for key, x in t.items() if key not in ("image", "noise")}) | {
        "mode": difference(mode, pack((t["mean"] - shift) * scaling))
    }


def compare_conditions(folder: Path, name: str) -> Differences:
    """trajectory: images to tokens and positions, by the public call, and the black images of image guidance."""
    g, t, outputs = read(folder), read(folder).trajectory, {}
    edges = {"adapter": "canny", "image": "image_a"}
    subject = {"adapter": "subject", "image": "image_b", "delta": "left"}
    cases: dict[str, list[dict]] = {
        "aligned": [edges],
        "subject": [subject],
        "compact": [{"adapter": "canny", "image": "image_small", "scale": 2}],
        "two": [edges, subject],
        "two_kv": [edges, subject],
        "image_guidance_1.5": [edges],
        "image_guidance_1.5_two_kv": [edges, subject],
        "integration": [edges],
        "integration_kv": [edges],
    }
    for case, conditions in cases.items():
        pipe, black = g.pipe(Seeded), case.startswith("image_guidance")
        assert isinstance(pipe, Seeded)
        for i, given in enumerate(conditions):
            placed = {key: value for key, value in given.items() if key in ("delta", "scale")}
            pipe.count = 2 * i if black else i  # without guidance no black image is encoded in between
            control = OminiControl(g.loras[given["adapter"]], OminiConfig(**placed), pipe).control(
                t[given["image"]].numpy()
            )
            key = f"{case}/encoded_{2 * i if black else i}"
            outputs[f"{key}/tokens"] = control.tokens
            if not placed:
                outputs[f"{key}/ids"] = control.ids
            if black:
                outputs[f"{case}/encoded_{2 * i + 1}/tokens"] = control.negative().tokens
    recorded = {k: x for k, x in t.items() if k.endswith("/tokens") or k in outputs}
    return compare(outputs, recorded)


def compare_trajectories(folder: Path, name: str) -> Differences:
    """trajectory: the latents after each of four steps of `generate`."""
    g, outputs = read(folder), {}
    for case, controls in g.cases().items():
        outputs[f"{case}/trajectory"], outputs[f"{case}/final"] = g.generate(case, controls)
    recorded = {k: x for k, x in g.trajectory.items() if k.endswith(("/trajectory", "/final"))}
    return compare({k: x for k, x in outputs.items() if k in recorded}, recorded)


_ADAPTERS = {"subject": "subject"}  # others train the adapter of edges


def compare_training(folder: Path, name: str) -> Differences:
    """train_step: prediction, loss, and the LoRA's gradients as a part of their global norm."""
    g, out = read(folder), {}
    recorded = g.tensors(name)
    for case in sorted({key.split("/")[0] for key in recorded}):
        given = part(recorded, f"{case}/")
        out |= {f"{case}/{key}": value for key, value in training_step(g, case, given).items()}
    return out


def training_step(g: Golden, case: str, given: dict[str, Tensor]) -> Differences:
    loras, adapter = {name: g.lora(name) for name in g.loras}, _ADAPTERS.get(case, "canny")
    config = OminiConfig(independent=case.endswith("independent"))
    # Guidance 1 for every branch, whatever the model is given later.
    run = Run(g.model, 1, g.grid, g.trajectory["pooled"], torch.ones(1), g.model.config.in_channels)
    conditions = [
        condition_stream(
            OminiControl(loras[adapter], config),
            given[f"cond_{i}/tokens"].reshape(1, -1, run.in_channels),
            given[f"cond_{i}/ids"],
            run,
        )
        for i in range(2)
        if f"cond_{i}/ids" in given
    ]
    t, target = given["t"], given["target_velocity"]
    noisy = Stream(given["x_t"], given["img_ids"], t, run.pooled, run.guidance)
    prediction = g.model(noisy, g.trajectory["text"], torch.zeros(g.text_tokens, 3), conditions=conditions)
    x0 = given["x_t"] - t * target
    loss = flow_loss(prediction, x0, x0 + target, t).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in loras[adapter].parameters() if p.grad is not None]).norm()
    whole = float(given["grad_global_norm"])
    out = {
        "prediction": difference(prediction, given["prediction"]),
        "x_t": difference(add_noise(x0, x0 + target, t), given["x_t"]),
        "loss": difference(loss[None], given["loss"]),
        "grad_global_norm": difference(norm[None], given["grad_global_norm"]) / whole,
    }
    for key, expected in part(given, "grad/").items():
        path, side, owner = key.removesuffix(".weight").rsplit(".", 2)
        parameter = {"lora_A": loras[owner].a, "lora_B": loras[owner].b}[side][loras[owner].keys[path]]
        # Of an adapter that is not in use the file holds zeros.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        out[f"grad/{key}"] = difference(gradient, expected) / whole
    return out


_CODE, _FIRST = "official code", "official code, first generation"
CHECKS = (
    Check("one prediction, 13 kinds of conditions", _CODE, TOLERANCE, "forward*.safetensors", compare_forward),
    Check("hidden states after every block", _CODE, TOLERANCE, "forward*.safetensors", compare_residuals),
    Check("positions", _CODE, 0, "forward*.safetensors", compare_positions),
    Check("strength, latent LoRA, blocked conditions", _FIRST, TOLERANCE, "gamma*.safetensors", compare_strengths),
    Check("cached keys and values, write and read pass", _CODE, TOLERANCE, "kv_cache*.safetensors", compare_cache),
    Check("tokens by the autoencoder", _CODE, TOLERANCE, "vae_encode*.safetensors", compare_encoding),
    Check("images to conditions, black images", _CODE, TOLERANCE, "trajectory*.safetensors", compare_conditions),
    Check("four steps of generate", _CODE, TOLERANCE, "trajectory*.safetensors", compare_trajectories),
    Check("training step: loss, gradients", _CODE, TOLERANCE, "train_step*.safetensors", compare_training),
)
INPUTS = ("config", "transformer", "vae", "lora_*")
