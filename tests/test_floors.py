"""The house has floors (docs/architecture.md): a module imports lower floors or its own room, never in a circle."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "condit"

FLOORS = {
    **dict.fromkeys(["cli", "serve"], 8),
    **dict.fromkeys(["training", "rulers", "pairs"], 7),
    "interop": 6,
    "drawing": 5,
    "weights": 4,
    "controls": 3,
    **dict.fromkeys(["backbones", "jobs"], 2),
    **dict.fromkeys(["nn", "diffusion", "encoders", "data"], 1),
}
DOORS = {"cli", "serve"}
TORCH_ONLY = {"nn", "diffusion"}


def module_of(path: Path, root: Path) -> str:
    parts = ["condit", *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room of condit.data.images is data; condit itself is the door above all floors."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def is_module(name: str, root: Path) -> bool:
    path = root.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports_of(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, imported module) for every import in the file, those inside functions and TYPE_CHECKING too."""
    here = module_of(path, root)
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - (node.level - 1)]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from condit import data` names a module, `from condit import load` does not
                if (base, alias.name) == ("condit", "__version__"):
                    continue  # a constant that everybody may write into a file
                full = f"{base}.{alias.name}"
                yield node.lineno, full if base.split(".")[0] == "condit" and is_module(full, root) else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def breach(here: str, other: str) -> str | None:
    """Why `here` may not import `other`, or None."""
    room, top = room_of(here), other.split(".")[0]
    if room is None:
        return None  # condit/__init__.py and __main__.py open every door
    if room not in FLOORS:
        return f"{here} stands on no floor; add {room!r} to FLOORS and to the picture in docs/architecture.md"
    if top != "condit":
        if room in TORCH_ONLY and top not in sys.stdlib_module_names and top != "torch":
            return f"{here} imports {other}; {room} imports torch only"
        return None
    target = room_of(other)
    if target is None and room in DOORS:
        return None
    if target is None:
        return f"{here} imports the package's door; import the module where the name is made"
    if target not in FLOORS:
        return f"{here} imports {other}, which stands on no floor"
    if target == room or {room, target} <= DOORS:
        return None
    if FLOORS[target] >= FLOORS[room]:
        return f"{here} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[target]})"
    return None


def breaches(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line}: {reason}"
        for path in sorted(root.rglob("*.py"))
        for line, other in imports_of(path, root)
        if (reason := breach(module_of(path, root), other))
    ]


def circles(root: Path) -> list[list[str]]:
    """Files that import each other in a circle (Tarjan's strongly connected components of more than one)."""
    graph = {
        module_of(path, root): {name for _, name in imports_of(path, root) if is_module(name, root)}
        for path in root.rglob("*.py")
    }
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph.get(module, set()) - {module}:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                circles.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return circles


def test_modules_import_lower_floors_only():
    assert breaches(SOURCE) == []


def test_there_are_at_most_eight_floors_and_every_room_stands_on_one():
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms == set(FLOORS) and max(FLOORS.values()) <= 8


def test_no_files_import_in_a_circle():
    assert circles(SOURCE) == []


def test_a_planted_circle_is_detected(tmp_path):
    (tmp_path / "nn").mkdir()
    (tmp_path / "nn" / "a.py").write_text("from condit.nn import b")
    (tmp_path / "nn" / "b.py").write_text("if TYPE_CHECKING:\n    from condit.nn.a import x")
    (tmp_path / "nn" / "c.py").write_text("from condit.nn.a import x")
    assert circles(tmp_path) == [["condit.nn.a", "condit.nn.b"]]


def test_the_package_never_imports_its_laboratory():
    names = [(path, name) for path in SOURCE.rglob("*.py") for _, name in imports_of(path, SOURCE)]
    assert [path for path, name in names if name.split(".")[0] == "condit_lab"] == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("nn/x.py", "from condit.controls.omini import OminiControl"),
        ("nn/x.py", "import numpy"),
        ("data/x.py", "from condit.nn import attention"),
        ("backbones/x.py", "def f():\n    from condit.controls import omini"),
        ("backbones/x.py", "from ..controls.omini import OminiControl"),
        ("controls/sub/x.py", "from ...weights import files"),
        ("backbones/x.py", "if TYPE_CHECKING:\n    from condit.drawing.pipeline import Pipeline"),
        ("training/x.py", "import condit.cli.demo"),
        ("encoders/x.py", "from condit import load"),
        ("weights/x.py", "from condit import drawing"),
        ("data/x.py", "importlib.import_module('condit.cli')"),
        ("drawing/pipeline.py", "from condit.cli import main"),
        ("cellar/x.py", "import torch"),
    ],
)
def test_a_planted_breach_is_found(tmp_path, file, line):
    for known in ("nn", "backbones", "controls/sub", "weights", "data", "drawing", "cli"):
        (tmp_path / known).mkdir(parents=True)
    (tmp_path / "drawing" / "pipeline.py").touch()
    planted = tmp_path / file
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(line)
    broken = breaches(tmp_path)
    assert len(broken) == 1
    assert broken[0].startswith(file)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("cli.py", "from condit.cli.demo import draw\nimport condit"),
        ("controls/x.py", "from condit import __version__"),
        ("drawing/pipeline.py", "from condit.weights.files import read_tensors"),
        ("controls/x.py", "from .control import Control\nfrom condit.nn.attention import Call"),
        ("data/x.py", "from condit import data\nimport numpy"),
        ("nn/x.py", "import math, torch\nfrom torch import Tensor"),
        ("__init__.py", "from condit.drawing.pipeline import load"),
    ],
)
def test_a_lawful_import_passes(tmp_path, file, line):
    for known in ("nn", "controls", "data", "drawing"):
        (tmp_path / known).mkdir()
    planted = tmp_path / file
    planted.write_text(line)
    assert breaches(tmp_path) == []
