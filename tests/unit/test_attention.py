"""nn/attention.py: one attention call and what may be done to it."""

import torch
from torch import Tensor

from condit.nn.attention import Attend, Call, Site, attend, join_heads, sdpa, split_heads

SITE = Site("blocks.0.attn", "joint", 0)


def call(queries: int = 5, keys: int = 7, **fields) -> Call:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=g) for n in (queries, keys, keys))
    return Call(q, k, v, SITE, **fields)


def by_hand(call: Call, weights: Tensor | None = None) -> Tensor:
    """Softmax over q k / sqrt(4), the scores' exponentials multiplied by `weights`."""
    scores = (call.q @ call.k.mT / 2).exp()
    scores = scores if weights is None else scores * weights
    return scores / scores.sum(-1, keepdim=True) @ call.v


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)  # another order of sums


def test_sdpa_is_softmax_of_the_scaled_scores():
    close(sdpa(call()), by_hand(call()))


def test_a_log_weight_multiplies_the_appended_keys_in_the_softmax():
    more = call(keys=2)
    actual = sdpa(call().append_kv(more.k, more.v, torch.tensor(0.5).log()))
    joined = Call(call().q, torch.cat([call().k, more.k], 2), torch.cat([call().v, more.v], 2), SITE)
    close(actual, by_hand(joined, torch.tensor([1.0] * 7 + [0.5] * 2)))


def test_a_log_weight_may_differ_from_query_to_query():
    more, weights = call(keys=2), torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0])
    actual = sdpa(call().append_kv(more.k, more.v, weights.log()[None, None, :, None]))
    joined = Call(call().q, torch.cat([call().k, more.k], 2), torch.cat([call().v, more.v], 2), SITE)
    rows = torch.cat([torch.ones(5, 7), weights[:, None].expand(-1, 2)], 1)
    close(actual, by_hand(joined, rows))
    close(actual[:, :, 0], sdpa(call())[:, :, 0])  # weight 0: unseen


def test_keys_are_appended_after_an_existing_bias():
    bias = torch.linspace(-1, 1, 7)[None, None, None]
    actual = call(bias=bias).append_kv(call(keys=2).k, call(keys=2).v)
    assert actual.bias is not None
    assert torch.equal(actual.bias, torch.cat([bias, torch.zeros(1, 1, 1, 2)], -1))


def test_appending_without_any_weight_needs_no_bias():
    assert call().append_kv(call().k, call().v).bias is None


def test_appending_leaves_the_call_as_it_was():
    given = call()
    given.append_kv(given.k, given.v, torch.tensor(1.0))
    assert given.k.shape[2] == 7 and given.bias is None


def test_edit_map_receives_probabilities_and_its_result_is_used():
    rows = []
    keep = call(edit_map=lambda p: rows.append(p.sum(-1)) or p)
    close(sdpa(keep), sdpa(call()))
    close(rows[0], torch.ones(2, 3, 5))
    assert not sdpa(call(edit_map=torch.zeros_like)).any()


def test_the_plain_form_for_training_equals_the_fused_one():
    given = call(bias=torch.linspace(-1, 1, 7)[None, None, None])
    trained = Call(given.q, given.k, given.v.clone().requires_grad_(), SITE, bias=given.bias)
    actual = sdpa(trained)
    assert actual.requires_grad
    close(actual.detach(), sdpa(given))


class Note:
    """Writes down when it is entered and left."""

    def __init__(self, name: str, notes: list[str]):
        self.name, self.notes = name, notes

    def around(self, call: Call, attend: Attend) -> Tensor:
        self.notes.append(f"{self.name} in")
        out = attend(call)
        self.notes.append(f"{self.name} out")
        return out


def test_the_first_control_is_the_outermost():
    notes: list[str] = []
    out = attend(call(), [Note("a", notes), Note("b", notes)])
    assert notes == ["a in", "b in", "b out", "a out"]
    assert torch.equal(out, sdpa(call()))


def test_split_and_join_heads_are_inverse():
    x = torch.randn(2, 5, 12)
    assert split_heads(x, 3).shape == (2, 3, 5, 4)
    assert torch.equal(join_heads(split_heads(x, 3)), x)
