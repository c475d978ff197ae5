"""One generation as a value: `condit generate` runs it, prints it as a command, stores it in a PNG and replays it."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

import condit
from condit.cli.own import is_own, load_own
from condit.cli.uses import adapter_name, map_readers, option_of

if TYPE_CHECKING:
    from condit.controls.control import Control
    from condit.controls.deadiff import DEADiff
    from condit.controls.ip_adapter import IPAdapter
    from condit.controls.omini import OminiControl
    from condit.drawing.model import Model
    from condit.drawing.pipeline import Pipeline

MAX_PROMPT = 2000  # characters; no text encoder here reads more
MAX_COUNT = 64


@dataclass(frozen=True)
class Reference:
    """An image for an adapter. use: one of `uses.USES` or an adapter's name. ready: a ready-made edge map."""

    use: str
    path: str
    strength: float = 1.0
    ready: bool = False


@dataclass(frozen=True)
class Request:
    """`count` images of one prompt in one batch; image i has the seed `seed` + i. None: the model's default.

    For a class model (DiT, DiffiT) the prompt is the name or the number of a class.

    image, mask, change: an image to start from, a mask that is white where it is repainted, and how much of it to
    change, in (0, 1].
    """

    prompt: str
    model: str = "tiny"
    references: tuple[Reference, ...] = ()
    negative: str | None = None
    seed: int = 0
    count: int = 1
    steps: int | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    sampler: str | None = None
    eta: float | None = None
    height: int | None = None
    width: int | None = None
    image: str | None = None
    mask: str | None = None
    change: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; describe the image, e.g. 'a red apple'")
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative or "")):
            if len(text) > MAX_PROMPT:
                raise ValueError(f"the {name} has {len(text)} characters; at most {MAX_PROMPT} are read. Shorten it")
        if not 1 <= self.count <= MAX_COUNT:
            raise ValueError(f"count is {self.count}; expected 1 to {MAX_COUNT} images in one batch")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta:g}; expected 0 (no fresh noise) to 1")
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise ValueError(f"steps is {self.steps}; expected 1 to 1000")

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, object]) -> tuple["Request", int]:
        """The request stored in a PNG, and the index of the PNG among its images. Raises ValueError for a recipe of
        something else."""
        from pydantic import TypeAdapter, ValidationError

        index = recipe.get("index")
        try:
            request = TypeAdapter(cls).validate_python(recipe["request"])
        except (KeyError, ValidationError) as error:
            raise ValueError(f"the recipe was not written by condit generate: {error}") from error
        if not isinstance(index, int) or not 0 <= index < request.count:
            raise ValueError(f"the recipe has index {index!r}; expected one below {request.count}")
        return request, index

    def command(self, output: str | Path) -> str:
        """The command that reproduces it, quoted for a shell."""
        words = ["condit", "generate", self.prompt]
        words += ["--model", self.model] if self.model != "tiny" else []
        for reference in self.references:
            value = f"{reference.path}:{reference.strength:g}"
            option = option_of(reference.use, reference.ready)
            words += [f"--{option}", value] if option else ["--control", f"{reference.use}={value}"]
        words += ["--negative", self.negative] if self.negative else []
        words += ["--seed", str(self.seed)]
        words += ["--steps", str(self.steps)] if self.steps is not None else []
        words += ["--guidance", f"{self.guidance:g}"] if self.guidance is not None else []
        words += ["--image-guidance", f"{self.image_guidance:g}"] if self.image_guidance is not None else []
        for name in ("sampler", "eta", "height", "width", "image", "mask", "change"):
            value = getattr(self, name)
            words += (
                [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)] if value is not None else []
            )
        words += ["-n", str(self.count)] if self.count > 1 else []
        return shlex.join([*words, "-o", str(output)])

    def parameters(self, index: int, size: tuple[int, int], facts: Mapping[str, object]) -> str:
        """The text of a PNG's `parameters` in A1111's format."""
        lines = [self.prompt.replace("\n", " ")]
        lines += [f"Negative prompt: {self.negative}"] if self.negative else []
        settings = {
            "Steps": facts.get("num_inference_steps", self.steps),
            "Sampler": facts.get("sampler", "Euler"),
            "CFG scale": facts.get("guidance_scale", self.guidance),
            "Seed": self.seed + index,
            "Size": f"{size[0]}x{size[1]}",
            "Model": self.model,
            "Model hash": facts.get("hash"),
            "Version": f"condit {condit.__version__}",
        }
        return "\n".join(
            [*lines, ", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None)]
        )


@dataclass(frozen=True)
class Generated:
    """The images of a request, with the recipe and the `parameters` text of each."""

    images: Sequence[Image.Image]
    recipes: Sequence[dict[str, object]]
    parameters: Sequence[str]


class Studio:
    """A loaded model, and the adapters that its requests have used."""

    def __init__(self, model: str = "tiny", device: str | None = None) -> None:
        self.model = model
        pipe = condit.load(model, device=device or default_device(model))
        if not isinstance(pipe, condit.Pipeline) or pipe.model.reads == "nothing":
            raise ValueError(
                f"{model!r} is a {type(pipe).__name__}, which takes no prompt. Use it from Python: "
                f"condit.load({model!r})."
            )
        self.pipe: Pipeline = pipe
        self.adapters: dict[str, DEADiff | IPAdapter | OminiControl] = {}

    def generate(self, request: Request) -> Generated:
        """Generates the images of a request. Raises ValueError for settings that the model does not support."""
        if request.model != self.model:
            raise ValueError(f"this studio has loaded {self.model!r}; the request is for {request.model!r}")
        settings = arguments(request, self.pipe.model)
        controls = self.controls(request.references)
        how = {"num_images_per_prompt": request.count, "seed": request.seed}
        result = self.pipe(request.prompt, controls=controls, **how, **settings)
        shared = {"condit": condit.__version__, "request": asdict(request), "run": result.recipe}
        return Generated(
            images=result.images,
            recipes=[{**shared, "index": index} for index in range(request.count)],
            parameters=[request.parameters(i, image.size, result.recipe) for i, image in enumerate(result.images)],
        )

    def controls(self, references: Sequence[Reference]) -> "list[Control]":
        """One control for each reference; references of the same image adapter and strength share one."""
        grouped: dict[object, list[Reference]] = {}
        for number, reference in enumerate(references):
            together = not is_own(reference.use) and isinstance(self.adapter(reference.use), condit.IPAdapter)
            grouped.setdefault((reference.use, reference.strength) if together else number, []).append(reference)
        return [self.control(group) for group in grouped.values()]

    def control(self, group: Sequence[Reference]) -> "Control":
        first = group[0]
        if is_own(first.use):
            control = load_own(first.use)(first.path, strength=first.strength)
            if not isinstance(control, condit.Control):
                raise ValueError(f"{first.use} made a {type(control).__name__}; expected a condit.Control.")
            return control
        adapter = self.adapter(first.use)
        if ready := [reference for reference in group if reference.ready]:
            readers = map_readers()
            if not isinstance(adapter, condit.OminiControl) or adapter.config.annotator not in readers:
                raise ValueError(
                    f"{first.use!r}, of {type(adapter).__name__}, takes an image and no ready-made edge map; found "
                    f"{ready[0].path}. Use the image itself (ready=False) or an adapter of edges."
                )
            read_map = readers[adapter.config.annotator]
            return adapter.control(read_map(ready[0].path), strength=first.strength, annotate=False)
        if isinstance(adapter, condit.IPAdapter):
            return adapter.control([[reference.path for reference in group]], strength=first.strength)
        return adapter.control(first.path, strength=first.strength)

    def adapter(self, use: str) -> "DEADiff | IPAdapter | OminiControl":
        """The adapter of a reference, loaded on first use."""
        name = adapter_name(self.model, use)
        if name not in self.adapters:
            self.adapters[name] = load_adapter(name, self.pipe)
        return self.adapters[name]


# Fields of a request -> arguments of the pipeline. The model decides about fields that are None.
ARGUMENTS = {
    "negative": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "image_guidance": "image_guidance_scale",
    "sampler": "sampler",
    "eta": "eta",
    "height": "height",
    "width": "width",
    "image": "image",
    "mask": "mask_image",
    "change": "strength",
}
PROMPTS_ONLY = ("negative", "image_guidance", "image", "mask", "change")


def arguments(request: Request, model: "Model") -> dict[str, Any]:
    """The arguments of the pipeline's call. Raises ValueError for fields that the model does not support."""
    fields = [name for name in ARGUMENTS if getattr(request, name) is not None]
    if model.reads == "class":
        unsupported = [name for name in PROMPTS_ONLY if name in fields]
        unsupported += ["references"] if request.references else []
        if unsupported:
            raise ValueError(
                f"{request.model!r} generates classes and takes no {', '.join(unsupported)}. Leave it out."
            )
    elif "sampler" in fields and "sampler" not in model.supports:
        raise ValueError(f"{request.model!r} has one sampler only. Leave --sampler out, or use a Stable Diffusion.")
    return {ARGUMENTS[name]: getattr(request, name) for name in fields}


def default_device(model: str) -> str:
    """The CPU for embedded models, so that images are bit-equal everywhere; a GPU, if available, for the others."""
    import torch

    from condit.weights.catalog import MODELS

    return "cuda" if model not in MODELS and torch.cuda.is_available() else "cpu"


def load_adapter(name: str, pipe: "Pipeline") -> "DEADiff | IPAdapter | OminiControl":
    """An adapter by catalog name, file or folder. Its tensors determine its class."""
    from condit.weights.catalog import MODELS, adapter_weights
    from condit.weights.files import read_tensors
    from condit.weights.guess import what_is

    if name in MODELS:
        kind = {"ip-adapter": "IPAdapter", "deadiff": "DEADiff"}.get(MODELS[name].kind, "OminiControl")
    elif Path(name).exists():
        file = Path(name)
        kind = what_is(read_tensors(adapter_weights(file) if file.is_dir() else file))
    else:
        embedded = ", ".join(other for other, entry in MODELS.items() if entry.kind != "model") or "none"
        raise ValueError(f"no adapter {name!r}: neither a file nor one of the embedded adapters ({embedded})")
    classes = {"IPAdapter": condit.IPAdapter, "DEADiff": condit.DEADiff}
    return classes.get(kind, condit.OminiControl).load(name, pipe)


def locate(request: Request, folder: Path) -> Request:
    """The request with the paths of existing references, relative to the current folder or else to `folder`."""

    def existing(path: str) -> str:
        candidates = [Path(path), folder / path, folder / Path(path).name]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"the reference {path} of this image is missing; searched . and {folder}")
        return str(file)

    references = tuple(replace(reference, path=existing(reference.path)) for reference in request.references)
    image, mask = (None if path is None else existing(path) for path in (request.image, request.mask))
    return replace(request, references=references, image=image, mask=mask)


def differences(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What has changed since an image was generated: version, weights, references, settings."""
    lines = []
    if then.get("condit") != now.get("condit"):
        lines.append(f"generated with condit {then.get('condit')}, this is {now.get('condit')}")
    old, new = (dict(_leaves(side.get("run"))) for side in (then, now))
    for name in sorted({*old, *new}):
        if old.get(name) == new.get(name) or name.endswith(".path"):  # a reference may have moved
            continue
        if name.endswith(".sha256"):
            lines.append("a reference differs from the one it was generated with")
        else:
            lines.append(f"{name} was {old.get(name)}, is {new.get(name)}")
    return lines


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{name}.{index}")
    else:
        yield name, value
