"""OminiControl: minimal and universal control for diffusion transformers (Tan et al. 2024, arXiv:2411.15098), with the
cached independent conditions of OminiControl2 (arXiv:2503.08280).

The model's own autoencoder encodes the condition; its tokens join the sequence with clock 0, positions of their own and
a LoRA that acts on them alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.controls.control import Control, Run, Step, When, match_batch
from condit.nn.attention import Attend, Call
from condit.nn.lora import LoRA, linear_shapes
from condit.nn.streams import Stream, grid_ids

if TYPE_CHECKING:
    from condit.data.images import ImageSource

# Targets of the official configurations. Feed-forward inputs, text weights and the heads stay as they are.
TARGETS = (
    "x_embedder",
    "norm1.linear",
    "norm.linear",
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "ff.net.2",
    "proj_mlp",
    *(f"single_transformer_blocks.{i}.proj_out" for i in range(64)),
)


@dataclass(frozen=True)
class OminiConfig:
    """How an adapter was trained: delta in image tokens (rows, columns), (0, 0) for aligned tasks; `scale` of compact
    conditions; `independent`: conditions attend to themselves only, so that a cache is exact; `annotator` that makes
    the condition image from a picture."""

    task: str = "custom"
    delta: tuple[float, float] = (0, 0)
    scale: float = 1.0
    independent: bool = False
    annotator: str | None = None
    rank: int = 4
    alpha: float | None = None


def omini_targets(backbone: nn.Module) -> dict[str, tuple[int, int]]:
    """The linears that the official LoRA adapts, path -> (out, in)."""
    return linear_shapes(backbone, TARGETS)


class OminiControl(nn.Module):
    """An adapter: one LoRA, and how its condition is placed. `control(reference)` makes a control."""

    def __init__(self, lora: LoRA, config: OminiConfig, pipe=None):
        super().__init__()
        self.lora, self.config, self.name, self.hash = lora, config, "", ""
        self._pipe = [pipe]  # in a list: the pipeline's weights are not ours

    @classmethod
    def new(cls, backbone: nn.Module, config: OminiConfig) -> OminiControl:
        """A fresh adapter for training; its output is that of the plain linears until trained."""
        if not hasattr(backbone, "prefill"):
            raise ValueError(
                f"OminiControl needs a backbone with streams; {type(backbone).__name__} has none. Use an MM-DiT "
                "('tiny', 'flux-dev') or condit.IPAdapter."
            )
        return cls(LoRA(omini_targets(backbone), config.rank, config.alpha), config)

    @classmethod
    def load(cls, source, pipe) -> OminiControl:
        """From a name ("tiny/subject"), a file or a folder. Rank and targets are inferred from the tensors."""
        file = pipe.adapter_file(source, "OminiControl")
        known = {k: v for k, v in file.config.items() if k in OminiConfig.__dataclass_fields__}
        lora = LoRA.from_tensors(file.tensors, known.get("alpha"))
        known["delta"] = tuple(known.get("delta", (0, 0)))
        lora = lora.requires_grad_(False).to(pipe.device, pipe.dtype)
        adapter = cls(lora, OminiConfig(**{**known, "rank": lora.rank}), pipe)
        shapes = linear_shapes(pipe.backbone, tuple(lora.keys))
        for path, key in lora.keys.items():
            found = len(lora.b[key]), lora.a[key].shape[1]
            if shapes.get(path) != found:
                raise ValueError(
                    f"{source}: this LoRA adapts {path!r} of shape {found}; {pipe.name} has "
                    f"{shapes.get(path, 'none')}. Was it made for another model?"
                )
        adapter.name, adapter.hash = file.name, file.hash
        return adapter

    def tensors(self) -> dict[str, Tensor]:
        """The published layout."""
        return self.lora.tensors()

    def metadata(self) -> dict:
        """What `load` needs beside the tensors."""
        return {"method": "OminiControl", **asdict(self.config)}

    def control(
        self,
        reference: ImageSource | Sequence[ImageSource],
        *,
        strength: float = 1.0,
        when: When | None = None,
        delta: tuple[float, float] | None = None,
        annotate: bool = True,
    ) -> OminiReference:
        """A control from one reference, or from n references for n images.

        strength: the factor gamma of section 3.2.3, >= 0, 1 as trained. `annotate=False`: the reference already is the
        condition image (an edge map, say).
        """
        if strength < 0:
            raise ValueError(f"OminiControl's strength is a factor on attention, >= 0; found {strength}.")
        pipe = self._pipe[0]
        if pipe is None:
            raise ValueError("This adapter is not bound to a pipeline. Use OminiControl.load(name, pipe).")
        images = pipe.read_images(reference, self.config.annotator if annotate else None)
        if self.config.scale != 1:
            images = shrink(images, self.config.scale, pipe.pixels)
        tokens, grid = pipe.encode_condition(images)
        # The unconditional pass sees a black picture, encoded like any other (spec of the official image guidance).
        black, _ = pipe.encode_condition(torch.full_like(images[:1], -1.0))
        return OminiReference(
            tokens=tokens,
            black=black,
            ids=grid_ids(*grid, delta=self.config.delta if delta is None else delta, scale=self.config.scale),
            adapter=self,
            strength=strength,
            when=when or When(),
            source=pipe.describe_source(reference),
        )


def shrink(images: Tensor, scale: float, multiple: int) -> Tensor:
    """Compact conditions (OminiControl2): images (n, 3, H, W) with sides divided by `scale`, multiples of a token, so
    that positions spread by `scale` cover the picture again."""
    size = [max(round(side / scale / multiple), 1) * multiple for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


@dataclass(frozen=True)
class OminiReference(Control):
    """Condition tokens (n, N, C) and positions. A prepared one holds its stream, or its cached keys and values."""

    tokens: Tensor
    black: Tensor
    ids: Tensor
    adapter: OminiControl
    strength: float
    when: When
    source: list[dict] = field(default_factory=list)
    stream: Stream | None = None
    memory: dict[str, tuple[Tensor, Tensor]] | None = None
    log_weight: Tensor | None = None

    def prepare(self, run: Run) -> OminiReference:
        stream = condition_stream(self.adapter, match_batch(self.tokens, run.batch, "OminiControl"), self.ids, run)
        if not self.adapter.config.independent:
            return replace(self, stream=stream)
        recorder = Recorder({})
        run.backbone.prefill(stream, (recorder,))
        return replace(self, memory=recorder.memory)

    def at(self, step: Step) -> OminiReference | None:
        strength = self.strength * self.when.factor(step)
        if strength == 0:
            return None  # log(0) is minus infinity: the condition is not seen at all
        # Strength 1 stays without a bias, bit-equal to a model that knows of none.
        weight = None if strength == 1 else torch.tensor(math.log(strength), device=self.tokens.device)
        stream = self.stream and replace(self.stream, log_weight=weight)
        return replace(self, log_weight=weight, stream=stream)

    def streams(self) -> tuple[Stream, ...]:
        return () if self.stream is None else (self.stream,)

    def around(self, call: Call, attend: Attend) -> Tensor:
        if self.memory is None or call.image is None:
            return attend(call)
        k, v = self.memory[call.site.path]
        return attend(call.append_kv(k, v, self.log_weight))

    def negative(self) -> OminiReference:
        return replace(self, tokens=self.black)

    def describe(self) -> dict:
        return {
            "method": "OminiControl",
            "adapter": self.adapter.name,
            "hash": self.adapter.hash,
            "strength": self.strength,
            "when": [self.when.start, self.when.end],
            "reference": self.source,
        }


def condition_stream(adapter: OminiControl, tokens: Tensor, ids: Tensor, run: Run) -> Stream:
    """The branch of a condition: clock 0, guidance 1, the prompt's pooled text, the adapter's LoRA."""
    missing = run.in_channels - tokens.shape[-1]
    clock = tokens.new_zeros(len(tokens))
    return Stream(
        tokens=F.pad(tokens, (0, missing)) if missing else tokens,
        ids=ids.to(tokens.device),
        timestep=clock,
        pooled=run.pooled.to(tokens.dtype),
        guidance=None if run.guidance is None else clock + 1,
        lora=adapter.lora,
        sees="self" if adapter.config.independent else "main",
    )


@dataclass(frozen=True)
class Recorder(Control):
    """Keeps the keys and values of every attention call it sees, keys after norm and rotation."""

    memory: dict[str, tuple[Tensor, Tensor]]

    def around(self, call: Call, attend: Attend) -> Tensor:
        self.memory[call.site.path] = (call.k, call.v)
        return attend(call)
