"""The official OpenAI client against the server."""

import asyncio
import base64
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

from condit.serve.engine import Done, QueuedJob
from conftest_serve import picture

openai = pytest.importorskip("openai")
STEPS = {"num_inference_steps": 2}


def client(live, **how):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", **{"max_retries": 0, **how})


def array(b64: str | None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64 or ""))).convert("RGB"), dtype=np.int16)


def test_generate_returns_images_with_usage_and_their_recipe(live):
    answer = client(live).images.generate(
        model="tiny", prompt="a red apple", n=2, size="128x128", extra_body={"seed": 3, **STEPS}
    )
    assert answer.data is not None and len(answer.data) == 2
    assert answer.usage is not None and answer.usage.output_tokens == 128
    png = Image.open(io.BytesIO(base64.b64decode(answer.data[1].b64_json or "")))
    recipe = json.loads(png.info["condit"])
    assert (recipe["request"]["seed"], recipe["index"], png.size) == (3, 1, (128, 128))
    assert "Seed: 4" in png.info["parameters"]


def test_the_same_seed_gives_the_same_image_with_a_reference_and_another_without(live):
    api, style = client(live), base64.b64encode(picture(1)).decode()
    control = {"adapter": "style", "reference": style, "strength": 1.5, "when": [0, 0.5], "where": ["*"]}
    body = {"seed": 1, **STEPS, "controls": [control]}
    first, again = (api.images.generate(prompt="a rocket", extra_body=body).data for _ in range(2))
    plain = api.images.generate(prompt="a rocket", extra_body={"seed": 1, **STEPS}).data
    assert np.array_equal(array(first[0].b64_json), array(again[0].b64_json))
    assert np.abs(array(first[0].b64_json) - array(plain[0].b64_json)).max() > 0


def test_edit_with_one_image_with_several_and_with_a_mask(live):
    api, body = client(live), {"seed": 2, **STEPS}
    one = api.images.edit(image=("a.png", picture(1)), prompt="a rocket", extra_body=body)
    several = api.images.edit(image=[("a.png", picture(1)), ("b.png", picture(2))], prompt="a rocket", extra_body=body)
    masked = api.images.edit(
        image=("a.png", picture(1)), mask=("m.png", picture(3, hole=True)), prompt="a rocket", extra_body=body
    )
    shown = [array(answer.data[0].b64_json) for answer in (one, several, masked)]
    assert all(image.shape == (128, 128, 3) for image in shown)
    assert np.abs(shown[0] - shown[1]).max() > 0 and np.abs(shown[0] - shown[2]).max() > 0
    recipe = json.loads(Image.open(io.BytesIO(base64.b64decode(several.data[0].b64_json or ""))).info["condit"])
    assert [reference["use"] for reference in recipe["request"]["references"]] == ["subject"]


def test_words_edit_an_image_and_return_maps(live):
    answer = client(live).images.edit(
        image=("a.png", picture(1)),
        prompt="a rocket",
        extra_body={"source_prompt": "a red apple", "num_inference_steps": 1},
    )
    maps = answer.data[0].model_extra["condit"]["maps"]
    assert {"source", "target"} == {entry["side"] for entry in maps}
    assert maps[0]["image"].startswith("data:image/png")


def test_a_stream_sends_partial_images_and_then_the_image(live):
    events = list(
        client(live).images.generate(
            prompt="a rocket", stream=True, partial_images=2, extra_body={"seed": 1, "num_inference_steps": 4}
        )
    )
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    whole = client(live).images.generate(prompt="a rocket", extra_body={"seed": 1, "num_inference_steps": 4})
    assert np.array_equal(array(events[-1].b64_json), array(whole.data[0].b64_json))
    assert events[-1].usage.total_tokens > 0


def test_the_asynchronous_client_streams_edits_and_generates(live):
    async def both():
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as api:
            stream = await api.images.edit(
                image=("a.png", picture(1)), prompt="a key", stream=True, partial_images=1, extra_body={**STEPS}
            )
            kinds = [event.type async for event in stream]
            plain = await api.images.generate(prompt="a key", extra_body=STEPS)
            return kinds, plain

    kinds, plain = asyncio.run(both())
    assert kinds[-1] == "image_edit.completed" and plain.data is not None


def test_models_are_listed_and_retrieved(live):
    api = client(live)
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").owned_by == "condit"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("../etc/passwd")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"n": 50}, "invalid_value", "n"),
        ({"size": "128x99999"}, "invalid_value", "size"),
        ({"size": "100x100"}, "invalid_value", None),
        ({"model": "dall-e-3"}, "model_not_found", "model"),
        ({"streems": 1}, "unknown_parameter", "streems"),
        ({"num_inference_steps": 5000}, "invalid_value", "num_inference_steps"),
        ({"controls": [{"adapter": "x", "reference": "aaaa"}]}, "unknown_adapter", "controls.adapter"),
        ({"controls": [{"adapter": "style", "reference": "/etc/passwd"}]}, "invalid_image", "controls.0.reference"),
        ({"controls": [{"adapter": "style", "reference": "https://x/y.png"}]}, "invalid_image", "controls.0.reference"),
        ({"guidance_scale": 1e9}, "invalid_value", "guidance_scale"),
    ],
)
def test_errors_have_the_form_of_openai(live, body, code, param):
    with pytest.raises(openai.APIStatusError) as raised:
        client(live).images.generate(prompt="a key", extra_body=body)
    assert (raised.value.code, raised.value.param) == (code, param)
    assert raised.value.status_code in (400, 404)


def test_a_full_queue_answers_429_with_retry_after_and_the_client_tries_again(run_server):
    with run_server(limits={"waiting": 1, "batch": 1}) as full:
        engine, pipe, free = full.server.engine, full.server.served(None).pipe, threading.Event()

        def blocked(tick) -> Done:
            free.wait(60)
            return Done([], {})

        engine.put([QueuedJob(pipe, ("edit",), 1, lambda event: None, edit=blocked)])
        while not engine.running:
            time.sleep(0.01)
        engine.put([QueuedJob(pipe, ("edit",), 1, lambda event: None, edit=blocked)])
        with pytest.raises(openai.RateLimitError) as raised:
            client(full).images.generate(prompt="a key", extra_body=STEPS)
        assert int(raised.value.response.headers["retry-after"]) >= 1
        assert raised.value.code == "queue_full"
        threading.Timer(0.5, free.set).start()
        answer = client(full, max_retries=5).images.generate(prompt="a key", extra_body=STEPS)
        assert answer.data is not None and "queue_full" in full.get("/metrics").text
