"""DEADiff's adapter and control on a random UNet of Stable Diffusion's layers; its file, and files that are refused."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from condit.backbones.unet import UNet, UNetConfig
from condit.controls.control import Control, Run, Step, When
from condit.controls.deadiff import DEADiff, DEADiffConfig
from condit.controls.deadiff_layers import CONTENT_LAYERS, coarse_layers, cross_shapes, layer_table
from condit.controls.host import Host
from condit.data.images import load_image, to_tensor
from condit.encoders.clip_patches import ClipPatches
from condit.encoders.qformer import QFormer, QFormerConfig, word_ids
from condit.weights.catalog import read_adapter
from condit.weights.deadiff import Checkpoint, join, save_published, split, to_ours, to_published
from condit.weights.files import read_tensors, save_tensors
from condit.weights.guess import what_is

WIDTH = 64  # one head of 64, as heads are told from widths in files


def make_unet(**config) -> UNet:
    torch.manual_seed(0)
    small = UNetConfig(
        block_out_channels=(8, 8, 16, 16), attention_head_dim=2, cross_attention_dim=WIDTH, norm_num_groups=4
    )
    return UNet(replace(small, **config)).eval().requires_grad_(False)


def make_tower() -> ClipPatches:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    c = CLIPVisionConfig(
        hidden_size=64, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1, image_size=16, patch_size=8
    )
    whole = CLIPVisionModel(c).state_dict()
    # As in the published file: the last block and the norm after it are gone.
    kept = {n: v for n, v in whole.items() if not n.startswith(("encoder.layers.1.", "post_layernorm."))}
    return ClipPatches.of(kept)


FIRST = Step(0, 2, 1.0)
QFORMER = QFormerConfig(
    queries=4, width=WIDTH, layers=2, heads=1, hidden=32, image_width=64, vocabulary=30523, positions=8
)


class Bench:
    """What an adapter asks of a pipeline, over a UNet of some ten thousand weights."""

    name = "bench"

    def __init__(self, unet: UNet):
        self.backbone, self.device, self.dtype = unet, torch.device("cpu"), torch.float32
        self.image = None

    def adapter_file(self, source, method):
        return read_adapter(source, method)

    def read_images(self, source, annotator) -> Tensor:
        return to_tensor(source, (64, 64))[None]

    def describe_source(self, reference) -> list:
        return ["given"]

    def encode_text(self, prompts):
        g = torch.Generator().manual_seed(len(prompts[0]))
        return SimpleNamespace(tokens=torch.randn(len(prompts), 5, WIDTH, generator=g))

    @torch.no_grad()
    def draw(self, controls: list[Control], batch: int = 1, step: Step = FIRST) -> Tensor:
        g = torch.Generator().manual_seed(3)
        x, text = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 5, WIDTH, generator=g)
        x, text = x.expand(batch, -1, -1, -1), text.expand(batch, -1, -1)
        run = Run(self.backbone, batch, (8, 8), text, None, 4)  # type: ignore[arg-type]
        active = [c for c in (control.prepare(run).at(step) for control in controls) if c is not None]
        return self.backbone(x, torch.full((batch,), 300.0), text, controls=active)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(make_unet())


@pytest.fixture(scope="module")
def adapter(bench) -> DEADiff:
    torch.manual_seed(2)
    found = DEADiff.new(bench.backbone, QFORMER, make_tower(), pipe=bench)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return found.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (4, 24, 20, 3), dtype=np.uint8))


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


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


def test_a_layer_that_is_not_there_is_told(bench):
    with pytest.raises(ValueError, match="content_layers has 16; there are 16"):
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


def test_strength_zero_leaves_empty_tokens_as_released_or_none(bench, adapter, pictures):
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


def test_several_references_are_averaged_as_tokens_by_weights(adapter, pictures):
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
    told = adapter.control(pictures[0], when=When(0.2, 0.9), **how).describe()
    assert told["method"] == "DEADiff" and told["when"] == [0.2, 0.9] and told["reference"] == {"style": ["given"]}
    assert told["strength"] == {"style": 0.5, "content": 0.5} and told["where"] == ["up_blocks.*"]
    assert all(told[name] == how[name] for name in ("acts", "empty", "content_prompt"))
    json.dumps(told)


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


# Files


def published(adapter: DEADiff) -> dict[str, Tensor]:
    """A whole checkpoint of the released layout: the adapter, the tower twice, a base, and what nothing reads."""
    base = {"model.diffusion_model.input_blocks.0.0.weight": torch.randn(2, 2), "first_stage_model.x": torch.randn(2)}
    rest = {
        "betas": torch.randn(3),
        "ctx_embeddings_cache": torch.zeros(1, 4, WIDTH),
        "style_blip.Qformer.cls.predictions.bias": torch.randn(3),
        "content_blip.itm_head.weight": torch.randn(2, 2),
        "style_blip.Qformer.bert.embeddings.position_ids": torch.arange(8)[None],
    }
    tower = {n: v for n, v in adapter.tower.tower.state_dict().items() if not n.startswith("post_layernorm.")}
    return join(Checkpoint(adapter.tensors(), tower, base, rest))


def same_controls(found: DEADiff, expected: DEADiff, picture) -> None:
    for one, other in zip(
        found.control(picture, content=picture).kv.values(),
        expected.control(picture, content=picture).kv.values(),
        strict=True,
    ):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_the_published_layout_is_read_and_written_bit_by_bit(bench, adapter, pictures, tmp_path):
    tensors = published(adapter)
    file = save_published(tmp_path / "deadiff_v1.ckpt", split(tensors), global_step=7)
    content = torch.load(file, weights_only=True)
    assert content["global_step"] == 7 and content["state_dict"].keys() == tensors.keys()
    assert all(torch.equal(content["state_dict"][name], value) for name, value in tensors.items())
    loaded = DEADiff.load(file, bench)
    assert all(torch.equal(value, adapter.tensors()[name]) for name, value in loaded.tensors().items())
    same_controls(loaded, adapter, pictures[0])


def test_our_layout_is_read_with_the_image_tower_beside_it(bench, adapter, pictures, tmp_path):
    metadata = {"condit": json.dumps({**adapter.metadata(), "content_layers": [5, 6]})}
    file = save_tensors(tmp_path / "adapter.safetensors", adapter.tensors(), metadata)
    assert what_is(read_tensors(file)) == "DEADiff"
    with pytest.raises(ValueError, match="no image tower. Give image_encoder="):
        DEADiff.load(file, bench)
    loaded = DEADiff.load(file, bench, image_encoder=adapter.tower)
    assert loaded.config.content_layers == (5, 6)
    assert all(torch.equal(value, adapter.tensors()[name]) for name, value in loaded.tensors().items())


def test_trained_maps_are_read_and_not_made_from_the_text_again(bench, adapter, tmp_path):
    """The released loader overwrites i_to_k, i_to_v with to_k, to_v whenever a file goes through it."""
    file = save_published(tmp_path / "d.ckpt", split(published(adapter)))
    path = adapter.paths[0]
    loaded = DEADiff.load(file, bench).maps(path).image_k.weight
    assert not torch.equal(loaded, bench.backbone.get_submodule(path).to_k.weight)


def test_names_of_the_full_size_checkpoint_go_both_ways():
    """Written here by hand from the released classes; nothing of full size is allocated."""
    with torch.device("meta"):
        unet = UNet(UNetConfig())
        adapter = DEADiff(DEADiffConfig(), QFormer(QFormerConfig()), QFormer(QFormerConfig()), cross_shapes(unet))
    ours = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {}
    norm, square = {"weight": (768,), "bias": (768,)}, {"weight": (768, 768), "bias": (768,)}

    def put(prefix: str, **shapes: dict) -> None:
        for module, parts in shapes.items():
            for kind, shape in parts.items():
                expected[f"{prefix}{module.replace('__', '.')}.{kind}"] = shape

    read_image = {"weight": (768, 1024), "bias": (768,)}
    for b in ("style", "content"):
        expected[f"{b}_blip.query_tokens"] = (1, 16, 768)
        put(f"{b}_blip.", ln_vision={"weight": (1024,), "bias": (1024,)})
        put(f"{b}_proj_layer.", LayerNorm=norm)
        put(
            f"{b}_proj_layer.",
            dense1={"weight": (3072, 768), "bias": (3072,)},
            dense2={"weight": (768, 3072), "bias": (768,)},
        )
        bert = f"{b}_blip.Qformer.bert."
        put(bert, embeddings__LayerNorm=norm)
        put(
            bert,
            embeddings__word_embeddings={"weight": (30523, 768)},
            embeddings__position_embeddings={"weight": (512, 768)},
        )
        for i in range(12):
            layer = f"{bert}encoder.layer.{i}."
            for attention, source in (("attention", square), ("crossattention", read_image)):
                put(f"{layer}{attention}.", self__query=square, self__key=source, self__value=source)
                put(f"{layer}{attention}.", output__dense=square, output__LayerNorm=norm)
            for kind in ("", "_query"):
                put(layer, **{f"intermediate{kind}__dense": {"weight": (3072, 768), "bias": (3072,)}})
                put(
                    layer,
                    **{
                        f"output{kind}__dense": {"weight": (768, 3072), "bias": (768,)},
                        f"output{kind}__LayerNorm": norm,
                    },
                )
    widths = {"input_blocks": {1: 320, 2: 320, 4: 640, 5: 640, 7: 1280, 8: 1280}}
    widths["output_blocks"] = {i: (1280, 640, 320)[i // 3 - 1] for i in range(3, 12)}
    places = {f"{side}.{i}.1": width for side, found in widths.items() for i, width in found.items()}
    for place, width in {**places, "middle_block.1": 1280}.items():
        for kind in ("k", "v"):
            name = f"model.diffusion_model.{place}.transformer_blocks.0.attn2.i_to_{kind}.weight"
            expected[name] = (width, 768)
    assert {to_ours(name): shape for name, shape in expected.items()} == ours
    assert {to_published(name): shape for name, shape in ours.items()} == expected
    assert sum(math.prod(shape) for name, shape in ours.items() if name.startswith("unet.")) == 19_169_280


def test_towers_that_differ_are_told(adapter):
    tensors = published(adapter)
    tensors["content_blip.visual_encoder.ln_pre.bias"] = torch.ones(64)
    with pytest.raises(ValueError, match="image towers of the two Q-Formers differ .first: ln_pre.bias"):
        split(tensors)


def test_the_two_norms_of_the_towers_tokens_are_kept_apart(adapter):
    tensors = published(adapter)
    tensors["content_blip.ln_vision.bias"] = torch.ones(64)
    parts = split(tensors)
    assert torch.equal(parts.adapter["content.ln_vision.bias"], torch.ones(64))
    assert not torch.equal(parts.adapter["style.ln_vision.bias"], torch.ones(64))


# What is refused


@pytest.fixture
def write(adapter, tmp_path):
    """A file of ours with some tensors renamed (to None: left out)."""

    def written(change: dict[str, str | None]) -> Path:
        tensors = {}
        for name, value in adapter.tensors().items():
            new = change.get(name, name)
            if new is not None:
                tensors[new] = value
        return save_tensors(tmp_path / "changed.safetensors", tensors)

    return written


def test_a_missing_tensor_is_named_with_its_nearest(bench, adapter, write):
    name = "style.qformer.encoder.layer.1.output_query.dense.weight"
    file = write({name: name.replace("output_query", "output_querry")})
    with pytest.raises(
        ValueError, match=r"1 missing .first: style.qformer.encoder.layer.1.output_query.*nearest to.*output_querry"
    ):
        DEADiff.load(file, bench, image_encoder=adapter.tower)


def test_missing_queries_are_named_with_their_nearest(bench, adapter, write):
    file = write({"content.query_tokens": "content.query_token"})
    with pytest.raises(ValueError, match=r"content: 'query_tokens' is missing from .*nearest: query_token"):
        DEADiff.load(file, bench, image_encoder=adapter.tower)


def test_an_adapter_of_another_base_is_told(bench, adapter, tmp_path):
    file = save_tensors(tmp_path / "a.safetensors", adapter.tensors())
    wide = Bench(make_unet(cross_attention_dim=2 * WIDTH))
    with pytest.raises(
        ValueError, match=r"K' of .*attn2 is \(8, 64\); bench needs \(8, 128\). DEADiff was made for Stable"
    ):
        DEADiff.load(file, cast("Host", wide), image_encoder=adapter.tower)
    fewer = Bench(
        make_unet(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"))
    )
    with pytest.raises(ValueError, match=r"image K', V' of 16 layers; bench has 14 .*first difference: down_blocks.0"):
        DEADiff.load(file, cast("Host", fewer), image_encoder=adapter.tower)


def test_a_control_of_another_model_is_told(adapter, pictures):
    fewer = Bench(
        make_unet(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"))
    )
    with pytest.raises(ValueError, match="no layer 'down_blocks.0.*made for another model"):
        fewer.draw([adapter.control(pictures[0])])


def test_a_model_without_cross_attention_is_told(make_pipe, adapter, tmp_path):
    file = save_tensors(tmp_path / "a.safetensors", adapter.tensors())
    with pytest.raises(ValueError, match="needs layers of cross-attention to the text; random has none"):
        DEADiff.load(file, make_pipe(), image_encoder=adapter.tower)


def test_another_methods_file_is_told(bench, make_pipe, make_ip, tmp_path):
    file = save_tensors(tmp_path / "ip.safetensors", make_ip(make_pipe()).tensors())
    with pytest.raises(ValueError, match="is for condit.IPAdapter, not condit.DEADiff"):
        DEADiff.load(file, bench)


def test_another_image_encoder_is_told(bench, adapter, write):
    narrow = ClipPatches(adapter.tower.tower)
    narrow.features = 32
    with pytest.raises(ValueError, match="reads image tokens of width 64; the image encoder gives 32"):
        DEADiff.load(write({}), bench, image_encoder=narrow)


def test_a_broken_checkpoint_is_told(bench, adapter, tmp_path):
    file = save_published(tmp_path / "d.ckpt", split(published(adapter)))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="broken or cut off"):
        DEADiff.load(file, bench)


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_malicious_checkpoint_is_refused_and_runs_nothing(bench, adapter, tmp_path):
    target, file = tmp_path / "touched", tmp_path / "d.ckpt"
    torch.save({"state_dict": published(adapter), "callbacks": Malicious(target)}, file)
    with pytest.raises(ValueError, match="could run code: refused"):
        DEADiff.load(file, bench)
    file.write_bytes(pickle.dumps({"state_dict": Malicious(target)}))
    with pytest.raises(ValueError):
        DEADiff.load(file, bench)
    assert not target.exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "No reference: give style=, content= or both"),
        ({"style": []}, "Every image needs the same number of style references; found"),
        ({"content": [[]]}, "Every image needs the same number of content references"),
        ({"style": 0, "strength": -1.0, "acts": "attention"}, "cannot be negative"),
        ({"style": 0, "acts": "keys"}, "acts must be one of 'keys-values'"),
        ({"style": 0, "empty": "none"}, "empty must be one of 'zeros', 'absent'"),
        ({"style": 0, "weights": [0.5]}, "weights must be 1 numbers that sum to 1"),
        ({"style": 0, "weights": [1.0], "combine": "concat"}, "weights are for combine"),
        ({"style": "nowhere.png"}, "no image at nowhere.png"),
        ({"style": 0, "strength": [0.3, 1.0]}, "strength is one number for all images of a control"),
        ({"style": 0, "content_strength": float("nan")}, "strength is one number"),
        ({"style": 0, "where": "up_blocks.1"}, r"matches none of the .* layers.*'up_blocks.1.\*'"),
    ],
)
def test_a_control_that_cannot_be_made_says_why(adapter, pictures, how, message):
    given = {name: pictures[0] if name in ("style", "content") and value == 0 else value for name, value in how.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        adapter.control(**given)


def test_references_that_do_not_fit_the_batch_are_counted(bench, adapter, pictures):
    with pytest.raises(ValueError, match="3 references for 2 images"):
        bench.draw([adapter.control(pictures[:3])], batch=2)


def test_pictures_of_any_kind_are_read(adapter, pictures, tmp_path):
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    kinds = [pictures[0], tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), load_image(pictures[0])]
    first, *others = (adapter.control(kind) for kind in kinds)
    path = first.adapter.paths[0]
    assert all(torch.equal(other.kv[path][0], first.kv[path][0]) for other in others)


def test_qformers_of_another_width_than_the_text_are_refused(bench, adapter, tmp_path):
    """Their K', V' maps fit, so that only a call would fail, in a matrix product."""
    narrow = replace(QFORMER, width=WIDTH // 2)
    made = DEADiff(adapter.config, QFormer(QFORMER), QFormer(narrow), cross_shapes(bench.backbone))
    file = save_tensors(tmp_path / "narrow.safetensors", made.tensors(), made.metadata())
    with pytest.raises(ValueError, match=f"content Q-Former has tokens of width {WIDTH // 2}; the text of bench"):
        DEADiff.load(file, bench, image_encoder=adapter.tower)
