"""StyleID: values computed by hand, the image that is its own style, the layers of the paper."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import condit
from condit.backbones.unet import PRESETS, UNet
from condit.controls.control import Where
from condit.controls.styleid import StyleID
from condit.nn.attention import Call, Site, sdpa

SITE = Site("blocks.0.attn", "joint", 0)


def column(*values: float) -> Tensor:
    """One head of one channel, (1, 1, N, 1)."""
    return torch.tensor(values)[None, None, :, None]


def call(q: Tensor, k: Tensor, v: Tensor, text: int = 0) -> Call:
    return Call(q, k, v, SITE, image=slice(text, q.shape[2]), plain=q, keys=slice(text, k.shape[2]))


def acting(style: tuple[Tensor, ...], content: Tensor | None = None, strength: float = 1.0, **how) -> StyleID:
    queries = {} if content is None else {SITE.path: (content, content, content)}
    memory, weight = {SITE.path: style}, torch.tensor(strength)
    return replace(StyleID("x", **how), memory=memory, queries=queries, weight=weight)  # type: ignore[arg-type]


def test_equations_5_and_6_by_hand():
    """gamma 3 + (1 - gamma) 1 = 2.5 looks up keys 0 and 1: tau 2.5 = 3.75 is the difference of the scores, and the
    second value has the share sigmoid(3.75)."""
    style = column(0.0, 0.0), column(0.0, 1.0), column(0.0, 1.0)
    given = call(column(1.0, 1.0), column(5.0, 5.0), column(9.0, 9.0))
    out = acting(style, column(3.0, 3.0)).around(given, sdpa)
    expected = 1 / (1 + math.exp(-3.75))
    torch.testing.assert_close(out, column(expected, expected))
    half = acting(style, column(3.0, 3.0), strength=0.5).around(given, sdpa)
    torch.testing.assert_close(half, column((expected + 9) / 2, (expected + 9) / 2))
    alone = acting(style).around(given, sdpa)  # without content the image keeps its own queries
    torch.testing.assert_close(alone, column(1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(-1.5))))


@pytest.mark.parametrize("gamma", [0.0, 0.75, 1.0])
def test_an_image_that_is_its_own_style_and_content_is_unchanged_to_the_bit(gamma):
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    given = call(q, k, v)
    out = acting((q, k, v), q, gamma=gamma, temperature=1.0).around(given, sdpa)
    assert torch.equal(out, sdpa(given))
    assert not torch.equal(acting((q, k, v), q, gamma=gamma).around(given, sdpa), sdpa(given))  # tau 1.5


def test_text_in_the_same_softmax_keeps_its_rows_and_its_scores():
    """The image's rows see the text's columns at temperature 1 and the style's at tau."""
    q, k, v, q_s, k_s, v_s = torch.randn(6, 1, 1, 5, 4)
    style = q_s[:, :, 2:], k_s[:, :, 2:], v_s[:, :, 2:]
    given = call(q, k, v, text=2)
    out = acting(style).around(given, sdpa)
    assert torch.equal(out[:, :, :2], sdpa(given)[:, :, :2])
    scores = torch.cat([q @ k[:, :, :2].mT, 1.5 * q @ style[1].mT], -1) / 2
    expected = scores.softmax(-1) @ torch.cat([v[:, :, :2], style[2]], 2)
    torch.testing.assert_close(out[:, :, 2:], expected[:, :, 2:], rtol=0, atol=1e-6)


def test_the_layers_are_the_papers_seventh_to_twelfth_of_the_decoder():
    with torch.device("meta"):
        unet = UNet(PRESETS["sd15"])
    blocks = [f"up_blocks.{i}.attentions.{j}.transformer_blocks.0.attn1" for i in (2, 3) for j in (0, 1, 2)]
    assert StyleID("x").layers(unet) == Where(tuple(blocks))


def test_on_a_transformer_the_second_half_of_the_layers_is_used(make_pipe):
    backbone = make_pipe().backbone
    paths = [site.path for site in backbone.sites]
    assert StyleID("x").layers(backbone).patterns == tuple(paths[len(paths) // 2 :])
    assert StyleID("x").layers(nn.Identity()).patterns == ()


@dataclass(frozen=True)
class Noise:
    trajectory: Tensor


@pytest.mark.parametrize(("shape", "dims"), [((2, 3, 4, 5), (2, 3)), ((2, 20, 3), 1)])
def test_the_start_has_the_styles_statistics_by_channel(shape, dims):
    content, style = torch.randn(1, *shape), 2 * torch.randn(1, *shape) + 1
    start = StyleID.start(Noise(content), Noise(style))  # type: ignore[arg-type]
    torch.testing.assert_close(start.mean(dims), style[0].mean(dims))
    torch.testing.assert_close(start.std(dims), style[0].std(dims), rtol=1e-4, atol=0)


def test_the_content_is_preserved_by_gamma(make_pipe, pictures):
    pipe, (style, content) = make_pipe(), pictures(2)

    def draw(**how) -> Tensor:
        return pipe("a fox", controls=[StyleID(style, **how)], seed=0, output_type="latent").images

    assert torch.equal(draw(content=content, gamma=0.0), draw())
    assert not torch.equal(draw(content=content), draw())
    assert not torch.equal(draw(content=content, gamma=0.25), draw(content=content))


def test_with_merged_tokens_it_acts_and_other_keys_are_refused(make_pipe, pictures):
    pipe = make_pipe()
    merging = condit.TokenMerging(0.5, minimum=0)

    def draw(*controls: condit.Control) -> Tensor:
        return pipe("a fox", controls=controls, seed=0, output_type="latent").images

    styled = draw(merging, StyleID(pictures(2)[0], content=pictures(2)[1]))
    assert torch.isfinite(styled).all() and not torch.equal(styled, draw(merging))
    with pytest.raises(ValueError, match="token merging and another control"):
        draw(merging, condit.StyleAligned(pictures(1)[0]), StyleID(pictures(1)[0]))


@pytest.mark.parametrize("how", [{"gamma": 1.1}, {"strength": 1.5}, {"temperature": 0.0}])
def test_a_value_outside_its_range_is_named(how):
    with pytest.raises(ValueError, match=f"StyleID's {next(iter(how))} must be"):
        condit.StyleID("x", **how)
