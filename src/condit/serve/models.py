"""The models of a server, loaded at its start, and the requests that they take."""

from __future__ import annotations

import base64
import io
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace

from PIL import Image, PngImagePlugin

import condit
from condit.cli.reference import LORA, Reference
from condit.cli.request import FORMAT, Request, Studio, arguments
from condit.cli.uses import USES, adapter_name
from condit.data.images import load_image
from condit.drawing.batch import Draft
from condit.drawing.callbacks import Tick
from condit.drawing.settings import Settings
from condit.serve.engine import Done, QueuedJob
from condit.serve.forms import CommonForm, EditForm, Picture, size_of
from condit.serve.limits import Limits, Refusal, invalid
from condit.weights.catalog import MODELS

SETTINGS = {field.name for field in fields(Settings)}


class Pictures:
    """The images of one request. A number is an index into its `references`."""

    def __init__(self, references: Sequence[Picture], limits: Limits) -> None:
        self.references, self.limits = references, limits

    def bytes_of(self, picture: Picture, param: str) -> bytes:
        """An image's bytes, not decoded. Raises Refusal for anything that is no image in the request itself."""
        if isinstance(picture, str) and picture.isdecimal() and len(picture) < 4:
            picture = int(picture)
        if isinstance(picture, int):
            if not 0 <= picture < len(self.references):
                raise invalid(f"{param}: there is no reference {picture} among {len(self.references)}.", param)
            picture = self.references[picture]
        if isinstance(picture, int):
            raise invalid(f"{param}: a reference is an image.", param)
        if isinstance(picture, str):
            if picture[:20].startswith("data:"):
                picture = picture.partition(",")[2]
            if len(picture) * 3 // 4 > self.limits.image + 2:
                raise self.too_large(param)
            try:
                picture = base64.b64decode(picture, validate=True)
            except ValueError:
                message = f"{param} must be base64 or a data:image/ URI; paths and URLs are not read."
                raise invalid(message, param, "invalid_image") from None
        if len(picture) > self.limits.image:
            raise self.too_large(param)
        return picture

    def too_large(self, param: str) -> Refusal:
        message = f"{param} is larger than {self.limits.image / 1e6:g} MB."
        return Refusal(413, "image_too_large", message, param=param)

    def image(self, picture: Picture, param: str) -> Image.Image:
        """The image, with its alpha, at most `Limits.kept` on a side. Raises Refusal for a broken or too large one."""
        data, limits = self.bytes_of(picture, param), self.limits
        try:
            image = load_image(data, mode="RGBA", max_pixels=limits.pixels, max_bytes=limits.image)
        except ValueError as error:
            raise invalid(f"{param}: {error}", param, "invalid_image") from None
        if max(image.size) > limits.kept:
            image.thumbnail((limits.kept, limits.kept), Image.Resampling.LANCZOS)
        opaque = image.getchannel("A").getextrema() == (255, 255)
        return image.convert("RGB") if opaque else image

    def embedded(self, picture: Picture, param: str) -> str:
        """The image as a data: URI, which a recipe can contain."""
        return data_uri(self.image(picture, param))


def encoded(image: Image.Image, kind: str = "png", texts: dict[str, str] | None = None) -> bytes:
    """An image as a file in memory; texts: of a PNG."""
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, text in (texts or {}).items():
        info.add_text(name, text)
    image.save(buffer, kind.upper(), **({"pnginfo": info} if kind == "png" else {"quality": 95}))
    return buffer.getvalue()


def data_uri(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(encoded(image)).decode()}"


def painted_mask(image: Image.Image) -> Image.Image:
    """A mask, white where the image may change, of OpenAI's, which is transparent there, or of a white one."""
    if image.mode == "RGBA":
        return image.getchannel("A").point([255] * 128 + [0] * 128)
    return image.convert("L")


class Served:
    """A loaded model with all its adapters."""

    def __init__(self, name: str, limits: Limits, device: str | None = None) -> None:
        self.name, self.limits = name, limits
        self.studio = Studio(name, device)
        self.pipe = self.studio.pipe
        self.adapters = [other for other in MODELS if other.startswith(f"{name}/")]
        for adapter in self.adapters:
            self.studio.adapters.adapter(Reference(adapter, ""))
        self.roles = {use: adapter_name(name, use) for use in USES if adapter_name(name, use) in self.adapters}

    def describe(self) -> dict[str, object]:
        """Its entry of GET /v1/models."""
        pipe, model = self.pipe, self.pipe.model
        own = {
            "size": f"{pipe.size[1]}x{pipe.size[0]}",
            "steps": getattr(pipe.parts, "steps", None),
            "guidance_scale": getattr(pipe.parts, "guidance", None),
            "reads": model.reads,
            "roles": self.roles,
            "adapters": self.adapters,
            "edits": model.inversion is not None,
            "image_to_image": "strength" in model.supports,
        }
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "condit", "condit": own}

    def adapter(self, name: str) -> str:
        """The use of an adapter or role by name. Raises Refusal for one that was not loaded at the start."""
        if name in self.roles or name in self.adapters:
            return name
        known = ", ".join([*self.roles, *self.adapters]) or "none"
        raise invalid(f"{self.name} has no adapter {name!r}; it has {known}.", "controls.adapter", "unknown_adapter")

    def request(self, form: CommonForm, seed: int) -> Request:
        """The call that a form asks for, as a value that its PNGs contain. Settings are checked before any image is
        decoded. Raises Refusal or ValueError."""
        size, uses = size_of(form.size, self.limits), [self.adapter(control.adapter) for control in form.controls]
        plain = self.checked(
            Request(
                form.prompt,
                self.name,
                (),
                form.negative_prompt,
                seed,
                form.n,
                form.num_inference_steps,
                form.guidance_scale,
                form.image_guidance_scale,
                form.sampler,
                form.eta,
                *(size or (None, None)),
                change=form.change if isinstance(form, EditForm) else None,
            )
        )
        pictures = Pictures(form.references, self.limits)
        references = [
            Reference(
                use,
                pictures.embedded(control.reference, f"controls.{i}.reference"),
                control.strength,
                when=control.when,
                where=tuple(control.where),
                mask=None if control.mask is None else self.mask(pictures, control.mask, f"controls.{i}.mask"),
            )
            for i, (use, control) in enumerate(zip(uses, form.controls, strict=True))
        ]
        if not isinstance(form, EditForm):
            return replace(plain, references=tuple(references))
        first, *others = form.image if isinstance(form.image, list) else [form.image]
        role = next((use for use in ("subject", "style") if use in self.roles), None)
        if others and role is None:
            raise invalid(f"{self.name} takes one image: it has no adapter for references.", "image")
        if len(others) + len(references) > self.limits.references:
            raise invalid(f"There are more than {self.limits.references} references.", "image")
        references += [Reference(role or "", pictures.embedded(other, "image")) for other in others]
        image = pictures.embedded(first, "image")
        mask = None if form.mask is None else self.mask(pictures, form.mask, "mask")
        return replace(plain, references=tuple(references), image=image, mask=mask)

    def mask(self, pictures: Pictures, picture: Picture, param: str) -> str:
        return data_uri(painted_mask(pictures.image(picture, param)))

    def checked(self, request: Request) -> Request:
        """The same request, if the model takes its settings. Raises ValueError."""
        self.pipe.settle(self.requested(request), request.prompt, "pil")
        return request

    def requested(self, request: Request) -> Settings:
        """The settings of a request. Raises ValueError for fields that the model does not support."""
        given = arguments(request, self.pipe.model)
        return Settings(copies=request.count, **{name: given[name] for name in given if name in SETTINGS})

    def job(self, request: Request, partials: int, emit: Callable) -> QueuedJob:
        """A job for the engine."""

        def begin() -> Draft:
            return self.pipe.begin(
                self.requested(request),
                request.prompt,
                request.negative,
                controls=self.studio.adapters.controls(request.references),
                image=request.image,
                mask_image=request.mask,
                seed=request.seed,
            )

        size = request.height, request.width
        key = (self.name, request.steps, size, request.sampler, request.eta, request.image is None)
        return QueuedJob(self.pipe, key, request.count, emit, begin=begin, partials=partials)

    def edit_job(self, form: EditForm, request: Request, emit: Callable) -> QueuedJob:
        """A job that inverts the image of a request and edits it. Raises Refusal."""
        from condit.controls.dit4edit import PRESETS
        from condit.drawing.edit_page import edited_words, shade

        if self.pipe.model.inversion is None:
            raise invalid(f"{self.name} does not edit with words; leave source_prompt out.", "source_prompt")
        if form.edit_type not in PRESETS:
            raise invalid(f"edit_type must be one of {', '.join(PRESETS)}.", "edit_type")
        if form.n != 1 or isinstance(form.image, list) and len(form.image) != 1:
            raise invalid("An edit with source_prompt takes one image and makes one.", "n")
        source = (form.source_prompt or "")[: self.limits.prompt]

        def edit(tick: Tick) -> Done:
            controls = [PRESETS[form.edit_type], *self.studio.adapters.controls(request.references)]
            result = self.pipe.edit(
                request.image or "",
                source,
                request.prompt,
                controls=controls,
                mask=request.mask,
                negative_prompt=request.negative,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                maps=True,
                seed=request.seed,
                tick=tick,
                height=request.height,
                width=request.width,
            )
            maps = []
            if result.maps is not None:
                pictures = (result.sources[0], result.images[0])
                for side, words in enumerate(edited_words(result, 0)):
                    for word, tokens in words:
                        weights = result.maps[0, side][:, list(tokens)].sum(-1)
                        picture = data_uri(shade(pictures[side], weights, result.grid))
                        maps.append({"word": word, "side": ("source", "target")[side], "image": picture})
            return Done(result.images, result.recipe, {"maps": maps, "psnr": result.psnr})

        return QueuedJob(self.pipe, (self.name, "edit"), 1, emit, edit=edit)

    def files(self, request: Request, done: Done, kind: str) -> list[bytes]:
        """The images of a request as files; a PNG contains its recipe, as those of `condit generate` do."""
        if kind != "png":
            return [encoded(image.convert("RGB"), kind) for image in done.images]
        recipe = {"format": FORMAT, "condit": condit.__version__, "request": asdict(request), "run": done.recipe}
        files = []
        for index, image in enumerate(done.images):
            texts = {"condit": json.dumps({**recipe, "index": index}, allow_nan=False, sort_keys=True)}
            texts["parameters"] = request.parameters(index, image.size, done.recipe)
            files.append(encoded(image, kind, texts))
        return files

    def replayed(self, request: Request, given: Sequence[Picture]) -> Request:
        """A recipe's request with its images inside. Raises Refusal where it names adapters that were not loaded, or
        files, which must come with the request: `given`, in order."""
        pictures, left = Pictures((), self.limits), list(given)

        def inside(path: str | None) -> str | None:
            if path is None:
                return None
            if not path.startswith("data:image/"):
                if not left:
                    message = "The PNG does not contain its references. Send them in order in references[]."
                    raise invalid(message, "references", "missing_reference")
                return pictures.embedded(left.pop(0), "references")
            return pictures.embedded(path, "image")

        if len(request.references) > self.limits.references or request.count > self.limits.n:
            raise invalid("The recipe asks for more than the server's limits.", "image")
        if (request.steps or 1) > self.limits.steps or max(request.height or 1, request.width or 1) > self.limits.side:
            raise invalid("The recipe asks for more than the server's limits.", "image")
        for reference in request.references:
            if reference.use == LORA or reference.cached is not None or reference.task is not None:
                raise invalid("The recipe loads or changes adapters; the server keeps those it has.", "image")
        references = tuple(
            replace(r, use=self.adapter(r.use), path=inside(r.path) or "", mask=inside(r.mask))
            for r in request.references
        )
        image, mask = inside(request.image), inside(request.mask)
        return self.checked(replace(request, references=references, image=image, mask=mask))


def random_seed() -> int:
    return secrets.randbelow(2**31)
