"""weights/ip_files.py, IPAdapter.load: published files by their tensors, and what is said of those that do not fit."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from condit.backbones.unet import PRESETS, UNet
from condit.controls.control import Where
from condit.controls.instantstyle import Content, InstantStyle, Join, preset
from condit.controls.ip_adapter import IPAdapter, IPConfig, face_tensors
from condit.controls.ip_projectors import IdentityPlusProjection, Perceiver, layers_of
from condit.controls.style_lora import StyleLoRA
from condit.drawing.pipeline import Pipeline
from condit.encoders.image import CLIPImage, EncoderSize, TextTower
from condit.weights.ip_files import face_lora, fit_layers, read_layout
from condit.weights.ip_projectors import needs_of, projector_of


@pytest.fixture(scope="module")
def pipe(make_latent) -> Pipeline:
    return make_latent("sd15")


@pytest.fixture(scope="module")
def xl(make_latent) -> Pipeline:
    return make_latent("sdxl")


def vision(folder: Path, *, hidden: int = 20, projection: int = 12) -> Path:
    """A folder as h94/IP-Adapter's image_encoder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "projection_dim": projection,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **config}))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def published(pipe: Pipeline, features: int = 12, tokens: int = 4) -> dict[str, Tensor]:
    """A global adapter's file for the pipeline's UNet."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = IPAdapter.new(pipe, IPConfig(features, tokens, pipe.backbone.config.cross_attention_dim))
    return {n: t.clone().contiguous() for n, t in adapter.tensors().items()}


def nested(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As a `.bin` has it."""
    found: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        found[part][rest] = tensor
    return found


@pytest.fixture
def file(pipe, tmp_path) -> Path:
    path = tmp_path / "models" / "ip-adapter.safetensors"
    vision(path.parent / "image_encoder")
    save_file(published(pipe), path)
    return path


# What is read


def test_the_encoder_beside_the_file_is_found_and_one_that_is_given_comes_first(pipe, file, tmp_path, pictures):
    found = IPAdapter.load(file, pipe)
    assert found._encoder[0] is not None and found._encoder[0].size == EncoderSize(20, 12, 5, 28)
    given = IPAdapter.load(file, pipe, image_encoder=vision(tmp_path / "other"))
    one, other = (adapter.features(pictures(1)) for adapter in (found, given))
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
    found, expected = IPAdapter.load(path, pipe).tensors(), IPAdapter.load(file, pipe).tensors()
    assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


def test_only_the_layers_asked_for_are_held(pipe, file):
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
    for found, each in zip(side_by_side.kv[path], apart, strict=True):
        torch.testing.assert_close(found, torch.cat([each[:1], each[1:]], 2), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="is a FaceID adapter: give identity="):
        adapter.control(embeds=torch.zeros(1, 12))
    with pytest.raises(ValueError, match=r"identity must be \(n, 8\) or \(n, R, 8\); found \(1, 9\)"):
        adapter.control(identity=torch.zeros(1, 9))


# What does not fit


def test_the_wrong_encoder_is_told_before_its_weights_are_read(pipe, file, tmp_path):
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


def test_an_adapter_of_another_base_is_told(pipe, xl, file, tmp_path):
    wider = {n: torch.zeros(t.shape[0], 2048) if "_ip." in n else t for n, t in published(pipe).items()}
    save_file(wider, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"tokens of width 2048 \(SDXL\).* has width 12.*made for another base"):
        IPAdapter.load(tmp_path / "w.safetensors", pipe)
    with pytest.raises(ValueError, match="made for another base"):
        IPAdapter.load(file, xl)


def test_what_is_no_adapter_for_this_model_says_what_would_be(pipe, file, make_pipe):
    with pytest.raises(ValueError, match="is an IP-Adapter of a UNet.* is an MM-DiT"):
        IPAdapter.load(file, make_pipe())
    with pytest.raises(ValueError, match="Hub names are not resolved: download the file"):
        IPAdapter.load("h94/IP-Adapter", pipe)
    with pytest.raises(ValueError, match="is for condit.IPAdapter, not condit.OminiControl or condit.StyleLoRA"):
        StyleLoRA.load(file, pipe)


def test_a_corrupt_bin_is_told(pipe, file):
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


def test_a_file_that_is_not_whole_is_told(pipe, file, tmp_path):
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


def test_a_missing_layer_among_its_neighbours_is_told(xl, tmp_path):
    """Of SDXL's attention modules each has several layers: one of them alone cannot be left out on purpose."""
    vision(tmp_path / "image_encoder")
    tensors = published(xl)
    some = next(x for x in layers_of(xl.backbone, xl.backbone.sites, "cross") if x.path.endswith("blocks.1.attn2"))
    save_file({n: t for n, t in tensors.items() if f".{some.number}." not in n}, tmp_path / "hole.safetensors")
    with pytest.raises(ValueError, match=f"lacks K', V' number {some.number} .*has its neighbours"):
        IPAdapter.load(tmp_path / "hole.safetensors", xl)


def test_masks_of_another_shape_are_told_before_sampling(pipe, file, pictures):
    adapter = IPAdapter.load(file, pipe)
    control = adapter.control(pictures(1)[0], mask=torch.ones(32, 32))
    with pytest.raises(ValueError, match="a mask of 32 x 32 .* for an image of 8 x 12 tokens"):
        pipe("a fox", controls=[control], seed=0)
    with pytest.raises(ValueError, match="masks must have the same size"):
        adapter.control(pictures(2), mask=[torch.ones(32, 48), torch.ones(16, 24)])
    with pytest.raises(ValueError, match="3 masks for 2 references of an image"):
        adapter.control([pictures(2)], combine="sum", mask=[torch.ones(32, 48)] * 3)


# Full size, on the meta device: names, shapes and counts as published (arXiv:2308.06721; h94/IP-Adapter)


def resampler(features: int, out: int, dim: int = 768, heads: int = 12) -> dict[str, Tensor]:
    from condit.controls.ip_projectors import Resampler

    with torch.device("meta"):
        sizes = {"inner": 64 * heads, "heads": heads, "depth": 4, "hidden": 4 * dim, "queries": 16}
        return Resampler(features, dim, out, **sizes).state_dict()


def shapes(**given: tuple[int, ...]) -> dict[str, Tensor]:
    return {name.replace("__", "."): torch.empty(shape, device="meta") for name, shape in given.items()}


def linear_norm(features: int, dim: int, tokens: int = 4) -> dict[str, Tensor]:
    return shapes(
        proj__weight=(tokens * dim, features), proj__bias=(tokens * dim,), norm__weight=(dim,), norm__bias=(dim,)
    )


def full_face(features: int, dim: int) -> dict[str, Tensor]:
    parts: dict[str, tuple[int, ...]] = {"proj.3.weight": (dim,), "proj.3.bias": (dim,)}
    for i, rows in ((0, features), (2, dim)):
        parts |= {f"proj.{i}.weight": (rows, features), f"proj.{i}.bias": (rows,)}
    return {name: torch.empty(shape, device="meta") for name, shape in parts.items()}


def faceid(dim: int, tokens: int = 4) -> dict[str, Tensor]:
    parts: dict[str, tuple[int, ...]] = {"norm.weight": (dim,), "norm.bias": (dim,)}
    for i, rows, columns in ((0, 1024, 512), (2, tokens * dim, 1024)):
        parts |= {f"proj.{i}.weight": (rows, columns), f"proj.{i}.bias": (rows,)}
    return {name: torch.empty(shape, device="meta") for name, shape in parts.items()}


# file -> base, projector, what it reads, millions of parameters of projector and of K', V'
PUBLISHED = {
    "ip-adapter_sd15": ("sd15", linear_norm(1024, 768), ("embeds", 1024), 3.15, 19.17),
    "ip-adapter_sd15_vit-G": ("sd15", linear_norm(1280, 768), ("embeds", 1280), 3.94, 19.17),
    "ip-adapter-plus_sd15": ("sd15", resampler(1280, 768), ("hidden", 1280), 29.9, 19.17),
    "ip-adapter-full-face_sd15": ("sd15", full_face(1280, 768), ("hidden", 1280), 2.63, 19.17),
    "ip-adapter-faceid_sd15": ("sd15", faceid(768), ("identity", 0), 3.67, 19.17),
    "ip-adapter-faceid_sdxl": ("sdxl", faceid(2048), ("identity", 0), 8.93, 340.8),
    "ip-adapter_sdxl": ("sdxl", linear_norm(1280, 2048), ("embeds", 1280), 10.5, 340.8),
    "ip-adapter_sdxl_vit-h": ("sdxl", linear_norm(1024, 2048), ("embeds", 1024), 8.4, 340.8),
    "ip-adapter-plus_sdxl_vit-h": ("sdxl", resampler(1280, 2048, 1280, 20), ("hidden", 1280), 83.0, 340.8),
}


@pytest.fixture(scope="module")
def real() -> dict[str, UNet]:
    with torch.device("meta"):
        return {name: UNet(PRESETS[name]) for name in ("sd15", "sdxl")}


def key_list(unet: UNet, projector: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a published file: numbers odd, in the order of diffusers' processors."""
    found = {f"image_proj.{n}": t for n, t in projector.items()}
    count = {"sd15": 16, "sdxl": 70}["sdxl" if unet.config.addition_embed_type else "sd15"]
    widths = [unet.get_submodule(s.path).to_q.out_features for s in unet.sites if s.kind == "cross"]  # type: ignore[union-attr]
    assert len(widths) == count
    for i, width in enumerate(widths):
        for part in "kv":
            shape = width, unet.config.cross_attention_dim
            found[f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight"] = torch.empty(shape, device="meta")  # type: ignore[arg-type]
    return found


def millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_fits_at_full_size_with_the_published_counts(real, name):
    base, tensors, reads, projector_size, layers_size = PUBLISHED[name]
    unet = real[base]
    layout = read_layout(key_list(unet, tensors), name)
    layers = layers_of(unet, unet.sites, "cross")
    kept = fit_layers(layout, layers, unet.config.cross_attention_dim, Where(), name, base)
    projector = projector_of(layout.projector)
    needs = needs_of(projector)
    assert (needs.feature, needs.width) == reads
    with torch.device("meta"):
        adapter = IPAdapter(IPConfig(needs.width, dim=layout.text_width, form="cross"), layers, projector=projector)
    assert adapter.state_dict().keys() == key_list(unet, tensors).keys()
    assert millions(projector) == pytest.approx(projector_size, rel=0.01)
    assert millions(adapter.ip_adapter) == pytest.approx(layers_size, rel=0.001)
    assert [layer.number for layer in layers] == list(range(1, 2 * len(layers), 2)) and len(kept) == len(layers)


@pytest.mark.parametrize(
    ("base", "name", "numbers", "size"),
    [
        ("sdxl", "style", range(69, 88, 2), 52.4),
        ("sdxl", "layout", range(29, 48, 2), 52.4),
        ("sdxl", "style+layout", [*range(29, 48, 2), *range(69, 88, 2)], 104.9),
        ("sd15", "style", [13, 15, 17], None),
        ("sd15", "style+layout", [9, 11, 13, 15, 17, 31], None),
    ],
)
def test_a_preset_is_the_published_layers_at_full_size(real, base, name, numbers, size):
    unet = real[base]
    layout = read_layout(key_list(unet, linear_norm(1280, unet.config.cross_attention_dim)), name)
    layers, where = layers_of(unet, unet.sites, "cross"), preset(name, unet)
    kept = fit_layers(layout, layers, unet.config.cross_attention_dim, where, name, base)
    assert list(kept) == list(numbers)
    held = sum(t.numel() for parts in kept.values() for t in parts.values()) / 1e6
    assert size is None or held == pytest.approx(size, rel=0.001)


@pytest.mark.parametrize(("base", "attentions", "size"), [("sd15", 32, 25.5), ("sdxl", 140, 185.8)])
def test_faceids_lora_of_rank_128_fits_every_attention_at_full_size(real, base, attentions, size):
    unet = real[base]
    paths = [site.path for site in unet.sites]
    tensors = {}
    for i, path in enumerate(paths):
        attention = unet.get_submodule(path)
        for part in ("q", "k", "v", "out"):
            linear = attention.to_out[0] if part == "out" else getattr(attention, f"to_{part}")
            down, up = (128, linear.in_features), (linear.out_features, 128)
            tensors[f"{i}.to_{part}_lora.down.weight"] = torch.empty(down, device="meta")
            tensors[f"{i}.to_{part}_lora.up.weight"] = torch.empty(up, device="meta")
    with torch.device("meta"):
        lora = face_lora(tensors, paths, unet, base)
    assert len(paths) == attentions and millions(lora) == pytest.approx(size, rel=0.01)
    assert face_tensors(lora, paths).keys() == {f"ip_adapter.{name}" for name in tensors}
    tensors["1.to_k_lora.down.weight"] = torch.empty(128, 99, device="meta")
    with torch.device("meta"), pytest.raises(ValueError, match="1.*attn2.to_k of shape .*Was it made for another"):
        face_lora(tensors, paths, unet, base)


def test_faceid_plus_of_both_versions_has_heads_of_64():
    """No tensor tells, so this is a rule: width over 64."""
    from condit.controls.ip_projectors import IdentityProjection

    perceiver = Perceiver(14, 128, 128, inner=128, heads=2, depth=4, hidden=512)
    made = IdentityPlusProjection(IdentityProjection(8, 16, 128, 4), perceiver)
    assert projector_of(made.state_dict()).perceiver_resampler.layers[0][0].heads == 2  # type: ignore[union-attr,index]


@pytest.mark.parametrize("shortcut", [None, 0.7])
def test_faceid_plus_reads_a_face_and_a_picture(make_latent, tmp_path, pictures, shortcut):
    from condit.controls.ip_projectors import IdentityProjection

    pipe = make_latent("sd15", cross_attention_dim=64)
    perceiver = Perceiver(20, 64, 64, inner=64, heads=1, depth=1, hidden=64)
    projector = IdentityPlusProjection(IdentityProjection(8, 16, 64, 4), perceiver)
    tensors = {n: t for n, t in published(pipe).items() if n.startswith("ip_adapter.")}
    save_file(tensors | {f"image_proj.{n}": t for n, t in projector.state_dict().items()}, tmp_path / "f.safetensors")
    adapter = IPAdapter.load(tmp_path / "f.safetensors", pipe, image_encoder=vision(tmp_path / "e"))
    assert adapter.config.feature == "identity+hidden"
    face, picture = torch.randn(1, 8), pictures(1)[0]
    control, encoder = adapter.control(picture, identity=face, shortcut=shortcut), adapter._encoder[0]
    assert encoder is not None
    states = adapter.features([picture])
    with torch.no_grad():
        expected = adapter.project(projector(face, states, shortcut))
        empty = adapter.project(projector(torch.zeros(1, 8), encoder.hidden(encoder.zeros()), shortcut))
    path = adapter.sites[0]
    torch.testing.assert_close(control.kv[path], expected[path], rtol=0, atol=1e-5)  # type: ignore[attr-defined]
    torch.testing.assert_close(control.empty[path], empty[path], rtol=0, atol=1e-5)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="FaceID-Plus adapter: give the reference image too"):
        adapter.control(identity=face)


# InstantStyle's words


class Words(TextTower):
    """Stands for a text tower: random vectors of words."""

    def __init__(self, hidden: int, projection: int):
        nn.Module.__init__(self)
        self.hidden, self.projection = hidden, projection

    def forward(self, phrases) -> Tensor:
        rows = [torch.randn(self.projection, generator=torch.Generator().manual_seed(len(p))) for p in phrases]
        return torch.stack(rows)


def test_words_are_subtracted_before_the_projector_alone_or_several(pipe, file, pictures):
    style = InstantStyle(IPAdapter.load(file, pipe), Words(16, 12))
    assert style.text is not None
    e = style.adapter.features(pictures(2))
    one, two = style.text(["a dog"])[0], style.text(["a dog", "grass"])
    cases: tuple[tuple[Join, Content, torch.Tensor], ...] = (
        ("sum", "a dog", 0.5 * one),
        ("sum", ["a dog", "grass"], 0.5 * two.sum(0)),
        ("mean", ["a dog", "grass"], 0.5 * two.mean(0)),
        ("sum", [["a dog"], ["a dog", "grass"]], 0.5 * torch.stack([one, two.sum(0)])),  # of each image its own
    )
    for join, words, taken in cases:
        control = style.control(pictures(2), preset="style", content=words, content_scale=0.5, join=join)
        expected = style.adapter.reference(e - taken, where=preset("style", pipe.backbone))
        for path, pair in expected.kv.items():
            for found, wanted in zip(control.kv[path], pair, strict=True):  # type: ignore[attr-defined]
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # the encoder saw one picture at a time
            assert torch.equal(control.negative().kv[path][1], expected.empty[path][1])  # type: ignore[union-attr]
        assert control.kv.keys() == expected.kv.keys()  # type: ignore[attr-defined]


def test_words_that_cannot_be_subtracted_are_told(pipe, file, pictures, tmp_path):
    adapter = IPAdapter.load(file, pipe)
    style, picture = InstantStyle(adapter, Words(16, 12)), pictures(1)[0]
    for empty in ("", "  ", [], ["a dog", ""], [["a dog"], []]):
        with pytest.raises(ValueError, match="content must be words"):
            style.control(picture, content=empty)
    with pytest.raises(ValueError, match="content= needs the text tower"):
        InstantStyle(adapter).control(picture, content="a dog")
    with pytest.raises(ValueError, match="embeddings 14.*only with the text tower of the same CLIP"):
        InstantStyle(adapter, Words(16, 14)).control(picture, content="a dog")
    with pytest.raises(ValueError, match="a content vector of width 9; the image embeddings have 12"):
        style.control(picture, content=torch.zeros(9))
    with pytest.raises(ValueError, match="join must be"):
        style.control(picture, content=["a dog", "grass"], join="max")  # type: ignore[arg-type]
    tensors = {n: t for n, t in published(pipe).items() if "image_proj" not in n}
    plus = {f"image_proj.{n}": torch.randn(t.shape) / 8 for n, t in resampler(20, 12, 16, 1).items()}
    save_file(tensors | plus, file.parent / "plus.safetensors")
    with pytest.raises(ValueError, match="reads hidden features, from which words cannot be subtracted"):
        InstantStyle(IPAdapter.load(file.parent / "plus.safetensors", pipe), Words(16, 12)).control(
            picture, content="x"
        )
    with pytest.raises(ValueError, match="reads hidden features"):
        IPAdapter.load(file.parent / "plus.safetensors", pipe).control(picture, content=torch.zeros(12))


def test_a_tower_of_the_right_width_but_another_family_is_no_twin():
    bigg, h = EncoderSize(1664, 1280, 257, 224), EncoderSize(1280, 1024, 257, 224)
    Words(1280, 1280).check_twin(bigg)
    Words(1024, 1024).check_twin(h)
    with pytest.raises(ValueError, match=r"text tower is a CLIP \(states 768, embeddings 1024\).*ViT-H/14"):
        Words(768, 1024).check_twin(h)
    with pytest.raises(ValueError, match="text tower is CLIP ViT-bigG/14"):
        Words(1280, 1280).check_twin(h)


def test_an_encoder_of_its_own_on_the_pipeline_serves_a_global_adapter(pipe, tmp_path):
    save_file(published(pipe), tmp_path / "a.safetensors")  # 12 features, as the pipeline's own encoder has
    adapter = IPAdapter.load(tmp_path / "a.safetensors", pipe)
    assert adapter._encoder[0] is None
    assert isinstance(vision_of(tmp_path), CLIPImage)


def vision_of(tmp_path: Path) -> CLIPImage:
    from condit.weights.clip_towers import load_image_encoder

    return load_image_encoder(vision(tmp_path / "v"))
