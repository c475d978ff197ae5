"""backbones/diffit.py, diffit_image.py: attention with time, relative positions, both shapes of the model."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from condit.backbones.diffit import PRESETS, TMSA, DiffiT, DiffiTConfig, DiffiTContext, relative_bias, resize
from condit.diffusion.guidance import power_cosine_scale
from condit.nn.attention import Site
from condit.nn.lora import LoRA, linear_shapes
from diffit_models import Add, Double, close, randomised

TINY = DiffiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=5)
SITE = Site("attn", "self", 0)


@pytest.fixture
def model() -> DiffiT:
    model = DiffiT(TINY)
    randomised(model)
    return model


def latents(*size: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, *size, generator=g), torch.tensor([3.0, 700.0]), torch.tensor([1, 4])


# Attention


def test_tmsa_is_attention_of_tokens_and_time_projected_as_one():
    torch.manual_seed(0)
    attn = TMSA(8, 6, 2, (2, 3), SITE)
    torch.nn.init.normal_(attn.relative_position_bias_table)
    xs, xt = torch.randn(2, 1, 6, 8), torch.randn(2, 6)
    actual, _ = attn(xs, DiffiTContext(xt, (2, 3)))
    joined = torch.cat([xs[:, 0], xt[:, None].expand(-1, 6, -1)], -1)
    weight = torch.cat([attn.qkv.weight, attn.qkv_temb.weight], 1)
    q, k, v = F.linear(joined, weight, attn.qkv.bias + attn.qkv_temb.bias).chunk(3, -1)
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        scores = q[..., part] @ k[..., part].mT / 2 + attn.bias((2, 3))[0, h]
        heads.append(scores.softmax(-1) @ v[..., part])
    close(actual[:, 0], attn.proj(torch.cat(heads, -1)))


def test_bias_is_the_tables_entry_of_the_offset_query_minus_key():
    table = torch.randn(3 * 5, 2)  # a window of 2 x 3
    bias = relative_bias(table, (2, 3), (2, 3))
    assert bias.shape == (1, 2, 6, 6)
    for query in range(6):
        for key in range(6):
            dr, dc = query // 3 - key // 3, query % 3 - key % 3
            assert torch.equal(bias[0, :, query, key], table[(dr + 1) * 5 + dc + 2])


@pytest.mark.parametrize("grid", [(3, 3), (7, 7), (3, 8), (1, 4)])
def test_a_resized_table_keeps_the_bias_of_a_token_to_itself(grid):
    table = torch.randn(7 * 7, 2)
    bias = relative_bias(table, (4, 4), grid)
    n = grid[0] * grid[1]
    assert bias.shape == (1, 2, n, n)
    close(bias[0].diagonal(dim1=1, dim2=2), table[24][:, None].expand(2, n))


def test_a_resized_table_of_one_value_keeps_it():
    close(relative_bias(torch.full((49, 2), 0.3), (4, 4), (5, 9)), torch.full((1, 2, 45, 45), 0.3))


def test_the_fused_kernel_takes_the_bias(model):
    x, t, y = latents(8, 12)
    with torch.no_grad():
        expected = model(x, t, y)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # raises where it cannot
            close(model(x, t, y), expected)
        with sdpa_kernel([SDPBackend.MATH]):
            close(model(x, t, y), expected)


# The latent model


@pytest.mark.parametrize(
    ("size", "depth", "parameters", "all_g", "linear_g"),
    [
        (32, 28, 561_330_144, 118.507, 114.279),  # Table 9: 561 M and 114 G
        (32, 30, 601_201_664, 126.971, 122.441),
        (64, 28, 563_562_464, 524.424, 456.778),
        (64, 30, 603_530_240, 561.879, 489.401),
    ],
)
def test_parameters_and_multiply_accumulates_of_xl_2(size, depth, parameters, all_g, linear_g):
    preset = PRESETS["DiffiT-XL/2" if size == 32 else "DiffiT-XL/2-512"]
    with torch.device("meta"):
        model = DiffiT(replace(preset, depth=depth))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 4, size, size), torch.empty(1), torch.empty(1, dtype=torch.long))
    assert sum(p.numel() for p in model.parameters()) == parameters
    block = sum(p.numel() for p in model.blocks[0].parameters())
    assert block == 15 * 1152**2 + 12 * 1152 + (size - 1) ** 2 * 16
    assert size == 64 or parameters - depth * block == 3_128_864  # with the fixed positions
    counts = {str(op): n / 2e9 for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counts.items() if "bmm" in op or "attention" in op)
    assert round(sum(counts.values()), 3) == all_g
    assert round(sum(counts.values()) - products, 3) == linear_g


def test_every_preset_is_among_the_counted():
    assert list(PRESETS) == ["DiffiT-XL/2", "DiffiT-XL/2-512"]


def test_a_fresh_network_puts_out_zero_but_its_blocks_are_not_the_identity():
    model = DiffiT(TINY)
    x, t, y = latents(8, 8)
    assert torch.equal(model(x, t, y), torch.zeros(2, 8, 8, 8))
    tokens = torch.randn(2, 1, 16, 16)
    context = DiffiTContext(model.embed(t, y), (4, 4))
    assert (model.blocks[0](tokens, context) - tokens).abs().max() > 0.1


def test_equal_generators_give_equal_weights():
    a, b = DiffiT(TINY), DiffiT(TINY)
    for model in (a, b):
        model.initialise(torch.Generator().manual_seed(5))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_rectangular_latent_comes_back_in_its_shape_and_its_orientation(model):
    x, t, y = latents(4, 12)
    with torch.no_grad():
        wide, tall = model(x, t, y), model(x.mT, t, y)
    assert wide.shape == (2, 8, 4, 12)
    assert tall.shape == (2, 8, 12, 4)
    assert (wide - tall.mT).abs().max() > 1e-2  # rows and columns have positions of their own


def test_a_model_trained_on_a_rectangle_needs_no_resizing():
    model = DiffiT(replace(TINY, input_size=(4, 12)))
    assert model.get_parameter("blocks.0.attn.relative_position_bias_table").shape == (3 * 11, 2)
    assert torch.equal(model.positions((2, 6)), model.pos_embed)


@pytest.mark.parametrize("size", [16, (4, 12)])
def test_a_resized_model_computes_what_the_old_one_does_at_that_size(model, size):
    larger = resize(model, size)
    x, t, y = latents(*larger.config.latent)
    with torch.no_grad():
        close(larger(x, t, y), model(x, t, y))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(larger.parameters(), model.parameters(), strict=True))
    assert resize(larger, 8).pos_embed.shape == model.pos_embed.shape


def test_biases_formed_once_give_the_same_output(model):
    x, t, y = latents(8, 12)
    with torch.no_grad():
        assert torch.equal(model(x, t, y, biases=model.biases((4, 6))), model(x, t, y))


def test_biases_of_another_grid_raise(model):
    with pytest.raises(ValueError, match=r"biases are for 24 tokens; this latent has 16. Use biases\(\(4, 4\)\)"):
        model(*latents(8, 8), biases=model.biases((4, 6)))


def test_a_row_of_a_batch_equals_its_single_run(model):
    x, t, y = latents(8, 8)
    with torch.no_grad():
        both = model(x, t, y)
        close(model(x[1:], t[1:], y[1:]), both[1:])


def test_no_labels_means_the_null_class(model):
    x, t, _ = latents(8, 8)
    with torch.no_grad():
        assert torch.equal(model(x, t), model(x, t, torch.full((2,), model.null_label)))
        assert (model(x, t) - model(x, t, torch.zeros(2, dtype=torch.long))).abs().max() > 1e-3


def test_an_unconditional_model_has_no_table_and_takes_no_labels():
    model = DiffiT(replace(TINY, num_classes=0))
    x, t, y = latents(8, 8)
    assert model(x, t).shape == (2, 8, 8, 8)
    assert not any(name.startswith("y_embedder") for name in model.state_dict())
    with pytest.raises(ValueError, match="unconditional"):
        model(x, t, y)


def test_labels_drop_to_the_null_class_at_their_rate_and_by_the_generator(model):
    y = torch.arange(5000) % 5
    dropped = model.drop_labels(y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropped, model.drop_labels(y, generator=torch.Generator().manual_seed(0)))
    gone = dropped == model.null_label
    assert 0.08 < gone.float().mean() < 0.12
    assert torch.equal(dropped[~gone], y[~gone])


def test_without_dropout_there_is_no_null_class():
    model = DiffiT(replace(TINY, class_dropout_prob=0.0))
    x, t, y = latents(8, 8)
    assert model.y_embedder.embedding_table.num_embeddings == 5
    assert torch.equal(model.drop_labels(y, generator=torch.Generator()), y)
    with pytest.raises(ValueError, match="no null class"):
        model(x, t)


@pytest.mark.parametrize("shape", [(2, 4, 7, 8), (2, 3, 8, 8), (4, 8, 8)])
def test_a_latent_that_does_not_fit_raises(model, shape):
    with pytest.raises(ValueError, match=r"\(B, 4, H, W\) with H and W multiples of 2.*found"):
        model(torch.zeros(shape), torch.zeros(2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("wrong", [{"input_size": 9}, {"num_heads": 3}, {"hidden_size": 18}])
def test_a_config_that_does_not_divide_is_refused(wrong):
    with pytest.raises(ValueError, match="must be a multiple of"):
        replace(TINY, **wrong)


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_the_latent_model_compiles_to_one_graph(model, size):
    x, t, y = latents(*size)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        close(compiled(x, t, y), model(x, t, y))


def test_gradients_reach_every_weight_but_the_positions(model):
    model(*latents(4, 12)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == ["pos_embed"]
    zero = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert zero == []


def test_checkpointing_changes_no_gradient(model):
    def gradients(checkpointing: bool) -> list[Tensor]:
        model.zero_grad()
        model(*latents(8, 8), checkpointing=checkpointing).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for kept, computed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(kept, computed)


def test_a_control_sees_every_site_once_and_acts(model):
    control = Double("blocks.1.attn")
    x, t, y = latents(8, 8)
    with torch.no_grad():
        assert (model(x, t, y, controls=[control]) - model(x, t, y)).abs().max() > 1e-3
    assert control.seen == [(site.path, (2, 2, 16, 8), True) for site in model.sites]


def test_a_residual_is_added_after_its_block(model):
    x, t, y = latents(8, 8)
    seen = []
    hook = model.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        model(x, t, y)
        model(x, t, y, controls=[Add()])
    hook.remove()
    close(seen[1], seen[0] + 1)


def test_a_lora_acts_and_leaves_the_model_alone(model):
    lora = LoRA(linear_shapes(model, ["qkv", "qkv_temb", "fc1", "t_embedder.mlp.0"]), 2)
    x, t, y = latents(8, 8)
    with torch.no_grad():
        plain = model(x, t, y)
        assert torch.equal(model(x, t, y, lora=lora), plain)  # a fresh one is zero
        for b in lora.b.values():
            b.normal_()
        assert (model(x, t, y, lora=lora) - plain).abs().max() > 1e-3
        assert torch.equal(model(x, t, y), plain)


# Guidance


def test_the_scale_is_one_in_pure_noise_and_full_at_the_image():
    actual = power_cosine_scale(torch.tensor([0, 1000]), 4.4)
    close(actual, torch.tensor([4.4, 1.0]))


def test_the_scale_falls_with_noise_and_a_larger_power_falls_sooner():
    t = torch.arange(0, 1000, 50)
    low, high = power_cosine_scale(t, 4.4, power=1.0), power_cosine_scale(t, 4.4, power=4.0)
    assert (low.diff() < 0).all() and (high.diff() <= 0).all()
    assert (high[1:] < low[1:]).all()
