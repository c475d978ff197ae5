"""DiffiT's latent model (arXiv:2312.02139) against golden/diffit: tensors written by the official release
(NVlabs/DiffiT, March 2026; its licence is non-commercial, so they serve verification only). The paper's U-shape has no
official code.

One function a fixture part gives (what, largest difference).
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from condit.backbones.diffit import DiffiT, DiffiTConfig, Frame
from condit.diffusion.gaussian import ancestral, gaussian, training_loss
from condit.diffusion.guidance import class_guidance, power_cosine_scale
from condit.weights.diffit import load_diffit, save_diffit

GOLDEN = Path(__file__).parent / "golden" / "diffit"
FIXTURES = ["latent_a", "latent_b_constant_guidance"]
ATOL = 1e-5  # the fused kernel sums in another order: 1e-6 measured on outputs up to 2
Differences = list[tuple[str, float]]


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest value: samples of an untrained network grow without bound."""
    return difference(found, expected) / max(1.0, expected.abs().max().item())


def told(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def load(name: str, folder: Path) -> tuple[DiffiT, dict[str, Tensor]]:
    """The fixture's network through the loader of release files, and the fixture's tensors."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    save_file(part(tensors, "state."), folder / "model.safetensors")
    return load_diffit(folder / "model.safetensors"), tensors


def scale_of(name: str, scale: float, power: float):
    """The released rule: a power cosine for small latents, a constant for large ones."""
    return scale if told(name)["guidance"] == "constant" else partial(power_cosine_scale, scale=scale, power=power)


@torch.no_grad()
def compare_activations(name: str, folder: Path) -> Differences:
    """Patches, condition token, the attention of block 0, every block, final layer, output."""
    model, t = load(name, folder)
    x, grid = t["input.x"], model.config.grid
    frame = Frame(model.condition(t["input.t"], t["input.y"]), grid)
    found = {"patch_tokens": model.x_embedder(x), "cond": frame.time}
    tokens = (found["patch_tokens"] + model.positions(grid))[:, None]
    first = model.blocks[0]
    found["block.0.attn"] = first.attn(first.norm1(tokens), frame)[0][:, 0]
    for i, block in enumerate(model.blocks):
        tokens = block(tokens, frame)
        found[f"block.{i}"] = tokens[:, 0]
    found["final_tokens"] = model.final_layer(tokens[:, 0])
    assert {f"act.{what}" for what in found} == {what for what in t if what.startswith("act.")}
    out = [(what, difference(y, t[f"act.{what}"])) for what, y in found.items()]
    return [*out, ("output", difference(model(x, t["input.t"], t["input.y"]), t["output.eps_sigma"]))]


@torch.no_grad()
def compare_guidance(name: str, folder: Path) -> Differences:
    """Three guided channels of noise; the rest of each half is its own."""
    model, t = load(name, folder)
    x, time, y = t["input.x"], t["input.t"], t["input.y"]
    unconditional = model(x, time)
    out = []
    for case in told(name)["guidance_cases"]:
        guided = class_guidance(model, y, model.null_label, scale_of(name, case["scale"], case["power"]))(x, time)
        both = torch.cat([guided, torch.cat([guided[:, :3], unconditional[:, 3:]], 1)])
        key = f"cfg_{case['scale']}_pow_{case['power']}"
        out.append((key, difference(both, t[f"output.{key}"])))
    return out


def compare_loss(name: str, folder: Path) -> Differences:
    """The loss per image and its parts, and gradients of the mean; differences relative where values exceed 1."""
    model, t = load(name, folder)
    denoise = partial(model, y=t["input.y"])
    loss = training_loss(denoise, gaussian(), t["input.x"], t["input.t"], t["input.noise"])
    loss.loss.mean().backward()
    assert loss.mse is not None and loss.vb is not None
    parts = {"loss": loss.loss, "mse": loss.mse, "vb": loss.vb}
    out = [(what, relative(x.detach(), t[f"loss.{what}"])) for what, x in parts.items()]
    for key, expected in part(t, "grad.").items():
        gradient = model.get_parameter(key).grad
        assert gradient is not None
        out.append((f"gradient of {key}", relative(gradient, expected)))
    return out


@torch.no_grad()
def compare_trajectory(name: str, folder: Path) -> Differences:
    """Guided ancestral sampling, x after each of 5 steps. The official sampler carries a second half along, which it
    neither shows to the network nor keeps."""
    model, t = load(name, folder)
    settings = told(name)["sampling"]
    process = gaussian(steps=settings["diffusion_steps"], respacing=settings["respacing"])
    assert process.timesteps.flip(0).tolist() == t["sample.timesteps"].tolist()
    scale = scale_of(name, settings["cfg_scale"], settings["scale_pow"])
    denoise = class_guidance(model, t["input.y"][:2], model.null_label, scale)
    draws, seen = iter(t["sample.step_noise"][:, :2]), []
    x = t["input.x"][:2]
    ancestral(denoise, x, process, noise=lambda _: next(draws), on_step=lambda i, x, x0: seen.append(x))
    expected = t["sample.ddpm.x"][:, :2]
    return [(f"step {i}", relative(x, e)) for i, (x, e) in enumerate(zip(seen, expected, strict=True))]


def check(differences: Differences) -> None:
    assert differences
    assert [(what, d) for what, d in differences if not d <= ATOL] == []


@pytest.mark.parametrize("name", FIXTURES)
def test_every_activation_equals_the_release(name, tmp_path):
    check(compare_activations(name, tmp_path))


@pytest.mark.parametrize("name", FIXTURES)
def test_guided_outputs_equal_the_release(name, tmp_path):
    check(compare_guidance(name, tmp_path))


@pytest.mark.parametrize("name", FIXTURES)
def test_loss_and_gradients_equal_the_release(name, tmp_path):
    check(compare_loss(name, tmp_path))


@pytest.mark.parametrize("name", FIXTURES)
def test_every_step_of_guided_sampling_equals_the_release(name, tmp_path):
    check(compare_trajectory(name, tmp_path))


def test_the_fixture_tells_offsets_of_the_wrong_sign(tmp_path):
    model, t = load("latent_a", tmp_path)
    with torch.no_grad():
        for block in model.blocks:  # offsets key minus query instead of query minus key
            table = block.attn.relative_position_bias_table
            table.copy_(table.flip(0))
        turned = model(t["input.x"], t["input.t"], t["input.y"])
    assert difference(turned, t["output.eps_sigma"]) > 10 * ATOL


@pytest.mark.parametrize("name", FIXTURES)
def test_sizes_read_off_the_tensors_are_those_of_the_fixture(name, tmp_path):
    model, _ = load(name, tmp_path)
    assert model.config == DiffiTConfig(**told(name)["config"])
    assert sum(p.numel() for p in model.parameters()) == told(name)["num_parameters"]


@pytest.mark.parametrize("name", FIXTURES)
def test_a_saved_model_holds_the_release_tensors_bit_by_bit(name, tmp_path):
    model, t = load(name, tmp_path)
    written = load_file(save_diffit(model, tmp_path / "again.safetensors", indices=True))
    released = part(t, "state.")
    assert written.keys() == released.keys()
    assert all(torch.equal(written[k], released[k]) and written[k].dtype == released[k].dtype for k in released)
