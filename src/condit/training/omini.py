"""Training of OminiControl adapters on FLUX.1 (Tan et al. 2024, arXiv:2411.15098, section 4.1; OminiControl2,
arXiv:2503.08280): LoRAs in float32 over a frozen transformer.

x_t = (1 - t) x0 + t noise with t = sigmoid(N(0, 1)), squared error of the velocity, guidance 1 for every branch; 10 %
of the prompts empty, 10 % of the references black, independently.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiT
from condit.controls.control import Run
from condit.controls.omini import OminiControl, condition_stream
from condit.controls.omini_images import sample_generated_cells
from condit.controls.omini_tasks import condition_ids
from condit.data.images import to_images, to_tensor
from condit.data.line_score import edge_f1
from condit.data.pairs import ShardPairs
from condit.data.sheets import contact_sheet
from condit.diffusion.objectives import add_noise, drop, flow_loss
from condit.diffusion.samplers import FlowPath, euler
from condit.diffusion.schedules import flow_sigmas, logit_normal
from condit.diffusion.steps import Step
from condit.drawing.pipeline import Pipeline
from condit.drawing.references import ANNOTATORS
from condit.encoders.vae import decode_tokens
from condit.nn.offload import CheckpointedBlocks, with_blocks
from condit.nn.streams import Stream, grid_ids
from condit.training.export import export_adapter
from condit.training.loop import Task, to_device
from condit.training.omini_data import (
    ConditionSpec,
    OminiData,
    PairImages,
    Rows,
    cache_key,
    check_roles,
    load_rows,
    moments_of,
    open_training_pairs,
    read_pair,
    sample_posterior,
    save_row,
    text_of,
    with_empty,
)
from condit.weights.load import load_parts
from condit.weights.parts import Parts
from condit.weights.quantise import quantise

log = logging.getLogger(__name__)

LEVELS = 0.5, 0.7, 0.9
LINES = "canny", "edges", "lines"
ENCODE_BATCH = 4
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def no_text(*_: object) -> NoReturn:
    """In place of text encoders that were freed after the cache was filled."""
    raise ValueError("The text encoders are not in memory: with `cache`, the text of every pair comes from the cache.")


@dataclass(frozen=True)
class Placed:
    """A condition in the sequence: tokens (B, M, C), positions (M, 3) or (B, M, 3), the name of its adapter."""

    tokens: Tensor
    ids: Tensor
    adapter: str


class OminiModel(nn.Module):
    """A frozen transformer with adapters by name; only the adapters have gradients."""

    def __init__(self, transformer: MMDiT, adapters: dict[str, OminiControl]):
        super().__init__()
        self.transformer, self.adapters = transformer, nn.ModuleDict(adapters)

    def forward(
        self, x_t: Tensor, ids: Tensor, t: Tensor, text: Tensor, pooled: Tensor, placed: Sequence[Placed], guidance=1.0
    ) -> Tensor:
        """Velocity (B, N, C) of noisy tokens at positions (N, 3) or (B, N, 3)."""
        c = self.transformer.config
        dtype = pooled.dtype
        scale = torch.full((len(x_t),), float(guidance), device=x_t.device, dtype=dtype) if c.guidance_embeds else None
        run = Run(self.transformer, len(x_t), (0, 0), pooled, scale, c.in_channels)
        streams = []
        for one in placed:
            adapter = self.adapters[one.adapter]
            assert isinstance(adapter, OminiControl)
            streams.append(condition_stream(adapter, one.tokens.to(dtype), one.ids, run))
        image = Stream(x_t.to(dtype), ids, t.to(dtype), pooled, scale)
        text_ids = torch.zeros(text.shape[1], 3, device=text.device)
        return self.transformer(image, text, text_ids, conditions=streams)


class OminiTask(Task):
    """Task "omini" of a recipe."""

    data_type = OminiData

    def __init__(self, data: OminiData):
        super().__init__()
        self.specs, self.size = data.conditions, (data.height, data.width)
        self.independent, self.integrate = data.independent, data.integrate
        # The official trainer drops no image in token integration: the known part is always known.
        self.text_dropout, self.image_dropout = data.text_dropout, 0.0 if data.integrate else data.image_dropout
        self.generated, self.sampling_steps = data.draw, data.draw_steps
        self.pairs, key = open_training_pairs(data.pairs)
        check_roles(self.pairs, self.specs, data.pairs)
        self.held_out = min(data.held_out, len(self.pairs) - 1)
        parts = load_parts(data.model, dtype=DTYPES[data.dtype], components=data.components)
        if not isinstance(parts, Parts):
            raise ValueError(f"{data.model!r} is not FLUX.1: OminiControl is trained on an MM-DiT.")
        self.base_hash, self.parts = parts.hash, parts
        self.check(parts)
        if data.quantize is not None:
            quantise(parts.backbone, data.quantize)
        transformer = parts.backbone.requires_grad_(False)
        adapters: dict[str, OminiControl] = {}
        for spec in self.specs:
            config = spec.config(independent=data.independent, rank=data.rank, alpha=data.alpha)
            adapters.setdefault(spec.adapter, OminiControl.new(transformer, config))
        self.model = OminiModel(
            with_blocks(transformer, CheckpointedBlocks) if data.checkpointing else transformer, adapters
        )
        self.vae, self.text = parts.vae, parts.text
        self.text.limit = data.text_tokens
        self.cache: Path | None = None
        if data.cache is not None:
            self.cache = Path(data.cache) / cache_key(key, parts.hash, self.specs, self.size, data.text_tokens)
            self.fill_cache()
            self.text = None  # T5 takes 9.5 GB
            self.parts = replace(parts, text=no_text)
        self.empty: Rows | None = None

    def train(self, mode: bool = True) -> OminiTask:
        """Only the adapters are in training mode: T5 has dropout."""
        super().train(mode)
        for frozen in (self.text, self.vae, self.model.transformer):
            if frozen is not None:
                frozen.eval()
        return self

    def check(self, parts: Parts) -> None:
        """Raises ValueError for settings that do not fit the model, before rows are encoded."""
        if parts.prediction != "velocity" or not parts.distilled:
            raise ValueError(f"Task 'omini' trains on FLUX.1; {parts.name} is another model. Use task 'tokens' for it.")
        self.pixels = Pipeline(parts).pixels
        for size in (self.size, *(s.size for s in self.specs if s.size)):
            if any(side % self.pixels or side <= 0 for side in size):
                raise ValueError(f"sizes must be multiples of {self.pixels}; found {size[0]} x {size[1]}.")
        for spec in self.specs:
            at = spec.size or self.size
            spread = tuple(round(side * spec.scale) for side in at)
            if spec.delta == (0, 0) and spread != self.size:
                raise ValueError(
                    f"condition {spec.role!r} lies on the target (delta 0), but {at[0]} x {at[1]} times scale "
                    f"{spec.scale} is not {self.size[0]} x {self.size[1]}. Set size, scale or delta."
                )
        plain_target = len(self.specs) == 1 and self.specs[0] == ConditionSpec(
            role="target", adapter=self.specs[0].adapter
        )
        if self.integrate and not plain_target:
            raise ValueError(
                "integrate needs exactly one condition, role = 'target', without annotator, size or delta."
            )

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // self.pixels, self.size[1] // self.pixels

    def ids_of(self, spec: ConditionSpec) -> Tensor:
        height, width = spec.size or self.size
        config = spec.config(independent=self.independent, rank=1, alpha=None)
        return condition_ids(config, (height // self.pixels, width // self.pixels)).to(self.device)

    # Batches

    @property
    def training_rows(self) -> int:
        return len(self.pairs) - self.held_out

    def batch(self, rng: random.Random, size: int) -> PairImages | Rows:
        if isinstance(self.pairs, ShardPairs):
            chosen = self.pairs.batch(rng, size, self.training_rows)
        else:
            chosen = [rng.randrange(self.training_rows) for _ in range(size)]
        return self.read(chosen, torch.Generator().manual_seed(rng.getrandbits(62)))

    def read(self, indices: Sequence[int], generator: torch.Generator) -> PairImages | Rows:
        drawn = torch.stack([sample_generated_cells(self.grid, generator) for _ in indices]) if self.integrate else None
        if self.cache is not None:
            return replace(load_rows([self.row_file(i) for i in indices]), drawn=drawn)
        return replace(self.images(indices), drawn=drawn)

    def images(self, indices: Sequence[int]) -> PairImages:
        targets, captions, conditions = zip(
            *(read_pair(self.pairs[i], self.specs, self.size) for i in indices), strict=True
        )
        stacked = tuple(torch.stack(c) for c in zip(*conditions, strict=True))
        return PairImages(torch.stack(targets), list(captions), stacked)

    @torch.no_grad()
    def encode(self, batch: PairImages | Rows) -> Rows:
        """Rows of tokens on the task's device."""
        if isinstance(batch, Rows):
            return batch
        assert self.text is not None  # batches are images only without a cache
        text, pooled = text_of(self.text(batch.captions), self.dtype)
        conditions = tuple(moments_of(self.vae, c) for c in batch.conditions)
        return Rows(moments_of(self.vae, batch.images), conditions, text, pooled, batch.drawn)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.transformer.x_embedder.weight.dtype

    def row_file(self, i: int | str) -> Path:
        assert self.cache is not None
        return self.cache / f"{i}.safetensors"

    def black(self) -> PairImages:
        """The empty prompt and black conditions; the target is not used."""
        sizes = [s.size or self.size for s in self.specs]
        return PairImages(torch.zeros(1, 3, *self.size), [""], tuple(torch.full((1, 3, *s), -1.0) for s in sizes))

    def fill_cache(self) -> None:
        """Encodes the missing rows, on the device that training will use."""
        missing = [i for i in range(len(self.pairs)) if not self.row_file(i).exists()]
        device = PartialState().device
        assert isinstance(device, torch.device)
        for module in (self.vae, self.text):
            if module is not None:
                module.to(device)
        if not self.row_file("empty").exists():
            save_row(self.row_file("empty"), self.encode(to_device(self.black(), device)), 0)
        if missing:
            log.info("Encoding %d pairs once, into %s.", len(missing), self.cache)
        for begin in range(0, len(missing), ENCODE_BATCH):
            chosen = missing[begin : begin + ENCODE_BATCH]
            rows = self.encode(to_device(self.images(chosen), device))
            for k, i in enumerate(chosen):
                save_row(self.row_file(i), rows, k)

    def empty_rows(self) -> Rows:
        if self.empty is None:
            stored = self.cache is not None
            rows = load_rows([self.row_file("empty")]) if stored else self.black()
            self.empty = self.encode(to_device(rows, self.device))
        return self.empty

    # The step

    def forward(self, batch: PairImages | Rows, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = self.encode(batch)
        n = len(rows)
        without = drop(n, self.text_dropout, generator), drop(n, self.image_dropout, generator)
        rows = with_empty(rows, self.empty_rows(), *without)
        x0 = sample_posterior(rows.target, generator).float()
        # In token integration one encoding serves both halves.
        tokens = [x0] if self.integrate else [sample_posterior(c, generator) for c in rows.conditions]
        t = logit_normal(n, generator=generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        # The last block's output for a joint condition is not used, but DistributedDataParallel needs a gradient of
        # every weight: a zero.
        zero = 0.0 * torch.stack([p.sum() for p in self.model.adapters.parameters()]).sum()
        return self.loss(rows, x0, tokens, noise, t).mean() + zero, {}

    def loss(self, rows: Rows, x0: Tensor, tokens: Sequence[Tensor], noise: Tensor, t: Tensor) -> Tensor:
        """Squared error of the velocity for each row, (B,), averaged over its tokens."""
        losses = torch.empty(len(x0), device=x0.device)
        for chosen, cells in self.same_cells(rows):
            keep = slice(None) if cells is None else cells
            ids = grid_ids(*self.grid).to(x0.device)
            placed = self.placed([c[chosen] for c in tokens], cells)
            x, e, time = x0[chosen][:, keep], noise[chosen][:, keep], t[chosen]
            out = self.model(add_noise(x, e, time), ids[keep], time, rows.text[chosen], rows.pooled[chosen], placed)
            losses = losses.index_put((chosen,), flow_loss(out, x, e, time))
        return losses

    def same_cells(self, rows: Rows) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Rows that share a forward pass: all, or one at a time in token integration, where cells differ."""
        if rows.drawn is None:
            yield torch.arange(len(rows), device=rows.target.device), None
            return
        for i, drawn in enumerate(rows.drawn):
            yield torch.tensor([i], device=rows.target.device), drawn.flatten().to(rows.target.device)

    def placed(self, tokens: Sequence[Tensor], cells: Tensor | None) -> list[Placed]:
        """Conditions at their positions; in token integration only the known cells."""
        keep = slice(None) if cells is None else ~cells
        return [
            Placed(c[:, keep], self.ids_of(spec)[keep], spec.adapter)
            for c, spec in zip(tokens, self.specs, strict=True)
        ]

    # Validation

    def examples(self) -> Rows:
        held = range(self.training_rows, len(self.pairs))
        pairs = self.read(list(held) or [0], torch.Generator().manual_seed(0))
        return self.encode(to_device(pairs, self.device))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """On held-out pairs: the velocity error, by how many percent it rises with another pair's references
        (`wrong_reference`) and with black ones (`no_reference`), and how well generated images follow their conditions
        (`follow_*`)."""
        rows, empty = self.examples(), self.empty_rows()
        x0 = rows.target[:, 0].float()
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
        right = [x0] if self.integrate else [c[:, 0] for c in rows.conditions]
        black = [e[:, 0].expand_as(c) for e, c in zip(empty.conditions, right, strict=True)]
        figures: dict[str, float] = {}
        for level in LEVELS:
            t = torch.full((len(x0),), level, device=x0.device)
            error, wrong, none = (
                float(self.loss(rows, x0, tokens, noise, t).mean())
                for tokens in (right, [c.roll(1, 0) for c in right], black)
            )
            figures[f"error_{level}"] = round(error, 4)
            if len(x0) > 1:
                figures[f"wrong_reference_{level}"] = round(100 * (wrong / error - 1), 1)
            figures[f"no_reference_{level}"] = round(100 * (none / error - 1), 1)
        return figures | self.followed(rows)

    def followed(self, rows: Rows) -> dict[str, float]:
        """For conditions made by an annotator: F1 of lines within 2 pixels, or mean squared difference in 0 ... 255,
        between the condition and the annotation of the generated image."""
        annotated = [(k, s) for k, s in enumerate(self.specs) if s.annotator is not None and s.size is None]
        if not annotated or not self.generated or self.integrate:
            return {}
        n, figures = min(self.generated, len(rows)), {}
        generated = to_images(self.generate(rows, n))
        held = range(self.training_rows, self.training_rows + n)
        references = [read_pair(self.pairs[i], self.specs, self.size)[2] for i in held]
        for k, spec in annotated:
            assert spec.annotator is not None
            maps = torch.stack([to_tensor(ANNOTATORS[spec.annotator](image), self.size) for image in generated])[:, 0]
            expected = torch.stack([conditions[k] for conditions in references])[:, 0]
            if spec.annotator in LINES:
                dark = spec.annotator == "lines"
                ours, theirs = ((m < 0) if dark else (m > 0) for m in (maps, expected))
                figures[f"follow_{spec.annotator}_f1"] = round(float(edge_f1(ours, theirs).mean()), 4)
            else:
                figures[f"follow_{spec.annotator}_mse"] = round(float((127.5 * (maps - expected)).square().mean()), 1)
        return figures

    @torch.no_grad()
    def generate(self, rows: Rows, n: int, *, guidance: float = 3.5) -> Tensor:
        """Images (n, 3, H, W) of the first n rows with their conditions, by the pipeline's sampler."""
        tokens = [c[:n, 0] for c in rows.conditions]
        ids, placed = grid_ids(*self.grid).to(self.device), self.placed(tokens, None)
        text, pooled = rows.text[:n], rows.pooled[:n]

        def velocity(x: Tensor, step: Step) -> Tensor:
            t = torch.full((n,), step.time, device=self.device)
            return self.model(x, ids, t, text, pooled, placed, guidance).float()

        noise = torch.randn(rows.target[:n, 0].shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        sigmas = flow_sigmas(self.sampling_steps, shift=self.parts.shift_of(len(ids)))
        latent = euler(velocity, noise, FlowPath(tuple(sigmas.tolist()))).to(next(self.vae.parameters()).dtype)
        return decode_tokens(self.vae, latent, self.grid)

    def sheet(self) -> Image.Image | None:
        """Conditions, generated images and targets of held-out pairs."""
        if not self.generated or self.integrate:
            return None
        held = list(range(self.training_rows, len(self.pairs)))[: self.generated] or [0]
        pairs = self.images(held)
        generated = to_images(self.generate(self.examples(), len(held)))
        rows = [*(to_images(c) for c in pairs.conditions), generated, to_images(pairs.images)]
        return contact_sheet(rows, [*(s.role for s in self.specs), "generated", "target"])

    def export(self, folder: Path, card: dict) -> None:
        """A single adapter goes into the folder itself, more than one into a folder each."""
        alone = len(self.model.adapters) == 1
        for name, adapter in self.model.adapters.items():
            assert isinstance(adapter, OminiControl)
            export_adapter(
                adapter, folder if alone else folder / name, card, model=self.parts.name, base=self.base_hash
            )
        specs = [s.model_dump() for s in self.specs]
        (folder / "conditions.json").write_text(json.dumps(specs, indent=1) + "\n")
