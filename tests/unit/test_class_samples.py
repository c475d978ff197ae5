"""drawing/class_samples.py: samples for ADM's evaluator."""

import numpy as np
import pytest

import condit
from class_models import DIT, write, write_vae
from condit.cli import main
from condit.drawing.class_samples import sample_npz

HOW = {"batch": 2, "seed": 3, "steps": 2, "guidance": 1.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    write_vae(folder)
    return write(folder, DIT)


def arrays(path) -> np.ndarray:
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        return file["arr_0"]


def test_samples_are_images_of_random_classes_and_a_resumed_or_shared_run_gives_the_same_bytes(model, tmp_path):
    pipe = condit.load(model)
    whole = sample_npz(pipe, tmp_path / "whole.npz", 7, **HOW)
    images = arrays(whole)
    assert images.shape == (7, 32, 32, 3) and images.dtype == np.uint8 and not (tmp_path / "whole.npz.parts").exists()
    # Two processes, of which the first was stopped before its last batch.
    out, share = tmp_path / "shared.npz", {"ranks": 2, **HOW}
    assert sample_npz(pipe, out, 7, rank=0, **share) is None
    last = tmp_path / "shared.npz.parts" / "00000004.npy"
    assert np.array_equal(np.load(last), images[4:6])
    last.unlink()
    assert sample_npz(pipe, out, 7, rank=1, **share) is None
    assert sample_npz(pipe, out, 7, rank=0, **share) == out
    assert np.array_equal(arrays(out), images)
    with pytest.raises(ValueError, match="made with steps = 2, not 3"):
        sample_npz(pipe, out, 7, rank=0, **{**share, "steps": 3})


def test_a_row_is_the_image_of_its_class_and_seed(model, tmp_path):
    pipe = condit.load(model)
    images = arrays(sample_npz(pipe, tmp_path / "a.npz", 40, **{**HOW, "batch": 40}))
    ours = [
        np.asarray(pipe(k, seed=3 + 5, num_inference_steps=2, guidance_scale=1.5).images[0]).astype(int)
        for k in range(5)
    ]
    assert min(np.abs(images[5] - image).max() for image in ours) <= 1  # a batch rounds otherwise


def test_the_command_writes_them_and_refuses_other_models_and_names(model, tmp_path, capsys, random_tiny):
    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["evaluate", "samples", *arguments])
        return int(end.value.code or 0), capsys.readouterr().err

    out = str(tmp_path / "a.npz")
    assert run(out, "-m", str(model), "-n", "3", "--batch", "2", "--steps", "2")[0] == 0
    assert arrays(out).shape == (3, 32, 32, 3)
    assert run(out, "-m", str(model))[0] == 2  # it exists
    assert run(str(tmp_path / "a.npy"), "-m", str(model))[0] == 2
    code, err = run(str(tmp_path / "b.npz"), "-m", "tiny")
    assert code == 1 and "tiny generates no classes. Use DiT or DiffiT." in err
