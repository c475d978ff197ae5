"""Conditions computed from an image without a learned model: edges, soft edges, gray, blur. Most return PIL images."""

import numpy as np
from PIL import Image, ImageFilter

from condit.data.images import ImageSource, load_image

MID_GREY = 128


def edges_array(pixels: np.ndarray, sigma: float = 1.0, low: float = 0.06, high: float = 0.15) -> np.ndarray:
    """Canny edges (Canny 1986) of uint8 (H, W, 3|4) -> uint8 (H, W), lines 255 on 0. Thresholds on gradients of 0..1.

    ValueError for another array. Alpha puts the image on mid-grey and adds its own outline: white objects have no edge
    on white, grey ones none on mid-grey."""
    from skimage.feature import canny

    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise ValueError(f"expected uint8 (H, W, 3|4), found {pixels.dtype} {pixels.shape}")
    rgb, alpha = _split(pixels)
    lines = canny(_luma(rgb), sigma=sigma, low_threshold=low, high_threshold=high)
    if alpha is not None:
        outline = canny(alpha, sigma=sigma, low_threshold=low, high_threshold=high)
        lines |= outline & ~_near(lines)  # a second line next to the first would be noise
    return lines.astype(np.uint8) * 255


def edges(image: ImageSource, sigma: float = 1.0, low: float = 0.06, high: float = 0.15) -> Image.Image:
    """`edges_array` of an image: white lines on black, three equal channels."""
    return _rgb(edges_array(_pixels(image), sigma, low, high))


def canny(image: ImageSource, low: int = 100, high: int = 200) -> Image.Image:
    """`canny_array` of an image on white: white lines on black, three equal channels."""
    return _rgb(canny_array(np.asarray(load_image(image)), low, high))


def canny_array(pixels: np.ndarray, low: int = 100, high: int = 200) -> np.ndarray:
    """Edges as `cv2.Canny(pixels, low, high)` defines them, of uint8 (H, W, C) -> uint8 (H, W), 255 on 0.

    Unlike `edges_array`, it does not smooth, has thresholds on |dx| + |dy| of 3 x 3 Sobel sums, and uses each pixel's
    strongest channel, so that colours of equal luma have an edge. The published OminiControl adapter needs these lines.
    """
    from skimage.measure import label

    p = np.pad(pixels.astype(np.int64), ((1, 1), (1, 1), (0, 0)), mode="edge")
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
    thin = np.where(along, size, 0)
    chains = np.asarray(label(thin > low, connectivity=2))
    return np.isin(chains, np.unique(chains[thin > high])).astype(np.uint8) * 255


def lines_array(edges: np.ndarray) -> np.ndarray:
    """Edges (H, W), 255 on 0, as ink on paper: 0 on 255, three pixels wide. The embedded models are trained on icons,
    which contain no thin light lines on black."""
    return np.where(_near(edges > MID_GREY), 0, 255).astype(np.uint8)


def lines(image: ImageSource, sigma: float = 1.0, low: float = 0.06, high: float = 0.15) -> Image.Image:
    """`lines_array` of the edges of an image."""
    return _rgb(lines_array(edges_array(_pixels(image), sigma, low, high)))


def soft_edges(image: ImageSource) -> Image.Image:
    """The largest Sobel gradient over the channels, its maximum scaled to 255; similar to HED."""
    from skimage.filters import sobel

    rgb, alpha = _split(_pixels(image))
    planes = [*np.moveaxis(rgb, 2, 0), *([] if alpha is None else [alpha])]
    strength = np.max([sobel(plane) for plane in planes], axis=0)
    return _rgb((strength / max(float(strength.max()), 1e-6) * 255).round().astype(np.uint8))


def gray(image: ImageSource) -> Image.Image:
    """Luma (ITU-R 601) on white, three equal channels."""
    return load_image(image).convert("L").convert("RGB")


def blur(image: ImageSource, sigma: float = 6.0) -> Image.Image:
    """Gaussian blur, sigma in pixels, on white."""
    return load_image(image).filter(ImageFilter.GaussianBlur(sigma))


def edge_map(image: ImageSource) -> Image.Image:
    """An existing edge map as white lines on black; dark lines on light are inverted."""
    lines = np.asarray(load_image(image).convert("L"))
    return _rgb(255 - lines if lines.mean() > MID_GREY else lines)


def line_map(image: ImageSource) -> Image.Image:
    """`lines_array` of an existing edge map, inverted if necessary."""
    return _rgb(lines_array(np.asarray(edge_map(image))[:, :, 0]))


def _pixels(image: ImageSource) -> np.ndarray:
    """uint8 (H, W, 4) if a pixel is transparent, else (H, W, 3)."""
    pixels = np.asarray(load_image(image, mode="RGBA"))
    return pixels if pixels[:, :, 3].min() < 255 else pixels[:, :, :3]


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
    padded = np.pad(lines, 1)
    height, width = lines.shape
    return np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


def _rgb(plane: np.ndarray) -> Image.Image:
    return Image.fromarray(plane).convert("RGB")
