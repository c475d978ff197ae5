"""What condit.interop refuses on Stable Diffusion, and what the message says."""

import copy

import pytest
import torch
from torch import nn

import condit
from condit.controls.ip_adapter import IPAdapter
from condit.controls.omini import OminiConfig, OminiControl
from condit.interop import Guest, attach
from condit.interop.unet import borrow
from sd_guests import PROMPTS, Present, close, draw


def test_what_a_unet_does_not_support_raises_before_sampling(sd_pairs, pictures, make_omini, make_pipe):
    pair = sd_pairs("sd15")
    guest = attach(pair.theirs)
    omini = make_omini(make_pipe(), seed=1).control(pictures(1)[0])
    assert isinstance(omini.adapter, OminiControl) and isinstance(omini.adapter.config, OminiConfig)
    with pytest.raises(ValueError, match="joins tokens to the sequence, and a UNet has none"):
        draw(guest, controls=[omini])
    with pytest.raises(ValueError, match="controls must be made by adapter.control"):
        draw(guest, controls=["style"])
    foreign = sd_pairs("sdxl").controls(sd_pairs("sdxl").ours, "global", pictures(1)[0])
    with pytest.raises(ValueError, match="loaded for sdxl, whose unet is not like that of"):
        draw(guest, controls=foreign)
    foreign = sd_pairs("sdxl").controls(sd_pairs("sdxl").ours, "deadiff", pictures(1)[0])
    with pytest.raises(ValueError, match="DEADiff .* was loaded for sdxl"):
        draw(guest, controls=foreign)
    controls = pair.controls(guest, "global", pictures(3))
    with pytest.raises(ValueError, match="3 references for 2 images"):
        draw(guest, PROMPTS, controls=controls)
    with pytest.raises(ValueError, match=r"cross_attention_kwargs \['scale'\].*set_adapters"):
        draw(guest, controls=[Present()], cross_attention_kwargs={"scale": 0.5})


def test_adapters_of_another_base_or_encoder_raise(sd_pairs, make_deadiff):
    guest = attach(sd_pairs("sd15").theirs)
    with pytest.raises(ValueError, match="made for another base"):
        IPAdapter.load(sd_pairs("sdxl").files["global"], guest, image_encoder=sd_pairs("sdxl").image)
    with pytest.raises(ValueError, match="Was it made for another model|DEADiff was made for"):
        condit.DEADiff.load(sd_pairs("sdxl").files["deadiff"], guest, image_encoder=sd_pairs("sdxl").tower)
    with pytest.raises(ValueError, match="needs image embeddings"):
        IPAdapter.load(sd_pairs("sd15").files["global"], guest)


def test_lora_and_processors_of_diffusers_in_the_unet_raise(sd_pairs):
    host = sd_pairs("sd15").host("StableDiffusionPipeline", unet=copy.deepcopy(sd_pairs("sd15").theirs.unet))
    guest = attach(host)
    host.enable_freeu(0.9, 0.2, 1.2, 1.4)
    draw(guest)  # without controls it is diffusers' own
    with pytest.raises(ValueError, match="FreeU.*disable_freeu"):
        draw(guest, controls=[Present()])
    host.disable_freeu()
    close(draw(guest, controls=[Present()]), draw(sd_pairs("sd15").theirs))

    class Other(nn.Module):
        def forward(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    host.unet.set_attn_processor(Other())
    with pytest.raises(ValueError, match="Other of diffusers.*set_default_attn_processor"):
        draw(guest, controls=[Present()])


def test_other_pipelines_and_networks_are_refused_by_name(sd_pairs):
    pair = sd_pairs("sd15")
    with pytest.raises(ValueError, match="attach takes diffusers' .*StableDiffusionPipeline.*; found Pipeline"):
        attach(pair.ours)
    odd = copy.copy(pair.theirs)
    vars(odd)["unet"] = nn.Identity()
    with pytest.raises(ValueError, match="unet of this StableDiffusionPipeline must be .*UNet2DConditionModel; found"):
        attach(odd)
    unet = copy.deepcopy(pair.theirs.unet)
    unet.register_to_config(class_embed_type="timestep")
    vars(odd)["unet"] = unet
    with pytest.raises(ValueError, match="class_embed_type = 'timestep', which Stable Diffusion's does not have"):
        draw(attach(odd), controls=[Present()])  # without controls it is diffusers' own
    with pytest.raises(ValueError, match=r"multiples of 2; found \(33, 32\)"):
        attach(pair.theirs, size=(33, 32))
    guest = attach(pair.theirs)
    assert isinstance(guest, Guest) and guest.size == (32, 32)


def test_group_offloading_raises_with_controls_only(sd_pairs):
    pair = sd_pairs("sd15")
    unet = copy.deepcopy(pair.theirs.unet)
    unet.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    guest = attach(pair.host("StableDiffusionPipeline", unet=unet))
    assert torch.equal(draw(guest), draw(pair.theirs))
    with pytest.raises(ValueError, match="Group offloading.*enable_model_cpu_offload"):
        draw(guest, controls=[Present()])


def test_the_residuals_of_a_controlnet_must_be_as_many_as_the_skips(sd_pairs):
    backbone = borrow(sd_pairs("sd15").theirs.unet)
    given = torch.randn(1, 4, 16, 16), torch.tensor([5.0]), torch.randn(1, 3, 10)
    with pytest.raises(ValueError, match="zip"):
        backbone(*given, residuals=[torch.zeros(1)] * 2)
