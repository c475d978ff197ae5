"""What every control keeps, for DEADiff on a random UNet behind the whole latent pipeline."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from condit.backbones.unet import CROSS_DOWN, CROSS_UP
from condit.controls.control import Control, Run, Step, When
from condit.controls.deadiff import DEADiff
from condit.controls.instantstyle import InstantStyle
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.style_lora import StyleLoRA
from condit.drawing.pipeline import Pipeline
from condit.encoders.image import CLIPImage
from condit.nn.lora import LoRA, linear_shapes

PROMPTS = ["a fox", "a rocket", "snow", "an apple"]
# Which references a control of the table takes, and how.
TABLE: dict[str, dict] = {
    "style": {"style": 0},
    "content": {"content": 0},
    "both": {"style": 0, "content": 1},
    "attention": {"style": 0, "acts": "attention"},
    "mixed": {"style": (0, 1), "weights": [0.4, 0.6]},
}
LEFT_HALF = np.zeros((32, 48), np.uint8)
LEFT_HALF[:, :24] = 255
every_control = pytest.mark.parametrize("name", ["style", "both", "attention", "mixed"])


class World:
    """A pipeline of some ten thousand weights with its adapter and six pictures."""

    def __init__(self, pipe: Pipeline, adapter: DEADiff):
        self.pipe, self.adapter, self.tower = pipe, adapter, adapter.tower
        self.pictures = list(np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3), dtype=np.uint8))

    def control(self, name: str, first: int = 0, rows: int | None = None, **how) -> Control:
        """The control of a row of the table with references from number `first` on; `rows`: one of each picture."""

        def chosen(value, row: int):
            chosen_pictures = [
                self.pictures[(v + first + row) % 6] for v in (value if isinstance(value, tuple) else (value,))
            ]
            return chosen_pictures if isinstance(value, tuple) else chosen_pictures[0]

        given = {**TABLE[name], **how}
        for part in ("style", "content"):
            if part in TABLE[name]:
                results = [chosen(TABLE[name][part], row) for row in range(rows or 1)]
                given[part] = results if rows or isinstance(TABLE[name][part], tuple) else results[0]
        return self.adapter.control(**given)

    def draw(self, controls: Sequence[Control] = (), prompts: str | list[str] = "a fox", **how) -> Tensor:
        return self.pipe(prompts, controls=controls, **{"seed": 0, "output_type": "latent", **how}).images


@pytest.fixture(scope="module")
def world(make_latent, make_deadiff) -> World:
    pipe = make_latent()
    return World(pipe, make_deadiff(pipe))


@pytest.fixture(scope="module")
def small_world(make_latent, make_deadiff) -> World:
    """One level: compiling takes seconds a layer."""
    one_level = {"down_block_types": (CROSS_DOWN,), "up_block_types": (CROSS_UP,)}
    pipe = make_latent(block_out_channels=(8,), **one_level)
    return World(pipe, make_deadiff(pipe))


def weights(world: World) -> list[Tensor]:
    modules = (world.pipe.backbone, world.pipe.parts.vae, world.adapter, world.tower)
    return [value.clone() for module in modules for value in module.state_dict().values()]


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@every_control
def test_a_control_changes_the_image_and_distinguishes_references(world, name):
    one, other = (world.draw([world.control(name, first)]) for first in (0, 2))
    assert (one - world.draw()).abs().max() > 1e-2
    assert (one - other).abs().max() > 1e-3


@every_control
def test_outside_its_part_of_the_schedule_a_control_is_absent(world, name):
    never = When(0, 0.1)  # none of three steps ends before 0.1
    assert torch.equal(world.draw([world.control(name, when=never)]), world.draw())


@every_control
def test_absent_after_present_is_plain_and_no_weight_has_changed(world, name):
    before, kept = world.draw(), weights(world)
    world.draw([world.control(name, strength=0.7)])
    assert torch.equal(world.draw(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights(world), kept, strict=True))


def test_attention_of_no_weight_is_plain(world):
    assert torch.equal(world.draw([world.control("attention", strength=0.0)]), world.draw())


@every_control
def test_a_repeat_is_bit_equal(world, name):
    first, second = (world.draw([world.control(name, strength=0.8)]) for _ in range(2))
    assert torch.equal(first, second)


@every_control
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_row_of_a_batch_with_its_own_reference_equals_its_single_run(world, name, guidance):
    batch = world.draw([world.control(name, rows=4)], PROMPTS, guidance_scale=guidance, seed=10)
    for i, prompt in enumerate(PROMPTS):
        alone = world.draw([world.control(name, first=i)], prompt, guidance_scale=guidance, seed=10 + i)
        close(batch[i : i + 1], alone, atol=1e-4)  # matrix products of another batch size sum in another order


@every_control
def test_guidance_in_one_call_equals_two_calls(world, name):
    control = world.control(name, strength=0.8)
    one, two = (world.draw([control], guidance_in_one_call=together) for together in (True, False))
    close(one, two, atol=1e-4)  # another batch size


@every_control
def test_copies_of_a_prompt_share_its_reference(world, name):
    pair = world.draw([world.control(name, rows=2)], PROMPTS[:2], num_images_per_prompt=2, seed=10)
    close(pair[1:2], world.draw([world.control(name)], PROMPTS[0], seed=11), atol=1e-4)


@every_control
def test_references_that_do_not_fit_the_batch_are_counted_in_the_error(world, name):
    with pytest.raises(ValueError, match="3 references for 2 images"):
        world.draw([world.control(name, rows=3)], PROMPTS[:2])


def test_a_mask_of_another_shape_raises_before_sampling(world):
    for mask in (LEFT_HALF[:, :32], np.full((32, 32), 255, np.uint8), np.zeros((32, 32), np.uint8)):
        with pytest.raises(ValueError, match="a mask of 32 x 32 .* for an image of 8 x 12 tokens"):
            world.draw([world.control("both", mask=mask)])
    with pytest.raises(ValueError, match="masks must have the same size"):
        world.control("both", mask=[LEFT_HALF, np.full((16, 16), 255, np.uint8)])


@every_control
def test_image_guidance_equal_to_the_text_guidance_changes_nothing(world, name):
    control = world.control(name)
    apart = world.draw([control], image_guidance_scale=3.0, guidance_scale=3.0)
    close(apart, world.draw([control], guidance_scale=3.0), atol=1e-4)  # rounds otherwise


@pytest.mark.parametrize("name", ["style", "both"])
def test_a_region_of_zeros_is_plain_and_of_ones_is_everywhere(world, name):
    def masked(value: int) -> Tensor:
        return world.draw([world.control(name, mask=np.full((32, 48), value, np.uint8))])

    everywhere = world.draw([world.control(name)])
    assert torch.equal(masked(255), everywhere)
    # A negative side of zero tokens is left out too: nothing is left of the control.
    assert torch.equal(masked(0), world.draw())
    assert (masked(100) - everywhere).abs().max() > 1e-4


def test_a_region_acts_more_inside_than_outside(world):
    one_step = {"num_inference_steps": 1, "guidance_scale": 1.0}
    change = (world.draw([world.control("both", mask=LEFT_HALF)], **one_step) - world.draw(**one_step)).abs()
    columns = change.mean((0, 1, 2))
    # The picture's own attention carries it on, so not by nothing outside (by layer: unit/test_deadiff.py).
    assert columns[:4].mean() > 1.3 * columns[8:].mean()


def test_controls_commute(world):
    """One softmax for all of them: their keys in another order."""
    controls = [world.control("style"), world.control("content", first=1, strength=0.6)]
    close(world.draw(controls), world.draw(controls[::-1]), atol=5e-5)  # latents reach 10


def test_style_and_content_apart_without_empty_tokens_equal_both_in_one(world):
    apart = [world.control("style", empty="absent"), world.control("content", first=1, empty="absent")]
    close(world.draw(apart), world.draw([world.control("both")]), atol=1e-5)


# The UNet's forward


def first_run(world: World) -> Run:
    return Run(world.pipe.backbone, 1, (8, 12), torch.zeros(1, 1), None, 4)  # type: ignore[arg-type]


def at_step(world: World, control: Control) -> Control:
    active = control.prepare(first_run(world)).at(Step(0, 3, 1.0))
    assert active is not None
    return active


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, 8, 12, generator=g), torch.tensor([500.0]), torch.randn(1, 5, 12, generator=g)


@pytest.mark.parametrize("sets", [("style",), ("content",), ("style", "content")])
def test_gradients_reach_the_adapter_and_nothing_else(world, sets):
    """Of the set that is not shown neither the Q-Former nor the maps."""
    adapter = world.adapter.requires_grad_(True)
    try:
        image = world.tower(torch.stack([adapter.read(world.pictures[0])]))
        control = adapter.reference({name: adapter.ask(name, image) for name in sets}).prepare(first_run(world))
        world.pipe.backbone(*inputs(), controls=[control]).square().mean().backward()
        reached = {name.split(".")[0] for name, p in adapter.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {*sets, "unet"}
        for path, name in control.table.items():
            grads = [p.grad for p in adapter.maps(path).parameters()]
            assert all(bool(g is not None and g.any()) == (name in sets) for g in grads)
        others = (world.pipe.backbone, world.pipe.parts.vae, world.tower)
        assert all(p.grad is None for module in others for p in module.parameters())
    finally:
        adapter.requires_grad_(False)
        adapter.zero_grad(set_to_none=True)


@pytest.mark.parametrize("acts", ["keys-values", "attention"])
def test_one_graph_serves_every_strength_reference_and_mask(small_world, acts):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")  # the graphs are counted; lowering them takes as long again
    unet = small_world.pipe.backbone
    compiled = torch.compile(unet, fullgraph=True, backend=counter)
    seen = []
    for i, strength in enumerate((0.3, 0.5, 1.7)):
        mask = np.full((32, 48), 0, np.uint8)
        mask[:, : 8 + 8 * i] = 200
        control = at_step(small_world, small_world.control("both", i, strength=strength, acts=acts, mask=mask))
        with torch.no_grad():
            seen.append(compiled(*inputs(i), controls=[control]))
            close(seen[-1], unet(*inputs(i), controls=[control]), atol=1e-5)
    assert counter.frame_count == 1
    assert not torch.equal(seen[0], seen[1])


# Beside other controls


@pytest.fixture(scope="module")
def company(world) -> list[Control]:
    """An IP-Adapter, the same weights in InstantStyle's blocks in the left half, DEADiff's content, a LoRA."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=12)
        encoder = CLIPImage(CLIPVisionModelWithProjection(vision).eval().requires_grad_(False))
        ip = IPAdapter.new(world.pipe, IPConfig(12, 3, 12, combine="concat", feature="embeds")).requires_grad_(False)
        lora = LoRA(linear_shapes(world.pipe.backbone, ("to_q", "ff.net.2")), 2).requires_grad_(False)
        for p in (*ip.parameters(), *lora.parameters()):
            p.add_(0.3 * torch.randn(p.shape))
    ip._encoder[0] = encoder
    others = [StyleLoRA(lora, frozenset()).control(0.5), ip.control(world.pictures[5], strength=0.4)]
    style = InstantStyle(ip).control(world.pictures[4], preset="style", strength=0.8, mask=LEFT_HALF)
    return [style, world.control("content", strength=0.7), *others]


def test_it_composes_with_ip_adapter_instantstyle_a_mask_and_a_lora_in_any_order(world, company):
    orders = [company, company[::-1], [*company[2:], *company[:2]], [company[1], company[0], *company[2:]]]
    drawn = [world.draw(order) for order in orders]
    for other in drawn[1:]:
        close(other, drawn[0], atol=1e-4)  # sums in another order
    for left_out in range(4):
        others = [control for i, control in enumerate(company) if i != left_out]
        assert (world.draw(others) - drawn[0]).abs().max() > 1e-3


def test_a_row_of_a_batch_with_other_controls_equals_its_single_run(world, company):
    style, _, *others = company
    batch = world.draw([style, world.control("both", rows=4), *others], PROMPTS, guidance_scale=5.0, seed=10)
    for i in (0, 3):
        alone = world.draw([style, world.control("both", i), *others], PROMPTS[i], guidance_scale=5.0, seed=10 + i)
        close(batch[i : i + 1], alone, atol=1e-4)
