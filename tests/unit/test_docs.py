"""The documentation names what is there: files, tests and pages; papers in the house's order, figures with commands."""

import ast
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

import cli_page
from condit.cli import app

ROOT = Path(__file__).parents[2]
PAPERS = sorted((ROOT / "docs" / "papers").glob("*.md"))
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "README.zh.md"]
LINE = re.compile(r"^(?:python|pytest|condit) ", re.M)
COMMAND = re.compile(rf"`(?:(?:python|pytest|condit)\s|benchmarks/)[^`]*`|{LINE.pattern}", re.M)
FOLDERS = ("src", "lab", "deploy", "tests", "benchmarks", "recipes", "docs", "examples")
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


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, by GitHub's rule."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_heading_that_a_page_links_is_there(page):
    links = re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", text_of(page))
    targets = [(page.parent / file if file else page, anchor) for file, anchor in links]
    assert [f"{file.name}#{anchor}" for file, anchor in targets if anchor not in anchors(file)] == []


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@each_page
def test_every_python_snippet_of_a_page_parses(page):
    for snippet in snippets(page):
        ast.parse(snippet)


def test_what_a_page_quotes_of_a_file_stands_there():
    quotes = [
        (page.name, file, [line.strip() for line in quote.splitlines()])
        for page in PAGES
        for file, quote in re.findall(
            r"^<!-- from (\S+) -->\n```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S
        )
    ]
    files = {
        file: [line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()] for _, file, _ in quotes
    }
    wrong = [q for q in quotes if q[2] not in (files[q[1]][i : i + len(q[2])] for i in range(len(files[q[1]])))]
    assert quotes and wrong == []


def test_the_control_of_the_chinese_page_acts_and_does_nothing_at_factor_one(make_pipe, monkeypatch):
    module = types.ModuleType("sharpen")
    monkeypatch.setitem(sys.modules, "sharpen", module)  # where dataclasses look up annotations
    exec(snippets(ROOT / "docs" / "zh" / "write-a-control.md")[0], vars(module))
    pipe = make_pipe()

    def generate(*controls) -> torch.Tensor:
        return pipe("a fox", controls=controls, seed=0, output_type="latent").images

    assert torch.equal(generate(module.Sharpen(1.0)), generate())
    assert not torch.equal(generate(module.Sharpen(1.5)), generate())


def test_the_page_of_the_command_line_is_that_of_the_commands():
    assert cli_page.PAGE.read_text(encoding="utf-8") == cli_page.page(), "run python tests/cli_page.py"


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `condit` in a page's blocks of commands."""
    text = text_of(page).replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.M | re.S)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("condit ")]


@each_page
def test_every_command_of_a_page_is_understood(page):
    for arguments in commands(page):
        command = typer.main.get_command(app)
        while "commands" in vars(command):
            command = vars(command)["commands"][arguments.pop(0)]
        command.make_context("condit", arguments)  # raises for an unknown option or a missing argument


def test_the_options_of_the_words_of_other_programs_are_there():
    words = (ROOT / "docs" / "words.md").read_text(encoding="utf-8")
    known = cli_page.PAGE.read_text(encoding="utf-8")
    assert [
        option for option in re.findall(r"--[a-z][a-z-]+", words) if f"{option} " not in known.replace("`", " ")
    ] == []


def sections(page: Path) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", text_of(page), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text: str) -> Iterator[tuple[str, str, str]]:
    """What stands between a table and the one before it, the table, and the rest. Of a part that a command has written
    only the first table counts: they have one command."""
    text = re.sub(r"(<!-- [^/].*?\n(?:\|.*?\n)+).*?(?=<!-- /)", r"\1", text, flags=re.S)
    end = 0
    for table in re.finditer(r"(?:^\|.*\n)+", text, re.M):
        yield text[end : table.start()], table[0], text[table.end() :]
        end = table.end()


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.name)
def test_a_page_of_a_paper_has_the_common_order_and_a_command_for_its_figures(page):
    parts = sections(page)
    names = list(parts)
    assert names[0] == "Why" and names[-2:] == ["What we measured", "Limits"]
    assert set(names) & {"Method", "Protocol"}
    for before, table, after in tables(parts["What we measured"]):
        said = COMMAND.search(before) or COMMAND.search(table) or LINE.search(after)
        assert said, f"no command for the table\n{table[:200]}"
