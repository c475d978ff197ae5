"""backbones/dit.py: sizes, initial weights, positions, labels, and what a forward may be given."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from condit.backbones.dit import PRESETS, DiT, DiTConfig, DiTContext
from condit.backbones.latent_transformer import sincos_positions
from condit.controls.control import Control
from condit.nn.attention import Attend, Call
from condit.nn.lora import LoRA, linear_shapes

TINY = DiTConfig(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=5)
TRAINED_ON_RECTANGLES = replace(TINY, input_size=(4, 6))
ROUNDING = 1e-6  # the same operations on another batch: the matrix product may sum in another order


def build(config: DiTConfig = TINY, seed: int = 0) -> DiT:
    """With noise on every learned weight: a fresh DiT puts out zero, so all of them agree."""
    model, g = DiT(config).eval(), torch.Generator().manual_seed(seed)
    model.initialise(g)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return model


def inputs(config: DiTConfig = TINY, batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, *config.latent, generator=g)
    return x, torch.tensor([0, 417, 999])[:batch], torch.tensor([0, 4, 2])[:batch]


# Parameters, those that are trained, giga multiply-accumulates of one forward with the attention products and without
# them, tokens, and what Tables 1, 3 and 4 say.
SIZES = {
    "DiT-S/2": (32_963_360, 32_865_056, 6.056, 5.452, 256, 6.06),
    "DiT-S/4": (32_945_024, 32_920_448, 1.413, 1.375, 64, 1.41),
    "DiT-S/8": (33_148_160, 33_142_016, 0.358, 0.356, 16, 0.36),
    "DiT-B/2": (130_512_416, 130_315_808, 23.005, 21.797, 256, 23.01),
    "DiT-B/4": (130_475_648, 130_426_496, 5.565, 5.490, 64, 5.56),
    "DiT-B/8": (130_881_536, 130_869_248, 1.418, 1.413, 16, 1.42),
    "DiT-L/2": (458_102_816, 457_840_672, 80.698, 77.476, 256, 80.71),
    "DiT-L/4": (458_053_760, 457_988_224, 19.696, 19.494, 64, 19.70),
    "DiT-L/8": (458_594_816, 458_578_432, 5.011, 4.999, 16, 5.01),
    "DiT-XL/2": (675_129_632, 674_834_720, 118.621, 114.394, 256, 118.64),
    "DiT-XL/4": (675_074_432, 675_000_704, 29.044, 28.779, 64, 29.05),
    "DiT-XL/8": (675_683_072, 675_664_640, 7.392, 7.376, 16, 7.39),
    "DiT-XL/2-512": (676_014_368, 674_834_720, 524.538, 456.893, 1024, 524.60),
    "DiT-XL/2-adaLN": (600_747_296, 600_452_384, 118.547, 114.319, 256, 118.56),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_parameters_and_multiply_accumulates(name):
    config = PRESETS[name]
    with torch.device("meta"):
        model = DiT(config)
        x, t, y = torch.empty(1, 4, *config.latent), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, y)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = {str(op): n / 2e9 for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counts.items() if "bmm" in op or "attention" in op)
    every, linear = round(sum(counts.values()), 3), round(sum(counts.values()) - products, 3)
    assert (total, trained, every, linear, model.pos_embed.shape[1]) == SIZES[name][:5]
    assert every == pytest.approx(SIZES[name][5], rel=3e-4, abs=0.006)  # the paper also counts biases and norms


def test_every_preset_is_among_the_counted():
    assert PRESETS.keys() == SIZES.keys()


# Initial weights


def test_a_fresh_network_is_the_identity_and_puts_out_zero():
    model, (x, t, y) = DiT(TINY), inputs()
    tokens, context = torch.randn(3, 4, 16), DiTContext(model.embed(t, y))
    assert torch.equal(model.blocks[0](tokens, context), tokens)
    assert model(x, t, y).abs().max() == 0


@pytest.mark.parametrize("gates", [True, False])
def test_without_zero_init_a_fresh_block_already_acts(gates):
    model, (_, t, y) = DiT(replace(TINY, zero_init=False, gates=gates)), inputs()
    tokens, context = torch.randn(3, 4, 16), DiTContext(model.embed(t, y))
    assert (model.blocks[0](tokens, context) - tokens).abs().max() > 1e-3


def test_initial_weights_have_the_official_spread():
    model = DiT(replace(TINY, hidden_size=64))
    fused = model.blocks[0].attn.qkv.weight  # type: ignore[union-attr]
    bound = math.sqrt(6 / (4 * 64))  # of the fused matrix: (3 D, D)
    assert 0.95 * bound < fused.abs().max() <= bound  # type: ignore[operator]
    patch = model.x_embedder.proj.weight
    bound = math.sqrt(6 / (64 + 4 * 2 * 2))
    assert 0.9 * bound < patch.abs().max() <= bound
    table, (first, _, second) = model.y_embedder.embedding_table, model.t_embedder.mlp
    spreads = [weight.std().item() for weight in (table.weight, first.weight, second.weight)]  # type: ignore[operator]
    assert spreads == pytest.approx([0.02] * 3, rel=0.15)
    assert all(p.abs().max() == 0 for name, p in model.named_parameters() if name.endswith("bias"))


def test_initial_weights_come_from_the_generator_that_is_given():
    model = DiT(TINY)
    states = []
    for _ in range(2):
        model.initialise(torch.Generator().manual_seed(3))
        states.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


# Positions and grids


def test_positions_tell_the_column_first_and_the_row_second_on_a_rectangle():
    table = sincos_positions((2, 3), 8)
    for row in range(2):
        for column in range(3):
            halves = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
            actual = table[row * 3 + column]
            torch.testing.assert_close(actual, torch.tensor(halves, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_network_of_another_grid_computes_what_one_made_for_it_would():
    square, wide = build(), build(TRAINED_ON_RECTANGLES)
    wide.load_state_dict(square.state_dict() | {"pos_embed": wide.pos_embed})
    x, t, y = inputs(TRAINED_ON_RECTANGLES)
    torch.testing.assert_close(square(x, t, y), wide(x, t, y), rtol=0, atol=ROUNDING)
    assert square(x, t, y).shape == (3, 8, 4, 6)


def test_rows_and_columns_do_not_change_places():
    model, (x, t, y) = build(), inputs(TRAINED_ON_RECTANGLES)
    changed = x.clone()
    changed[:, :, 2:, 4:] += 1  # the last patch of the last row
    with torch.no_grad():
        for block in model.blocks:  # without attention a patch keeps to itself
            block.attn.proj.weight.zero_()  # type: ignore[union-attr]
        moved = (model(changed, t, y) - model(x, t, y)).abs().amax((0, 1)) > 1e-6
    assert moved[2:, 4:].all() and moved.sum() == 4


def test_the_table_of_a_checkpoint_is_used_on_its_grid():
    model, (x, t, y) = build(), inputs()
    before = model(x, t, y)
    with torch.no_grad():
        model.pos_embed.add_(1 * torch.randn_like(model.pos_embed))
    assert (model(x, t, y) - before).abs().max() > 1e-3


def test_the_table_is_never_trained():
    model, (x, t, y) = build().requires_grad_(True), inputs()
    model(x, t, y).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["pos_embed"]


@pytest.mark.parametrize("shape", [(1, 4, 5, 4), (1, 4, 4, 7), (1, 3, 4, 4), (4, 4, 4)])
def test_a_latent_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 4, H, W\) with H and W multiples of 2.*found"):
        build()(torch.zeros(shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_size": 5}, "multiple of patch_size"),
        ({"num_heads": 3}, "multiple of num_heads"),
        ({"hidden_size": 18, "num_heads": 1}, "and of 4"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob must lie"),
        ({"num_classes": -1}, "num_classes be 0 or more"),
        ({"patch_size": 0}, "at least 1"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)


# Labels


def test_no_label_is_the_null_class_the_last_row():
    model, (x, t, _) = build(), inputs()
    assert model.null_label == 5 and model.y_embedder.embedding_table.num_embeddings == 6
    assert torch.equal(model(x, t), model(x, t, torch.full((3,), 5)))


@pytest.mark.parametrize("none", [0, None])
def test_an_unconditional_network_has_no_table_and_takes_no_labels(none):
    model, (x, t, y) = build(replace(TINY, num_classes=none)), inputs()
    assert not any(name.startswith("y_embedder") for name in model.state_dict())
    assert model(x, t).shape == (3, 8, 4, 4)
    with pytest.raises(ValueError, match="unconditional"):
        model(x, t, y)
    with pytest.raises(ValueError, match="no null class"):
        model.null_label  # noqa: B018 - a property that raises


def test_without_dropout_there_is_no_null_class():
    model, (x, t, y) = build(replace(TINY, class_dropout_prob=0.0)), inputs()
    assert model.y_embedder.embedding_table.num_embeddings == 5
    assert torch.equal(model.drop_labels(y, generator=torch.Generator()), y)
    with pytest.raises(ValueError, match="no null class"):
        model(x, t)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 6, 1]), "No class 6: this network has the labels 0 to 5"),
        (torch.tensor([0, -1, 1]), "No class -1"),
        (torch.tensor([0, 1]), "3 whole numbers"),
        (torch.tensor([0.0, 1.0, 2.0]), "float32"),
        (torch.tensor([True, True, False]), "bool"),
        (torch.zeros(3, 5, dtype=torch.long), r"\(3, 5\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    x, t, _ = inputs()
    with pytest.raises(ValueError, match=message):
        build()(x, t, labels)


def test_one_label_in_ten_is_dropped_and_a_seed_drops_the_same():
    model, y = DiT(TINY), torch.arange(4000) % 5
    first, second = (model.drop_labels(y, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
    dropped = first == 5
    assert 0.08 < dropped.float().mean() < 0.12
    assert torch.equal(first[~dropped], y[~dropped])


# The forward


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_channels_double_where_the_variance_is_learned(learn_sigma):
    config = replace(TINY, learn_sigma=learn_sigma, in_channels=3)
    assert build(config)(*inputs(config)).shape == (3, 6 if learn_sigma else 3, 4, 4)


def test_a_row_of_a_batch_equals_its_single_run():
    model, (x, t, y) = build(), inputs()
    together = model(x, t, y)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=ROUNDING)


def test_checkpointing_gives_the_same_output_and_gradients():
    model, (x, t, y) = build(), inputs()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        out = model(x, t, y, checkpointing=checkpointing)
        out.square().mean().backward()
        gradients.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointing_keeps_less_between_forward_and_backward():
    model, (x, t, y) = build(replace(TINY, depth=6)), inputs()
    kept = []
    for checkpointing in (False, True):
        numbers = []

        def pack(saved: Tensor, numbers: list[int] = numbers) -> Tensor:
            numbers.append(saved.numel())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            model(x, t, y, checkpointing=checkpointing)
        kept.append(sum(numbers))
    assert kept[1] < 0.3 * kept[0]


def test_half_precision_is_the_parameters_business():
    model, (x, t, y) = build(), inputs()
    actual = model.to(torch.bfloat16)(x.bfloat16(), t, y)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), build()(x, t, y), rtol=0, atol=0.1)  # eight bits of mantissa


@pytest.mark.parametrize("latent", [(4, 4), (4, 6)])
def test_eager_equals_compiled_in_one_graph(latent):
    model, (x, t, y) = build(), inputs(replace(TINY, input_size=latent))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")  # the trace; compiling its code takes long
        torch.testing.assert_close(compiled(x, t, y), model(x, t, y), rtol=0, atol=ROUNDING)


# Controls and LoRA


class Recorder(Control):
    """Notes the calls that it sees, and adds a constant after each block."""

    def __init__(self):
        self.seen: list[Call] = []

    def around(self, call: Call, attend: Attend) -> Tensor:
        self.seen.append(call)
        return attend(call)


class Addition(Control):
    def residual(self, site, query):
        return torch.full((query.shape[0], query.shape[2], 16), 0.5) if site.index == 0 else None


def test_a_control_sees_every_attention_call_with_all_tokens_as_image():
    model, (x, t, y), recorder = build(), inputs(), Recorder()
    plain, actual = model(x, t, y), model(x, t, y, controls=[recorder])
    assert torch.equal(actual, plain)
    assert [call.site for call in recorder.seen] == model.sites
    assert [site.path for site in model.sites] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(call.image == slice(0, 4) and call.q.shape == (3, 2, 4, 8) for call in recorder.seen)
    assert all(model.get_submodule(site.path).site is site for site in model.sites)


def test_a_residual_is_added_after_its_block():
    model, (_, t, y) = build(), inputs()
    context = DiTContext(model.embed(t, y), controls=(Addition(),))
    tokens = torch.randn(3, 4, 16)
    first, second = (block(tokens, context) - block(tokens, DiTContext(context.embedding)) for block in model.blocks)
    torch.testing.assert_close(first, torch.full_like(first, 0.5), rtol=0, atol=ROUNDING)
    assert second.abs().max() == 0


def test_a_lora_acts_on_every_linear_and_a_zero_lora_changes_nothing():
    model, (x, t, y) = build(), inputs()
    paths = linear_shapes(model, ["qkv", "proj", "fc1", "fc2", "linear", "adaLN_modulation.1", "mlp.0", "mlp.2"])
    assert len(paths) == 2 + 2 * 5 + 2
    plain = model(x, t, y)
    for path, shape in paths.items():
        lora = LoRA({path: shape}, rank=2)
        assert torch.equal(model(x, t, y, lora=lora), plain)
        with torch.no_grad():
            for b in lora.b.values():
                b.normal_(generator=torch.Generator().manual_seed(0))
        assert (model(x, t, y, lora=lora) - plain).abs().max() > 1e-4, path
