"""Laws of controls that leave cells of the image as they are (token integration)."""

from dataclasses import replace

import pytest
import torch

from condit.nn.streams import grid_ids
from worlds import LEFT_HALF, PROMPTS, World, close


@pytest.fixture(scope="module")
def world(make_world) -> World:
    return make_world()


DRAWN = torch.zeros(4, 6, dtype=torch.bool)
DRAWN[1:3, 2:6] = True
every_fill = pytest.mark.parametrize("name", ["filling", "filling_cached"])


@every_fill
def test_known_cells_come_back_as_encoded_and_the_others_are_generated(world, references, name):
    control = getattr(world, name).control(references[0], fill=DRAWN)
    drawn = world.draw([control])
    given, _ = world.pipe.encode_condition(world.pipe.read_images(references[0], None))
    flat = DRAWN.flatten()
    assert torch.equal(drawn[:, ~flat], given[:, ~flat])
    assert (drawn[:, flat] - given[:, flat]).abs().min() > 0


@every_fill
def test_what_stood_in_the_generated_cells_does_not_matter(world, references, name):
    control = getattr(world, name).control(references[0], fill=DRAWN)
    other = control.whole.tokens + DRAWN.flatten()[:, None]
    same = replace(control, whole=replace(control.whole, tokens=other))
    assert torch.equal(world.draw([same]), world.draw([control]))


@every_fill
def test_the_known_cells_act_on_the_generated_ones(world, references, name):
    adapter = getattr(world, name)
    seen, other, unseen = (
        world.draw([adapter.control(references[i], fill=DRAWN, strength=s)])[:, DRAWN.flatten()]
        for i, s in ((0, 1.0), (1, 1.0), (0, 0.0))
    )
    assert (seen - unseen).abs().max() > 1e-3 and (seen - other).abs().max() > 1e-3


@every_fill
def test_a_filled_row_of_a_batch_equals_its_single_run(world, references, name):
    adapter, ip = getattr(world, name), world.ip
    both = [adapter.control(references[:2], fill=DRAWN), ip.control(references[2], mask=LEFT_HALF)]
    alone = [adapter.control(references[1], fill=DRAWN), ip.control(references[2], mask=LEFT_HALF)]
    batch = world.draw(both, PROMPTS[:2], seed=10)
    close(batch[1:], world.draw(alone, PROMPTS[1], seed=11), atol=1e-4)


def test_the_sequence_holds_each_cell_once_where_it_stands(world, references):
    seen = []
    hook = world.pipe.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0], kwargs["conditions"])), with_kwargs=True
    )
    # Another control's region follows the cells: it has as many weights as there are cells to draw.
    controls = [world.filling.control(references[0], fill=DRAWN), world.ip.control(references[1], mask=LEFT_HALF)]
    world.draw(controls, num_inference_steps=1)
    hook.remove()
    image, (condition,) = seen[0]
    flat, ids = DRAWN.flatten(), grid_ids(4, 6)
    assert torch.equal(image.ids, ids[flat]) and torch.equal(condition.ids, ids[~flat])
    canvas = world.pipe.encode_text(["a fox"]).canvas
    assert torch.equal(image.tokens[..., 16:], canvas[:, flat])  # the text's canvas follows the cells too
    whole = world.pipe.noise(world.pipe.layout(1, (32, 48)), [torch.Generator().manual_seed(0)])(torch.empty(0))
    assert torch.equal(image.tokens[..., :16], whole[:, flat])  # a seed means the same noise in the same cell


def test_a_filled_cache_equals_the_uncached_condition(world, references):
    cached, uncached = (world.filling_cached.control(references[0], fill=DRAWN, cached=c) for c in (None, False))
    close(world.draw([cached]), world.draw([uncached]), atol=1e-5)
