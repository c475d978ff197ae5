"""Guests on diffusers' pipelines on a device: nothing mixes devices, and no step waits (tests/pretend.py)."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiTConfig
from condit.backbones.unet import UNet
from condit.controls.control import Control
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.omini import OminiConfig, OminiControl
from condit.interop import Guest, attach, flux, unet
from device_cases import CURVE, HALF, example, seeded, shaken
from pretend import CudaWatch, PretendDevice, Watch

CONFIG = MMDiTConfig(
    in_channels=8,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
)


class Colours(nn.Module):
    """Stands for an image encoder: mean colours of four quarters."""

    features = 12

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 2).flatten(1) * 4


def ip_control(guest: Guest, picture: Any) -> Control:
    backbone, config = guest.backbone, cast("Any", guest.config)
    with seeded():
        if isinstance(backbone, UNet):
            adapter = IPAdapter.new(UNet(config), IPConfig(12, 3, config.cross_attention_dim))
            adapter._pipe[0] = guest
        else:
            adapter = IPAdapter(IPConfig(12, tokens=3, dim=8, heads=2), backbone.sites, config.dim, guest)
    adapter = shaken(adapter, 0.3).to(guest.device, guest.dtype)
    return adapter.control(picture, strength=0.6, when=CURVE, mask=HALF[:, :32])


def omini_control(guest: Guest, picture: Any) -> Control:
    backbone = guest.backbone
    with seeded():
        adapter = OminiControl.new(backbone, OminiConfig())
    lora = shaken(adapter.lora, 0.3).to(guest.device, guest.dtype)
    return OminiControl(lora, adapter.config, guest).control(picture, strength=0.6)


def reference_only(guest: Guest, picture: Any) -> Control:
    return example("reference_only").ReferenceOnly(picture, 0.6)


GUESTS: dict[str, list[Callable[[Guest, Any], Control]]] = {
    "flux": [ip_control, omini_control, reference_only],
    "sd15": [ip_control, reference_only],
    "sdxl": [ip_control],
}


def drawn(make: dict[str, Any], name: str, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    host = make["flux"](CONFIG, dynamic=True) if name == "flux" else make["sd"](name)
    host.set_progress_bar_config(disable=True)
    guest = attach(host.to(device, dtype), size=(32, 32), image=Colours())
    controls = [control(guest, make["picture"][:, :32]) for control in GUESTS[name]]
    given = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 3, "output_type": "latent"}
    size = {"height": 32, "width": 32}
    return guest("a fox", controls=controls, **given, **size).images


def watched(monkeypatch, watch: Watch) -> None:
    """The predictions of a guest behind its first, which prepares the controls."""
    for kind in (flux.ControlledTransformer, unet.ControlledUNet):
        forward = kind.forward

        def run(self, *args: Any, forward=forward, **given: Any):
            later = self.calls >= getattr(self, "predictions", 1)
            with watch.strict() if later else nullcontext():
                return forward(self, *args, **given)

        monkeypatch.setattr(kind, "forward", run)


@pytest.fixture
def make(make_flux, make_sd, pictures) -> dict[str, Any]:
    return {"flux": make_flux, "sd": make_sd, "picture": pictures(1)[0]}


@pytest.mark.parametrize("name", GUESTS)
def test_a_guest_keeps_to_its_device_and_no_step_waits(make, monkeypatch, name):
    device = PretendDevice()
    with device, torch.no_grad(), monkeypatch.context() as patch:
        watched(patch, device)
        result = drawn(make, name, "meta").cpu()
    assert not device.faults
    with torch.no_grad():
        assert torch.equal(result, drawn(make, name, "cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", GUESTS)
def test_a_guest_runs_on_cuda_and_no_step_waits(make, monkeypatch, name, dtype):
    with torch.no_grad(), monkeypatch.context() as patch:
        watched(patch, CudaWatch())
        result = drawn(make, name, "cuda", dtype).float().cpu()
    assert result.isfinite().all()
