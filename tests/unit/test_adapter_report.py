"""What `condit evaluate adapter` says of adapters whose answers are known."""

import json

import pytest
import torch
from PIL import Image

from condit.controls.control import Control
from condit.data.images import save_image, to_tensor
from condit.data.pairs import open_pairs
from condit.training.adapter_report import Answer, Eyes, evaluate_adapter, eyes_of


class Painter:
    """Stands for a pipeline: paints the colour of the prompt, or that of the reference."""

    def __call__(self, prompt, controls=(), **_):
        colour = controls[0].colour if controls else prompt
        return type("Result", (), {"images": [Image.new("RGB", (8, 8), colour)]})


class Paint(Control):
    def __init__(self, image):
        self.colour = image.getpixel((0, 0))


class Nothing(Paint):
    colour = "black"

    def __init__(self, image):
        pass


def colours(images) -> torch.Tensor:
    return torch.stack([to_tensor(image, 2).flatten(1).mean(1) for image in images]) + 1


def words(texts) -> torch.Tensor:
    return colours([Image.new("RGB", (8, 8), text) for text in texts])


@pytest.fixture
def pairs(tmp_path):
    rows = []
    for i, colour in enumerate(("red", "lime", "blue", "yellow")):
        save_image(Image.new("RGB", (8, 8), colour), tmp_path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": colour, "style_file_name": f"{i}.png"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_pairs(tmp_path)


def answers(pairs, control) -> dict[str, Answer]:
    eyes = Eyes(colours, colours, words)
    found = evaluate_adapter(Painter(), control, pairs, "style", eyes, count=4)  # type: ignore[arg-type]
    return {answer.question: answer for answer in found}


def test_an_adapter_that_copies_its_reference_follows_it_and_leaks(pairs):
    found = answers(pairs, Paint)
    assert found["follows"].mean > 0.5 and found["follows"].reading == "more"
    assert found["leaks"].mean > 0.5 and found["keeps"].mean < -0.5


def test_an_adapter_without_effect_follows_nothing(pairs):
    found = answers(pairs, lambda image: Nothing(image))
    assert (
        abs(found["follows"].mean) <= found["follows"].error and found["follows"].reading == "no difference was found"
    )


def test_an_interval_needs_two_pairs_and_a_comparison_an_encoder(pairs, make_pipe):
    with pytest.raises(ValueError, match="at least two pairs; found 1"):
        evaluate_adapter(Painter(), Paint, pairs, "style", Eyes(colours, None, None), count=1)  # type: ignore[arg-type]
    pipe = make_pipe()
    pipe.image = None
    with pytest.raises(ValueError, match="has no image encoder"):
        eyes_of(pipe, None, None)
    assert eyes_of(pipe, "gray", None).text is None


def test_the_command_measures_an_embedded_adapter(pairs, tmp_path, random_tiny, capsys):
    from condit.cli import main

    with pytest.raises(SystemExit) as end:
        main(["evaluate", "adapter", "tiny/style", "--pairs", str(tmp_path), "-n", "2", "--steps", "1", "--json"])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    assert [row["question"] for row in json.loads(out)] == ["follows", "keeps", "leaks"]
