"""The pipeline over latents: what a call keeps, whatever the model."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

import condit
from condit.controls.control import Control, Step, When
from condit.controls.style_lora import StyleLoRA
from condit.controls.token_merging import TokenMerging
from condit.controls.wrap import Sides, Wrapper, sides
from condit.drawing.pipeline import Pipeline
from condit.nn.attention import Attend, Call
from condit.nn.lora import LoRA, linear_shapes

PROMPTS = ["a fox", "a rocket", "snow"]
every_kind = pytest.mark.parametrize("kind", ["sd15", "sdxl"])


@dataclass(frozen=True)
class Louder(Control):
    """Multiplies what attention gives, row by row of the batch, and has another factor beside the negative prompt."""

    factors: Tensor
    without: float | None = 0.5
    when: When = When()

    def at(self, step: Step) -> Control | None:
        return self if self.when.factor(step) else None

    def around(self, call: Call, attend: Attend) -> Tensor:
        return attend(call) * self.factors[:, None, None, None]

    def negative(self) -> Control | None:
        return None if self.without is None else replace(self, factors=torch.full_like(self.factors, self.without))


@pytest.fixture(scope="module")
def pipes(make_latent) -> Callable[[str], Pipeline]:
    made = {kind: make_latent(kind) for kind in ("sd15", "sdxl", "sd15-inpainting")}
    return made.__getitem__


def draw(pipe: Pipeline, prompts=PROMPTS, **how) -> Tensor:
    return pipe(prompts, **{"seed": 0, "output_type": "latent", **how}).images


@pytest.mark.parametrize(
    ("kind", "guidance", "sampler"),
    [("sd15", 1.0, "euler-ancestral"), ("sd15", 5.0, "ddim"), ("sdxl", 5.0, "euler-ancestral"), ("sdxl", 1.0, "dpm++")],
)
def test_a_row_of_a_batch_equals_its_single_run(pipes, pictures, kind: str, guidance: float, sampler: str):
    pipe, given = pipes(kind), pictures(3)
    factors, how = torch.tensor([1.3, 0.7, 1.1]), {"guidance_scale": guidance, "sampler": sampler}
    mask = np.zeros((8, 8), bool)
    mask[:, 3:] = True
    repaint = {"image": given, "mask_image": mask, "strength": 0.7}
    for more in ({}, repaint):
        batch = draw(pipe, negative_prompt=["x", "y", "z"], controls=[Louder(factors)], **how, **more)
        for i, prompt in enumerate(PROMPTS):
            one = {**more, **({"image": given[i]} if more else {})}
            single = draw(
                pipe, prompt, negative_prompt="xyz"[i], controls=[Louder(factors[i : i + 1])], seed=i, **how, **one
            )
            # Guidance and the random weights amplify the rounding of a batch; latents reach 60.
            torch.testing.assert_close(batch[i : i + 1], single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "without"), [("sd15", 0.5), ("sdxl", None)])
def test_guidance_in_one_call_equals_two_calls(pipes, kind: str, without: float | None):
    pipe = pipes(kind)
    control = Louder(torch.tensor([1.3, 0.7, 1.1]), without, When(0.3, 1.0))
    for how in ({}, {"controls": [control]}, {"controls": [control], "image_guidance_scale": 1.5}):
        one, two = draw(pipe, **how), draw(pipe, guidance_in_one_call=False, **how)
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)
    assert (draw(pipe, controls=[control]) - draw(pipe)).abs().max() > 1e-3


def test_sides_without_controls_leave_the_call_alone(pipes):
    pipe = pipes("sd15")
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 12, generator=g)
    t = torch.tensor([500.0, 20.0])
    plain = pipe.backbone(x, t, text)
    assert sides([(), ()]) == []
    loud = Louder(torch.tensor([2.0]))
    one_side = pipe.backbone(x, t, text, controls=[Sides((Wrapper(()), loud))])
    torch.testing.assert_close(one_side[:1], plain[:1], rtol=0, atol=1e-6)
    assert (one_side[1] - plain[1]).abs().max() > 1e-3


@every_kind
@pytest.mark.parametrize("in_one_call", [True, False])
def test_text_keys_are_projected_once_a_run(pipes, kind: str, in_one_call: bool):
    pipe, count = pipes(kind), 0
    layer = next(a for a in pipe.backbone._attentions if a.site.kind == "cross").to_k

    def tell(*_) -> None:
        nonlocal count
        count += 1

    hook = layer.register_forward_hook(tell)
    draw(pipe, num_inference_steps=4, guidance_in_one_call=in_one_call)
    hook.remove()
    assert count == (1 if in_one_call else 2)  # or once for each side


def test_scale_one_makes_one_prediction_a_step_and_ignores_the_negative_prompt(pipes):
    pipe = pipes("sd15")
    rows: list[int] = []
    hook = pipe.backbone.conv_in.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    plain = draw(pipe, guidance_scale=1.0)
    other = draw(pipe, guidance_scale=1.0, negative_prompt="ugly")
    hook.remove()
    assert rows == [3] * 6
    assert torch.equal(plain, other)


def test_a_style_lora_acts_and_its_strength_zero_is_the_plain_model(pipes):
    pipe = pipes("sdxl")
    lora = LoRA(linear_shapes(pipe.backbone, ["to_q", "to_k", "to_v", "to_out.0"]), rank=2)
    for b in lora.b.values():
        b.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    adapter = StyleLoRA(lora, frozenset())
    plain, styled = draw(pipe), draw(pipe, controls=[adapter.control(1.0)])
    assert (styled - plain).abs().max() > 1e-3
    assert torch.equal(draw(pipe, controls=[adapter.control(0.0)]), plain)


@every_kind
def test_encoded_prompts_may_be_given_instead_of_words(pipes, kind: str):
    pipe = pipes(kind)
    text, negative = pipe.encode_text(PROMPTS), pipe.encode_text(["x"])
    generated = draw(pipe, text, negative_prompt=negative)
    torch.testing.assert_close(generated, draw(pipe, negative_prompt="x"), rtol=0, atol=1e-6)


def test_sdxl_without_a_negative_prompt_is_guided_away_from_zeros(pipes):
    pipe = pipes("sdxl")
    zeros = pipe.encode_text(["x"]).each(torch.zeros_like)
    assert torch.equal(draw(pipe), draw(pipe, negative_prompt=zeros))
    assert not torch.equal(draw(pipe), draw(pipe, negative_prompt=""))


def test_the_callback_sees_every_step_and_may_change_the_latents(pipes):
    pipe, seen = pipes("sd15"), []

    def watch(its, i, t, state):
        seen.append((i, t))
        return {"latents": torch.zeros_like(state["latents"])} if i == 2 else None

    generated = draw(pipe, callback_on_step_end=watch)
    assert its_times(seen) == [667.0, 334.0, 1.0]  # a third of 1000, and Stable Diffusion's offset
    assert not generated.any()


def test_the_steps_may_be_those_of_the_released_code_or_a_list(pipes):
    """Released: 8 steps for 7 from 995 on; diffusers' rule has 7, from 853."""
    pipe, seen = pipes("sd15"), []
    how = {"guidance_scale": 1.0, "callback_on_step_end": lambda its, i, t, state: seen.append((i, t))}
    plain = draw(pipe, sampler="ddim", num_inference_steps=7, **how)
    assert its_times(seen) == [853, 711, 569, 427, 285, 143, 1]
    seen.clear()
    released = draw(pipe, sampler="ddim-ldm", num_inference_steps=7, **how)
    times = its_times(seen)
    assert times == [995, 853, 711, 569, 427, 285, 143, 1]
    assert torch.equal(released, draw(pipe, sampler="ddim", timesteps=[int(t) for t in times], **how))
    assert (released - plain).abs().max() > 0.01
    recipe = pipe("snow", timesteps=[999, 1], seed=0).recipe
    assert (recipe["timesteps"], recipe["num_inference_steps"]) == ([999, 1], 2)


def its_times(seen: list[tuple[int, float]]) -> list[float]:
    assert [i for i, _ in seen] == list(range(len(seen)))
    return [t for _, t in seen]


def test_given_latents_are_the_first_noise(pipes):
    pipe = pipes("sd15")
    noise = torch.stack([torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    assert torch.equal(draw(pipe, latents=noise, seed=7), draw(pipe))


def test_outputs_and_recipe(pipes, pictures):
    pipe = pipes("sd15")
    result = pipe(PROMPTS[:2], "bad", seed=4, num_images_per_prompt=2, image=pictures(1)[0], strength=0.7)
    assert result.seeds == [4, 5, 6, 7]
    assert [image.size for image in result.images] == [(48, 32)] * 4
    assert json.loads(json.dumps(result.recipe)) == result.recipe
    assert result.recipe["sampler"] == "ddim" and result.recipe["strength"] == 0.7
    tensor = pipe(PROMPTS[0], seed=4, output_type="pt").images
    assert tensor.shape == (1, 3, 32, 48) and tensor.abs().max() <= 1


def test_a_repeat_is_bit_equal(pipes):
    assert torch.equal(draw(pipes("sdxl"), sampler="euler-ancestral"), draw(pipes("sdxl"), sampler="euler-ancestral"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_generates_nearly_the_same(make_latent, pipes, dtype: torch.dtype):
    pipe = make_latent("sdxl")
    pipe.backbone.to(dtype)
    actual, wanted = draw(pipe, guidance_scale=1.0), draw(pipes("sdxl"), guidance_scale=1.0)
    assert actual.dtype == torch.float32
    assert (actual - wanted).std() < 0.1 * wanted.std()


BLACK = np.zeros((32, 48), np.uint8)


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        ("sd15", {"prompt": []}, "prompt must be"),
        ("sd15", {"height": 33}, "multiples of 4"),
        ("sd15", {"num_inference_steps": 0}, "1 to 1000"),
        ("sd15", {"num_inference_steps": 3, "timesteps": [9, 1]}, "num_inference_steps is 3, but timesteps has 2"),
        ("sd15", {"timesteps": [1, 9]}, "falling list"),
        ("sd15", {"output_type": "numpy"}, "output_type"),
        ("sd15", {"sampler": "nonsense"}, "sampler must be one of"),
        ("sd15", {"eta": 0.5, "sampler": "dpm++"}, "eta is the noise"),
        ("sd15", {"strength": 0.5}, "give image="),
        ("sd15", {"image": BLACK, "strength": 0.0}, r"\(0, 1\]"),
        ("sd15", {"image": BLACK, "strength": 0.1}, "leaves none"),
        ("sd15", {"mask_image": BLACK}, "give image= too"),
        ("sd15", {"image": [BLACK] * 2}, "2 references for 3 images"),
        ("sd15", {"negative_prompt": ["a", "b"]}, "2 negative prompts for 3"),
        ("sd15", {"latents": torch.zeros(1, 4, 8, 8)}, "latents must be noise of shape"),
        ("sd15", {"seed": 1, "generator": torch.Generator()}, "not both"),
        ("sd15-inpainting", {}, "inpainting model"),
        ("sd15-inpainting", {"image": BLACK}, "inpainting model"),
    ],
)
def test_a_wrong_call_raises(pipes, kind: str, how: dict, message: str):
    with pytest.raises(ValueError, match=message):
        pipes(kind)(**{"prompt": PROMPTS, **how})


def test_controls_that_join_tokens_are_refused(pipes):
    class Joins(Control):
        def streams(self):
            return ()

    with pytest.raises(ValueError, match="Joins joins tokens"):
        draw(pipes("sd15"), controls=[Joins()])
    with pytest.raises(ValueError, match="needs blocks that merge: .* found UNet"):
        draw(pipes("sd15"), controls=[TokenMerging()])
    with pytest.raises(ValueError, match="found Joins"):
        draw(pipes("sd15"), controls=Joins())


def test_an_unknown_scheduler_asks_for_a_sampler(pipes):
    pipe = Pipeline(replace(pipes("sd15").parts, solver=None))
    with pytest.raises(ValueError, match="Pass sampler="):
        draw(pipe)
    assert torch.equal(draw(pipe, sampler="ddim"), draw(pipes("sd15")))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_published_model_that_is_missing_raises_with_its_place(monkeypatch, tmp_path, name: str):
    monkeypatch.setenv("CONDIT_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="models.*huggingface.co"):
        condit.load(name)


def test_a_compiled_backbone_is_one_graph_for_all_steps_and_strengths(make_latent):
    level = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    pipe, graphs = make_latent("sd15", block_out_channels=(8,), **level), 0  # compiling takes seconds a block
    louder = [Louder(torch.tensor([factor])) for factor in (1.3, 0.6)]
    how = {"num_inference_steps": 3, "guidance_scale": 4.0, "negative_prompt": "bad"}
    wanted = [draw(pipe, "a fox", controls=[control], **how) for control in louder]

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    pipe.backbone = torch.compile(pipe.backbone, fullgraph=True, backend=backend)
    for control, picture in zip(louder, wanted, strict=True):
        generated = draw(pipe, "a fox", controls=[control], **how)
        torch.testing.assert_close(generated, picture, rtol=1e-5, atol=1e-4)
    assert graphs == 1
    torch._dynamo.reset()
