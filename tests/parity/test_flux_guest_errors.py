"""What condit.interop refuses on FLUX, and what the message says."""

import copy

import pytest
import torch
from torch import nn

import condit
from condit.backbones.mmdit import MMDiT
from condit.controls.control import Fill
from condit.interop import attach
from condit.weights.files import save_tensors
from flux_guests import PROMPTS, Present, draw, host_of


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
            condit.OminiControl.load(file, guest, "canny")
        for make in (omini, ip_adapter):
            with pytest.raises(ValueError, match=f"loaded for random, whose.*that of {guest.name}.*load"):
                draw(guest, controls=[make(strange).control(pictures(1))])
        with pytest.raises(ValueError, match="adapter.control.*found OminiControl"):
            draw(guest, controls=[omini(guest)])


def test_an_ip_adapter_needs_an_image_encoder(dev, ip_adapter, tmp_path):
    file = save_tensors(tmp_path / "a.safetensors", ip_adapter(dev.ours).tensors())
    with pytest.raises(ValueError, match="has no image encoder"):
        condit.IPAdapter.load(file, attach(dev.theirs))


def test_a_detached_guest_raises(dev, omini, pictures):
    guest = dev.attach()
    adapter = omini(guest)
    control = adapter.control(pictures(1))
    guest.detach()
    for call in (lambda: guest("snow"), lambda: adapter.control(pictures(1))):
        with pytest.raises(ValueError, match="is detached from its pipeline"):
            call()
    with dev.attach() as again:  # the control itself is a value and stays good
        assert torch.equal(draw(again, controls=[control]), draw(again, controls=[omini(again).control(pictures(1))]))


def test_wrong_arguments_raise(dev, table, pictures):
    with dev.attach() as guest:
        with pytest.raises(TypeError, match="num_steps"):
            draw(guest, num_steps=3)
        controls = table["joint"](guest, pictures(2))
        with pytest.raises(ValueError, match="2 references for 1 images"):
            draw(guest, controls=controls)
        with pytest.raises(ValueError, match=r"joint_attention_kwargs \['scale'\].*set_adapters"):
            draw(guest, PROMPTS, controls=controls, joint_attention_kwargs={"scale": 0.5})


def test_group_offloading_raises_with_controls_only(dev):

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


def test_a_transformer_on_several_devices_with_controls_raises(dev):
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
        draw(attach(odd), controls=[Present()])  # without controls it is diffusers' own


def test_borrowed_layers_are_those_an_adapter_is_trained_on(dev, omini):
    assert isinstance(dev.attach().backbone, MMDiT)
    assert set(omini(dev.attach()).lora.keys) == set(omini(dev.ours).lora.keys)
