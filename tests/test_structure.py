"""What keeps the library readable, as numbers: its size, long files, long argument lists, untyped places."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "condit"
# The public calls. Commands have no exception: their options are the fields of dataclasses (cli/options.py).
LONG_CALLS = {
    "drawing/pipeline.py": {"__call__"},
    "drawing/edit.py": {"edit"},
}


def files(folder: Path = SOURCE) -> list[tuple[str, str]]:
    return [(path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")]


def long_functions(text: str, most: int = 10) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if len([name for name in names if name not in ("self", "cls")]) > most:
                yield node.name


# Lines at most; docs/architecture.md says where they are. The core is what papers add to.
LIMITS = {
    ("nn/", "diffusion/", "backbones/", "controls/"): 9_500,
    ("data/", "encoders/", "drawing/", "interop/", "training/"): 11_600,
    ("weights/",): 5_500,
    ("cli/",): 3_050,
    ("serve/",): 2_100,
    ("rulers/",): 2_200,
    ("jobs/",): 700,
    ("pairs/",): 650,
}


def test_every_part_of_the_package_stays_below_its_limit_of_lines():
    lines = {name: text.count("\n") for name, text in files()}
    for rooms, most in LIMITS.items():
        assert sum(count for name, count in lines.items() if name.startswith(rooms)) <= most, rooms
    assert sum(count for name, count in lines.items() if not name.startswith(tuple(sum(LIMITS, ())))) <= 200


@pytest.mark.parametrize("folder", [SOURCE, Path(__file__).parent], ids=["source", "tests"])
def test_no_file_is_longer_than_400_lines(folder):
    assert {name: text.count("\n") for name, text in files(folder) if text.count("\n") > 400} == {}


def test_no_function_takes_more_than_ten_arguments_but_the_public_calls():
    long = {name: set(long_functions(text)) - LONG_CALLS.get(name, set()) for name, text in files()}
    assert {name: names for name, names in long.items() if names} == {}


def test_a_long_function_is_detected():
    assert list(long_functions("def f(a, b, c, d, e, f, g, h, i, j, *, k): ...")) == ["f"]
    assert list(long_functions("def f(self, b, c, d, e, f, g, h, i, j, k): ...")) == []


def test_untyped_places_are_few():
    whole = "\n".join(text for _, text in files())
    assert len(re.findall(r"\bAny\b", whole)) < 120
    assert len(re.findall(r"type: ignore", whole)) < 30


def test_a_name_stands_for_one_class():
    seen: dict[str, str] = {}
    for name, text in files():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert seen.setdefault(node.name, name) == name, f"{node.name} is a class of {seen[node.name]} too"
