"""SVG documents to 128 px rasters with straight alpha: resvg in a Node process, about ten times as fast as resvg-py,
whose time goes into PNG files."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from condit_lab.icons.packages import Package
from condit_lab.icons.world import SIZE

logger = logging.getLogger(__name__)

RESVG = (
    Package("@resvg/resvg-js", "2.6.2", "5b4c67c32d593a42bca6d97320b57465cf340bee441f4cb6bf250b1086872a43"),
    Package(
        "@resvg/resvg-js-linux-x64-gnu", "2.6.2", "ead221101ab0c8f27821c6ad4e65259ff6796d49978831b2992abb0ecdbaf96a"
    ),
)
INK = 121  # longest side of a drawing that is cropped to its ink: 94 % of the canvas


class Renderer:
    """A Node process that draws; `with Renderer(folder) as renderer: renderer.draw(documents)`."""

    def __init__(self, modules: Path) -> None:
        if shutil.which("node") is None:
            raise ValueError("Building the icon world needs Node.js. Install node and npm, and put both on the path.")
        self._module = modules / "node_modules" / "@resvg" / "resvg-js"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def draw(self, documents: Iterable[tuple[str, bool]]) -> Iterator[NDArray[np.uint8] | None]:
        """Each (SVG text, crop to the ink?) as (128, 128, 4) uint8, straight alpha; None where it cannot be drawn."""
        for svg, crop in documents:
            line = json.dumps({"svg": svg, "fit": INK if crop else 0}).encode() + b"\n"
            yield self._drawn(line)

    def _drawn(self, line: bytes) -> NDArray[np.uint8] | None:
        """One document, in a new process if the present one dies of it; None where it dies of it twice."""
        for _ in range(2):
            try:
                return self._exchange(line)
            except OSError as error:
                logger.info("the renderer stopped: %s", error)
                self.__exit__()
        return None

    def _exchange(self, line: bytes) -> NDArray[np.uint8] | None:
        if self._process is None:
            self._process = subprocess.Popen(
                ["node", str(Path(__file__).with_name("render.js")), str(self._module.resolve()), str(SIZE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C stops the build, not a drawing: that would be kept as one that fails
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        head = self._process.stdout.read(4)
        if len(head) < 4:
            raise OSError(f"The renderer ended with exit code {self._process.wait()}.")
        width, height = np.frombuffer(head, "<u2").tolist()
        size = width * height * 4
        if not size:
            return None
        pixels = self._process.stdout.read(size)
        if len(pixels) < size:
            raise OSError(f"The renderer ended with exit code {self._process.wait()}.")
        return centred(straight(np.frombuffer(pixels, np.uint8).reshape(height, width, 4)))


def straight(premultiplied: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Premultiplied RGBA to straight alpha, zero where transparent; rounds as resvg's own PNG writer does."""
    alpha = premultiplied[..., 3:]
    if not premultiplied[..., :3].any():
        return premultiplied
    partial = (alpha > 0) & (alpha < 255)
    if not partial.any():
        return premultiplied
    colour = premultiplied[..., :3].astype(np.float32) * (255 / np.maximum(alpha, 1).astype(np.float32))
    out = premultiplied.copy()
    out[..., :3] = np.where(partial, np.minimum(np.floor(colour + 0.5), 255).astype(np.uint8), out[..., :3])
    return out


def centred(rgba: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """An image of at most 128 px in the middle of the canvas; None where it is larger."""
    height, width = rgba.shape[:2]
    if (height, width) == (SIZE, SIZE):
        return rgba
    if max(height, width) > SIZE:
        return None
    out = np.zeros((SIZE, SIZE, 4), np.uint8)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    out[top : top + height, left : left + width] = rgba
    return out


def unpack_renderer(tarballs: Iterable[Path], folder: Path) -> Path:
    """resvg-js and its binary, from their npm tarballs into folder/node_modules; returns the folder."""
    for tarball in tarballs:
        with tarfile.open(tarball, "r:gz") as tar:
            manifest = tar.extractfile("package/package.json")
            assert manifest is not None
            target = folder / "node_modules" / json.load(manifest)["name"]
            if target.is_dir():
                continue
            part = target.with_name(f"{target.name}.part")
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(part)
            tar.extractall(part, filter="data")
            (part / "package").rename(target)
            part.rmdir()
    return folder
