"""One generation as a value: `condit generate` runs it, prints it as a command, stores it in a PNG and replays it."""

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

import condit
from condit.cli.adapters import Adapters
from condit.cli.reference import LORA, Reference
from condit.data.hub import HubName

if TYPE_CHECKING:
    from condit.drawing.model import Model
    from condit.drawing.pipeline import Pipeline

MAX_PROMPT = 2000  # characters; no text encoder here reads more
MAX_COUNT = 64
MAX_REFERENCES = 64
FORMAT = 2  # of recipes


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
    guidance_rescale: float | None = None
    clip_skip: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; describe the image, e.g. 'a red apple'")
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative or "")):
            if any("\ud800" <= sign <= "\udfff" for sign in text):
                raise ValueError(f"the {name} is not text in UTF-8: {text!r}")
            if len(text) > MAX_PROMPT:
                raise ValueError(f"the {name} has {len(text)} characters; at most {MAX_PROMPT} are read. Shorten it")
        if len(self.references) > MAX_REFERENCES:
            raise ValueError(f"{len(self.references)} references; expected at most {MAX_REFERENCES}")
        if self.image is None and (self.mask is not None or self.change is not None):
            raise ValueError("--mask and --change are for --image, the image to start from; add it")
        if self.change is not None and not 0 < self.change <= 1:
            raise ValueError(f"--change is {self.change:g}; expected above 0, up to 1")
        numbers = {"--guidance": self.guidance, "--image-guidance": self.image_guidance}
        numbers |= {f"the strength of {reference.path}": reference.strength for reference in self.references}
        for name, value in numbers.items():
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; expected a finite number")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed is {self.seed}; expected 0 to {2**62 - 1}")
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

        from condit.training.fields import first_error

        recipe = migrated(recipe)
        index = recipe.get("index")
        try:
            request = TypeAdapter(cls).validate_python(recipe["request"])
        except (KeyError, ValidationError) as error:
            text = f"it has no {error}" if isinstance(error, KeyError) else first_error(error)
            raise ValueError(f"the recipe was not written by condit generate: {text}") from error
        if not isinstance(index, int) or not 0 <= index < request.count:
            raise ValueError(f"the recipe has index {index!r}; expected one below {request.count}")
        return request, index

    def command(self, output: str | Path) -> str:
        """The command that reproduces it, quoted for a shell."""
        words = ["condit", "generate", self.prompt]
        words += ["--model", self.model] if self.model != "tiny" else []
        for reference in self.references:
            words += reference.words()
        for name in ("negative", "seed", *(name for name in ARGUMENTS if name != "negative")):
            value = getattr(self, name)
            if value is not None:
                option = f"--{name.replace('_', '-')}"
                words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
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
            **{f"Control {number}": reference.summary() for number, reference in enumerate(self.references)},
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
    """A loaded model, and the adapters that its requests have used. options: of `condit.load`."""

    def __init__(self, model: str = "tiny", device: str | None = None, **options: Any) -> None:
        self.model = model
        pipe = condit.load(model, device=device or default_device(model), **options)
        if not isinstance(pipe, condit.Pipeline) or pipe.model.reads == "nothing":
            raise ValueError(
                f"{model!r} is a {type(pipe).__name__}, which takes no prompt. Use it from Python: "
                f"condit.load({model!r})."
            )
        self.pipe: Pipeline = pipe
        self.adapters = Adapters(model, pipe)

    def generate(self, request: Request, *, progress: bool = False) -> Generated:
        """Generates the images of a request. progress: shows its steps. Raises ValueError for settings that the model
        does not support."""
        if request.model != self.model:
            raise ValueError(f"this studio has loaded {self.model!r}; the request is for {request.model!r}")
        settings = arguments(request, self.pipe.model)
        controls = self.adapters.controls(request.references)
        request = self.pinned(request)
        how = {"num_images_per_prompt": request.count, "seed": request.seed, "progress": progress}
        result = self.pipe(request.prompt, controls=controls, **how, **settings)
        shared = {"format": FORMAT, "condit": condit.__version__, "request": asdict(request), "run": result.recipe}
        return Generated(
            images=result.images,
            recipes=[{**shared, "index": index} for index in range(request.count)],
            parameters=[request.parameters(i, image.size, result.recipe) for i, image in enumerate(result.images)],
        )

    def pinned(self, request: Request) -> Request:
        """The request with the commits of what was loaded from a hub, so that it can be repeated exactly."""
        names = {key[0]: adapter.name for key, adapter in self.adapters.loaded.items() if HubName.of(key[0])}
        references = tuple(
            replace(r, use=names.get(r.use, r.use), path=names.get(r.path, r.path)) for r in request.references
        )
        model = self.pipe.name if HubName.of(self.model) else request.model
        return replace(request, model=model, references=references)


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
    "guidance_rescale": "guidance_rescale",
    "clip_skip": "clip_skip",
}
PROMPTS_ONLY = ("negative", "image_guidance")


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


# Format -> what makes a recipe of it one of the next format.
MIGRATIONS: dict[int, Callable[[dict[str, object]], dict[str, object]]] = {
    1: lambda recipe: recipe,  # 2 adds settings of references, guidance_rescale and clip_skip, which have defaults
}


def migrated(recipe: Mapping[str, object]) -> dict[str, object]:
    """A recipe of any earlier format as one of today's. Raises ValueError for a later one."""
    current, written = dict(recipe), recipe.get("format", 1)
    if not isinstance(written, int) or not 1 <= written <= FORMAT:
        raise ValueError(f"the recipe has format {written!r}; this condit reads 1 to {FORMAT}. Update condit")
    for number in range(written, FORMAT):
        current = {**MIGRATIONS[number](current), "format": number + 1}
    return current


def locate(request: Request, folder: Path) -> Request:
    """The request with the paths of existing references, relative to the current folder or else to `folder`."""

    def existing(path: str) -> str:
        if path.startswith("data:image/"):  # in the recipe itself
            return path
        candidates = [Path(path), folder / path, folder / Path(path).name]
        file = next((candidate for candidate in candidates if candidate.exists()), None)
        if file is None:
            raise FileNotFoundError(f"the reference {path} of this image is missing; searched . and {folder}")
        return str(file)

    def optional(path: str | None) -> str | None:
        return None if path is None else existing(path)

    def placed(r: Reference) -> Reference:
        on_hub = r.use == LORA and not Path(r.path).exists() and HubName.of(r.path) is not None
        return replace(r, path=r.path if on_hub else existing(r.path), mask=optional(r.mask))

    references = tuple(placed(reference) for reference in request.references)
    return replace(request, references=references, image=optional(request.image), mask=optional(request.mask))


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
