"""weights/ip_files.py, IPAdapter.load: published files by their tensors, and what is said of those that do not fit."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from condit.controls.ip_adapter import IPAdapter
from condit.controls.ip_projectors import layers_of
from condit.controls.style_lora import StyleLoRA
from condit.drawing.pipeline import Pipeline
from condit.encoders.image import EncoderSize
from condit.weights.ip_projectors import needs_of, projector_of
from ip_published import nested, published, resampler, vision, write_file


@pytest.fixture(scope="module")
def pipe(make_latent) -> Pipeline:
    return make_latent("sd15")


@pytest.fixture(scope="module")
def xl(make_latent) -> Pipeline:
    return make_latent("sdxl")


@pytest.fixture
def file(pipe, tmp_path) -> Path:
    return write_file(pipe, tmp_path / "models")


# What is read


def test_the_encoder_in_the_files_folder_is_used_unless_one_is_given(pipe, file, tmp_path, pictures):
    loaded = IPAdapter.load(file, pipe)
    assert loaded._encoder[0] is not None and loaded._encoder[0].size == EncoderSize(20, 12, 5, 28)
    given = IPAdapter.load(file, pipe, image_encoder=vision(tmp_path / "other"))
    one, other = (adapter.features(pictures(1)) for adapter in (loaded, given))
    assert one.shape == (1, 12) and torch.equal(one, other)


def test_an_encoder_out_of_a_whole_clip_is_its_image_half(pipe, file, tmp_path, pictures):
    from transformers import CLIPConfig, CLIPModel

    vision_part = json.loads((file.parent / "image_encoder" / "config.json").read_text())
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 30,
    }
    config = CLIPConfig(text_config=text, vision_config=vision_part, projection_dim=12)
    folder = tmp_path / "clip"
    folder.mkdir()
    model = CLIPModel(config)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors")
    adapter = IPAdapter.load(file, pipe, image_encoder=folder)
    encoder = adapter._encoder[0]
    assert encoder is not None
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixels).pooler_output)
    torch.testing.assert_close(encoder.embeds(pixels), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["bin", "training", "raw"])
def test_every_spelling_of_a_file_is_the_same_adapter(pipe, file, layout):
    tensors = published(pipe)
    path = file.parent / "other.bin"
    if layout == "bin":
        torch.save(nested(tensors), path)
    else:  # as tutorial_train.py writes it; "raw" with the frozen UNet beside it
        spelt = {
            n.replace("image_proj.", "image_proj_model.").replace("ip_adapter.", "adapter_modules."): t
            for n, t in tensors.items()
        }
        torch.save(spelt | ({"unet.conv_in.weight": torch.zeros(2)} if layout == "raw" else {}), path)
    actual, expected = IPAdapter.load(path, pipe).tensors(), IPAdapter.load(file, pipe).tensors()
    assert actual.keys() == expected.keys() and all(torch.equal(actual[n], t) for n, t in expected.items())


def test_only_the_selected_layers_are_loaded(pipe, file):
    part = IPAdapter.load(file, pipe, where="up_blocks.0.*")
    whole = IPAdapter.load(file, pipe)
    assert part.sites == tuple(path for path in whole.sites if path.startswith("up_blocks.0."))
    assert {*part.sites, *(x.path for x in part.absent)} == set(whole.sites)
    with pytest.raises(ValueError, match=r"none of its layers is in where=\('nowhere',\)"):
        IPAdapter.load(file, pipe, where="nowhere")


def test_a_file_of_some_blocks_is_inactive_in_the_others(pipe, file, pictures):
    whole = IPAdapter.load(file, pipe)
    kept = {n for n, t in whole.tensors().items() if n.startswith("image_proj.")}
    kept |= {f"ip_adapter.{x.number}.to_{p}_ip.weight" for x in whole.layers if x.path.startswith("mid") for p in "kv"}
    save_file({n: t for n, t in whole.tensors().items() if n in kept}, file.parent / "some.safetensors")
    some = IPAdapter.load(file.parent / "some.safetensors", pipe)
    control, other = some.control(pictures(1)[0]), whole.control(pictures(1)[0], where="mid_block.*")
    drawn = [pipe("a fox", controls=[c], seed=0, output_type="latent").images for c in (control, other)]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)  # a file lies otherwise in memory, and rounds so


def test_faceids_lora_is_read_acts_and_is_saved(pipe, file, tmp_path):
    tensors = published(pipe)
    projector = {
        "proj.0.weight": torch.randn(16, 8), "proj.0.bias": torch.zeros(16), "proj.2.weight": torch.randn(48, 16),
        "proj.2.bias": torch.zeros(48), "norm.weight": torch.ones(12), "norm.bias": torch.zeros(12),
    }  # fmt: skip
    tensors = {n: t for n, t in tensors.items() if n.startswith("ip_adapter.")}
    tensors |= {f"image_proj.{n}": t for n, t in projector.items()}
    for i, site in enumerate(pipe.backbone.sites):
        attention = pipe.backbone.get_submodule(site.path)
        for part in ("q", "k", "v", "out"):
            linear = attention.to_out[0] if part == "out" else getattr(attention, f"to_{part}")  # type: ignore[index]
            tensors[f"ip_adapter.{i}.to_{part}_lora.down.weight"] = torch.randn(3, linear.in_features) / 4
            tensors[f"ip_adapter.{i}.to_{part}_lora.up.weight"] = torch.randn(linear.out_features, 3) / 4
    save_file(tensors, tmp_path / "faceid.safetensors")
    adapter = IPAdapter.load(tmp_path / "faceid.safetensors", pipe)
    assert adapter.config.feature == "identity"
    assert adapter.tensors().keys() == tensors.keys()
    assert all(torch.equal(t, tensors[n]) for n, t in adapter.tensors().items())
    face = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))

    def draw(**how) -> Tensor:
        control = adapter.control(identity=face, **how)
        return pipe("a fox", controls=[control], seed=0, output_type="latent").images

    plain = pipe("a fox", seed=0, output_type="latent").images
    assert (draw(strength=0.5) - draw(strength=0.5, lora_scale=0.0)).abs().max() > 1e-3
    assert (draw(strength=0.5, lora_scale=0.0) - plain).abs().max() > 1e-3
    # By hand at one layer: W x + up(down(x)).
    path = pipe.backbone.sites[0].path
    linear = pipe.backbone.get_submodule(f"{path}.to_q")
    x = torch.randn(1, 2, linear.in_features)  # type: ignore[arg-type]
    down, up = (tensors[f"ip_adapter.0.to_q_lora.{name}.weight"] for name in ("down", "up"))
    lora = adapter.control(identity=face).lora()
    torch.testing.assert_close(linear(x, lora), linear(x) + x @ down.T @ up.T, rtol=0, atol=1e-5)
    # Several faces of one picture stand side by side, as in the published portrait files.
    faces = torch.cat([face, -face])
    side_by_side, path = adapter.control(identity=faces[None]).inner, adapter.sites[0]  # type: ignore[attr-defined]
    apart = adapter.control(identity=faces).inner.kv[path]  # type: ignore[attr-defined]
    for actual, each in zip(side_by_side.kv[path], apart, strict=True):
        torch.testing.assert_close(actual, torch.cat([each[:1], each[1:]], 2), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="is a FaceID adapter: give identity="):
        adapter.control(embeds=torch.zeros(1, 12))
    with pytest.raises(ValueError, match=r"identity must be \(n, 8\) or \(n, R, 8\); found \(1, 9\)"):
        adapter.control(identity=torch.zeros(1, 9))


# What does not fit


def test_the_wrong_encoder_raises_before_its_weights_are_read(pipe, file, tmp_path):
    wrong = vision(tmp_path / "wrong", hidden=24, projection=16)
    (wrong / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"needs image embeddings .* of width 12.*wrong is a CLIP \(hidden states 24"):
        IPAdapter.load(file, pipe, image_encoder=wrong)


def real_size(tmp_path: Path, name: str, hidden: int, projection: int) -> Path:
    """The config of a published encoder; no weights, since none may be read."""
    folder = tmp_path / name
    folder.mkdir()
    config = {"hidden_size": hidden, "projection_dim": projection, "image_size": 224, "patch_size": 14}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_encoders_that_are_mixed_up_most_are_named(pipe, file, tmp_path):
    h, g = real_size(tmp_path, "h", 1280, 1024), real_size(tmp_path, "g", 1664, 1280)
    for features, folder, message in (
        (
            1280,
            h,
            "width 1280: image encoder ViT-bigG/14 .*h is CLIP ViT-H/14 .hidden states 1280, image embeddings 1024",
        ),
        (
            1024,
            g,
            "width 1024: image encoder ViT-H/14 .*g is CLIP ViT-bigG/14 .hidden states 1664, image embeddings 1280",
        ),
    ):
        save_file(published(pipe, features), file.parent / "x.safetensors")
        with pytest.raises(ValueError, match=message):
            IPAdapter.load(file.parent / "x.safetensors", pipe, image_encoder=folder)
    # "plus" reads ViT-H/14's hidden states of width 1280: bigG/14, whose embeddings have 1280, does not fit.
    plus = needs_of(projector_of(resampler(1280, 12)))
    with pytest.raises(ValueError, match="penultimate hidden states of width 1280: image encoder ViT-H/14"):
        plus.refuse(EncoderSize(1664, 1280, 257, 224), "plus.bin", "the encoder")
    plus.refuse(EncoderSize(1280, 1024, 257, 224), "plus.bin", "the encoder")


def test_without_any_encoder_the_file_names_what_it_needs(pipe, tmp_path):
    save_file(published(pipe, 1024), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="width 1024: image encoder ViT-H/14 .*has none. Give image_encoder="):
        IPAdapter.load(tmp_path / "x.safetensors", pipe)


def test_an_adapter_of_another_base_raises(pipe, xl, file, tmp_path):
    wider = {n: torch.zeros(t.shape[0], 2048) if "_ip." in n else t for n, t in published(pipe).items()}
    save_file(wider, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"tokens of width 2048 \(SDXL\).* has width 12.*made for another base"):
        IPAdapter.load(tmp_path / "w.safetensors", pipe)
    with pytest.raises(ValueError, match="made for another base"):
        IPAdapter.load(file, xl)


def test_what_is_no_adapter_for_this_model_says_what_would_be(pipe, file, make_pipe):
    with pytest.raises(ValueError, match="is an IP-Adapter of a UNet.* is an MM-DiT"):
        IPAdapter.load(file, make_pipe())
    with pytest.raises(ValueError, match="is for condit.IPAdapter, not condit.OminiControl or condit.StyleLoRA"):
        StyleLoRA.load(file, pipe)


def test_a_corrupt_bin_raises(pipe, file):
    path = file.parent / "cut.bin"
    torch.save(nested(published(pipe)), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="broken or cut off"):
        IPAdapter.load(path, pipe)


def test_a_malicious_pickle_is_refused_and_runs_nothing(pipe, tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    for name, writer in (("plain.bin", pickle.dump), ("zip.bin", None)):
        path = tmp_path / name
        if writer is None:
            torch.save({"image_proj": Touch()}, path)
        else:
            path.write_bytes(pickle.dumps({"image_proj": Touch()}))
        with pytest.raises(ValueError, match="refused|broken"):
            IPAdapter.load(path, pipe)
        assert not (tmp_path / "touched").exists()


def test_a_file_that_is_not_whole_raises(pipe, file, tmp_path):
    tensors = published(pipe)
    layers = IPAdapter.load(file, pipe).layers
    value = f"ip_adapter.{layers[0].number}.to_v_ip.weight"
    for number, (given, message) in enumerate(
        [
            ({n: t for n, t in tensors.items() if n != value}, "has no to_v_ip.weight"),
            ({n: t for n, t in tensors.items() if "image_proj" not in n}, r"no projector \(image_proj"),
            (tensors | {"image_proj.more": torch.zeros(1)}, "1 tensors do not fit .first: 'more'"),
            (tensors | {"other.weight": torch.zeros(1)}, "holds 'other.weight'"),
            (tensors | {f"ip_adapter.99.to_{part}_ip.weight": torch.zeros(8, 12) for part in "kv"}, "number 99"),
        ]
    ):  # fmt: skip
        path = tmp_path / f"{number}.safetensors"
        save_file(given, path)
        with pytest.raises(ValueError, match=message):
            IPAdapter.load(path, pipe)


def test_a_missing_layer_between_present_ones_raises(xl, tmp_path):
    """Of SDXL's attention modules each has several layers: one of them alone cannot be left out on purpose."""
    vision(tmp_path / "image_encoder")
    tensors = published(xl)
    some = next(x for x in layers_of(xl.backbone, xl.backbone.sites, "cross") if x.path.endswith("blocks.1.attn2"))
    save_file({n: t for n, t in tensors.items() if f".{some.number}." not in n}, tmp_path / "hole.safetensors")
    with pytest.raises(ValueError, match=f"lacks K', V' number {some.number} .*has its neighbours"):
        IPAdapter.load(tmp_path / "hole.safetensors", xl)


def test_masks_of_another_shape_raise_before_sampling(pipe, file, pictures):
    adapter = IPAdapter.load(file, pipe)
    control = adapter.control(pictures(1)[0], mask=torch.ones(32, 32))
    with pytest.raises(ValueError, match="a mask of 32 x 32 .* for an image of 8 x 12 tokens"):
        pipe("a fox", controls=[control], seed=0)
    with pytest.raises(ValueError, match="masks must have the same size"):
        adapter.control(pictures(2), mask=[torch.ones(32, 48), torch.ones(16, 24)])
    with pytest.raises(ValueError, match="3 masks for 2 references of an image"):
        adapter.control([pictures(2)], combine="sum", mask=[torch.ones(32, 48)] * 3)
