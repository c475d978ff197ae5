"""rulers/samples.py: samples for ADM's evaluator."""

import random

import numpy as np
import pytest

import condit
from class_models import DIT, write, write_vae
from condit.cli import main

HOW = ["--batch", "2", "--seed", "3", "--steps", "2", "--guidance", "1.5", "-n", "7"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    write_vae(folder)
    return write(folder, DIT)


@pytest.fixture
def samples(model, capsys):
    def run(out, *arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["evaluate", "samples", str(out), "-m", str(model), *arguments])
        return int(end.value.code or 0), capsys.readouterr().err

    return run


def arrays(path) -> np.ndarray:
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        return file["arr_0"]


def test_samples_are_images_of_random_classes_and_a_resumed_or_shared_run_gives_the_same(
    model, samples, tmp_path, monkeypatch
):
    whole, shared = tmp_path / "whole.npz", tmp_path / "shared.npz"
    assert samples(whole, *HOW)[0] == 0
    images = arrays(whole)
    assert images.shape == (7, 32, 32, 3) and images.dtype == np.uint8 and not (tmp_path / "whole.npz.parts").exists()
    pipe = condit.load(model)
    for i in (0, 5):
        label = random.Random(f"3/{i}").randrange(5)
        alone = pipe(label, seed=3 + i, num_inference_steps=2, guidance_scale=1.5).images[0]
        assert np.abs(images[i] - np.asarray(alone).astype(int)).max() <= 1  # a batch rounds otherwise
    # Two processes; a batch of the first is lost.
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        code, err = samples(shared, *HOW)
        assert code == 0 and ("have not finished" in err) == (rank == "0")
    assert np.array_equal(arrays(shared), images)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name)
    shared.unlink()
    (tmp_path / "shared.npz.parts" / "00000004.npy").unlink()
    code, err = samples(shared, *HOW, "--steps", "3")
    assert code == 1 and "made with steps = 2, not 3" in err
    assert samples(shared, *HOW)[0] == 0
    assert np.array_equal(arrays(shared), images)


def test_files_that_exist_other_names_and_other_models_are_refused(samples, tmp_path, random_tiny):
    (tmp_path / "a.npz").write_bytes(b"")
    assert samples(tmp_path / "a.npz")[0] == 2
    assert samples(tmp_path / "a.npy")[0] == 2
    code, err = samples(tmp_path / "b.npz", "-m", "tiny")
    assert code == 1 and "'tiny' generates no classes. Use DiT or DiffiT" in err
