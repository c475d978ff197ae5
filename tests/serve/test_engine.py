"""The queue: who is next, who shares a batch, who leaves; each image equals its single run."""

import base64
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from condit.serve.engine import Done, Engine, Event, Progress, QueuedJob, partial_steps, take
from condit.serve.forms import GenerationForm
from condit.serve.limits import Limits, Refusal
from condit.serve.metrics import Metrics
from conftest_serve import picture


def job(key: int, rows: int, *, edit: bool = False) -> QueuedJob:
    run = (lambda tick: Done([], {})) if edit else None
    return QueuedJob(None, (key,), rows, lambda event: None, edit=run)  # type: ignore[arg-type]


JOBS = st.lists(st.builds(job, st.integers(0, 2), st.integers(1, 6), edit=st.booleans()), min_size=1, max_size=30)


@given(JOBS, st.integers(1, 16))
def test_a_batch_begins_with_the_oldest_holds_one_kind_and_keeps_to_the_limit(jobs, most):
    taken = take(jobs, most)
    assert taken[0] is jobs[0]
    assert {one.key for one in taken} == {jobs[0].key}
    assert len(taken) == 1 or (sum(one.rows for one in taken) <= most and not any(one.edit for one in taken))


@given(JOBS, st.integers(1, 16))
def test_nobody_waits_for_more_batches_than_there_are_jobs_before_him(jobs, most):
    waiting, batches, served_at = list(jobs), 0, {}
    while waiting:
        taken = take(waiting, most)
        waiting = [one for one in waiting if one not in taken] + [job(0, 1) for _ in range(batches < 5)]
        served_at |= {id(one): batches for one in taken}
        batches += 1
    assert all(served_at[id(one)] <= place for place, one in enumerate(jobs))


def test_partial_images_are_spaced_equally_before_the_last_step():
    assert partial_steps(20, 3) == {4, 9, 14}
    assert partial_steps(1, 3) == set() and partial_steps(4, 0) == set()


def collect(engine: Engine, served, forms: list[GenerationForm]) -> list[list[Event]]:
    """The events of forms that are all queued before the engine starts."""
    events: list[list[Event]] = [[] for _ in forms]
    done = threading.Semaphore(0)

    def emitter(number: int):
        def emit(event: Event) -> None:
            events[number].append(event)
            if not isinstance(event, Progress):
                done.release()

        return emit

    engine.put([served.job(served.request(form, form.seed or 0), 0, emitter(i)) for i, form in enumerate(forms)])
    engine.start()
    for _ in forms:
        assert done.acquire(timeout=60)
    engine.stop()
    engine.join(30)
    return events


def strangers() -> list[GenerationForm]:
    style, subject = (base64.b64encode(picture(i)).decode() for i in (1, 2))
    mask = base64.b64encode(picture(3, hole=True)).decode()
    common = {"num_inference_steps": 3}
    controls = [
        [],
        [{"adapter": "style", "reference": style, "strength": 1.3}],
        [{"adapter": "subject", "reference": subject, "when": [0, 0.7]}],
        [{"adapter": "edges", "reference": subject}, {"adapter": "style", "reference": style, "mask": mask}],
    ]
    forms = [
        GenerationForm.model_validate({"prompt": f"a rocket {i}", "seed": 5, "controls": c, "n": 1 + i % 2, **common})
        for i, c in enumerate(controls)
    ]
    more = {"guidance_scale": 1.0, "negative_prompt": "a key"}
    return [*forms, GenerationForm.model_validate({"prompt": "a fox", "seed": 9, **more, **common})]


def test_an_image_in_a_batch_of_strangers_is_that_of_its_single_run(served):
    forms, metrics = strangers(), Metrics()
    together = collect(Engine(Limits(), metrics), served, forms)
    assert "condit_batch_images_sum 7.0" in metrics.text().decode() and "condit_batch_images_count 1.0" in (
        metrics.text().decode()
    )
    alone = collect(Engine(Limits(), Metrics(), batching=False), served, forms)
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one[-1], Done) and isinstance(other[-1], Done)
        assert one[-1].recipe == other[-1].recipe
        for a, b in zip(one[-1].images, other[-1].images, strict=True):
            # 1e-4 of the range is less than one of 255 levels; rounding may still fall to either side.
            difference = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))
            assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_a_cancelled_request_leaves_its_batch_and_the_others_finish(served):
    engine, left, finished = Engine(Limits(), Metrics()), [], threading.Event()
    jobs: list[QueuedJob] = []

    def leave(event: Event) -> None:
        left.append(event)
        if len(left) == 1:
            engine.cancel([jobs[0]])

    def stay(event: Event) -> None:
        if isinstance(event, Done):
            finished.set()

    form = GenerationForm(prompt="a key", seed=0, num_inference_steps=5)
    jobs += [served.job(served.request(form, 0), 0, emit) for emit in (leave, stay)]
    engine.put(jobs)
    engine.start()
    assert finished.wait(60)
    engine.stop()
    assert [type(event) for event in left] == [Progress]


def test_a_full_queue_and_a_shutdown_are_refused_and_what_waits_is_told(served):
    engine, told = Engine(Limits(waiting=2), Metrics()), []
    form = GenerationForm(prompt="a key", seed=0, num_inference_steps=1, n=2)
    first = served.job(served.request(form, 0), 0, told.append)
    engine.put([first])
    with pytest.raises(Refusal, match="limit is 2") as full:
        engine.put([served.job(served.request(form, 0), 0, told.append)])
    assert full.value.status == 429 and int(full.value.headers["Retry-After"]) >= 1
    engine.stop()
    assert told[0].status == 503 and told[0].headers
    with pytest.raises(Refusal) as closed:
        engine.put([first])
    assert closed.value.status == 503


def test_an_error_of_one_request_does_not_reach_the_others(served):
    good = GenerationForm(prompt="a key", seed=0, num_inference_steps=2)
    engine = Engine(Limits(), Metrics())
    results: list[Event] = []
    done = threading.Semaphore(0)

    def emit(event: Event) -> None:
        if not isinstance(event, Progress):
            results.append(event)
            done.release()

    def broken():
        raise RuntimeError("a secret path /home/x")

    jobs = [served.job(served.request(good, 0), 0, emit) for _ in range(2)]
    jobs[0].begin = broken
    engine.put(jobs)
    engine.start()
    assert done.acquire(timeout=60) and done.acquire(timeout=60)
    engine.stop()
    refusal = next(event for event in results if isinstance(event, Refusal))
    assert refusal.status == 500 and "secret" not in str(refusal.body)
    assert any(isinstance(event, Done) for event in results)


def test_a_shutdown_ends_what_runs_and_refuses_what_waits(run_server):
    with run_server() as one:
        pipe, free, told = one.server.served(None).pipe, threading.Event(), []

        def blocked(tick) -> Done:
            free.wait(60)
            return Done([], {})

        one.server.engine.put([QueuedJob(pipe, ("edit",), 1, told.append, edit=blocked)])
        while not one.server.engine.running:
            time.sleep(0.01)
        body, answers = {"prompt": "a key", "num_inference_steps": 1}, []
        waiting = threading.Thread(target=lambda: answers.append(one.post("/v1/images/generations", json=body)))
        waiting.start()
        while not one.server.engine.waiting:
            time.sleep(0.01)
        one.runner.should_exit = True
        waiting.join(30)
        assert answers[0].status_code == 503 and answers[0].headers["retry-after"] == "5"
        assert told == []
        free.set()
        one.server.engine.join(30)
        assert isinstance(told[0], Done)


def test_a_client_that_leaves_frees_its_place(run_server):
    import httpx

    with run_server() as one:
        body = {"prompt": "a key", "num_inference_steps": 100}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{one.url}/v1/images/generations", json=body, timeout=1.0)
        deadline = time.monotonic() + 30
        while (one.server.engine.running or one.server.engine.waiting) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not one.server.engine.running
        assert "condit_images_total 0.0" in one.server.metrics.text().decode()
