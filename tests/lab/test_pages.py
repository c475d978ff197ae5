"""suites/pages.py and suites/claims.py: places of a page, and what stands in docs/claims.md."""

import re
from pathlib import Path

import pytest

from condit_lab.suites import pages
from condit_lab.suites.claims import KIND, Claim, Measured, block, write
from condit_lab.suites.class_claims import CLAIMS, class_claims
from condit_lab.suites.classes import ACCURACY, AGREEMENT, CLIP, CONCEPT, CONCEPT5, DISTANCE, ERROR, JUDGE
from condit_lab.suites.style_claims import CLAIMS as STYLE_CLAIMS

PAGE = "a\n<!-- x:one -->\nold\n<!-- /x -->\nb\n<!-- x:two -->\n<!-- /x -->\n<!-- y:one -->\nkept\n<!-- /y -->\n"
DOCS = Path(__file__).parents[2] / "docs" / "claims.md"


def test_places_of_a_kind_are_filled_by_name_and_the_rest_stays():
    assert pages.names(PAGE, "x") == ["one", "two"]
    filled = pages.fill(PAGE, "x", {"one": "1\n", "two": "2\n"}.get)
    assert filled == PAGE.replace("old", "1").replace("<!-- x:two -->\n", "<!-- x:two -->\n2\n")
    assert pages.fill(PAGE, "x", lambda name: None) == PAGE
    assert pages.fill(filled, "x", {"one": "old\n", "two": ""}.get) == PAGE


def test_a_file_without_the_place_is_left_as_it_is(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    with pytest.raises(ValueError, match="no place for 'three'"):
        pages.fill_file(page, "x", {"one": "1\n", "three": "3\n"})
    assert page.read_text() == PAGE
    pages.fill_file(page, "x", {"two": "2\n"})
    assert "old" in page.read_text() and "\n2\n" in page.read_text()


def test_a_block_says_paper_command_figures_intervals_and_n_or_that_it_was_not_run():
    claim = Claim("It says 7.", "condit evaluate X")
    assert (
        block(claim) == "**The paper.** It says 7.\n\n**Measured.** Not run yet. `condit evaluate X` would fill this.\n"
    )
    rows = [Measured("error", 0.25, 0.2, 0.3, 1512), Measured("parameters", 1234567, None, None, None, 0)]
    text = block(claim, rows, note="500 steps.")
    assert "It says 7." in text and "**Measured** by `condit evaluate X`. 500 steps." in text
    assert "| error | 0.250 | 0.200 to 0.300 | 1,512 |" in text
    assert "| parameters | 1,234,567 |  |  |" in text


def interval(value: float) -> dict:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 64}


def result(**other) -> dict:
    common = {"depth": 6, "width": 256, "steps": 500, "images_seen": 32000}
    models = {
        "small-dit": {**common, "backbone": "DiT", "adaln": "zero", "parameters": 8_000_000},
        "small-diffit": {**common, "backbone": "DiffiT", "adaln": None, "parameters": 6_000_000, **other},
        "small-dit-adaln": {**common, "backbone": "DiT", "adaln": "plain", "parameters": 7_000_000},
        "vit": {**common, "backbone": "ViT", "adaln": None, "parameters": 3_000_000},
        "vit-concept": {**common, "backbone": "ViT", "adaln": None, "parameters": 3_100_000},
    }
    figures = [
        {"model": name, "measure": measure, "interval": interval(value + i), "less": interval(float(i)) if i else None}
        for i, name in enumerate(list(models)[:3])
        for measure, value in ((ERROR, 0.5), (AGREEMENT, 0.3), (DISTANCE, 9.0))
    ]
    for name, measure, value in (
        ("vit", ACCURACY, 70.0), (JUDGE, ACCURACY, 77.0), ("vit-concept", CONCEPT, 30.0),
        ("vit-concept", CONCEPT5, 50.0), (CLIP, CONCEPT, 23.0), (CLIP, CONCEPT5, 49.0),
    ):  # fmt: skip
        less = interval(7.0) if name == JUDGE else None
        figures.append({"model": name, "measure": measure, "interval": interval(value), "less": less})
    first = {f["measure"]: f["model"] for f in reversed(figures)}
    return {"models": models, "figures": figures, "first": first, "command": "condit evaluate runs"}


def test_class_claims_hold_the_figures_of_their_own_runs():
    claims = class_claims(result())
    assert claims.keys() == CLAIMS.keys()
    assert "| parameters, DiffiT | 6,000,000 |" in claims["diffit-dit"] and "8,000,000" in claims["diffit-dit"]
    assert f"| {ERROR}, DiffiT minus DiT, the same icons | 1.0000 | 0.9900 to 1.0100 | 64 |" in claims["diffit-dit"]
    assert f"| {ERROR}, DiT, plain adaLN minus DiT, the same icons | 2.0000 |" in claims["adaln-zero"]
    assert "Depth 6, width 256, trained for 500 steps on 32,000 pictures" in claims["adaln-zero"]
    assert f"| {ACCURACY}, ViT | 70.0 |" in claims["vit-style"] and f"{JUDGE} | 77.0 |" in claims["vit-style"]
    assert f"| {ACCURACY}, {JUDGE} minus ViT, the same icons | 7.0 |" in claims["vit-style"]
    assert f"| {CONCEPT}, {CLIP} | 23.0 |" in claims["vit-concept"] and "49.0" in claims["vit-concept"]
    assert "Not run yet" not in "".join(claims.values())


@pytest.mark.parametrize("other", [{"depth": 12}, {"width": 384}, {"steps": 700}, {"images_seen": 1}])
def test_runs_that_differ_in_more_than_the_backbone_answer_no_claim(other):
    assert "diffit-dit" not in class_claims(result(**other))


def test_the_page_of_claims_says_of_each_what_was_measured_or_that_it_was_not():
    text = DOCS.read_text(encoding="utf-8")
    claims = CLAIMS | STYLE_CLAIMS
    assert len(claims) == len(CLAIMS) + len(STYLE_CLAIMS) and set(claims) <= set(pages.names(text, KIND))
    for match in re.finditer(r"<!-- claims:(\S+) -->\n(.*?)<!-- /claims -->", text, re.S):
        assert "**The paper.**" in match[2]
        measured = re.search(r"\*\*Measured\*\* by `(condit|python benchmarks/\w+\.py) ", match[2])
        assert (measured is not None) != ("Not run yet" in match[2])
        if match[1] in claims and "Not run yet" in match[2]:
            assert match[2] == block(claims[match[1]])


def test_measured_claims_replace_what_was_not_run(tmp_path):
    page = tmp_path / "claims.md"
    page.write_text(DOCS.read_text(encoding="utf-8"))
    write(page, {name: text for name, text in class_claims(result()).items() if name == "vit-style"})
    text = page.read_text()
    assert f"| {ACCURACY}, ViT | 70.0 |" in text
