"""Progress: a bar where one can be drawn, lines where the output is a file."""

import contextlib
import logging

import pytest
from PIL import Image

from condit.data import progress
from condit.data.progress import progress_bar
from condit.drawing import callbacks


def test_lines_say_how_far_how_fast_and_how_long(monkeypatch, caplog):
    now = iter([0.0, 4.0, 12.0, 12.0, 30.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(progress, "interactive", lambda: False)
    with caplog.at_level(logging.INFO), progress_bar(4, "generating", images=8) as advance:
        advance()
        advance(note="loss 0.5")
        advance(2)
    assert caplog.messages == ["generating: step 2 of 4, 12 s left, 0.33 images/s, loss 0.5"]


def test_a_bar_counts_from_where_an_earlier_run_stopped(monkeypatch, capsys):
    monkeypatch.setattr(progress, "interactive", lambda: True)
    with progress_bar(10, "training", done=8) as advance:
        advance()
    assert "8/10" in capsys.readouterr().err


def test_a_call_shows_its_steps_only_if_it_is_asked(make_pipe, monkeypatch, capsys):
    monkeypatch.setattr(progress, "interactive", lambda: True)
    pipe = make_pipe()
    pipe("a fox", seed=0, output_type="latent")
    assert capsys.readouterr().err == ""
    pipe("a fox", seed=0, output_type="latent", progress=True)
    assert "/3 [" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["flow", "pixart"])
def test_an_edit_shows_the_levels_of_its_inversion_and_of_its_steps(
    model, make_pipe, make_pixart, pictures, monkeypatch
):
    shown = []

    @contextlib.contextmanager
    def bar(total, text):
        counts = [0, total, text]
        shown.append(counts)

        def advance():
            counts[0] += 1

        yield advance

    monkeypatch.setattr(callbacks, "progress_bar", bar)
    pipe = make_pipe() if model == "flow" else make_pixart(make_pipe())
    image = Image.fromarray(pictures(1)[0]).resize(pipe.size[::-1])
    how = {"num_inference_steps": 3, "output_type": "latent"}
    result = pipe.edit(image, "a fox", "a dog", **how)
    assert shown == []
    pipe.edit(image, "a fox", "a dog", progress=True, **how)
    assert shown == [[6, 6, "inverting"], [3, 3, "editing"]]  # the inversion goes to the noise and back
    pipe.edit(result.inversion, None, "a dog", progress=True, output_type="latent")
    assert shown[2:] == [[3, 3, "editing"]]
