"""Where commands write, and what they refuse before anything is loaded."""

import shutil
from pathlib import Path

import pytest
import typer

from condit.cli.outputs import free_paths
from condit.cli.request import Reference, Request
from condit.data.images import load_image, read_recipe


def test_a_chosen_name_goes_on_counting_and_a_given_one_is_kept(tmp_path):
    taken = [tmp_path / name for name in ("a.png", "a-2.png", "b.png")]
    for path in taken:
        path.touch()
    assert free_paths([taken[0], taken[0]], tmp_path, []) == [tmp_path / "a-3.png", tmp_path / "a-4.png"]
    assert free_paths([tmp_path / "new.png"], tmp_path / "new.png", []) == [tmp_path / "new.png"]
    with pytest.raises(typer.BadParameter, match="a.png exists. Add --force to replace it"):
        free_paths([taken[0]], taken[0], [])
    assert free_paths([taken[0]], taken[0], [], force=True) == [taken[0]]


@pytest.mark.parametrize(("force", "linked"), [(True, True), (True, False), (False, True), (False, False)])
def test_an_input_is_never_written_over(tmp_path, force, linked):
    (tmp_path / "ref.png").touch()
    path = tmp_path / "link.png" if linked else tmp_path / "x" / ".." / "ref.png"
    (tmp_path / "x").mkdir()
    if linked:
        path.symlink_to(tmp_path / "ref.png")
    with pytest.raises(typer.BadParameter, match="is read by this command and would be lost"):
        free_paths([path], path, [tmp_path / "ref.png"], force=force)


def test_two_runs_with_other_settings_leave_two_images(run, random_tiny):
    names = []
    for steps in ("1", "2"):
        code, out, err = run("generate", "a rocket", "--steps", steps)
        assert code == 0, err
        names.append(out.strip())
    assert [Path(name).name for name in names] == ["a-rocket-0.png", "a-rocket-0-2.png"]
    recipes = [read_recipe(name)["request"] for name in names]
    assert [recipe["steps"] for recipe in recipes] == [1, 2]  # pyright: ignore[reportIndexIssue]
    words = "a very long prompt whose first forty letters are the same"
    code, out, _ = run("generate", f"{words} A", f"{words} B", "--steps", "1")
    assert code == 0 and len(set(out.split())) == 2


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "a", "--style", "ref.png", "-o", "ref.png"),
        ("generate", "a", "--image", "ref.png", "-o", "ref.png", "--force"),
        ("edit", "ref.png", "a cat", "a dog", "-o", "ref.png"),
        ("edit", "ref.png", "a cat", "a dog", "-o", "b.png", "--page", "ref.png", "--force"),
        ("compare", "a", "--style", "ref.png", "-o", "ref.png"),
        ("annotate", "ref.png", "gray", "-o", "ref.png", "--force"),
    ],
)
def test_no_command_overwrites_its_input(run, picture, command):
    before = picture.read_bytes()
    code, _, err = run(*command)
    assert code == 2 and "is read by this command" in err
    assert picture.read_bytes() == before


def test_a_named_file_is_replaced_only_with_force(run, random_tiny, picture):
    shutil.copy(picture, "old.png")
    code, _, err = run("generate", "a", "--steps", "1", "-o", "old.png")
    assert code == 2 and "old.png exists. Add --force" in err
    assert run("generate", "a", "--steps", "1", "-o", "old.png", "--force")[0] == 0
    assert load_image("old.png").size == (128, 128)
    for name in ("ref-gray.png", "ref-gray-2.png"):
        assert run("annotate", "ref.png", "gray")[1].strip().endswith(name)


def test_seed_minus_one_is_another_seed_each_time_and_its_recipe_replays(run, random_tiny):
    for name in ("a.png", "b.png"):
        assert run("generate", "a", "--steps", "1", "--seed", "-1", "-o", name)[0] == 0
    seeds = [read_recipe(name)["request"]["seed"] for name in ("a.png", "b.png")]  # pyright: ignore
    assert seeds[0] != seeds[1] and min(seeds) >= 0
    assert "identical" in run("replay", "a.png")[2]
    code, _, err = run("generate", "a", "--seed", "-2")
    assert code == 2 and "-1 for a random one; found -2" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cuda:99"), "Device 'cuda:99' is not available; this machine has cpu"),
        (("--device", "gpu"), "Device 'gpu' is not available"),
        (("--mask", "ref.png"), "--mask and --change are for --image"),
        (("--change", "0.5"), "--mask and --change are for --image"),
        (("--image", "ref.png", "--change", "nan"), "--change is nan; expected above 0, up to 1"),
        (("--guidance", "nan"), "--guidance is nan; expected a finite number"),
        (("--style", "ref.png", "--strength", "inf"), "the strength of ref.png is inf"),
        (("--style", "ref.png", "-m", "./sd15"), "./sd15 has none. Give the adapter's file: --control"),
    ],
)
def test_wrong_values_are_named_in_the_words_of_the_command_line(run, picture, options, message):
    code, _, err = run("generate", "a fox", *options)
    assert code in (1, 2) and message in " ".join(err.split())


def test_a_prompt_that_is_no_unicode_is_refused():
    with pytest.raises(ValueError, match=r"the prompt is not text in UTF-8: 'a \\udcff'"):
        Request("a \udcff", references=(Reference("style", "ref.png"),))


def test_resuming_a_run_that_is_not_there_is_wrong_usage(run, monkeypatch):
    Path("r.toml").write_text("task = 'omini'\n[data]\n[train]\nsteps = 1\nbatch = 1\n")
    code, _, err = run("train", "r.toml", "-o", "runs/mistyped", "--resume")
    assert code == 2 and "runs/mistyped holds no run to resume" in " ".join(err.split())
    assert not Path("runs").exists()
    # torchrun starts lost processes with the same command, so there it also begins a run.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    code, _, err = run("train", "r.toml", "-o", "runs/new", "--resume")
    assert code == 1 and "[data] does not fit task 'omini'" in " ".join(err.split())
