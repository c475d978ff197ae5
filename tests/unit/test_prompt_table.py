"""data/prompt_table.py: a table of prompts, pictures of them, and the groups that DEADiff's pairs are drawn from."""

import random
from functools import partial

import pytest
from PIL import Image

from condit.data.grouped import GroupedPairs
from condit.data.images import load_image
from condit.data.pairs import check, open_pairs
from condit.data.prompt_table import PromptRow, prompt_table, read_words
from condit.jobs.groups import Generator, groups_job
from condit.jobs.local import draw as draw_locally
from condit.jobs.run import Outcome, run

SUBJECTS, STYLES = ["a fox", "a rocket", "snow"], ["oil painting", "line art", "3d render", "pixel art"]


class Painter:
    """Stands for a text-to-image model: the seed is the colour."""

    def __init__(self):
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, prompt: str, seed: int, count: int) -> list[Image.Image]:
        self.calls.append((prompt, seed, count))
        colours = [(seed + k).to_bytes(4, "big")[1:] for k in range(count)]
        return [Image.new("RGB", (4, 4), tuple(colour)) for colour in colours]


def draw_groups(folder, table, generate, images: int = 4) -> Outcome:
    return run(groups_job(folder, table, Generator(generate), images=images), partial(draw_locally, workers=1))


def test_a_table_is_seeded_and_a_subject_keeps_its_styles_when_others_come():
    table = prompt_table(SUBJECTS, STYLES, per_subject=2)
    assert [row.subject for row in table] == [s for s in SUBJECTS for _ in (0, 1)]
    assert all(row.prompt == f"{row.subject}, {row.style}" for row in table) and len(set(table)) == 6
    assert prompt_table(SUBJECTS[1:], STYLES, per_subject=2) == table[2:]
    others = [prompt_table(SUBJECTS, STYLES, per_subject=2, seed=seed) for seed in range(1, 4)]
    assert any(other != table for other in others)
    assert prompt_table(["x"], ["y"], per_subject=1, template="{style} of {subject}") == [PromptRow("x", "y", "y of x")]


def test_pairs_of_a_generated_set_share_their_prompt_or_their_subject(tmp_path):
    table = prompt_table(SUBJECTS, STYLES, per_subject=2)
    painter = Painter()
    draw_groups(tmp_path, table, painter, images=3)
    assert [(prompt, count) for prompt, _, count in painter.calls] == [(row.prompt, 3) for row in table]
    assert len({seed + k for _, seed, count in painter.calls for k in range(count)}) == 18  # no noise twice
    report = check(tmp_path)
    assert (report.pairs, report.problems, report.groups) == (18, (), {"style": 6, "content": 3})
    pairs, rng = GroupedPairs(open_pairs(tmp_path)), random.Random(0)
    subject = {row.prompt: row.subject for row in table}
    text_of = {str(pair.image): pair.text for pair in (pairs.pairs[i] for i in range(18))}
    for _ in range(50):
        target, reference = pairs.draw(rng, "style")
        assert reference != target.image and text_of[str(reference)] == target.text
        target, reference = pairs.draw(rng, "content")
        other = text_of[str(reference)]
        assert other != target.text and subject[other] == subject[target.text]


def test_a_run_that_stopped_goes_on_and_a_table_may_grow(tmp_path):
    table = prompt_table(SUBJECTS, STYLES, per_subject=2)

    def stops(prompt: str, seed: int, count: int) -> list[Image.Image]:
        if prompt == table[2].prompt:
            raise RuntimeError("out of memory")
        return Painter()(prompt, seed, count)

    assert draw_groups(tmp_path, table, stops, images=2).errors == {table[2].prompt: "RuntimeError: out of memory"}
    painter, file = Painter(), tmp_path / "metadata.jsonl"
    draw_groups(tmp_path, table, painter, images=2)
    assert [prompt for prompt, _, _ in painter.calls] == [table[2].prompt]
    before = [load_image(open_pairs(tmp_path)[i].image).getpixel((0, 0)) for i in range(12)]
    again = Painter()
    draw_groups(tmp_path, [*table, PromptRow("rain", "oil painting", "rain, oil painting")], again, images=2)
    assert [prompt for prompt, _, _ in again.calls] == ["rain, oil painting"]
    assert [load_image(open_pairs(tmp_path)[i].image).getpixel((0, 0)) for i in range(12)] == before
    assert len(file.read_text().splitlines()) == 14


def test_what_cannot_be_generated_says_why(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("# subjects\n a fox \n\na rocket\n")
    assert read_words(words) == ["a fox", "a rocket"]
    for text, message in (("# none\n", "no phrase"), ("a fox\na fox\n", "'a fox' twice")):
        words.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_words(words)
    with pytest.raises(ValueError, match="per_subject must be 1 to 4, the number of styles; found 14"):
        prompt_table(SUBJECTS, STYLES)
    with pytest.raises(ValueError, match="template must contain"):
        prompt_table(SUBJECTS, STYLES, per_subject=1, template="{subject}")
    table = prompt_table(SUBJECTS, STYLES, per_subject=1)
    with pytest.raises(ValueError, match="a style pair needs two"):
        draw_groups(tmp_path, table, Painter(), images=1)
    with pytest.raises(ValueError, match="no prompt"):
        draw_groups(tmp_path, [], Painter())
    errors = draw_groups(tmp_path, table, lambda prompt, seed, count: []).errors
    assert errors[table[0].prompt] == "the drawer returned 0 images; expected 4"
