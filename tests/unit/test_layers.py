"""nn/layers.py: rotary positions, timestep features, adaptive norms."""

import math

import torch
import torch.nn.functional as F

from condit.nn.layers import (
    AdaNorm,
    FeedForward,
    RMSNorm,
    apply_rope,
    modulated_norm,
    rope_frequencies,
    timestep_features,
)
from condit.nn.streams import grid_ids

AXES = (4, 6, 6)


def test_position_zero_does_not_rotate():
    x = torch.randn(1, 2, 3, 16)
    assert torch.equal(apply_rope(x, rope_frequencies(torch.zeros(3, 3), AXES)), x)


def test_rope_rotates_adjacent_pairs_by_position_times_frequency():
    x = torch.randn(1, 1, 1, 4)
    actual = apply_rope(x, rope_frequencies(torch.tensor([[3.0]]), (4,)))
    turned = torch.view_as_complex(x.unflatten(-1, (2, 2))) * torch.polar(torch.ones(2), torch.tensor([3.0, 3 / 100]))
    torch.testing.assert_close(actual, torch.view_as_real(turned).flatten(-2), rtol=0, atol=1e-6)


def test_scores_depend_on_differences_of_positions_only():
    q, k = torch.randn(2, 1, 1, 6, 16)

    def scores(delta):
        rope = rope_frequencies(grid_ids(2, 3, delta=delta), AXES)
        return apply_rope(q, rope) @ apply_rope(k, rope).mT

    torch.testing.assert_close(scores((5, -7)), scores((0, 0)), rtol=0, atol=1e-4)  # float32 angles


def test_ids_of_each_sample_are_rotated_apart():
    ids = torch.stack([grid_ids(1, 4), grid_ids(1, 4, delta=(0, 3))])
    x = torch.randn(1, 2, 4, 16).expand(2, -1, -1, -1)
    actual = apply_rope(x, rope_frequencies(ids, AXES))
    for row, one in zip(actual, ids, strict=True):
        assert torch.equal(row[None], apply_rope(x[:1], rope_frequencies(one, AXES)))


def test_rope_keeps_the_dtype_of_its_input():
    assert (
        apply_rope(torch.randn(1, 1, 2, 16).bfloat16(), rope_frequencies(grid_ids(1, 2), AXES)).dtype == torch.bfloat16
    )


def test_timestep_features_are_cosines_then_sines_without_a_frequency_shift():
    actual = timestep_features(torch.tensor([2.0]), 4)
    expected = [math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)]
    torch.testing.assert_close(actual, torch.tensor([expected]), rtol=0, atol=1e-6)


def test_adaptive_norm_reads_shift_then_scale_then_gates():
    norm = AdaNorm(2, 3)
    torch.nn.init.zeros_(norm.linear.weight)
    with torch.no_grad():
        norm.linear.bias.copy_(torch.tensor([1.0, 1, 2, 2, 5, 5]))
    x = torch.tensor([[[-1.0, 1.0]]])
    out, gate = norm(x, torch.zeros(1, 2))
    torch.testing.assert_close(out, F.layer_norm(x, (2,), eps=1e-6) * 3 + 1)
    assert gate.tolist() == [[[5, 5]]]


def test_modulated_norm_without_modulation_has_no_weights_of_its_own():
    out = modulated_norm(torch.randn(2, 3, 64), torch.zeros(2, 1, 64), torch.zeros(2, 1, 64))
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(out.var(-1, correction=0), torch.ones(2, 3), rtol=0, atol=1e-4)


def test_rms_norm_answers_in_the_dtype_of_its_input():
    assert RMSNorm(8)(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16


def test_feed_forward_has_the_published_names():
    assert set(FeedForward(4).state_dict()) == {
        "net.0.proj.weight",
        "net.0.proj.bias",
        "net.2.weight",
        "net.2.bias",
    }
