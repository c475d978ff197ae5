"""The training loop over accelerate: any task, exact resume, a log line and a sheet every few minutes.

All randomness of step i is drawn from (seed, i, process), so a resumed run continues as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from condit.data.files import atomic_write
from condit.training.optim import Average, lr_factor, make_optimizers, set_lr

log = logging.getLogger(__name__)

NAN_STEPS_UNTIL_STOP = 20


class LoopConfig(BaseModel):
    """`[train]` of a recipe. Intervals are in steps or, where the name says so, in minutes."""

    model_config = ConfigDict(extra="forbid")

    steps: int
    batch: int
    accumulate: int = 1  # batches whose gradients make one step
    seed: int = 0
    optimizer: Literal["adamw", "prodigy"] = "adamw"
    lr: float = 1e-3  # of Prodigy a factor: 1
    muon_lr: float | None = None
    embedding_lr: float | None = None
    beta2: float = 0.98  # of AdamW; 0.999 for runs of many thousand steps
    weight_decay: float = 0.0
    warmup: int = 50
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "bf16"
    compile: bool = False
    log_every: int = 20
    save_minutes: float = 4.0
    sheet_minutes: float = 8.0


class Task(nn.Module):
    """What is trained. Only parameters with requires_grad are optimised, averaged and saved."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def compiled(self) -> list[nn.Module]:
        """What `compile = true` compiles: parts that see the same shapes in every step."""
        return []

    def batch(self, rng: random.Random, size: int) -> Any:
        """One batch on the CPU, a pure function of `rng`; a tensor or a dataclass of them; runs in a background
        thread."""
        raise NotImplementedError(f"{type(self).__name__} has no batch().")

    def forward(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss (0-d) and figures for the log."""
        raise NotImplementedError(f"{type(self).__name__} has no forward().")

    def validate(self) -> dict[str, float]:
        """Figures on held-out data, with averaged weights."""
        return {}

    def sheet(self) -> Image.Image | None:
        """A picture of what the model does now, with averaged weights."""
        return None

    def export(self, folder: Path, card: dict) -> None:
        """Write what is shipped, from averaged weights. `card`: steps, images seen, last figures."""


def to_device(batch: Any, device: torch.device) -> Any:
    """A tensor, a tuple of them, or a dataclass with its tensors, on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple):
        return tuple(to_device(value, device) for value in batch)
    if not dataclasses.is_dataclass(batch) or isinstance(batch, type):
        return batch
    return dataclasses.replace(
        batch, **{f.name: to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init}
    )


class Loop:
    """One run: `Loop(task, config, out).run()`. `out` holds state.pt, log.jsonl, sheets and, at the end, the export."""

    def __init__(self, task: Task, config: LoopConfig, out: Path, *, resume: bool = True, progress: bool = False):
        self.task, self.config, self.out, self.progress = task, config, out, progress
        self.accelerator = Accelerator(mixed_precision=config.precision)
        out.mkdir(parents=True, exist_ok=True)
        self.optimizers = make_optimizers(
            task,
            lr=config.lr,
            muon_lr=config.muon_lr,
            embedding_lr=config.embedding_lr,
            weight_decay=config.weight_decay,
            beta2=config.beta2,
            optimizer=config.optimizer,
        )
        self.parameters = {name: p for name, p in task.named_parameters() if p.requires_grad}
        self.model, *prepared = self.accelerator.prepare(task, *self.optimizers)
        self.optimizers = prepared
        self.average = Average(self.parameters, config.ema)
        if config.compile:
            for part in task.compiled():
                part.compile(dynamic=False)
        self.step, self.bad_steps, self.seconds = 0, 0, 0.0
        if resume and (out / "state.pt").exists():
            self.load()

    def run(self) -> dict[str, float]:
        """Train to the last step; returns the last validation figures."""
        config, began = self.config, time.monotonic()
        saved = shown = began
        figures: dict[str, float] = {}
        self.model.train()
        with ThreadPoolExecutor(1) as pool, self.bar() as tick:
            pending = pool.submit(self.make_batch, self.step)
            mark, mark_step = time.monotonic(), self.step
            while self.step < config.steps:
                batch = pending.result()
                if self.step + 1 < config.steps:
                    pending = pool.submit(self.make_batch, self.step + 1)
                loss, logs = self.train_step(batch)
                self.step += 1
                tick(loss)
                now = time.monotonic()
                if self.step % config.log_every == 0 or self.step == config.steps:
                    rate = (self.step - mark_step) * self.images_a_step / (now - mark)
                    self.seconds += now - mark
                    mark, mark_step = now, self.step
                    self.write({"loss": loss, "images_per_s": round(rate, 1), **logs})
                if now - saved > 60 * config.save_minutes:
                    self.save()
                    saved = now
                if now - shown > 60 * config.sheet_minutes or self.step == config.steps:
                    figures = self.look()
                    shown = time.monotonic()
                    mark, mark_step = shown, self.step
        self.save()
        if self.accelerator.is_main_process:
            with self.averaged():
                self.task.export(self.out / "export", self.card(figures))
        return figures

    def make_batch(self, step: int) -> list[Any]:
        """The batches of a step."""
        rng = random.Random(self.key(step))
        return [self.task.batch(rng, self.config.batch) for _ in range(self.config.accumulate)]

    @property
    def images_a_step(self) -> int:
        return self.config.batch * self.config.accumulate * self.accelerator.num_processes

    def key(self, step: int) -> str:
        return f"{self.config.seed}/{step}/{self.accelerator.process_index}"

    def train_step(self, batches: list[Any]) -> tuple[float, dict[str, float]]:
        config = self.config
        generator = torch.Generator().manual_seed(random.Random("noise/" + self.key(self.step)).getrandbits(62))
        set_lr(self.optimizers, lr_factor(self.step, config.steps, config.warmup))
        value, logs = 0.0, {}
        for batch in batches:
            with self.accelerator.autocast():
                loss, logs = self.model(to_device(batch, self.accelerator.device), generator)
            self.accelerator.backward(loss / len(batches))
            value += float(loss.detach()) / len(batches)
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), config.clip)
        if math.isfinite(value) and (norm is None or math.isfinite(float(norm))):
            for optimizer in self.optimizers:
                optimizer.step()
            self.average.update(self.parameters)
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            log.warning("Step %d skipped: loss %s, gradient norm %s.", self.step, value, norm)
            if self.bad_steps >= NAN_STEPS_UNTIL_STOP:
                raise ValueError(
                    f"{self.bad_steps} steps in a row had a non-finite loss or gradient. The last checkpoint is in "
                    f"{self.out}; lower `lr`, or set precision = 'no'."
                )
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return value, logs

    def look(self) -> dict[str, float]:
        """Validation figures into the log and a sample sheet, from averaged weights."""
        if not self.accelerator.is_main_process:
            return {}
        self.model.eval()
        # Other batch sizes than in training: compiling again for each would take longer than the look itself.
        with self.averaged(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            figures, sheet = self.task.validate(), self.task.sheet()
        self.model.train()
        if figures:
            self.write({"validation": figures})
        if sheet is not None:
            sheet.save(self.out / f"sheet-{self.step:06d}.png")
        return figures

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Averaged weights in place of the live ones, bit-exactly restored afterwards."""
        live = {name: p.detach().clone() for name, p in self.parameters.items()}
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.average.shadow[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(live[name])

    def save(self) -> None:
        """Parameters, optimisers, average and position in one file, replaced atomically."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average.shadow,
            "average_count": self.average.count,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        atomic_write(self.out / "state.pt", lambda path: torch.save(state, path))

    def load(self) -> None:
        state = torch.load(self.out / "state.pt", map_location="cpu", weights_only=True)
        missing = self.parameters.keys() ^ state["parameters"].keys()
        if missing:
            raise ValueError(
                f"{self.out}/state.pt belongs to another recipe: {len(missing)} parameters differ (first: "
                f"{sorted(missing)[0]}). Choose another --out, or delete the folder."
            )
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state["parameters"][name])
                self.average.shadow[name].copy_(state["average"][name])
        self.average.count, self.step, self.seconds = state["average_count"], state["step"], state["seconds"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        log.info("Resumed %s at step %d of %d.", self.out, self.step, self.config.steps)

    def card(self, figures: dict[str, float]) -> dict:
        """What a model card says about this run."""
        images = self.step * self.images_a_step
        return {
            "steps": self.step,
            "batch": self.config.batch,
            "images_seen": images,
            "seconds": round(self.seconds),
            "figures": figures,
        }

    def write(self, row: dict) -> None:
        if self.accelerator.is_main_process:
            with (self.out / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **row}) + "\n")

    @contextmanager
    def bar(self) -> Iterator[Callable[[float], None]]:
        """A progress bar on stderr, if asked for; yields tick(loss)."""
        if not (self.progress and self.accelerator.is_main_process):
            yield lambda loss: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            row = progress.add_task("training", total=self.config.steps, completed=self.step)

            def tick(loss: float) -> None:
                progress.update(row, advance=1, description=f"loss {loss:.4f}")

            yield tick
