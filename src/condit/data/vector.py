"""An image as an SVG, traced by vtracer (extra `svg`)."""

from __future__ import annotations

import io
import re
from types import ModuleType

import numpy as np
from PIL import Image

SCALE = 4  # small images are traced from an enlargement, so that curves stay curves
COLOURS = 16  # more tell shades of an antialiased edge apart, which become slivers


def tracer() -> ModuleType:
    """vtracer. ModuleNotFoundError without the extra."""
    try:
        import vtracer
    except ModuleNotFoundError:
        raise ModuleNotFoundError("SVG output needs vtracer. Install it: pip install 'condit[svg]'") from None
    return vtracer


def trace(image: Image.Image, *, metadata: str | None = None) -> str:
    """The SVG document of an image, in its size; what is transparent stays transparent, and edges are sharp: a pixel is
    in the drawing from half its alpha on. metadata: a text that the document carries.

    ModuleNotFoundError without the extra.
    """
    rgba = image.convert("RGBA")
    factor = max(1, min(SCALE, 2048 // max(image.size)))
    size = (factor * image.width, factor * image.height)
    # Premultiplied, so that the colour of transparent pixels does not reach the edges.
    large = rgba.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    colours = np.asarray(rgba)
    solid = colours[colours[..., 3] > 200][:, :3]
    if len(solid):
        palette = Image.fromarray(np.ascontiguousarray(solid)[None], "RGB").quantize(COLOURS, kmeans=3)
        flat = large.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB")
    else:
        flat = large.convert("RGB")
    flat.putalpha(large.getchannel("A").point([0] * 128 + [255] * 128))
    picture = io.BytesIO()
    flat.save(picture, "PNG", compress_level=1)
    document = tracer().convert_raw_image_to_svg(
        picture.getvalue(),
        img_format="png",
        colormode="color",
        filter_speckle=4,
        color_precision=8,
        layer_difference=16,
        path_precision=2,
    )
    head = f'<svg version="1.1" xmlns="http://www.w3.org/2000/svg" width="{image.width}" height="{image.height}"'
    document = re.sub(r"<svg [^>]*>", f'{head} viewBox="0 0 {size[0]} {size[1]}">', document, count=1)
    if metadata is not None:
        safe = metadata.replace("]]>", "]]]]><![CDATA[>")
        document = document.replace("</svg>", f'<metadata id="condit"><![CDATA[{safe}]]></metadata></svg>')
    return document


def traced_metadata(document: str, name: str) -> str:
    """The metadata that `trace` was given. ValueError without any."""
    match = re.search(r'<metadata id="condit"><!\[CDATA\[(.*?)\]\]></metadata></svg>', document, re.S)
    if match is None:
        raise ValueError(f"{name} has no condit recipe; only images that condit saved and no other program re-saved do")
    return match[1].replace("]]]]><![CDATA[>", "]]>")
