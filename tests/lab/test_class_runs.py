"""Runs of DiT, DiffiT, ViT and the pixel model: killed and resumed, with bad losses, on two processes."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import condit
from class_tasks import ONE_STEP, RUN, make, step
from condit.training.loop import Loop

KINDS = ("DiT", "DiffiT", "ViT", "pixels")
KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import class_tasks
for kind in {kinds!r}:  # a fork each: importing torch once is enough
    child = os.fork()
    if not child:
        try:
            class_tasks.kill(kind, {pets!r}, {vae!r}, Path({out!r}))
        finally:
            os._exit(1)
    print(kind, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory, pets, vae) -> Path:
    """A folder with a run of every kind that was killed."""
    out = tmp_path_factory.mktemp("killed")
    script = KILLED.format(tests=str(Path(__file__).parent), kinds=KINDS, pets=pets, vae=vae, out=str(out))
    # Threads decide the order of sums.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True, env=environment)
    assert ended.stdout.split() == [word for kind in KINDS for word in (kind, str(-signal.SIGKILL))], ended.stderr
    return out


def assert_same_end(one: Path, other: Path) -> None:
    states = [torch.load(path / "state.pt", weights_only=True) for path in (one, other)]
    for kind in ("parameters", "average"):
        assert all(torch.equal(value, states[1][kind][name]) for name, value in states[0][kind].items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_and_resumed_run_ends_as_one_never_stopped(kind, tmp_path, killed, pets, vae):
    step(make(kind, pets, vae), tmp_path / "whole", RUN)
    resumed = Loop(make(kind, pets, vae), RUN, killed / kind)
    assert 0 < resumed.step < RUN.steps
    step(resumed.task, killed / kind, RUN)
    assert_same_end(tmp_path / "whole", killed / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_nan_is_skipped_and_moves_no_weight(kind, tmp_path, pets, vae):
    task = make(kind, pets, vae)
    forward = task.forward

    def bad(batch, generator):
        loss, logs = forward(batch, generator)
        return loss * float("nan"), logs

    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    loop = Loop(task, ONE_STEP, tmp_path)
    task.forward = bad
    batch = task.batch(random.Random(0), 4)
    loop.train_step([batch])
    assert loop.bad_steps == 1
    assert all(torch.equal(p, before[name]) for name, p in task.named_parameters())
    task.forward = forward
    loop.train_step([batch])
    assert loop.bad_steps == 0
    assert any(not torch.equal(p, before[name]) for name, p in task.named_parameters())


SHARED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import class_tasks
task = class_tasks.make({kind!r}, {pets!r}, {vae!r})
loop = class_tasks.Loop(task, class_tasks.RUN.model_copy(update={{"shard": True}}), Path({out!r}))
assert loop.accelerator.num_processes == 2
assert all(p.to_local().numel() < p.numel() for p in loop.parameters.values() if p.shape[0] > 1)
loop.run()
"""


@pytest.mark.parametrize("kind", ["DiT", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_two_processes_share_the_weights_of_a_network_and_its_export_loads(kind, tmp_path, pets, vae, two_processes):
    script = SHARED.format(tests=str(Path(__file__).parent), kind=kind, pets=pets, vae=vae, out=str(tmp_path))
    two_processes(script)
    assert json.loads((tmp_path / "export" / "card.json").read_text())["images_seen"] == 2 * RUN.steps * RUN.batch
    resumed = Loop(make(kind, pets, vae), RUN, tmp_path)  # one process takes the checkpoint
    assert resumed.step == RUN.steps
    pipe = condit.load(tmp_path / "export", **({"vae": vae} if "Di" in kind else {}))
    network = pipe.model if kind == "ViT" else pipe.backbone
    with resumed.averaged():
        averaged = {name: p.detach().clone() for name, p in resumed.task.get_submodule("network").named_parameters()}
    assert all(torch.equal(p, averaged[name]) for name, p in network.named_parameters())
