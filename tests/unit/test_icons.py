"""The icon world: names, splits, captions, reading. fixtures/icons_index_sample.tsv holds published rows."""

from __future__ import annotations

import csv
import zipfile
from collections import defaultdict
from pathlib import Path
from random import Random

import numpy as np
import pytest

from condit_lab.icons.captions import with_article
from condit_lab.icons.world import (
    OBJECT_GROUPS,
    STYLES,
    TRAIN_LICENCES,
    UI_STYLES,
    IconWorld,
    base_of,
    caption,
    family,
    on_white,
    plain_caption,
    read_index,
    sample_path,
    split_of,
    style_of,
    write_index,
)

PUBLISHED = Path(__file__).parent / "fixtures" / "icons_index_sample.tsv"


@pytest.fixture(scope="module")
def world() -> IconWorld:
    return IconWorld.open(sample_path())


@pytest.fixture(scope="module")
def published() -> list[dict[str, str]]:
    with PUBLISHED.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.mark.parametrize(
    ("hexcode", "base"),
    [
        ("1F34E", "1F34E"),
        ("2764-fe0f", "2764"),
        ("1F469-200D-1F680", "1F9D1-200D-1F680"),  # woman astronaut -> astronaut
        ("1F468-1F3FD-200D-1F373", "1F9D1-200D-1F373"),  # tone and gender
        ("1F926-200D-2642-FE0F", "1F926"),  # man facepalming
        ("1F468", "1F468"),  # a man alone is a concept
        ("1F468-200D-1F469-200D-1F466", "1F468-200D-1F469-200D-1F466"),  # a family keeps its people
        ("1F469-200D-2764-FE0F-200D-1F468", "1F469-200D-2764-200D-1F468"),  # a couple too
    ],
)
def test_base_drops_tone_and_gender_of_one_person_only(hexcode: str, base: str) -> None:
    assert base_of(hexcode) == base


def test_bases_and_splits_equal_the_published_index(published) -> None:
    families = defaultdict(set)
    for row in published:
        families[row["base"]].add(family(row["style"]))
    assert {row["split"] for row in published} == {"train", "combo", "concept", "style", "style+concept"}
    for row in published:
        assert base_of(row["hex"]) == row["base"]
        assert split_of(row["base"], row["style"], families[row["base"]]) == row["split"], row


def test_sister_styles_share_their_split(world: IconWorld) -> None:
    splits = defaultdict(set)
    for icon in world.icons:
        splits[icon.base, family(icon.style)].add(icon.split)
    assert all(len(names) == 1 for names in splits.values())


def test_a_combination_stays_in_training_where_too_few_families_draw_the_concept() -> None:
    # The rocket's fluent drawings are held out; with two other families they may not be.
    assert split_of("1F680", "fluent-emoji-3d", {"fluent", "noto", "twemoji", "openmoji"}) == "combo"
    assert split_of("1F680", "fluent-emoji-3d", {"fluent", "noto", "twemoji"}) == "train"
    assert split_of("1F680", "fluent-emoji-3d", {"fluent", "noto", "twemoji", "streamline"}) == "train"


def test_the_sample_agrees_with_the_published_rows(world: IconWorld, published) -> None:
    ours = {(icon.style, icon.hex): icon for icon in world.icons}
    shared = [row for row in published if (row["style"], row["hex"]) in ours]
    assert len(shared) > 80
    for row in shared:
        icon = ours[row["style"], row["hex"]]
        assert (icon.base, icon.label, icon.group, icon.split) == tuple(
            row[name] for name in ("base", "label", "group", "split")
        )


def test_the_index_survives_writing_and_reading(world: IconWorld) -> None:
    assert read_index(write_index(world.icons)) == world.icons


def test_an_index_without_a_column_raises_with_its_name() -> None:
    with pytest.raises(ValueError, match="no column 'licence'"):
        read_index("style\ticon\thex\tbase\tlabel\tgroup\tsplit\tok\n")


def test_every_style_is_pinned_and_named() -> None:
    for key, style in (STYLES | UI_STYLES).items():
        assert key == style.key and len(style.sha256) == 64 and style.descriptions
        assert style.name_en and style.name_zh and style.author
    assert len({style.name_en for style in STYLES.values()}) == len(STYLES) == 15
    assert len(UI_STYLES) == 12


def test_an_unknown_style_raises_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"There is no icon style 'notto'. Choose from: noto, "):
        style_of("notto")


def test_the_sample_is_small_licensed_and_has_enough_held_out_rows(world: IconWorld) -> None:
    assert sample_path().stat().st_size < 3_000_000
    assert {icon.licence for icon in world.icons} <= set(TRAIN_LICENCES)
    assert sum(icon.split == "combo" for icon in world.icons) >= 40
    assert {"red apple", "cat face", "rocket"} <= {icon.label for icon in world.icons}


def test_the_sample_names_every_author_and_licence(world: IconWorld) -> None:
    text = (sample_path().parent / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert world.attribution == text
    for key in {icon.style for icon in world.icons}:
        style = STYLES[key]
        row = next(line for line in text.splitlines() if line.startswith(f"| {key} |"))
        assert style.package in row and style.author in row and style.licence in row
    assert "rasterised" in text and "Permission is hereby granted" in text


def test_rasters_have_straight_alpha_and_ink(world: IconWorld) -> None:
    for index in range(0, len(world), 50):
        rgba = world.rgba(index)
        assert rgba.shape == (128, 128, 4) and rgba.dtype == np.uint8
        assert (rgba[..., 3] > 0).mean() > 0.02
        assert (on_white(rgba)[rgba[..., 3] == 0] == 255).all()


def test_all_rasters_at_once_equal_single_ones() -> None:
    world = IconWorld.open(sample_path(), styles=["openmoji", "twemoji"], groups=["travel-places"])
    rasters = world.rgba_all()
    assert rasters.shape == (len(world), 128, 128, 4)
    assert np.array_equal(rasters[3], world.rgba(3))


def test_on_white_blends_by_alpha() -> None:
    rgba = np.array([[[255, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    assert on_white(rgba).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert np.array_equal(on_white(np.stack([rgba, rgba]))[1], on_white(rgba))


def test_fit_box_brings_the_ink_to_nine_tenths_of_the_canvas() -> None:
    rgba = np.zeros((128, 128, 4), np.uint8)
    rgba[10:50, 20:40] = (0, 0, 0, 255)
    ink = on_white(rgba, fit="box")[..., 0] < 128
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    assert abs(len(rows) - 115) <= 1 and abs(len(columns) - 58) <= 1
    assert abs(rows.mean() - 63.5) <= 1 and abs(columns.mean() - 63.5) <= 1
    empty = np.zeros((128, 128, 4), np.uint8)
    assert (on_white(empty, fit="box") == 255).all()


def test_filters_keep_what_they_name(world: IconWorld) -> None:
    part = IconWorld.open(sample_path(), groups=OBJECT_GROUPS, splits=["train"], licences=["MIT"])
    expected = [
        icon for icon in world.icons if icon.group in OBJECT_GROUPS and icon.split == "train" and icon.licence == "MIT"
    ]
    assert part.icons == expected and expected


def test_a_filter_that_fits_nothing_tells_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"No icon has split in \['training'\]; this world has \['combo'"):
        IconWorld.open(sample_path(), splits=["training"])
    with pytest.raises(ValueError, match="give a collection"):
        IconWorld.open(sample_path(), styles="noto")


def test_a_path_without_a_world_raises_with_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="condit data icons --out"):
        IconWorld.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="index.tsv is missing"):
        IconWorld.open(tmp_path)


def test_a_compressed_zip_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "world.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("index.tsv", "style\n" * 100)
    with pytest.raises(ValueError, match="index.tsv is compressed"):
        IconWorld.open(file)


def test_captions_name_the_label_and_the_style(world: IconWorld) -> None:
    icon = next(icon for icon in world.icons if icon.label == "red apple" and icon.style == "fluent-emoji-3d")
    assert plain_caption(icon) == "red apple, fluent 3d style"
    assert plain_caption(icon, "zh", world.concepts) == "红苹果，fluent 立体风格"
    fixed = {"p_empty": 0, "p_no_style": 0, "p_describe": 0, "p_tags": 0, "p_lead": 0, "p_short": 0}
    texts = {caption(icon, world.concepts, Random(seed), "en", **fixed) for seed in range(40)}
    assert texts == {
        "red apple, fluent 3d style",
        "red apple in fluent 3d style",
        "red apple, in the style of fluent 3d",
    }


def test_caption_probabilities_do_what_they_say(world: IconWorld) -> None:
    icon = next(icon for icon in world.icons if icon.label == "cat face")
    bare = {"p_empty": 0, "p_no_style": 1, "p_tags": 0, "p_lead": 0, "p_short": 0}
    assert caption(icon, world.concepts, Random(0), "en", **(bare | {"p_empty": 1})) == ""
    assert caption(icon, world.concepts, Random(0), "en", **bare) == "cat face"
    assert caption(icon, world.concepts, Random(0), "en", **(bare | {"p_short": 1})) == "cat"
    assert caption(icon, world.concepts, Random(0), "zh", **bare) == "猫脸"
    assert caption(icon, world.concepts, Random(0), None, **(bare | {"p_chinese": 1})) == "猫脸"
    led = {caption(icon, world.concepts, Random(seed), "en", **(bare | {"p_lead": 1})) for seed in range(60)}
    assert {"a cat face", "a drawing of a cat face", "an icon of a cat face"} <= led
    described = caption(icon, world.concepts, Random(0), "en", **(bare | {"p_no_style": 0, "p_describe": 1}))
    assert described.removeprefix("cat face, ") in {words for words, _ in STYLES[icon.style].descriptions}
    tagged = caption(icon, world.concepts, Random(0), "en", **(bare | {"p_tags": 1}))
    assert tagged.startswith("cat face, ")
    assert set(tagged.split(", ")[1:]) <= set(world.concepts[icon.hex]["tags_en"])


def test_captions_repeat_with_their_seed_and_vary_without(world: IconWorld) -> None:
    first, second = ([caption(icon, world.concepts, Random(7)) for icon in world.icons[:50]] for _ in range(2))
    assert first == second
    assert len({caption(world.icons[0], world.concepts, Random(seed)) for seed in range(50)}) > 10


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("red apple", "a red apple"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("grapes", "grapes"),
        ("glass", "a glass"),
        ("bus", "a bus"),
        ("person: bald", "person: bald"),
        ("Tokyo tower", "Tokyo tower"),
    ],
)
def test_articles_fit_their_nouns(label: str, expected: str) -> None:
    assert with_article(label) == expected
