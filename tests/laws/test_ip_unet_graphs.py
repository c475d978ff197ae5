"""InstantStyle's presets on UNets, gradients, and one graph for strengths, references and blocks."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from condit.controls.control import Control, Run, Step
from condit.controls.instantstyle import BlockScore, InstantStyle, modules_of, preset, probe
from ip_unet_world import PROMPTS, World, close


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def world(request, make_latent) -> World:
    return World.of(make_latent(request.param))


@pytest.fixture(scope="module")
def small(make_latent) -> World:
    """Attention on one level only: tracing takes seconds a layer."""
    from condit.backbones.unet import CROSS_DOWN, CROSS_UP, DOWN, UP

    pipe = make_latent("sd15", down_block_types=(CROSS_DOWN, DOWN), up_block_types=(UP, CROSS_UP))
    return World.of(pipe)


# InstantStyle


def test_blocks_that_are_not_there_raise(world, references):
    xl = world.pipe.backbone.config.addition_embed_type is not None
    # Two levels: SDXL's layout block is not among them; SD 1.5 has no layout preset at all.
    message = "matches none of the .* layers" if xl else "No preset 'layout' for sd15: all, style, style.layout"
    with pytest.raises(ValueError, match=message):
        InstantStyle(world.whole).control(references[0], preset="layout")
    with pytest.raises(ValueError, match="strength names 'mid_blok', which matches no layer"):
        world.whole.control(references[0], strength={"mid_blok": 1.0})


def test_a_model_without_presets_raises(world, make_pipe):
    with pytest.raises(ValueError, match="No preset 'mood'"):
        preset("mood", world.pipe.backbone)
    with pytest.raises(ValueError, match="No preset for MMDiT: .*probe"):
        preset("style", make_pipe().backbone)


def test_the_probe_ranks_blocks_by_what_they_do(world, references):
    """The measures are arguments. Here: how far the picture moves at all is its style, leakage is nought; so the block
    that moves it most must come first, and one with V' = 0 last."""
    blocks = modules_of(world.pipe.backbone.sites)
    plain = world.draw([], PROMPTS[:2])

    def moved(pictures: Sequence[Tensor], reference) -> list[float]:
        return [float((p - q).abs().mean()) for p, q in zip(pictures, plain, strict=True)]

    def nothing(pictures: Sequence[Tensor], reference) -> list[float]:
        return [0.0] * len(pictures)

    dead = [layer for layer in world.whole.layers if layer.path.startswith(blocks[0])]
    pairs = [world.whole.ip_adapter[str(layer.number)].to_v_ip.weight for layer in dead]
    kept = [weight.clone() for weight in pairs]  # type: ignore[union-attr,operator]
    for weight in pairs:
        weight.zero_()  # type: ignore[union-attr,operator]
    try:
        scores = probe(
            lambda controls: list(world.draw(controls, PROMPTS[:2])),
            world.whole,
            references[:2],
            style=moved,
            leakage=nothing,
        )
    finally:
        for weight, value in zip(pairs, kept, strict=True):
            weight.copy_(value)  # type: ignore[union-attr,operator]
    assert {score.block for score in scores} == set(blocks)
    assert [s.style for s in scores] == sorted((s.style for s in scores), reverse=True)
    assert scores[-1].block == blocks[0] and scores[-1].style == 0
    assert all(isinstance(s, BlockScore) and s.n == 4 and s.leakage == 0 and s.style_error >= 0 for s in scores)


def test_a_reference_can_act_against_itself_on_the_negative_side(world, references):
    """Without guidance nothing of it is left; with it the picture moves away."""
    away = world.whole.control(references[0], against="*")
    assert torch.equal(world.draw([away], guidance_scale=1.0), world.draw(guidance_scale=1.0))
    assert not torch.equal(world.draw([away], guidance_scale=5.0), world.draw(guidance_scale=5.0))


# The backbone's forward


def inputs(world: World, seed: int = 0) -> tuple[tuple, dict]:
    g = torch.Generator().manual_seed(seed)
    c = world.pipe.backbone.config
    more = {}
    if c.addition_embed_type:
        more = {"pooled": torch.randn(1, 10, generator=g), "sizes": torch.full((1, 6), 32.0)}
    text = torch.randn(1, 5, c.cross_attention_dim, generator=g)
    return (torch.randn(1, c.in_channels, 8, 8, generator=g), torch.tensor([500.0]), text), more


def at_step(world: World, controls: Sequence[Control]) -> list[Control]:
    run = Run(world.pipe.backbone, 1, (8, 8), torch.zeros(1, 10), None, 4)
    results = [control.prepare(run).at(Step(0, 3, 1.0)) for control in controls]
    return [control for control in results if control is not None]


@pytest.mark.parametrize("name", ["whole", "plus"])
def test_gradients_reach_the_adapter_and_nothing_else(world, references, name):
    adapter = getattr(world, name)
    given, more = inputs(world)
    features = adapter.features(references[:1])
    adapter.requires_grad_(True)
    try:
        controls = at_step(world, [adapter.reference(features, empty=adapter.nothing(features))])
        world.pipe.backbone(*given, controls=controls, **more).square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in adapter.ip_adapter.parameters())
        assert any(p.grad is not None and bool(p.grad.any()) for p in adapter.image_proj.parameters())
        assert all(p.grad is None for p in world.pipe.backbone.parameters())
    finally:
        adapter.requires_grad_(False)
        adapter.zero_grad(set_to_none=True)


@pytest.fixture
def compiled(small) -> Callable:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")  # the graph is what is asked about; its code costs minutes
    run = torch.compile(small.pipe.backbone, fullgraph=True, backend=counter)
    return lambda *given, **more: (run(*given, **more), counter.frame_count)


def test_strengths_references_masks_and_steps_share_one_graph(small, references, compiled):
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    for i, (strength, region) in enumerate(((0.3, mask), (1.7, 255 - mask), (-0.5, mask))):
        given, more = inputs(small, i)
        controls = at_step(small, small.controls("both", references[i], strength=strength, mask=region))
        with torch.no_grad():
            actual, graphs = compiled(*given, controls=controls, **more)
            close(actual, small.pipe.backbone(*given, controls=controls, **more), 1e-5)
    assert graphs == 1


def test_with_one_graph_changing_the_preset_compiles_nothing_and_changes_nothing(small, references, compiled):
    """A block that is off costs what one that is on does, so it is asked for; without it each preset has its graph."""
    blocks = modules_of(small.pipe.backbone.sites)
    given, more = inputs(small)
    for where in (None, f"{blocks[0]}.*", f"{blocks[-1]}.*"):
        once = at_step(small, [small.whole.control(references[0], where=where, one_graph=True)])
        plain = at_step(small, [small.whole.control(references[0], where=where)])
        with torch.no_grad():
            actual, graphs = compiled(*given, controls=once, **more)
            assert torch.equal(actual, small.pipe.backbone(*given, controls=plain, **more))
        assert graphs == 1
    by_block = at_step(small, [small.whole.control(references[0], strength={blocks[0]: 0.3}, one_graph=True)])
    with torch.no_grad():
        assert compiled(*given, controls=by_block, **more)[1] == 1


def test_otherwise_each_choice_of_blocks_compiles_once(small, references, compiled):
    """A preset holds no K', V' of other blocks, so theirs is another graph: one for each choice, not for each use. In a
    pipeline both sides of guidance hold the same blocks."""
    blocks = modules_of(small.pipe.backbone.sites)
    given, more = inputs(small)
    graphs = []
    for i, where in enumerate((None, f"{blocks[0]}.*", None, f"{blocks[0]}.*")):
        controls = at_step(small, [small.whole.control(references[i], where=where, strength=0.5 + i)])
        with torch.no_grad():
            graphs.append(compiled(*given, controls=controls, **more)[1])
    assert graphs == [1, 2, 2, 2]


def test_a_preset_holds_no_keys_of_other_blocks(world, references):
    style = world.whole.control(references[0], where=preset("style", world.pipe.backbone))
    kept = preset("style", world.pipe.backbone).patterns[0].removesuffix("*")
    for held in (style, style.negative()):
        assert held.kv and all(path.startswith(kept) for path in held.kv)
    assert len(style.kv) < len(world.whole.sites)


def test_a_recipe_can_be_written(world, references):
    for how in ({}, {"strength": [0.5]}, {"strength": {"mid_block": 0.5}}, {"combine": "sum"}):
        control = world.whole.control([references[:2]], **how)
        recipe = json.loads(json.dumps(control.describe()))
        assert recipe["method"] == "IPAdapter" and len(recipe["reference"]) == 2


def test_a_control_serves_two_runs_of_different_batches(world, references):
    control = world.whole.control(references[0])
    one = world.draw([control])
    world.draw([control], PROMPTS[:2])
    assert torch.equal(world.draw([control]), one)
    assert isinstance(replace(control, strength=0.5), type(control)) and isinstance(world.whole, nn.Module)
