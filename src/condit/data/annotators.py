"""Conditions computed from an image without a learned model: edges, soft edges, gray, blur. Most return PIL images."""

from collections.abc import Callable, Iterator
from typing import TypeAlias, cast

import numpy as np
from PIL import Image, ImageFilter

from condit.data.images import ImageSource, load_image

MID_GREY = 128
TILE = 1024  # pixels

Place: TypeAlias = tuple[slice, slice]


def edges_array(pixels: np.ndarray, sigma: float = 1.0, low: float = 0.06, high: float = 0.15) -> np.ndarray:
    """Canny edges (Canny 1986) of uint8 (H, W, 3|4) -> uint8 (H, W), lines 255 on 0. Thresholds on gradients of 0..1.

    ValueError for another array. Alpha puts the image on mid-grey and adds its own outline: white objects have no edge
    on white, grey ones none on mid-grey."""
    from skimage.feature import canny

    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise ValueError(f"expected uint8 (H, W, 3|4), found {pixels.dtype} {pixels.shape}")

    def lines_of(plane: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        # With one threshold there is no hysteresis, so a tile does not depend on the others.
        weak, strong = (
            _tiled(pixels, lambda tile, t=t: canny(plane(tile), sigma, t, t), round(4 * sigma) + 3) for t in (low, high)
        )
        return _hysteresis(weak > 0, strong > 0)

    lines = lines_of(lambda tile: _luma(_split(tile)[0]))
    if pixels.shape[2] == 4:
        outline = lines_of(lambda tile: tile[:, :, 3] / 255)
        lines |= outline & ~_near(lines)  # a second line next to the first would be noise
    return lines.astype(np.uint8) * 255


def edges(image: ImageSource, sigma: float = 1.0, low: float = 0.06, high: float = 0.15) -> Image.Image:
    """`edges_array` of an image: white lines on black, three equal channels."""
    return _rgb(edges_array(_pixels(image), sigma, low, high))


def canny(image: ImageSource, low: int = 100, high: int = 200) -> Image.Image:
    """`canny_array` of an image on white: white lines on black, three equal channels."""
    return _rgb(canny_array(_array(load_image(image)), low, high))


def canny_array(pixels: np.ndarray, low: int = 100, high: int = 200) -> np.ndarray:
    """Edges as `cv2.Canny(pixels, low, high)` defines them, of uint8 (H, W, C) -> uint8 (H, W), 255 on 0.

    Unlike `edges_array`, it does not smooth, has thresholds on |dx| + |dy| of 3 x 3 Sobel sums, and uses each pixel's
    strongest channel, so that colours of equal luma have an edge. The published OminiControl adapter needs these lines.
    """
    levels = _tiled(pixels, lambda tile: _maxima(tile, low, high), 2)
    return _hysteresis(levels > 0, levels > 1).astype(np.uint8) * 255


def _maxima(pixels: np.ndarray, low: int, high: int) -> np.ndarray:
    """Gradients (H, W, C) -> uint8 (H, W): 1 for a local maximum above `low`, 2 above `high`, 0 elsewhere."""
    p = np.pad(pixels.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows, columns = p[:-2] + 2 * p[1:-1] + p[2:], p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    dx, dy = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    strongest = (abs(dx) + abs(dy)).argmax(2)[..., None]
    dx, dy = (np.take_along_axis(d, strongest, 2)[..., 0] for d in (dx, dy))
    size = abs(dx) + abs(dy)
    around = np.pad(size, 1)

    def at(y: int, x: int) -> np.ndarray:
        """The size of the neighbour (y, x) of each pixel; 0 outside."""
        return around[1 + y : 1 + y + size.shape[0], 1 + x : 1 + x + size.shape[1]]

    # Non-maximum suppression along the gradient, in eighths of a circle: tan 22.5 degrees in fixed point, as in OpenCV.
    steep, flat = abs(dy) << 15, abs(dx) * 13573
    horizontal, vertical = steep < flat, steep > flat + (abs(dx) << 16)
    falling = (dx ^ dy) < 0
    along = np.where(falling, (size > at(-1, 1)) & (size > at(1, -1)), (size > at(-1, -1)) & (size > at(1, 1)))
    along = np.where(vertical, (size > at(-1, 0)) & (size >= at(1, 0)), along)
    along = np.where(horizontal, (size > at(0, -1)) & (size >= at(0, 1)), along)
    return ((size > low) & along).astype(np.uint8) + ((size > high) & along)


def _hysteresis(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """The chains of weak pixels that have a strong one, bool (H, W)."""
    from scipy.ndimage import label

    chains, count = cast("tuple[np.ndarray, int]", label(weak, np.ones((3, 3)), output=np.int32))
    kept = np.zeros(count + 1, bool)
    kept[chains[strong]] = True
    kept[0] = False
    return kept[chains]


def _tiled(pixels: np.ndarray, compute: Callable[[np.ndarray], np.ndarray], halo: int) -> np.ndarray:
    """compute(pixels), (H, W, C) -> (H, W) uint8, tile by tile: filters need up to 200 bytes a pixel. halo: how far, in
    pixels, a result depends on its neighbours."""
    result = np.empty(pixels.shape[:2], np.uint8)
    for place, block, inside in _tiles(pixels, halo):
        result[place] = compute(block)[inside]
    return result


def _tiles(pixels: np.ndarray, halo: int) -> Iterator[tuple[Place, np.ndarray, Place]]:
    """For each tile its place, its pixels with those of the neighbours, and where the tile is in them."""
    for y in range(0, pixels.shape[0], TILE):
        for x in range(0, pixels.shape[1], TILE):
            top, left = max(0, y - halo), max(0, x - halo)
            inside = slice(y - top, y - top + TILE), slice(x - left, x - left + TILE)
            yield (
                (slice(y, y + TILE), slice(x, x + TILE)),
                pixels[top : y + TILE + halo, left : x + TILE + halo],
                inside,
            )


def lines_array(edges: np.ndarray) -> np.ndarray:
    """Edges (H, W), 255 on 0, as ink on paper: 0 on 255, three pixels wide. The embedded models are trained on icons,
    which contain no thin light lines on black."""
    return np.where(_near(edges > MID_GREY), np.uint8(0), np.uint8(255))


def lines(image: ImageSource, sigma: float = 1.0, low: float = 0.06, high: float = 0.15) -> Image.Image:
    """`lines_array` of the edges of an image."""
    return _rgb(lines_array(edges_array(_pixels(image), sigma, low, high)))


def soft_edges(image: ImageSource) -> Image.Image:
    """The largest Sobel gradient over the channels, its maximum scaled to 255; similar to HED."""
    from skimage.filters import sobel

    pixels = _pixels(image)

    def strength(tile: np.ndarray) -> np.ndarray:
        rgb, alpha = _split(tile)
        planes = [*np.moveaxis(rgb, 2, 0), *([] if alpha is None else [alpha])]
        return np.max([sobel(plane) for plane in planes], axis=0)

    largest = max(float(strength(block)[inside].max()) for _, block, inside in _tiles(pixels, 1))
    return _rgb(_tiled(pixels, lambda tile: (strength(tile) / max(largest, 1e-6) * 255).round(), 1))


def gray(image: ImageSource) -> Image.Image:
    """Luma (ITU-R 601) on white, three equal channels."""
    return load_image(image).convert("L").convert("RGB")


def blur(image: ImageSource, sigma: float = 6.0) -> Image.Image:
    """Gaussian blur, sigma in pixels, on white."""
    return load_image(image).filter(ImageFilter.GaussianBlur(sigma))


def foreground(image: ImageSource, tolerance: int = 24) -> Image.Image:
    """White where the image is not transparent or, of an opaque image, differs by more than `tolerance` of 255 from the
    median colour of its border; black elsewhere. For icons and cut-outs: of a photo it is no segmentation."""
    picture = load_image(image, mode="RGBA")
    alpha = np.asarray(picture.getchannel("A"))
    if alpha.min() < 255:
        return _rgb((alpha > 127).astype(np.uint8) * 255)
    pixels = np.asarray(picture.convert("RGB")).astype(np.int16)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return _rgb((abs(pixels - np.median(border, axis=0)).max(2) > tolerance).astype(np.uint8) * 255)


def edge_map(image: ImageSource) -> Image.Image:
    """An existing edge map as white lines on black; dark lines on light are inverted."""
    lines = np.asarray(load_image(image).convert("L"))
    return _rgb(255 - lines if lines.mean() > MID_GREY else lines)


def line_map(image: ImageSource) -> Image.Image:
    """`lines_array` of an existing edge map, inverted if necessary."""
    return _rgb(lines_array(np.asarray(edge_map(image))[:, :, 0]))


def _pixels(image: ImageSource) -> np.ndarray:
    """uint8 (H, W, 4) if a pixel is transparent, else (H, W, 3)."""
    picture = load_image(image, mode="RGBA")
    opaque = picture.getchannel("A").getextrema() == (255, 255)
    return _array(picture.convert("RGB") if opaque else picture)


def _array(picture: Image.Image) -> np.ndarray:
    """The pixels (H, W, C), strip by strip: np.asarray has three copies of a picture in memory at a time."""
    pixels = np.empty((picture.height, picture.width, len(picture.getbands())), np.uint8)
    for y in range(0, picture.height, TILE):
        pixels[y : y + TILE] = np.asarray(picture.crop((0, y, picture.width, min(y + TILE, picture.height))))
    return pixels


def _split(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours (H, W, 3) in 0..1, on mid-grey if there is alpha, and alpha (H, W) or None."""
    values = pixels.astype(np.float64) / 255
    if pixels.shape[2] == 3:
        return values, None
    alpha = values[:, :, 3:]
    return values[:, :, :3] * alpha + MID_GREY / 255 * (1 - alpha), alpha[:, :, 0]


def _luma(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([0.299, 0.587, 0.114])


def _near(lines: np.ndarray) -> np.ndarray:
    """Pixels within one of a line, bool."""
    from scipy.ndimage import binary_dilation

    return binary_dilation(lines, np.ones((3, 3)))


def _rgb(plane: np.ndarray) -> Image.Image:
    return Image.fromarray(plane).convert("RGB")
