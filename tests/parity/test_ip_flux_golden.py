"""diffusers' FLUX IP-Adapter is the "add" act of a control; golden/ip_adapter holds tensors written by diffusers."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from condit.controls.control import Control
from condit.nn.attention import Call, Site, join_heads, sdpa, split_heads
from condit.nn.streams import Stream
from condit_lab.parity.check import difference
from condit_lab.parity.ip_adapter import flux_of

MODEL, T = flux_of(Path(__file__).parent / "golden" / "ip_adapter", "dit_flux")


@dataclass(frozen=True)
class AddedPrompt(Control):
    """h + scale * softmax(q K'^T / sqrt(d)) V' after every double block, q normalised and without positions."""

    scale: float
    heads: int

    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        name = f"adapter/ip_adapter.{site.index}"
        if f"{name}.to_k_ip.weight" not in T:
            return None
        tokens = T["image_tokens"].flatten(1, 2)
        k, v = (
            split_heads(tokens @ T[f"{name}.{part}.weight"].mT + T[f"{name}.{part}.bias"], self.heads)
            for part in ("to_k_ip", "to_v_ip")
        )
        return self.scale * join_heads(sdpa(Call(query, k, v, site)))


@pytest.mark.parametrize("scale", [None, 0, 0.5, 1])
def test_a_residual_control_equals_diffusers_flux_ip_adapter(scale):
    image = Stream(T["hidden_states"], T["img_ids"], T["timestep"], T["pooled"], T["guidance"])
    controls = () if scale is None else (AddedPrompt(scale, MODEL.config.num_attention_heads),)
    with torch.no_grad():
        out = MODEL(image, T["encoder_hidden_states"], T["txt_ids"], controls=controls)
    expected = T["out/no_adapter" if scale is None else f"out/scale_{scale}"]
    assert difference(out, expected) <= 1e-5  # SDPA may sum in another order on another machine
