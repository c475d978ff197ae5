"""DiT4Edit's control at the attention call, its words, and what it refuses."""

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from condit.controls.control import PromptPair, Run, Step
from condit.controls.dit4edit import PRESETS, Blend, DiT4Edit, changed_words, edited_places, in_window
from condit.controls.edit_maps import blend_mask, replacement_table
from condit.encoders.words import Words
from condit.nn.attention import Call, Site, attend

SELF, CROSS, JOINT = (Site(f"layer.0.{kind}", kind, 0) for kind in ("self", "cross", "joint"))  # type: ignore[arg-type]
L, N = 5, 6


def said(prompt: str, pieces: dict[str, int] | None = None, length: int = L) -> Words:
    """A piece a word, or as many as told; no begin token, an end token."""
    words, tokens, at = tuple(prompt.split()), [], 0
    for word in words:
        count = (pieces or {}).get(word, 1)
        tokens.append(tuple(range(at, at + count)))
        at += count
    ids = tuple(hash((w, p)) for w, t in zip(words, tokens, strict=True) for p in range(len(t)))
    return Words(prompt, words, tuple(tokens), (*ids, 1), length)


class Backbone:
    sites = (SELF,)


def acting(control: DiT4Edit, source: str, target: str, step: Step | None = None, length: int = L) -> DiT4Edit:
    pair = PromptPair((said(source, length=length),), (said(target, length=length),))
    run = Run(Backbone(), 2, (2, 3), torch.zeros(2, 1), None, 4, edit=pair)  # type: ignore[arg-type]
    active = control.prepare(run).at(step or Step(0, 10, 1.0))
    assert active is not None
    return active


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, *shape, generator=g) for shape in shapes]


def cross_call() -> Call:
    q, k, v = tensors((N, 4), (L, 4), (L, 4))
    return Call(q, k, v, CROSS, image=slice(0, N), keys=slice(L, L))


def joint_call() -> Call:
    q, k, v = tensors((L + N, 4), (L + N + 2, 4), (L + N + 2, 4))  # two keys of a condition behind
    return Call(q, k, v, JOINT, image=slice(L, L + N), keys=slice(L, L + N))


def maps_of(call: Call, controls=()) -> Tensor:
    """The probabilities that reach the values."""
    seen = []

    class Last:
        def around(self, call: Call, attend) -> Tensor:
            inner = call.edit_map

            def kept(p: Tensor) -> Tensor:
                seen.append(p if inner is None else inner(p))
                return seen[-1]

            return attend(replace(call, edit_map=kept))

    attend(call, [*controls, Last()])
    return seen[0]


def test_the_target_sees_the_sources_map_for_shared_words_and_its_own_else():
    control = acting(DiT4Edit(self_form=None), "a cat sits", "a dog sits")
    plain, actual = maps_of(cross_call()), maps_of(cross_call(), [control])
    assert torch.equal(actual[0], plain[0])
    # Replacement: three words and the end stand in the source's place; the padding stays; rows sum to 1.
    shared = plain[0, :, :, :4]
    expected = torch.cat([shared, plain[1, :, :, 4:]], -1)
    torch.testing.assert_close(actual[1], expected / expected.sum(-1, keepdim=True))


def test_refinement_leaves_new_words_their_own_map():
    control = acting(DiT4Edit(cross="refine", self_form=None), "a cat", "a big cat")
    plain, actual = maps_of(cross_call()), maps_of(cross_call(), [control])
    old, new = plain[0], plain[1]
    expected = torch.stack([old[..., 0], new[..., 1], old[..., 1], old[..., 2], new[..., 4]], -1)
    torch.testing.assert_close(actual[1], expected / expected.sum(-1, keepdim=True))


def test_in_joint_attention_only_the_images_rows_and_the_texts_columns_change_and_keep_their_share():
    control = acting(DiT4Edit(self_form=None), "a cat sits", "a dog sits")
    plain, actual = maps_of(joint_call()), maps_of(joint_call(), [control])
    assert torch.equal(actual[0], plain[0]) and torch.equal(actual[1, :, :L], plain[1, :, :L])
    assert torch.equal(actual[1, :, L:, L:], plain[1, :, L:, L:])
    assert not torch.allclose(actual[1, :, L:, :L], plain[1, :, L:, :L])
    torch.testing.assert_close(actual.sum(-1), plain.sum(-1))


def test_a_factor_multiplies_the_maps_of_a_word():
    control = acting(DiT4Edit(cross=None, self_form=None, reweight={"dog": 2.5}), "a cat", "a dog")
    plain, actual = maps_of(cross_call()), maps_of(cross_call(), [control])
    torch.testing.assert_close(actual[1, ..., 1], 2.5 * plain[1, ..., 1])
    torch.testing.assert_close(actual[1, ..., [0, 2, 3, 4]], plain[1, ..., [0, 2, 3, 4]])


def test_a_words_exchange_may_end_before_the_others():
    control = DiT4Edit(self_form=None, cross_until=1.0, word_until={"dog": 0.0})
    plain, actual = maps_of(cross_call()), maps_of(cross_call(), [acting(control, "a cat sits", "a dog sits")])
    unequal = (actual[1] / actual[1].sum(-1, keepdim=True) - plain[1]).abs().amax((0, 1))
    ratio = actual[1, ..., 1] / plain[1, ..., 1]  # its own map but for the row's new sum
    assert unequal[0] > 1e-3 and ratio.std() > 0
    late = control.prepare(
        Run(Backbone(), 2, (2, 3), torch.zeros(2, 1), None, 4, edit=PromptPair((said("a cat"),), (said("a dog"),)))  # type: ignore[arg-type]
    ).at(Step(9, 10, 0.1))
    assert late is not None and late.gate is not None and late.gate.flatten().tolist() == [1, 0, 1, 1, 1]


@pytest.mark.parametrize("form", ["kv", "map"])
def test_the_target_looks_up_the_sources_keys_and_values_or_takes_its_map(form):
    q, k, v = tensors((N, 4), (N, 4), (N, 4))
    call = Call(q, k, v, SELF, image=slice(0, N), keys=slice(0, N))
    control = acting(DiT4Edit(cross=None, self_form=form, self_steps=(0, 1)), "a cat", "a dog")
    actual = attend(call, [control])
    pick = torch.tensor([0, 0])
    taken = {"kv": Call(q, k[pick], v[pick], SELF), "map": Call(q[pick], k[pick], v, SELF)}[form]
    assert torch.equal(actual[0], attend(call)[0]) and torch.equal(actual, attend(taken))


def test_keys_of_text_and_conditions_stay_the_targets_own():
    call, seen = joint_call(), []

    class Last:
        def around(self, call: Call, attend) -> Tensor:
            seen.append(call)
            return attend(call)

    attend(call, [acting(DiT4Edit(cross=None, self_form="kv", self_steps=(0, 1)), "a", "b"), Last()])
    assert torch.equal(seen[0].k[1, :, L : L + N], call.k[0, :, L : L + N])
    for part in (slice(0, L), slice(L + N, None)):
        assert torch.equal(seen[0].k[1, :, part], call.k[1, :, part])


def test_windows_of_steps_and_layers_follow_prompt_to_prompt():
    assert [in_window(i, 5, (0.0, 0.4)) for i in range(5)] == [True, True, False, False, False]
    control = DiT4Edit(cross=None, self_form="kv", self_steps=(0.5, 1.0), self_layers=(0.5, 1.0))
    pair = PromptPair((said("a"),), (said("b"),))
    run = Run(Backbone(), 2, (2, 3), torch.zeros(2, 1), None, 4, edit=pair)  # type: ignore[arg-type]
    assert control.prepare(run).at(Step(1, 4, 0.8)) is None
    late = replace(control.prepare(run), count=4).at(Step(2, 4, 0.5))
    assert late is not None
    q, k, v = tensors((N, 4), (N, 4), (N, 4))
    for index, acts in ((1, False), (2, True)):
        call = Call(q, k, v, Site("x", "self", index), image=slice(0, N), keys=slice(0, N))
        assert torch.equal(attend(call, [late]), attend(call)) != acts


# Words


def test_words_after_one_with_another_number_of_pieces_stay_aligned():
    source, target = said("a cat sits", length=7), said("a skyscraper sits", {"skyscraper": 3}, length=7)
    aligned, official = (replacement_table(source, target, tail=t) for t in ("aligned", "official"))
    assert aligned[2, 4] == 1 and aligned[1, 1:4].tolist() == pytest.approx([1 / 3] * 3)
    assert official[4, 4] == 1 and official[2, 4] == 0  # the official code goes on with column j from row j


def test_the_edited_words_are_those_that_differ():
    assert changed_words(said("a cat on grass"), said("a dog on grass")) == ([1], [1])
    assert changed_words(said("a cat"), said("a big cat")) == ([], [1])
    places = edited_places(None, said("a cat"), said("a big cat"))
    assert places.tolist() == [[0] * 5, [0, 1, 0, 0, 0]]
    named = edited_places(Blend(words=("cat",)), said("a cat"), said("a big cat"))
    assert named.tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    with pytest.raises(ValueError, match="'dog' is in neither 'a cat' nor 'a big cat'"):
        edited_places(Blend(keep=("dog",)), said("a cat"), said("a big cat"))


def test_a_blend_is_bounded_by_either_prompts_word_and_an_unused_one_bounds_nothing():
    maps = torch.zeros(1, 2, 16)
    maps[0, 0, 0] = 1
    mask = blend_mask(maps, (4, 4))
    assert mask[0, :2, :2].all() and mask.sum() == 4


def test_the_kept_maps_bound_the_edit_after_the_blends_start():
    control = DiT4Edit(self_form=None, blend=Blend(start=0.5, layers=(0, 1)))
    pair = PromptPair((said("a cat"),), (said("a dog"),))
    run = Run(Backbone(), 2, (2, 3), torch.zeros(2, 1), None, 4, edit=pair)  # type: ignore[arg-type]
    ready = control.prepare(run)
    early, late = ready.at(Step(0, 4, 1.0)), ready.at(Step(3, 4, 0.2))
    assert early is not None and late is not None and early.region() is None
    attend(cross_call(), [early])
    assert early.region() is None
    region = late.region()
    assert region is not None and region.shape == (1, N) and set(region.unique().tolist()) <= {0.0, 1.0}
    assert late.blend is not None
    kept = replace(late, blend=replace(late.blend, keep=("cat",))).region()
    assert kept is not None and torch.equal(kept, 1 - region)


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cross": "swap"}, "cross must be"),
        ({"self_form": "q"}, "self_form must be"),
        ({"cross_until": 1.2}, "cross_until is a share of the steps, 0 to 1; found 1.2"),
        ({"word_until": {"cat": -1}}, r"word_until\['cat'\] is a share"),
        ({"reweight": {"cat": float("nan")}}, r"reweight\['cat'\] is a factor"),
        ({"self_steps": (0.5, 1.5)}, "self_steps needs 0 <= start < end <= 1; found 0.5 to 1.5"),
        ({"self_layers": (0.5, 0.5)}, "self_layers needs"),
        ({"blend": Blend(layers=(0.9, 0.1))}, "blend.layers needs"),
        ({"blend": Blend(threshold=0)}, "start and threshold"),
    ],
)
def test_settings_outside_the_schedule_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        DiT4Edit(**fields)


@pytest.mark.parametrize(
    ("control", "target", "message"),
    [
        (DiT4Edit(cross="replace"), "a big dog", "as many words: 'a cat' has 2, 'a big dog' 3"),
        (DiT4Edit(), "one two three", "no word in common"),
        (DiT4Edit(reweight={"bird": 2}), "a dog", "'bird' is not in the prompt 'a dog'. Its words are a, dog"),
    ],
)
def test_prompts_that_do_not_fit_the_edit_raise(make_pipe, control, target, message):
    pipe = make_pipe(blocks=1)
    with pytest.raises(ValueError, match=message):
        pipe.edit(np.zeros((32, 48, 3), np.uint8), "a cat", target, controls=[control], num_inference_steps=1)


@pytest.mark.parametrize(
    ("control", "target", "message"),
    [
        (PRESETS["add"], "one two three", "no word in common"),
        (DiT4Edit(self_layers=(0.0, 0.3)), "a dog", "self_layers, 0.0 to 0.3, contains none of the model's 2 layers"),
        (DiT4Edit(blend=Blend(layers=(0.6, 0.9))), "a dog", "blend.layers, 0.6 to 0.9, contains none"),
    ],
)
def test_unknown_words_and_layers_raise_before_the_inversion(make_pipe, control, target, message):
    pipe, forwards = make_pipe(blocks=1), []
    hook = pipe.backbone.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match=message):
        pipe.edit(np.zeros((32, 48, 3), np.uint8), "a cat", target, controls=[control], num_inference_steps=1)
    hook.remove()
    assert not forwards


def test_a_window_shorter_than_a_step_does_nothing():
    short = DiT4Edit(cross=None, self_steps=(0.0, 0.3))
    pair = PromptPair((said("a cat"),), (said("a dog"),))
    run = Run(Backbone(), 2, (2, 3), torch.zeros(2, 1), None, 4, edit=pair)  # type: ignore[arg-type]
    ready = short.prepare(run)
    assert all(ready.at(Step(i, 3, 1 - i / 3)) is None for i in range(3))
    assert ready.at(Step(0, 4, 1.0)) is not None


def test_words_that_differ_after_the_encoders_limit_raise():
    def cut(words: Words) -> Words:
        return replace(words, tokens=tuple(t if t and t[-1] < 3 else () for t in words.tokens))

    far = [cut(said(f"a big fluffy {word}")) for word in ("cat", "dog")]
    with pytest.raises(ValueError, match="'cat' and the other words that differ come after the 5 tokens"):
        acting_on(DiT4Edit(), *far)
    near = [cut(said(f"a big {size} {word}")) for size, word in (("old", "cat"), ("new", "dog"))]
    acting_on(DiT4Edit(), *near)  # one of them is read


def acting_on(control: DiT4Edit, source: Words, target: Words) -> None:
    control.edit(PromptPair((source,), (target,)), cast("nn.Module", Backbone()))


def test_each_edit_may_have_its_own_mask(make_pipe):
    pipe = make_pipe(blocks=1)
    white, black = np.full((32, 48), 255, np.uint8), np.zeros((32, 48), np.uint8)
    edited = pipe.edit(
        np.zeros((32, 48, 3), np.uint8),
        "a cat",
        ["a dog", "a dog"],
        mask=[white, black],
        num_inference_steps=2,
        output_type="latent",
    )
    source = edited.sources[0]
    assert not torch.equal(edited.images[0], source) and torch.equal(edited.images[1], source)


def test_one_word_for_another_has_no_word_in_common_and_is_replaced(make_pipe):
    edited = make_pipe(blocks=1).edit(
        np.zeros((32, 48, 3), np.uint8), "cat", "dog", controls=[PRESETS["swap"]], num_inference_steps=1
    )
    assert len(edited.images) == 1


def test_it_acts_in_an_edit_only(make_pipe):
    with pytest.raises(ValueError, match="use pipe.edit"):
        make_pipe(blocks=1)("a cat", controls=[DiT4Edit()], num_inference_steps=1)


def test_images_of_odd_sizes_are_fitted_and_wrong_ones_raise(make_pipe):
    pipe = make_pipe(blocks=1, canvas=False)  # draws 32 x 48 in tokens of 8 px
    odd = Image.new("RGB", (101, 67), "red")
    edited = pipe.edit(odd, "a cat", "a dog", num_inference_steps=1)
    assert edited.images[0].size == (48, 32) and edited.inversion.size == (32, 48)
    small = pipe.edit(Image.new("RGB", (20, 20)), "a cat", "a dog", num_inference_steps=1)
    assert small.images[0].size == (16, 16)  # whole tokens, never larger than given
    fixed = make_pipe(blocks=1).edit(Image.new("RGB", (20, 20)), "a cat", "a dog", num_inference_steps=1)
    assert fixed.images[0].size == (48, 32)  # a model of one size
    with pytest.raises(ValueError, match="multiples of 8"):
        pipe.edit(odd, "a cat", "a dog", height=30, width=48)
    with pytest.raises(ValueError, match="Images of 2 shapes"):
        pipe.edit([odd, Image.new("RGB", (64, 64))], "a cat", "a dog")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": None}, "needs the source prompt"),
        ({"target": ["a", "b", "c"], "image": [np.zeros((32, 48, 3), np.uint8)] * 2}, "2 images and 3 target"),
        ({"source": ["a", "b"]}, "1 images and 2 source prompts"),
        ({"controls": [DiT4Edit(), DiT4Edit()]}, "2 DiT4Edit controls"),
        ({"solver": "dpmpp2m"}, "a flow takes"),
        ({"num_inference_steps": 0}, "at least 1; found 0"),
        ({"num_inference_steps": 2.5}, "whole number, at least 1; found 2.5"),
        ({"iterations": -1}, "iterations must be a whole number, at least 0; found -1"),
        ({"output_type": "jpg"}, "output_type"),
        ({"target": None}, "target must be a prompt or a list of prompts; found None"),
        ({"source": 3}, "source must be a prompt"),
        ({"controls": DiT4Edit()}, r"controls=\[...\]; found DiT4Edit"),
        ({"controls": ["swap"]}, "made by adapter.control.*found str"),
        ({"mask": [np.zeros((32, 48), np.uint8)] * 3, "target": ["a dog", "a fox"]}, "3 masks for 2 edits"),
    ],
)
def test_calls_that_make_no_sense_raise(make_pipe, given, message):
    how = {"image": np.zeros((32, 48, 3), np.uint8), "source": "a cat", "target": "a dog", **given}
    with pytest.raises(ValueError, match=message):
        make_pipe(blocks=1).edit(how.pop("image"), how.pop("source"), how.pop("target"), **how)


def test_an_inversion_belongs_to_its_prompt_its_model_and_its_size(make_pipe):
    pipe = make_pipe(blocks=1)
    inversion = pipe.invert(np.zeros((32, 48, 3), np.uint8), "a cat", num_inference_steps=2)
    assert len(inversion) == 1 and inversion.trajectory.shape[0] == 3
    with pytest.raises(ValueError, match="made for 'a cat', not 'a bird'"):
        pipe.edit(inversion, "a bird", "a dog")
    with pytest.raises(ValueError, match="leave the size out"):
        pipe.edit(inversion, None, "a dog", height=16, width=16)
    with pytest.raises(ValueError, match="made with num_inference_steps=2, .* found 9"):
        pipe.edit(inversion, None, "a dog", num_inference_steps=9)
    with pytest.raises(ValueError, match="made with solver='fixed_point', .* found 'entered'"):
        pipe.edit(inversion, None, "a dog", solver="entered")
    assert len(pipe.edit(inversion, "a cat", "a dog", num_inference_steps=2, solver="fixed_point").images) == 1
    with pytest.raises(ValueError, match="made with random; this is other"):
        make_pipe(blocks=1, name="other").edit(inversion, None, "a dog")


def test_the_result_page_shows_the_words_that_differ(make_pipe):
    from condit.drawing.edit_page import edit_page, edited_words

    pipe = make_pipe(blocks=1)
    edited = pipe.edit(
        np.zeros((32, 48, 3), np.uint8), "a cat", "a dog", controls=[PRESETS["swap"]], num_inference_steps=2, maps=True
    )
    assert edited.maps is not None and edited.maps.shape == (1, 2, 24, 5)
    torch.testing.assert_close(edited.maps[0, 0].sum(-1) > 0, torch.ones(24, dtype=torch.bool))
    assert [[word for word, _ in side] for side in edited_words(edited, 0)] == [["cat"], ["dog"]]
    page = edit_page(edited, "a cat", "a dog")
    assert page.height > 3 * 128 and page.getcolors(1 << 20)
