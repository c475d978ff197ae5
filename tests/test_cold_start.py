"""What the first second costs: help, version and usage errors import none of the heavy libraries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "skimage", "scipy", "tokenizers")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}


def loaded_after(code: str) -> set[str]:
    script = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["nonsense"]])
def test_the_command_line_starts_without_heavy_libraries(arguments):
    assert loaded_after(f"from condit.cli import main; sys.exit(main({arguments!r}))") == set()


def test_importing_condit_imports_no_heavy_library():
    assert loaded_after("import condit; dir(condit)") == set()


def test_reading_pictures_needs_no_torch():
    assert loaded_after("from condit.data.images import load_image, save_image, read_recipe") == set()
