"""controls/style_lora.py: a LoRA on text and image, beside conditions that keep to their own."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from condit.controls.control import When
from condit.controls.omini import OminiControl
from condit.controls.omini_tasks import TARGETS
from condit.controls.style_lora import StyleLoRA
from condit.drawing.pipeline import Pipeline
from condit.drawing.settings import Settings
from condit.nn.lora import Linear, LoRA, linear_shapes
from condit.weights.files import save_tensors


@pytest.fixture(scope="module")
def pipe(make_pipe) -> Pipeline:
    return make_pipe(guidance_embeds=True)


def style_of(pipe: Pipeline, *, alpha: float | None = None, seed: int = 9) -> StyleLoRA:
    """On every linear of the model."""
    g = torch.Generator().manual_seed(seed)
    paths = [path for path, module in pipe.backbone.named_modules() if isinstance(module, Linear)]
    lora = LoRA(linear_shapes(pipe.backbone, paths), 2, alpha)
    for parameter in lora.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    return StyleLoRA(lora.requires_grad_(False), frozenset(linear_shapes(pipe.backbone, TARGETS)))


@pytest.fixture(scope="module")
def style(pipe) -> StyleLoRA:
    return style_of(pipe)


def merged(
    pipe: Pipeline, style: StyleLoRA, strength: float = 1.0, *, without: frozenset[str] = frozenset()
) -> Pipeline:
    """The pipeline with the LoRA in its weights, but for some paths."""
    backbone = copy.deepcopy(pipe.backbone)
    for path, key in style.lora.keys.items():
        if path not in without:
            linear = backbone.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            linear.weight += strength * style.lora.scales[path] * style.lora.b[key] @ style.lora.a[key]
    return Pipeline(replace(pipe.parts, backbone=backbone))


def draw(pipe: Pipeline, controls=(), **how) -> Tensor:
    return pipe("a fox", controls=controls, **{"seed": 0, "output_type": "latent", **how}).images


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)  # guided steps; x W + x A B against x (W + A B)


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.5])
def test_a_style_equals_its_merged_weights(pipe, style, strength):
    generated = draw(pipe, [style.control(strength)])
    close(generated, draw(merged(pipe, style, strength)))
    assert (generated - draw(pipe)).abs().max() > 1e-2


def test_alpha_scales_the_update(pipe):
    style = style_of(pipe, alpha=1.0)
    close(draw(pipe, [style.control()]), draw(merged(pipe, style)))
    close(draw(pipe, [style.control()]), draw(pipe, [style_of(pipe).control(0.5)]))


def test_two_styles_add_up_in_any_order(pipe, style):
    other = style_of(pipe, seed=10)
    both = [style.control(0.5), other.control(0.3)]
    close(draw(pipe, both), draw(merged(merged(pipe, style, 0.5), other, 0.3)))
    close(draw(pipe, both[::-1]), draw(pipe, both))


def test_strength_zero_outside_its_schedule_and_afterwards_the_model_is_plain(pipe, style):
    plain, kept = draw(pipe), [value.clone() for value in pipe.backbone.state_dict().values()]
    assert torch.equal(draw(pipe, [style.control(0.0)]), plain)
    assert torch.equal(draw(pipe, [style.control(when=When(0, 0.1))]), plain)
    assert not torch.equal(draw(pipe, [style.control(when=When(0.5, 1))]), plain)
    assert torch.equal(draw(pipe), plain)
    assert all(torch.equal(a, b) for a, b in zip(kept, pipe.backbone.state_dict().values(), strict=True))


# Beside OminiControl


@pytest.mark.parametrize("independent", [False, True])
def test_conditions_keep_to_their_own_lora(pipe, style, make_omini, pictures, independent):
    """What a condition shows is the same with a style and without, as its keys are."""
    control = make_omini(pipe, independent=True).control(pictures(1), cached=None if independent else False)
    keys = []
    for controls in ([control], [style.control(), control]):
        settings = pipe.settle(Settings(height=32, width=48, guidance_scale=3.0), "a fox", "pt")
        layout = pipe.layout(1, (32, 48))
        side, _ = pipe.sides(pipe.model.conditions("a fox", None, settings), controls, layout, settings)
        ready = side.controls[-1]
        keys.append(ready.memory if independent else ready.streams()[0].lora)
    if independent:
        assert all(torch.equal(a, b) for p in keys[0] for a, b in zip(keys[0][p], keys[1][p], strict=True))
    else:
        assert keys[0] is keys[1]


@pytest.mark.parametrize("cached", [None, False])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_official_form_leaks_where_omini_adapts_nothing(pipe, style, make_omini, pictures, cached, strength):
    """Leaking everywhere outside the gate is what merged weights do; inside it the style keeps to text and image."""
    adapter = make_omini(pipe, independent=True)
    control = adapter.control(pictures(1), cached=cached)
    generated = draw(pipe, [control, style.control(strength, official=True)])
    outside = merged(pipe, style, strength, without=style.gated)
    inside = copy.deepcopy(style)
    for path in [p for p in inside.lora.keys if p not in inside.gated]:
        del inside.lora.keys[path]
    again = OminiControl(adapter.lora, adapter.config, outside).control(pictures(1), cached=cached)
    close(generated, draw(outside, [again, inside.control()]))  # factor 1 in the gate, whatever the strength
    strict = draw(pipe, [control, style.control(strength)])
    assert (generated - strict).abs().max() > 1e-3


def test_the_official_form_ignores_alpha_inside_the_gate(pipe, make_omini, pictures):
    styles = [style_of(pipe, alpha=alpha) for alpha in (None, 8.0)]
    for style in styles:
        for path in [p for p in style.lora.keys if p not in style.gated]:
            del style.lora.keys[path]
    first, second = (draw(pipe, [style.control(official=True)]) for style in styles)
    assert torch.equal(first, second)
    assert styles[1].lora.scales["x_embedder"] == 4  # the adapter itself is as it was


def test_the_official_form_knows_no_schedule(style):
    with pytest.raises(ValueError, match="has no schedule"):
        style.control(official=True, when=When(0, 0.5))


# Files


def test_a_saved_style_loads_with_its_description(pipe, style, tmp_path):
    file = save_tensors(tmp_path / "style.safetensors", style.lora.tensors())
    again = StyleLoRA.load(file, pipe)
    assert again.gated == style.gated and again.hash
    assert torch.equal(draw(pipe, [again.control(0.5)]), draw(pipe, [style.control(0.5)]))
    described = again.control(0.5).describe()
    assert (described["method"], described["strength"], described["hash"]) == ("StyleLoRA", 0.5, again.hash)


def test_a_style_of_another_model_is_refused(pipe, tmp_path):
    lora = LoRA({"x_embedder": (32, 64)}, 2)
    file = save_tensors(tmp_path / "style.safetensors", lora.tensors())
    with pytest.raises(ValueError, match=r"'x_embedder' of shape \(32, 64\).*made for another model"):
        StyleLoRA.load(file, pipe)


def test_a_kohya_file_generates_what_its_weights_generate(pipe, tmp_path):
    """qkv of one block in kohya's names: three layers of ours."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 32), 0.3 * torch.randn(96, 2)
    name = "lora_unet_double_blocks_1_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(1.0)}
    style = StyleLoRA.load(save_tensors(tmp_path / "kohya.safetensors", tensors), pipe)
    backbone = copy.deepcopy(pipe.backbone)
    update = 0.5 * b @ a
    for i, part in enumerate(("to_q", "to_k", "to_v")):
        linear = backbone.get_submodule(f"transformer_blocks.1.attn.{part}")
        assert isinstance(linear, nn.Linear)
        linear.weight += update[32 * i : 32 * (i + 1)]
    close(draw(pipe, [style.control()]), draw(Pipeline(replace(pipe.parts, backbone=backbone))))
