"""Fixtures that several files of this folder share."""

from collections.abc import Callable

import numpy as np
import pytest

from worlds import World


@pytest.fixture(scope="session")
def make_world(make_pipe, make_ip, make_omini) -> Callable[..., World]:
    def make(**config) -> World:
        pipe = make_pipe(**config)
        left = {"independent": True, "delta": (0, -6)}
        joint, cached = make_omini(pipe, seed=6), make_omini(pipe, seed=7, **left)
        filling = [make_omini(pipe, seed=8, independent=independent) for independent in (False, True)]
        return World(pipe, make_ip(pipe), joint, cached, *filling)

    return make


@pytest.fixture(scope="session")
def references(pictures) -> list[np.ndarray]:
    return pictures(4)
