"""Reading images safely, and writing them atomically with their recipe."""

import base64
import io
import json
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeAlias, TypeGuard, Union, cast

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from condit.data.files import atomic_write, check_writable, parse_json, read_bounded
from condit.data.messages import text
from condit.data.vector import trace, traced_metadata, tracer

if TYPE_CHECKING:  # importing torch takes seconds; a missing file should raise before that
    from torch import Tensor

ImageSource: TypeAlias = Union[str, Path, bytes, BinaryIO, Image.Image, np.ndarray, "Tensor"]
ImageMode = Literal["RGB", "RGBA"]
ImageFit = Literal["squash", "crop", "pad"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
MAX_BYTES = 128_000_000
WHITE = (255, 255, 255)
_SAVE_AS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".svg": "SVG"}
_ROTATING = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where Pillow looks for a rotation
_RECIPE = "condit recipe: "  # begins the ImageDescription of a JPEG or WebP
_JPEG_EXIF = 65_000  # bytes; the segment's length is a 16-bit number
_URL_SECONDS = 20


def load_image(
    source: ImageSource,
    *,
    mode: ImageMode = "RGB",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    background: tuple[int, int, int] = WHITE,
    allow_url: bool = False,
) -> Image.Image:
    """A new RGB or RGBA image from a path, bytes, an open binary file, a PIL image, a numpy array or a torch tensor.

    Arrays: numpy (H, W) or (H, W, 1|3|4), torch (H, W) or (1|3|4, H, W); uint8 in 0..255, bool, or float in 0..1.
    Files and data:image/ URIs: the first frame of PNG, JPEG, WebP, GIF, BMP, TIFF. EXIF rotation is applied once, alpha
    put on `background`.
    ValueError for an unsupported or unsafe source, FileNotFoundError for a missing file."""
    image: Image.Image
    if isinstance(source, Image.Image):
        name, image = "the image", source
    elif _is_array(source):
        name, image = "the array", _from_array(source)
    else:
        data, name = _read_bytes(source, max_bytes, allow_url)
        image = _open(data, name)
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"{name} has {image.width} x {image.height} pixels; the limit is {max_pixels / 1e6:g} million. "
            "Scale it down first"
        )
    try:
        image.load()
    except Exception as error:  # decoders raise many types on broken data
        raise ValueError(f"{name} is broken or truncated: {error}") from error
    image = _eight_bit(_upright(image), name)
    if mode == "RGBA":
        return image if image.mode == "RGBA" else image.convert("RGBA")
    if image.has_transparency_data:
        return _on_background(image.convert("RGBA"), background)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """A copy, rotated as its EXIF data say, without these data, so that a second call changes nothing. Damaged data
    rotate nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns once for each damaged tag
            upright = ImageOps.exif_transpose(image)
    except Exception:  # the parser raises many types on damaged data
        upright = image.copy()
    upright.info = {key: value for key, value in upright.info.items() if key not in _ROTATING}
    return upright


def _read_bytes(source: object, max_bytes: int, allow_url: bool) -> tuple[bytes, str]:
    """The bytes of a path, a URL or a bytes object, never more than max_bytes, and a name for messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), "the image data"
    elif isinstance(source, str) and source.startswith("data:image/"):
        data, name = _embedded(source, max_bytes), "the embedded image"
    elif isinstance(source, str) and "://" in source[:12]:
        data, name = _fetch(source, max_bytes, allow_url), source
    elif isinstance(source, str | Path):
        name = str(source)
        try:
            data = read_bounded(source, max_bytes)
        except FileNotFoundError:
            raise FileNotFoundError(text("no-image", name=name)) from None
        except IsADirectoryError:
            raise ValueError(f"{name} is a folder; expected an image file") from None
        except OSError as error:
            raise ValueError(f"cannot read {name}: {error.strerror or error}") from error
    elif _is_file(source):
        name = "the image file"
        if source.seekable():
            source.seek(0)  # as Pillow does: a buffer that was just written stands at its end
        data = source.read(max_bytes + 1)
        if not isinstance(data, bytes):
            raise ValueError(f"{name} is open for text; open it with mode 'rb'")
    else:
        raise ValueError(f"an image is a path, bytes, a PIL image or an array; found {type(source).__name__}")
    if len(data) > max_bytes:
        raise ValueError(f"{name} is larger than the limit of {max_bytes / 1e6:g} MB")
    if not data:
        raise ValueError(f"{name} is empty")
    return data, name


def _embedded(uri: str, max_bytes: int) -> bytes:
    """The bytes of data:image/...;base64,..., as recipes of the server hold their references."""
    head, comma, text = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("an embedded image must be data:image/...;base64,...")
    if len(text) * 3 // 4 > max_bytes + 2:
        raise ValueError(f"the embedded image is larger than the limit of {max_bytes / 1e6:g} MB")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"the embedded image is not valid base64: {error}") from None


def _fetch(url: str, max_bytes: int, allow_url: bool) -> bytes:
    if not allow_url:
        raise ValueError(f"{url} is a URL; download it and pass the file")
    if not url.lower().startswith(("http://", "https://")):
        raise ValueError(f"{url}: only http and https are supported")
    try:
        with urllib.request.urlopen(url, timeout=_URL_SECONDS) as answer:
            return answer.read(max_bytes + 1)
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"cannot fetch {url}: {error}") from error


def _open(data: bytes, name: str) -> Image.Image:
    """Read the header only, so that the size is known before anything is decoded."""
    try:
        with warnings.catch_warnings():
            # Between its two limits Pillow only warns; the caller checks our own limit, which is lower. Damaged EXIF
            # data warn once a tag.
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels: {error}") from error
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image of the supported formats: {', '.join(FORMATS)}") from None
    except Exception as error:  # as above: a header can be broken in many ways
        raise ValueError(f"{name} is broken or truncated: {error}") from error


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit and float images to 8 bits, as Pillow's conversion clips them at 255."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        return _from_array(np.asarray(image), name)
    return image


def _is_array(source: object) -> TypeGuard["np.ndarray | Tensor"]:
    # A torch tensor, without importing torch.
    return isinstance(source, np.ndarray) or hasattr(source, "is_floating_point")


def _is_file(source: object) -> TypeGuard[BinaryIO]:
    return hasattr(source, "read") and hasattr(source, "seekable")


def _from_array(source: "np.ndarray | Tensor", name: str = "the array") -> Image.Image:
    if isinstance(source, np.ndarray):
        array = source
    else:
        array = source.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
        if array.ndim == 3:  # torch has channels first
            array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.size == 0:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}; "
            "expected one image, numpy (H, W) or (H, W, 1|3|4), torch (H, W) or (1|3|4, H, W)"
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValueError(
                f"{name} has floats from {array.min():.3g} to {array.max():.3g}; expected 0..1. "
                "Convert an image in -1..1 with condit.data.images.to_images first"
            )
        array = (array.astype(np.float64) * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{name} has dtype {array.dtype}; expected uint8 in 0..255, bool, or float in 0..1")
    return Image.fromarray(np.ascontiguousarray(array))


def _on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(canvas, image).convert("RGB")


def mask_list(source: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """The masks of a call, one or one for each image. A mask has no colours, so an array of three dimensions is n masks
    (n, H, W), except numpy's (H, W, 1|3|4), which is one image. ValueError for a shape that could be both."""
    if not _is_array(source):
        return list(source) if isinstance(source, list | tuple) else [cast("ImageSource", source)]
    if source.ndim == 4 and 1 in (source.shape[1], source.shape[3]):
        return list(source[:, 0] if source.shape[1] == 1 else source[..., 0])
    if source.ndim != 3:
        return [source]
    first, last = source.shape[0] in (1, 3, 4), source.shape[-1] in (1, 3, 4)
    if last and (first or not isinstance(source, np.ndarray)):
        raise ValueError(
            f"a mask of shape {tuple(source.shape)} could be {source.shape[0]} masks or one image with channels. Pass "
            "masks as (H, W), as a list of them, or as (n, H, W)."
        )
    return [source] if last else list(source)


def mask_images(source: ImageSource | Sequence[ImageSource]) -> list[Image.Image]:
    """`mask_list` as images of luma."""
    return [load_image(mask).convert("L") for mask in mask_list(source)]


def load_masks(source: ImageSource | Sequence[ImageSource]) -> "Tensor":
    """One mask, or one for each image (`mask_list`), at its own size: (n, H, W) in [0, 1], white = 1. ValueError for
    masks of different sizes."""
    import torch

    pictures = mask_images(source)
    if len({p.size for p in pictures}) != 1:
        raise ValueError(f"masks must have the same size; found {sorted({p.size for p in pictures})}.")
    return torch.stack([torch.from_numpy(np.array(p, dtype=np.float32)) / 255 for p in pictures])


def save_image(
    image: Image.Image, path: str | Path, *, recipe: Mapping[str, object] | None = None, parameters: str | None = None
) -> Path:
    """Write PNG, JPEG, WebP or SVG, by the path's suffix, atomically, with `recipe` as JSON and `parameters` as the
    text that A1111's tools read: in a PNG's text chunks, else in the EXIF data (ImageDescription, UserComment); an SVG
    is traced (`data/vector.py`) and keeps the recipe alone. Returns the path. ValueError for another suffix or a recipe
    too long for a JPEG, OSError with the reason if writing fails."""
    file_format = _format_of(path)
    if file_format == "JPEG" and image.mode not in ("RGB", "L"):
        image = load_image(image)
    text = None if recipe is None else json.dumps(recipe, allow_nan=False, sort_keys=True)
    options: dict[str, object] = {"quality": 95}
    if file_format == "SVG":
        document = trace(image, metadata=text)
        return atomic_write(path, lambda target: target.write_text(document, encoding="utf-8"))
    if file_format == "PNG":
        info = PngImagePlugin.PngInfo()
        for key, value in (("parameters", parameters), ("condit", text)):
            if value is not None:
                info.add_text(key, value)
        options = {"pnginfo": info}
    elif text is not None or parameters is not None:
        options["exif"] = _exif(text, parameters, path if file_format == "JPEG" else None)
    return atomic_write(path, lambda target: image.save(target, format=file_format, **options))


def _exif(recipe: str | None, parameters: str | None, jpeg: str | Path | None) -> bytes:
    """EXIF data. A JPEG holds 64 KB of it."""
    exif = Image.Exif()
    if recipe is not None:
        exif[ExifTags.Base.ImageDescription] = _RECIPE + recipe
    if parameters is not None:
        comment = b"UNICODE\0" + parameters.encode("utf-16-be")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    data = exif.tobytes()
    if jpeg is not None and len(data) > _JPEG_EXIF:
        raise ValueError(
            f"{jpeg}: a JPEG cannot hold a recipe of {len(data)} bytes. Use .png or .webp, or leave it out"
        )
    return data


def check_output(path: str | Path) -> None:
    """Raises what save_image would, before the work that makes the image: ValueError for the suffix, OSError for a file
    that cannot be written, ModuleNotFoundError for an SVG without its extra."""
    if _format_of(path) == "SVG":
        tracer()
    check_writable(path)


def _format_of(path: str | Path) -> str:
    file_format = _SAVE_AS.get(Path(path).suffix.lower())
    if file_format is None:
        raise ValueError(f"{path} has no supported suffix; end it in {', '.join(_SAVE_AS)}")
    return file_format


def read_recipe(path: str | Path | bytes) -> dict[str, object]:
    """The recipe that save_image stored in an image (a path or bytes). ValueError for one without a valid recipe."""
    data, name = _read_bytes(path if isinstance(path, bytes) else Path(path), MAX_BYTES, allow_url=False)
    if b"<svg" in data[:1000]:
        return parse_recipe(traced_metadata(data.decode("utf-8", "replace"), name), name)
    image = _open(data, name)
    text = image.info.get("condit")
    if image.format != "PNG":
        text = str(image.getexif().get(ExifTags.Base.ImageDescription, ""))
        text = text.removeprefix(_RECIPE) if text.startswith(_RECIPE) else None
    if not isinstance(text, str):
        raise ValueError(f"{name} has no condit recipe; only images that condit saved and no other program re-saved do")
    return parse_recipe(text, name)


def parse_recipe(text: str, name: str) -> dict[str, object]:
    """A recipe's JSON. ValueError for anything else."""
    try:
        recipe = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{name} has a broken condit recipe: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{name} has a condit recipe that is a {type(recipe).__name__}; expected an object")
    return recipe


def to_tensor(image: ImageSource, size: int | tuple[int, int], *, fit: ImageFit = "squash") -> "Tensor":
    """(3, H, W) fp32 in -1..1 at `size` (a side, or height and width). fit: squash ignores the aspect ratio, crop keeps
    the centre, pad adds white. ValueError for another fit."""
    import torch

    height, width = (size, size) if isinstance(size, int) else size
    picture = load_image(image)
    if picture.size != (width, height):
        sampling = Image.Resampling.LANCZOS
        if fit == "squash":
            picture = picture.resize((width, height), sampling)
        elif fit == "crop":
            picture = ImageOps.fit(picture, (width, height), sampling)
        elif fit == "pad":
            picture = ImageOps.pad(picture, (width, height), sampling, color=WHITE)
        else:
            raise ValueError(f"fit must be squash, crop or pad; found {fit!r}")
    array = np.array(picture, dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().div_(127.5).sub_(1)


def to_images(tensor: "Tensor") -> list[Image.Image]:
    """(B, 3, H, W) or (3, H, W) in -1..1, clamped -> RGB images. ValueError for another shape, NaN or infinity."""
    batch = tensor.detach().float().cpu()
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[1] != 3:
        raise ValueError(f"expected (B, 3, H, W) or (3, H, W), found {tuple(tensor.shape)}")
    if not bool(batch.isfinite().all()):
        raise ValueError("the image has NaN or infinite values; try another dtype (float32) or a lower guidance_scale")
    array = ((batch.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]
