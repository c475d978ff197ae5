"""IP-Adapter on transformers, FLUX (XLabs) and SD 3.5 (InstantX): the adapters of golden/ip_adapter in the spellings
that were published. lab/src/condit_lab/parity/ip_adapter.py compares them with diffusers.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from condit_lab.parity.check import difference, part
from condit_lab.parity.ip_adapter import flux_adapter, flux_of, recorded_sd3

FOLDER = Path(__file__).parent / "golden" / "ip_adapter"
SD3 = load_file(FOLDER / "dit_sd3.safetensors")


@pytest.mark.parametrize("spelling", ["diffusers", "xlabs"])
def test_xlabs_flux_adapter_is_recognised_by_its_tensors(spelling):
    model, t = flux_of(FOLDER, "dit_flux")
    file = part(t, "adapter/")
    if spelling == "xlabs":
        file = {xlabs(name): x for name, x in file.items()}
    adapter = flux_adapter(model, file, t["image_embeds"].shape[-1])
    assert adapter.config.form == "residual" and adapter.config.tokens == 4
    assert difference(adapter.tokens(t["image_embeds"]), t["image_tokens"].flatten(1, 2)) <= 1e-5
    published = flux_adapter(model, part(t, "adapter/"), t["image_embeds"].shape[-1]).state_dict()
    assert all(torch.equal(x, published[name]) for name, x in adapter.state_dict().items())


def xlabs(name: str) -> str:
    """The name as XLabs publishes it."""
    for kind in ("k", "v"):
        if f".to_{kind}_ip." in name:
            number, ending = name.split(".")[1], name.split(".")[-1]
            return f"double_blocks.{number}.processor.ip_adapter_double_stream_{kind}_proj.{ending}"
    return name.replace("image_proj.", "ip_adapter_proj_model.")


def official(name: str) -> str:
    """The name as InstantX publishes SD 3.5's projector."""
    for theirs, ours in (
        ("0.norm1", "ln0"), ("0.norm2", "ln1"), ("0.to_out", "attn.to_out.0"), ("0.to_q", "attn.to_q"),
        ("0.to_kv", "attn.to_kv"), ("1.0", "adaln_norm"), ("1.1", "ff.net.0.proj"), ("1.3", "ff.net.2"),
        ("2.1", "adaln_proj"),
    ):  # fmt: skip
        if name.startswith("image_proj.layers.") and f".{ours}." in name:
            return name.replace(f".{ours}.", f".{theirs}.")
    return name


@pytest.mark.parametrize("spelling", ["diffusers", "instantx"])
def test_an_sd3_adapter_is_read_in_both_spellings(spelling):
    file = part(SD3, "adapter_diffusers/")
    if spelling == "instantx":
        assert any(official(n) != n for n in file)
        file = {official(n): t for n, t in file.items()}
    adapter = recorded_sd3(FOLDER, file)
    tokens, clock = adapter.tokens(SD3["image_hidden"], SD3["timestep"])
    assert difference(tokens, SD3["image_tokens"]) <= 1e-5 and difference(clock, SD3["time_emb"]) <= 1e-5
    assert set(adapter.state_dict()) == set(part(SD3, "adapter_diffusers/"))
