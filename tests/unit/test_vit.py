"""backbones/vit.py: sizes against the published ones, position tables, inputs of every shape, training."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from condit.backbones.vit import FLAVOURS, PRESETS, ViT, ViTBlock, ViTConfig, resize_positions
from condit.nn.attention import Attend, Call
from condit.nn.lora import LoRA, linear_shapes

TINY = ViTConfig(patch_size=4, image_size=16, dim=24, depth=2, heads=3, mlp_dim=40, classes=5)


def random_vit(config: ViTConfig = TINY, seed: int = 0) -> ViT:
    """Noise on every weight: a head of zeros and norms of weight one would hide a mistake."""
    g = torch.Generator().manual_seed(seed)
    model = ViT(config, generator=g).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return model


def pictures(height: int = 16, width: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def equal(actual: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# Published sizes.

# Parameters with 1000 classes at 224 px, without head, tokens, and 10^9 multiply-accumulates at 224 and at 384 px (378
# for H/14): counted on timm's classes, attention's products included. The paper gives 86, 307 and 632 M (Table 1).
PUBLISHED = {
    "ViT-Ti/16": (5_717_416, 5_524_416, 197, 1.254, 4.682),
    "ViT-S/16": (22_050_664, 21_665_664, 197, 4.599, 15.490),
    "ViT-B/16": (86_567_656, 85_798_656, 197, 17.564, 55.484),
    "ViT-B/32": (88_224_232, 87_455_232, 50, 4.409, 13.044),
    "ViT-L/16": (304_326_632, 303_301_632, 197, 61.555, 191.066),
    "ViT-L/32": (306_535_400, 305_510_400, 50, 15.378, 45.276),
    "ViT-H/14": (632_045_800, 630_764_800, 257, 167.295, 503.481),
}


def on_meta(config: ViTConfig) -> ViT:
    with torch.device("meta"):
        return ViT(config).eval()


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def giga_macs(model: ViT, side: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_tokens_and_multiply_accumulates_are_the_published(name):
    parameters, without_head, tokens, macs, macs_large = PUBLISHED[name]
    config = PRESETS[name]
    model = on_meta(config)
    assert count(model) == parameters
    assert model.head is not None and count(model) - count(model.head) == without_head
    assert model.pos_embed.shape[1] == tokens
    assert giga_macs(model, 224) == pytest.approx(macs, abs=6e-4)
    assert giga_macs(model, 378 if config.patch_size == 14 else 384) == pytest.approx(macs_large, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("ViT-B/16", 86_859_496), ("ViT-B/32", 88_297_192), ("ViT-L/16", 304_715_752), ("ViT-L/32", 306_632_680)],
)
def test_at_384_pixels_only_the_position_table_grows(name, parameters):
    assert count(on_meta(replace(PRESETS[name], image_size=384))) == parameters


def test_the_imagenet_21k_release_of_b_16_has_a_representation_layer_and_21843_classes():
    model = on_meta(replace(PRESETS["ViT-B/16"], classes=21843, representation_size=768))
    assert count(model) == 85_798_656 + 590_592 + 16_797_267


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in PUBLISHED])
def test_the_other_presets_differ_from_the_published_by_patches_and_class_token_only(name):
    config = PRESETS[name]
    base = next(c for n, c in PRESETS.items() if n in PUBLISHED and (c.dim, c.depth) == (config.dim, config.depth))
    patches = (config.patch_size**2 - base.patch_size**2) * 3 * config.dim
    positions = (math.prod(config.grid) - math.prod(base.grid)) * config.dim
    class_token = 0 if config.class_token else -2 * config.dim  # itself and its position
    assert count(on_meta(config)) == count(on_meta(base)) + patches + positions + class_token


# Positions and sizes of images.


@pytest.mark.parametrize("resize", ["linear_aligned", "bicubic_antialias", "bicubic"])
def test_resizing_keeps_the_class_row_and_a_constant_table(resize):
    table = torch.cat([torch.randn(1, 1, 6), torch.ones(1, 12, 6)], 1)
    actual = resize_positions(table, (3, 4), (5, 2), resize)
    assert torch.equal(actual[:, 0], table[:, 0])
    equal(actual[:, 1:], torch.ones(1, 10, 6))


def test_the_authors_rule_keeps_the_corners_of_the_table():
    table = torch.randn(1, 12, 6)
    actual = resize_positions(table, (3, 4), (7, 5), "linear_aligned").unflatten(1, (7, 5))
    for row in (0, -1):
        for column in (0, -1):
            equal(actual[:, row, column], table.unflatten(1, (3, 4))[:, row, column])


def test_the_rules_of_resizing_differ():
    table = torch.randn(1, 16, 6)
    results = [resize_positions(table, (4, 4), (3, 3), f.resize) for f in FLAVOURS.values()]
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(results, results[1:] + results[:1], strict=True))


def test_the_same_grid_is_not_touched():
    table = torch.randn(1, 17, 6)
    assert resize_positions(table, (4, 4), (4, 4), "bicubic") is table


def test_an_image_of_another_shape_with_equally_many_patches_gets_other_positions():
    model, wide = random_vit(), pictures(8, 32)
    tokens = model.embed(wide)[:, 1:]
    equal(tokens, model.patch_embed(wide) + resize_positions(model.pos_embed, (4, 4), (2, 8), "linear_aligned")[:, 1:])
    assert (tokens - model.patch_embed(wide) - model.pos_embed[:, 1:]).abs().max() > 1e-2


def test_a_table_may_be_rectangular_and_patches_are_counted_row_by_row():
    model = random_vit(replace(TINY, image_size=(8, 12)))
    assert model.config.grid == (2, 3)
    x = pictures(8, 12)
    x[..., 4:8, 8:12] += 1  # row 1, column 2
    changed = (model.patch_embed(x) - model.patch_embed(pictures(8, 12))).abs().amax((0, 2)) > 1e-3
    assert changed.tolist() == [False, False, False, False, False, True]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 16, 18), r"16 x 18 pixels does not divide into patches of 4.*16 x 16"),
        ((2, 1, 16, 16), r"images \(B, 3, H, W\); found shape \(2, 1, 16, 16\)"),
        ((3, 16, 16), r"found shape \(3, 16, 16\)"),
        ((1, 3, 0, 16), r"0 x 16 pixels"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        random_vit()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 18}, "image_size 18 must be a multiple of patch_size 4"),
        ({"image_size": (16, 18)}, "must be a multiple"),
        ({"heads": 5}, "dim 24 must be a multiple of heads 5"),
        ({"class_token": False}, "'token' needs class_token=True"),
        ({"fc_norm": True}, "needs classifier 'gap', not 'token'"),
        ({"depth": 0}, "at least 1"),
    ],
)
def test_configurations_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)


def test_h_14_cannot_have_384_pixels():
    with pytest.raises(ValueError, match="384 must be a multiple of patch_size 14"):
        replace(PRESETS["ViT-H/14"], image_size=384)


# What comes out.


def test_features_are_class_token_and_patches_that_the_head_reads():
    model = random_vit()
    f = model.features(pictures(16, 24))
    assert f.patches.shape == (2, 24, 24)
    assert f.grid == (4, 6)
    assert f.cls is not None and model.head is not None
    equal(model(pictures(16, 24)), model.head(f.cls))


def test_features_of_fewer_blocks_continue_to_the_same_logits():
    model = random_vit()
    half = model.features(pictures(), blocks=1, norm=False)
    assert half.cls is not None
    shorter = ViT(replace(TINY, depth=1)).eval()
    shorter.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("blocks.1.")})
    f = shorter.features(pictures(), norm=False)
    assert torch.equal(f.patches, half.patches)
    with pytest.raises(ValueError, match="within 0..2.*found 3"):
        model.features(pictures(), blocks=3)


@torch.no_grad()
def test_gap_averages_patches_after_the_norm_and_fc_norm_before_it():
    model = random_vit(replace(TINY, classifier="gap", class_token=True, classes=0))
    raw = model.features(pictures(), norm=False).patches
    equal(model(pictures()), model.norm(raw).mean(1))
    timm = ViT(replace(model.config, fc_norm=True)).eval()
    timm.load_state_dict(
        {k.replace("norm.", "fc_norm.") if k[:5] == "norm." else k: v for k, v in model.state_dict().items()}
    )
    weight, bias = model.norm.parameters()
    equal(timm(pictures()), F.layer_norm(raw.mean(1), (24,), weight, bias, 1e-6))


@torch.no_grad()
def test_unpooled_heads_read_every_token():
    model = random_vit(replace(TINY, classifier="unpooled", representation_size=7))
    f = model.features(pictures())
    assert f.cls is not None and model.head is not None and model.pre_logits is not None
    logits = model(pictures())
    assert logits.shape == (2, 17, 5)
    equal(logits[:, 0], model.head(model.pre_logits(f.cls)))
    assert model.pre_logits(f.cls).abs().max() <= 1


@torch.no_grad()
def test_the_three_gelus_differ_and_only_by_little():
    model, outputs = random_vit(), []
    for gelu in ("exact", "tanh", "quick"):
        other = ViT(replace(TINY, flavour=replace(TINY.flavour, gelu=gelu))).eval()
        other.load_state_dict(model.state_dict())
        outputs.append(other(pictures()))
    assert 1e-6 < (outputs[0] - outputs[1]).abs().max() < 1e-2
    assert 1e-3 < (outputs[0] - outputs[2]).abs().max() < 1


@torch.no_grad()
def test_eps_reaches_every_norm():
    model = random_vit(replace(TINY, flavour=FLAVOURS["transformers"]))
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 5
    assert {m.eps for m in norms} == {1e-12}


@torch.no_grad()
def test_a_row_of_a_batch_equals_its_single_run():
    model, x = random_vit(), pictures()
    equal(model(x)[:1], model(x[:1]))


# Controls and LoRA.


@dataclass(frozen=True)
class Mute:
    """Stands for a control: no attention at one site; remembers nothing, adds nothing."""

    path: str

    def around(self, call: Call, attend: Attend) -> Tensor:
        out = attend(call)
        if call.site.path != self.path:
            return out
        assert call.plain is not None and call.image == slice(1, call.q.shape[2])
        return out * 0


@torch.no_grad()
def test_controls_wrap_the_attention_of_the_site_they_name():
    model = random_vit()
    assert [s.path for s in model.sites] == ["blocks.0.attn", "blocks.1.attn"]
    assert {s.path for s in model.sites} <= {path for path, _ in model.named_modules()}
    actual = model(pictures(), controls=[Mute("blocks.1.attn")])
    block = model.blocks[1]
    assert isinstance(block, ViTBlock)
    block.attn.proj.weight.zero_()
    equal(actual, model(pictures()))
    assert torch.equal(actual, model(pictures(), controls=[Mute("blocks.7.attn")]))


@torch.no_grad()
def test_a_lora_equals_the_weights_with_its_update_added():
    model = random_vit()
    lora = LoRA(linear_shapes(model, ["attn.qkv", "mlp.fc2", "head"]), rank=2, alpha=4)
    g = torch.Generator().manual_seed(2)
    for weight in (*lora.a.values(), *lora.b.values()):
        weight.normal_(std=0.3, generator=g)
    actual = model(pictures(), lora=lora)
    assert (actual - model(pictures())).abs().max() > 1e-2
    for path, key in lora.keys.items():
        model.get_submodule(path).weight.add_(lora.scales[path] * lora.b[key] @ lora.a[key])  # type: ignore[operator]
    equal(actual, model(pictures()), atol=1e-5)  # x W + x A B against x (W + A B)


# Initial weights and training.


def test_initial_weights_are_the_authors():
    config = ViTConfig(image_size=64, dim=192, depth=1, heads=3, mlp_dim=768, representation_size=96, classes=7)
    model = ViT(config, generator=torch.Generator().manual_seed(0))
    assert model.cls_token is not None and model.pre_logits is not None and model.head is not None
    assert not model.cls_token.any() and not model.head.weight.any() and not model.head.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    block = model.blocks[0]
    assert isinstance(block, ViTBlock)
    for weight in block.attn.qkv.weight.chunk(3):  # the bound of one D x D matrix, not of the fused one
        assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / (192 + 192)), rel=1e-3)
    assert block.mlp.fc1.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (192 + 768)), rel=1e-3)
    assert 0 < block.mlp.fc1.bias.abs().max() < 1e-5
    for layer, fan_in in ((model.patch_embed.proj, 3 * 16 * 16), (model.pre_logits.fc, 192)):
        assert layer.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
        assert not layer.bias.any()  # type: ignore[union-attr]


def test_the_generator_decides_the_initial_weights():
    def weights(seed: int) -> Tensor:
        model = ViT(TINY, generator=torch.Generator().manual_seed(seed))
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("fields", [{}, {"classifier": "gap", "class_token": False}, {"representation_size": 6}])
def test_gradients_reach_every_weight(fields):
    model = random_vit(replace(TINY, **fields)).train()
    F.cross_entropy(model(pictures(24, 16)), torch.tensor([0, 3])).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_dropout_acts_in_training_only_and_is_drawn_from_the_generator():
    plain, model = random_vit(), random_vit(replace(TINY, dropout=0.3))
    assert torch.equal(plain(pictures()), model(pictures()))
    model.train()
    drawn = [model(pictures(), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    state = torch.get_rng_state()
    model(pictures(), generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("drawn", [True, False])
def test_checkpointing_gives_the_same_output_and_gradients_with_the_same_dropout(rate, drawn):
    """drawn: from a generator of its own, else from the global one."""
    model = random_vit(replace(TINY, dropout=rate)).train()
    results = []
    for checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(5) if drawn else None
        out = model(pictures(), generator=generator, checkpointing=checkpointing)
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_keeps_less_between_forward_and_backward():
    model, kept = random_vit(replace(TINY, depth=6)).train(), []
    for checkpointing in (False, True):
        numbers: list[int] = []

        def pack(saved: Tensor, numbers: list[int] = numbers) -> Tensor:
            numbers.append(saved.numel())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            model(pictures(), checkpointing=checkpointing)
        kept.append(sum(numbers))
    assert kept[1] < 0.5 * kept[0]


@torch.no_grad()
def test_bf16_stays_near_fp32():
    model = random_vit()
    exact = model(pictures(20, 16))
    actual = model.bfloat16()(pictures(20, 16).bfloat16())
    assert actual.dtype is torch.bfloat16
    equal(actual.float(), exact, atol=0.05 * exact.abs().max().item())  # eight bits of mantissa through two blocks


def test_compiled_in_one_graph_equals_eager_on_a_resized_table_and_under_a_control():
    model, controls = random_vit(replace(TINY, flavour=FLAVOURS["timm"])), [Mute("blocks.1.attn")]
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # the trace; compiling its code takes long
    with torch.no_grad():
        equal(compiled(pictures(8, 20), controls=controls), model(pictures(8, 20), controls=controls))
