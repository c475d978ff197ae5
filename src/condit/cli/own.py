"""Controls and edit methods from a user's own file: FILE.py:NAME. condit runs only files that the user names."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path


def is_own(name: str) -> bool:
    """Whether a name refers to code in a file: FILE.py:NAME."""
    file, colon, attribute = name.rpartition(":")
    return bool(colon) and file.endswith(".py") and attribute.isidentifier()


def load_own(name: str) -> Callable[..., object]:
    """Runs FILE.py and returns its NAME. Raises FileNotFoundError without the file, ValueError without the name."""
    file, _, attribute = name.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no file {file}; --control takes FILE.py:NAME=REF with a file of your own")
    module_name = f"condit_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} cannot be run as a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    member: object = getattr(module, attribute, None)
    if not callable(member):
        raise ValueError(f"{file} defines no class or function {attribute!r}.")
    return member


def refuse_unnamed(names: Iterable[str], allowed: Collection[str]) -> dict[str, str]:
    """Name in a recipe -> the name that the user allows for it. Raises ValueError for code that the user did not name:
    images, and the recipes in them, may come from strangers."""
    by_end = {f"{Path(name.rpartition(':')[0]).name}:{name.rpartition(':')[2]}": name for name in allowed}
    chosen = {}
    for name in names:
        file, _, attribute = name.rpartition(":")
        end = f"{Path(file).name}:{attribute}"
        if end not in by_end:
            raise ValueError(
                f"This image was generated with the code {name!r}. condit runs only files that you name: add "
                f"--control PATH/{end}"
            )
        chosen[name] = by_end[end]
    return chosen
