"""pipe.predict: one prediction, with a prompt or an encoded text, as the documentation uses it."""

import re
from pathlib import Path

import pytest
import torch

GETTING_STARTED = Path(__file__).parents[2] / "docs" / "getting-started.md"


def test_a_step_of_a_flow_is_its_prediction(make_pipe, make_ip, pictures):
    pipe = make_pipe()
    style = make_ip(pipe).control(pictures(1)[0])
    x = torch.randn(pipe("a fox", num_inference_steps=1, seed=0, output_type="latent").images.shape)
    how = {"controls": [style], "guidance_scale": 3.0}
    one = pipe("a fox", latents=x, num_inference_steps=1, eta=0.0, output_type="latent", **how).images
    torch.testing.assert_close(one, x - pipe.predict(x, 1.0, "a fox", **how), rtol=0, atol=1e-6)
    assert not torch.equal(pipe.predict(x, 1.0, "a fox"), pipe.predict(x, 1.0, "a fox", controls=[style]))


@pytest.mark.parametrize("family", ["flow", "sd15", "pixart"])
def test_an_encoded_text_is_a_prompt(family, make_pipe, make_latent, make_pixart):
    pipe = make_latent("sd15") if family == "sd15" else make_pipe()
    pipe = make_pixart(pipe) if family == "pixart" else pipe
    how = {"seed": 0, "num_inference_steps": 2, "output_type": "latent"}
    text = pipe.encode_text("a fox")
    latents = pipe("a fox", **how).images
    assert torch.equal(pipe(text, **how).images, latents)
    assert torch.equal(pipe.predict(latents, 0.5, text), pipe.predict(latents, 0.5, "a fox"))


def test_the_pages_prediction_runs(make_pipe, make_ip, pictures):
    page = GETTING_STARTED.read_text(encoding="utf-8").partition("## Research")[2]
    (snippet,) = re.findall(r"```python\n(.*?)```", page.partition("\n## ")[0], flags=re.S)
    pipe = make_pipe()
    adapter = make_ip(pipe)

    class Style:
        def control(self, name: str):
            return adapter.control(pictures(1)[0])

    names = {"pipe": pipe, "style": Style(), "torch": torch}
    exec(snippet, names)
    assert names["velocity"].shape == names["x"].shape and names["clean"].size == pipe.size[::-1]
