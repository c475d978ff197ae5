"""The training loop on two processes: replicated and sharded weights, resume, errors."""

import contextlib
import json
import random
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from condit.training.loop import Loop
from loop_toy import CONFIG, Toy

RANK = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from condit.training import sharding
import test_loop_processes as here
for run in (here.replicated, here.divided, here.sharded):  # importing torch once is enough
    out = Path({out!r}) / run.__name__
    loop = run(out)
    weights = {{name: sharding.whole(p.detach()) for name, p in loop.parameters.items()}}
    torch.save(weights, out / f"rank-{{loop.accelerator.process_index}}.pt")
"""


def replicated(out: Path) -> Loop:
    loop = Loop(Toy(), CONFIG, out)
    loop.run()
    return loop


DIVIDED = CONFIG.model_copy(update={"batches": 4, "muon_lr": None})  # Muon enlarges differences of rounding


class Stopped(Toy):
    """Its process leaves when it makes a batch of the fourth step."""

    def batch(self, rng: random.Random, size: int) -> Tensor:
        if self.seen == 3 * self.each:
            raise KeyboardInterrupt
        return super().batch(rng, size)

    def __init__(self, each: int):
        super().__init__()
        self.each = each


def divided(out: Path) -> Loop:
    """A run of four batches a step, two of each process; another one is left after some steps."""
    with contextlib.suppress(KeyboardInterrupt):
        Loop(Stopped(2), DIVIDED, out / "cut").run()
    loop = Loop(Toy(), DIVIDED, out)
    loop.run()
    return loop


class OfBoth(Toy):
    """What two processes see in a step, in one."""

    def __init__(self):
        super().__init__()
        self.step = 0

    def forward(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        losses = []
        for rank in range(2):
            key = f"{CONFIG.seed}/{self.step}/{rank}"
            rows = Toy().batch(random.Random(key), CONFIG.batch)
            noise = torch.Generator().manual_seed(random.Random("noise/" + key).getrandbits(62))
            losses.append(super().forward(rows, noise)[0])
        self.step += 1
        return torch.stack(losses).mean(), {}


@pytest.fixture(scope="module")
def two(tmp_path_factory, two_processes) -> Path:
    """The folders of a replicated and a sharded run of two processes that work together, on the CPU."""
    out = tmp_path_factory.mktemp("two")
    two_processes(RANK.format(tests=str(Path(__file__).parent), out=str(out)))
    return out


def weights_of_ranks(out: Path) -> list[dict[str, Tensor]]:
    """The weights that each process ends with."""
    return [torch.load(out / f"rank-{rank}.pt") for rank in range(2)]


def check_one_log(out: Path) -> None:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len({(row["step"], *row) for row in rows}) == len(rows)  # one process writes
    assert torch.load(out / "export" / "net.pt")["images"] == 2 * CONFIG.steps * CONFIG.batch


def test_two_processes_train_as_one_that_sees_both_batches(tmp_path, two):
    """Distributed data parallel through accelerate, on the CPU: gradients are averaged, every process ends alike, and
    one of them writes."""
    one, other = weights_of_ranks(two / "replicated")
    loop = Loop(OfBoth(), CONFIG, tmp_path / "one")
    loop.run()
    for name, weight in loop.parameters.items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], weight, rtol=0, atol=1e-5)  # sums of gradients in another order
    check_one_log(two / "replicated")


def test_a_run_of_given_batches_is_the_same_on_one_process_and_two_and_goes_on_with_another_number(tmp_path, two):
    one, other = weights_of_ranks(two / "divided")
    loop = Loop(Toy(), DIVIDED, tmp_path / "one")
    loop.run()
    resumed = Loop(Toy(), DIVIDED, two / "divided" / "cut")  # left by two processes
    assert 0 < resumed.step < DIVIDED.steps
    resumed.run()
    assert loop.images_a_step == 4 * DIVIDED.batch
    for name, weight in loop.parameters.items():
        assert torch.equal(one[name], other[name])
        for p in (one[name], resumed.parameters[name]):
            torch.testing.assert_close(p, weight, rtol=0, atol=1e-5)  # sums of gradients in another order
    assert torch.load(two / "divided" / "export" / "net.pt")["images"] == 4 * DIVIDED.steps * DIVIDED.batch
    rows = [json.loads(line) for line in (two / "divided" / "cut" / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps))


def test_batches_that_cannot_be_divided_and_a_folder_that_is_not_shared_raise(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ValueError, match="batches = 4 are divided among the processes: expected a multiple of 3"):
        Loop(Toy(), DIVIDED, tmp_path)
    monkeypatch.setattr("condit.training.sharding.first", lambda number, device: 7)
    with pytest.raises(ValueError, match="starts at step 0.*must be on a file system that all machines share"):
        Loop(Toy(), CONFIG, tmp_path)


# Sharded weights


class Sharded(Toy):
    """With a layer of odd size, so that the shards are unequal, and a frozen one."""

    def __init__(self, stop_at: int = -1):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(64, 33), nn.ReLU(), nn.Linear(33, 64), nn.Linear(64, 64))
        self.net[3].requires_grad_(False)
        self.stop_at = stop_at

    def shards(self):
        return "net", [self.net[0], self.net[2]]

    def batch(self, rng: random.Random, size: int) -> Tensor:
        if self.seen == self.stop_at:
            raise KeyboardInterrupt
        return super().batch(rng, size)

    def validate(self) -> dict[str, float]:
        return {"weight": float(self.net(torch.ones(1, 64)).sum())}


SHARDED = CONFIG.model_copy(update={"muon_lr": None, "shard": True})


def local(x: Tensor) -> Tensor:
    """What this process holds of a sharded tensor."""
    assert isinstance(x, DTensor)
    return x.to_local()


def sharded(out: Path) -> Loop:
    """A whole run, and another that both processes leave at the eighth batch and take up again, bit for bit."""
    loop = Loop(Sharded(), SHARDED, out)
    kept = {name: p.detach() for name, p in loop.parameters.items()}
    assert all(local(p).numel() < p.numel() for p in kept.values())
    assert all(local(s).numel() < s.numel() for s in loop.average.shadow.values())
    loop.run()
    with contextlib.suppress(KeyboardInterrupt):
        Loop(Sharded(stop_at=8), SHARDED, out / "cut").run()
    resumed = Loop(Sharded(), SHARDED, out / "cut")
    assert 0 < resumed.step < SHARDED.steps
    resumed.run()
    for name, p in resumed.parameters.items():
        assert torch.equal(local(p), local(loop.parameters[name]))
    return loop


class ShardedOfBoth(OfBoth, Sharded):
    """What two sharded processes see in a step, in one."""


def test_two_sharded_processes_train_and_resume_as_one_that_sees_both_batches(tmp_path, two):
    """FSDP2, two processes on the CPU (gloo)."""
    ends = weights_of_ranks(two / "sharded")
    loop = Loop(ShardedOfBoth(), SHARDED, tmp_path / "one")  # a single process shards nothing
    assert not loop.sharded
    figures = loop.run()
    for name, weight in loop.parameters.items():
        assert torch.equal(ends[0][name], ends[1][name])
        torch.testing.assert_close(ends[0][name], weight, rtol=0, atol=1e-5)  # sums of gradients in another order
    check_one_log(two / "sharded")
    rows = [json.loads(line) for line in (two / "sharded" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["validation"]["weight"] == pytest.approx(figures["weight"], abs=1e-3)
    # The checkpoint is that of an unsharded run: one process goes on with it, and its export is whole.
    alone = Loop(Sharded(), SHARDED, two / "sharded" / "cut")
    assert alone.step == SHARDED.steps
    assert all(torch.equal(p, ends[0][name]) for name, p in alone.parameters.items())
    net = torch.load(two / "sharded" / "export" / "net.pt")["net"]
    average = torch.load(two / "sharded" / "state.pt", weights_only=True)["average"]
    assert all(torch.equal(net[name.removeprefix("net.")], x) for name, x in average.items())
    assert torch.equal(net["3.weight"], Sharded().net.get_parameter("3.weight"))


def test_what_cannot_be_sharded_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match="Toy cannot be sharded"):
        Loop(Toy(), SHARDED, tmp_path)
    with pytest.raises(ValueError, match="leave muon_lr out"):
        Loop(Sharded(), SHARDED.model_copy(update={"muon_lr": 0.1}), tmp_path)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="leave accelerate's FSDP settings out"):
        Loop(Sharded(), SHARDED, tmp_path)


def test_processes_that_do_not_see_each_other_raise(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(Accelerator, "num_processes", 1)
    with pytest.raises(ValueError, match="2 processes were started, but each sees only itself"):
        Loop(Toy(), CONFIG, tmp_path)
