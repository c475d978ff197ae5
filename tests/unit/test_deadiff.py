"""DEADiff's adapter and control on a random UNet of Stable Diffusion's layers; its file, and files that are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from condit.controls.control import Run, Step, When
from condit.controls.deadiff import DEADiff
from condit.controls.deadiff_layers import CONTENT_LAYERS, coarse_layers, layer_table
from condit.encoders.qformer import word_ids
from deadiff_bench import QFORMER, Bench, close, make_adapter, make_pictures, make_tower, make_unet


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(make_unet())


@pytest.fixture(scope="module")
def adapter(bench) -> DEADiff:
    return make_adapter(bench)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return make_pictures()


# Layers


def test_content_takes_the_coarse_layers_and_style_the_others_in_forward_order(bench):
    table = layer_table(bench.backbone.sites)
    content = [path for path, name in table.items() if name == "content"]
    assert content == [
        f"{place}.transformer_blocks.0.attn2"
        for place in (
            "down_blocks.2.attentions.0",
            "down_blocks.2.attentions.1",
            "mid_block.attentions.0",
            "up_blocks.1.attentions.0",
            "up_blocks.1.attentions.1",
        )
    ]
    assert len(table) == 16


def test_the_rule_for_other_unets_gives_the_released_layers_for_sixteen():
    assert coarse_layers(16) == CONTENT_LAYERS
    assert coarse_layers(70) == tuple(range(17, 36))  # SDXL


def test_a_layer_that_is_not_there_raises(bench):
    with pytest.raises(ValueError, match="content_layers has 16; expected numbers from 0 to 15"):
        layer_table(bench.backbone.sites, (4, 16))


def test_maps_start_as_those_of_the_text(bench):
    fresh = DEADiff.new(bench.backbone, QFORMER, make_tower())
    for path in fresh.paths:
        layer = bench.backbone.get_submodule(path)
        assert torch.equal(fresh.maps(path).image_k.weight, layer.to_k.weight)
        assert torch.equal(fresh.maps(path).image_v.weight, layer.to_v.weight)


# The control


def test_style_and_content_come_from_their_own_references(adapter, pictures):
    a, b = pictures[:2]
    both, swapped = adapter.control(a, content=b), adapter.control(b, content=a)
    style, content = adapter.control(a), adapter.control(content=b)
    for path, name in both.table.items():
        alone = style if name == "style" else content
        for i in range(2):
            assert torch.equal(both.kv[path][i], alone.kv[path][i])
            assert not torch.equal(both.kv[path][i], swapped.kv[path][i])


def test_a_set_that_is_not_given_is_zeros_in_the_softmax_or_absent(bench, adapter, pictures):
    zeros, absent = (adapter.control(pictures[0], empty=empty) for empty in ("zeros", "absent"))
    assert {zeros.table[path] for path, (k, v) in zeros.kv.items() if not k.any() and not v.any()} == {"content"}
    assert set(absent.table.values()) == {"style"}
    assert (bench.draw([zeros]) - bench.draw([absent])).abs().max() > 1e-3


def test_the_unconditional_side_has_zeros_for_both_sets(bench, adapter, pictures):
    control = adapter.control(pictures[0], content=pictures[1], strength=0.7).negative()
    assert all(not k.any() and not v.any() for k, v in control.kv.values())
    assert (bench.draw([control]) - bench.draw([])).abs().max() > 1e-3  # zeros dilute, as in the released code


def test_strength_zero_leaves_empty_tokens_as_released_or_no_tokens(bench, adapter, pictures):
    zero = {
        acts: bench.draw([adapter.control(pictures[0], strength=0, acts=acts)]) for acts in ("keys-values", "attention")
    }
    empty = bench.draw([adapter.control(pictures[0]).negative()])
    assert torch.equal(zero["attention"], bench.draw([]))
    close(zero["keys-values"], empty)
    assert (zero["keys-values"] - zero["attention"]).abs().max() > 1e-3


def test_the_three_ways_to_weigh_agree_at_strength_one_and_nowhere_else(bench, adapter, pictures):
    def drawn(strength: float) -> list[Tensor]:
        names = ("keys-values", "values", "attention")
        return [bench.draw([adapter.control(pictures[0], strength=strength, acts=acts)]) for acts in names]

    one, half = drawn(1.0), drawn(0.5)
    close(one[1], one[0])
    close(one[2], one[0])
    assert (half[0] - half[1]).abs().max() > 1e-3 and (half[0] - half[2]).abs().max() > 1e-3


def test_a_weight_of_the_attention_is_that_of_so_many_copies(bench, adapter, pictures):
    """Attention with weight 2 is a softmax with every reference token twice."""
    twice = adapter.control([[pictures[0], pictures[0]]], combine="concat", empty="absent")
    close(bench.draw([adapter.control(pictures[0], strength=2, acts="attention", empty="absent")]), bench.draw([twice]))


def test_each_set_has_its_own_strength(bench, adapter, pictures):
    style, none = adapter.control(pictures[0], content=pictures[1], content_strength=0), adapter.control(pictures[0])
    close(bench.draw([style]), bench.draw([none]))


def test_references_are_averaged_as_tokens_by_weights(adapter, pictures):
    mixed = adapter.control([pictures[:2]], weights=[0.25, 0.75])
    one, other = (adapter.control(picture) for picture in pictures[:2])
    for path, name in mixed.table.items():
        if name == "style":  # the maps are linear, so that averages of tokens are averages of keys
            close(mixed.kv[path][0], 0.25 * one.kv[path][0] + 0.75 * other.kv[path][0])
    # One content beside them has nothing to be weighed.
    both = adapter.control([pictures[:2]], content=pictures[2], weights=[0.25, 0.75])
    content = adapter.control(content=pictures[2])
    for path, name in both.table.items():
        close(both.kv[path][0], (mixed if name == "style" else content).kv[path][0])
    equal = adapter.control([pictures[:2]])
    path = next(path for path, name in equal.table.items() if name == "style")
    close(equal.kv[path][1], (one.kv[path][1] + other.kv[path][1]) / 2)


def test_rows_of_a_batch_have_their_own_references(bench, adapter, pictures):
    batch = bench.draw([adapter.control(pictures, content=pictures[::-1])], batch=4)
    for i in range(4):
        alone = bench.draw([adapter.control(pictures[i], content=pictures[3 - i])])
        close(batch[i : i + 1], alone, 1e-4)  # matrix products of another batch size sum in another order


def test_one_content_serves_many_styles(bench, adapter, pictures):
    batch = bench.draw([adapter.control(pictures[:2], content=pictures[2])], batch=2)
    close(batch[1:], bench.draw([adapter.control(pictures[1], content=pictures[2])]), 1e-4)


def test_keys_and_values_are_projected_once_a_control_and_never_in_a_step(bench, adapter, pictures):
    calls = []
    hooks = [
        m.register_forward_hook(lambda *_: calls.append(1))
        for m in adapter.unet.modules()
        if isinstance(m, torch.nn.Linear)
    ]
    control = adapter.control(pictures[0])
    made = len(calls)
    for i in range(2):
        bench.draw([control], step=Step(i, 2, 1.0))
    for hook in hooks:
        hook.remove()
    assert made == 32 and len(calls) == made


def test_a_control_acts_in_its_part_of_the_schedule(bench, adapter, pictures):
    late = adapter.control(pictures[0], when=When(0.5, 1))
    assert torch.equal(bench.draw([late], step=Step(0, 2, 1.0)), bench.draw([]))
    always = bench.draw([adapter.control(pictures[0])])
    assert torch.equal(bench.draw([late], step=Step(1, 2, 0.5)), always)
    faded = adapter.control(pictures[0], when=When(curve=lambda share: 0.5))
    assert torch.equal(bench.draw([faded]), bench.draw([adapter.control(pictures[0], strength=0.5)]))


def test_where_limits_the_layers(bench, adapter, pictures):
    control = adapter.control(pictures[0], where="down_blocks.*")
    assert len(control.kv) == 6 and all(path.startswith("down_blocks.") for path in control.kv)


def test_a_region_of_zeros_is_plain_and_of_ones_is_everywhere(bench, adapter, pictures):
    def masked(value: int) -> Tensor:
        return bench.draw([adapter.control(pictures[0], mask=np.full((64, 64), value, np.uint8))])

    assert torch.equal(masked(0), bench.draw([]))
    assert torch.equal(masked(255), bench.draw([adapter.control(pictures[0])]))
    assert (masked(128) - masked(255)).abs().max() > 1e-4


def test_a_region_of_one_grey_is_a_weight_of_the_attention(bench, adapter, pictures):
    grey = adapter.control(pictures[0], mask=np.full((64, 64), 51, np.uint8))
    close(bench.draw([grey]), bench.draw([adapter.control(pictures[0], strength=0.2, acts="attention")]))
    both = adapter.control(pictures[0], mask=np.full((64, 64), 51, np.uint8), strength=0.5, acts="attention")
    close(bench.draw([both]), bench.draw([adapter.control(pictures[0], strength=0.1, acts="attention")]))


def test_outside_its_region_a_layer_attends_to_the_text_alone(adapter, pictures):
    from condit.nn.attention import Call, Site, attend

    left = np.zeros((64, 64), np.uint8)
    left[:, :32] = 255
    control = adapter.control(pictures[0], mask=left)
    path = next(iter(control.kv))
    bench = adapter._pipe[0]
    run = Run(bench.backbone, 1, (8, 8), torch.zeros(1, 1), None, 4)
    acting = control.prepare(run).at(Step(0, 1, 1.0))
    assert acting is not None
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(1, 2, 64, 4, generator=g), *torch.randn(2, 1, 2, 5, 4, generator=g).unbind(0)
    call = Call(q, k, v, Site(path, "cross", 0))
    plain, acted = attend(call), attend(call, (acting,))
    everywhere = attend(call, (replace(acting, regions=None),))
    changed = (acted - plain).abs().amax((0, 1, 3)).unflatten(0, (8, 8))
    assert changed[:, 4:].max() < 1e-6 and changed[:, :4].min() > 1e-4
    close(acted.unflatten(2, (8, 8))[..., :4, :], everywhere.unflatten(2, (8, 8))[..., :4, :])


def test_the_content_layers_may_read_another_prompt(bench, adapter, pictures):
    control = adapter.control(pictures[0], content_prompt="a cat")
    text = bench.backbone.text_keys_values(bench.encode_text(["a cat"]).tokens)
    prepared = control.prepare(Run(bench.backbone, 1, (8, 8), torch.zeros(1, 1), None, 4))
    assert set(prepared.text) == {path for path, name in control.table.items() if name == "content"}
    assert all(torch.equal(prepared.text[path][0], text[path][0]) for path in prepared.text)
    assert (bench.draw([control]) - bench.draw([adapter.control(pictures[0])])).abs().max() > 1e-3
    assert control.negative().content_text is None


def test_a_recipe_keeps_what_made_the_control(adapter, pictures):
    how = {"strength": 0.5, "acts": "values", "empty": "absent", "where": "up_blocks.*", "content_prompt": "a cat"}
    recipe = adapter.control(pictures[0], when=When(0.2, 0.9), **how).describe()
    assert (
        recipe["method"] == "DEADiff" and recipe["when"] == [0.2, 0.9] and recipe["reference"] == {"style": ["given"]}
    )
    assert recipe["strength"] == {"style": 0.5, "content": 0.5} and recipe["where"] == ["up_blocks.*"]
    assert all(recipe[name] == how[name] for name in ("acts", "empty", "content_prompt"))
    json.dumps(recipe)


def test_references_are_squashed_by_pillows_bicubic_as_in_the_released_script(adapter, pictures):
    expected = np.asarray(Image.fromarray(pictures[0]).resize((16, 16)), np.float32)  # PIL's default is bicubic
    close(adapter.read(pictures[0]), torch.from_numpy(expected).permute(2, 0, 1) / 127.5 - 1, 1e-6)


def test_the_q_formers_hear_the_words_of_berts_vocabulary(adapter, pictures):
    assert word_ids("style", 1).tolist() == [[101, 2806, 102]] and word_ids("content", 1).tolist() == [[101, 4180, 102]]
    image = adapter.tower(adapter.read(pictures[0])[None])
    with torch.no_grad():
        heard, other = adapter.ask("style", image), adapter.style(image, word_ids("content", 1))
    assert (heard - other).abs().max() > 1e-4
    with pytest.raises(ValueError, match="trained on 'style', 'content'; found 'colour'"):
        word_ids("colour", 1)
