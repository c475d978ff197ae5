"""benchmarks/pictures.py: every reference, adapter and control that the pages' pictures name is there."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from condit.weights.catalog import MODELS

FILE = Path(__file__).parent.parent.parent / "benchmarks" / "pictures.py"
NEEDS = {
    "omini": ("tiny/gray", "tiny/edges", "tiny/subject", "tiny/style-tokens"),
    "ip-adapter": ("tiny/style", "tiny-unet/style"),
    "deadiff": ("tiny-unet/deadiff",),
}


@pytest.fixture
def pictures(monkeypatch):
    spec = importlib.util.spec_from_file_location("pictures", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def blank(pipe, prompts, controls, seed):
        assert all(hasattr(control, "around") for control in controls)
        return [Image.new("RGB", pipe.size, "white") for _ in prompts]

    monkeypatch.setattr(module, "drawn", blank)
    return module


@pytest.mark.parametrize("name", NEEDS)
def test_a_page_links_what_it_generates(name, pictures, tmp_path):
    if missing := [adapter for adapter in NEEDS[name] if adapter not in MODELS]:
        pytest.skip(f"without {', '.join(missing)}")
    pictures.main([name, "--out", str(tmp_path)])
    assert Image.open(tmp_path / f"{name}.png").width > 500
