"""The larger icon world: tables, names, splits, captions, measures, cache and file format, without network."""

from __future__ import annotations

import io
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

from condit_lab.icons.world import SIZE
from condit_lab.world import clipart, splits, store
from condit_lab.world.cache import RasterCache
from condit_lab.world.captions import Subject, captions, colour_words
from condit_lab.world.emoji import EmojiConcept, slug
from condit_lab.world.inflated import inflate
from condit_lab.world.measure import COLOURS, PixelMeasures, descriptor, measure
from condit_lab.world.names import details, phrases, read_name
from condit_lab.world.progress import Reporter
from condit_lab.world.raster import Renderer, centred, straight
from condit_lab.world.sets import drawings_of, icon_sets, looks, read_table, split_affix
from condit_lab.world.store import World

FREE = {"MIT", "ISC", "Apache-2.0", "OFL-1.1", "CC-BY-4.0", "CC-BY-3.0", "CC0-1.0"}
KINDS = {"line", "solid", "duotone", "color", "gradient", "sketch", "painted", "pixel", "3d"}
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def known():
    own = {slug(row["name"]): row for row in read_table("names.tsv")}
    targets = {row["concept"] for row in own.values() if row["concept"]}
    labels = [target for target in targets if slug(target) not in own or own[slug(target)]["concept"]]
    emoji = {label: EmojiConcept(label, label, label, (), (), "objects") for label in labels}
    return phrases(emoji)


def test_every_set_is_pinned_and_free():
    for entry in icon_sets().values():
        assert entry.licence in FREE, entry.key
        assert re.fullmatch(r"[0-9a-f]{64}", entry.package.sha256), entry.key
        assert re.fullmatch(r"\d+\.\d+\.\d+", entry.package.version), entry.key


def test_every_style_has_a_set_a_kind_and_names_in_both_languages():
    own = {clipart.SOURCE, "inflated", *icon_sets()}
    for look in looks():
        assert look.icon_set in own and look.kind in KINDS, look.key
        assert look.name_en and look.description_en and look.name_zh and CHINESE.search(look.description_zh), look.key
    assert len({look.key for look in looks()}) >= 60


def test_every_name_is_unique_and_has_a_chinese_label():
    rows = read_table("names.tsv")
    for row in rows:
        assert row["name"] and CHINESE.search(row["zh"]), row
    counts = Counter(slug(row["name"]) for row in rows)
    assert [name for name, count in counts.items() if count > 1] == []


def test_a_synonym_leads_to_a_concept_not_to_another_synonym():
    own = {slug(row["name"]): row for row in read_table("names.tsv")}
    # Labels of emoji whose word means something else in an icon set: the emoji "mouse" is the animal.
    emoji = {"cricket", "dizzy", "kiss", "mouse", "person", "smiling-face"}
    for row in own.values():
        target = own.get(slug(row["concept"])) if row["concept"] else None
        fine = target is None or slug(target["concept"]) in ("", slug(row["concept"]))
        assert fine or slug(row["concept"]) in emoji, row


def test_a_synonym_of_an_unknown_name_raises():
    with pytest.raises(ValueError, match="is not a concept"):
        phrases({})


@pytest.mark.parametrize(
    ("icon_set", "name", "stem", "style"),
    [
        ("ph", "bell-thin", "bell", "ph-thin"),
        ("ph", "bell", "bell", "ph-regular"),
        ("solar", "cat-line-duotone", "cat", "solar-line-duotone"),
        ("ic", "twotone-home", "home", "material-twotone"),
        ("material-symbols", "home-outline-sharp", "home", "material-outline-sharp"),
    ],
)
def test_the_longest_affix_tells_the_style(icon_set, name, stem, style):
    split = split_affix(icon_set, name)
    assert split is not None and (split[0], split[1].key) == (stem, style)


def test_variants_of_no_style_are_left_out():
    assert split_affix("heroicons", "home-16-solid") is None
    assert split_affix("ic", "home") is None


def test_one_size_of_a_drawing_the_best():
    names = ["bell-16-filled", "bell-24-filled", "bell-48-filled", "cart-20-filled"]
    assert drawings_of("fluent", names) == [
        ("fluent-filled", "bell", "bell-24-filled"),
        ("fluent-filled", "cart", "cart-20-filled"),
    ]


@pytest.mark.parametrize(
    ("stem", "english", "chinese"),
    [
        ("wallet", "wallet", "钱包"),
        ("wallet-2", "wallet", "钱包"),
        ("wallet-add-02", "wallet with a plus sign", "带加号的钱包"),
        ("wallet-off", "crossed-out wallet", "划掉的钱包"),
    ],
)
def test_numbers_go_and_additions_become_details(known, stem, english, chinese):
    reading = read_name(stem, "tabler", known)
    assert reading is not None and (reading.label_en, reading.label_zh) == (english, chinese)
    assert reading.phrase.concept == "wallet"


def test_synonyms_share_a_concept_and_keep_their_label(known):
    smart, cell = read_name("smart-phone", "tabler", known), read_name("cell-phone", "tabler", known)
    assert smart is not None and cell is not None and smart.phrase.concept == cell.phrase.concept
    assert (smart.label_en, cell.label_en) == ("smart phone", "cell phone")


def test_verbs_and_trademarks_name_nothing(known):
    assert read_name("align-left-2", "tabler", known) is None
    assert read_name("apple", "mdi", known) is None
    assert read_name("apple", "lucide", known) is not None
    assert read_name("windows", "bi", known) is None


def test_a_chapter_in_front_of_a_name_is_skipped_where_a_set_has_chapters(known):
    assert read_name("health-dentistry-tooth", "streamline-pixel", known) is not None
    assert read_name("health-dentistry-tooth", "tabler", known) is None


def test_details_are_patterns_in_both_languages():
    for english, chinese in details().values():
        assert english.count("{}") == 1 and chinese.count("{}") == 1


def test_clip_art_is_named_by_the_end_of_its_title(known):
    truck = clipart.title_phrase("Old_truck 2", known)
    assert truck is not None and truck.label_en == "truck"
    assert clipart.title_phrase("wallet head", known) is None


def test_held_out_looks_and_concepts_are_never_trained():
    for style in splits.HELD_OUT_LOOKS:
        assert splits.split_of("wallet", style, "x", ["a", "b", "c", "d"]).startswith("style")
    assert set(splits.HELD_OUT_LOOKS.values()) == {"line", "duotone", "painted", "pixel", "3d"}
    concepts = [f"thing {number}" for number in range(3000)]
    held = [name for name in concepts if splits.split_of(name, "tabler", "tabler", []) == "concept"]
    assert 0.06 < len(held) / len(concepts) < 0.10
    assert all(splits.split_of(name, "ph-thin", "ph", ["a", "b", "c", "d"]) == "concept" for name in held)


def test_a_combination_is_held_out_only_where_three_other_families_draw_it():
    concepts = [f"thing {number}" for number in range(3000)]
    few = {splits.split_of(name, "ph-thin", "ph", ["ph", "a", "b"]) for name in concepts}
    many = Counter(splits.split_of(name, "ph-thin", "ph", ["ph", "a", "b", "c"]) for name in concepts)
    assert "combo" not in few and many["combo"] > 100


def _drawing(seed: int) -> np.ndarray:
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rng = np.random.default_rng(seed)
    for top, left, height, width in rng.integers(10, 60, (6, 4)):
        rgba[top : top + height, left : left + width, 3] = 255
    return rgba


def test_the_same_drawing_elsewhere_and_smaller_is_a_near_duplicate_and_another_is_none():
    first, other = _drawing(1), _drawing(2)
    moved = np.roll(first, (5, -4), (0, 1))
    rows = np.stack([descriptor(first), descriptor(moved), descriptor(other)])
    assert splits.near_pairs(rows[:1], rows[1:2]).all() and not splits.near_pairs(rows[:1], rows[2:]).any()


def test_no_training_drawing_stays_near_a_held_out_one_and_old_splits_stay():
    same = descriptor(_drawing(1))
    rows = np.stack([same, same, same, same, descriptor(_drawing(2)), same])
    before = ["train", "concept", "concept", "train", "train", "style"]
    fixed = [True, True, False, False, False, False]
    after = splits.without_near(before, fixed, [False] * 5 + [True], rows)
    # Two of the first world keep theirs; a newcomer held out near trained ones and a trained one near held out leave.
    assert after == ["train", "concept", "near", "near", "train", "style"]


def test_colours_are_measured_by_area():
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rgba[:, :80] = (220, 30, 30, 255)
    rgba[:, 80:110] = (255, 255, 255, 255)
    some = measure(rgba)
    assert some is not None and colour_words(some) == ("red and white", "红色和白色")
    assert not some.translucent and not some.shaded


def test_translucent_areas_and_blank_drawings_are_seen():
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    assert measure(rgba) is None
    rgba[20:100, 20:100, 3] = 255
    solid = measure(rgba)
    rgba[20:60, 20:100, 3] = 110
    glass = measure(rgba)
    assert solid is not None and not solid.translucent and glass is not None and glass.translucent


def _subject(measured: PixelMeasures) -> Subject:
    texts = ("wallet", "钱包", "tabler", "tabler", [("line icon", "线条图标")], ["money"], ["钱"], "line")
    return Subject(*texts, measured)


def test_captions_name_the_thing_in_each_language_and_repeat_exactly():
    red = next(index for index, colour in enumerate(COLOURS) if colour[0] == "red")
    subject = _subject(PixelMeasures((red,), True, False, 0.4))
    english, chinese = captions(subject, Random(3))
    assert len(english) == len(chinese) == 3
    assert all("wallet" in text for text in english) and all("钱包" in text for text in chinese)
    assert "red" in english[1] and "红色" in chinese[1] and "tabler" in english[0]
    assert "translucent parts" in english[2] and "半透明部分" in chinese[2]
    assert captions(subject, Random(3)) == (english, chinese)


def test_inflated_shapes_keep_their_outline_and_gain_tones():
    flat = _drawing(1)
    solid = inflate(flat, "wallet")
    assert np.abs(solid[..., 3].astype(int) - flat[..., 3]).mean() < 4
    assert len(np.unique(solid[solid[..., 3] == 255][:, 0])) > 40
    assert np.array_equal(solid, inflate(flat, "wallet")) and not np.array_equal(solid, inflate(flat, "cat"))


_NODE = """#!{python}
import pathlib, struct, sys
runs = pathlib.Path({runs!r})
for line in sys.stdin:
    if "never" in line or ("once" in line and not runs.exists()):
        runs.touch()
        sys.exit(6)
    sys.stdout.buffer.write(struct.pack("<HH", 1, 1) + bytes([0, 0, 0, 255]))
    sys.stdout.buffer.flush()
"""


def test_a_renderer_that_dies_is_started_again_and_gives_up_on_the_second_death(tmp_path, monkeypatch):
    node = tmp_path / "node"
    node.write_text(_NODE.format(python=sys.executable, runs=str(tmp_path / "runs")))
    node.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with Renderer(tmp_path) as renderer:
        images = list(renderer.draw([("once", False), ("never", False), ("fine", False)]))
    assert [image is None for image in images] == [False, True, False]


def test_straight_alpha_of_premultiplied_pixels():
    pixels = np.array([[[6, 49, 111, 111], [0, 0, 0, 90], [12, 112, 255, 255], [0, 0, 0, 0]]], np.uint8)
    expected = [[[14, 113, 255, 111], [0, 0, 0, 90], [12, 112, 255, 255], [0, 0, 0, 0]]]
    assert straight(pixels).tolist() == expected


def test_a_smaller_image_comes_to_the_middle():
    canvas = centred(np.full((20, 40, 4), 255, np.uint8))
    assert canvas is not None and canvas[54:74, 44:84].all() and canvas.sum() == 20 * 40 * 4 * 255
    assert centred(np.zeros((200, 20, 4), np.uint8)) is None


def test_a_stopped_cache_goes_on(tmp_path: Path):
    cache = RasterCache(tmp_path, "tabler")
    first = _drawing(1)
    assert list(cache.add([("a", first), ("b", None)])) == ["a", "b"]
    with open(tmp_path / "tabler.tsv", "a") as handle:
        handle.write("c\t12")  # the line that a crash cut off
    again = RasterCache(tmp_path, "tabler")
    assert "c" not in again and again.drawn("a") and not again.drawn("b")
    list(again.add([("c", _drawing(2))]))
    read = list(RasterCache(tmp_path, "tabler").read(["c", "a"]))
    assert np.array_equal(read[0], _drawing(2)) and np.array_equal(read[1], first)


def _write_world(folder: Path, count: int) -> None:
    rows = [
        ("tabler", f"n{i}", "wallet", "wallet", "钱包", i % 2, "things", "train", "MIT", "black", 0, 0)
        for i in range(count)
    ]
    store.write_rows(folder / store.INDEX, store.field_names(store.DrawingRow), rows)
    concept = ("wallet", "wallet", "钱包", "", "", "things", 0, count, 1)
    store.write_rows(folder / store.CONCEPTS, store.field_names(store.Concept), [concept])
    style = ("tabler", "tabler", "line", "MIT", "tabler", "tabler", "line icon", "线条图标", 0, count)
    store.write_rows(folder / store.STYLES, store.field_names(store.StyleRow), [style])
    store.write_rows(folder / store.CAPTIONS, ["en_1", "zh_1"], [("wallet", "钱包")] * count)
    np.zeros((count, SIZE, SIZE, 4), np.uint8).tofile(folder / store.IMAGES)


def test_a_world_opens_and_filters(tmp_path: Path):
    _write_world(tmp_path, 3)
    world = World.open(tmp_path)
    assert len(world) == 3 and world.image.shape == (3, SIZE, SIZE, 4)
    assert world.label_en[0] == "wallet" and world.label_zh[0] == "钱包" and world.captions[2] == ("wallet", "钱包")
    assert world.where(splits=["train"], kinds=["line"], details=False).tolist() == [0, 2]
    assert world.where(groups=["food-drink"]).tolist() == []


def test_a_world_with_missing_images_does_not_open(tmp_path: Path):
    _write_world(tmp_path, 3)
    np.zeros((2, SIZE, SIZE, 4), np.uint8).tofile(tmp_path / store.IMAGES)
    with pytest.raises(ValueError, match="Build the world again"):
        World.open(tmp_path)
    with pytest.raises(ValueError, match="There is no icon world"):
        World.open(tmp_path / "nowhere")


def test_a_cell_with_a_tab_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="tab"):
        store.write_rows(tmp_path / "x.tsv", ["a"], [["b\tc"]])


def test_the_member_of_a_debian_package(tmp_path: Path, known):
    data = io.BytesIO()
    svg = b"<svg><dc:title>Red wallet</dc:title><dc:creator><x>Nicu B</x></dc:creator>PublicDomain</svg>"
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        member = tarfile.TarInfo("./usr/share/openclipart/svg/office/wallet_01.svg")
        member.size = len(svg)
        tar.addfile(member, io.BytesIO(svg))
    body = data.getvalue()
    header = b"data.tar.xz     " + b" " * 32 + f"{len(body):<10}".encode() + b"`\n"
    deb = tmp_path / "x.deb"
    deb.write_bytes(b"!<arch>\n" + header + body)
    assert [(clip.path, clip.style, clip.phrase.label_en) for clip in clipart.clips(deb, known)] == [
        ("office/wallet_01.svg", "clipart-nicu", "wallet")
    ]


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]):
    with Reporter() as report:
        for done in range(1, 101):
            report("rasters", done, 100)
    assert capsys.readouterr().err.splitlines() == ["rasters: 1 of 100", "rasters: 100 of 100"]
