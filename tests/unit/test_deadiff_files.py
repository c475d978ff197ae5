"""DEADiff's files: the published layout, ours, the image tower, and what is refused."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from condit.backbones.unet import UNet, UNetConfig
from condit.controls.deadiff import DEADiff, DEADiffConfig
from condit.controls.deadiff_layers import cross_shapes
from condit.controls.host import Host
from condit.data.images import load_image
from condit.encoders.clip_patches import ClipPatches
from condit.encoders.qformer import QFormer, QFormerConfig
from condit.weights.deadiff import Checkpoint, join, save_published, split, to_ours, to_published
from condit.weights.files import read_tensors, save_tensors
from condit.weights.guess import what_is
from deadiff_bench import QFORMER, WIDTH, Bench, make_adapter, make_pictures, make_unet


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(make_unet())


@pytest.fixture(scope="module")
def adapter(bench) -> DEADiff:
    return make_adapter(bench)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return make_pictures()


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


def same_controls(actual: DEADiff, expected: DEADiff, picture) -> None:
    for one, other in zip(
        actual.control(picture, content=picture).kv.values(),
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


def test_our_layout_is_read_together_with_its_image_tower(bench, adapter, pictures, tmp_path):
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
    places = {f"{side}.{i}.1": width for side, layers in widths.items() for i, width in layers.items()}
    for place, width in {**places, "middle_block.1": 1280}.items():
        for kind in ("k", "v"):
            name = f"model.diffusion_model.{place}.transformer_blocks.0.attn2.i_to_{kind}.weight"
            expected[name] = (width, 768)
    assert {to_ours(name): shape for name, shape in expected.items()} == ours
    assert {to_published(name): shape for name, shape in ours.items()} == expected
    assert sum(math.prod(shape) for name, shape in ours.items() if name.startswith("unet.")) == 19_169_280


def test_towers_that_differ_raise(adapter):
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


def test_an_adapter_of_another_base_raises(bench, adapter, tmp_path):
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


def test_a_control_of_another_model_raises(adapter, pictures):
    fewer = Bench(
        make_unet(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"))
    )
    with pytest.raises(ValueError, match="no layer 'down_blocks.0.*made for another model"):
        fewer.draw([adapter.control(pictures[0])])


def test_a_model_without_cross_attention_raises(make_pipe, adapter, tmp_path):
    file = save_tensors(tmp_path / "a.safetensors", adapter.tensors())
    with pytest.raises(ValueError, match="needs layers of cross-attention to the text; random has none"):
        DEADiff.load(file, make_pipe(), image_encoder=adapter.tower)


def test_another_methods_file_raises(bench, make_pipe, make_ip, tmp_path):
    file = save_tensors(tmp_path / "ip.safetensors", make_ip(make_pipe()).tensors())
    with pytest.raises(ValueError, match="is for condit.IPAdapter, not condit.DEADiff"):
        DEADiff.load(file, bench)


def test_another_image_encoder_raises(bench, adapter, write):
    narrow = ClipPatches(adapter.tower.tower)
    narrow.features = 32
    with pytest.raises(ValueError, match="reads image tokens of width 64; the image encoder gives 32"):
        DEADiff.load(write({}), bench, image_encoder=narrow)


def test_a_broken_checkpoint_raises(bench, adapter, tmp_path):
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
def test_an_impossible_control_raises_with_the_reason(adapter, pictures, how, message):
    given = {name: pictures[0] if name in ("style", "content") and value == 0 else value for name, value in how.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        adapter.control(**given)


def test_references_that_do_not_fit_the_batch_are_counted(bench, adapter, pictures):
    with pytest.raises(ValueError, match="3 references for 2 images"):
        bench.draw([adapter.control(pictures[:3])], batch=2)


def test_images_of_any_kind_are_read(adapter, pictures, tmp_path):
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
