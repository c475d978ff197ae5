"""OminiControl (arXiv:2411.15098, 2503.08280) against golden/ominicontrol, tensors written by the official code.

The official code runs every branch apart, ours runs them joined: sums are taken in another order, about 1.5e-6 on
outputs of deviation 1.3. ATOL leaves room for other machines' kernels.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.controls.control import Control, Fill, Run, Step, When
from condit.controls.omini import OminiConfig, OminiControl, OminiReference, condition_stream
from condit.controls.omini_fill import from_official_mask
from condit.controls.omini_official import official_guidance
from condit.data.images import to_tensor
from condit.diffusion.objectives import add_noise, flow_loss
from condit.drawing.pipeline import Pipeline
from condit.encoders.text import Text
from condit.encoders.vae import encode_tokens, pack
from condit.verify.check import difference
from condit.nn.lora import LoRA
from condit.nn.streams import Sees, Stream, grid_ids
from condit.weights.load import Parts

GOLDEN = Path(__file__).parent / "golden" / "ominicontrol"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
GRID = CONFIG["grid_h"], CONFIG["grid_w"]
TEXT_TOKENS = CONFIG["text_tokens"]
ATOL = 1e-5
FORWARD = load_file(GOLDEN / "forward.safetensors")
GAMMA = load_file(GOLDEN / "gamma.safetensors")
CACHE = load_file(GOLDEN / "kv_cache.safetensors")
TRAJECTORY = load_file(GOLDEN / "trajectory.safetensors")
TRAIN = load_file(GOLDEN / "train_step.safetensors")
LORAS = {name: LoRA.from_tensors(load_file(GOLDEN / f"lora_{name}.safetensors")) for name in ("canny", "subject")}


@pytest.fixture(scope="module")
def model() -> MMDiT:
    axes = tuple(CONFIG["transformer"]["axes_dims_rope"])
    model = MMDiT(MMDiTConfig(**{**CONFIG["transformer"], "axes_dims_rope": axes}))
    model.load_state_dict(load_file(GOLDEN / "transformer.safetensors"), strict=True)
    return model.eval().requires_grad_(False)


def equal(found: Tensor, expected: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def image(x: str = "x", timestep: str = "timestep", lora: LoRA | None = None) -> Stream:
    f = FORWARD
    return Stream(f[x], f["img_ids"], f[timestep], f["pooled"], f["guidance"], lora)


NOW, NEXT = image(), image("x_next", "timestep_next")


def condition(
    tokens: str, ids: str, adapter: str, sees: Sees = "main", gamma: float | None = None, weight_text: bool = True
) -> Stream:
    clock = torch.zeros_like(FORWARD["timestep"])
    weight = None if gamma is None else torch.tensor(gamma).log()
    lora = LORAS[adapter]
    ids_ = FORWARD[f"ids/{ids}"]
    return Stream(FORWARD[tokens], ids_, clock, FORWARD["pooled"], clock + 1, lora, sees, weight, weight_text)


@torch.no_grad()
def run(model: MMDiT, *conditions: Stream, image: Stream = NOW, controls: tuple[Control, ...] = ()) -> Tensor:
    return model(image, FORWARD["text"], FORWARD["txt_ids"], conditions=conditions, controls=controls)


A, B = ("cond_a", "aligned", "canny"), ("cond_b", "delta_minus_w", "subject")
FORWARD_CASES = {
    "native_no_condition": [],
    "no_condition": [],
    "aligned": [condition(*A)],
    "aligned_independent": [condition(*A, "self")],
    "subject_delta_minus_w": [condition(*B)],
    "subject_delta_plus_w": [condition("cond_b", "delta_plus_w", "subject")],
    "scale2": [condition("cond_small", "scale2", "canny")],
    "scale2_delta_inference_order": [condition("cond_small", "delta_then_scale2_inference_order", "canny")],
    "scale2_delta_trainer_order": [condition("cond_small", "scale2_then_delta_trainer_order", "canny")],
    "two_conditions": [condition(*A), condition(*B)],
    "two_conditions_independent": [condition(*A, "self"), condition(*B, "self")],
    "two_conditions_no_group_mask": [condition(*A, "all"), condition(*B, "all")],
    "two_conditions_same_adapter": [condition(*A), condition("cond_b", "delta_minus_w", "canny")],
}


def test_every_forward_output_of_the_file_has_a_case():
    assert {f"out/{name}" for name in FORWARD_CASES} == {name for name in FORWARD if name.startswith("out/")}


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_forward_equals_the_official_code(model, name):
    equal(run(model, *FORWARD_CASES[name]), FORWARD[f"out/{name}"])


def test_residual_streams_equal_the_official_code_after_every_block(model):
    seen = {}
    blocks = {f"double_{i}": b for i, b in enumerate(model.transformer_blocks)}
    blocks |= {f"single_{i}": b for i, b in enumerate(model.single_transformer_blocks)}
    hooks = [
        block.register_forward_hook(lambda _, __, out, name=name: seen.update({name: list(out)}))
        for name, block in blocks.items()
    ]
    run(model, condition(*A))
    for hook in hooks:
        hook.remove()
    for name, xs in seen.items():
        if name.startswith("single"):  # text and image run as one stream there
            xs = [xs[0][:, :TEXT_TOKENS], xs[0][:, TEXT_TOKENS:], xs[1]]
        for branch, x in zip(("text", "image", "cond"), xs, strict=True):
            equal(x, FORWARD[f"hidden/aligned/{name}/{branch}"])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("aligned", grid_ids(*GRID)),
        ("delta_minus_w", grid_ids(*GRID, delta=(0, -GRID[1]))),
        ("delta_plus_w", grid_ids(*GRID, delta=(0, GRID[1]))),
        ("scale2", grid_ids(2, 3, scale=2)),
        ("scale2_then_delta_trainer_order", grid_ids(2, 3, delta=(0, -3), scale=2)),
        ("delta_then_scale2_inference_order", grid_ids(2, 3, delta=(0, -3), scale=2, order="official-inference")),
    ],
)
def test_positions_equal_the_official_ones(name, found):
    assert torch.equal(found, FORWARD[f"ids/{name}"])


GAMMAS = (0.0, 0.5, 1.5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize(("prefix", "case"), [("v1_gamma", A), ("v1_subject_gamma", B)])
def test_strength_equals_the_condition_scale_of_the_first_generation(model, prefix, case, gamma):
    equal(run(model, condition(*case, gamma=gamma)), GAMMA[f"out/{prefix}_{gamma}"])


@pytest.mark.parametrize("gamma", GAMMAS)
def test_strength_without_text_equals_equation_5_of_the_paper(model, gamma):
    equal(run(model, condition(*A, gamma=gamma, weight_text=False)), GAMMA[f"out/derived_paper_gamma_{gamma}"])


@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_strength_on_two_conditions_equals_the_official_blocks(model, gamma):
    found = run(model, condition(*A, gamma=gamma), condition(*B, gamma=gamma))
    equal(found, GAMMA[f"out/derived_two_conditions_code_blocks_gamma_{gamma}"])


def test_no_strength_and_independent_equal_the_first_generation(model):
    equal(run(model, condition(*A)), GAMMA["out/v1_gamma_none"])
    equal(run(model, condition(*A, "self")), GAMMA["out/v1_independent"])


def test_a_condition_blocked_both_ways_equals_no_condition(model):
    equal(run(model), GAMMA["out/v1_no_union_attention"])


def test_an_adapter_on_the_noisy_tokens_equals_latent_lora(model):
    equal(run(model, condition(*A), image=image(lora=LORAS["canny"])), GAMMA["out/v1_latent_lora"])


# The cache


def reference(tokens: Tensor, ids: Tensor, adapter: str, *, black: Tensor | None = None, **fields) -> OminiReference:
    config = OminiConfig(independent=fields.pop("independent", False))
    return OminiReference(
        tokens, tokens if black is None else black, ids, OminiControl(LORAS[adapter], config), 1.0, When(), **fields
    )


def cached(model: MMDiT, pooled: str = "pooled") -> list[OminiReference]:
    run = Run(model, 2, GRID, FORWARD[pooled], FORWARD["guidance"], CONFIG["transformer"]["in_channels"])
    found = [
        reference(FORWARD[tokens], FORWARD[f"ids/{ids}"], adapter, independent=True) for tokens, ids, adapter in (A, B)
    ]
    with torch.no_grad():
        return [r.prepare(run) for r in found]


def test_prefilled_keys_and_values_equal_the_official_cache(model):
    for number, control in enumerate(cached(model)):
        assert control.memory is not None and control.streams() == ()
        assert list(control.memory) == [site.path for site in model.sites]
        for layer, (k, v) in enumerate(control.memory.values()):
            equal(k, CACHE[f"cache/attn_{layer}/cond_{number}/key"])
            equal(v, CACHE[f"cache/attn_{layer}/cond_{number}/value"])


def test_write_and_read_pass_equal_the_official_code(model):
    controls = tuple(cached(model))
    equal(run(model, controls=controls), CACHE["out/write_pass"])
    equal(run(model, image=NEXT, controls=controls), CACHE["out/read_pass"])


def test_read_pass_equals_the_full_recomputation(model):
    full = run(model, condition(*A, "self"), condition(*B, "self"), image=NEXT)
    equal(full, CACHE["out/full_recompute"])
    # The same keys from the same operations; only the batching of the products differs.
    equal(run(model, image=NEXT, controls=tuple(cached(model))), full, atol=2e-6)


def test_a_cache_belongs_to_its_pooled_prompt(model):
    other = run(model, image=NEXT, controls=tuple(cached(model, "pooled_other")))
    equal(other, CACHE["out/read_pass_cache_from_other_pooled"])
    assert (other - CACHE["out/read_pass"]).abs().max() > 1


def at_steps(controls: list[OminiReference], model: MMDiT) -> list[Tensor]:
    """Predictions of the first and of a later step."""
    run_ = Run(model, 2, GRID, FORWARD["pooled"], FORWARD["guidance"], CONFIG["transformer"]["in_channels"])
    prepared, found = [c.prepare(run_) for c in controls], []
    for i, now in enumerate((NOW, NEXT)):
        acting = tuple(c for c in (c.at(Step(i, 2, 1 - i / 2)) for c in prepared) if c is not None)
        streams = [stream for c in acting for stream in c.streams()]
        assert bool(streams) == (i == 0)  # a cached step runs no condition
        found.append(run(model, *streams, image=now, controls=acting))
    return found


def test_the_cache_of_the_first_step_is_the_official_one_of_joint_conditions(model):
    """Written and read by the official code under its default mask, where it is an approximation."""
    controls = [reference(FORWARD[t], FORWARD[f"ids/{ids}"], adapter, first_step=True) for t, ids, adapter in (A, B)]
    first, later = at_steps(controls, model)
    equal(first, run(model, condition(*A), condition(*B)))
    equal(later, CACHE["out/read_pass_not_independent"])


def test_what_a_cache_of_a_joint_adapter_costs(model):
    """The table of docs/papers/ominicontrol.md: the cache of the first step is nearer than that of the condition
    alone, which is what the official generate(kv_cache=True) makes of any adapter."""
    exact = CACHE["out/full_recompute_not_independent"]
    equal(run(model, condition(*A), condition(*B), image=NEXT), exact)
    first = CACHE["out/read_pass_not_independent"]
    alone = run(model, image=NEXT, controls=tuple(cached(model)))
    equal(alone, CACHE["out/read_pass"])
    assert 0.1 < difference(first, exact) < 0.5 * difference(alone, exact)


# The autoencoder and the whole loop


@pytest.fixture(scope="module")
def vae():
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL(**CONFIG["vae"])
    vae.load_state_dict(load_file(GOLDEN / "vae.safetensors"), strict=True)
    return vae.eval().requires_grad_(False)


def test_condition_tokens_equal_the_official_encoding(vae):
    f = load_file(GOLDEN / "vae_encode.safetensors")
    pixels = f["image"] if f["image"].shape[-1] == 3 else f["image"].movedim(0, -1)
    equal(
        to_tensor(pixels.numpy(), (f["preprocessed"].shape[-2], f["preprocessed"].shape[-1]))[None], f["preprocessed"]
    )
    posterior = vae.encode(f["preprocessed"]).latent_dist
    equal(posterior.mean, f["mean"])
    shift, scaling = vae.config.shift_factor, vae.config.scaling_factor
    equal(pack((f["mean"] + f["std"] * f["noise"] - shift) * scaling), f["tokens"])
    equal(encode_tokens(vae, f["preprocessed"], sample=False), pack((f["mean"] - shift) * scaling))
    assert torch.equal(grid_ids(*GRID), f["ids"])


def bound(pipe: Pipeline, adapter: str, **config) -> OminiControl:
    return OminiControl(LORAS[adapter], OminiConfig(**config), pipe)


@pytest.mark.parametrize(
    ("case", "picture", "config", "ids"),
    [
        ("aligned", "image_a", {}, grid_ids(*GRID)),
        ("subject", "image_b", {"delta": "left"}, grid_ids(*GRID, delta=(0, -GRID[1]))),
        ("compact", "image_small", {"scale": 2}, grid_ids(2, 3, scale=2)),
        ("image_guidance_1.5", "image_a", {}, grid_ids(*GRID)),
    ],
)
def test_a_control_of_a_picture_equals_the_official_condition(model, vae, case, picture, config, ids):
    """From pixels to tokens and positions, drawn from the posterior with the seed of the file."""
    generator = torch.Generator().manual_seed(1234)
    adapter = bound(golden_pipe(model, vae), "canny", **config)
    control = adapter.control(TRAJECTORY[picture].numpy(), generator=generator)
    equal(control.tokens, TRAJECTORY[f"{case}/encoded_0/tokens"])
    assert torch.equal(control.ids, ids)


class Reseeding(Pipeline):
    """Seeds every encoding as the fixture does: 1234 + k for the k-th picture or black picture."""

    count = 0

    def encode_condition(self, images: Tensor, generator: torch.Generator | None = None):
        again = torch.Generator().manual_seed(1234 + self.count)
        self.count += 1
        return super().encode_condition(images, again)


@pytest.mark.parametrize(
    ("case", "pictures"),
    [("image_guidance_1.5", ["image_a"]), ("image_guidance_1.5_two_kv", ["image_a", "image_b"])],
)
def test_the_black_pictures_of_image_guidance_equal_the_official_ones(model, vae, case, pictures):
    """Encoded right after their picture, with noise of their own."""
    pipe = Reseeding(golden_pipe(model, vae).parts)
    for i, picture in enumerate(pictures):
        control = bound(pipe, "canny").control(TRAJECTORY[picture].numpy())
        equal(control.tokens, TRAJECTORY[f"{case}/encoded_{2 * i}/tokens"])
        equal(control.black, TRAJECTORY[f"{case}/encoded_{2 * i + 1}/tokens"])
        assert torch.equal(control.negative().tokens, control.black)
        assert torch.equal(control.negative().ids, control.ids)


class FixedText(nn.Module):
    """Stands for the encoders: the golden file holds what they would say."""

    def forward(self, prompts) -> Text:
        assert len(prompts) == 1
        return Text(TRAJECTORY["text"], TRAJECTORY["pooled"])


# The file keeps ids as encoded, before the official `generate` scales and shifts them.
LEFT, COMPACT = grid_ids(*GRID, delta=(0, -GRID[1])), grid_ids(2, 3, scale=2)


def encoded(case: str, number: int, adapter: str, ids: Tensor = FORWARD["img_ids"], **fields) -> OminiReference:
    return reference(TRAJECTORY[f"{case}/encoded_{number}/tokens"], ids, adapter, **fields)


def clean_guidance() -> list[OminiReference]:
    """The two cached conditions under image guidance; each one's black picture was encoded right after it."""
    case = "image_guidance_1.5_two_kv"
    black = [TRAJECTORY[f"{case}/encoded_{i}/tokens"] for i in (1, 3)]
    return [
        encoded(case, 0, "canny", black=black[0], independent=True),
        encoded(case, 2, "subject", LEFT, black=black[1], independent=True),
    ]


def integrated(case: str, **fields) -> OminiReference:
    """The known cells of a picture as the condition, the others to be drawn."""
    tokens, drawn = TRAJECTORY[f"{case}/encoded_0/tokens"], from_official_mask(TRAJECTORY[MASK])
    known = ~drawn.flatten()
    part = encoded(case, 0, "canny", FORWARD["img_ids"][known], given=Fill(tokens, drawn), **fields)
    return replace(part, tokens=tokens[:, known])


MASK = "integration/condition_mask_wh"
TRAJECTORY_CASES = {
    "none": [],
    "aligned": [encoded("aligned", 0, "canny")],
    "subject": [encoded("subject", 0, "subject", LEFT)],
    "compact": [encoded("compact", 0, "canny", COMPACT)],
    "two": [encoded("two", 0, "canny"), encoded("two", 1, "subject", LEFT)],
    "two_kv": [
        encoded("two_kv", 0, "canny", independent=True),
        encoded("two_kv", 1, "subject", LEFT, independent=True),
    ],
    "v1_gamma_0.5": [replace(encoded("aligned", 0, "canny"), strength=0.5)],
    "v1_gamma_1.5": [replace(encoded("aligned", 0, "canny"), strength=1.5)],
    "image_guidance_1.5": [
        encoded("image_guidance_1.5", 0, "canny", black=TRAJECTORY["image_guidance_1.5/encoded_1/tokens"])
    ],
    "image_guidance_1.5_two_kv": official_guidance(clean_guidance()),
    "integration": [integrated("integration")],
    "integration_kv": [integrated("integration_kv", independent=True)],
}


def test_every_trajectory_of_the_file_has_a_case():
    assert set(TRAJECTORY_CASES) == {name.split("/")[0] for name in TRAJECTORY if name.endswith("/trajectory")}


def golden_pipe(model: MMDiT, vae) -> Pipeline:
    height, width = (n * CONFIG["px"] for n in GRID)
    return Pipeline(
        Parts(
            name="golden",
            hash="",
            backbone=model,
            text=FixedText(),
            vae=vae,
            image=None,
            prediction="velocity",
            shift=None,
            size=(height, width),
            steps=4,
            guidance=3.5,
            distilled=True,
        )
    )


def draw(pipe: Pipeline, case: str, controls: list[Control]) -> tuple[Tensor, Tensor]:
    """The latents after each of four steps, and in the end."""
    steps = []
    result = pipe(
        "",
        controls=controls,
        latents=TRAJECTORY["latents_init"],
        image_guidance_scale=1.5 if case.startswith("image_guidance") else None,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kept: steps.append(kept["latents"]),
    )
    return torch.stack(steps), result.images


@pytest.mark.parametrize("case", TRAJECTORY_CASES)
def test_four_steps_of_the_pipeline_equal_the_official_generate(model, vae, case):
    steps, final = draw(golden_pipe(model, vae), case, TRAJECTORY_CASES[case])
    equal(steps, TRAJECTORY[f"{case}/trajectory"])
    if f"{case}/final" in TRAJECTORY:
        equal(final, TRAJECTORY[f"{case}/final"])


def test_our_image_guidance_differs_from_the_officials_where_it_lacks_the_mask(model, vae):
    """Two cached conditions: there the black ones see text, image and each other, here themselves only."""
    case = "image_guidance_1.5_two_kv"
    found, _ = draw(golden_pipe(model, vae), case, list(clean_guidance()))
    assert (found - TRAJECTORY[f"{case}/trajectory"]).abs().max() > 1e-3


def test_caches_of_a_joint_adapter_over_four_steps(model, vae):
    """The official generate(kv_cache=True) takes text and image from the sight of a condition, whatever its adapter was
    trained for; so does cached="independent". Both caches against the run without one: the page's table."""
    pipe, exact, final = golden_pipe(model, vae), TRAJECTORY["two/final"], {}
    for field in ("independent", "first_step"):
        controls: list[Control] = [replace(c, **{field: True}) for c in TRAJECTORY_CASES["two"]]
        assert not any(c.adapter.config.independent for c in TRAJECTORY_CASES["two"])
        _, final[field] = draw(pipe, "two", controls)
    equal(final["independent"], TRAJECTORY["two_kv/final"])
    assert 0.05 < difference(final["first_step"], exact) < 0.5 * difference(final["independent"], exact)


# Training


TRAIN_CASES: dict[str, tuple[str, Sees]] = {
    "aligned": ("canny", "main"),
    "aligned_independent": ("canny", "self"),
    "subject": ("subject", "main"),
    "compact_shifted": ("canny", "main"),
    "two_shared_adapter": ("canny", "main"),
    "integration": ("canny", "main"),
}


def test_every_training_step_of_the_file_has_a_case():
    assert set(TRAIN_CASES) == {name.split("/")[0] for name in TRAIN}


@pytest.mark.parametrize("case", TRAIN_CASES)
def test_loss_and_gradients_of_a_training_step_equal_the_official_trainer(model, case):
    adapter, sees = TRAIN_CASES[case]
    config = OminiConfig(independent=sees == "self")
    given = {n.removeprefix(f"{case}/"): x for n, x in TRAIN.items() if n.startswith(f"{case}/")}
    loras = {name: LoRA.from_tensors(lora.tensors()) for name, lora in LORAS.items()}
    # Guidance 1 for every branch, whatever the model is asked for later.
    run = Run(model, 1, GRID, TRAJECTORY["pooled"], torch.ones(1), CONFIG["transformer"]["in_channels"])
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
    found = model(noisy, TRAJECTORY["text"], torch.zeros(TEXT_TOKENS, 3), conditions=conditions)
    equal(found, given["prediction"])
    x0 = given["x_t"] - t * target
    equal(add_noise(x0, x0 + target, t), given["x_t"], atol=1e-6)
    loss = flow_loss(found, x0, x0 + target, t).mean()
    equal(loss[None], given["loss"])
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in loras[adapter].parameters() if p.grad is not None]).norm()
    equal(norm[None], given["grad_global_norm"], atol=1e-5 * float(norm))
    gradients = {n.removeprefix("grad/"): x for n, x in given.items() if n.startswith("grad/")}
    assert gradients
    for name, expected in gradients.items():
        path, side, owner = name.removesuffix(".weight").rsplit(".", 2)
        parameter = {"lora_A": loras[owner].a, "lora_B": loras[owner].b}[side][loras[owner].keys[path]]
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        equal(gradient, expected, atol=1e-5 * float(norm))


def test_a_control_of_strength_zero_is_left_out_as_the_official_bias_log_zero_means(model):
    assert replace(encoded("aligned", 0, "canny"), strength=0.0).at(Step(0, 4, 1.0)) is None
    equal(run(model), GAMMA["out/v1_gamma_0.0"])
