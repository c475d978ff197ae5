"""What every control keeps (docs/architecture.md, section 5), over one table of controls on a random MM-DiT."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from condit.controls.control import Control, Run, Step, When
from condit.nn.streams import Stream, grid_ids
from worlds import LEFT_HALF, PROMPTS, TABLE, World, close, every_adapter, every_control


@pytest.fixture(scope="module")
def world(make_world) -> World:
    return make_world()


@pytest.fixture(scope="module")
def small_world(make_world) -> World:
    """One block of each kind: compiling takes seconds a block."""
    return make_world(blocks=1)


def weights(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [value.clone() for module in modules for value in module.state_dict().values()]


def all_equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@every_control
def test_a_control_changes_the_image_and_distinguishes_references(world, references, name):
    """Without this the laws below would hold for a control that does nothing."""
    one, other = (world.draw(world.controls(name, r)) for r in references[:2])
    plain = world.draw()
    assert (one - plain).abs().max() > 1e-2
    assert (one - other).abs().max() > 1e-3


@every_control
def test_outside_its_part_of_the_schedule_a_control_is_absent(world, references, name):
    never = When(0, 0.1)  # none of three steps ends before 0.1
    assert torch.equal(world.draw(world.controls(name, references[0], when=never)), world.draw())


@every_control
def test_a_control_of_the_second_half_leaves_the_first_half_plain(world, references, name):
    def steps(controls: Sequence[Control]) -> list[Tensor]:
        kept: list[Tensor] = []
        world.draw(controls, num_inference_steps=2, callback_on_step_end=lambda p, i, t, k: kept.append(k["latents"]))
        return kept

    plain, late = steps([]), steps(world.controls(name, references[0], when=When(0.5, 1)))
    assert torch.equal(late[0], plain[0])
    assert not torch.equal(late[1], plain[1])


@every_control
def test_absent_after_present_is_plain_and_no_weight_has_changed(world, references, name):
    before, kept = world.draw(), weights(world.modules)
    world.draw(world.controls(name, references[0], strength=0.7))
    assert torch.equal(world.draw(), before)
    assert all_equal(weights(world.modules), kept)


@every_control
def test_strength_zero_is_plain(world, references, name):
    assert torch.equal(world.draw(world.controls(name, references[0], strength=0.0)), world.draw())


@every_adapter
def test_strength_acts_continuously_around_one(world, references, name):
    """OminiControl at strength 1 runs without a bias, at 1.000001 with one: both must be the same function."""
    one, near = (world.draw(world.controls(name, references[0], strength=s)) for s in (1.0, 1.000001))
    close(near, one, atol=1e-4)


def test_the_papers_strength_acts_continuously_around_one_with_other_controls(world, references):
    """Near 1 the text attends apart from the picture, which must change neither side branches nor caches."""
    one, near = (
        world.draw(
            [
                world.ip.control(references[0], strength=0.6),
                world.joint.control(references[1], strength=s, text_bias=False),
                world.cached.control(references[2], strength=0.6, text_bias=False),
            ]
        )
        for s in (1.0, 1.000001)
    )
    close(near, one, atol=1e-4)


@every_control
def test_a_repeat_is_bit_equal(world, references, name):
    first, second = (world.draw(world.controls(name, references[0], strength=0.8)) for _ in range(2))
    assert torch.equal(first, second)


@every_control
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_row_of_a_batch_with_its_own_reference_equals_its_single_run(world, references, name, guidance):
    batch = world.draw(world.controls(name, references), PROMPTS, guidance_scale=guidance, seed=10)
    for i, (prompt, reference) in enumerate(zip(PROMPTS, references, strict=True)):
        alone = world.draw(world.controls(name, reference), prompt, guidance_scale=guidance, seed=10 + i)
        close(batch[i : i + 1], alone, atol=1e-4)  # matrix products of another batch size sum in another order


@every_control
def test_n_references_and_n_prompts_make_n_images(world, references, name):
    images = world.draw(world.controls(name, references), PROMPTS, output_type="pil")
    assert [image.size for image in images] == [(48, 32)] * 4


@every_control
def test_copies_of_a_prompt_share_its_reference(world, references, name):
    pair = world.draw(world.controls(name, references[:2]), PROMPTS[:2], num_images_per_prompt=2, seed=10)
    alone = world.draw(world.controls(name, references[0]), PROMPTS[0], seed=11)
    close(pair[1:2], alone, atol=1e-4)


@every_control
def test_references_that_do_not_fit_the_batch_are_counted_in_the_error(world, references, name):
    with pytest.raises(ValueError, match="3 references for 2 images"):
        world.draw(world.controls(name, references[:3]), PROMPTS[:2])


@every_control
def test_image_guidance_equal_to_the_text_guidance_changes_nothing(world, references, name):
    controls = world.controls(name, references[0])
    apart, together = world.draw(controls, image_guidance_scale=3.0, guidance_scale=3.0), world.draw(controls)
    close(apart, together, atol=1e-4)  # u + s (t - u) + s (c - t) rounds otherwise than u + s (c - u)


@pytest.mark.parametrize("joint", [None, {}, {"text_bias": False, "strength": 0.5}])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"strength": 0.5},
        {"strength": 1.5},
        {"strength": 1.5, "text_bias": False},
        {"mask": LEFT_HALF},
        {"mask": LEFT_HALF, "strength": 0.5, "text_bias": False},
    ],
)
def test_a_cached_condition_equals_the_uncached_one(world, references, how, joint):
    """Beside a joint condition too: conditions never see each other, so neither may see the other's cached keys."""
    cached, uncached = (world.cached.control(references[0], cached=cached, **how) for cached in (None, False))
    assert cached.prepare(first_run(world)).streams() == () and len(uncached.prepare(first_run(world)).streams()) == 1
    others = [] if joint is None else [world.joint.control(references[1], **joint)]
    close(world.draw([*others, cached]), world.draw([*others, uncached]), atol=1e-5)  # three guided steps of 1e-6 each


def test_side_branches_and_caches_commute(world, references):
    second = world.ip.control(references[2], strength=-0.4)
    controls = [world.ip.control(references[0]), world.cached.control(references[1], strength=0.7), second]
    drawn = [world.draw(order) for order in permutations(controls)]
    for other in drawn[1:]:
        close(other, drawn[0], atol=1e-5)  # sums of three branches in another order


def test_two_joint_conditions_commute(world, references):
    controls = [world.joint.control(references[0], strength=0.6), world.joint.control(references[1], delta=(0, 6))]
    close(world.draw(controls), world.draw(controls[::-1]), atol=1e-5)  # keys in another order


@pytest.mark.parametrize("name", ["ip", "joint", "cached"])
def test_a_region_of_zeros_is_plain_and_of_ones_is_everywhere(world, references, name):
    adapter = getattr(world, name)

    def masked(value: int) -> Tensor:
        return world.draw([adapter.control(references[0], mask=np.full((32, 48), value, np.uint8))])

    assert torch.equal(masked(0), world.draw())
    assert torch.equal(masked(255), world.draw([adapter.control(references[0])]))


@pytest.mark.parametrize("name", ["joint", "cached"])
@pytest.mark.parametrize("text_bias", [True, False])
def test_a_region_of_one_grey_is_a_strength(world, references, name, text_bias):
    adapter, grey = getattr(world, name), np.full((32, 48), 51, np.uint8)
    masked = world.draw([adapter.control(references[0], mask=grey, text_bias=text_bias)])
    close(masked, world.draw([adapter.control(references[0], strength=0.2, text_bias=text_bias)]), atol=1e-5)


@pytest.mark.parametrize("name", ["joint", "cached"])
def test_a_region_acts_more_inside_than_outside(world, references, name):
    """What the inside takes up reaches the outside through the picture's own attention, so not by nothing outside."""
    control = getattr(world, name).control(references[0], mask=LEFT_HALF)
    change = (world.draw([control], num_inference_steps=1) - world.draw(num_inference_steps=1)).abs()
    cells = change.unflatten(1, (4, 6)).mean((0, 1, 3))
    assert cells[:3].mean() > 2 * cells[3:].mean()


# The backbone's forward


def first_run(world: World, batch: int = 1) -> Run:
    text = world.pipe.encode_text(["a fox"] * batch)
    return Run(world.pipe.backbone, batch, (4, 6), text.pooled, None, world.pipe.backbone.config.in_channels)


def inputs(world: World, seed: int = 0) -> tuple[Stream, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    text = world.pipe.encode_text(["a fox"])
    tokens = torch.randn(1, 24, world.pipe.backbone.config.in_channels, generator=g)
    return Stream(tokens, grid_ids(4, 6), torch.tensor([0.7]), text.pooled), text.tokens, torch.zeros(5, 3)


def streams_of(controls: Sequence[Control]) -> list[Stream]:
    return [stream for control in controls for stream in control.streams()]


def at_step(world: World, controls: Sequence[Control]) -> list[Control]:
    results = [control.prepare(first_run(world)).at(Step(0, 3, 1.0)) for control in controls]
    return [control for control in results if control is not None]


@every_adapter
def test_gradients_reach_the_adapter_and_nothing_else(world, references, name):
    adapters = [getattr(world, part) for part in TABLE[name]]
    with torch.no_grad():
        given = at_step(world, world.controls(name, references[0]))
        plain = world.pipe.backbone(*inputs(world), conditions=streams_of(given), controls=given)
    for adapter in adapters:
        adapter.requires_grad_(True)
    try:
        trained = []
        for control in world.controls(name, references[0]):
            if hasattr(control, "kv"):  # a training step projects the features itself, with gradients
                features = world.pipe.image(world.pipe.read_images(references[0], None))
                control = control.adapter.reference(features)  # type: ignore[attr-defined]
            trained.append(control)
        trained = at_step(world, trained)
        out = world.pipe.backbone(*inputs(world), conditions=streams_of(trained), controls=trained)
        close(out, plain, atol=1e-5)  # training attends in the plain form, drawing in the fused one
        out.square().mean().backward()
        for adapter in adapters:
            results = [p.grad for p in adapter.parameters() if p.grad is not None]
            assert results and all(g.isfinite().all() for g in results)
            assert sum(bool(g.any()) for g in results) > len(list(adapter.parameters())) / 2
        others = [p for m in world.modules if m not in adapters for p in m.parameters()]
        assert all(p.grad is None for p in others)
    finally:
        for adapter in adapters:
            adapter.requires_grad_(False)
            adapter.zero_grad(set_to_none=True)


def test_a_lora_acts_on_its_stream_only(world, references):
    """At strength zero nothing of the condition is seen, so a leak of its large LoRA into text or image would show."""
    (joint,) = at_step(world, [world.joint.control(references[0])])
    (stream,) = joint.streams()
    with torch.no_grad():
        plain = world.pipe.backbone(*inputs(world))
        hidden = world.pipe.backbone(*inputs(world), conditions=[replace(stream, log_weight=torch.tensor(0.0).log())])
        seen = world.pipe.backbone(*inputs(world), conditions=[stream])
    close(hidden, plain, atol=1e-5)  # with a bias the kernel sums in another order
    assert (seen - plain).abs().max() > 1e-2


def test_all_controls_compile_into_one_graph_that_serves_every_strength_step_and_reference(small_world, references):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    backbone = small_world.pipe.backbone
    compiled = torch.compile(backbone, fullgraph=True, backend=counter)
    seen = []
    for i, strength in enumerate((0.3, 0.5, 1.7)):
        controls = at_step(small_world, small_world.controls("all", references[i], strength=strength))
        given = {"conditions": streams_of(controls), "controls": controls}
        with torch.no_grad():
            seen.append(compiled(*inputs(small_world, seed=i), **given))
            close(seen[-1], backbone(*inputs(small_world, seed=i), **given), atol=1e-5)
    assert counter.frame_count == 1
    assert not torch.equal(seen[0], seen[1])
