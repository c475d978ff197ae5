"""What diffusers brings along (ControlNets, offloading, 8-bit layers, LoRA) with controls on Stable Diffusion."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import condit
from condit.controls.style_lora import StyleLoRA
from condit.encoders.image import TextTower
from condit.interop import attach
from condit.interop.unet import PIPELINES
from sd_guests import GIVEN, PROMPTS, Present, close, diffusers, draw, every_kind, noise, shaken


def controlnet(unet: Any) -> Any:
    torch.manual_seed(3)
    made = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))  # halves once
    return shaken(made.eval(), 0.2)  # it starts with layers of zeros


PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
MASK = (torch.arange(32) < 16).float().expand(1, 1, 32, 32)


def arguments_of(name: str) -> dict[str, Any]:
    """The arguments of a kind of pipeline."""
    change = "Img2Img" in name or "Inpaint" in name
    arguments: dict[str, Any] = {"image": PICTURE, "strength": 0.8} if change else {"latents": noise(1)}
    if "Inpaint" in name:
        arguments |= {"mask_image": MASK, "height": 32, "width": 32}
    if "ControlNet" in name:
        arguments["control_image" if change else "image"] = PICTURE
    return arguments | ({"image": PICTURE} if "Adapter" in name else {})


def parts(name: str, unet: Any) -> dict[str, Any]:
    """The networks that a kind of pipeline has beside its UNet."""
    if "ControlNet" in name:
        return {"controlnet": controlnet(unet)}
    if "Adapter" not in name:
        return {}
    torch.manual_seed(3)
    # Features of the size of the UNet's levels; SDXL's first level has no attention and gives half its size.
    kind, factor = ("full_adapter_xl", 4) if "XL" in name else ("full_adapter", 2)
    adapter = diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=factor, adapter_type=kind)
    return {"adapter": shaken(adapter.eval(), 0.1)}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_supported_pipeline_generates_the_same_and_takes_controls(sd_pairs, pictures, name):
    pair = sd_pairs("sdxl" if "XL" in name else "sd15")
    host = pair.host(name, **parts(name, pair.theirs.unet))

    def call(pipe: Any, **given: Any) -> Tensor:
        start = torch.Generator().manual_seed(4)
        return pipe(
            "a red fox", generator=start, **{**GIVEN, "num_inference_steps": 4, **arguments_of(name), **given}
        ).images

    with attach(host) as guest:
        plain = call(host)
        assert torch.equal(call(guest), plain)
        close(call(guest, controls=[Present()]), plain)
        controlled = call(guest, controls=pair.controls(guest, "all", pictures(1)[0]))
    assert (controlled - plain).abs().max() > 1e-2
    assert torch.equal(call(host), plain)
    if "ControlNet" in name or "Adapter" in name:
        scale = f"{'controlnet' if 'ControlNet' in name else 'adapter'}_conditioning_scale"
        assert (plain - call(host, **{scale: 0.0})).abs().max() > 1e-2


@every_kind
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_controlnet_adds_up_with_controls_in_each_of_its_modes(sd_pairs, pictures, kind, guess, guidance):
    """Guess mode leaves the negative side alone; a LoRA makes the sides run apart."""
    pair, xl = sd_pairs(kind), "XL" if kind == "sdxl" else ""
    host = pair.host(f"StableDiffusion{xl}ControlNetPipeline", controlnet=controlnet(pair.theirs.unet))
    given = {"image": PICTURE, "guess_mode": guess, "guidance_scale": guidance, "prompts": PROMPTS}
    none = pair.controls(guest := attach(host), "global", pictures(1)[0], strength=1e-9)
    lora = [StyleLoRA.load(pair.files["lora"], guest).control(1e-9)]
    plain = draw(host, **given)
    close(draw(guest, controls=[Present()], **given), plain)
    close(draw(guest, controls=[*none, *lora], **given), plain)


def test_a_lora_of_diffusers_acts_together_with_controls(sd_pairs, pictures):
    peft = pytest.importorskip("peft")
    pair = sd_pairs("sd15")
    unet = copy.deepcopy(pair.theirs.unet)
    targets = ["to_q", "to_v", "ff.net.0.proj", "proj_in", "time_emb_proj"]
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    host = pair.host("StableDiffusionPipeline", unet=unet)
    close(draw(attach(host), controls=[Present()]), draw(host))
    assert (draw(host) - draw(pair.theirs)).abs().max() > 1e-2
    guest = attach(host)
    both = draw(guest, controls=pair.controls(guest, "all", pictures(1)[0]))
    assert (both - draw(host)).abs().max() > 1e-2


def test_an_offloaded_unet_generates_the_same(sd_pairs, pictures):
    """Sequential offloading brings each layer in by a hook of its own; the weights rest on no device."""
    from accelerate import cpu_offload

    pair = sd_pairs("sdxl")
    unet = copy.deepcopy(pair.theirs.unet)
    cpu_offload(unet, execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in unet.parameters())
    with attach(pair.host("StableDiffusionXLPipeline", unet=unet)) as guest, attach(pair.theirs) as plain:
        generated = draw(guest, controls=pair.controls(guest, "all", pictures(1)[0]))
        close(generated, draw(plain, controls=pair.controls(plain, "all", pictures(1)[0])))


def test_layers_stored_in_8_bits_are_shared_unchanged(sd_pairs, pictures):
    """A hook on each layer casts its weights for its use."""
    pair = sd_pairs("sd15")
    unet = copy.deepcopy(pair.theirs.unet)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    host = pair.host("StableDiffusionPipeline", unet=unet)
    guest, plain = attach(host), draw(host)
    close(draw(guest, controls=[Present()]), plain)
    assert guest.dtype == torch.float32
    assert (draw(guest, controls=pair.controls(guest, "all", pictures(1)[0])) - plain).abs().max() > 1e-2


def test_a_compiled_unet_is_taken(sd_pairs):
    host = sd_pairs("sd15").host("StableDiffusionPipeline")
    host.unet = torch.compile(host.unet, backend="eager")
    close(draw(attach(host), controls=[Present()]), draw(sd_pairs("sd15").theirs))


def test_words_are_subtracted_by_sdxls_own_text_tower(sd_pairs, pictures):
    pair = sd_pairs("sdxl")
    guest = attach(pair.theirs)
    style = condit.InstantStyle.load(pair.files["global"], guest, image_encoder=pair.image)
    assert isinstance(style.text, TextTower) and style.text.model is pair.theirs.text_encoder_2
    other = condit.InstantStyle.load(pair.files["global"], pair.ours, image_encoder=pair.image)
    words = {"content": "a fox", "content_scale": 0.5}
    actual, expected = (s.control(pictures(1)[0], **words) for s in (style, other))
    path = next(iter(actual.kv))  # type: ignore[attr-defined]
    close(actual.kv[path][0], expected.kv[path][0])  # type: ignore[attr-defined]
    plain = style.control(pictures(1)[0])
    assert not torch.equal(actual.kv[path][0], plain.kv[path][0])  # type: ignore[attr-defined]
    alone = condit.InstantStyle.load(
        sd_pairs("sd15").files["global"], attach(sd_pairs("sd15").theirs), image_encoder=pair.image
    )
    assert alone.text is None  # SD 1.x has no projection


@every_kind
def test_deadiffs_content_layers_may_read_another_prompt(sd_pairs, pictures, kind):
    pair, latents = sd_pairs(kind), []
    for pipe in (attach(pair.theirs), pair.ours):
        controls = pair.controls(pipe, "deadiff", pictures(1)[0], content_prompt="snow")
        latents.append(draw(pipe, controls=controls))
    close(*latents)
    guest = attach(pair.theirs)
    assert (latents[0] - draw(guest, controls=pair.controls(guest, "deadiff", pictures(1)[0]))).abs().max() > 1e-3
