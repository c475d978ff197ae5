"""What diffusers brings along (ControlNets, offloading, quantised layers, LoRA) together with controls on FLUX."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import condit
from condit.backbones.mmdit import MMDiT
from condit.controls.control import Control
from condit.interop import attach
from condit.interop.flux import FluxInputs, borrow, predict, residuals, run_of
from condit.weights.files import save_tensors
from flux_guests import GIVEN, REFERENCE, Colours, Present, close, draw, host_of, noise, shaken


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
def test_every_supported_pipeline_generates_the_same_and_takes_controls(dev, table, pictures, name):
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
        actual = predict(borrow(transformer), given, [Present()])
    close(actual, expected, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-2
    assert len(residuals(borrow(transformer), given)) == 3 * ((double > 0) + (single > 0))


def test_an_offloaded_transformer_generates_the_same(dev, table, pictures):
    """Sequential offloading brings each layer in by a hook of its own; the weights rest on no device."""
    from accelerate import cpu_offload

    transformer = copy.deepcopy(dev.theirs.transformer)
    cpu_offload(transformer, execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in transformer.parameters())
    host = host_of(dev, transformer=transformer)
    with attach(host, size=REFERENCE, image=Colours()) as guest, dev.attach() as plain:
        generated = draw(guest, controls=table["all"](guest, pictures(1)))
        close(generated, draw(plain, controls=table["all"](plain, pictures(1))), atol=1e-6)


def test_in_bfloat16_a_controlled_pipeline_drifts_no_further_than_the_plain_one(
    dev, omini, ip_adapter, pictures, tmp_path
):
    modules: dict[str, Any] = {
        n: copy.deepcopy(m).bfloat16() for n, m in dev.theirs.components.items() if isinstance(m, nn.Module)
    }
    host = host_of(dev, **modules)
    made = omini(dev.ours, independent=True), omini(dev.ours), ip_adapter(dev.ours)
    files = [save_tensors(tmp_path / f"{i}", a.tensors(), {"condit": a.metadata()}) for i, a in enumerate(made)]
    results = []
    for guest in (attach(host, size=REFERENCE, image=Colours()), dev.attach()):
        loaders = condit.OminiControl, condit.OminiControl, condit.IPAdapter
        adapters = [loader.load(file, guest) for loader, file in zip(loaders, files, strict=True)]
        controls = [adapter.control(pictures(1), strength=0.8) for adapter in adapters]
        results.append(draw(guest, controls=controls, latents=noise(1).to(guest.dtype)))
    assert results[0].dtype == torch.bfloat16
    latents = noise(1).bfloat16()
    plain = draw(host, latents=latents)
    close(draw(attach(host), controls=[Present()], latents=latents).float(), plain.float(), atol=0.05)
    # Random weights drift far in 8 bits; controls must not make it worse.
    drift = (plain.float() - draw(dev.theirs)).abs().mean()
    assert (results[0].float() - results[1]).abs().mean() < 1.5 * drift


@pytest.mark.parametrize("form", ["int8", "float8"])
def test_quantised_layers_are_shared_unchanged(dev, omini, pictures, form):
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
    generated = draw(guest, controls=[omini(guest, independent=True).control(pictures(1))])
    assert (plain - draw(dev.theirs)).abs().max() > 1e-2
    assert (generated - plain).abs().max() > 1e-2


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


def test_max_sequence_length_is_that_of_diffusers(dev, caplog):
    start = noise(1)
    how = {"latents": start, "output_type": "latent", **GIVEN, "max_sequence_length": 4}
    found, wanted = (pipe("a red fox in the snow", **how).images for pipe in (dev.ours, dev.theirs))
    assert "reads only the first 4 tokens of this prompt: 'a red fox in the snow'" in caplog.text
    close(found, wanted, atol=1e-4)
    assert (found - draw(dev.ours, "a red fox in the snow")).abs().max() > 1e-3
    with pytest.raises(ValueError, match="max_sequence_length must be 1 to 32.*found 33"):
        draw(dev.ours, max_sequence_length=33)
