"""Calls of strangers in one batch: each row equals its single run, whatever the others are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from condit.controls.control import Control, When
from condit.controls.wrap import Sides, Wrapper, sides
from condit.drawing.batch import Draft, walk
from condit.drawing.pipeline import Pipeline
from condit.drawing.settings import Settings
from condit.nn.attention import Attend, Call

STEPS = 4


@dataclass(frozen=True)
class World:
    pipe: Pipeline
    drafts: dict[str, Callable[[], Draft]]

    def single(self, name: str) -> Tensor:
        return walk(self.pipe, [self.drafts[name]()])[0]


@dataclass(frozen=True)
class Louder(Control):
    factor: float

    def around(self, call: Call, attend: Attend) -> Tensor:
        return attend(call) * self.factor


def half(pipe: Pipeline) -> np.ndarray:
    mask = np.zeros(pipe.size, bool)
    mask[:, pipe.size[1] // 2 :] = True
    return mask


def strangers(pipe: Pipeline, controls: dict[str, list[Control]], given: Sequence[np.ndarray], **how) -> World:
    """Calls that differ in prompt, seed, number, guidance, negative prompt, controls and image."""

    def begin(prompt: str, seed: int, acting: str = "", *, negative: str | None = None, more=None, **settings) -> Draft:
        requested = Settings(num_inference_steps=STEPS, **how, **settings)
        given = controls[acting] if acting else []
        return pipe.begin(requested, prompt, negative, controls=given, seed=seed, output_type="latent", **(more or {}))

    with torch.no_grad():
        calls = {
            "plain": lambda: begin("a fox", 7),
            "unguided": lambda: begin("a rocket", 1, guidance_scale=1.0),
            "negative": lambda: begin("snow", 2, negative="rain", guidance_scale=6.0, copies=2),
            "image": lambda: begin("a key", 3, more={"image": given[0], "mask_image": half(pipe)}, strength=1.0),
            "separate": lambda: begin("a tulip", 4, next(iter(controls)), image_guidance_scale=2.0),
        }
        calls |= {f"with {name}": lambda name=name: begin("a crab", 5, name) for name in controls}
    return World(pipe, calls)


@pytest.fixture(scope="module", params=["flow", "sd15"])
def world(request, make_pipe, make_latent, make_ip, make_omini, pictures) -> World:
    given = pictures(3)
    pipe = make_pipe() if request.param == "flow" else make_latent("sd15")
    if request.param == "sd15":
        louder: dict[str, list[Control]] = {"louder": [Louder(1.3)], "two": [Louder(0.8), Louder(1.1)]}
        return strangers(pipe, louder, given, sampler="euler-ancestral")
    ip = make_ip(pipe)
    controls: dict[str, list[Control]] = {
        "ip": [ip.control(given[1], strength=0.7, when=When(0.0, 0.5))],
        "two": [ip.control(given[2], strength=1.3, mask=half(pipe)), ip.control(given[0])],
    }
    cached = make_omini(pipe, seed=7, independent=True, delta=(0, -6))
    controls["cached"] = [cached.control(given[0], strength=0.8), *controls["ip"]]
    return strangers(pipe, controls, given, eta=0.5)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # another batch size sums in another order


def test_each_call_in_a_batch_of_strangers_equals_its_single_run(world):
    drafts = {name: make() for name, make in world.drafts.items()}
    assert all(draft.fits(drafts["plain"]) for draft in drafts.values())
    together = walk(world.pipe, list(drafts.values()))
    for name, found in zip(drafts, together, strict=True):
        close(found, world.single(name))
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_a_call_that_is_dropped_is_computed_no_further_and_the_others_stay(world, monkeypatch):
    names = ["plain", "separate", "negative"]
    rows: list[int] = []
    network = type(world.pipe.backbone).forward

    def counted(self, x, *args, **kwargs):
        rows.append(len(x.tokens if hasattr(x, "tokens") else x))
        return network(self, x, *args, **kwargs)

    monkeypatch.setattr(type(world.pipe.backbone), "forward", counted)
    dropped: set[int] = set()

    def on_step(i: int, x: Tensor, x0: Tensor) -> None:
        if i == 1:
            rows.clear()
            dropped.add(2)

    found = walk(world.pipe, [world.drafts[name]() for name in names], on_step, dropped)
    assert sum(rows) == (STEPS - 2) * (2 + 3)  # one image each, with two and three sides of guidance
    for name, x in zip(names[:2], found, strict=False):
        close(x, world.single(name))


def test_a_control_of_the_whole_batch_keeps_its_call_alone(make_pipe, make_omini, pictures):
    pipe = make_pipe()
    joint = make_omini(pipe, seed=6).control(pictures(1)[0])
    with torch.no_grad():
        alone = pipe.begin(Settings(num_inference_steps=2), "a fox", controls=[joint], seed=0)
        plain = pipe.begin(Settings(num_inference_steps=2), "a fox", seed=0)
        longer = pipe.begin(Settings(num_inference_steps=3), "a fox", seed=0)
        larger = pipe.begin(Settings(num_inference_steps=2, height=2 * pipe.size[0]), "a fox", seed=0)
    assert alone.alone and not alone.fits(plain) and not plain.fits(alone)
    assert plain.fits(plain) and not plain.fits(longer) and not plain.fits(larger)


def test_parts_of_unequal_size_keep_their_rows():
    joined = sides([[], [], [Wrapper(())], []], [1, 2, 3, 4])
    (control,) = joined
    assert isinstance(control, Sides) and control.parts(10) == [slice(0, 3), slice(3, 10)]
    assert Sides((Wrapper(()), Wrapper(())), (1, 3)).parts(4) == [slice(0, 1), slice(1, 4)]
    found = Sides((Wrapper(()), Wrapper(())), (1, 3)).stacked([None, torch.ones(3, 2)], 0.0)
    assert found is not None and found.shape == (4, 2) and found[0].sum() == 0
