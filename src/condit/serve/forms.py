"""What requests contain: the fields of OpenAI's images API and condit's own, read from JSON or multipart."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest

from condit.serve.limits import Limits, Refusal, invalid

Finite = Annotated[float, Field(allow_inf_nan=False)]
# An image: bytes of a multipart file, base64, a data: URI, or a number, which is an index into `references`.
Picture = bytes | str | int
PICTURE: JsonDict = {"description": "base64, a data:image/...;base64 URI, or an index into references"}


class Strict(BaseModel):
    """Unknown fields are errors, so that a misspelt one is noticed."""

    model_config = ConfigDict(extra="forbid")


class ControlForm(Strict):
    """One reference for one adapter. when: [start, end] of the schedule; where: patterns of layers; mask: white where
    it acts."""

    adapter: str = Field(max_length=100, examples=["style"])
    reference: Picture = Field(json_schema_extra=PICTURE)
    strength: Finite = Field(default=1.0, ge=-10, le=10)
    when: tuple[float, float] | None = None
    where: list[str] = Field(default_factory=list, max_length=16)
    mask: Picture | None = Field(default=None, json_schema_extra=PICTURE)


class Sweep(Strict):
    """Images for each of several values of the first control's strength or adapter, or of the seed."""

    over: Literal["strength", "seed", "adapter"]
    values: list[Finite | str] = Field(min_length=1, max_length=16)


class CommonForm(Strict):
    """The fields of generations and edits. `quality` to `user` are accepted as OpenAI's clients send them, and have no
    effect."""

    model: str | None = Field(default=None, max_length=200, examples=["tiny"])
    prompt: str = Field(min_length=1, max_length=32_000, examples=["a red apple"])
    n: int = Field(default=1, ge=1, le=64)
    size: str = Field(default="auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$", examples=["auto", "128x128"])
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=8)
    progress: bool = False
    negative_prompt: str | None = Field(default=None, max_length=32_000)
    num_inference_steps: int | None = Field(default=None, ge=1, le=100_000)
    guidance_scale: Finite | None = Field(default=None, ge=0, le=100)
    image_guidance_scale: Finite | None = Field(default=None, ge=0, le=100)
    sampler: str | None = Field(default=None, max_length=40)
    eta: Finite | None = Field(default=None, ge=0, le=1)
    controls: list[ControlForm] = Field(default_factory=list, max_length=64)
    references: list[Picture] = Field(default_factory=list, max_length=64)
    sweep: Sweep | None = None
    quality: str | None = None
    style: str | None = None
    background: str | None = None
    moderation: str | None = None
    output_compression: int | None = None
    user: str | None = None


class GenerationForm(CommonForm):
    """POST /v1/images/generations."""


class EditForm(CommonForm):
    """POST /v1/images/edits. The first image is changed; further ones are references. mask: transparent where it may
    change, as OpenAI has it; a mask without transparency is white there. source_prompt: words for the image; it is then
    inverted and edited by DiT4Edit, with maps of the words. edit_type: a preset of DiT4Edit."""

    image: list[Picture] | Picture = Field(json_schema_extra=PICTURE)
    mask: Picture | None = Field(default=None, json_schema_extra=PICTURE)
    change: Finite | None = Field(default=None, gt=0, le=1)
    source_prompt: str | None = Field(default=None, max_length=32_000)
    edit_type: str = Field(default="swap", max_length=20)
    input_fidelity: str | None = None


class ReplayForm(Strict):
    """POST /v1/replay. references: files, in order, for images of the recipe that the PNG does not contain."""

    image: Picture = Field(json_schema_extra=PICTURE)
    references: list[Picture] = Field(default_factory=list, max_length=64)


class AnnotateForm(Strict):
    """POST /v1/annotate. size: at which the image is annotated."""

    image: Picture = Field(json_schema_extra=PICTURE)
    kind: Literal["edges", "lines", "soft_edges", "canny", "gray", "blur"] = "lines"
    size: str = Field(default="auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")


T = TypeVar("T")
F = TypeVar("F", bound=Strict)


async def read_form(request: HTTPRequest, form: type[F], limits: Limits) -> F:
    """The form of a request. Raises Refusal with the name of the first wrong field."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        values = await multipart(request, limits)
    else:
        try:
            values = json.loads(await request.body(), parse_constant=refuse_constant)
        except (ValueError, RecursionError):
            raise invalid("The body is not valid JSON.", code="invalid_json") from None
        if not isinstance(values, dict):
            raise invalid("The body must be a JSON object.", code="invalid_json")
    return checked(form, values)


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def checked(form: type[F], values: Mapping[str, object]) -> F:
    """The form of these values. Raises Refusal for the first wrong one."""
    try:
        return form.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"] if part not in ("int", "str", "bytes"))[:100]
        code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
        raise invalid(f"{name}: {first['msg']}.", name, code.get(first["type"], "invalid_value")) from None


async def multipart(request: HTTPRequest, limits: Limits) -> dict[str, object]:
    """The fields of a multipart body. A name that ends in [] is a list; `controls` and `sweep` are JSON."""
    values: dict[str, object] = {}
    try:
        async with request.form(
            max_files=2 * limits.references + 4, max_fields=200, max_part_size=limits.image
        ) as form:
            for name, value in form.multi_items():
                add(values, name, value if isinstance(value, str) else await read_file(value, limits, name))
    except (HTTPException, ValueError, KeyError) as error:  # what a malformed body raises in the parser
        reason = getattr(error, "detail", "it is malformed")
        raise invalid(f"The multipart body cannot be read: {reason}.", code="invalid_multipart") from None
    return by_adapter(values)


def add(values: dict[str, object], name: str, item: str | bytes) -> None:
    """Adds a field of a multipart body to the values."""
    read: object = item
    if name in ("controls", "sweep") and isinstance(item, str):
        try:
            read = json.loads(item, parse_constant=refuse_constant)
        except (ValueError, RecursionError):
            raise invalid(f"{name} is not valid JSON.", name) from None
    own = name.removesuffix("[]")
    values[own] = [*listed(values.get(own)), read] if own != name or (own == "image" and own in values) else read


def listed(value: object) -> list[object]:
    """A value as a list; none for None."""
    return [] if value is None else value if isinstance(value, list) else [value]


async def read_file(file: UploadFile, limits: Limits, name: str) -> bytes:
    """An uploaded file. Raises Refusal for one over the limit."""
    content = await file.read(limits.image + 1)
    if len(content) > limits.image:
        raise Refusal(413, "image_too_large", f"{name} is larger than {limits.image / 1e6:g} MB.", param=name)
    return content


def by_adapter(values: dict[str, object]) -> dict[str, object]:
    """Controls from the lists adapter[], references[], strength[] and when[] of a form, one entry each."""
    if "adapter" not in values:
        return values
    adapters, strengths, times = (listed(values.pop(name, None)) for name in ("adapter", "strength", "when"))
    controls = listed(values.get("controls"))
    for index, adapter in enumerate(adapters):
        control: dict[str, object] = {"adapter": adapter, "reference": index}
        if index < len(strengths):
            control["strength"] = strengths[index]
        if index < len(times) and times[index]:
            control["when"] = str(times[index]).split("-")
        controls.append(control)
    return {**values, "controls": controls}


def size_of(text: str, limits: Limits) -> tuple[int, int] | None:
    """Height and width of "WxH"; None for "auto"."""
    if text == "auto":
        return None
    width, height = (int(part) for part in text.split("x"))
    if max(width, height) > limits.side:
        raise invalid(f"size is {text}; sides are at most {limits.side}.", "size")
    return height, width


def check_limits(form: CommonForm, limits: Limits) -> None:
    """Raises Refusal for a form that asks for more than the limits, before any image is decoded."""
    for name, found, most in (
        ("prompt", len(form.prompt), limits.prompt),
        ("negative_prompt", len(form.negative_prompt or ""), limits.prompt),
        ("num_inference_steps", form.num_inference_steps or 1, limits.steps),
        ("n", form.n * (1 if form.sweep is None else len(form.sweep.values)), min(limits.n, limits.waiting)),
        ("references", max(len(form.references), len(form.controls)), limits.references),
    ):
        if found > most:
            raise invalid(f"{name} is {found}; the limit is {most}.", name)
    if isinstance(form, EditForm) and form.image == []:
        raise invalid("image is empty; send one image or more.", "image")
    for control in form.controls:
        if control.when is not None and not (0 <= control.when[0] < control.when[1] <= 1):
            raise invalid("when must be [start, end] with 0 <= start < end <= 1.", "controls.when")
        if any(len(pattern) > 200 for pattern in control.where):
            raise invalid("A pattern of where has at most 200 characters.", "controls.where")
    if form.sweep is not None and form.sweep.over != "seed" and not form.controls:
        raise invalid(f"A sweep over {form.sweep.over} needs a control.", "sweep")


def swept(form: CommonForm) -> Iterator[CommonForm]:
    """The form for each value of its sweep; the form itself without one."""
    if form.sweep is None:
        yield form
        return
    for value in form.sweep.values:
        if form.sweep.over == "seed":
            if not isinstance(value, float | int) or value != math.floor(value) or not 0 <= value < 2**31:
                raise invalid(f"seed {value!r} is no whole number below 2^31.", "sweep.values")
            yield form.model_copy(update={"seed": int(value), "sweep": None})
            continue
        if (form.sweep.over == "adapter") != isinstance(value, str):
            raise invalid(f"{value!r} is no {form.sweep.over}.", "sweep.values")
        first = form.controls[0].model_copy(update={form.sweep.over: value})
        if not isinstance(value, str) and not -10 <= value <= 10:
            raise invalid("strength must be -10 to 10.", "sweep.values")
        yield form.model_copy(update={"controls": [first, *form.controls[1:]], "sweep": None})


def body_of(form: type[Strict]) -> dict[str, object]:
    """The request body of a route for its OpenAPI description; multipart has the same fields."""
    schema = form.model_json_schema()
    parts = schema.pop("$defs", {})

    def inlined(value: object) -> object:
        if isinstance(value, list):
            return [inlined(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return inlined(parts[value["$ref"].rpartition("/")[2]])
        return {name: inlined(item) for name, item in value.items()}

    content = {kind: {"schema": inlined(schema)} for kind in ("application/json", "multipart/form-data")}
    return {"requestBody": {"required": True, "content": content}}


async def on_thread(work: Callable[[], T], places: asyncio.Semaphore | None = None) -> T:
    """work() on a thread, when one of `places` is free; its ValueError is the request's fault."""
    try:
        async with places or nullcontext():
            return await asyncio.to_thread(work)
    except (ValueError, FileNotFoundError) as error:
        raise invalid(str(error)) from None
