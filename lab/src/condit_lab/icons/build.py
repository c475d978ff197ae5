"""Build the icon world: packages to drawings, names to concepts, drawings to 128 px rasters, rasters to shards."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from condit_lab.icons.attribution import attribution
from condit_lab.icons.names import read_aliases, read_chars, read_concepts, resolve, resolve_keys, ui_concepts
from condit_lab.icons.packages import EMOJIBASE, drawings, fetch, names, package_of
from condit_lab.icons.world import (
    GROUPS,
    HELD_OUT_SHARE,
    SIZE,
    STYLES,
    TRAIN_LICENCES,
    UI_STYLES,
    Icon,
    IconWorld,
    family,
    hash_fraction,
    split_of,
    style_of,
    write_index,
)

logger = logging.getLogger(__name__)

_MIN_INK = 40  # pixels with alpha above 1/8: fewer is a blank drawing
_CHUNK = 16


def build(
    out_dir: str | Path,
    *,
    packages: str | Path | None = None,
    styles: Collection[str] | None = None,
    ui: bool = False,
    sample: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> IconWorld:
    """Build the world (or with ui=True the one of UI icons) into out_dir and return it opened.

    packages: a folder of tarballs, filled by `npm pack` where one is missing (default: out_dir/packages). styles: keys,
    None = all. sample: only the hundred concepts of icon_sample.txt, for tests and first steps. progress(done, all) is
    called now and then. Files appear whole or not at all."""
    out = Path(out_dir)
    known = UI_STYLES if ui else STYLES
    if unknown := [key for key in styles or () if key not in known]:
        raise ValueError(f"There is no icon style {unknown[0]!r}. Choose from: {', '.join(known)}.")
    _check_rasteriser()
    chosen = [key for key in known if styles is None or key in styles]
    out.mkdir(parents=True, exist_ok=True)
    # Names are resolved over all styles, so that a split never depends on which styles were asked for.
    wanted = [package_of(style) for style in known.values()]
    files = fetch(wanted if ui else [*wanted, EMOJIBASE], Path(packages) if packages else out / "packages")
    tarballs = {key: files[style.package] for key, style in known.items()}
    icons, concepts = ui_index(tarballs) if ui else emoji_index(tarballs, files[EMOJIBASE.name])
    sampled = set(Path(__file__).with_name("icon_sample.txt").read_text(encoding="utf-8").splitlines())
    kept = [icon for icon in icons if icon.style in chosen and (not sample or icon.label in sampled)]
    done = _write_shards(kept, tarballs, out, workers, progress)
    final = [replace(icon, ok=(icon.style, icon.hex) in done) for icon in kept]
    present = {icon.hex for icon in final}
    _write(out / "concepts.json", _concepts_text({key: concepts[key] for key in concepts if key in present}))
    _write(out / "ATTRIBUTION.md", attribution(chosen))
    _write(out / "index.tsv", write_index(final))  # last: a folder without it is no world
    return IconWorld.open(out)


def emoji_index(tarballs: Mapping[str, Path], emojibase: Path) -> tuple[list[Icon], dict[str, dict[str, Any]]]:
    """Rows of all styles (ok = True until rasterised) and the concepts by key."""
    concepts = read_concepts(emojibase)
    aliases = read_aliases(concepts)
    iconify = [key for key in tarballs if STYLES[key].package.startswith("@iconify-json/")]
    chars = {key: read_chars(tarballs[key]) for key in iconify}
    if "fluent-emoji" in chars:  # its own file is empty; the names are the flat set's
        chars["fluent-emoji"] = chars["fluent-emoji-flat"]
    names_by_style: dict[str, dict[str, str]] = {}
    for style, tarball in tarballs.items():
        if style in chars:
            others = {name: key for other in iconify if other != style for name, key in reversed(chars[other].items())}
            names_by_style[style] = resolve(
                names(style, tarball),
                concepts,
                chars[style],
                others,
                corrections=aliases.get(style, {}),
                aliases=aliases["*"],
                numbered=style == "streamline-emojis",
            )
        else:
            names_by_style[style] = resolve_keys(names(style, tarball), concepts)
    families: dict[str, set[str]] = {}
    for style, keys in names_by_style.items():
        for key in keys:
            families.setdefault(concepts.table[key]["base"], set()).add(family(style))
    icons = []
    for style, keys in names_by_style.items():
        for key, name in sorted(keys.items(), key=lambda pair: pair[1]):
            entry = concepts.table[key]
            split = split_of(entry["base"], style, families[entry["base"]])
            licence = STYLES[style].licence
            icons.append(Icon(style, name, key, entry["base"], entry["label_en"], entry["group"], split, True, licence))
    return icons, concepts.table


def ui_index(tarballs: Mapping[str, Path]) -> tuple[list[Icon], dict[str, dict[str, Any]]]:
    """Rows and concepts of the UI icons: the concept is the name without its variant, drawn in every variant."""
    icons, concepts = [], {}
    for prefix in dict.fromkeys(style.family for style in UI_STYLES.values()):
        variants = [key.removeprefix(f"{prefix}-") for key in UI_STYLES if family(key) == prefix]
        tarball = tarballs[f"{prefix}-{variants[0]}"]
        for concept, by_variant in ui_concepts(names(f"{prefix}-{variants[0]}", tarball), variants).items():
            label = concept.replace("-", " ")
            split = "concept" if hash_fraction(f"ui/{concept}") < HELD_OUT_SHARE else "train"
            concepts[concept] = {
                "base": concept,
                "label_en": label,
                "label_zh": "",
                "tags_en": [],
                "tags_zh": [],
                "group": "ui",
            }
            for variant, name in by_variant.items():
                style = f"{prefix}-{variant}"
                licence = UI_STYLES[style].licence
                icons.append(Icon(style, name, concept, concept, label, "ui", split, True, licence))
    return sorted(icons, key=lambda icon: (list(UI_STYLES).index(icon.style), icon.hex)), concepts


def rasterise(drawing: str | bytes) -> NDArray[np.uint8]:
    """An SVG document or the bytes of a raster as (128, 128, 4) uint8 with straight alpha, zero where transparent."""
    if isinstance(drawing, str):
        import resvg_py

        png = resvg_py.svg_to_bytes(svg_string=drawing, width=SIZE, height=SIZE, skip_system_fonts=True)
        rgba = np.array(Image.open(io.BytesIO(bytes(png)), formats=("PNG",)).convert("RGBA"))
    else:
        image = Image.open(io.BytesIO(drawing), formats=("WEBP", "PNG")).convert("RGBA")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        # Pillow scales RGBA premultiplied: no dark fringe.
        rgba = np.array(square.resize((SIZE, SIZE), Image.Resampling.BOX))
    rgba[rgba[..., 3] == 0] = 0
    return rgba


def encode(rgba: NDArray[np.uint8]) -> bytes:
    """Lossless WebP of an RGBA raster."""
    out = io.BytesIO()
    # The slowest setting is forty times slower and saves 2.4 % (100 icons of all styles).
    Image.fromarray(rgba).save(out, "WEBP", lossless=True, method=4, quality=70)
    return out.getvalue()


def pack(
    world_dir: str | Path,
    file: str | Path,
    *,
    groups: Collection[str] | None = GROUPS,
    licences: Collection[str] | None = TRAIN_LICENCES,
    styles: Collection[str] | None = None,
) -> Path:
    """One file that `IconWorld.open` reads: the icons kept by the filters (None = all). The default is what a
    model is trained on: objects and smileys of the sets without share-alike. Replaces the file whole."""
    world = IconWorld.open(world_dir, styles=styles, groups=groups, licences=licences)
    icons = world.icons
    present = {icon.hex for icon in icons}
    concepts = {key: entry for key, entry in world.concepts.items() if key in present}
    texts = {
        "index.tsv": write_index(icons),
        "concepts.json": _concepts_text(concepts),
        "ATTRIBUTION.md": attribution(dict.fromkeys(icon.style for icon in icons)),
    }
    file = Path(file)
    # A stored zip, because a tar spends a quarter of its bytes on headers and padding of such small members.
    with _replacing(file) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for name, text in texts.items():
            archive.writestr(zipfile.ZipInfo(name), text)
        for icon in icons:
            archive.writestr(zipfile.ZipInfo(icon.member), world.read(icon))
    return file


def shard_of(licence: str) -> str:
    """The shard of a licence: share-alike and attribution classes lie apart, so that either can be left out."""
    return {"CC-BY-4.0": "cc-by", "CC-BY-SA-4.0": "cc-by-sa"}.get(licence, "permissive")


def _write_shards(
    icons: list[Icon],
    tarballs: Mapping[str, Path],
    out: Path,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> set[tuple[str, str]]:
    """Rasters into one tar a licence class; returns the (style, hex) that came out usable."""
    by_shard: dict[str, list[str]] = {}
    for style in dict.fromkeys(icon.style for icon in icons):
        by_shard.setdefault(shard_of(style_of(style).licence), []).append(style)
    usable: set[tuple[str, str]] = set()
    seen = 0
    with _pool(workers) as run:
        for shard, styles in by_shard.items():
            with (
                _replacing(out / f"{shard}.tar") as part,
                tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                for style in styles:
                    members = {icon.icon: icon for icon in icons if icon.style == style}
                    jobs = list(drawings(style, tarballs[style], members))
                    for (name, _), data in zip(jobs, run(_raster_file, (drawing for _, drawing in jobs)), strict=True):
                        seen += 1
                        if progress is not None and (seen % 100 == 0 or seen == len(icons)):
                            progress(seen, len(icons))
                        if data is None:
                            logger.warning("%s/%s is blank or cannot be drawn; left out", style, name)
                            continue
                        usable.add((style, members[name].hex))
                        _add(tar, members[name].member, data)
    return usable


def _raster_file(drawing: str | bytes) -> bytes | None:
    try:
        rgba = rasterise(drawing)
    except (ValueError, OSError) as error:
        logger.debug("not drawn: %s", error)
        return None
    return encode(rgba) if np.count_nonzero(rgba[..., 3] > 32) >= _MIN_INK else None


@contextmanager
def _pool(workers: int | None) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map` over processes; one worker means this process."""
    if (workers or os.cpu_count() or 1) == 1:
        yield map
        return
    with ProcessPoolExecutor(workers) as executor:
        yield lambda function, items: executor.map(function, items, chunksize=_CHUNK)


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A path to write to that becomes `file` when the block ends well, and vanishes when it does not."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _write(file: Path, text: str) -> None:
    with _replacing(file) as part:
        part.write_text(text, encoding="utf-8")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # No time, owner or mode of this machine: the same input gives the same bytes.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _concepts_text(concepts: Mapping[str, Any]) -> str:
    return json.dumps(dict(concepts), ensure_ascii=False, indent=0) + "\n"


def _check_rasteriser() -> None:
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Building the icon world needs resvg-py and fonttools. Install them: pip install -e lab."
        ) from error
