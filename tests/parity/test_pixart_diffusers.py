"""PixArt against diffusers' transformer on tiny random models, and the published files by names and shapes."""

from dataclasses import replace

import pytest
import torch

from condit.backbones.pixart import PRESETS, PixArt, PixArtConfig

TINY = PixArtConfig(
    num_attention_heads=3,
    attention_head_dim=8,
    num_layers=2,
    sample_size=16,
    caption_channels=10,
)
CONFIGS = {
    "alpha_512": TINY,
    "alpha_1024": replace(TINY, sample_size=128),
    "sigma_1024": replace(TINY, sample_size=128, use_additional_conditions=False),
    "own_scale": replace(TINY, interpolation_scale=1.5),
    "patch_4": replace(TINY, patch_size=4, in_channels=3, out_channels=3),
}


def theirs(config: PixArtConfig):
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.num_layers,
        cross_attention_dim=config.dim,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        caption_channels=config.caption_channels,
        interpolation_scale=config.interpolation_scale,  # type: ignore[arg-type]
        use_additional_conditions=config.use_additional_conditions,
    ).eval()


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("latent", [(16, 16), (12, 20)], ids=str)
def test_forward_equals_diffusers_at_any_size_with_padded_text(name, latent):
    torch.manual_seed(0)
    config = CONFIGS[name]
    reference, ours = theirs(config).requires_grad_(False), PixArt(config)
    for parameter in reference.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(reference.state_dict(), strict=True)
    x, text = torch.randn(2, config.in_channels, *latent), torch.randn(2, 7, config.caption_channels)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    t, size = torch.tensor([977, 3]), torch.tensor([[96.0, 160.0], [128.0, 128.0]])
    given = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]} if config.sized else None
    with torch.no_grad():
        expected = reference(x, text, t, given, encoder_attention_mask=mask).sample
        actual = ours(x, t, text, mask, size=size if config.sized else None)
    assert actual.shape == (2, config.out_channels, *latent) and actual.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)  # SDPA may sum in another order


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "pixart-tiny"])
def test_the_published_key_lists_load_strictly(name):
    with torch.device("meta"):
        reference, ours = theirs(PRESETS[name]), PixArt(PRESETS[name])
    assert shapes(ours) == shapes(reference)
    ours.load_state_dict(reference.state_dict(), strict=True, assign=True)
    # As in the index of PixArt-Sigma-XL-2-1024-MS; the 1024 px model of PixArt-alpha has two embedders more.
    assert len(ours.state_dict()) == (611 if name == "pixart-alpha-1024" else 603)
    assert sum(p.numel() for p in ours.parameters()) / 1e6 == pytest.approx(611, abs=2)


def test_the_tiny_preset_is_a_network():
    network = PixArt(PRESETS["pixart-tiny"])
    with torch.no_grad():
        out = network(torch.randn(1, 32, 16, 16), torch.tensor([5]), torch.randn(1, 24, 192))
    assert out.shape == (1, 32, 16, 16)


def test_padded_text_has_no_effect():
    torch.manual_seed(0)
    network, text = PixArt(TINY), torch.randn(1, 7, 10)
    mask, t, x = torch.tensor([[1, 1, 1, 1, 0, 0, 0]]), torch.tensor([500]), torch.randn(1, 4, 8, 8)
    other = text.clone()
    other[:, 4:] += 1
    with torch.no_grad():
        assert torch.equal(network(x, t, text, mask), network(x, t, other, mask))
        assert not torch.equal(network(x, t, text), network(x, t, other))


def test_it_compiles_into_one_graph():
    torch.manual_seed(0)
    config = CONFIGS["alpha_1024"]
    network = PixArt(config).requires_grad_(False)
    given = torch.randn(1, 4, 8, 12), torch.tensor([500]), torch.randn(1, 7, 10), torch.ones(1, 7)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    size = torch.tensor([[64.0, 96.0]])
    torch.testing.assert_close(compiled(*given, size=size), network(*given, size=size), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"size": torch.ones(1, 2)}, "takes no size"), ({"x": torch.zeros(1, 4, 7, 8)}, "multiples of 2")],
)
def test_inputs_that_do_not_fit_raise(change, message):
    given = {"x": torch.zeros(1, 4, 8, 8), "t": torch.tensor([5]), "text": torch.zeros(1, 7, 10), **change}
    with pytest.raises(ValueError, match=message):
        PixArt(TINY)(**given)


def test_size_embedders_want_a_size():
    with pytest.raises(ValueError, match="needs size"):
        PixArt(CONFIGS["alpha_1024"])(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 7, 10))
