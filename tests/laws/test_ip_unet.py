"""What IP-Adapter and InstantStyle keep on UNets (docs/architecture.md, section 5): laws of test_laws.py, and those of
levels, blocks and several references."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from condit.controls.control import Control, Run, Step, When
from condit.controls.instantstyle import BlockScore, InstantStyle, modules_of, preset, probe
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.ip_projectors import Resampler
from condit.controls.ip_reference import IPReference
from condit.controls.style_lora import StyleLoRA
from condit.controls.wrap import Together
from condit.drawing.pipeline import Pipeline
from condit.encoders.image import CLIPImage
from condit.nn.lora import LoRA, linear_shapes

PROMPTS = ["a fox", "a rocket", "snow", "an apple"]


def tower() -> CLIPImage:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8, projection_dim=12,
        )  # fmt: skip
        model = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return CLIPImage(model)


def made(pipe: Pipeline, encoder: CLIPImage, *, plus: bool, seed: int) -> IPAdapter:
    """A random adapter with weights that do something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        projector = Resampler(16, 8, 12, inner=8, heads=2, depth=1, hidden=16, queries=3) if plus else None
        config = IPConfig(16 if plus else 12, 3, 12, combine="concat", feature="hidden" if plus else "embeds")
        adapter = IPAdapter.new(pipe, config, projector=projector).requires_grad_(False)
        for p in adapter.parameters():
            p.add_(0.5 * torch.randn(p.shape))
    adapter._encoder[0] = encoder
    return adapter


@dataclass(frozen=True)
class World:
    pipe: Pipeline
    whole: IPAdapter
    plus: IPAdapter

    def controls(self, name: str, references, **how) -> list[Control]:
        if name == "style":
            return [self.whole.control(references, where=preset("style", self.pipe.backbone), **how)]
        both = name == "both"
        return [a.control(references, **how) for a in (self.whole, self.plus) if both or a is getattr(self, name)]

    def draw(self, controls: Sequence[Control] = (), prompts: str | list[str] = "a fox", **how) -> Tensor:
        given = {"seed": 0, "output_type": "latent", **how}
        return self.pipe(prompts, controls=controls, **given).images


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def world(request, make_latent) -> World:
    pipe, encoder = make_latent(request.param), tower()
    # Of two levels: SDXL's style block exists there, SD 1.5's up_blocks.1 too.
    return World(pipe, made(pipe, encoder, plus=False, seed=1), made(pipe, encoder, plus=True, seed=2))


@pytest.fixture(scope="module")
def references(pictures) -> list[np.ndarray]:
    return pictures(4)


@pytest.fixture(scope="module")
def small(make_latent) -> World:
    """Attention on one level only: tracing takes seconds a layer."""
    from condit.backbones.unet import CROSS_DOWN, CROSS_UP, DOWN, UP

    pipe = make_latent("sd15", down_block_types=(CROSS_DOWN, DOWN), up_block_types=(UP, CROSS_UP))
    return World(pipe, made(pipe, tower(), plus=False, seed=1), made(pipe, tower(), plus=True, seed=2))


every = pytest.mark.parametrize("name", ["whole", "plus", "style", "both"])


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)  # latents of random UNets reach 60


@every
def test_it_acts_and_tells_references_apart(world, references, name):
    one, other = (world.draw(world.controls(name, r)) for r in references[:2])
    assert (one - world.draw()).abs().max() > 1e-2 and (one - other).abs().max() > 1e-4


@every
def test_absent_and_strength_zero_and_out_of_schedule_are_plain_bit_for_bit(world, references, name):
    before, weights = world.draw(), [t.clone() for t in world.pipe.backbone.state_dict().values()]
    world.draw(world.controls(name, references[0]))
    assert torch.equal(world.draw(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights, world.pipe.backbone.state_dict().values(), strict=True))
    for how in ({"strength": 0.0}, {"when": When(0, 0.1)}, {"strength": [0.0]}, {"strength": {"mid_block": 0}}):
        assert torch.equal(world.draw(world.controls(name, references[0], **how)), before)


@every
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_four_references_in_a_batch_equal_four_single_runs(world, references, name, guidance):
    batch = world.draw(world.controls(name, references), PROMPTS, guidance_scale=guidance, seed=10)
    for i, (prompt, reference) in enumerate(zip(PROMPTS, references, strict=True)):
        alone = world.draw(world.controls(name, reference), prompt, guidance_scale=guidance, seed=10 + i)
        close(batch[i : i + 1], alone, 1e-4)


def test_copies_of_a_prompt_share_its_reference(world, references):
    pair = world.draw(world.controls("whole", references[:2]), PROMPTS[:2], num_images_per_prompt=2, seed=10)
    close(pair[1:2], world.draw(world.controls("whole", references[0]), PROMPTS[0], seed=11), 1e-4)
    with pytest.raises(ValueError, match="3 references for 2 images"):
        world.draw(world.controls("whole", references[:3]), PROMPTS[:2])


def test_guidance_in_one_call_equals_two(world, references):
    controls = world.controls("both", references[0])
    close(world.draw(controls), world.draw(controls, guidance_in_one_call=False), 1e-4)


def test_adapters_commute_and_add_up_beside_a_lora(world, references):
    lora = LoRA(linear_shapes(world.pipe.backbone, ("to_q",)), 2)
    with torch.no_grad():
        for b in lora.b.values():
            b.add_(0.2)
    beside = StyleLoRA(lora.requires_grad_(False), frozenset()).control(0.7)
    parts = [*world.controls("both", references[0], strength=0.6), beside]
    drawn = [world.draw(list(order)) for order in permutations(parts)]
    for other in drawn[1:]:
        close(other, drawn[0], 1e-4)
    assert (drawn[0] - world.draw(parts[:2])).abs().max() > 1e-3


def test_keys_and_values_are_projected_once_a_run(world, references):
    counts: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
        for name, module in world.plus.named_modules()
        if name.endswith("to_k_ip") or name == "image_proj"
    ]
    world.draw(world.controls("plus", references[0]), num_inference_steps=5, guidance_scale=5.0)
    for hook in hooks:
        hook.remove()
    # Once with the reference and once without one, for five guided steps.
    assert set(counts.values()) == {2} and len(counts) == 1 + len(world.plus.layers)


# Strength by block and image


def test_a_strength_by_block_is_that_strength_there_and_nothing_elsewhere(world, references):
    block = modules_of(world.pipe.backbone.sites)[1]
    named = world.whole.control(references[0], strength={block: 0.4})
    assert set(named.kv) == {p for p in world.whole.sites if p.startswith(block + ".")}  # type: ignore[attr-defined]
    assert torch.equal(
        world.draw([named]), world.draw([world.whole.control(references[0], strength=0.4, where=f"{block}.*")])
    )
    longest = world.whole.control(references[0], strength={"": 0.4, block: 0.0, f"{block}.transformer_blocks.0": 0.4})
    others = [p for p in world.whole.sites if p.startswith(block + ".") and ".transformer_blocks.0." not in p]
    assert not set(others) & set(longest.kv)  # type: ignore[attr-defined]


def test_each_image_of_a_batch_may_have_its_own_strength(world, references):
    batch = world.draw([world.whole.control(references[:3], strength=[0.2, 0.0, 1.0])], PROMPTS[:3])
    for i, strength in enumerate((0.2, 0.0, 1.0)):
        alone = world.draw([world.whole.control(references[i], strength=strength)], PROMPTS[i], seed=i)
        close(batch[i : i + 1], alone, 1e-4)


def test_a_prefix_ends_at_a_dot(world):
    from condit.controls.ip_reference import strength_at

    assert strength_at({"up_blocks.1": 1.0}, "up_blocks.10.attentions.0") == 0
    assert strength_at({"up_blocks.1": 1.0}, "up_blocks.1.attentions.0") == 1


# Several references


def test_sum_is_two_controls_and_shares_the_weights(world, references):
    one, two = references[:2]
    both = world.whole.control([[one, two]], combine="sum", weights=[0.7, 0.3])
    assert isinstance(both, Together)
    apart = [world.whole.control(one, strength=0.7), world.whole.control(two, strength=0.3)]
    close(world.draw([both]), world.draw(apart), 1e-4)
    assert all(cast("IPReference", part).adapter is world.whole for part in both.inside)


@pytest.mark.parametrize("name", ["whole", "plus"])
def test_the_ways_to_combine_are_what_they_say(world, references, name):
    adapter, (one, two, three) = getattr(world, name), references[:3]
    f = adapter.features([one, two, three])
    empty = adapter.nothing(f)

    def same(control: Control, features: Tensor) -> None:
        expected = adapter.reference(features, empty=empty)
        for path, pair in expected.kv.items():
            for found, wanted in zip(control.kv[path], pair, strict=True):  # type: ignore[attr-defined]
                torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)

    group = [[one, two, three]]
    same(adapter.control(group, combine="mean"), f.mean(0, keepdim=True))
    same(adapter.control(group, combine="mean", weights=[2, 1, 1]), (2 * f[:1] + f[1:2] + f[2:]) / 4)
    same(adapter.control(group, combine="add"), f.sum(0, keepdim=True))
    same(adapter.control(group, combine="add", weights=[2, 0, 1]), 2 * f[:1] + f[2:])
    same(adapter.control(group, combine="subtract"), f[:1] - f[1:].mean(0, keepdim=True))
    same(adapter.control(group, combine="concat"), f[None])
    weighted = adapter.control(group, combine="concat", weights=[1, 0.5, 0])
    whole = adapter.control(group, combine="concat")
    path, n = adapter.sites[0], f.shape[0]
    k, v = weighted.kv[path]  # type: ignore[attr-defined]
    t = v.shape[2] // n
    assert torch.equal(k, whole.kv[path][0]) and not v[:, :, 2 * t :].any()  # type: ignore[attr-defined]
    assert torch.equal(v[:, :, t : 2 * t], 0.5 * whole.kv[path][1][:, :, t : 2 * t])  # type: ignore[attr-defined]
    assert not torch.equal(world.draw([whole]), world.draw([adapter.control(group, combine="mean")]))


def test_combinations_that_cannot_be_are_told(world, references):
    with pytest.raises(ValueError, match="combine must be one of .* found 'max'"):
        world.whole.control(references, combine="max")
    with pytest.raises(ValueError, match="at least two"):
        world.whole.control(references[0], combine="subtract")
    with pytest.raises(ValueError, match="3 weights for 2 references"):
        world.whole.control([references[:2]], combine="sum", weights=[1, 1, 1])
    with pytest.raises(ValueError, match="Give a reference image"):
        world.whole.control()


# Regions


LEFT = np.zeros((36, 44), np.uint8)
LEFT[:, :22] = 255


def test_a_region_of_zeros_is_plain_and_of_ones_is_everywhere_at_odd_sizes_too(world, references):
    how = {"height": 36, "width": 44}  # 9 x 11 latent cells, then 5 x 6
    for value, expected in ((0, []), (255, world.controls("both", references[0]))):
        masked = world.controls("both", references[0], mask=np.full((36, 44), value, np.uint8))
        assert torch.equal(world.draw(masked, **how), world.draw(expected, **how))


def test_a_region_stands_at_its_place_on_every_level(world, references):
    control = world.whole.control(references[0], mask=LEFT)
    run = Run(world.pipe.backbone, 1, (9, 11), torch.zeros(1, 10), None, 4)
    acting = control.prepare(run).at(Step(0, 1, 1.0))
    assert acting is not None
    seen = {}
    for rows, columns in ((9, 11), (5, 6)):
        region = acting.area[rows * columns].view(rows, columns)  # type: ignore[attr-defined,index]
        assert torch.equal(region, region[:1].expand_as(region))  # columns only
        assert region[0, 0] == 1 and region[0, -1] == 0
        seen[columns] = float(region[0].sum()) / columns
    assert seen == pytest.approx({11: 0.5, 6: 0.5})


def test_one_mask_for_each_reference(world, references):
    right = 255 - LEFT
    both = world.whole.control([references[:2]], combine="sum", mask=[LEFT, right])
    apart = [world.whole.control(r, mask=m) for r, m in zip(references[:2], (LEFT, right), strict=True)]
    how = {"height": 36, "width": 44}
    close(world.draw([both], **how), world.draw(apart, **how), 1e-4)
    partly = world.whole.control([references[:2]], combine="sum", mask=[LEFT, None])
    assert partly.inner[1].mask is None  # type: ignore[attr-defined]


# InstantStyle


def test_blocks_that_are_not_there_are_told(world, references):
    xl = world.pipe.backbone.config.addition_embed_type is not None
    # Two levels: SDXL's layout block is not among them; SD 1.5 has no layout preset at all.
    message = "matches none of the .* layers" if xl else "No preset 'layout' for sd15: all, style, style.layout"
    with pytest.raises(ValueError, match=message):
        InstantStyle(world.whole).control(references[0], preset="layout")
    with pytest.raises(ValueError, match="strength names 'mid_blok', which matches no layer"):
        world.whole.control(references[0], strength={"mid_blok": 1.0})


def test_presets_are_told_where_there_are_none(world, make_pipe):
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
        found = probe(
            lambda controls: list(world.draw(controls, PROMPTS[:2])),
            world.whole,
            references[:2],
            style=moved,
            leakage=nothing,
        )
    finally:
        for weight, value in zip(pairs, kept, strict=True):
            weight.copy_(value)  # type: ignore[union-attr,operator]
    assert {score.block for score in found} == set(blocks)
    assert [s.style for s in found] == sorted((s.style for s in found), reverse=True)
    assert found[-1].block == blocks[0] and found[-1].style == 0
    assert all(isinstance(s, BlockScore) and s.n == 4 and s.leakage == 0 and s.style_error >= 0 for s in found)


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
    found = [control.prepare(run).at(Step(0, 3, 1.0)) for control in controls]
    return [control for control in found if control is not None]


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
            found, graphs = compiled(*given, controls=controls, **more)
            close(found, small.pipe.backbone(*given, controls=controls, **more), 1e-5)
    assert graphs == 1


def test_with_one_graph_changing_the_preset_compiles_nothing_and_changes_nothing(small, references, compiled):
    """A block that is off costs what one that is on does, so it is asked for; without it each preset has its graph."""
    blocks = modules_of(small.pipe.backbone.sites)
    given, more = inputs(small)
    for where in (None, f"{blocks[0]}.*", f"{blocks[-1]}.*"):
        once = at_step(small, [small.whole.control(references[0], where=where, one_graph=True)])
        plain = at_step(small, [small.whole.control(references[0], where=where)])
        with torch.no_grad():
            found, graphs = compiled(*given, controls=once, **more)
            assert torch.equal(found, small.pipe.backbone(*given, controls=plain, **more))
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
        told = json.loads(json.dumps(control.describe()))
        assert told["method"] == "IPAdapter" and len(told["reference"]) == 2


def test_a_control_serves_two_runs_of_different_batches(world, references):
    control = world.whole.control(references[0])
    one = world.draw([control])
    world.draw([control], PROMPTS[:2])
    assert torch.equal(world.draw([control]), one)
    assert isinstance(replace(control, strength=0.5), type(control)) and isinstance(world.whole, nn.Module)
