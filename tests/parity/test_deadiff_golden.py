"""DEADiff against numbers of the released code (golden/deadiff/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from condit.backbones.unet import UNet, UNetAttention, UNetBlock, UNetConfig, UNetContext
from condit.controls.control import Control, Run, Step
from condit.controls.deadiff import DEADiff, DEADiffConfig, DEADiffReference
from condit.controls.deadiff_layers import Name, cross_shapes, layer_table
from condit.diffusion.vp import Process, make_path
from condit.diffusion.vp_samplers import ddim
from condit.encoders.clip_patches import ClipPatches, resize_antialiased
from condit.encoders.qformer import QFormer, QFormerConfig
from condit.nn.attention import Site
from condit.weights.deadiff import IMAGE_MAP, join, place_in_diffusers, split
from condit.weights.original_sd import part, unet_names

GOLDEN = Path(__file__).parent / "golden" / "deadiff"


def close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """The tolerance of the fixtures: as a part of the largest value."""
    largest = expected.abs().max()
    torch.testing.assert_close(found / largest, expected / largest, rtol=0, atol=relative)


def read(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


# The Q-Former


def published_qformer() -> dict[str, Tensor]:
    """The fixture's tensors as they stand in a full checkpoint."""

    def full(name: str) -> str:
        return (
            name.replace("proj_layer.", "style_proj_layer.") if name.startswith("proj_layer") else f"style_blip.{name}"
        )

    return {full(name): value for name, value in read("qformer_weights").items()}


@pytest.fixture(scope="module")
def qformer() -> QFormer:
    config = json.loads((GOLDEN / "qformer_config.json").read_text())
    parts = split(published_qformer())
    tensors = {name.removeprefix("style."): value for name, value in parts.adapter.items()}
    found = QFormer(QFormerConfig.of(tensors, heads=config["heads"]))
    found.load_state_dict(tensors, strict=True)
    return found.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tower() -> ClipPatches:
    heads = json.loads((GOLDEN / "qformer_config.json").read_text())["vision_heads"]
    return ClipPatches.of(split(published_qformer()).tower, heads=heads)


def test_tower_and_norm_equal_the_released_ones(tower, qformer):
    io = read("qformer_io")
    close(qformer.ln_vision(tower.tokens(io["image"])), io["vision_features"])


@pytest.mark.parametrize("padded", ["", "_padded"])
def test_the_q_former_and_its_projection_equal_the_released_ones(tower, qformer, padded):
    io = read("qformer_io")
    tokens, ids, mask = tower.tokens(io["image"]), io[f"input_ids{padded}"], io[f"attention_mask{padded}"]
    states = qformer.read(tokens, ids, mask)
    if not padded:
        close(states, io["last_hidden"])
    close(states[:, : qformer.config.queries], io[f"multimodal_embeds{padded}"])
    close(qformer(tokens, ids, mask), io[f"ctx_tokens{padded}"])


def test_queries_alone_equal_the_released_ones(tower, qformer):
    io = read("qformer_io")
    close(qformer.read(tower.tokens(io["image"])), io["queries_without_text"])


def test_published_names_come_back_bit_by_bit():
    published = published_qformer()
    back = join(split(published))
    twin = {n.replace("style_blip", "content_blip"): v for n, v in published.items() if ".visual_encoder." in n}
    assert back.keys() == {*published, *twin}
    assert all(torch.equal(back[name], value) for name, value in (published | twin).items())


# Joint attention


IMAGE_WEIGHTS = ["none", "zeros", "w0.0", "w0.5", "w1.0", "w1.7"]


def image_tokens(kind: str, tokens: Tensor) -> tuple[Tensor | None, float]:
    """Tokens and their weight for a name of the fixture."""
    if kind == "none":
        return None, 1.0
    return (torch.zeros_like(tokens), 1.0) if kind == "zeros" else (tokens, float(kind[1:]))


def control_at(site: Site, maps: dict[str, Tensor], tokens: Tensor, strength: float) -> DEADiffReference:
    """A control of one layer from the fixture's maps."""
    kv = {site.path: (tokens @ maps["i_to_k.weight"].mT, tokens @ maps["i_to_v.weight"].mT)}
    control = DEADiffReference(kv=kv, table={site.path: "style"}, adapter=None, strength={"style": strength})  # type: ignore[arg-type]
    found = control.at(Step(0, 1, 1.0))
    assert found is not None
    return found


@pytest.mark.parametrize("kind", IMAGE_WEIGHTS)
def test_joint_attention_equals_the_released_layer(kind):
    golden, site = read("attention"), Site("attn2", "cross", 0)
    w = {name.removeprefix("w."): value for name, value in golden.items() if name.startswith("w.")}
    layer = UNetAttention(16, 24, 2, site)
    layer.load_state_dict({name: value for name, value in w.items() if not name.startswith("i_")}, strict=True)
    tokens, strength = image_tokens(kind, golden["image"])
    controls = () if tokens is None else (control_at(site, w, tokens, strength),)
    with torch.no_grad():
        text = {site.path: layer.keys_values(golden["text"], None)}
        found = layer(golden["x"], UNetContext(golden["x"], text, None, controls))
    close(found, golden[f"out.{kind}"])


@pytest.mark.parametrize("weight", [0.6, 1.0])
def test_a_transformer_block_equals_the_released_one(weight):
    golden = read("attention")
    w = {name.removeprefix("block."): value for name, value in golden.items() if name.startswith("block.")}
    block = UNetBlock(16, 2, 24, "block")
    block.load_state_dict({name: value for name, value in w.items() if ".i_to_" not in name}, strict=True)
    maps = {name.removeprefix("attn2."): value for name, value in w.items()}
    control = control_at(block.attn2.site, maps, golden["image"], weight)
    with torch.no_grad():
        text = {block.attn2.site.path: block.attn2.keys_values(golden["text"], None)}
        found = block(golden["x"], UNetContext(golden["x"], text, None, (control,)))
    close(found, golden[f"block_out.w{weight}"])


# The UNet


@pytest.fixture(scope="module")
def published_unet() -> dict[str, Tensor]:
    """The fixture's UNet as it stands in a full checkpoint."""
    count = json.loads((GOLDEN / "unet_config.json").read_text())["weight_shards"]
    shards = [read(f"unet_weights_{i}") for i in range(count)]
    return {f"model.diffusion_model.{name}": value for shard in shards for name, value in shard.items()}


@pytest.fixture(scope="module")
def unet(published_unet) -> UNet:
    c = json.loads((GOLDEN / "unet_config.json").read_text())["config"]
    config = UNetConfig(
        block_out_channels=tuple(c["model_channels"] * m for m in c["channel_mult"]),
        attention_head_dim=c["num_heads"],
        cross_attention_dim=c["context_dim"],
        sample_size=8,
    )
    found = UNet(config)
    base = {name: value for name, value in published_unet.items() if not IMAGE_MAP.fullmatch(name)}
    assert base.keys() == split(published_unet).base.keys()
    found.load_state_dict(unet_names(part(base, "model.diffusion_model."), config), strict=True)
    return found.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def adapter(published_unet, unet) -> DEADiff:
    """The image maps of the fixture; its tokens are given, so the Q-Formers are empty."""
    maps = {name: value for name, value in split(published_unet).adapter.items()}
    small = QFormerConfig(queries=4, width=20, layers=1, heads=2, hidden=8, image_width=8, vocabulary=8, positions=8)
    found = DEADiff(DEADiffConfig(), QFormer(small), QFormer(small), cross_shapes(unet))
    missing, unexpected = found.load_state_dict(maps, strict=False)
    assert not unexpected and all(name.startswith(("style.", "content.")) for name in missing)
    return found.requires_grad_(False)


def test_style_and_content_go_to_the_layers_of_the_released_unet(unet):
    order = json.loads((GOLDEN / "unet_config.json").read_text())["attention_order"]
    table = layer_table(unet.sites)
    expected = [(f"{place_in_diffusers(row['module'])}.transformer_blocks.0.attn2", row["branch"]) for row in order]
    assert list(table.items()) == expected


MODES = {
    "both.w0.0": (("style", "content"), 0.0),
    "both.w0.5": (("style", "content"), 0.5),
    "both.w1.0": (("style", "content"), 1.0),
    "both.w1.5": (("style", "content"), 1.5),
    "style_only.w1.0": (("style",), 1.0),
    "content_only.w1.0": (("content",), 1.0),
    "uncond.w1.0": ((), 1.0),
    "no_image": (None, 1.0),
    "split_text.w1.0": (("style", "content"), 1.0),
}


def controls_of(adapter: DEADiff, unet: UNet, sets, strength: float, text: Tensor | None = None) -> list[Control]:
    """What a pipeline call hands to the UNet for a mode of the fixture; no sets: the unconditional side."""
    io = read("unet_io")
    if sets is None:
        return []
    tokens: dict[Name, Tensor] = {name: io[name] for name in sets or ("style",)}
    control = adapter.reference(tokens, strength=dict.fromkeys(("style", "content"), strength), content_text=text)
    control = control if sets else control.negative()
    run = Run(unet, len(io["x"]), (8, 8), io["x"], None, 4)  # type: ignore[arg-type]
    found = control.prepare(run).at(Step(0, 1, 1.0))
    return [found] if found is not None else []


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_the_released_unet(unet, adapter, mode):
    io, (sets, strength) = read("unet_io"), MODES[mode]
    text = io["text_content"] if mode.startswith("split_text") else None
    with torch.no_grad():
        controls = controls_of(adapter, unet, sets, strength, text)
        found = unet(io["x"], io["t"], io["text"], controls=controls)
    close(found, io[f"out.{mode}"])


@pytest.mark.parametrize("weight", [0.6, 1.0])
@pytest.mark.parametrize("mode", ["both", "style_only"])
def test_a_guided_ddim_run_of_the_released_sampler(unet, adapter, mode, weight):
    """Every step of it; the unconditional side has zero tokens and the negative text."""
    golden, told = read("ddim_cfg"), json.loads((GOLDEN / "ddim_cfg_config.json").read_text())
    io, process = read("unet_io"), Process()
    path = make_path(process, "ddim", told["steps"])
    assert path.timesteps.long().flip(0).tolist() == golden["timesteps"].tolist()
    sides = [
        (io["text"], controls_of(adapter, unet, ("style", "content") if mode == "both" else ("style",), weight)),
        (golden["negative_text"], controls_of(adapter, unet, (), weight)),
    ]

    def denoise(x: Tensor, step: Step) -> Tensor:
        at = torch.full((len(x),), step.time)
        cond, uncond = (unet(x, at, text, controls=controls) for text, controls in sides)
        return uncond + told["guidance"] * (cond - uncond)

    steps = [io["x"]]
    with torch.no_grad():
        final = ddim(denoise, io["x"], path, on_step=lambda i, x, x0: steps.append(x))
    close(torch.stack(steps), golden[f"{mode}.w{weight}.trajectory"], 5e-5)
    close(final, golden[f"{mode}.w{weight}.final"], 5e-5)


# Preparation of references


@pytest.mark.parametrize("name", ["preprocess", "preprocess_down"])
def test_references_are_prepared_as_by_the_released_code(tower, name):
    fixture = read(name)
    patches = ClipPatches(tower.tower, blocks=2)
    patches.size = 224
    for i in range(len(fixture) // 2):
        close(patches.prepare(fixture[f"in{i}"]), fixture[f"out{i}"])


@pytest.mark.parametrize("size", [(300, 90), (90, 300), (224, 500), (226, 224)])
def test_the_antialias_blurs_both_axes_as_soon_as_one_shrinks(size):
    """By hand, in float64: the same kernel and border rule written as one dense two-dimensional sum."""
    images = torch.rand(1, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernels = []
    for side in size:
        sigma = max((side / 224 - 1) / 2, 0.001)
        width = int(max(4 * sigma, 3))
        width += width % 2 == 0
        weights = torch.tensor(
            [pow(2.718281828459045, -((i - width // 2) ** 2) / (2 * sigma**2)) for i in range(width)]
        )
        kernels.append((weights / weights.sum()).double())
    dense = torch.outer(*kernels)[None, None].expand(2, 1, -1, -1)
    margin = [len(k) // 2 for k in kernels]
    padded = torch.nn.functional.pad(images, (margin[1], margin[1], margin[0], margin[0]), mode="reflect")
    blurred = torch.nn.functional.conv2d(padded, dense, groups=2)
    expected = torch.nn.functional.interpolate(blurred, size=(224, 224), mode="bicubic", align_corners=True)
    torch.testing.assert_close(resize_antialiased(images, (224, 224)), expected, rtol=0, atol=1e-6)
