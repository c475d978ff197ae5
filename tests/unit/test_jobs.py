"""jobs/: a job gives the same files by any engine and after any failure, and names what failed."""

import json
from dataclasses import replace
from functools import partial

import pytest

from condit.data.locks import locked
from condit.jobs import local
from condit.jobs.local import Rank, rank_of
from condit.jobs.plan import Job, Place, Row, Stopped, agree, shard_of
from condit.jobs.run import engine_of, run
from painter import Painter, contents, job_of

ALONE = partial(local.draw, workers=1)
TWO = partial(local.draw, workers=2)
FOXES = [f"fox {number}" for number in range(6)]


def test_two_processes_make_the_files_of_one(tmp_path):
    outcome = run(job_of(tmp_path / "one", FOXES), ALONE)
    assert (len(outcome.made), outcome.errors) == (12, {})
    assert run(job_of(tmp_path / "two", FOXES), TWO).made == outcome.made
    one = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == one and len(one) == 12 + 2
    lines = [json.loads(line) for line in one["metadata.jsonl"].splitlines()]
    assert lines[1] == {"file_name": "images/fox-0-1.png", "text": "fox 0", "seed": 1}
    assert [line["text"] for line in lines] == [text for text in FOXES for _ in (0, 1)]


def test_ranks_of_any_number_share_the_rows_and_the_last_writes_the_whole_table(tmp_path):
    run(job_of(tmp_path / "whole", FOXES), ALONE)
    for world in (2, 3):
        job, folder = job_of(tmp_path / f"{world}", FOXES), tmp_path / f"{world}"
        made = [run(job, ALONE, rank=Rank(number, world)).made for number in range(world)]
        assert sorted(name for names in made for name in names) == sorted(file for r in job.rows for file in r.files)
        assert all(made) and contents(folder) == contents(tmp_path / "whole")


def test_the_shard_of_a_row_depends_on_the_row_alone(tmp_path):
    few, many = job_of(tmp_path, FOXES[:3]), job_of(tmp_path, FOXES)
    assert [shard_of(row, 4) for row in few.rows] == [shard_of(row, 4) for row in many.rows[:3]]
    renamed = replace(many.rows[0], name="other.jsonl:7")
    assert shard_of(renamed, 1 << 60) == shard_of(many.rows[0], 1 << 60)


def test_a_second_run_makes_what_is_missing_and_the_table_keeps_earlier_jobs(tmp_path):
    run(job_of(tmp_path / "set", FOXES), ALONE)
    before = contents(tmp_path / "set")
    (tmp_path / "set/images/fox-2-1.png").unlink()
    (tmp_path / "set/images/.fox-2-1.png.0a1b2c3d.tmp").write_bytes(b"cut")
    (tmp_path / "set/.metadata.jsonl.0a1b2c3d.tmp").write_bytes(b"cut")
    (tmp_path / "set/images/.mine.png.0a1b2c3d.tmp").write_bytes(b"cut")  # not of this job
    assert run(job_of(tmp_path / "set", FOXES), ALONE).made == ("images/fox-2-1.png",)
    assert contents(tmp_path / "set") == before
    assert [path.name for path in (tmp_path / "set").rglob(".*.tmp")] == [".mine.png.0a1b2c3d.tmp"]
    run(job_of(tmp_path / "set", ["cat"]), ALONE)
    names = [json.loads(line)["file_name"] for line in (tmp_path / "set/metadata.jsonl").read_text().splitlines()]
    assert len(names) == 14 and names[-1] == "images/cat-1.png"


@pytest.mark.parametrize("engine", [ALONE, TWO], ids=["one process", "two"])
def test_a_row_that_fails_is_named_and_the_others_are_made(tmp_path, engine):
    said = []
    job = job_of(tmp_path, ["fox", "broken", "cat"], errors={"rows.jsonl:9": "this is not JSON"})
    outcome = run(job, engine, tell=said.append)
    failed = {"rows.jsonl:9": "this is not JSON", "rows.jsonl:2": "RuntimeError: the picture is not finite"}
    assert (outcome.errors, len(outcome.made)) == (failed, 4)
    assert said == [f"{name}: {error}" for name, error in failed.items()]
    lines = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert {line["row"]: line["error"] for line in lines} == failed
    repaired = job_of(tmp_path, ["fox", "mended", "cat"])
    assert not run(repaired, ALONE).errors and not (tmp_path / "errors.jsonl").exists()


def test_a_rank_keeps_the_errors_of_the_others(tmp_path):
    job = job_of(tmp_path, ["broken 1", "broken 2", "broken 3", "broken 4"])
    assert {shard_of(row, 2) for row in job.rows} == {0, 1}
    for number in (0, 1, 0):
        run(job, ALONE, rank=Rank(number, 2))
    assert [json.loads(line)["row"] for line in (tmp_path / "errors.jsonl").read_text().splitlines()] == [
        row.name for row in job.rows
    ]


def test_a_job_stops_after_too_many_errors_and_names_them(tmp_path):
    job = job_of(tmp_path, ["broken 1", "broken 2", "broken 3", "fox"])
    with pytest.raises(Stopped, match="2 rows failed, and --max-errors is 1"):
        run(job, ALONE, max_errors=1)
    assert len((tmp_path / "errors.jsonl").read_text().splitlines()) == 2
    assert run(job, ALONE, max_errors=3).made == ("images/fox-0.png", "images/fox-1.png")


@pytest.mark.parametrize("engine", [ALONE, TWO], ids=["one process", "two"])
def test_a_full_disk_stops_the_job_and_names_the_row(tmp_path, engine):
    with pytest.raises(Stopped, match="stopped at rows.jsonl:2: .*no space left while writing .*full-0.png"):
        run(job_of(tmp_path, ["fox", "full", *FOXES]), engine)
    assert "rows.jsonl:2" in (tmp_path / "errors.jsonl").read_text() and not list(tmp_path.rglob("*fox-5*"))


def test_a_worker_without_the_model_stops_the_job(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at here/there"):
        run(job_of(tmp_path / "one", FOXES, Painter(absent=True)), ALONE)
    with pytest.raises(Stopped, match="the worker [0-9]+ on .* cannot start: no model at here/there"):
        run(job_of(tmp_path / "two", FOXES, Painter(absent=True)), TWO)


def test_a_row_that_ends_its_process_twice_is_an_error_and_the_others_are_made(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    outcome = run(job_of(tmp_path / "set", ["fox", "deadly", "cat"], Painter(log=str(log))), TWO)
    assert outcome.errors == {"rows.jsonl:2": "2 processes that drew it died, the last by signal 9"}
    assert len(outcome.made) == 4 and sum(path.name.startswith("deadly") for path in log.iterdir()) == 2


def test_a_folder_keeps_one_model_and_one_number_of_threads(tmp_path):
    job = job_of(tmp_path, FOXES, settings={"model": "tiny"})
    run(job, ALONE)
    for other, message in (
        (replace(job, settings={"model": "sd15"}), "images made with model = 'tiny', not 'sd15'"),
        (replace(job, threads=2), "images made with threads = 1, not 2"),
        (replace(job, settings={"steps": 3}), "made with settings that it does not record, not 3"),
    ):
        with pytest.raises(ValueError, match=message):
            run(other, ALONE)
    (tmp_path / "images/fox-0-0.png").unlink()
    with pytest.raises(ValueError, match="images made with hash = '00', not '11'"):
        run(replace(job, open=Painter(weights="11")), ALONE)
    for picture in (tmp_path / "images").iterdir():
        picture.unlink()
    (tmp_path / "metadata.jsonl").unlink()
    run(replace(job, open=Painter(weights="11")), ALONE)  # nothing is left of the other model
    agree(tmp_path, {"hash": "11"}, fresh=False)


def test_one_process_at_a_time_and_a_foreign_table_is_left_alone(tmp_path):
    with locked(tmp_path, "training"), pytest.raises(ValueError, match="is generating in"):
        run(job_of(tmp_path, FOXES), ALONE)
    (tmp_path / "metadata.jsonl").write_text('{"colour": "red"}\n')
    with pytest.raises(ValueError, match="metadata.jsonl:1: expected an object with 'file_name'"):
        run(job_of(tmp_path, FOXES), ALONE)
    assert (tmp_path / "metadata.jsonl").read_text() == '{"colour": "red"}\n'


@pytest.mark.parametrize("file", ["/x.png", "../x.png", "a/../../x.png"])
def test_a_file_outside_the_folder_is_refused(tmp_path, file):
    with pytest.raises(ValueError, match="outside the job's folder"):
        Job(tmp_path, (Row("a", (file,), {}),), Painter())


def test_rows_of_one_file_or_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="b and a make the same file x.png"):
        Job(tmp_path, (Row("a", ("x.png",), {}), Row("b", ("x.png",), {})), Painter())
    with pytest.raises(ValueError, match="same name"):
        Job(tmp_path, (Row("a", ("x.png",), {}), Row("a", ("y.png",), {})), Painter())


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, Rank()),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(5, 8, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, Rank(3, 4, 1)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, Rank(1, 2, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Rank()),  # the script of sbatch
    ],
)
def test_the_rank_is_that_of_torchrun_or_of_a_slurm_step(environment, rank):
    assert rank_of(environment) == rank


def test_a_rank_that_cannot_be_is_refused():
    for environment in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        with pytest.raises(ValueError, match="expected a rank below the number of processes"):
            rank_of(environment)


def test_engines_are_checked():
    with pytest.raises(ValueError, match="--workers is 0"):
        engine_of("local", 0, Rank())
    with pytest.raises(ValueError, match="one driver starts all workers of Ray"):
        engine_of("ray", 2, Rank(0, 2))
    assert Painter()(Place()).facts == {"hash": "00"}
