"""OminiControl: minimal and universal control for diffusion transformers (Tan et al. 2024, arXiv:2411.15098), with the
cached independent conditions of OminiControl2 (arXiv:2503.08280).

The model's own autoencoder encodes the condition; its tokens join the sequence with clock 0, positions of their own and
a LoRA that acts on them alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Unpack, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.controls import publish
from condit.controls.control import (
    Act,
    Control,
    Fill,
    Placing,
    Run,
    Step,
    When,
    check_arguments,
    check_shape,
    finite,
    match_batch,
    region_mask,
)
from condit.controls.host import Host, save_adapter, within
from condit.controls.omini_images import Originals
from condit.controls.omini_tasks import OminiConfig, Side, check_streams, file_config, omini_targets, task_config
from condit.data.images import mask_images, mask_list
from condit.nn.attention import Attend, Call
from condit.nn.lora import LoRA, sum_loras
from condit.nn.streams import Sees, Stream, row_weights

if TYPE_CHECKING:
    from condit.data.images import ImageSource

JOINT = (
    "This adapter was trained jointly: its condition attends to text and image, so its keys and values change with "
    "every step and a cache only approximates them. Leave cached= out, or choose an approximation: "
    "control(..., cached='first-step') or control(..., cached='independent')."
)
# Caches of a jointly trained adapter: keys and values of the first step, or of the condition on its own.
Cached = Literal["first-step", "independent", "approximate"]  # "approximate" is the older name of "independent"


class OminiControl(nn.Module):
    """An adapter: one LoRA, and how its condition is placed. `control(reference)` makes a control."""

    def __init__(self, lora: LoRA, config: OminiConfig, pipe: Host | None = None):
        super().__init__()
        self.lora, self.config, self.name, self.hash = lora, config, "", ""
        self._pipe: list[Host | None] = [pipe]  # in a list, so that the pipeline's weights are not registered here

    @classmethod
    def new(cls, backbone: nn.Module, config: OminiConfig) -> OminiControl:
        """An untrained adapter, whose update is zero."""
        check_streams(backbone)
        return cls(LoRA(omini_targets(backbone), config.rank, config.alpha), config)

    @classmethod
    def load(
        cls, source: str | Path, pipe: Host, task: str | OminiConfig | None = None, *, weight_name: str = ""
    ) -> OminiControl:
        """From a name ("tiny/subject", or on a hub), a file or folder. Rank and targets are inferred from the tensors.
        weight_name: the file in a folder or repository.

        task: a row of TASKS or a configuration. None: the file's own, or that of a published file by its name; raises
        ValueError for any other file.
        """
        check_streams(pipe.backbone)
        source = within(source, weight_name)
        file = pipe.adapter_file(source, "OminiControl")
        config = file_config(source, file.config) if task is None else task_config(task)
        lora = LoRA.from_tensors(file.tensors, config.alpha)
        lora.check_fits(pipe.backbone, source, pipe.name)
        lora = lora.requires_grad_(False).to(pipe.device, pipe.dtype)
        adapter = cls(lora, replace(config, rank=lora.rank), pipe)
        adapter.name, adapter.hash = file.name, file.hash
        return adapter

    save = save_adapter

    def tensors(self) -> dict[str, Tensor]:
        """The published layout."""
        return self.lora.tensors()

    def metadata(self) -> dict:
        """The configuration that `load` reads from the file."""
        return {"method": "OminiControl", **asdict(self.config), "alpha": None}  # the tensors hold it

    save_pretrained, push_to_hub = publish.save_pretrained, publish.push_to_hub

    def bound(self) -> Host:
        """The pipeline that encodes the references."""
        if self._pipe[0] is None:
            raise ValueError("This adapter is not bound to a pipeline. Use OminiControl.load(name, pipe).")
        return self._pipe[0]

    def control(
        self,
        reference: ImageSource | Sequence[ImageSource],
        strength: float = 1.0,
        *,
        fill: ImageSource | None = None,
        text_bias: bool = True,
        cached: bool | Cached | None = None,
        delta: tuple[float, float] | Side | None = None,
        size: tuple[int, int] | None = None,
        annotate: bool = True,
        **placing: Unpack[Placing],
    ) -> OminiReference:
        """A control from one reference, or from n references for n images.

        strength: the factor gamma of section 3.2.3, >= 0, 1 as trained. text_bias: it acts between condition and text
        too (the official code) or not (Eq. 5). fill: token integration (OminiControl2): white is generated, the rest of
        the reference is kept as the condition. size: height and width at which the reference is read; None: those of
        the call for aligned conditions (delta 0), else the model's. annotate=False: the reference already is the
        condition image, such as an edge map.

        cached: None: a cache if the adapter was trained independently; False: the condition runs in every step. Two
        values approximate a jointly trained adapter: "first-step" keeps the keys and values of the first step;
        "independent" runs the condition without text and image, as the official generate(kv_cache=True) does.
        """
        check_arguments(strength, placing, Placing)
        mask = placing.get("mask")
        if (strength := finite("strength", strength)) < 0:
            raise ValueError(f"OminiControl's strength is a factor on attention, >= 0; found {strength}.")
        if cached not in (None, True, False, *get_args(Cached)):
            raise ValueError(f"cached must be True, False, None, 'first-step' or 'independent'; found {cached!r}.")
        if cached is True and not self.config.independent:
            raise ValueError(JOINT)
        pipe, c = self.bound(), self.config if delta is None else replace(self.config, delta=delta)
        if fill is not None and (c.scale != 1 or tuple(c.delta) != (0, 0) or (annotate and c.annotator)):
            raise ValueError(
                "fill keeps cells of the image in place, so it needs an adapter with delta (0, 0), scale 1 "
                f"and no annotator; found delta {c.delta}, scale {c.scale}, annotator {c.annotator!r}."
            )
        originals, at = Originals.of(reference, c, annotate=annotate, fill=fill), size or pipe.size
        encoded = originals.encoded(pipe, at)
        settings: dict = {} if text_bias else {"text_bias": False}
        settings |= {} if cached is None else {"cached": cached}
        settings |= {} if size is None else {"size": list(size)}
        settings |= {} if fill is None else {"fill": pipe.describe_source(fill)}
        if mask is not None:
            settings["mask"] = pipe.describe_source(mask_list(mask))
        return OminiReference(
            tokens=encoded.tokens,
            black=encoded.black,
            ids=encoded.ids,
            adapter=self,
            strength=strength,
            when=When.of(placing.get("when")),
            source=pipe.describe_source(reference),
            text_bias=text_bias,
            mask=None if mask is None else (pipe.read_images(mask_images(mask), None)[:, 0] + 1) / 2,
            whole=encoded.whole,
            originals=originals,
            size=at,
            resizes=size is None and originals.follows,
            independent=True if cached in ("independent", "approximate") else None,
            cached=cached is not False,
            first_step=cached == "first-step",
            settings=settings,
        )


@dataclass(frozen=True)
class ConditionCache:
    """Keys and values (n, H, N, D) of an independent condition by site path, made with pooled text (n, P).

    They depend on the condition, its positions, the adapter and the pooled text only.
    """

    keys_values: dict[str, tuple[Tensor, Tensor]]
    pooled: Tensor

    def rows(self, run: Run) -> dict[str, tuple[Tensor, Tensor]]:
        """The keys and values for a run. Raises ValueError if they were made for another prompt."""
        kept = match_batch(self.pooled, run.batch, "The cache of a condition").to(run.pooled)
        apart = (kept - run.pooled).float().norm(dim=-1) / run.pooled.float().norm(dim=-1)
        # A batch of another size sums in another order, so equal prompts may differ in the last bits.
        if bool((apart > max(1e-4, 2 * torch.finfo(run.pooled.dtype).eps)).any()):
            raise ValueError(
                "This condition was prefilled for another prompt: its keys and values depend on the prompt's pooled "
                f"text (which differs by {float(apart.max()):.0%}). Prefill it for this prompt, or pass the control "
                "that was not prefilled."
            )
        return {
            path: (match_batch(k, run.batch, "OminiControl"), match_batch(v, run.batch, "OminiControl"))
            for path, (k, v) in self.keys_values.items()
        }


@dataclass(frozen=True)
class OminiReference(Control):
    """Condition tokens (n, N, C) and positions. After `prepare` it holds a stream, or cached keys and values.

    independent: None: as the adapter was trained; True: the condition does not attend to text and image. cached: an
    independent condition runs once, not in every step. first_step: a joint one runs in its first step only, and its
    keys and values of that step serve the others. text_bias: the strength acts between condition and text too. mask (n
    or 1, H, W): where in the image it acts. whole: the whole image of which these tokens are the known cells.
    originals: the references, encoded at `size`; resizes: a call of another size encodes them again."""

    tokens: Tensor
    black: Tensor
    ids: Tensor
    adapter: OminiControl
    strength: float
    when: When
    source: list[dict] = field(default_factory=list)
    text_bias: bool = True
    mask: Tensor | None = None
    whole: Fill | None = None
    originals: Originals | None = None
    size: tuple[int, int] | None = None
    resizes: bool = False
    empty: bool = False  # its tokens are those of the black image
    independent: bool | None = None
    cached: bool = True
    first_step: bool = False
    cache: ConditionCache | None = None
    settings: dict = field(default_factory=dict)  # for the recipe
    # Of a run:
    stream: Stream | None = None
    memory: dict[str, tuple[Tensor, Tensor]] | None = None
    log_region: Tensor | None = None
    log_weight: Tensor | None = None

    @property
    def acts(self) -> frozenset[Act]:  # of a run with cached keys and values, it neither joins tokens nor omits cells
        return frozenset[Act](("wrap",)) if self.memory and not (self.stream or self.whole) else super().acts

    @property
    def alone(self) -> bool:
        """Whether it attends to itself only."""
        return self.adapter.config.independent if self.independent is None else self.independent

    def sized(self, size: tuple[int, int], pipe: Host) -> OminiReference:
        if self.cache is not None or size == self.size:
            return self
        if self.originals is None or not self.resizes:
            self.check_extent(size, pipe)
            return self
        return self.encoded(self.originals, size, pipe)

    def sampled(self, generator: torch.Generator) -> OminiReference:
        """The same with tokens sampled from the autoencoder's posterior, then those of the black image, as the official
        code does; `control` takes the mode. Of a control that `OminiControl.control` made."""
        assert self.originals is not None and self.size is not None
        return self.encoded(self.originals.sampled_by(generator), self.size, self.adapter.bound())

    def encoded(self, originals: Originals, size: tuple[int, int], pipe: Host) -> OminiReference:
        """The same from the tokens of `originals` at a size."""
        new = originals.encoded(pipe, size)
        tokens = new.black if self.empty else new.tokens
        return replace(
            self, tokens=tokens, black=new.black, ids=new.ids, whole=new.whole, originals=originals, size=size
        )

    def check_extent(self, size: tuple[int, int], pipe: Host) -> None:
        """Raises ValueError for an aligned condition of a fixed size that reaches beyond the image."""
        rows, columns = size[0] // pipe.pixels, size[1] // pipe.pixels
        last = self.ids[:, 1:].amax(0).tolist()
        aligned = self.originals is not None and self.originals.follows
        if aligned and (last[0] > rows - 0.5 or last[1] > columns - 0.5):
            raise ValueError(
                f"This condition is aligned with the image (delta 0) and reaches position ({last[0]:g}, {last[1]:g}), "
                f"but the call generates {rows} x {columns} cells. Leave size= out, so that the condition has the size "
                "of the call, or generate a larger image."
            )

    def prepare(self, run: Run) -> OminiReference:
        ready = self if self.mask is None else self.in_region(self.mask, run)
        if self.cache is not None:
            return replace(ready, memory=self.cache.rows(run))
        tokens = match_batch(self.tokens.to(run.pooled), run.batch, "OminiControl")
        stream = condition_stream(self.adapter, tokens, self.ids, run, sees="self" if self.alone else "main")
        if self.alone and self.cached:
            return replace(ready, memory=keys_values(stream, run.backbone))
        if self.first_step and not self.alone:
            memory: dict[str, tuple[Tensor, Tensor]] = {}
            return replace(ready, stream=replace(stream, memory=memory), memory=memory)
        return replace(ready, stream=stream)

    def in_region(self, mask: Tensor, run: Run) -> OminiReference:
        """With the log of the mask on the token grid, (B, N); none for 1 everywhere. ValueError: another shape."""
        check_shape(mask, run.grid)
        region = match_batch(region_mask(mask, run.grid, run.cells)[:, 0, :, 0], run.batch, "mask")
        if not region.any():
            return replace(self, strength=0.0)
        return self if bool((region == 1).all()) else replace(self, log_region=region.log())

    def prefill(self, prompt: str | Sequence[str]) -> OminiReference:
        """The same with keys and values computed now for these prompts. It serves any seed, number of steps, guidance
        and image size, and raises ValueError in a call with other prompts. The unconditional side computes its own."""
        if not self.alone:
            raise ValueError(JOINT)
        pipe = self.adapter.bound()
        text = pipe.encode_text([prompt] if isinstance(prompt, str) else list(prompt))
        batch = max(len(text.pooled), len(self.tokens))
        pooled = match_batch(text.pooled, batch, "prompts")
        guidance = pooled.new_ones(batch) if pipe.backbone.config.guidance_embeds else None
        run = Run(pipe.backbone, batch, (0, 0), pooled, guidance, pipe.backbone.config.in_channels)
        with torch.no_grad():
            stream = condition_stream(
                self.adapter, match_batch(self.tokens, batch, "OminiControl"), self.ids, run, sees="self"
            )
            return replace(self, cache=ConditionCache(keys_values(stream, run.backbone), pooled), cached=True)

    def at(self, step: Step) -> OminiReference | None:
        strength = self.strength * self.when.factor(step)
        if strength == 0:
            return None  # log(0) is minus infinity: the condition is not seen at all
        # Strength 1 has no bias, so that it is bit-equal to a model without strengths.
        weight = None if strength == 1 else torch.full((), math.log(strength), device=self.tokens.device)
        if self.log_region is not None:
            weight = self.log_region if weight is None else self.log_region + weight
        stream, memory = self.stream, self.memory
        if stream is not None and memory is not None:  # the first step fills the memory, the others read it
            stream, memory = (None, memory) if memory else (stream, None)
        stream = stream and replace(stream, log_weight=weight, weight_text=self.text_bias)
        return replace(self, log_weight=weight, stream=stream, memory=memory)

    def streams(self) -> tuple[Stream, ...]:
        return () if self.stream is None else (self.stream,)

    def around(self, call: Call, attend: Attend) -> Tensor:
        if self.memory is None or call.image is None:
            return attend(call)
        k, v = self.memory[call.site.path]
        weight = self.log_weight
        if weight is not None and weight.ndim > 0 and call.merged is not None:
            weight = call.merged.merge(weight[..., None])[..., 0]
        if weight is not None and (weight.ndim > 0 or not self.text_bias):
            rows = row_weights(weight, call.q.shape[2], call.image, weight_text=self.text_bias)
            weight = rows[:, None, :, None]
        return attend(call.append_kv(k, v, weight))

    def fill(self) -> Fill | None:
        return self.whole

    def negative(self) -> OminiReference:
        return replace(self, tokens=self.black, empty=True, cache=None)

    def describe(self) -> dict:
        config = self.adapter.config if self.originals is None else self.originals.config
        return {
            "method": "OminiControl",
            "adapter": self.adapter.name,
            "hash": self.adapter.hash,
            "task": config.task,
            "delta": config.delta if isinstance(config.delta, str) else list(config.delta),
            "scale": config.scale,
            "strength": self.strength,
            "when": [self.when.start, self.when.end],
            "reference": self.source,
            **self.settings,
        }


def condition_stream(
    adapter: OminiControl, tokens: Tensor, ids: Tensor, run: Run, *, sees: Sees | None = None
) -> Stream:
    """The branch of a condition: clock 0, guidance 1, the prompt's pooled text, the adapter's LoRA. `sees`: None, as
    the adapter was trained."""
    missing = run.in_channels - tokens.shape[-1]
    clock = tokens.new_zeros(len(tokens))
    return Stream(
        tokens=F.pad(tokens, (0, missing)) if missing else tokens,
        ids=ids.to(tokens.device),
        timestep=clock,
        pooled=run.pooled.to(tokens.dtype),
        guidance=None if run.guidance is None else clock + 1,
        lora=sum_loras((adapter.lora, run.leak)),
        sees=sees or ("self" if adapter.config.independent else "main"),
    )


class Prefillable(Protocol):
    """A backbone that takes streams."""

    def prefill(self, condition: Stream, controls: tuple) -> None: ...


def keys_values(stream: Stream, backbone: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values of an independent condition, by site path."""
    memory: dict[str, tuple[Tensor, Tensor]] = {}
    cast("Prefillable", backbone).prefill(replace(stream, memory=memory), ())
    return memory
