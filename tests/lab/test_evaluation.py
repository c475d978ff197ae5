"""The suite on a small made-up world and a model that does not draw: cells, sets that go on, tables, the page."""

import io
import json
import tarfile
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from condit.rulers.judge import Judge
from condit_lab.icons.world import Icon, IconWorld, family, hash_fraction, write_index
from condit_lab.suites import rows, sets, tiny
from condit_lab.suites.judge import is_for_judge
from condit_lab.suites.rows import FigureRow
from condit_lab.training.clip_files import make_clip, make_tokenizer

STYLES = {
    "noto": "Apache-2.0",
    "twemoji": "CC-BY-4.0",
    "fluent-emoji-flat": "MIT",
    "streamline-emojis": "CC-BY-4.0",
    "openmoji": "CC-BY-SA-4.0",
}
CONCEPTS = 14
CELLS = {"combo": 4, "concept": 3}  # concepts 0-3 are held out in noto and twemoji, 4-6 in every style


def split_of(number, style):
    if style == "streamline-emojis":
        return "style"
    if number < CELLS["combo"]:
        return "combo" if style in ("noto", "twemoji") else "train"
    return "concept" if number < sum(CELLS.values()) else "train"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    icons, concepts = [], {}
    with tarfile.open(folder / "all.tar", "w") as tar:
        for number in range(CONCEPTS):
            # The last two have one label: either is a hit.
            key, label = f"1F4{number:02X}", "same" if number >= CONCEPTS - 2 else f"thing {number}"
            concepts[key] = {"label_en": label, "label_zh": label, "tags_en": [], "tags_zh": []}
            for style, licence in STYLES.items():
                split = split_of(number, style)
                icon = Icon(style, label, key, key, label, "objects", split, True, licence)
                pixels = np.zeros((128, 128, 4), np.uint8)
                pixels[20:100, 20:90] = (*rng.integers(0, 200, 3), 255)
                pixels[40:60, 30 : 40 + 3 * number] = (*rng.integers(0, 255, 3), 255)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "WEBP", lossless=True)
                entry = tarfile.TarInfo(icon.member)
                entry.size = len(buffer.getvalue())
                tar.addfile(entry, io.BytesIO(buffer.getvalue()))
                icons.append(icon)
    (folder / "index.tsv").write_text(write_index(icons))
    (folder / "concepts.json").write_text(json.dumps(concepts))
    return folder, IconWorld.open(folder)


@lru_cache(maxsize=1)
def random_clip():
    tokenizer = make_tokenizer([f"thing {i}, noto style" for i in range(CONCEPTS)], vocab_size=100)
    return make_clip(len(tokenizer)).eval(), tokenizer


class Pipe:
    """Draws a colour that depends on prompt and seed; has a random CLIP and no latent."""

    device = torch.device("cpu")

    def __init__(self, breaks_at=None):
        clip, tokenizer = random_clip()
        self.image = SimpleNamespace(clip=clip)
        self.dtype = torch.float32
        self.parts = SimpleNamespace(hash="0123", text=SimpleNamespace(tokenizer=tokenizer))
        self.calls, self.breaks_at = [], breaks_at

    def __call__(self, prompts, *, seed, **settings):
        if len(self.calls) == self.breaks_at:
            raise KeyboardInterrupt
        self.calls.append(prompts)
        colours = [tuple(int(255 * hash_fraction(f"{p}/{seed + i}/{c}")) for c in "rgb") for i, p in enumerate(prompts)]
        images = []
        for colour in colours:
            picture = Image.new("RGB", (128, 128), "white")
            picture.paste(colour, (30, 30, 100, 100))
            images.append(picture)
        return SimpleNamespace(images=images)

    def encode_condition(self, images):
        return images, (8, 8)

    def decode(self, tokens, size=None, output_type="pil"):
        assert output_type == "pt"
        return tokens


@pytest.fixture
def pipe():
    return Pipe()


@pytest.fixture
def no_adapters(monkeypatch):
    monkeypatch.setattr(sets, "MODELS", {})


def names(world, cells):
    icons = world.icons
    return [[(icons[i].style, icons[i].hex) for i in (c.icon, *c.style, c.unseen, c.subject)] for c in cells]


@pytest.mark.parametrize("split", ["combo", "concept", "style"])
def test_references_are_other_concepts_of_the_style_and_the_same_concept_of_another_vendor(world, split):
    icons = world[1].icons
    cells = sets.choose_cells(world[1], split, 100)
    assert cells
    for cell in cells:
        target = icons[cell.icon]
        assert target.split == split
        assert target.licence != "CC-BY-SA-4.0"
        for i in (*cell.style, cell.unseen):
            assert icons[i].style == target.style
            assert icons[i].base != target.base
        assert len(set(cell.style)) == 3
        assert icons[cell.unseen].split != "train"
        assert icons[cell.subject].base == target.base
        assert family(icons[cell.subject].style) != family(target.style)
        assert icons[cell.subject].split == ("concept" if split == "concept" else "train")


def test_style_references_come_from_training(world):
    icons = world[1].icons
    assert all(icons[i].split == "train" for cell in sets.choose_cells(world[1], "combo", 100) for i in cell.style)


def test_the_judge_has_not_seen_the_icons_of_the_never_trained_style(world):
    icons = world[1].icons
    for cell in sets.choose_cells(world[1], "style", 100):
        assert not any(is_for_judge(icons[i]) for i in (cell.icon, *cell.style))


def test_few_concepts_of_the_never_trained_style_come_again_with_other_references(world):
    cells = sets.choose_cells(world[1], "style", 40)
    targets = {cell.icon for cell in cells}
    assert len(cells) == 40
    assert len(targets) < 10
    assert len({cell.style for cell in cells}) > len(targets)


def test_the_cells_depend_on_the_seed_alone(world):
    shuffled = IconWorld(world[1].icons[::-1], world[1].concepts, world[1].places)
    assert (
        names(world[1], sets.choose_cells(world[1], "combo", 5))[0][0]
        == (names(shuffled, sets.choose_cells(shuffled, "combo", 5))[0][0])
    )
    assert sets.choose_cells(world[1], "combo", 8) != sets.choose_cells(world[1], "combo", 8, seed=1)


WORDS = sets.SPECS[0]


def test_a_broken_run_goes_on_with_the_same_images(world, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "BATCH", 2)
    monkeypatch.setattr(sets, "SAVE_EVERY", 1)
    cells = sets.choose_cells(world[1], "combo", 7)
    whole, _ = sets.draw_set(Pipe(), None, WORDS, world[1], cells, tmp_path / "whole")
    broken, rest = Pipe(breaks_at=2), Pipe()
    with pytest.raises(KeyboardInterrupt):
        sets.draw_set(broken, None, WORDS, world[1], cells, tmp_path / "broken")
    again, _ = sets.draw_set(rest, None, WORDS, world[1], cells, tmp_path / "broken")
    assert len(rest.calls) == 2  # 4 of 7 were kept
    assert torch.equal(again, whole)


def test_images_of_another_seed_or_model_are_not_taken(world, tmp_path, pipe):
    cells = sets.choose_cells(world[1], "combo", 3)
    first, _ = sets.draw_set(pipe, None, WORDS, world[1], cells, tmp_path)
    sets.draw_set(pipe, None, WORDS, world[1], cells, tmp_path)
    assert len(pipe.calls) == 1
    other, _ = sets.draw_set(pipe, None, WORDS, world[1], cells, tmp_path, seed=9)
    assert len(pipe.calls) == 2
    assert not torch.equal(first, other)
    pipe.parts.hash = "4567"
    sets.draw_set(pipe, None, WORDS, world[1], cells, tmp_path, seed=9)
    assert len(pipe.calls) == 3


def test_edges_are_shown_as_the_true_icons_lines(world):
    cell = sets.choose_cells(world[1], "combo", 1)[0]
    shown = np.asarray(sets.shown(world[1], cell, "edges")[0])
    assert shown.shape == (128, 128, 3)
    assert set(np.unique(shown)) == {0, 255} and shown.mean() > 128  # ink on paper
    assert len(sets.shown(world[1], cell, "three")) == 3


def suite(world, pipe, folder, **settings):
    bench = tiny.make_bench(world[1], pipe, Judge(sorted(STYLES)).eval())
    scenes = tiny.draw_scenes(bench, tiny.SPECS, folder / "images", count=8, **settings)
    return bench, scenes


def test_missing_adapters_are_skipped_and_listed(world, tmp_path, pipe, no_adapters):
    bench, scenes = suite(world, pipe, tmp_path)
    assert {name for scene in scenes for name in scene.specs} == {"words", "none", "concept-words", "new-none"}
    assert {"set": "style", "why": "no adapter tiny/style"} in bench.skipped
    assert len(bench.skipped) + 4 == len(tiny.SPECS)


def test_real_icons_are_their_own_ceiling(world, tmp_path, pipe, no_adapters):
    bench, scenes = suite(world, pipe, tmp_path)
    for scene in scenes:
        scene.specs.clear()
        scene.images.clear()
    actual, threshold = tiny.measure(bench, scenes)
    assert threshold >= 0
    table = {(r.measure, r.split, r.case): r for r in actual}
    for split in ("combo", "concept", "style"):
        similarity = table[rows.SIMILARITY, split, rows.LATENT]
        assert similarity.value == pytest.approx(1, abs=1e-4)  # this latent loses nothing
        for measure in (rows.STYLE, rows.TOP5):
            share = table[measure, split, rows.LATENT].of_ceiling
            assert share is None or share == [1, 1, 1]


def test_the_judge_answers_with_styles_of_the_training_licences(world, pipe):
    bench = tiny.make_bench(world[1], pipe, Judge(sorted(STYLES)))
    assert bench.among == sorted(set(STYLES) - {"openmoji"})


def test_equal_labels_are_one(world, pipe):
    bench = tiny.make_bench(world[1], pipe, Judge(sorted(STYLES)))
    assert len(bench.labels) == CONCEPTS - 1
    assert bench.texts.shape == (CONCEPTS - 1, 192)


def test_evaluate_writes_figures_and_a_page(world, tmp_path, pipe, no_adapters, monkeypatch):
    monkeypatch.setattr("condit.drawing.loading.load", lambda model, dtype=None: pipe)
    monkeypatch.setattr(tiny, "load_judge", lambda: Judge(sorted(STYLES)).eval())
    result = tiny.evaluate(tmp_path, data=world[0], count=8, sets=["words", "none"], tell=lambda line: None)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    assert result["command"].startswith("condit evaluate tiny --data ICONS --count 8")
    assert str(world[0]) not in (tmp_path / "evaluation.json").read_text()
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img") == page.count('src="data:') >= 3
    assert "://" not in page  # pictures in base64 have no colon
    with Image.open(tmp_path / "sheets" / "words.png") as sheet:
        assert sheet.width > 500
    near = [r for r in result["rows"] if r["measure"] == rows.DUPLICATES]
    assert {r["case"] for r in near} == {"style word", "no control", "real icons"}
    assert all(r["low"] <= r["value"] <= r["high"] for r in result["rows"])


def test_an_unknown_set_or_count_is_refused(tmp_path, world):
    with pytest.raises(ValueError, match="There is no set 'worms'. Choose from: words"):
        tiny.evaluate(tmp_path, data=world[0], sets=["worms"])
    with pytest.raises(ValueError, match="at least 1; found 0"):
        tiny.evaluate(tmp_path, data=world[0], count=0)


def test_the_subjects_reference_is_compared_with_the_words_alone_and_the_true_icon(world):
    cells = sets.choose_cells(world[1], "combo", 4)
    scene = rows.Scene("combo", cells, [world[1].icons[c.icon] for c in cells])
    spec = next(s for s in sets.SPECS if s.name == "subject")
    red, green = (torch.full((4, 3, 128, 128), 255, dtype=torch.uint8) for _ in range(2))
    red[:, 1:, 30:90, 30:90] = 0
    green[:, ::2, 40:100, 10:80] = 0
    scene.images = {"real": green, "other": red, "subject": red.clone(), "words": green.clone()}
    assert rows.subject_rows(scene) == []  # the set was not drawn
    scene.specs["subject"] = spec
    values = {(r.measure, r.case): r.value for r in rows.subject_rows(scene)}
    assert len(values) == 6
    assert values[rows.SUBJECT_EDGES, spec.what] == pytest.approx(1, abs=1e-3)
    assert values[rows.SUBJECT_COLOUR, spec.what] == 0
    assert values[rows.SUBJECT_EDGES, rows.WORDS_ALONE] == values[rows.SUBJECT_EDGES, rows.REAL] < 0.9
    assert values[rows.SUBJECT_COLOUR, rows.WORDS_ALONE] == values[rows.SUBJECT_COLOUR, rows.REAL] > 50
    scene.images["real"] = rows._gray(green)  # a black and white target cannot have the reference's colours
    assert {r.measure for r in rows.subject_rows(scene)} == {rows.SUBJECT_EDGES}


def row(measure, case, value, share=None, split="combo"):
    return FigureRow(measure, split, case, value, value, value, 512, share)


def test_criteria_compare_with_ceiling_and_baseline():
    table = [
        row(rows.STYLE, "style word", 0.6, [0.84, 0.8, 0.9]),
        row(rows.STYLE, "style reference", 0.55, [0.80, 0.7, 0.9]),
        row(rows.STYLE, "no control", 0.2, [0.1, 0.1, 0.1]),
        row(rows.LEAKAGE, "style reference", 0.10),
        row(rows.F1, "style word and edges", 0.8),
        row(rows.F1, rows.WORDS_ALONE, 0.41),
    ]
    holds = {entry["text"]: entry["holds"] for entry in rows.criteria(table)}
    assert holds == {
        "style word, share of the ceiling": False,  # 0.84 of 0.85
        "style reference, share of the ceiling": True,
        "style reference, at least 3 times no control": False,  # 0.55 of 0.60
        "leakage of the style reference, at most": True,
        "edge F1, at least twice no control": False,  # 0.80 of 0.82
    }


RESULT = {
    "command": "condit evaluate tiny",
    "hash": "0123",
    "seconds": {"all": 3.0},
    "criteria": [{"text": "leakage", "value": 0.2, "wanted": 0.1, "holds": False}],
    "rows": [vars(row(rows.STYLE, "style word", 0.6, [0.8, 0.7, 0.9]))],
    "skipped": [{"set": "gray", "why": "no adapter tiny/gray"}],
}


def test_the_table_takes_its_place_in_a_document(tmp_path):
    document = tmp_path / "tiny.md"
    prose = "It stands between `<!-- evaluation -->` and `<!-- /evaluation -->`.\n"
    document.write_text(f"before\n{prose}<!-- evaluation -->\nold\n<!-- /evaluation -->\nafter\n")
    for _ in range(2):
        tiny.write_table(RESULT, document)
    text = document.read_text()
    assert text.startswith(f"before\n{prose}<!-- evaluation -->\n") and text.endswith("after\n")
    assert "old" not in text
    assert text.count("| style word | 0.600 | 0.600 to 0.600 | 0.80 (0.70 to 0.90) |") == 1
    assert "**missed**" in text
    assert "Left out: gray (no adapter tiny/gray)." in text


def test_a_document_without_a_place_for_the_table_is_left_alone(tmp_path):
    document = tmp_path / "tiny.md"
    document.write_text("mine\n")
    with pytest.raises(ValueError, match="Put them where the figures belong"):
        tiny.write_table(RESULT, document)
    assert document.read_text() == "mine\n"
    assert tiny.write_table(RESULT, tmp_path / "new.md").read_text().startswith("`condit evaluate tiny`")
