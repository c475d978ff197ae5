"""The adapters of a loaded model, and the controls that they make of references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import condit
from condit.cli.own import is_own, load_own
from condit.cli.reference import LORA, Reference
from condit.cli.uses import USES, adapter_name, map_readers

if TYPE_CHECKING:
    from condit.controls.control import Control
    from condit.controls.deadiff import DEADiff
    from condit.controls.ip_adapter import IPAdapter
    from condit.controls.omini import OminiControl
    from condit.controls.style_lora import StyleLoRA
    from condit.drawing.pipeline import Pipeline

    Adapter: TypeAlias = DEADiff | IPAdapter | OminiControl | StyleLoRA

# Class of an adapter -> the settings of a reference that it takes, by their names on the command line.
TAKES = {
    "IPAdapter": ("when", "where", "mask", "preset", "subtract"),
    "DEADiff": ("when", "where", "mask", "as"),
    "OminiControl": ("when", "mask", "task", "cached"),
    "StyleLoRA": ("when",),
}
# Names of `--control` that need no weights -> the class, loaded on use. They take `when` and `where`.
UNTRAINED = {"stylealigned": lambda: condit.StyleAligned, "styleid": lambda: condit.StyleID}


class Adapters:
    """Adapters by name, file or folder, each loaded on first use."""

    def __init__(self, model: str, pipe: Pipeline):
        self.model, self.pipe = model, pipe
        self.loaded: dict[tuple[str, str | None], Adapter] = {}

    def adapter(self, reference: Reference) -> Adapter:
        """The adapter of a reference."""
        lora = reference.use == LORA
        key = reference.path if lora else adapter_name(self.model, reference.use), reference.task
        if key not in self.loaded:
            load = condit.StyleLoRA.load if lora else load_adapter
            self.loaded[key] = load(key[0], self.pipe) if key[1] is None else load_omini(key[0], self.pipe, key[1])
        return self.loaded[key]

    def controls(self, references: Sequence[Reference]) -> list[Control]:
        """One control for each reference; references of one IP-Adapter with equal settings share one, and so do style
        and content of one DEADiff."""
        groups: dict[object, list[Reference]] = {}
        for number, reference in enumerate(references):
            key: object = number
            if not is_own(reference.use) and reference.use not in UNTRAINED:
                adapter, settings = self.adapter(reference), reference.settings()
                shared = (reference.use, *(settings.get(name) for name in ("when", "where", "mask")))
                if isinstance(adapter, condit.IPAdapter):
                    key = (*shared, reference.strength, reference.preset, reference.subtract, reference.ready)
                elif isinstance(adapter, condit.DEADiff):
                    key = shared
            groups.setdefault(key, []).append(reference)
        return [self.control(group) for group in groups.values()]

    def control(self, group: Sequence[Reference]) -> Control:
        """The control of references that share one. Raises ValueError for a setting that the adapter does not take."""
        first = group[0]
        if is_own(first.use):
            refuse_settings(first, first.use, ())
            control = load_own(first.use)(first.path, strength=first.strength)
            if not isinstance(control, condit.Control):
                raise ValueError(f"{first.use} made a {type(control).__name__}; expected a condit.Control.")
            return control
        if first.use in UNTRAINED:
            refuse_settings(first, first.use, ("when", "where"))
            make = UNTRAINED[first.use]()
            return make(first.path, first.strength, when=first.when, where=first.where or None)
        adapter = self.adapter(first)
        kind = type(adapter).__name__
        for reference in group:
            refuse_settings(reference, f"{first.use!r}, of {kind},", TAKES[kind])
        if isinstance(adapter, condit.StyleLoRA):
            return adapter.control(first.strength, when=first.when)
        if ready := [reference for reference in group if reference.ready]:
            readers = map_readers()
            if not isinstance(adapter, condit.OminiControl) or adapter.config.annotator not in readers:
                raise ValueError(
                    f"{first.use!r}, of {kind}, takes an image and no ready-made edge map; found "
                    f"{ready[0].path}. Use the image itself (ready=False) or an adapter of edges."
                )
        if isinstance(adapter, condit.OminiControl):
            image = map_readers()[adapter.config.annotator or ""](first.path) if ready else first.path
            how = {"strength": first.strength, "when": first.when, "mask": first.mask, "cached": first.cached}
            return adapter.control(image, annotate=not ready, **how)
        where = first.where or None
        if isinstance(adapter, condit.DEADiff):
            return deadiff_control(adapter, group, where)
        images = [[reference.path for reference in group]]
        if first.preset is None and not first.subtract:
            how = {"strength": first.strength, "when": first.when, "mask": first.mask}
            return adapter.control(images, where=where, **how)
        if where is not None:
            raise ValueError("preset= and subtract= choose the layers themselves: leave where= out.")
        style = condit.InstantStyle(adapter, self.pipe.text_tower() if first.subtract else None)
        how = {"strength": first.strength, "when": first.when, "mask": first.mask}
        return style.control(images, preset=first.preset or "all", content=list(first.subtract) or None, **how)


def deadiff_control(adapter: DEADiff, group: Sequence[Reference], where: tuple[str, ...] | None) -> Control:
    """DEADiff's control from references for style and for content; several of one role are averaged."""
    sets = {role: [r for r in group if (r.role or "style") == role] for role in ("style", "content")}
    images = {role: [[r.path for r in references]] for role, references in sets.items() if references}
    strengths = {role: references[0].strength for role, references in sets.items() if references}
    first = group[0]
    return adapter.control(
        images.get("style"),
        content=images.get("content"),
        strength=strengths.get("style", first.strength),
        content_strength=strengths.get("content"),
        where=where,
        when=first.when,
        mask=first.mask,
    )


def refuse_settings(reference: Reference, name: str, known: Sequence[str]) -> None:
    """Raises ValueError for a setting of a reference that its adapter does not take."""
    unknown = [setting for setting in reference.settings() if setting not in known]
    if unknown:
        known_names = f"; it takes {', '.join(known)}" if known else ""
        raise ValueError(f"{name} takes no {unknown[0]}={known_names}. Leave it out.")


def check_uses(model: str, references: Sequence[Reference]) -> None:
    """Raises ValueError, before a model is loaded, for an option such as --style if the model has no such adapter."""
    from condit.weights.catalog import MODELS

    for reference in references:
        name = adapter_name(model, reference.use)
        if reference.use in USES and name not in MODELS and not Path(name).exists():
            raise ValueError(
                f"--{reference.use} uses an adapter that belongs to the model, and {model} has none. Give the "
                f"adapter's file: --control ip-adapter.safetensors={reference.path}"
            )


def load_omini(name: str, pipe: Pipeline, task: str) -> OminiControl:
    """An OminiControl for a task by name, of a file that does not hold its own."""
    return condit.OminiControl.load(name, pipe, task=task)


def load_adapter(name: str, pipe: Pipeline) -> Adapter:
    """An adapter by catalog name, file, folder or name on a hub. Its tensors determine its class."""
    from condit.weights.catalog import MODELS, adapter_weights, locate_adapter
    from condit.weights.files import names_in
    from condit.weights.guess import what_is

    path, name = locate_adapter(name)
    if name in MODELS:
        kind = {"ip-adapter": "IPAdapter", "deadiff": "DEADiff"}.get(MODELS[name].kind, "OminiControl")
    else:
        kind = what_is(names_in(adapter_weights(path)))
    classes = {"IPAdapter": condit.IPAdapter, "DEADiff": condit.DEADiff}
    return classes.get(kind, condit.OminiControl).load(name, pipe)
