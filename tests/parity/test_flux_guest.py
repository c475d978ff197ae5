"""condit.interop: the same controls on diffusers' FLUX pipelines and on condit's own, over one random FLUX.1."""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import condit
from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.controls.control import Control, Fill, When
from condit.drawing.pipeline import Pipeline
from condit.interop import Guest, attach
from condit.interop.flux import FluxInputs, borrow, predict, residuals, run_of
from condit.weights.files import save_tensors

CONFIG = MMDiTConfig(
    in_channels=8,
    num_layers=3,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    axes_dims_rope=(4, 6, 6),
)
REFERENCE = 32, 32  # pixels at which both pipelines read references: 8 x 8 tokens
GRID = 6, 8  # tokens of 4 px
WORDS = 32  # tokens of a prompt
PROMPTS = ["a red fox in the snow", "snow"]
GIVEN = {"height": 24, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.5}


class Colours(nn.Module):
    """Stands for an image encoder: mean colours of four quarters."""

    features = 12

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 2).flatten(1) * 4


@dataclass(frozen=True)
class Pair:
    """diffusers' pipeline and condit's over equal weights."""

    theirs: Any
    ours: Pipeline

    def attach(self) -> Guest:
        return attach(self.theirs, size=REFERENCE, image=Colours())


def shaken(module: nn.Module, scale: float = 0.1) -> nn.Module:
    """Norms of weight one and biases of zero would hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, make_flux) -> dict[str, Pair]:
    found = {}
    for name in ("dev", "schnell"):
        dynamic = name == "dev"
        theirs = make_flux(replace(CONFIG, guidance_embeds=dynamic), dynamic=dynamic)
        shaken(theirs.transformer)
        folder = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(folder)
        parts = condit.load(folder, dtype=torch.float32).parts
        parts.text.limit = WORDS
        found[name] = Pair(theirs, Pipeline(replace(parts, image=Colours())))
    return found


@pytest.fixture(params=["dev", "schnell"])
def pair(request, pairs) -> Pair:
    return pairs[request.param]


@pytest.fixture
def dev(pairs) -> Pair:
    """For what does not depend on the schedule and the guidance embedding."""
    return pairs["dev"]


def host_of(pair: Pair, name: str = "FluxPipeline", **parts: Any) -> Any:
    """Another pipeline of diffusers over the same parts, or others."""
    import diffusers

    given = {k: v for k, v in (pair.theirs.components | parts).items() if v is not None}
    host = getattr(diffusers, name)(**given)
    host.set_progress_bar_config(disable=True)
    return host


Make = Callable[[Any, Sequence[np.ndarray]], list[Control]]


def again(make: Callable) -> Callable:
    """The same adapter for every pipeline: what is random in it is drawn anew from one seed."""

    def seeded(pipe: Any, **how: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make(pipe, **how)

    return seeded


@pytest.fixture(scope="module")
def omini(make_omini) -> Callable:
    return again(make_omini)


@pytest.fixture(scope="module")
def ip_adapter(make_ip) -> Callable:
    return again(make_ip)


@pytest.fixture(scope="module")
def table(omini, ip_adapter) -> dict[str, Make]:
    """Controls of equal adapters for either pipeline, by name; references: one or two pictures."""

    def joint(p, refs, **how):
        return omini(p, seed=6).control(refs, **how)

    def cached(p, refs, **how):
        return omini(p, seed=7, independent=True, delta=(0, -8)).control(refs, **how)

    def ip(p, refs, **how):
        return ip_adapter(p).control(refs, **how)

    return {
        "joint": lambda p, r: [joint(p, r)],
        "cached": lambda p, r: [cached(p, r)],
        "joint_gamma": lambda p, r: [joint(p, r, strength=0.5)],
        "cached_gamma": lambda p, r: [cached(p, r, strength=1.5)],
        "compact": lambda p, r: [omini(p, seed=6, scale=2).control(r)],
        "two_joint": lambda p, r: [joint(p, r), joint(p, r[::-1], delta=(0, 8))],
        "joint_and_cached": lambda p, r: [joint(p, r), cached(p, r[::-1], strength=0.7)],
        "late": lambda p, r: [joint(p, r, when=When(0.5, 1))],
        "ip": lambda p, r: [ip(p, r, strength=0.7)],
        "ip_masked": lambda p, r: [ip(p, r, mask=np.eye(24, 32, dtype=np.uint8)[:, :, None].repeat(3, 2) * 255)],
        "all": lambda p, r: [ip(p, r), cached(p, r), joint(p, r, strength=0.5)],
    }


CASES = (
    "joint cached joint_gamma cached_gamma compact two_joint joint_and_cached late ip ip_masked all".split()  # noqa: SIM905
)


def noise(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, GRID[0] * GRID[1], 8, generator=torch.Generator().manual_seed(seed))


def draw(pipe: Any, prompts: str | list[str] = PROMPTS[0], **given: Any) -> Tensor:
    """Latents of either pipeline or of a guest."""
    batch = 1 if isinstance(prompts, str) else len(prompts)
    named = {"latents": noise(batch), "output_type": "latent", **GIVEN, **given}
    named |= {} if isinstance(pipe, Pipeline) else {"max_sequence_length": WORDS}
    return pipe(prompts, **named).images


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# The same as condit's pipeline


@pytest.mark.parametrize("case", CASES)
def test_a_guest_draws_what_condits_own_pipeline_draws(pair, table, pictures, case):
    references = pictures(2)
    with pair.attach() as guest:
        found = draw(guest, PROMPTS, controls=table[case](guest, references))
    close(found, draw(pair.ours, PROMPTS, controls=table[case](pair.ours, references)), atol=1e-5)
    assert (found - draw(pair.theirs, PROMPTS)).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["joint", "cached", "ip"])
def test_true_guidance_sees_the_empty_reference_beside_the_negative_prompt(pairs, table, pictures, case):
    """On schnell: condit's pipeline has this guidance for models without a distilled one."""
    pair = pairs["schnell"]
    guided = Pipeline(replace(pair.ours.parts, distilled=False))
    references, negative = pictures(2), ["a fox", "in the snow"]
    with pair.attach() as guest:
        controls = table[case](guest, references)
        found = draw(guest, PROMPTS, controls=controls, negative_prompt=negative, true_cfg_scale=3.0)
        unguided = draw(guest, PROMPTS, controls=controls)
    expected = draw(
        guided, PROMPTS, controls=table[case](guided, references), negative_prompt=negative, guidance_scale=3.0
    )
    close(found, expected, atol=1e-4)  # three times the difference of two predictions, four steps
    assert (found - unguided).abs().max() > 1e-2


def test_adapters_load_from_files_for_a_guest_as_for_a_pipeline(dev, omini, ip_adapter, pictures, tmp_path):
    made = omini(dev.ours, seed=8, independent=True), ip_adapter(dev.ours)
    files = [save_tensors(tmp_path / f"{i}", a.tensors(), {"condit": a.metadata()}) for i, a in enumerate(made)]

    def controls(p: Any) -> list[Control]:
        loaders = condit.OminiControl, condit.IPAdapter
        return [loader.load(file, p).control(pictures(1)) for loader, file in zip(loaders, files, strict=True)]

    with condit.interop.attach(dev.theirs, size=REFERENCE, image=Colours()) as guest:
        found = draw(guest, controls=controls(guest))
    close(found, draw(dev.ours, controls=controls(dev.ours)), atol=1e-5)


@pytest.mark.parametrize("case", ["joint", "cached", "ip"])
def test_a_row_of_a_batch_with_its_own_reference_equals_its_single_run(dev, table, pictures, case):
    references, start = pictures(2), noise(4)
    with dev.attach() as guest:
        controls = table[case](guest, references)
        batch = draw(guest, PROMPTS, controls=controls, latents=start, num_images_per_prompt=2)
        for i in range(4):
            alone = table[case](guest, references[i // 2 : i // 2 + 1])
            single = draw(guest, PROMPTS[i // 2], controls=alone, latents=start[i : i + 1])
            close(batch[i : i + 1], single, atol=1e-4)  # matrix products of another batch size sum in another order
    assert (batch[0] - batch[1]).abs().max() > 1e-2


# Plain, and left as it was


def test_without_an_acting_control_a_guest_is_the_plain_pipeline_bit_by_bit(pair, table, pictures, omini):
    def seeded(pipe: Any, kind: str, **given: Any) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return draw(pipe, PROMPTS, latents=None, generator=generator, output_type=kind, **given)

    with pair.attach() as guest:
        adapter = omini(guest)
        absent = [
            [],
            [adapter.control(pictures(1), strength=0.0)],
            [adapter.control(pictures(1), when=When(0, 0.1))],  # none of four steps ends before 0.1
        ]
        for kind in ("latent", "pt"):
            plain = seeded(pair.theirs, kind)
            for controls in absent:
                assert torch.equal(seeded(guest, kind, controls=controls), plain)


def test_the_transformer_itself_predicts_where_no_control_acts(dev, omini, pictures):
    """Which bits cannot tell where both sum in one order. In the second half condit's MM-DiT predicts instead."""
    ran = []
    hook = dev.theirs.transformer.register_forward_hook(lambda *_: ran.append(1))
    counts = []
    with dev.attach() as guest:
        for how in ({"strength": 0.0}, {"when": When(0.5, 1)}, {}):
            draw(guest, controls=[omini(guest).control(pictures(1), **how)])
            counts.append(len(ran))
            ran.clear()
    hook.remove()
    assert counts == [4, 2, 0]


def test_leaving_leaves_the_pipeline_as_it_was(dev, table, pictures):
    pipe = dev.theirs
    before, config = draw(pipe), dict(pipe.config)
    attributes = {name: id(value) for name, value in vars(pipe).items()}
    modules = {path: (id(m), sorted(vars(m))) for path, m in pipe.transformer.named_modules()}
    weights = {name: (id(p), p.clone()) for name, p in pipe.transformer.named_parameters()}
    levels = pipe.scheduler.timesteps.clone()
    with dev.attach() as guest:
        draw(guest, PROMPTS, controls=table["all"](guest, pictures(2)), num_inference_steps=3)
    assert torch.equal(pipe.scheduler.timesteps, levels)
    assert {name: id(value) for name, value in vars(pipe).items()} == attributes and dict(pipe.config) == config
    assert {path: (id(m), sorted(vars(m))) for path, m in pipe.transformer.named_modules()} == modules
    for name, parameter in pipe.transformer.named_parameters():
        assert id(parameter) == weights[name][0] and torch.equal(parameter, weights[name][1])
    assert torch.equal(draw(pipe), before)


def test_the_lent_layers_hold_the_very_parameters_of_the_transformer(dev):
    def ids(module: nn.Module) -> set[int]:
        return {id(p) for p in module.parameters()}

    assert ids(dev.attach().backbone) == ids(dev.theirs.transformer)


def test_two_pipelines_that_share_a_transformer_do_not_see_each_other(dev, table, pictures):
    """Each step of the first draws with the second, plain, and with another guest of the second."""

    other = host_of(dev)
    one, two = dev.attach(), attach(other, size=REFERENCE, image=Colours())
    first, second = table["joint"](one, pictures(2)[:1]), table["cached"](two, pictures(2)[1:])
    alone = draw(one, controls=first), draw(other), draw(two, controls=second)
    seen = []

    def between(*_: Any) -> dict:
        seen.append((draw(other), draw(two, controls=second)))
        return {}

    assert torch.equal(draw(one, controls=first, callback_on_step_end=between), alone[0])
    assert len(seen) == 4
    assert all(torch.equal(a, alone[1]) and torch.equal(b, alone[2]) for a, b in seen)


# What diffusers brings along


class Present(Control):
    """Does nothing, but acts: the prediction is condit's."""


def controlnet(theirs: Any) -> Any:
    from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel

    fields = {k: v for k, v in theirs.transformer.config.items() if not k.startswith("_") and k != "out_channels"}
    fields |= {"num_layers": 1, "num_single_layers": 2}
    return shaken(FluxControlNetModel(**fields).eval().requires_grad_(False), 0.2)


PICTURE = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(2))
MASK = (torch.arange(32) < 16).float().expand(1, 1, 24, 32)
HOSTS = {
    "FluxPipeline": {},
    "FluxImg2ImgPipeline": {"image": PICTURE, "strength": 0.8},
    "FluxInpaintPipeline": {"image": PICTURE, "mask_image": MASK, "strength": 0.8},
    "FluxControlNetPipeline": {"control_image": PICTURE},
    "FluxControlNetImg2ImgPipeline": {"image": PICTURE, "control_image": PICTURE, "strength": 0.8},
    "FluxControlNetInpaintPipeline": {
        "image": PICTURE,
        "mask_image": MASK,
        "control_image": PICTURE,
        "strength": 0.8,
    },
}


@pytest.mark.parametrize("name", HOSTS)
def test_every_host_draws_the_same_by_condits_prediction_and_takes_controls(dev, table, pictures, name):
    host = host_of(dev, name, controlnet=controlnet(dev.theirs) if "ControlNet" in name else None)

    def call(pipe: Any, **given: Any) -> Tensor:
        start = torch.Generator().manual_seed(4)
        return draw(pipe, latents=None, generator=start, **{**HOSTS[name], **given})

    with attach(host, size=REFERENCE, image=Colours()) as guest:
        plain = call(host)
        assert torch.equal(call(guest), plain)
        close(call(guest, controls=[Present()]), plain, atol=1e-5)
        controlled = call(guest, controls=table["all"](guest, pictures(1)))
    assert (controlled - plain).abs().max() > 1e-2
    if "ControlNet" in name:
        assert (plain - call(host, controlnet_conditioning_scale=0.0)).abs().max() > 1e-2


@pytest.mark.parametrize("true_cfg_scale", [1.0, 3.0])
def test_a_controlnet_and_a_control_add_up_under_true_guidance(dev, true_cfg_scale):
    host = host_of(dev, "FluxControlNetPipeline", controlnet=controlnet(dev.theirs))
    given = {"control_image": PICTURE, "negative_prompt": "snow", "true_cfg_scale": true_cfg_scale}

    class Both(Present):
        def negative(self) -> Control:
            return self

    def call(pipe: Any, **more: Any) -> Tensor:  # the code of the control image is drawn too
        return draw(pipe, generator=torch.Generator().manual_seed(4), **given, **more)

    close(call(attach(host), controls=[Both()]), call(host), atol=1e-4)  # guidance times three


def inputs_of(transformer: Any, **more: Any) -> FluxInputs:
    g = torch.Generator().manual_seed(5)
    c = transformer.config
    ids = torch.stack([torch.zeros(6), torch.arange(6) // 3, torch.arange(6) % 3], -1)
    return FluxInputs(
        hidden_states=torch.randn(2, 6, c.in_channels, generator=g),
        encoder_hidden_states=torch.randn(2, 4, c.joint_attention_dim, generator=g),
        pooled_projections=torch.randn(2, c.pooled_projection_dim, generator=g),
        timestep=torch.tensor([0.7, 0.7]),
        img_ids=ids,
        txt_ids=torch.zeros(4, 3),
        guidance=torch.tensor([3.5, 3.5]) if c.guidance_embeds else None,
        **more,
    )


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize(("double", "single"), [(1, 2), (2, 3), (3, 1), (0, 2), (2, 0)])
def test_the_residuals_of_a_controlnet_arrive_where_diffusers_adds_them(dev, double, single, repeat):
    transformer, g = dev.theirs.transformer, torch.Generator().manual_seed(6)
    samples = [torch.randn(2, 6, 32, generator=g) for _ in range(double + single)]
    given = inputs_of(
        transformer,
        controlnet_block_samples=samples[:double] or None,
        controlnet_single_block_samples=samples[double:] or None,
        controlnet_blocks_repeat=repeat,
        return_dict=False,
    )
    with torch.no_grad():
        (expected,) = transformer(**vars(given))
        plain = transformer(**vars(inputs_of(transformer))).sample
        (found,) = predict(borrow(transformer), given, [Present()])
    close(found, expected, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-2
    assert len(residuals(borrow(transformer), given)) == 3 * ((double > 0) + (single > 0))


def test_an_offloaded_transformer_draws_the_same(dev, table, pictures):
    """Sequential offloading brings each layer in by a hook of its own; the weights rest on no device."""
    from accelerate import cpu_offload

    transformer = copy.deepcopy(dev.theirs.transformer)
    cpu_offload(transformer, execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in transformer.parameters())
    host = host_of(dev, transformer=transformer)
    with attach(host, size=REFERENCE, image=Colours()) as guest, dev.attach() as plain:
        found = draw(guest, controls=table["all"](guest, pictures(1)))
        close(found, draw(plain, controls=table["all"](plain, pictures(1))), atol=1e-6)


def test_in_bfloat16_a_controlled_pipeline_drifts_no_further_than_the_plain_one(
    dev, omini, ip_adapter, pictures, tmp_path
):
    modules: dict[str, Any] = {
        n: copy.deepcopy(m).bfloat16() for n, m in dev.theirs.components.items() if isinstance(m, nn.Module)
    }
    host = host_of(dev, **modules)
    made = omini(dev.ours, independent=True), omini(dev.ours), ip_adapter(dev.ours)
    files = [save_tensors(tmp_path / f"{i}", a.tensors(), {"condit": a.metadata()}) for i, a in enumerate(made)]
    found = []
    for guest in (attach(host, size=REFERENCE, image=Colours()), dev.attach()):
        loaders = condit.OminiControl, condit.OminiControl, condit.IPAdapter
        adapters = [loader.load(file, guest) for loader, file in zip(loaders, files, strict=True)]
        controls = [adapter.control(pictures(1), strength=0.8) for adapter in adapters]
        found.append(draw(guest, controls=controls, latents=noise(1).to(guest.dtype)))
    assert found[0].dtype == torch.bfloat16
    latents = noise(1).bfloat16()
    plain = draw(host, latents=latents)
    close(draw(attach(host), controls=[Present()], latents=latents).float(), plain.float(), atol=0.05)
    # Random weights drift far in 8 bits; controls must not make it worse.
    drift = (plain.float() - draw(dev.theirs)).abs().mean()
    assert (found[0].float() - found[1]).abs().mean() < 1.5 * drift


@pytest.mark.parametrize("form", ["int8", "float8"])
def test_quantised_layers_are_lent_as_they_are(dev, omini, pictures, form):
    """int8: layers of another class, packed weights; float8: weights that a hook on each layer casts for its use."""
    transformer = copy.deepcopy(dev.theirs.transformer)
    if form == "int8":
        with warnings.catch_warnings(action="ignore"):
            transformer = torch.ao.quantization.quantize_dynamic(transformer, {nn.Linear}, torch.qint8)
    else:
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    host = host_of(dev, transformer=transformer)
    guest, plain = attach(host, size=REFERENCE), draw(host)
    close(draw(guest, controls=[Present()]), plain, atol=1e-5)
    found = draw(guest, controls=[omini(guest, independent=True).control(pictures(1))])
    assert (plain - draw(dev.theirs)).abs().max() > 1e-2
    assert (found - plain).abs().max() > 1e-2


def test_the_hook_that_brings_a_whole_transformer_in_runs_at_every_step(dev, table, pictures):
    """The hook of enable_model_cpu_offload, which needs an accelerator; here one that counts."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        before = after = 0

        def pre_forward(self, module, *args, **kwargs):
            self.before += 1
            return args, kwargs

        def post_forward(self, module, output):
            self.after += 1
            return output

    count = Count()
    host = host_of(dev, transformer=copy.deepcopy(dev.theirs.transformer))
    add_hook_to_module(host.transformer, count)
    draw(attach(host, size=REFERENCE), controls=table["cached"](attach(host, size=REFERENCE), pictures(1)))
    assert count.before == count.after == 4


def test_a_lora_of_diffusers_acts_on_text_and_image_and_never_on_a_condition(dev, omini, pictures):
    peft = pytest.importorskip("peft")

    transformer = copy.deepcopy(dev.theirs.transformer)
    targets = ["x_embedder", "to_q", "to_v", "proj_mlp", "ff.net.0.proj", "norm1.linear"]
    transformer.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    host = host_of(dev, transformer=transformer)
    styled, plain = attach(host, size=REFERENCE), dev.attach()
    close(draw(styled, controls=[Present()]), draw(host), atol=1e-5)
    assert (draw(host) - draw(dev.theirs)).abs().max() > 1e-2
    memories = []
    for guest in (styled, plain):
        control = omini(guest, independent=True).control(pictures(1))
        backbone = guest.backbone
        assert isinstance(backbone, MMDiT)
        run = run_of(backbone, inputs_of(dev.theirs.transformer))
        with torch.no_grad():
            memories.append(control.prepare(run).memory)
    for path, (k, v) in memories[0].items():
        assert torch.equal(k, memories[1][path][0]) and torch.equal(v, memories[1][path][1])


def test_a_compiled_transformer_is_taken(dev):

    host = host_of(dev)
    host.transformer = torch.compile(host.transformer, backend="eager")
    plain = draw(dev.theirs)
    guest = attach(host)
    close(draw(guest, controls=[Present()]), plain, atol=1e-5)
    close(draw(guest), plain, atol=1e-5)


def test_a_callback_may_stop_a_guest(dev, table, pictures):
    seen = []

    def stop(pipe: Any, i: int, *_: Any) -> dict:
        seen.append(i)
        pipe._interrupt = True
        return {}

    with dev.attach() as guest:
        draw(guest, controls=table["joint"](guest, pictures(1)), callback_on_step_end=stop)
        assert seen == [0] and len(draw(guest)) == 1


# What is refused


def test_another_pipeline_is_refused_by_name(dev):
    with pytest.raises(ValueError, match="attach takes diffusers' FluxPipeline, .*; found Pipeline"):
        attach(dev.ours)
    with pytest.raises(ValueError, match="found FluxTransformer2DModel"):
        attach(dev.theirs.transformer)
    odd = copy.copy(dev.theirs)
    vars(odd)["transformer"] = nn.Identity()
    with pytest.raises(ValueError, match="must be diffusers' FluxTransformer2DModel; found Identity"):
        attach(odd)


def test_a_size_that_is_no_grid_of_tokens_is_refused(dev):
    with pytest.raises(ValueError, match=r"multiples of 4; found \(32, 30\)"):
        attach(dev.theirs, size=(32, 30))
    assert attach(dev.theirs).size == (256, 256)  # 128 latent pixels of 2


def test_an_adapter_of_another_base_is_refused(dev, make_pipe, omini, ip_adapter, pictures, tmp_path):
    strange = make_pipe()
    file = save_tensors(tmp_path / "a.safetensors", omini(strange).tensors())
    with dev.attach() as guest:
        with pytest.raises(ValueError, match="Was it made for another model"):
            condit.OminiControl.load(file, guest)
        for make in (omini, ip_adapter):
            with pytest.raises(ValueError, match=f"loaded for random, whose.*that of {guest.name}.*load"):
                draw(guest, controls=[make(strange).control(pictures(1))])
        with pytest.raises(ValueError, match="adapter.control.*found OminiControl"):
            draw(guest, controls=[omini(guest)])


def test_an_ip_adapter_needs_an_image_encoder(dev, ip_adapter, tmp_path):
    file = save_tensors(tmp_path / "a.safetensors", ip_adapter(dev.ours).tensors())
    with pytest.raises(ValueError, match="has no image encoder"):
        condit.IPAdapter.load(file, attach(dev.theirs))


def test_a_guest_that_has_left_says_so(dev, omini, pictures):
    guest = dev.attach()
    adapter = omini(guest)
    control = adapter.control(pictures(1))
    guest.detach()
    for call in (lambda: guest("snow"), lambda: adapter.control(pictures(1))):
        with pytest.raises(ValueError, match="is detached from its pipeline"):
            call()
    with dev.attach() as again:  # the control itself is a value and stays good
        assert torch.equal(draw(again, controls=[control]), draw(again, controls=[omini(again).control(pictures(1))]))


def test_wrong_arguments_are_told(dev, table, pictures):
    with dev.attach() as guest:
        with pytest.raises(TypeError, match="num_steps"):
            draw(guest, num_steps=3)
        controls = table["joint"](guest, pictures(2))
        with pytest.raises(ValueError, match="2 references for 1 images"):
            draw(guest, controls=controls)
        with pytest.raises(ValueError, match=r"joint_attention_kwargs \['scale'\].*set_adapters"):
            draw(guest, PROMPTS, controls=controls, joint_attention_kwargs={"scale": 0.5})


def test_group_offloading_is_refused_beside_controls_only(dev):

    transformer = copy.deepcopy(dev.theirs.transformer)
    transformer.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    host = host_of(dev, transformer=transformer)
    guest = attach(host)
    assert torch.equal(draw(guest), draw(dev.theirs))
    with pytest.raises(ValueError, match="Group offloading.*enable_model_cpu_offload"):
        draw(guest, controls=[Present()])


def test_controls_that_leave_cells_out_or_adapt_the_noisy_tokens_are_refused(dev):
    class Adapting(Present):
        def lora(self):
            return None

    class Filling(Present):
        def fill(self):
            return Fill(torch.zeros(1, 4, 4), torch.eye(2, dtype=torch.bool))

    for control in (Adapting(), Filling()):
        with pytest.raises(ValueError, match="a guest does not"):
            draw(dev.attach(), controls=[control])


def test_a_transformer_on_several_devices_is_refused_beside_controls(dev):
    transformer = copy.deepcopy(dev.theirs.transformer)
    transformer._parallel_config = object()
    with pytest.raises(ValueError, match="split over devices"):
        draw(attach(host_of(dev, transformer=transformer)), controls=[Present()])


def test_a_transformer_of_another_shape_of_configuration_is_refused(dev):
    odd = copy.copy(dev.theirs)
    transformer = copy.deepcopy(dev.theirs.transformer)
    transformer.register_to_config(pooled_layers=2)
    vars(odd)["transformer"] = transformer
    with pytest.raises(ValueError, match="'pooled_layers', which FLUX.1's does not"):
        attach(odd)


def test_borrowed_layers_are_those_an_adapter_is_trained_on(dev, omini):
    assert isinstance(dev.attach().backbone, MMDiT)
    assert set(omini(dev.attach()).lora.keys) == set(omini(dev.ours).lora.keys)
