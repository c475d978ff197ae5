"""What editing and token merging keep, on every backbone they fit (docs/architecture.md, section 5)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from condit.backbones.dit import DiT, DiTConfig
from condit.backbones.pixart import PixArt, PixArtConfig
from condit.controls.control import Run, Step, When, Where
from condit.controls.dit4edit import PRESETS, Blend, DiT4Edit
from condit.controls.token_merging import TokenMerging
from condit.drawing.pipeline import Pipeline

HOW = {"num_inference_steps": 3, "output_type": "latent", "iterations": 1}
ANY_LAYER = Blend(start=0.0, layers=(0, 1))
MERGING = TokenMerging(0.5, minimum=0)
SETS = {
    "replace": [DiT4Edit(self_form=None)],
    "kv": [DiT4Edit(cross=None, self_steps=(0, 1), self_layers=(0, 1))],
    "map": [DiT4Edit(cross=None, self_form="map", self_steps=(0, 1), self_layers=(0, 1))],
    "blend": [DiT4Edit(blend=ANY_LAYER)],
    "merging": [MERGING],
    "merging with MLP": [replace(MERGING, mlp=True)],
    "everything": [DiT4Edit(blend=ANY_LAYER), replace(MERGING, ratio=0.3)],
}


@pytest.fixture(scope="module")
def pipes(make_pipe, make_pixart) -> dict[str, Pipeline]:
    return {
        "mmdit": make_pipe(blocks=1),
        "distilled": make_pipe(guidance_embeds=True, distilled=True, blocks=1),
        "pixart": make_pixart(make_pipe(blocks=1)),
    }


every_pipe = pytest.mark.parametrize("kind", ["mmdit", "distilled", "pixart"])
every_set = pytest.mark.parametrize("name", SETS)


@pytest.fixture(scope="module")
def photo(pictures) -> np.ndarray:
    return pictures(1)[0]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


@every_pipe
@every_set
def test_an_edit_to_the_same_prompt_returns_the_source_bit_for_bit(pipes, photo, kind, name):
    edited = pipes[kind].edit(photo, "a red fox", "a red fox", controls=SETS[name], **HOW)
    assert torch.equal(edited.images, edited.sources)


@every_pipe
@every_set
def test_an_edit_changes_the_image_and_each_control_changes_the_edit(pipes, photo, kind, name):
    """Without this the law above would hold for an edit that does nothing."""
    pipe = pipes[kind]
    plain = pipe.edit(photo, "a red fox", "a red cat", **HOW)
    edited = pipe.edit(plain.inversion, None, "a red cat", controls=SETS[name], **HOW)
    assert (edited.images - edited.sources).abs().max() > 1e-3
    assert (edited.images - plain.images).abs().max() > 1e-5


@every_pipe
def test_a_row_of_a_batch_equals_its_single_run(pipes, pictures, kind):
    images, prompts = pictures(2), (["a red fox", "an old house"], ["a red cat", "a new house"])
    batch = pipes[kind].edit(images, *prompts, controls=SETS["everything"], **HOW)
    for i in range(2):
        alone = pipes[kind].edit(images[i], prompts[0][i], prompts[1][i], controls=SETS["everything"], **HOW)
        close(batch.images[i : i + 1], alone.images)


@every_pipe
def test_a_repeat_and_a_kept_inversion_are_bit_equal_and_the_model_is_as_before(pipes, photo, kind):
    pipe = pipes[kind]
    before = [p.clone() for p in pipe.backbone.parameters()]
    first = pipe.edit(photo, "a red fox", "a red cat", controls=SETS["everything"], **HOW)
    again = pipe.edit(photo, "a red fox", "a red cat", controls=SETS["everything"], **HOW)
    kept = pipe.edit(first.inversion, "a red fox", "a red cat", controls=SETS["everything"], **HOW)
    assert torch.equal(first.images, again.images) and torch.equal(first.images, kept.images)
    assert all(torch.equal(a, b) for a, b in zip(before, pipe.backbone.parameters(), strict=True))


@every_pipe
def test_inversion_asks_without_guidance_and_without_controls(pipes, photo, kind):
    """One prediction a picture where a guided one takes two; a distilled network is told a guidance of 1."""
    pipe, seen = pipes[kind], []
    hook = pipe.backbone.register_forward_hook(
        lambda _, inputs, kept, out: seen.append((inputs[0], kept)), with_kwargs=True
    )
    pipe.invert(photo, "a red fox", num_inference_steps=2)
    hook.remove()
    assert len(seen) > 2 and not any(kept.get("controls") for _, kept in seen)
    if kind == "pixart":
        assert {len(x) for x, _ in seen} == {1}
    else:
        guidance = [stream.guidance for stream, _ in seen]
        assert {len(stream.tokens) for stream, _ in seen} == {1}
        assert all(g is None or g.tolist() == [1.0] for g in guidance) and (guidance[0] is None) == (kind == "mmdit")
    # The number of calls is that of the solver: none of them is a second side of guidance.
    calls = 2 * (1 + 2) if kind != "pixart" else 2
    assert len(seen) == calls + 2  # and the walk back


@every_pipe
def test_outside_a_mask_the_image_is_the_source(pipes, photo, kind):
    mask = np.zeros((32, 48), np.uint8)
    mask[:, :24] = 255
    pipe = pipes[kind]
    edited = pipe.edit(photo, "a red fox", "a red cat", mask=mask, controls=SETS["everything"], **HOW)
    inside, outside = halves(edited.images - edited.sources, kind)
    assert not outside.any() and inside.any()
    nothing = pipe.edit(photo, "a red fox", "a red cat", mask=np.zeros_like(mask), **HOW)
    assert torch.equal(nothing.images, nothing.sources)


def halves(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    x = x.unflatten(1, (4, 6)) if kind != "pixart" else x.movedim(1, -1)
    middle = x.shape[2] // 2
    return x[:, :, :middle], x[:, :, middle:]


@pytest.mark.parametrize("kind", ["mmdit", "distilled"])
def test_an_edit_a_style_reference_and_a_region_compose_in_one_call(pipes, make_ip, photo, pictures, kind):
    pipe, ip = pipes[kind], make_ip(pipes[kind])
    left = np.zeros((32, 48), np.uint8)
    left[:, :24] = 255
    style = ip.control(pictures(3)[2], strength=0.7, mask=left)
    both = pipe.edit(photo, "a red fox", "a red cat", mask=left, controls=[*SETS["everything"], style], **HOW)
    plain = pipe.edit(photo, "a red fox", "a red cat", mask=left, controls=SETS["everything"], **HOW)
    assert torch.equal(both.sources, plain.sources) and (both.images - plain.images).abs().max() > 1e-3
    assert not halves(both.images - both.sources, kind)[1].any()
    # The style alone is an edit too, and absent at strength zero.
    styled = pipe.edit(photo, "a red fox", "a red fox", controls=[style], **HOW)
    assert not torch.equal(styled.images, styled.sources)
    off = pipe.edit(photo, "a red fox", "a red fox", controls=[replace(style, strength=0.0)], **HOW)
    close(off.images, off.sources, 1e-5)


def test_a_cached_condition_acts_on_the_target_and_a_joint_one_is_refused(pipes, make_omini, photo, pictures):
    pipe = pipes["mmdit"]
    cached, joint = (make_omini(pipe, independent=i, delta=(0, 6)).control(pictures(2)[1]) for i in (True, False))
    edited = pipe.edit(photo, "a fox", "a fox", controls=[cached], **HOW)
    assert (edited.images - edited.sources).abs().max() > 1e-3
    with pytest.raises(ValueError, match="OminiReference joins the sequence"):
        pipe.edit(photo, "a fox", "a cat", controls=[joint], **HOW)


# Token merging, on its own


def mmdit_call(make_pipe) -> tuple[Any, Callable]:
    pipe = make_pipe(blocks=1)
    return pipe.backbone, lambda backbone, controls: predict_flow(pipe, backbone, controls)


def predict_flow(pipe: Pipeline, backbone, controls) -> Tensor:
    from condit.nn.streams import Stream, grid_ids

    g = torch.Generator().manual_seed(0)
    text = pipe.encode_text(["a fox"])
    tokens = torch.randn(1, 24, backbone.config.in_channels, generator=g)
    image = Stream(tokens, grid_ids(4, 6), torch.tensor([0.7]), text.pooled)
    return backbone(image, text.tokens, torch.zeros(5, 3), controls=controls)


def build(kind: str, make_pipe) -> tuple[Any, Callable]:
    """A backbone, and predict(network, controls) on fixed inputs of 4 x 6 tokens."""
    g = torch.Generator().manual_seed(0)
    if kind == "mmdit":
        return mmdit_call(make_pipe)
    torch.manual_seed(0)
    t = torch.tensor([500])
    if kind == "pixart":
        config = PixArtConfig(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=16, caption_channels=6
        )
        x, text = torch.randn(1, 4, 8, 12, generator=g), torch.randn(1, 5, 6, generator=g)
        return PixArt(config).requires_grad_(False), lambda net, controls: net(x, t, text, controls=controls)
    network = DiT(DiTConfig(input_size=(8, 12), hidden_size=16, depth=1, num_heads=2, num_classes=3))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    x, y = torch.randn(1, 4, 8, 12, generator=g), torch.tensor([1])
    return network.requires_grad_(False), lambda net, controls: net(x, t, y, controls=controls)


def prepared(control: TokenMerging, batch: int = 1) -> TokenMerging:
    run = Run(None, batch, (4, 6), torch.zeros(batch, 1), None, 4)  # type: ignore[arg-type]
    return control.prepare(run)


def test_a_backbone_whose_blocks_do_not_merge_raises():
    from condit.backbones.diffit import DiffiT, DiffiTConfig

    network = DiffiT(DiffiTConfig(input_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=3))
    run = Run(network, 1, (4, 4), torch.zeros(1, 0), None, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs blocks that merge: .* found DiffiT"):
        MERGING.prepare(run)


every_backbone = pytest.mark.parametrize("kind", ["mmdit", "pixart", "dit"])


@every_backbone
def test_merging_nothing_is_the_identity_and_merging_changes_little(make_pipe, kind):
    network, predict = build(kind, make_pipe)
    plain = predict(network, ())
    for control in (replace(MERGING, ratio=0.0), TokenMerging(0.5), replace(MERGING, where=Where(("nowhere",)))):
        acting = prepared(control).at(Step(0, 3, 1.0))  # 24 tokens are fewer than the 1024 that merging begins at
        assert torch.equal(predict(network, [acting] if acting else ()), plain)
    merged = predict(network, [prepared(MERGING).at(Step(0, 3, 1.0))])
    assert merged.shape == plain.shape and 1e-5 < (merged - plain).abs().max() < 1.0 * plain.abs().max()


@every_backbone
def test_equal_tokens_merge_without_a_trace(make_pipe, kind):
    """A layer of equal tokens gives equal outputs, merged or not, but for rotary positions."""
    if kind == "mmdit":
        pytest.skip("rotary positions tell equal tokens apart")
    network, _ = build(kind, make_pipe)
    block = network.transformer_blocks[0] if kind == "pixart" else network.blocks[0]
    tokens = torch.randn(1, 1, block.attn1.to_q.in_features if kind == "pixart" else 16).expand(1, 24, -1)
    control = prepared(replace(MERGING, mlp=True)).at(Step(0, 3, 1.0))
    results = [block(tokens, frame_of(network, kind, c)) for c in ((), (control,))]
    close(results[1], results[0], 1e-5)


def frame_of(network, kind: str, controls: tuple):
    if kind == "pixart":
        from condit.backbones.pixart import PixArtContext

        return PixArtContext(torch.zeros(1, 6, 16), torch.zeros(1, 5, 16), None, None, controls)
    from condit.backbones.dit import DiTContext

    return DiTContext(torch.zeros(1, 16), None, controls)


@pytest.mark.parametrize(
    "kind", [pytest.param("mmdit", marks=pytest.mark.slow), pytest.param("pixart", marks=pytest.mark.slow), "dit"]
)
def test_merging_compiles_into_one_graph_and_is_reused_in_another(make_pipe, kind):
    network, predict = build(kind, make_pipe)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    control = prepared(replace(MERGING, mlp=True, every=2))
    for index in range(3):
        acting = control.at(Step(index, 4, 0.5))
        close(predict(compiled, [acting]), predict(network, [acting]), 1e-5)


def test_both_sides_of_guidance_and_all_steps_share_one_match(monkeypatch, pipes):
    from condit.controls import token_merging

    made = []
    real = token_merging.match
    monkeypatch.setattr(token_merging, "match", lambda *args: made.append(args[0].shape) or real(*args))
    sites = len(pipes["mmdit"].backbone.sites)
    pipes["mmdit"]("a fox", controls=[MERGING], num_inference_steps=2, seed=0, output_type="latent")
    assert len(made) == 2 * sites  # a step, not a side
    made.clear()
    pipes["mmdit"]("a fox", controls=[replace(MERGING, every=2)], num_inference_steps=2, seed=0, output_type="latent")
    assert len(made) == sites
    made.clear()
    pipes["pixart"].edit(np.zeros((32, 48, 3), np.uint8), "a fox", "a cat", controls=[MERGING], **HOW)
    assert len(made) == 3 * 2 and all(shape[0] == 1 for shape in made)  # of the source alone


def test_a_region_follows_its_tokens_when_they_are_merged(pipes, make_ip, pictures):
    """A region of everything is none, merged or not; a region of nothing is plain."""
    pipe = pipes["mmdit"]
    ip = make_ip(pipe)

    def draw(value: int | None, ratio: float = 0.5) -> Tensor:
        mask = None if value is None else np.full((32, 48), value, np.uint8)
        style = [ip.control(pictures(1)[0], mask=mask)] if value != -1 else []
        return pipe("a fox", controls=[*style, replace(MERGING, ratio=ratio)], seed=0, output_type="latent").images

    half = np.zeros((32, 48), np.uint8)
    half[:, :24] = 255
    assert torch.equal(draw(255), draw(None))
    styled = pipe(
        "a fox", controls=[ip.control(pictures(1)[0], mask=half), MERGING], seed=0, output_type="latent"
    ).images
    assert not torch.equal(styled, draw(255))


def test_a_schedule_of_merging_leaves_the_other_steps_plain(pipes):
    pipe, seen = pipes["mmdit"], []

    def steps(controls) -> list[Tensor]:
        kept: list[Tensor] = []
        pipe(
            "a fox",
            controls=controls,
            num_inference_steps=2,
            seed=0,
            output_type="latent",
            callback_on_step_end=lambda p, i, t, k: kept.append(k["latents"]),
        )
        return kept

    seen = steps([replace(MERGING, when=When(0.5, 1))])
    plain = steps([])
    assert torch.equal(seen[0], plain[0]) and not torch.equal(seen[1], plain[1])
    # A curve is a factor on the ratio; 0 merges nothing.
    assert torch.equal(steps([replace(MERGING, when=When(curve=lambda x: 0.0))])[1], plain[1])


@pytest.mark.parametrize("kind", ["mmdit", "pixart"])
def test_an_edit_compiles_into_one_graph_that_serves_every_strength(pipes, kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    pipe = pipes[kind]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    backbone = pipe.backbone
    compiled = torch.compile(backbone, fullgraph=True, backend=counter)
    words = pipe.parts.text.words(["a red fox", "a red cat"])
    from condit.controls.control import PromptPair

    pair = PromptPair((words[0],), (words[1],))
    outs = []
    for share in (0.3, 0.6, 0.9):
        control = DiT4Edit(cross_until=share, record=False, reweight={"red": 1 + share})
        run = Run(backbone, 2, (4, 6), torch.zeros(2, 10), None, 4, edit=pair)
        acting = control.prepare(run).at(Step(1, 4, 0.6))
        outs.append([call(pipe, net, acting, kind) for net in (compiled, backbone)])
        close(outs[-1][0], outs[-1][1], 1e-5)
    assert counter.frame_count == 1
    assert not torch.equal(outs[0][0], outs[1][0])


def call(pipe, network, control, kind: str) -> Tensor:
    from condit.nn.streams import Stream, grid_ids

    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if kind == "pixart":
            x, text = torch.randn(2, 4, 8, 12, generator=g), torch.randn(2, 5, 12, generator=g)
            return network(x, torch.tensor([500, 500]), text, torch.ones(2, 5), controls=[control])
        text = pipe.encode_text(["a red fox", "a red cat"])
        tokens = torch.randn(2, 24, network.config.in_channels, generator=g)
        image = Stream(tokens, grid_ids(4, 6), torch.tensor([0.7, 0.7]), text.pooled)
        return network(image, text.tokens, torch.zeros(5, 3), controls=[control])


@every_pipe
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(pipes, photo, kind, name):
    target = "a red cat" if name in ("swap", "shape") else "a big red fox"
    edited = pipes[kind].edit(photo, "a red fox", target, controls=[PRESETS[name]], **HOW)
    assert edited.images.isfinite().all() and len(edited.psnr) == 1


@pytest.mark.parametrize("method", [torch.zeros(2), 3, "ddim"])
def test_a_method_that_is_no_function_is_refused(pipes, photo, method):
    with pytest.raises(ValueError, match="method must be an edit method"):
        pipes["mmdit"].edit(photo, "a fox", "a cat", method=method, **HOW)
