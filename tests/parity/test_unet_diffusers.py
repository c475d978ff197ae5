"""Our UNet against diffusers' `UNet2DConditionModel`: the same names, the same numbers."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from condit.backbones.unet import PRESETS, UNet, UNetConfig
from condit.nn.lora import LoRA, linear_shapes

SMALL = {
    "sd15": replace(
        PRESETS["sd15"],
        block_out_channels=(8, 16, 24, 24),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
        sample_size=16,
    ),
    "sdxl": replace(
        PRESETS["sdxl"],
        block_out_channels=(8, 16, 24),
        attention_head_dim=(1, 2, 3),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=20,
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=36,
        norm_num_groups=4,
        sample_size=16,
    ),
}
SMALL["sd15-inpainting"] = replace(SMALL["sd15"], in_channels=9)
every_kind = pytest.mark.parametrize("kind", SMALL)


def make_pair(config: UNetConfig) -> tuple[UNet2DConditionModel, UNet]:
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**asdict(config)).eval().requires_grad_(False)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    ours = UNet(config).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def inputs(config: UNetConfig, size: tuple[int, int] = (16, 24)) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    values = {
        "x": torch.randn(2, config.in_channels, *size, generator=g),
        "t": torch.tensor([981, 13]),
        "text": torch.randn(2, 7, config.cross_attention_dim, generator=g),
    }
    if config.addition_embed_type:
        values["pooled"] = torch.randn(2, 12, generator=g)
        values["sizes"] = torch.tensor([[1024, 768, 0, 0, 1024, 1024], [512, 512, 3, 4, 640, 896]])
    return values


def predict(theirs: UNet2DConditionModel, given: dict[str, Tensor]) -> Tensor:
    added = {"text_embeds": given["pooled"], "time_ids": given["sizes"]} if "pooled" in given else None
    return theirs(given["x"], given["t"], given["text"], added_cond_kwargs=added).sample


@every_kind
@pytest.mark.parametrize("size", [(16, 24), (13, 11)])  # the second is halved with a rest
def test_unet_equals_diffusers(kind: str, size: tuple[int, int]):
    theirs, ours = make_pair(SMALL[kind])
    given = inputs(SMALL[kind], size)
    wanted = predict(theirs, given)
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours(**given), wanted, rtol=0, atol=2e-6)  # a 1 x 1 convolution is a matrix product here


@every_kind
def test_text_keys_and_values_can_be_made_once_a_run(kind: str):
    _, ours = make_pair(SMALL[kind])
    given = inputs(SMALL[kind])
    once = ours(**{**given, "text": ours.text_keys_values(given["text"])})
    assert torch.equal(once, ours(**given))


@every_kind
def test_sites_have_the_order_of_diffusers_processors(kind: str):
    theirs, ours = make_pair(SMALL[kind])
    names = [name.removesuffix(".processor") for name in theirs.attn_processors]
    assert [site.path for site in ours.sites] == names
    assert [site.kind for site in ours.sites] == ["self", "cross"] * (len(names) // 2)
    assert [site.index for site in ours.sites] == [i // 2 for i in range(len(names))]


@pytest.mark.parametrize(
    ("name", "tensors", "attentions"),
    [("sd15", 686, 32), ("sd15-inpainting", 686, 32), ("sd21", 686, 32), ("sdxl", 1680, 140)],
)
def test_presets_have_the_names_and_shapes_of_the_published_weights(name: str, tensors: int, attentions: int):
    with torch.device("meta"):
        ours, theirs = UNet(PRESETS[name]), UNet2DConditionModel(**asdict(PRESETS[name]))
    values = {n: tuple(t.shape) for n, t in ours.state_dict().items()}
    assert values == {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
    assert len(values) == tensors
    assert [s.path for s in ours.sites] == [n.removesuffix(".processor") for n in theirs.attn_processors]
    assert len(ours.sites) == attentions


@every_kind
def test_a_lora_reaches_every_linear_as_if_it_were_merged(kind: str):
    _, ours = make_pair(SMALL[kind])
    given = inputs(SMALL[kind])
    # conv_shortcut is a convolution of the resnets; LoRAs of linears leave it alone.
    paths = [
        n.removesuffix(".weight")
        for n, w in ours.state_dict().items()
        if n.endswith(".weight") and (w.ndim == 2 or ".proj_" in n)
    ]
    lora = LoRA(linear_shapes(ours, paths), rank=2)
    assert set(lora.keys) == set(paths)
    g = torch.Generator().manual_seed(2)
    for b in lora.b.values():
        b.data.copy_(0.2 * torch.randn(b.shape, generator=g))
    plain, adapted = ours(**given), ours(**given, lora=lora)
    assert (adapted - plain).abs().max() > 0.01
    merged = UNet(SMALL[kind]).eval()
    merged.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for path, key in lora.keys.items():
            weight = merged.get_parameter(f"{path}.weight")
            weight += (lora.b[key] @ lora.a[key]).reshape(weight.shape)
    torch.testing.assert_close(adapted, merged(**given), rtol=0, atol=2e-5)


def test_unet_compiles_as_one_graph():
    kind = "sdxl"
    levels = {
        "block_out_channels": (8, 16),
        "down_block_types": SMALL[kind].down_block_types[-2:],
        "up_block_types": SMALL[kind].up_block_types[:2],
        "attention_head_dim": 2,
        "transformer_layers_per_block": 1,
    }
    config = replace(SMALL[kind], layers_per_block=1, **levels)  # compiling takes seconds a block
    _, ours = make_pair(config)
    given: dict[str, Any] = {**inputs(config), "text": ours.text_keys_values(inputs(config)["text"])}
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given), ours(**given), rtol=0, atol=1e-5)


def test_sdxl_asks_for_its_pooled_text():
    _, ours = make_pair(SMALL["sdxl"])
    given = inputs(SMALL["sdxl"])
    with pytest.raises(ValueError, match="pooled= and sizes="):
        ours(given["x"], given["t"], given["text"])
