"""nn/lora.py: LoRA as an argument."""

import pytest
import torch
from torch import nn

from condit.nn.lora import Linear, LoRA, PartialLoRA, linear_shapes, name_linears, sum_loras


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.add_to_q = Linear(3, 4), Linear(3, 4)
        self.inner = nn.ModuleList([Linear(4, 2), nn.Linear(4, 2)])
        name_linears(self)


def filled(rank: int = 2, alpha: float | None = None) -> LoRA:
    torch.manual_seed(0)
    lora = LoRA({"to_q": (4, 3), "inner.0": (2, 4)}, rank, alpha)
    for b in lora.b.values():
        nn.init.normal_(b)
    return lora.requires_grad_(False)


def test_a_fresh_lora_changes_nothing():
    net, x = Net(), torch.randn(2, 5, 3)
    assert torch.equal(net.to_q(x, LoRA({"to_q": (4, 3)}, 2)), net.to_q(x))


def test_a_linear_with_its_lora_equals_the_merged_weight():
    net, lora, x = Net().requires_grad_(False), filled(), torch.randn(2, 5, 3)
    merged = net.to_q.weight + lora.b["to_q"] @ lora.a["to_q"]
    torch.testing.assert_close(net.to_q(x, lora), x @ merged.mT + net.to_q.bias, rtol=0, atol=1e-6)


def test_a_resized_lora_is_the_nearest_of_its_rank():
    lora, x = filled(rank=2, alpha=3.0), torch.randn(5, 3)
    same, less = lora.resized(2), lora.resized(1)
    torch.testing.assert_close(same.delta("to_q", x), lora.delta("to_q", x), rtol=0, atol=1e-5)
    assert less.rank == 1
    whole = lora.b["to_q"] @ lora.a["to_q"] * lora.scales["to_q"]
    left = whole - less.b["to_q"] @ less.a["to_q"]
    values = torch.linalg.svdvals(whole)
    torch.testing.assert_close(torch.linalg.matrix_norm(left), values[1], rtol=0, atol=1e-5)


def test_a_lora_leaves_linears_that_it_does_not_name():
    net, x = Net(), torch.randn(2, 3)
    assert torch.equal(net.add_to_q(x, filled()), net.add_to_q(x))


def test_alpha_scales_by_alpha_over_rank():
    x = torch.randn(2, 3)
    plain, doubled = filled(rank=2).delta("to_q", x), filled(rank=2, alpha=4.0).delta("to_q", x)
    assert plain is not None and doubled is not None
    assert torch.equal(2 * plain, doubled)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_the_published_layout_is_read_back_with_and_without_prefix(prefix):
    lora = filled()
    tensors = {prefix + name.removeprefix("transformer."): t for name, t in lora.tensors().items()}
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in tensors)
    again = LoRA.from_tensors(tensors)
    assert again.rank == 2 and set(again.keys) == {"to_q", "inner.0"}
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in lora.tensors().items())


def test_a_file_without_lora_raises_with_what_it_holds():
    with pytest.raises(ValueError, match="No LoRA in the file.*'image_proj.norm.weight'"):
        LoRA.from_tensors({"image_proj.norm.weight": torch.zeros(1)})


def test_every_linear_knows_its_path():
    net = Net()
    assert net.to_q.path == "to_q" and net.inner[0].path == "inner.0"


def test_targets_match_whole_parts_of_a_path():
    net = Net()
    assert linear_shapes(net, ["to_q", "inner.0", "inner.1"]) == {"to_q": (4, 3), "inner.0": (2, 4)}
    assert linear_shapes(net, ["q"]) == {}


def test_ranks_and_alphas_may_differ_from_layer_to_layer():
    lora = LoRA({"to_q": (4, 3), "inner.0": (2, 4)}, {"to_q": 1, "inner.0": 2}, {"inner.0": 8.0})
    assert lora.scales == {"to_q": 1, "inner.0": 4} and lora.rank == 2
    again = LoRA.from_tensors(lora.tensors())
    assert [len(again.a[k]) for k in ("to_q", "inner/0")] == [1, 2]


def test_the_scale_is_saved_in_b_so_that_a_reader_without_alpha_computes_the_same():
    lora, x = filled(rank=2, alpha=3.0), torch.randn(2, 3)
    again = LoRA.from_tensors(lora.tensors())
    assert again.scales["to_q"] == 1
    torch.testing.assert_close(again.delta("to_q", x), lora.delta("to_q", x), rtol=0, atol=1e-6)


def test_the_file_of_alpha_next_to_a_pair_is_read_unless_one_is_given():
    tensors = filled(rank=2).tensors() | {"transformer.to_q.alpha": torch.tensor(6.0)}
    assert LoRA.from_tensors(tensors).scales == {"inner.0": 1, "to_q": 3}
    assert LoRA.from_tensors(tensors, 4.0).scales == {"inner.0": 2, "to_q": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.to_q.lora_B.weight": None}, "to_q: expected A.*found no lora_B"),
        ({"transformer.to_q.lora_B.weight": torch.zeros(4, 3)}, r"found A \(2, 3\) and B \(4, 3\)"),
    ],
)
def test_a_pair_that_is_none_is_refused(change, message):
    tensors = {n: t for n, t in (filled().tensors() | change).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        LoRA.from_tensors(tensors)


def test_parts_of_updates_add_up():
    lora, x, half = filled(), torch.randn(2, 3), torch.tensor(0.5)
    whole = lora.delta("to_q", x)
    assert whole is not None
    both = sum_loras([PartialLoRA(lora, half), None, PartialLoRA(lora, half)])
    assert both is not None
    torch.testing.assert_close(both.delta("to_q", x), whole)
    assert PartialLoRA(lora, only=("inner.0",)).delta("to_q", x) is None
    assert PartialLoRA(lora, without=("to_q",)).delta("to_q", x) is None
    assert both.delta("nowhere", x) is None
    assert sum_loras([None]) is None and sum_loras([lora]) is lora
