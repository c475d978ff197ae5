"""A reference on the command line: REF[:STRENGTH][,SETTING=VALUE...], read and written."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from condit.cli.uses import OPTIONS, option_of

LORA = "lora"  # the use of a style LoRA, whose path is not an image


@dataclass(frozen=True)
class Reference:
    """An image for an adapter, or the file of a style LoRA.

    use: one of `uses.USES`, an adapter's name, FILE.py:NAME, or "lora". ready: a ready-made edge map. when: the part of
    the schedule in which it acts; where: patterns of layers; mask: an image, white where it acts. role: the set of
    DEADiff's tokens; preset, subtract: InstantStyle's blocks, and words for the content to subtract; task, cached:
    OminiControl's.
    """

    use: str
    path: str
    strength: float = 1.0
    ready: bool = False
    when: tuple[float, float] | None = None
    where: tuple[str, ...] = ()
    mask: str | None = None
    role: Literal["style", "content"] | None = None
    preset: str | None = None
    subtract: tuple[str, ...] = ()
    task: str | None = None
    cached: Literal["first-step", "independent"] | None = None

    def settings(self) -> dict[str, Any]:
        """The settings that are given, by their names on the command line."""
        values = {name: vars(self)[setting.field] for name, setting in SETTINGS.items()}
        return {name: value for name, value in values.items() if value not in (None, ())}

    def summary(self) -> str:
        """For A1111's `parameters`: quoted, as ControlNet's there, because it has commas and colons."""
        parts = [f"Module: {self.use}", f"Image: {Path(self.path).name}", f"Weight: {self.strength:g}"]
        parts += [f"{name}: {SETTINGS[name].write(value)}" for name, value in self.settings().items()]
        return json.dumps(", ".join(parts), ensure_ascii=False)

    def words(self) -> list[str]:
        """The option that makes it, and its value."""
        value = f"{self.path}:{self.strength:g}"
        value += "".join(f",{name}={SETTINGS[name].write(v)}" for name, v in self.settings().items())
        option = LORA if self.use == LORA else option_of(self.use, self.ready)
        return [f"--{option}", value] if option else ["--control", f"{self.use}={value}"]


def _interval(text: str) -> tuple[float, float]:
    begin, _, end = text.partition("-")
    try:
        value = float(begin), float(end)
    except ValueError:
        value = 1.0, 0.0
    if not 0 <= value[0] < value[1] <= 1:
        raise ValueError(f"when takes START-END with 0 <= START < END <= 1, as in when=0-0.7; found {text!r}")
    return value


def _one_of(*known: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(f"expected {' or '.join(known)}; found {text!r}")
        return text

    return read


class Setting(NamedTuple):
    """A setting of a reference: its field, and how its value is read and written."""

    field: str
    read: Callable[[str], Any] = str
    write: Callable[[Any], str] = str


def _many(text: str) -> tuple[str, ...]:
    return tuple(text.split("+"))


SETTINGS = {
    "when": Setting("when", _interval, lambda v: f"{v[0]:g}-{v[1]:g}"),
    "where": Setting("where", _many, "+".join),
    "mask": Setting("mask"),
    "as": Setting("role", _one_of("style", "content")),
    "preset": Setting("preset"),
    "subtract": Setting("subtract", _many, "+".join),
    "task": Setting("task"),
    "cached": Setting("cached", _one_of("first-step", "independent")),
}
_COMMA = re.compile(rf",(?=(?:{'|'.join(SETTINGS)})=)")


def parse_reference(value: str, strength: float) -> tuple[str, float]:
    """'ref.png:0.6' -> path and strength, unless a file has this name."""
    path, colon, tail = value.rpartition(":")
    if colon and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", tail) and not Path(value).exists():
        return path, float(tail)
    return value, strength


def read_reference(use: str, value: str, strength: float = 1.0, *, ready: bool = False) -> Reference:
    """'ref.png:0.6,when=0-0.7' -> a reference. Raises ValueError for a setting's value."""
    first, *rest = [value] if Path(value).exists() else _COMMA.split(value)
    settings = {}
    for part in rest:
        name, _, text = part.partition("=")
        try:
            settings[SETTINGS[name].field] = SETTINGS[name].read(text)
        except ValueError as error:
            raise ValueError(f"{value}: {name}: {error}") from None
    return Reference(use, *parse_reference(first, strength), ready=ready, **settings)


def read_references(options: Mapping[str, Sequence[str] | None], strength: float = 1.0) -> tuple[Reference, ...]:
    """References by the names of their options, with underscores. Raises ValueError for a value."""
    references = []
    for option, values in options.items():
        row = OPTIONS.get(option.replace("_", "-"))
        for value in values or ():
            if row is not None:
                references.append(read_reference(row.use, value, strength, ready=row.ready))
            elif option == LORA:
                references.append(read_reference(LORA, value, strength))
            else:
                adapter, equals, reference = value.partition("=")
                if not equals or not adapter or not reference:
                    raise ValueError(f"--control takes ADAPTER=REF[:S], as in tiny/style=ref.png; found {value!r}")
                references.append(read_reference(adapter, reference, strength))
    return tuple(references)


def images_of(references: Sequence[Reference]) -> list[str]:
    """The files of images among references: the references themselves and their masks."""
    files = [reference.path for reference in references if reference.use != LORA]
    return files + [reference.mask for reference in references if reference.mask]
