"""Options of commands in groups: a dataclass is a group, its fields are options, its docstring is their heading in
`--help`. Importing this loads nothing heavy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import typer
from typer.core import TyperCommand

from condit.cli.outputs import Force
from condit.cli.terminal import Seed
from condit.cli.uses import OPTIONS
from condit.jobs.plan import MAX_ERRORS

Texts = list[str] | None


@dataclass(frozen=True)
class ModelOptions:
    """Model"""

    model: Annotated[
        str, typer.Option("--model", "-m", help="A model of `condit models`, a folder, a file, or owner/name on a hub.")
    ] = "tiny"
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps [default: cpu for embedded models].")] = None
    offload: Annotated[
        Literal["encoders", "blocks"] | None, typer.Option(help="Keep these parts on the CPU until they compute.")
    ] = None
    quantize: Annotated[
        Literal["float8", "int8"] | None,
        typer.Option(help="Keep the weights of the network's blocks in one byte each."),
    ] = None


@dataclass(frozen=True)
class ReferenceOptions:
    """References and adapters"""

    style: Annotated[Texts, typer.Option("--style", metavar="REF[:S]", help=OPTIONS["style"].help)] = None
    subject: Annotated[Texts, typer.Option("--subject", metavar="REF[:S]", help=OPTIONS["subject"].help)] = None
    edges: Annotated[Texts, typer.Option("--edges", metavar="IMG[:S]", help=OPTIONS["edges"].help)] = None
    edges_map: Annotated[Texts, typer.Option("--edges-map", metavar="MAP[:S]", help=OPTIONS["edges-map"].help)] = None
    gray: Annotated[Texts, typer.Option("--gray", metavar="IMG[:S]", help=OPTIONS["gray"].help)] = None
    control: Annotated[
        Texts,
        typer.Option(
            "--control",
            metavar="ADAPTER=REF[:S]",
            help="An adapter by name, file or folder; stylealigned, styleid; your own control: FILE.py:NAME.",
        ),
    ] = None
    lora: Annotated[Texts, typer.Option("--lora", metavar="FILE[:S]", help="A style LoRA.")] = None
    strength: Annotated[float, typer.Option(help="Strength of references without their own S.")] = 1.0


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling"""

    negative: Annotated[str | None, typer.Option("--negative", help="The negative prompt.")] = None
    seed: Seed = 0
    count: Annotated[int, typer.Option("--count", "-n", help="Number of images of each prompt.")] = 1
    steps: Annotated[int | None, typer.Option(help="Number of inference steps [default: the model's].")] = None
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the text [default: the model's].")] = None
    image_guidance: Annotated[
        float | None, typer.Option(help="Separate guidance scale of the references [default: none].")
    ] = None
    guidance_rescale: Annotated[
        float | None, typer.Option(help="Rescale the guided prediction, 0 to 1; Stable Diffusion and PixArt.")
    ] = None
    sampler: Annotated[
        str | None,
        typer.Option(help="ddim, dpm++, euler, ... or its name in diffusers or A1111 [default: the model's]."),
    ] = None
    eta: Annotated[float | None, typer.Option(help="Share of fresh noise in each step, 0 to 1.")] = None
    clip_skip: Annotated[int | None, typer.Option(help="Last layers of CLIP to leave out; Stable Diffusion.")] = None
    height: Annotated[int | None, typer.Option(help="Height in pixels [default: the model's].")] = None
    width: Annotated[int | None, typer.Option(help="Width in pixels [default: the model's].")] = None


@dataclass(frozen=True)
class StartOptions:
    """Start from an image"""

    image: Annotated[str | None, typer.Option(help="Image to image: start from this image.")] = None
    mask: Annotated[str | None, typer.Option(help="Inpainting: repaint --image where this mask is white.")] = None
    change: Annotated[float | None, typer.Option(help="How much of --image to change, up to 1 [default: 0.8].")] = None


@dataclass(frozen=True)
class JobOptions:
    """Many images (docs/jobs.md)"""

    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Processes on this machine, or actors of a Ray cluster.")
    ] = "local"
    workers: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Processes [default: 1; Ray: one for each GPU or core].")
    ] = None
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of each process; images depend on them.")] = 1
    max_errors: Annotated[int, typer.Option("--max-errors", min=0, help="Stop after more rows failed.")] = MAX_ERRORS


@dataclass(frozen=True)
class OutputOptions:
    """Output"""

    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A .png, .jpg, .webp or .svg file, or a folder.", show_default=False),
    ] = None
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Images to draw of each prompt, of which the best are kept.")
    ] = None
    best: Annotated[int, typer.Option(min=1, help="Number of candidates to keep, by the embedded CLIP.")] = 1
    force: Force = False
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="Do not store the recipe in the image.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show details and tracebacks.")] = False


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of the dataclasses that it takes."""
    parameters, groups = [], {}
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        group = hints[name]
        if not is_dataclass(group):
            parameters.append(parameter.replace(annotation=group, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[name] = group
        own, keyword = get_type_hints(group, include_extras=True), inspect.Parameter.KEYWORD_ONLY
        for field in fields(group):
            kind, (option, *_) = own[field.name].__origin__, own[field.name].__metadata__
            option = copy(option)  # several groups may share it
            option.rich_help_panel = group.__doc__
            shown = Annotated[kind, option]
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(inspect.Parameter(field.name, keyword, default=default, annotation=shown))

    @wraps(command)
    def run(**values: object) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    return run


class Grouped(TyperCommand):
    """A command whose help lists options by group; rich does so too, but takes longer to import."""

    def format_options(self, ctx, formatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                heading = vars(parameter).get("rich_help_panel") or usual
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)
