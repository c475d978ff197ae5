"""A small task of the training loop."""

import os
import random
import signal
from pathlib import Path

import torch
from torch import Tensor, nn

from condit.training.loop import LoopConfig, Task


class Toy(Task):
    """A regression that draws from both sources of randomness; kills its process at a batch, or turns bad."""

    def __init__(self, kill_at: int = -1, bad_from: int = 10**9):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.kill_at, self.bad_from, self.seen = kill_at, bad_from, 0

    def batch(self, rng: random.Random, size: int) -> Tensor:
        if self.seen == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1
        return torch.tensor([[rng.gauss(0, 1) for _ in range(64)] for _ in range(size)])

    def forward(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        noise = torch.randn(batch.shape, generator=generator)
        loss = (self.net(batch + 0.1 * noise) - batch.flip(1)).square().mean()
        return loss * (float("nan") if self.seen > self.bad_from else 1.0), {}

    def export(self, folder: Path, card: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"net": self.net.state_dict(), "images": card["images_seen"]}, folder / "net.pt")


CONFIG = LoopConfig(steps=12, batch=4, lr=1e-2, muon_lr=0.01, warmup=2, ema=0.9, precision="no", save_minutes=0.0)
