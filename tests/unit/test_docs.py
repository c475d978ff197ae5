"""The documentation names what is there: files, tests and pages; papers in the house's order, figures with commands."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAPERS = sorted((ROOT / "docs" / "papers").glob("*.md"))
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "README.zh.md"]
COMMAND = re.compile(r"`(?:python |pytest |condit |benchmarks/)[^`]*`|^(?:python|pytest|condit) ", re.M)
FOLDERS = ("src", "tests", "benchmarks", "recipes", "docs")
PATHS = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
TESTS = {
    name
    for path in (ROOT / "tests").rglob("*.py")
    for name in re.findall(r"^\s*def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    """Without code that shows what a reader would write, but with its command lines."""
    return re.sub(r"```(?:python|toml)\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)


def is_there(name: str) -> bool:
    return any(path == name or path.endswith(f"/{name}") for path in PATHS)


@each_page
def test_every_file_that_a_page_names_is_there(page):
    named = re.findall(r"`([\w./-]+\.(?:py|toml))(?:::[\w.]+)?`", text_of(page))
    assert [name for name in named if not is_there(name)] == []


@each_page
def test_every_test_that_a_page_names_is_there(page):
    named = re.findall(r"(?<![\w/])test_\w+(?!\.py)\b", text_of(page))
    # A name may be cut: `test_leaving_...`.
    lost = [n for n in named if not any(n == test or (n.endswith("_") and test.startswith(n)) for test in TESTS)]
    assert [name for name in lost if not is_there(f"{name}.py")] == []


@each_page
def test_every_page_that_a_page_links_is_there(page):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text_of(page))
    assert [link for link in links if not (page.parent / link).exists()] == []


def sections(page: Path) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", text_of(page), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text: str) -> Iterator[tuple[str, str]]:
    """Each table, and what stands between the one before and it; in a part that a command writes, all that stands in it
    so far."""
    before: list[str] = []
    table: list[str] = []
    written = False
    for line in [*text.splitlines(), ""]:
        written = bool(re.match("<!-- [^/]", line)) or (written and not line.startswith("<!-- /"))
        if line.startswith("|"):
            table.append(line)
            continue
        if table:
            yield "\n".join(before), "\n".join(table)
            before, table = before if written else [], []
        before.append(line)


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.name)
def test_a_paper_is_told_in_the_houses_order_and_its_figures_have_their_commands(page):
    found = sections(page)
    names = list(found)
    assert names[0] == "Why" and names[-2:] == ["What we measured", "Limits"]
    assert set(names) & {"Method", "Protocol"}
    for before, table in tables(found["What we measured"]):
        assert COMMAND.search(before) or COMMAND.search(table), f"no command for the table\n{table[:200]}"
