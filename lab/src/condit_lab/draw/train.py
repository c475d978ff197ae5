"""Trains the embedded text-to-icon MM-DiT, on a CPU core or a CUDA GPU, with exact resume.

    python -m condit_lab.draw.train lab/recipes/draw/draw.toml --data PACK --out RUN            # starts or goes on
    python -m condit_lab.draw.train lab/recipes/draw/draw.toml --data PACK --out RUN --minutes 9 --batch 1024 --compile

All randomness of step i is drawn from (seed, i), so a run that was killed ends with the same weights as one that was
not (bit for bit on one kind of machine). RUN holds `state.pt`, replaced atomically every `save_minutes`, `log.jsonl`,
sample sheets, the tokenizer, and the codes of all drawings (`codes.bf16`). Where bf16 products are fast (a GPU, a CPU
with AMX) the same command computes in bf16 with fp32 weights; a GPU keeps the codes in its memory. Where files are
limited in size, carry PACK (parts below 60 MB) and an export of the run (`python -m condit_lab.draw.export RUN OUT`,
below 40 MB: averaged weights without the optimisers' state), and start with `--init OUT`: the count of images goes on,
the optimisers start anew.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from condit.data.files import atomic_write
from condit.encoders.clip_tokenizer import ClipTokenizer
from condit.training.optim import Average, parameter_groups
from condit_lab.draw import figures
from condit_lab.draw.code import RgbaCode, to_planes
from condit_lab.draw.data import Drawings, Mixture, all_captions
from condit_lab.draw.export import TOKENIZER, load_export, load_tokenizer
from condit_lab.draw.model import GRID, DrawModel, ModelConfig, new_text
from condit_lab.draw.muon import Muon
from condit_lab.draw.text import TrainedText, caption_table, whole_word_tokenizer

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class TrainConfig(BaseModel):
    """`[train]` of a recipe. Rates are peaks: warm-up, constant, and from `decay_from` on linear to zero."""

    model_config = ConfigDict(extra="forbid")

    images: Count  # when the run ends
    batch: Count = 128
    micro_batch: Count = 32  # rows that are computed at once; gradients of a batch are summed
    seed: int = 0
    muon_lr: Positive = 0.015
    muon_decay: Annotated[float, Field(ge=0)] = 0.0  # of the weights, in units of the rate
    lr: Positive = 1.2e-3
    embedding_lr: Positive = 2e-3
    text_factor: Positive = 0.5  # of the text tower's rates
    warmup: Count = 100  # steps
    decay_from: int | None = None  # images after which the rate falls, to zero at `images`
    clip: Positive = 1.0
    averages: tuple[Share, ...] = (0.998, 0.9998)
    t_mean: float = 0.8
    t_std: Positive = 1.3
    empty: Share = 0.1  # captions left empty, for guidance
    core_share: Share = 0.5
    compile: bool = False
    save_minutes: Positive = 5.0
    log_every: Count = 10  # steps
    figures_every: Count = 32_000  # images


class DrawRecipe(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: ModelConfig = ModelConfig()
    train: TrainConfig


def read_recipe(path: Path, changes: dict[str, int | bool]) -> DrawRecipe:
    fields = tomllib.loads(path.read_text(encoding="utf-8"))
    fields["train"].update(changes)
    return DrawRecipe(**fields)


def make_text(config: ModelConfig, train: Drawings, out: Path) -> TrainedText:
    """The text part of a model; its tokenizer is read from the run's folder, or made and put there."""
    file, limit = out / TOKENIZER, config.text_tokens
    if not file.exists():
        whole_word_tokenizer(all_captions(train.rows), vocab_size=config.vocabulary, limit=limit).tokenizer.save(
            str(file)
        )
    return new_text(config, ClipTokenizer.load(out, limit))


def fit_code(config: ModelConfig, drawings: Drawings, mixture: Mixture, n: int = 4096) -> RgbaCode:
    """The code of the mixture that is trained on."""
    rows = mixture.draw(n, torch.Generator().manual_seed(0))
    code = RgbaCode(config.components)
    code.fit(to_planes(drawings.rgba(part.tolist())) for part in rows.split(256))
    return code


def cached_codes(code: RgbaCode, drawings: Drawings, file: Path, device: torch.device) -> Tensor:
    """The codes of all drawings, (n, 64, channels) bf16: a memory map of `file`, or on a GPU."""
    shape = (len(drawings), GRID[0] * GRID[1], 4 * code.components)
    count, rows = math.prod(shape), range(len(drawings))
    if not file.exists():

        def write(path: Path) -> None:
            codes = torch.from_file(str(path), shared=True, size=count, dtype=torch.bfloat16).view(shape)
            for i in range(0, len(rows), 256):
                rgba = drawings.rgba(rows[i : i + 256], workers=16 if device.type == "cuda" else 1)
                codes[i : i + 256] = code.encode(to_planes(rgba))

        atomic_write(file, write)
    if file.stat().st_size != 2 * count:
        raise ValueError(f"{file} holds the codes of other drawings. Remove it; training makes it again.")
    return torch.from_file(str(file), shared=False, size=count, dtype=torch.bfloat16).view(shape).to(device)


def bf16_is_fast(device: str) -> bool:
    """Whether products in bf16 take less than half the time of float32, measured on a matrix of a training step."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (torch.ones(n, 512, dtype=dtype, device=device) for n in (4096, 512))
        for _ in range(3):  # the last one counts
            began = time.perf_counter()
            float((x @ w.mT)[0, 0])
            seconds[dtype] = time.perf_counter() - began
    return seconds[torch.bfloat16] < seconds[torch.float32] / 2


class Trainer:
    """One run in the folder `out`; goes on where its `state.pt` stands."""

    def __init__(
        self,
        recipe: DrawRecipe,
        drawings: Drawings,
        out: Path,
        *,
        init: Path | None = None,
        device: str = "cpu",
        bf16: bool = False,
    ):
        self.recipe, self.config, self.out, self.device = recipe, recipe.train, out, torch.device(device)
        self.bf16 = bf16  # products in bf16; weights, averages and losses stay in float32
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.config.seed)  # initial weights alone
        self.drawings, self.train = drawings, drawings.split("train")
        self.mixture = Mixture(self.train.rows, self.config.core_share)
        self.step, self.images, self.seconds = 0, 0, 0.0
        state = torch.load(out / "state.pt", weights_only=True, map_location="cpu") if self.resumes else None
        fresh = state is None and init is None
        if state is None and init is not None:
            load_tokenizer(init, out)
        text = make_text(recipe.model, self.train, out)
        code = fit_code(recipe.model, self.train, self.mixture) if fresh else RgbaCode(recipe.model.components)
        self.model = DrawModel(recipe.model, code, text)
        sketched = state is not None
        if state is None and init is not None:
            self.images, sketched = load_export(init, self.model)
        self.captions, self.starts = caption_table(text, self.train.rows)
        self.empty = text.ids([""])
        self.probes = figures.make_probes(self.model, drawings)
        self.model.to(self.device)
        self.codes = cached_codes(self.model.code, self.train, out / "codes.bf16", self.device)
        if not sketched:
            self.model.cpu().fit_words(
                self.captions, self.starts, self.codes.cpu(), self.mixture.weights(), looks=fresh, bf16=bf16
            )
            self.model.to(self.device)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizers = self.make_optimizers()
        self.averages = [Average(self.parameters, decay) for decay in self.config.averages]
        if state is not None:
            self.load(state)
        if self.config.compile:
            self.model.compile(dynamic=False)

    @property
    def resumes(self) -> bool:
        return (self.out / "state.pt").exists()

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon on hidden matrices, AdamW on the rest; the text's rates are smaller by `text_factor`."""
        config, muon, adam = self.config, [], []
        for part, factor in ((self.model.transformer, 1.0), (self.model.text, config.text_factor)):
            matrices, embeddings, rest = parameter_groups(part)
            muon.append({"params": matrices, "lr": factor * config.muon_lr})
            adam.append({"params": embeddings, "lr": config.embedding_lr})
            adam.append({"params": rest, "lr": factor * config.lr})
        muon, adam = [g for g in muon if g["params"]], [g for g in adam if g["params"]]
        optimizers = [
            Muon(
                muon,
                lr=config.muon_lr,
                weight_decay=config.muon_decay,
                dtype=torch.bfloat16 if self.bf16 else torch.float32,
            ),
            torch.optim.AdamW(adam, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        ]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]
        return optimizers

    def rate(self) -> float:
        """The factor of the peak rates."""
        config, factor = self.config, min(1.0, (self.step + 1) / self.config.warmup)
        if config.decay_from is not None and self.images > config.decay_from:
            factor *= max(0.0, (config.images - self.images) / (config.images - config.decay_from))
        return factor

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, caption ids, levels and noise of this step, of (seed, step) alone."""
        config, n = self.config, self.config.batch
        seed = random.Random(f"{config.seed}/{self.step}").getrandbits(62)
        generator = torch.Generator().manual_seed(seed)
        rows = self.mixture.draw(n, generator)
        count = self.starts[rows + 1] - self.starts[rows]
        place = (torch.rand(n, generator=generator, dtype=torch.float64) * count).long()
        ids = self.captions[self.starts[rows] + place]
        ids = torch.where(torch.rand(n, 1, generator=generator) < config.empty, self.empty, ids)
        # One level from each of n slices of the distribution, in random order: less noise in the gradient.
        u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
        t = torch.sigmoid(config.t_mean + config.t_std * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
        device = self.device
        x0 = self.codes[rows.to(device)].float()
        noise = torch.randn(x0.shape, device=device, generator=torch.Generator(device).manual_seed(seed))
        return x0, ids.to(device), t.to(device), noise

    def train_step(self) -> float:
        """One step of the optimisers; the loss."""
        config, total = self.config, torch.zeros((), device=self.device)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * self.rate()
        for x0, ids, t, noise in zip(*(x.split(config.micro_batch) for x in self.batch()), strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.model(x0, ids, t, noise).sum() / config.batch
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), config.clip)
        if not math.isfinite(float(norm)):
            raise ValueError(f"Step {self.step}: gradient norm {float(norm)}. The last checkpoint is in {self.out}.")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for average in self.averages:
            average.update(self.parameters)
        self.step, self.images = self.step + 1, self.images + config.batch
        return float(total)

    def run(self, minutes: float = math.inf) -> None:
        """Train to the recipe's number of images, or for so many minutes."""
        began = saved = mark = time.monotonic()
        mark_step, mark_cpu, losses = self.step, time.process_time(), []
        while self.images < self.config.images and time.monotonic() - began < 60 * minutes:
            losses.append(self.train_step())
            if self.step % self.config.log_every == 0:
                now = time.monotonic()
                seen, busy = (self.step - mark_step) * self.config.batch, time.process_time() - mark_cpu
                self.seconds += now - mark
                speed = {"images_per_s": round(seen / (now - mark), 1), "images_per_cpu_s": round(seen / busy, 1)}
                self.write({"loss": round(sum(losses) / len(losses), 4), **speed})
                mark, mark_step, mark_cpu, losses = now, self.step, time.process_time(), []
            if time.monotonic() - saved > 60 * self.config.save_minutes:
                self.save()
                saved = time.monotonic()
            before = (self.images - self.config.batch) // self.config.figures_every
            if self.images // self.config.figures_every > before:
                self.look()
                mark, mark_step, mark_cpu, losses = time.monotonic(), self.step, time.process_time(), []
        self.save()
        self.look()

    def look(self) -> None:
        """Figures and a sheet, with the weights of the shortest average."""
        self.model.eval()
        with self.averaged(0), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            self.write({"figures": figures.errors(self.model, self.probes)})
            figures.sheet(self.model, self.drawings).save(self.out / f"sheet-{self.images:09d}.png")
        self.model.train()

    @contextmanager
    def averaged(self, which: int) -> Iterator[None]:
        """An average in place of the live weights, which come back bit for bit."""
        live = {name: p.detach().clone() for name, p in self.parameters.items()}
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.averages[which].shadow[name])
            try:
                yield
            finally:
                for name, p in self.parameters.items():
                    p.copy_(live[name])

    def write(self, line: dict[str, object]) -> None:
        stamp = {"step": self.step, "images": self.images, "seconds": round(self.seconds, 1)}
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps({**stamp, **line}) + "\n")

    def save(self) -> None:
        state = {
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "recipe": self.recipe.model_dump_json(),
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "fitted": {name: x for name, x in self.model.state_dict().items() if name not in self.parameters},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "averages": [{"count": a.count, "shadow": a.shadow} for a in self.averages],
        }
        atomic_write(self.out / "state.pt", lambda path: torch.save(state, path))

    def load(self, state: dict) -> None:
        self.step, self.images, self.seconds = state["step"], state["images"], state["seconds"]
        self.model.load_state_dict(state["fitted"], strict=False)  # the parameters follow
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state["parameters"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            peaks = [group["peak_lr"] for group in optimizer.param_groups]  # the recipe's, which may have changed
            optimizer.load_state_dict(saved)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak_lr"] = peak
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.count = saved["count"]
            for name, shadow in average.shadow.items():
                shadow.copy_(saved["shadow"][name])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a pack of drawings (condit_lab.draw.data)")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--init", type=Path, help="an export to start from, where the run's folder holds no state")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--batch", type=int, help="in place of the recipe's, with as large micro-batches")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: bf16 where it is twice as fast")
    chosen = parser.parse_args()
    changes: dict[str, int | bool] = {"compile": True} if chosen.compile else {}
    if chosen.batch:
        changes |= {"batch": chosen.batch, "micro_batch": chosen.batch}
    torch.set_num_threads(chosen.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = read_recipe(chosen.recipe, changes)
    bf16 = bf16_is_fast(device) if chosen.precision is None else chosen.precision == "bf16"
    drawings = Drawings.open(chosen.data)
    trainer = Trainer(recipe, drawings, chosen.out, init=chosen.init, device=device, bf16=bf16)
    trainer.run(chosen.minutes)


if __name__ == "__main__":
    main()
