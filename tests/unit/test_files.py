"""Weight files: nothing runs on reading, nothing fits by chance on loading, nothing is lost on saving."""

import argparse
import errno
import os
import pickle
import resource
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from condit.data.files import hash_file, remove_temporaries
from condit.weights.files import (
    atomic_write,
    inner_state,
    is_complete,
    load_strict,
    open_folder,
    own_fields,
    read_metadata,
    read_tensors,
    save_folder,
    save_tensors,
)
from condit.weights.pickles import arrays_in

SOURCE = Path(__file__).parent.parent.parent / "src"


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("metadata", "fields"), [({"class": "DiT"}, {"class": "DiT"}), ("transformer", {}), ([1], {}), (None, {})]
)
def test_what_condit_noted_of_a_file_is_read_and_a_plain_name_is_none_of_it(metadata, fields, tmp_path):
    path = save_tensors(
        tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {} if metadata is None else {"condit": metadata}
    )
    assert own_fields(read_metadata(path)) == fields


def test_tensors_and_metadata_come_back_as_saved(tmp_path):
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2).bfloat16()}
    path = save_tensors(tmp_path / "new" / "a.safetensors", tensors, {"method": "omini", "rank": 4})
    loaded = read_tensors(path)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert loaded.keys() == tensors.keys()
    assert read_metadata(path) == {"method": "omini", "rank": "4"}


def test_views_and_tied_tensors_are_saved_without_their_base(tmp_path):
    base = torch.randn(1000, 1000)
    path = save_tensors(tmp_path / "a.safetensors", {"row": base[0], "turned": base[:2].T, "a": base[1], "b": base[1]})
    assert torch.equal(read_tensors(path)["turned"], base[:2].T)
    assert path.stat().st_size < 50_000


def test_pytorch_files_are_recognised_by_content_and_flattened(tmp_path):
    weight = torch.randn(2)
    state = {"ema": {"x.weight": weight}, "args": argparse.Namespace(model="DiT-XL/2"), "step": 7}
    torch.save(state, tmp_path / "named.safetensors")  # the name lies
    assert torch.equal(read_tensors(tmp_path / "named.safetensors")["ema.x.weight"], weight)
    assert read_metadata(tmp_path / "named.safetensors") == {}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert list(read_tensors(tmp_path / "old.pt")) == ["ema.x.weight"]


def test_a_lightning_checkpoint_is_read_with_its_other_entries_and_without_lightning(tmp_path, monkeypatch):
    """A callback's class as a key, numbers of numpy: neither is imported, called or kept."""
    module, weight = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint"), torch.randn(2)
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    with monkeypatch.context() as there:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            there.setitem(sys.modules, name, module)
        entries = {"best_model_score": torch.tensor(0.1), "wait": np.float64(1.5), "n": np.int64(3)}
        state = {"state_dict": {"model.x": weight}, "callbacks": {callback: entries}, "global_step": 7}
        torch.save(state, tmp_path / "model.ckpt")
    loaded = read_tensors(tmp_path / "model.ckpt")
    assert torch.equal(loaded["state_dict.model.x"], weight)
    assert list(inner_state(loaded)) == ["model.x"]
    assert inner_state({"x": weight}).keys() == {"x"}


@pytest.mark.parametrize("writer", ["zip", "legacy", "bare"])
def test_a_pickle_that_would_touch_a_file_is_refused_and_touches_nothing(tmp_path, writer):
    trap = {"weight": torch.zeros(1), "trap": Touch(tmp_path / "touched")}
    path = tmp_path / "model.ckpt"
    if writer == "bare":
        path.write_bytes(pickle.dumps(trap["trap"]))
    else:
        torch.save(trap, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(ValueError, match=r"model.ckpt holds more than tensors.*refused"):
        read_tensors(path)
    assert names(tmp_path) == ["model.ckpt"]


def test_the_trap_would_have_worked(tmp_path):
    pickle.loads(pickle.dumps(Touch(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"hello, I am text", "neither safetensors nor"),
        (b"", "neither safetensors nor"),
        (b"\x10\0\0\0\0\0\0\0{broken", "broken or cut off"),
        (b"PK\x03\x04 not a zip", "broken or cut off"),
    ],
)
def test_a_file_without_weights_raises(tmp_path, content, said):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_tensors(path)


def test_an_npz_is_distinguished_from_a_broken_pytorch_file(tmp_path):
    np.savez(tmp_path / "x.npz", cls=np.zeros(3))
    assert arrays_in(tmp_path / "x.npz") == ["cls"]
    with pytest.raises(ValueError, match="an .npz of numpy arrays, .*: load it with load_vit"):
        read_tensors(tmp_path / "x.npz")


def test_a_whole_module_is_refused_by_its_class(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "x.pt")
    assert arrays_in(tmp_path / "x.pt") == []
    with pytest.raises(ValueError, match=r"holds more than tensors \(torch.nn.modules.linear.Linear\)"):
        read_tensors(tmp_path / "x.pt")


def test_a_cut_off_weight_file_raises(tmp_path):
    whole = save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1000)}).read_bytes()
    torch.save({"a": torch.zeros(1000)}, tmp_path / "b.pt")
    (tmp_path / "a.safetensors").write_bytes(whole[:-100])
    (tmp_path / "b.pt").write_bytes((tmp_path / "b.pt").read_bytes()[:-100])
    (tmp_path / "header.safetensors").write_bytes(whole[:40])
    for name in ("a.safetensors", "b.pt", "header.safetensors"):
        with pytest.raises(ValueError, match="broken or cut off"):
            read_tensors(tmp_path / name)
    for name in ("a.safetensors", "header.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is broken or cut off: .* Download it again"):
            read_metadata(tmp_path / name)


@pytest.mark.parametrize("keep", [4, 60, -30, -4])
def test_a_damaged_npz_has_no_arrays_and_is_refused_in_our_words(keep, tmp_path):
    np.savez(tmp_path / "x.npz", cls=np.zeros(3))
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[:keep])  # BadZipFile, or struct.error in the directory at the end
    assert arrays_in(tmp_path / "x.npz") == []
    with pytest.raises(ValueError, match="x.npz is broken or cut off"):
        read_tensors(tmp_path / "x.npz")


def test_missing_files_and_folders_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weight file at"):
        read_tensors(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        read_tensors(tmp_path)


def test_load_strict_loads_all_or_tells_the_difference():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    good = {name: torch.ones_like(value) for name, value in module.state_dict().items()}
    load_strict(module, good, source="good")
    assert all(bool((value == 1).all()) for value in module.parameters())

    bad = {**{f"x.{name}": value for name, value in good.items()}, "0.weight": torch.zeros(5, 3)}
    with pytest.raises(ValueError) as error:
        load_strict(module, bad, source="file.bin", what_is=lambda tensors: f"a file of {len(tensors)} tensors")
    text = str(error.value)
    assert "file.bin does not fit Sequential (4 tensors wanted, 5 found)" in text
    assert "3 missing (first: 0.bias, 1.weight, 1.bias)" in text
    assert "4 unexpected (first: x.0.weight, x.0.bias, x.1.weight, ...)" in text
    assert "1 of another shape (first: 0.weight (5, 3) instead of (4, 3))" in text
    assert "looks like a file of 5 tensors" in text
    assert all(bool((value == 1).all()) for value in module.parameters())


def test_load_strict_fills_a_meta_module_by_assignment():
    with torch.device("meta"):
        module = nn.Linear(3, 4)
    load_strict(module, {"weight": torch.ones(4, 3), "bias": torch.ones(4)}, source="x", assign=True)
    assert module.weight.device.type == "cpu"


def test_a_full_disk_leaves_the_old_weights(tmp_path, monkeypatch):
    path = save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(10)})
    before = hash_file(path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left while writing .*a.safetensors; its old content is unchanged"):
        save_tensors(path, {"a": torch.ones(10)})
    assert hash_file(path) == before
    assert names(tmp_path) == ["a.safetensors"]


def test_a_real_write_limit_gives_the_same_clear_error(tmp_path):
    """A file size limit of the process is the full disk that needs no disk."""
    script = (
        "import resource, signal, sys, torch\n"
        "from condit.weights.files import save_tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, {resource.RLIM_INFINITY}))\n"
        f"save_tensors({str(tmp_path / 'a.safetensors')!r}, {{'a': torch.zeros(100_000)}})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1
    assert "limit is hit while writing" in done.stderr
    assert names(tmp_path) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = atomic_write(tmp_path / "a.txt", lambda target: target.write_text("old"))

    def half(target: Path) -> None:
        target.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, half)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_saved_file_may_be_read_by_whom_the_umask_lets(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
        save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


def test_writing_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    atomic_write(tmp_path / "link.txt", lambda target: target.write_text("new"))
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def fill(folder: Path, text: str) -> None:
    with save_folder(folder) as target:
        (target / "sub").mkdir()
        (target / "sub" / "a.txt").write_text(text)


def test_a_saved_folder_is_complete_and_replaces_the_old_one(tmp_path):
    folder = tmp_path / "deep" / "step-1"
    fill(folder, "old")
    fill(folder, "new")
    assert (open_folder(folder) / "sub" / "a.txt").read_text() == "new"
    assert is_complete(folder)
    assert names(folder.parent) == ["step-1"]


@pytest.mark.parametrize("what", [RuntimeError("crash"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_crash_while_saving_leaves_the_old_folder(tmp_path, what):
    folder = tmp_path / "step-1"
    fill(folder, "old")
    with pytest.raises(type(what)), save_folder(folder) as target:  # noqa: PT012
        (target / "a.txt").write_text("half")
        raise what
    assert (open_folder(folder) / "sub" / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["step-1"]


def test_a_full_disk_while_syncing_leaves_the_old_folder(tmp_path, monkeypatch):
    folder = tmp_path / "step-1"
    fill(folder, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left while writing .*step-1"):
        fill(folder, "new")
    assert (folder / "sub" / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["step-1"]


def test_a_stop_between_the_two_renames_is_mended_on_opening(tmp_path, monkeypatch):
    folder = tmp_path / "step-1"
    fill(folder, "old")
    real = os.rename

    def stop(source: Path, target: Path) -> None:
        if Path(target) == folder:
            raise SystemExit
        real(source, target)

    monkeypatch.setattr(os, "rename", stop)
    with pytest.raises(SystemExit):
        fill(folder, "new")
    monkeypatch.undo()
    assert not folder.exists()
    assert (open_folder(folder) / "sub" / "a.txt").read_text() == "old"


def test_half_and_missing_folders_raise(tmp_path):
    (tmp_path / "half").mkdir()
    with pytest.raises(ValueError, match="was not written to its end"):
        open_folder(tmp_path / "half")
    with pytest.raises(FileNotFoundError, match="no folder at"):
        open_folder(tmp_path / "absent")


def test_the_first_error_of_a_write_is_reported(tmp_path):
    with pytest.raises(OSError, match="cannot write .*name too long"):
        atomic_write(tmp_path / ("x" * 300), lambda path: path.write_text("a"))

    def write(path: Path) -> None:
        path.mkdir()  # the temporary file cannot be removed
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="no space left"):
        atomic_write(tmp_path / "a", write)


def test_files_of_killed_writers_are_removed_and_no_others(tmp_path):
    for name in (".state.pt.0a1b2c3d.tmp", "state.pt", ".hidden", ".a.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "export" / ".part.0a1b2c3d.tmp").mkdir(parents=True)
    remove_temporaries(tmp_path)
    assert names(tmp_path / "export") == []
    assert names(tmp_path) == [".a.tmp", ".hidden", "export", "state.pt"]
