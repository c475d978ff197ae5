"""IP-Adapter's published files (h94/IP-Adapter) at full size on the meta device: names, shapes, counts."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from condit.backbones.unet import PRESETS, UNet
from condit.controls.control import Where
from condit.controls.instantstyle import preset
from condit.controls.ip_adapter import IPAdapter, IPConfig, face_tensors
from condit.controls.ip_projectors import IdentityPlusProjection, Perceiver, layers_of
from condit.drawing.pipeline import Pipeline
from condit.weights.ip_files import face_lora, fit_layers, read_layout
from condit.weights.ip_projectors import needs_of, projector_of
from ip_published import published, resampler, vision


@pytest.fixture(scope="module")
def pipe(make_latent) -> Pipeline:
    return make_latent("sd15")


@pytest.fixture(scope="module")
def xl(make_latent) -> Pipeline:
    return make_latent("sdxl")


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
    values = {f"image_proj.{n}": t for n, t in projector.items()}
    count = {"sd15": 16, "sdxl": 70}["sdxl" if unet.config.addition_embed_type else "sd15"]
    widths = [unet.get_submodule(s.path).to_q.out_features for s in unet.sites if s.kind == "cross"]  # type: ignore[union-attr]
    assert len(widths) == count
    for i, width in enumerate(widths):
        for part in "kv":
            shape = width, unet.config.cross_attention_dim
            values[f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight"] = torch.empty(shape, device="meta")  # type: ignore[arg-type]
    return values


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
    with torch.device("meta"), pytest.raises(ValueError, match="attn2.to_k' of shape .*Was it made for another"):
        face_lora(tensors, paths, unet, base)


def test_faceid_plus_of_both_versions_has_heads_of_64():
    """No tensor tells, so this is a rule: width over 64."""
    from condit.controls.ip_projectors import IdentityProjection

    perceiver = Perceiver(14, 128, 128, inner=128, heads=2, depth=4, hidden=512)
    made = IdentityPlusProjection(IdentityProjection(8, 16, 128, 4), perceiver)
    assert projector_of(made.state_dict()).perceiver_resampler.layers[0][0].heads == 2  # type: ignore[union-attr,index]


@pytest.mark.parametrize("shortcut", [None, 0.7])
def test_faceid_plus_reads_a_face_and_an_image(make_latent, tmp_path, pictures, shortcut):
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
