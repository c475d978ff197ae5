"""The names of adapters on the command line: `--style`, `--subject`, `--edges`, `--gray`. A new name is one row here
and one parameter of `condit generate`.

Nothing heavy is imported here: help texts read this table before torch is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from condit.data.images import ImageSource

MapReader = Callable[["ImageSource"], "Image.Image"]


def _no_maps() -> Mapping[str, MapReader]:
    return {}


def _edge_maps() -> Mapping[str, MapReader]:
    from condit.data.annotators import edge_map, line_map

    return {"edges": edge_map, "soft_edges": edge_map, "canny": edge_map, "lines": line_map}


@dataclass(frozen=True)
class Use:
    """An option of `condit generate` that takes a reference for one adapter.

    use: the value of `Reference.use`. adapter: the end of the adapter's name: MODEL/adapter. annotator: what the
    adapter makes of the reference. maps: for ready-made maps, the adapter's annotator -> the function that reads
    the map.
    """

    use: str
    adapter: str
    help: str
    annotator: str | None = None
    maps: Callable[[], Mapping[str, MapReader]] = field(default=_no_maps)

    @property
    def ready(self) -> bool:
        """Whether the reference is a ready-made map instead of an image."""
        return self.maps is not _no_maps


# Option -> row.
OPTIONS = {
    "style": Use("style", "style", "Generate in the style of this image."),
    "subject": Use("subject", "subject", "Generate the subject of this image."),
    "edges": Use("edges", "edges", "Follow the edges detected in this image.", "lines"),
    "edges-map": Use("edges", "edges", "Follow a ready-made edge map.", maps=_edge_maps),
    "gray": Use("gray", "gray", "Colour this image; its own colours are ignored.", "gray"),
}
USES = {row.use: row for row in OPTIONS.values() if not row.ready}


def option_of(use: str, ready: bool) -> str | None:
    """The option of a reference, without dashes; None for an adapter's own name, which `--control` takes."""
    return next((option for option, row in OPTIONS.items() if (row.use, row.ready) == (use, ready)), None)


def adapter_name(model: str, use: str) -> str:
    """The catalog's name of a model's adapter; names of files, folders and other adapters are returned unchanged."""
    return f"{model}/{USES[use].adapter}" if use in USES else use


def map_readers() -> dict[str, MapReader]:
    """An adapter's annotator -> the function that reads a ready-made map for it."""
    return {annotator: read for row in OPTIONS.values() for annotator, read in row.maps().items()}
