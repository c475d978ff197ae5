"""Weight files and configurations that declare more than they hold are refused before anything is allocated."""

import os
import zipfile
from pathlib import Path

import pytest
import torch

from condit.weights.files import read_tensors
from condit.weights.folders import read_json


def deflated(path: Path, raw: Path, zeros: int) -> Path:
    """The archive `raw` with compressed entries, and one more entry of `zeros` bytes."""
    with zipfile.ZipFile(raw) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        with target.open(f"{source.infolist()[0].filename.split('/')[0]}/data/zeros", "w", force_zip64=True) as file:
            for _ in range(zeros // 10_000_000):
                file.write(bytes(10_000_000))
    return path


def test_an_archive_that_declares_much_more_than_it_holds_is_refused_before_it_is_inflated(tmp_path):
    torch.save({"x": torch.zeros(4)}, tmp_path / "raw.bin")
    assert list(read_tensors(deflated(tmp_path / "a.bin", tmp_path / "raw.bin", 0))) == ["x"]
    with pytest.raises(ValueError, match="declares 100 MB of tensors; at most 64 MB"):
        read_tensors(deflated(tmp_path / "b.bin", tmp_path / "raw.bin", 100_000_000))


def test_a_tensor_that_repeats_its_storage_is_refused(tmp_path):
    torch.save({"x": torch.zeros(1).expand(100_000_000)}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="declares 400 MB of tensors"):
        read_tensors(tmp_path / "a.bin")


class Zeros:
    def __reduce__(self):
        return bytearray, (3_000_000_000,)


@pytest.mark.parametrize("zipped", [True, False])
def test_bytes_of_any_size_are_not_allocated(tmp_path, zipped):
    torch.save({"x": torch.zeros(1), "y": Zeros()}, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    assert (tmp_path / "a.bin").stat().st_size < 10_000
    with pytest.raises(ValueError, match="holds more than tensors .bytearray.: refused"):
        read_tensors(tmp_path / "a.bin")


def test_dictionaries_within_themselves_are_refused(tmp_path):
    inside: dict = {"x": torch.zeros(1)}
    inside["again"] = inside
    torch.save(inside, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="dictionaries 16 deep"):
        read_tensors(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[]", "holds a JSON list; expected an object"),
        ('{"layers_per_block": 10000000}', "layers_per_block is 10000000; at most 1000 layers"),
        ('{"transformer_layers_per_block": [1, 2000]}', "at most 1000 layers"),
        ('{"depth": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_configurations_that_would_take_hours_are_refused(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_json(tmp_path / "config.json")


def test_a_configuration_that_is_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="a pipe or a device"):
        read_json(tmp_path / "config.json")
