"""What a stopped run leaves, and that it goes on from there: signals, full disks, damaged files, rows of lost steps."""

import json
import os
import random
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from condit.backbones.vit import ViTConfig
from condit.training.labelled import with_sizes
from condit.training.loop import Loop, LoopConfig, Task
from condit.training.run import read_recipe

CONFIG = LoopConfig(steps=12, batch=4, lr=1e-2, warmup=2, ema=0.9, precision="no", save_minutes=0.0)


class Toy(Task):
    """A regression that draws from both sources of randomness."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 8)

    def batch(self, rng: random.Random, size: int) -> Tensor:
        return torch.tensor([[rng.gauss(0, 1) for _ in range(8)] for _ in range(size)])

    def forward(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return (self.net(batch + 0.1 * torch.randn(batch.shape, generator=generator)) - batch).square().mean(), {}

    def export(self, folder: Path, card: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"net": self.net.state_dict()}, folder / "net.pt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_the_step_that_runs_and_goes_on_from_there(tmp_path, number):
    class Interrupted(Toy):
        def forward(self, batch, generator):
            if self.progress == 0.5:
                os.kill(os.getpid(), number)
            return super().forward(batch, generator)

    config = CONFIG.model_copy(update={"save_minutes": 9.0})
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        Loop(Interrupted(), config, tmp_path).run()
    assert signal.getsignal(number) is before
    resumed = Loop(Toy(), config, tmp_path)
    assert resumed.step == 7
    resumed.run()
    Loop(Toy(), config, tmp_path / "whole").run()
    cut, whole = (torch.load(folder / "export" / "net.pt")["net"] for folder in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_a_full_disk_while_saving_gives_the_reason_and_keeps_the_last_checkpoint(tmp_path):
    loop = Loop(Toy(), CONFIG, tmp_path)
    loop.save()
    before = (tmp_path / "state.pt").read_bytes()
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(OSError, match="the file size limit is hit while writing .*state.pt; its old content"):
            loop.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_damaged_checkpoint_is_refused_in_our_words(tmp_path):
    Loop(Toy(), CONFIG, tmp_path).save()
    whole = (tmp_path / "state.pt").read_bytes()
    torch.save({"step": 3}, tmp_path / "other.pt")
    for data in (whole[:100], whole[: len(whole) // 2], whole[:-10], b"", (tmp_path / "other.pt").read_bytes()):
        (tmp_path / "state.pt").write_bytes(data)
        with pytest.raises(ValueError, match="state.pt is damaged or no checkpoint of condit: it") as caught:
            Loop(Toy(), CONFIG, tmp_path)
        assert "weights_only" not in str(caught.value)


def test_a_resumed_run_drops_rows_after_its_checkpoint_and_files_of_a_killed_writer(tmp_path):
    loop = Loop(Toy(), CONFIG, tmp_path)
    loop.step = 4
    loop.save()
    rows = [{"step": step, "loss": 1.0} for step in (2, 4, 6)] + [{"step": 12, "validation": {}}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1')
    (tmp_path / ".state.pt.0a1b2c3d.tmp").touch()
    Loop(Toy(), CONFIG, tmp_path)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [2, 4]
    assert not (tmp_path / ".state.pt.0a1b2c3d.tmp").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"depth": 10**7}, "sizes.depth .* 0 to 1000"), ({"dim": 10**9}, "sizes.dim .* 0 to 65536"), ({"dim": -1}, "dim")],
)
def test_sizes_of_a_network_that_nobody_can_build_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        with_sizes(ViTConfig(), fields)


def test_numbers_of_a_recipe_are_bounded(tmp_path):
    for line in ("steps = 99999999999999999999", "batch = 10000000", "seed = " + "9" * 30, "lr = inf", "ema = nan"):
        name = line.split()[0]
        base = {"steps": "1", "batch": "1"} | {name: line.split()[2]}
        (tmp_path / "a.toml").write_text(
            "task = 'x'\n[data]\n[train]\n" + "".join(f"{k} = {v}\n" for k, v in base.items())
        )
        with pytest.raises(ValueError, match=f"train.{name}"):
            read_recipe(tmp_path / "a.toml")
    for text in ("a = " + "[" * 5000, "a = " + "9" * 5000, "\udcff"):
        (tmp_path / "a.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match="is not TOML"):
            read_recipe(tmp_path / "a.toml")
