"""The command line called in this process, in an empty folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from condit.cli import main
from condit.data.images import save_image


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """run("generate", ...) -> exit code, stdout, stderr; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONDIT_OUTPUT_DIR", raising=False)

    def call(*arguments: str) -> tuple[int | str | None, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def picture(tmp_path) -> Path:
    return save_image(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), tmp_path / "ref.png"
    )
