"""What IP-Adapter and InstantStyle keep on UNets (docs/architecture.md, section 5): laws of test_laws.py, and those of
levels, blocks and several references."""

from itertools import permutations
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from condit.controls.control import Control, Run, Step, When
from condit.controls.instantstyle import modules_of
from condit.controls.ip_reference import IPReference
from condit.controls.style_lora import StyleLoRA
from condit.controls.wrap import Together
from condit.nn.lora import LoRA, linear_shapes
from ip_unet_world import PROMPTS, World, close, every


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def world(request, make_latent) -> World:
    return World.of(make_latent(request.param))


@every
def test_a_control_changes_the_image_and_distinguishes_references(world, references, name):
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


def test_adapters_commute_and_add_up_with_a_lora(world, references):
    lora = LoRA(linear_shapes(world.pipe.backbone, ("to_q",)), 2)
    with torch.no_grad():
        for b in lora.b.values():
            b.add_(0.2)
    style = StyleLoRA(lora.requires_grad_(False), frozenset()).control(0.7)
    parts = [*world.controls("both", references[0], strength=0.6), style]
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
            for actual, wanted in zip(control.kv[path], pair, strict=True):  # type: ignore[attr-defined]
                torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-5)

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


def test_combinations_that_cannot_be_raise(world, references):
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


def test_a_region_has_the_same_place_on_every_level(world, references):
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
