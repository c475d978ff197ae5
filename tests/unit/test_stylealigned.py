"""StyleAligned and what it shares with StyleID: values computed by hand, laws on a random model, the command line."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import condit
from condit.cli import main
from condit.controls.control import Control, Run, Step
from condit.controls.reference_pass import ReferencePass
from condit.controls.stylealigned import StyleAligned, adain
from condit.diffusion.inversion import EditPath, NoisePath
from condit.diffusion.samplers import FlowPath
from condit.nn.attention import Call, Site, sdpa

SITE = Site("blocks.0.attn", "joint", 0)


def column(*values: float) -> Tensor:
    """One head of one channel, (1, 1, N, 1)."""
    return torch.tensor(values)[None, None, :, None]


def call(q: Tensor, k: Tensor, v: Tensor, text: int = 0) -> Call:
    return Call(q, k, v, SITE, image=slice(text, q.shape[2]), plain=q, keys=slice(text, k.shape[2]))


def test_adain_gives_the_references_mean_and_deviation_by_hand():
    """Mean 2 and variance 2 become mean 2 and variance 8: (x - 2) / sqrt 2 * sqrt 8 + 2."""
    torch.testing.assert_close(
        adain(column(1.0, 3.0), column(0.0, 4.0)), column(0.0, 4.0), rtol=0, atol=1e-4
    )  # eps on the variance
    x, reference = torch.randn(2, 3, 7, 4), 3 * torch.randn(2, 3, 9, 4) + 1
    changed = adain(x, reference)
    torch.testing.assert_close(changed.mean(2), reference.mean(2))
    torch.testing.assert_close(changed.std(2), reference.std(2), rtol=1e-3, atol=0)


def test_the_strength_is_the_references_weight_in_the_softmax_by_hand():
    """All scores are 0, so the image's own key has weight 1 and the reference's has the strength."""
    given = call(column(0.0), column(0.0), column(0.0))
    memory = {SITE.path: (column(0.0), column(0.0), column(1.0))}
    for strength in (0.5, 1.0, 2.0):
        control = replace(StyleAligned("x", normalise=False), memory=memory, weight=torch.tensor(strength))
        assert float(control.around(given, sdpa)) == pytest.approx(strength / (1 + strength))


def test_queries_and_keys_take_the_references_statistics_and_values_do_not():
    q, k, v, q_r, k_r, v_r = torch.randn(6, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    control = replace(StyleAligned("x"), memory={SITE.path: (q_r, k_r, v_r)}, weight=torch.tensor(1.0))
    scores = adain(q, q_r) @ torch.cat([adain(k, k_r), k_r], 2).mT / 2
    expected = scores.softmax(-1) @ torch.cat([v, v_r], 2)
    torch.testing.assert_close(control.around(call(q, k, v), sdpa), expected, rtol=0, atol=1e-6)


def test_text_in_the_same_softmax_does_not_attend_to_the_reference():
    q, k, v = torch.randn(3, 1, 1, 5, 4, generator=torch.Generator().manual_seed(0))
    memory = {SITE.path: tuple(torch.randn(3, 1, 1, 3, 4))}
    given = call(q, k, v, text=2)
    out = replace(StyleAligned("x", normalise=False), memory=memory, weight=torch.tensor(1.0)).around(given, sdpa)
    torch.testing.assert_close(out[:, :, :2], sdpa(given)[:, :, :2], rtol=0, atol=1e-6)
    assert not torch.allclose(out[:, :, 2:], sdpa(given)[:, :, 2:], atol=1e-2)


# The pass of the reference


@dataclass(frozen=True)
class Inverse:
    trajectory: Tensor
    path: EditPath
    size: tuple[int, int] = (8, 8)


@pytest.mark.parametrize(
    "path",
    [
        FlowPath((1.0, 0.7, 0.2, 0.0)),
        NoisePath(torch.tensor([9.0, 2.0, 0.4, 0.1]), (900.0, 600.0, 300.0, 0.0), torch.linspace(0.999, 0.01, 1000)),
    ],
)
def test_an_inverted_reference_is_read_at_its_own_latents(path):
    trajectory, seen = torch.randn(4, 1, 3, 2), []

    def apart(x0: Tensor, noise: Tensor, step: Step, controls=(), text=None) -> Tensor:
        level = step.index
        ratio = path.sigmas[level] / (1 - path.sigmas[level] or 1) if isinstance(path, FlowPath) else path.ratios[level]
        alpha, sigma = 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
        if isinstance(path, FlowPath):
            alpha, sigma = 1 - path.sigmas[level], path.sigmas[level]
        seen.append(alpha * x0 + sigma * noise)
        return x0

    run = Run(torch.nn.Identity(), 2, (1, 1), torch.zeros(2, 0), None, 3, apart=apart)
    passed = ReferencePass(run, trajectory[-1].expand(2, -1, -1), None, Inverse(trajectory, path), 0)
    for level in range(3):
        passed.record(path.step(level), condit.Where())
        torch.testing.assert_close(seen[-1], trajectory[level].expand(2, -1, -1), rtol=1e-5, atol=1e-5)


def test_an_inversion_of_a_unet_is_ddims_and_serves_as_a_reference(tmp_path, make_tiny_unet, pictures):
    pipe = condit.load(make_tiny_unet(tmp_path / "unet"))
    inversion = pipe.invert(pictures(1)[0], "", num_inference_steps=2, height=128, width=128)
    assert inversion.solver == "entered"
    given = {"seed": 0, "num_inference_steps": 2, "output_type": "latent"}
    plain = pipe("a fox", **given).images
    acted = pipe("a fox", controls=[StyleAligned(inversion)], **given).images
    assert torch.isfinite(acted).all() and not torch.equal(acted, plain)
    with pytest.raises(ValueError, match="The inversion has"):
        pipe("a fox", controls=[StyleAligned(replace(inversion, size=(8, 8)))], **given)


@pytest.mark.parametrize("kind", [StyleAligned, condit.StyleID])
def test_the_words_of_the_reference_matter_and_both_sides_of_the_guidance_see_it(make_pipe, pictures, kind):
    pipe, picture = make_pipe(), pictures(1)[0]

    def draw(*controls: Control) -> Tensor:
        return pipe("a fox", controls=controls, seed=0, output_type="latent", guidance_scale=2.0).images

    class Positive(kind):
        def negative(self) -> None:
            return None

    drawn = [draw(kind(picture)), draw(kind(picture, prompt="snow")), draw(kind(picture, prompt=None))]
    assert not any(torch.equal(drawn[a], drawn[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert not torch.equal(drawn[0], draw(Positive(picture)))
    assert not torch.equal(drawn[0], draw(kind(picture, seed=1)))


@pytest.mark.parametrize("kind", [StyleAligned, condit.StyleID])
def test_a_wrong_strength_or_a_control_outside_a_call_is_named(kind, make_pipe, pictures):
    for strength in (-0.1, math.nan):
        with pytest.raises(ValueError, match="strength"):
            kind("x", strength)
    with pytest.raises(ValueError, match="acts in a pipeline call"):
        kind("x").prepare(Run(torch.nn.Identity(), 1, (1, 1), torch.zeros(1, 0), None, 3))
    described = kind(pictures(1)[0], 0.5, when=(0, 0.5)).describe()
    assert (described["method"], described["strength"], described["when"]) == (kind.__name__, 0.5, [0, 0.5])


@pytest.mark.parametrize("name", ["stylealigned", "styleid"])
def test_from_the_command_line_and_again_from_its_recipe(name, tmp_path, capsys):
    Image.fromarray(np.full((128, 128, 3), (250, 40, 40), np.uint8)).save(tmp_path / "ref.png")

    def out(part: str) -> list[str]:
        return ["generate", "a house", "--steps", "2", "-o", str(tmp_path / part)]

    given = [*out("a.png"), "-m", "tiny-unet", "--control", f"{name}={tmp_path / 'ref.png'}:0.8,when=0-0.9"]
    for arguments, code, said in (
        (given, 0, ""),
        (["replay", str(tmp_path / "a.png")], 0, "the image is identical"),
        ([*out("b.png"), "--control", f"{name}={tmp_path / 'ref.png'},task=gray"], 1, f"{name} takes no task="),
    ):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == code and said in " ".join(capsys.readouterr().err.split())
