"""What a process imports: help, version and usage errors none of the heavy libraries, the embedded model only torch."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from condit.data.images import load_image

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "skimage", "scipy", "tokenizers")
HEAVY_OF_TORCH = ("torch._dynamo", "torch._inductor", "sympy")  # torch imports them on first use; a second or more
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}


# Counts what has been imported, not what is still in sys.modules at the end.
SCRIPT = """
import sys
class Record:
    names = set()
    def find_spec(self, name, path=None, target=None):
        self.names.add(name)
sys.meta_path.insert(0, Record())
try:
    {code}
except SystemExit as end:
    assert end.code in {codes}, end.code
print('IMPORTED', *[name for name in {heavy} if name in Record.names | set(sys.modules)])
"""


def loaded_after(code: str, codes: tuple[int | None, ...] = (None, 0)) -> set[str]:
    script = SCRIPT.format(code=code, codes=codes, heavy=HEAVY + HEAVY_OF_TORCH)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("IMPORTED")[2].split())


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["--version"], 0), (["generate", "--help"], 0), (["nonsense"], 2)]
)
def test_the_command_line_starts_without_heavy_libraries(arguments, code):
    assert loaded_after(f"from condit.cli import main; sys.exit(main({arguments!r}))", (code,)) == set()


def test_help_takes_less_than_three_tenths_of_a_second():
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "condit.cli", "--help"], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.3  # of the processor: other processes may share it


def test_importing_condit_imports_no_heavy_library():
    assert loaded_after("import condit; dir(condit)") == set()


def test_reading_images_needs_no_torch():
    assert loaded_after("from condit.data.images import load_image, save_image, read_recipe") == set()


def generated(out: Path, *arguments: str) -> set[str]:
    """What `condit generate` of the embedded model imports; two steps import what twenty do."""
    command = ["generate", "a red apple", "--steps", "2", "-o", str(out), *arguments]
    loaded = loaded_after(f"from condit.cli import main; sys.exit(main({command!r}))")
    assert load_image(out).size == (128, 128)
    return loaded


def test_generating_with_the_embedded_model_imports_torch_and_tokenizers_alone(tmp_path):
    assert generated(tmp_path / "apple.png") == {"torch", "tokenizers"}


@pytest.mark.parametrize("use", ["style", "subject", "gray"])
def test_a_reference_imports_nothing_more(tmp_path, use):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "reference.png")
    reference = [f"--{use}", str(tmp_path / "reference.png")]
    assert generated(tmp_path / "apple.png", *reference) == {"torch", "tokenizers"}


def test_a_heavy_import_is_detected_even_when_it_is_hidden():
    assert loaded_after("import sympy; sys.modules.pop('sympy')") == {"sympy"}
