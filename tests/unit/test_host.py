"""Pipelines are what adapters expect of one: `controls.host.Host`. pyright checks `as_host`, this file the names."""

import pytest

from condit.controls.host import Host
from condit.drawing.pipeline import Pipeline
from condit.interop.guest import Guest


def as_host(pipe: Pipeline, guest: Guest) -> list[Host]:
    return [pipe, guest]


@pytest.mark.parametrize("kind", [Pipeline, Guest])
def test_pipelines_have_all_that_adapters_need(kind):
    made_in_init = {"name", "size", "image", "backbone", "adapts_text"}
    needed = {name for name in vars(Host) if not name.startswith("_")}
    assert "read_images" in needed and not needed - made_in_init - set(dir(kind))
