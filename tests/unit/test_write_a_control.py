"""docs/write-a-control.md: its control and its test run as they stand there."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from condit.controls.token_merging import TokenMerging

PAGE = Path(__file__).parent.parent.parent / "docs" / "write-a-control.md"


@pytest.fixture
def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def within(blocks, tmp_path, monkeypatch) -> ModuleType:
    """The page's control as a module of its own."""
    (tmp_path / "within.py").write_text(blocks[0], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("within", tmp_path / "within.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "within", module)
    spec.loader.exec_module(module)
    return module


def test_the_pages_own_test_holds(blocks, within, make_pipe, make_ip, pictures):
    names: dict = {}
    exec(blocks[2], names)
    tests = [test for name, test in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0](make_pipe, make_ip, pictures)


def test_half_an_image_of_merged_tokens_differs_from_none_and_all(within, make_pipe, make_ip, pictures):
    pipe = make_pipe()
    inner, half = make_ip(pipe).control(pictures(1)[0]), torch.zeros(1, 32, 48)
    half[:, :, :24] = 1
    drawn = [
        pipe("a fox", controls=[TokenMerging(0.5, minimum=0), *acting], seed=0, output_type="latent").images
        for acting in ([], [within.Within(inner, half)], [inner])
    ]
    assert not torch.equal(drawn[1], drawn[0]) and not torch.equal(drawn[1], drawn[2])


def test_a_unet_is_refused(within, make_latent):
    with pytest.raises(ValueError, match="Within needs a transformer"):
        make_latent("sd15")("a fox", controls=[within.Within(TokenMerging(), torch.ones(1, 32, 48))], seed=0)
