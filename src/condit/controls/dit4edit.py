"""DiT4Edit: unified attention control for image editing with diffusion transformers (Feng et al. 2024,
arXiv:2411.03286). The paper published no code; docs/papers/dit4edit.md lists the choices that it leaves open.

Source and target are generated side by side. The target's cross-attention takes the source's maps for the words that
both prompts share (section 4.2, after prompt-to-prompt); its self-attention takes the source's keys and values, or its
map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from condit.controls.control import Control, PromptPair, Run, Step
from condit.controls.edit_maps import blend_mask, exchange, refinement_table, replacement_table, word_steps
from condit.encoders.words import Words
from condit.nn.attention import Attend, Call, Site

Window = tuple[float, float]
Cross = Literal["auto", "replace", "refine"]


@dataclass(frozen=True)
class Blend:
    """Local blend: outside the region of the edited words the target is the source.

    words: of either prompt, None: those that differ. keep: words whose region stays the source's instead. The maps of
    the layers in the window are averaged over heads, layers and the steps so far; it starts after `start` of them.
    """

    words: tuple[str, ...] | None = None
    keep: tuple[str, ...] = ()
    threshold: float = 0.3
    start: float = 0.2
    layers: Window = (0.25, 0.75)


@dataclass(frozen=True)
class Table:
    """How the maps of a batch are exchanged: R (B, L, L), weights and factors (B, L); until: which tokens (B, L) are
    exchanged until which share of the steps; edited: the places of edited words (B, 2, L); weighs: whether a factor is
    not 1."""

    map: Tensor
    weight: Tensor
    factor: Tensor
    until: dict[float, Tensor]
    edited: Tensor
    weighs: bool

    def gate(self, step: Step) -> tuple[Tensor, bool]:
        """Which tokens are exchanged in a step, (B, 1, 1, L) of 0 and 1; and whether any is."""
        acting = [tokens for share, tokens in self.until.items() if word_steps(step.count, share, {}, 1)[step.index, 0]]
        return sum(acting, torch.zeros_like(self.weight))[:, None, None], bool(acting)


@dataclass(frozen=True)
class DiT4Edit(Control):
    """An edit by attention. Acts in `pipe.edit` only. `PRESETS` holds a set of values by edit type.

    cross: words replaced one by one ("replace": as many words), or added and dropped ("refine"); "auto": replace where
    the counts are equal; None: off. cross_until: the share of steps it lasts, word_until the same for single words of
    the target. reweight: factors on the maps of target words. self_form: "kv", the target's queries look up the
    source's keys and values (changes of shape), or "map", it takes the source's map (rigid edits); None: off.
    self_steps, self_layers: where, as shares of steps and layers; a share below one step contains none, so
    a short window has no effect at few steps. record: keep the maps for a result page.
    """

    cross: Cross | None = "auto"
    cross_until: float = 0.8
    word_until: Mapping[str, float] = field(default_factory=dict)
    reweight: Mapping[str, float] = field(default_factory=dict)
    self_form: Literal["kv", "map"] | None = "map"
    self_steps: Window = (0.0, 0.3)
    self_layers: Window = (0.0, 1.0)
    blend: Blend | None = None
    record: bool = False
    # Of a run:
    table: Table | None = None
    count: int = 0
    grid: tuple[int, int] = (0, 0)
    memory: dict[str, Tensor] = field(default_factory=dict)
    conditional: bool = True
    # Of a step:
    gate: Tensor | None = None  # (B, 1, 1, L)
    self_gate: Tensor | None = None  # 0-d
    maps: bool = False
    blending: bool = False

    def __post_init__(self):
        if self.cross not in ("auto", "replace", "refine", None):
            raise ValueError(f"cross must be 'auto', 'replace', 'refine' or None; found {self.cross!r}.")
        if self.self_form not in ("kv", "map", None):
            raise ValueError(f"self_form must be 'kv', 'map' or None; found {self.self_form!r}.")
        for name, value in (("cross_until", self.cross_until), *self.word_until.items()):
            if not 0 <= value <= 1:
                name = name if name == "cross_until" else f"word_until[{name!r}]"
                raise ValueError(f"{name} is a share of the steps, 0 to 1; found {value}.")
        for word, value in self.reweight.items():
            if not math.isfinite(value):
                raise ValueError(f"reweight[{word!r}] is a factor on attention; found {value}.")
        windows = {"self_steps": self.self_steps, "self_layers": self.self_layers}
        windows |= {} if self.blend is None else {"blend.layers": self.blend.layers}
        for name, (start, end) in windows.items():
            if not 0 <= start < end <= 1:
                raise ValueError(f"{name} needs 0 <= start < end <= 1; found {start} to {end}.")
        if self.blend is not None and not (0 <= self.blend.start < 1 and 0 < self.blend.threshold < 1):
            raise ValueError(f"A blend's start and threshold lie in 0 to 1; found {self.blend}.")

    def prepare(self, run: Run) -> DiT4Edit:
        if run.edit is None:
            raise ValueError(
                "DiT4Edit changes one image into another: use pipe.edit(image, source, target, controls=...)."
            )
        count = self.count_layers(run.backbone)
        memory = run.memory.setdefault("DiT4Edit", {}) if self.conditional else {}
        table = make_table(self, run.edit, run.pooled.device) if self.conditional else None
        off = torch.zeros((), dtype=torch.bool, device=run.pooled.device)
        return replace(self, table=table, count=count, grid=run.grid, memory=memory, self_gate=off)

    def edit(self, pair: PromptPair, backbone: nn.Module) -> DiT4Edit:
        """Raises ValueError where prompts or layers do not fit, before an inversion."""
        self.count_layers(backbone)
        make_table(self, pair, torch.device("cpu"))
        return self

    def differs(self) -> bool:
        return not set(self.reweight.values()) <= {1.0}

    def recording(self) -> DiT4Edit:
        return replace(self, record=True)

    def records(self) -> dict[str, Tensor]:
        return dict(self.memory)

    def count_layers(self, backbone: object) -> int:
        """The number of layers that attend to the image. Raises ValueError for a window without any of them."""
        count = sum(site.kind != "cross" for site in getattr(backbone, "sites", ()))
        windows = {} if self.self_form is None else {"self_layers": self.self_layers}
        windows |= {} if self.blend is None else {"blend.layers": self.blend.layers}
        for name, (start, end) in windows.items():
            if int(start * count) == int(end * count):
                raise ValueError(f"{name}, {start} to {end}, contains none of the model's {count} layers. Widen it.")
        return count

    def at(self, step: Step) -> DiT4Edit | None:
        acts = self.self_form is not None and in_window(step.index, step.count, self.self_steps)
        assert self.self_gate is not None
        self_gate = torch.full_like(self.self_gate, acts)
        if self.table is None:
            return replace(self, self_gate=self_gate, gate=None, maps=False) if acts else None
        gate, exchanged = self.table.gate(step)
        # Maps are written out only where something reads them: the fused kernel does not show them.
        recording = self.record or self.blend is not None
        maps = recording or exchanged or self.table.weighs
        blending = self.blend is not None and step.index + 1 > int(self.blend.start * step.count)
        if not (acts or maps):
            return None
        return replace(self, gate=gate, self_gate=self_gate, maps=maps, blending=blending)

    def around(self, call: Call, attend: Attend) -> Tensor:
        if call.image is None or call.keys is None:
            return attend(call)
        if (
            call.site.kind != "cross"
            and self.self_form is not None
            and in_layers(call.site, self.count, self.self_layers)
        ):
            call = with_source(call, self.self_form, self.self_gate)
        rows, text = call.image, call.keys
        if self.maps and text is not None and rows is not None and text.start > 0 and rows.stop > rows.start:
            inner = call.edit_map
            call = replace(call, edit_map=partial(self.edit_map, call=call, inner=inner))
        return attend(call)

    def edit_map(self, p: Tensor, *, call: Call, inner) -> Tensor:
        """Probabilities (2 B, H, Nq, Nk) -> the same with the target's image-to-text part exchanged."""
        p = p if inner is None else inner(p)
        assert self.table is not None and call.image is not None and call.keys is not None and self.gate is not None
        rows, text = call.image, call.keys.start
        part = p[:, :, rows, :text]
        source, target = part.unflatten(0, (-1, 2)).unbind(1)
        changed = exchange(source, target, self.table.map.to(p), self.table.weight.to(p), self.gate.to(p))
        # Columns of R need not sum to 1, and in joint attention the text's share of a row is the target's own.
        changed = changed * (target.sum(-1, keepdim=True) / changed.sum(-1, keepdim=True).clamp(min=1e-12))
        changed = changed * self.table.factor.to(p)[:, None, None]
        part = torch.stack([source, changed], 1).flatten(0, 1)
        self.keep(part, call)
        middle = torch.cat([part, p[:, :, rows, text:]], -1)
        return torch.cat([p[:, :, : rows.start], middle, p[:, :, rows.stop :]], 2)

    def keep(self, part: Tensor, call: Call) -> None:
        """Add a layer's maps (2 B, H, N, L) to the mean over heads, layers and steps in `memory`."""
        layers = (0.25, 0.75) if self.blend is None else self.blend.layers
        if not (self.record or self.blend is not None) or not in_layers(call.site, self.count, layers):
            return
        mean = part.mean(1)
        mean = mean if call.site.kind == "cross" or call.merged is None else call.merged.unmerge(mean)
        self.memory["maps"] = self.memory["maps"] + mean if "maps" in self.memory else mean

    def region(self) -> Tensor | None:
        if self.blend is None or not self.blending or self.table is None or "maps" not in self.memory:
            return None
        maps = self.memory["maps"].unflatten(0, (-1, 2))  # (B, 2, N, L)
        words = torch.einsum("bknl,bkl->bkn", maps, self.table.edited.to(maps))
        mask = blend_mask(words, self.grid, threshold=self.blend.threshold).flatten(1)
        return 1 - mask if self.blend.keep else mask

    def negative(self) -> DiT4Edit | None:
        """Without words only the image's keys and values are exchanged, as in prompt-to-prompt."""
        return None if self.self_form is None else replace(self, conditional=False, blend=None, record=False)

    def describe(self) -> dict:
        blend = None
        if self.blend is not None:
            blend = {"words": self.blend.words and list(self.blend.words), "keep": list(self.blend.keep)}
            blend |= {"threshold": self.blend.threshold, "start": self.blend.start, "layers": list(self.blend.layers)}
        return {
            "method": "DiT4Edit",
            "cross": self.cross,
            "cross_until": self.cross_until,
            "word_until": dict(self.word_until),
            "reweight": dict(self.reweight),
            "self_form": self.self_form,
            "self_steps": list(self.self_steps),
            "self_layers": list(self.self_layers),
            "blend": blend,
        }


def attention_recorder() -> DiT4Edit:
    """A control that changes nothing and records the attention to the words."""
    return DiT4Edit(cross=None, self_form=None, record=True)


def in_window(step: int, steps: int, window: Window) -> bool:
    """int(start N) <= i < int(end N), prompt-to-prompt's rule for self-attention."""
    return int(window[0] * steps) <= step < int(window[1] * steps)


def in_layers(site: Site, count: int, window: Window) -> bool:
    """The same over the layers of a backbone; `count` of them attend to the image."""
    return int(window[0] * count) <= site.index < int(window[1] * count)


def with_source(call: Call, form: str, gate: Tensor | None) -> Call:
    """Targets attend with the source's keys and values ("kv") or its queries and keys ("map"), of the image alone."""
    assert call.keys is not None and call.image is not None

    def from_source(x: Tensor, part: slice) -> Tensor:
        inside = x[:, :, part]
        source, target = inside.unflatten(0, (-1, 2)).unbind(1)
        chosen = source if gate is None else torch.where(gate.to(x.device), source, target)
        inside = torch.stack([source, chosen], 1).flatten(0, 1)
        if part.start == 0 and part.stop == x.shape[2]:
            return inside
        return torch.cat([x[:, :, : part.start], inside, x[:, :, part.stop :]], 2)

    k = from_source(call.k, call.keys)
    if form == "kv":
        return replace(call, k=k, v=from_source(call.v, call.keys))
    return replace(call, k=k, q=from_source(call.q, call.image))


# Words


def make_table(edit: DiT4Edit, pair: PromptPair, device: torch.device) -> Table:
    """The tables of every pair of prompts. Raises ValueError where the prompts do not fit the kind of edit."""
    rows = [one_table(edit, s, t) for s, t in zip(pair.source, pair.target, strict=True)]
    maps, weights, factors, until, edited = zip(*rows, strict=True)
    share = torch.stack(until)
    windows = {float(value): (share == value).float().to(device) for value in share.unique()}
    given = (torch.stack(part).to(device) for part in (maps, weights, factors))
    weighs = any(bool((factor != 1).any()) for factor in factors)
    return Table(*given, until=windows, edited=torch.stack(edited).to(device), weighs=weighs)


def one_table(edit: DiT4Edit, source: Words, target: Words):
    """R, weights, factors, shares of the steps (L,) and edited places of one pair."""
    check_in_reach(source, target)
    length = target.length
    kind = edit.cross
    if kind == "auto":
        kind = "replace" if len(source.words) == len(target.words) else "refine"
    table, weight = torch.eye(length), torch.ones(length)
    if kind == "replace":
        table = replacement_table(source, target, tail="aligned")
    elif kind == "refine":
        if not {w.lower() for w in source.words} & {w.lower() for w in target.words}:
            raise ValueError(
                f"{source.prompt!r} and {target.prompt!r} have no word in common, so the changed words are unknown. "
                "Describe what stays the same in both ('a cat on grass', 'a dog on grass'), use equally many words, "
                "or turn the exchange off with cross=None (condit edit --type none)."
            )
        table, weight = refinement_table(source, target)
    # Padding of the two prompts differs: the target keeps its own.
    weight[len(target.ids) :] = 0
    factor = torch.ones(length)
    for word, value in edit.reweight.items():
        factor[list(target.places(word))] = value
    until = torch.full((length,), edit.cross_until if edit.cross else 0.0, dtype=torch.float64)
    for word, share in edit.word_until.items():
        until[list(target.places(word))] = share
    return table, weight, factor, until, edited_places(edit.blend, source, target)


def changed_words(source: Words, target: Words) -> tuple[list[int], list[int]]:
    """Numbers of the words that only the source has, and only the target has, in the longest common order."""
    from difflib import SequenceMatcher

    old, new = ([w.lower() for w in x.words] for x in (source, target))
    gone, come = [], []
    for tag, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag != "equal":
            gone += range(a, b)
            come += range(c, d)
    return gone, come


def check_in_reach(source: Words, target: Words) -> None:
    """Raises ValueError where the encoder reads none of the words that differ, so that both prompts are equal to it."""
    sides = zip((source, target), changed_words(source, target), strict=True)
    changed = [(words.words[i], words.tokens[i]) for words, numbers in sides for i in numbers]
    if changed and not any(tokens for _, tokens in changed):
        raise ValueError(
            f"{changed[0][0]!r} and the other words that differ come after the {target.length} tokens that the "
            "encoder reads, so both prompts are the same to the model. Shorten them."
        )


def edited_places(blend: Blend | None, source: Words, target: Words) -> Tensor:
    """(2, L): the tokens of the words that bound the edit, in source and target."""
    places = torch.zeros(2, target.length)
    named: Sequence[str] | None = None if blend is None else (blend.keep or blend.words)
    if named is None:
        for row, words, numbers in zip((0, 1), (source, target), changed_words(source, target), strict=True):
            places[row, [t for n in numbers for t in words.tokens[n]]] = 1
        return places
    for word in named:
        count = 0
        for row, words in ((0, source), (1, target)):
            try:
                places[row, list(words.places(word))] = 1
                count += 1
            except ValueError:
                continue
        if not count:
            raise ValueError(f"The blend's word {word!r} is in neither {source.prompt!r} nor {target.prompt!r}.")
    return places


# By edit type. docs/papers/dit4edit.md has the source of each value and its results on icons.
PRESETS: dict[str, DiT4Edit] = {
    "swap": DiT4Edit(blend=Blend()),
    "attribute": DiT4Edit(cross_until=0.6, self_steps=(0.0, 0.8)),
    "style": DiT4Edit(cross_until=0.4, self_steps=(0.0, 0.4)),
    "background": DiT4Edit(cross_until=0.6, self_steps=(0.0, 0.8)),
    "shape": DiT4Edit(cross_until=0.4, self_form="kv", self_steps=(0.08, 1.0), self_layers=(0.5, 1.0)),
    "add": DiT4Edit(cross="refine", cross_until=0.6, self_steps=(0.0, 0.4), blend=Blend()),
    "remove": DiT4Edit(cross="refine", cross_until=0.6, blend=Blend()),
}
