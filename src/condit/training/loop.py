"""The training loop over accelerate: any task, exact resume, a log line and a sheet every few minutes.

All randomness of step i comes from (seed, i, process), so a resumed run continues as if it had never stopped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import KwargsHandler
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from condit.data.files import atomic_write, remove_temporaries
from condit.data.progress import progress_bar
from condit.training import sharding
from condit.training.batches import sources, to_device
from condit.training.checkpoint import cut_log, read_state, stop_signals, write_state
from condit.training.fields import Count, Data, NotNegative, Positive, Seed, Share, Steps, Whole
from condit.training.optim import Average, lr_factor, make_optimizers, set_lr

log = logging.getLogger(__name__)

NAN_STEPS_UNTIL_STOP = 20


class LoopConfig(BaseModel):
    """`[train]` of a recipe. Intervals are in steps or, where the name says so, in minutes."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    steps: Steps
    batch: Count
    accumulate: Count = 1  # batches of each process whose gradients make one step
    batches: Count | None = None  # batches of a step over all processes: the run is the same on any number of them
    seed: Seed = 0
    optimizer: Literal["adamw", "prodigy"] = "adamw"
    lr: Positive = 1e-3  # of Prodigy a factor: 1
    muon_lr: Positive | None = None
    embedding_lr: Positive | None = None
    beta2: Share = 0.98  # of AdamW; 0.999 for runs of many thousand steps
    weight_decay: NotNegative = 0.0
    warmup: Whole = 50
    decay: bool = True  # the last four fifths of the run fall to zero; False: constant after the warm-up
    clip: Positive = 1.0
    ema: Share = 0.999
    precision: Literal["auto", "bf16", "no"] = "auto"  # of autocast; auto: bf16 where the device computes in it
    compile: bool = False
    shard: bool = False  # weights over all processes (FSDP2), for networks that one device cannot hold
    log_every: Count = 20
    save_minutes: NotNegative = 4.0
    sheet_minutes: NotNegative = 8.0


class Task(nn.Module, ABC):
    """What is trained. Only parameters with requires_grad are optimised, averaged and saved.

    data_type: the type of a recipe's `[data]`, the constructor's only argument; None: the constructor takes the fields
    as keyword arguments. progress: the share of the run that is done, 0 to 1, for schedules of a task's own.
    partly_used: some parameters may have no gradient in a step, which DistributedDataParallel needs to know.
    """

    data_type: ClassVar[type[Data] | None] = None
    progress = 0.0
    partly_used = False

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def compiled(self) -> list[nn.Module]:
        """Modules that `compile = true` compiles: those with the same shapes in every step."""
        return []

    def shards(self) -> tuple[str, Sequence[nn.Module]]:
        """What `shard = true` shards: the name of the network's attribute, and its blocks, gathered one at a time."""
        raise ValueError(f"{type(self).__name__} cannot be sharded; leave `shard` out.")

    @abstractmethod
    def batch(self, rng: random.Random, size: int) -> object:
        """One batch on the CPU, a tensor or a dataclass of tensors, a pure function of `rng`. Called in a background
        thread."""

    @abstractmethod
    def forward(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss (0-d) and figures for the log."""

    def validate(self) -> dict[str, float]:
        """Figures on held-out data, with averaged weights."""
        return {}

    def sheet(self) -> Image.Image | None:
        """A contact sheet of images that the model generates now, with averaged weights."""
        return None

    def export(self, folder: Path, card: dict) -> None:
        """Write the trained weights, averaged, into `folder`. `card`: steps, images seen, last figures."""


def fast_precision() -> Literal["bf16", "no"]:
    """bf16 where the device has arithmetic for it. A CPU that has none (AVX2) emulates it, tens of times slower."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "no"


class Loop:
    """One run: `Loop(task, config, out).run()`. `out` holds state.pt, log.jsonl, sheets and, at the end, the export."""

    def __init__(self, task: Task, config: LoopConfig, out: Path, *, resume: bool = True, progress: bool = False):
        self.task, self.config, self.out, self.progress = task, config, out, progress
        self.precision = fast_precision() if config.precision == "auto" else config.precision
        partly: list[KwargsHandler] = (
            [DistributedDataParallelKwargs(find_unused_parameters=True)] if task.partly_used else []
        )
        # accelerate keeps one precision a process, so autocast is ours: bf16 needs no more of it than that.
        self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=partly)
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > self.accelerator.num_processes:
            raise ValueError(
                f"{started} processes were started, but each sees only itself and would write over the others. "
                "On CPUs set ACCELERATE_USE_CPU=true before torchrun."
            )
        if self.accelerator.distributed_type is DistributedType.FSDP:
            raise ValueError(
                "Weights are sharded by `shard = true` under [train]; leave accelerate's FSDP settings out."
            )
        if config.batches is not None and (config.accumulate > 1 or config.batches % self.accelerator.num_processes):
            raise ValueError(
                f"batches = {config.batches} are divided among the processes: expected a multiple of "
                f"{self.accelerator.num_processes}, and no accumulate."
            )
        out.mkdir(parents=True, exist_ok=True)
        self.sharded = config.shard and self.accelerator.num_processes > 1
        self.skeleton = self.shard() if self.sharded else None
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
        self.model: nn.Module = task
        if not self.sharded:  # what is sharded sums its gradients itself
            self.model = self.accelerator.prepare(task)
        self.optimizers = [self.accelerator.prepare_optimizer(optimizer) for optimizer in self.optimizers]
        self.average = Average(self.parameters, config.ema)
        if config.compile:
            for part in task.compiled():
                part.compile(dynamic=False)
        self.step, self.bad_steps, self.seconds = 0, 0, 0.0
        remove_temporaries(out)
        if resume and (out / "state.pt").exists():
            self.load()
        if self.accelerator.num_processes > 1 and sharding.first(self.step, self.accelerator.device) != self.step:
            raise ValueError(
                f"Process {self.accelerator.process_index} starts at step {self.step}, unlike the first one: {out} "
                "must be on a file system that all machines share."
            )
        if resume and self.accelerator.is_main_process:
            cut_log(out / "log.jsonl", self.step, config.steps)

    def shard(self) -> nn.Module:
        """Shards the task's network; returns the same network without weights, in which they will be exported."""
        if self.config.muon_lr is not None:
            raise ValueError("Muon works on whole matrices: with shard = true leave muon_lr out.")
        name, parts = self.task.shards()
        skeleton = deepcopy(getattr(self.task, name)).to("meta")
        self.task.to(self.accelerator.device)
        sharding.shard(getattr(self.task, name), parts)
        outside = [n for n, p in self.task.named_parameters() if p.requires_grad and not n.startswith(f"{name}.")]
        if outside:
            raise ValueError(f"{outside[0]} is trained outside of what is sharded ({name}); leave `shard` out.")
        return skeleton

    def run(self) -> dict[str, float]:
        """Train to the last step; returns the last validation figures. Ctrl-C or SIGTERM saves a checkpoint at the end
        of the step and raises KeyboardInterrupt; a second one raises it at once."""
        config, began = self.config, time.monotonic()
        saved = shown = began
        figures: dict[str, float] = {} if self.step < config.steps else self.look()  # a run that had ended
        self.model.train()
        with stop_signals() as stopping, ThreadPoolExecutor(1) as pool, self.bar() as tick:
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
                if self.due(now - saved > 60 * config.save_minutes):
                    self.save()
                    saved = now
                if self.due(now - shown > 60 * config.sheet_minutes) or self.step == config.steps:
                    figures = self.look()
                    shown = time.monotonic()
                    mark, mark_step = shown, self.step
                if self.due(stopping.is_set()):
                    self.save()
                    raise KeyboardInterrupt
        self.save()
        self.export(figures)
        return figures

    def due(self, flag: bool) -> bool:
        return sharding.agree(flag, self.accelerator.device) if self.accelerator.num_processes > 1 else flag

    def export(self, figures: dict[str, float]) -> None:
        """The task's export, from averaged weights. A sharded network is whole afterwards, on the first process."""
        main = self.accelerator.is_main_process
        if self.skeleton is not None:
            name, _ = self.task.shards()
            state = {f"{name}.{k}": x for k, x in getattr(self.task, name).state_dict().items()} | self.average.shadow
            state = {k.removeprefix(f"{name}."): sharding.collect(x, keep=main) for k, x in state.items()}
            if main:
                self.skeleton.load_state_dict(state, strict=True, assign=True)
                setattr(self.task, name, self.skeleton)
                self.task.export(self.out / "export", self.card(figures))
        elif main:
            with self.averaged():
                self.task.export(self.out / "export", self.card(figures))

    def make_batch(self, step: int) -> list[object]:
        """The batches of a step that are this process's."""
        return [self.task.batch(rng, self.config.batch) for rng in self.sources(step)]

    @property
    def images_a_step(self) -> int:
        processes = self.accelerator.num_processes
        return self.config.batch * (self.config.batches or self.config.accumulate * processes)

    def sources(self, step: int, what: str = "") -> list[random.Random]:
        """The source of randomness of each batch of a step that is this process's."""
        config, accelerator = self.config, self.accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        return sources(f"{what}{config.seed}/{step}", config.batches, config.accumulate, rank, processes)

    def train_step(self, batches: Sequence[object]) -> tuple[float, dict[str, float]]:
        config = self.config
        noise = self.sources(self.step, "noise/")
        seeded = {rng: torch.Generator().manual_seed(rng.getrandbits(62)) for rng in dict.fromkeys(noise)}
        set_lr(self.optimizers, lr_factor(self.step, config.steps, config.warmup, decay=config.decay))
        self.task.progress = self.step / config.steps
        value, logs = 0.0, {}
        for batch, rng in zip(batches, noise, strict=True):
            with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss, logs = self.model(to_device(batch, self.accelerator.device), seeded[rng])
            loss = loss.float()
            self.accelerator.backward(loss / len(batches))
            value += float(loss.detach()) / len(batches)
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), config.clip)
        norm = 0.0 if norm is None else float(sharding.whole(torch.as_tensor(norm)))
        # The norm is of all processes' gradients, the loss this one's: sharded, all must decide alike.
        if math.isfinite(norm) and (self.sharded or math.isfinite(value)):
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
        if not (self.accelerator.is_main_process or self.sharded):
            return {}
        self.model.eval()
        self.task.progress = self.step / self.config.steps
        # Other batch sizes than in training: compiling again for each would take longer than the look itself.
        with self.averaged(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            figures, sheet = self.task.validate(), self.task.sheet()
        self.model.train()
        if figures:
            self.write({"validation": figures})
        if sheet is not None and self.accelerator.is_main_process:
            atomic_write(self.out / f"sheet-{self.step:06d}.png", lambda path: sheet.save(path, "PNG"))
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
        """Parameters, optimisers, average and position in one file, replaced atomically. Tensors are whole in it."""
        main = self.accelerator.is_main_process
        if not (main or self.sharded):
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "parameters": {name: sharding.collect(p.detach(), keep=main) for name, p in self.parameters.items()},
            "average": {name: sharding.collect(x, keep=main) for name, x in self.average.shadow.items()},
            "average_count": self.average.count,
            "optimizers": [sharding.whole_state(optimizer, keep=main) for optimizer in self.optimizers],
        }
        if main:
            write_state(self.out / "state.pt", state)
        if self.sharded:
            self.accelerator.wait_for_everyone()

    def load(self) -> None:
        state = read_state(self.out / "state.pt")
        shapes = [{name: tuple(p.shape) for name, p in each.items()} for each in (self.parameters, state["parameters"])]
        differ = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
        if differ:
            raise ValueError(
                f"{self.out}/state.pt belongs to another recipe: {len(differ)} parameters differ (first: {differ[0]}, "
                f"{shapes[1].get(differ[0])} instead of {shapes[0].get(differ[0])}). Choose another --out, or delete "
                "the folder."
            )
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(sharding.part_of(state["parameters"][name], p))
                self.average.shadow[name].copy_(sharding.part_of(state["average"][name], p))
        self.average.count, self.step, self.seconds = state["average_count"], state["step"], state["seconds"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            sharding.load_whole_state(optimizer, saved)
        log.info("Resumed %s at step %d of %d.", self.out, self.step, self.config.steps)

    def card(self, figures: dict[str, float]) -> dict:
        """What a model card says about this run."""
        images = self.step * self.images_a_step
        return {
            "steps": self.step,
            "batch": self.config.batch,
            "precision": self.precision,
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
        """Progress on stderr, with `progress`; yields tick(loss)."""
        if not (self.progress and self.accelerator.is_main_process):
            yield lambda loss: None
            return
        steps, batch = self.config.steps, self.images_a_step
        log.info("Training into %s: steps %d to %d, %d images each.", self.out, self.step, steps, batch)
        with progress_bar(steps, "training", images=steps * batch, done=self.step) as advance:
            yield lambda loss: advance(note=f"loss {loss:.4f}")
