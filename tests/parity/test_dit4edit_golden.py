"""DiT4Edit's pieces against tensors of the code they come from (golden/dit4edit/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from condit.backbones.pixart import PixArt, PixArtConfig
from condit.controls.dit4edit import in_window
from condit.controls.edit_maps import (
    blend_mask,
    exchange,
    refinement_index,
    refinement_table,
    replacement_table,
    word_steps,
)
from condit.controls.token_merging import corner_order, match
from condit.diffusion.inversion import ddim_path, dpm_path, invert, walk
from condit.diffusion.vp import Process
from condit.encoders.words import Words

GOLDEN = Path(__file__).parent / "golden" / "dit4edit"


def close(found: Tensor, expected: Tensor) -> None:
    """1e-5 of the largest entry."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(float(expected.abs().max()), 1e-6))


# Inversion


@pytest.fixture(scope="module")
def inversion() -> dict[str, Tensor]:
    return load_file(GOLDEN / "inversion.safetensors")


@pytest.fixture(scope="module")
def pixart() -> PixArt:
    fields = json.loads((GOLDEN / "inversion_config.json").read_text())["model"]
    config = PixArtConfig(**{k: v for k, v in fields.items() if k in PixArtConfig.__dataclass_fields__})
    network = PixArt(config).requires_grad_(False)
    network.load_state_dict(load_file(GOLDEN / "pixart_weights.safetensors"), strict=True)
    return network


def test_the_tiny_pixart_predicts_the_published_output(pixart, inversion):
    x0 = inversion["x0"]
    out = pixart(x0, torch.full((len(x0),), 500), inversion["caption"], inversion["caption_mask"])
    close(out, inversion["forward_t500"])


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("name", ["dpmpp2m", "dpmpp2m_sigma_min", "ddim"])
def test_every_state_of_inversion_and_sampling_is_reproduced(pixart, inversion, name, steps):
    cumprod = Process(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear").alphas_cumprod
    path = ddim_path(cumprod, steps) if name == "ddim" else dpm_path(cumprod, steps, to_zero=name == "dpmpp2m")
    asked = []

    def network(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        out = pixart(x, torch.full((len(x),), t), inversion["caption"], inversion["caption_mask"])
        return out[:, :4]  # the noise; the others are variance

    key = f"{name}.{steps}"
    up = invert(network, inversion["x0"], path, "entered" if name == "ddim" else "dpmpp2m")
    assert asked == inversion[f"{key}.invert_t"].tolist()
    for found, expected in zip(up.flip(0), inversion[f"{key}.invert"], strict=True):
        close(found, expected)
    asked.clear()
    down = walk(network, inversion[f"{key}.invert"][-1], path)
    assert asked == inversion[f"{key}.sample_t"].tolist()
    for found, expected in zip(down, inversion[f"{key}.sample"], strict=True):
        close(found, expected)
    if name != "ddim":
        close(torch.stack([path.ratio(i) for i in range(steps, -1, -1)]), inversion[f"{key}.invert_sigmas"])
        ends = [path.ratio(i, ending=True) for i in range(steps + 1)]
        close(torch.stack(ends), inversion[f"{key}.sample_sigmas"])


# Token merging


CASES = json.loads((GOLDEN / "token_merge_config.json").read_text())


@pytest.mark.parametrize("number", range(len(CASES)))
def test_merged_and_unmerged_tokens_are_those_of_tomesd(number):
    tensors, case = load_file(GOLDEN / "token_merge.safetensors"), CASES[number]
    metric, value = tensors[f"{number}.metric"], tensors[f"{number}.value"]
    grid, cell = (case["height"], case["width"]), (case["stride_y"], case["stride_x"])
    found = match(metric, corner_order(grid, cell), case["ratio"])
    close(found.merge(metric), tensors[f"{number}.merged_metric"])
    close(found.merge(value), tensors[f"{number}.merged_value"])
    close(found.unmerge(found.merge(value)), tensors[f"{number}.unmerged_value"])


# Prompt-to-prompt


P2P = json.loads((GOLDEN / "p2p_config.json").read_text())


@pytest.fixture(scope="module")
def p2p() -> dict[str, Tensor]:
    return load_file(GOLDEN / "p2p.safetensors")


def toy_words(prompt: str, ids: list[int]) -> Words:
    """As the toy tokenizer cuts them: begin, pieces of four letters, end."""
    words, tokens, at = tuple(prompt.split(" ")), [], 1
    for word in words:
        pieces = -(-len(word) // P2P["piece_chars"])
        tokens.append(tuple(range(at, at + pieces)))
        at += pieces
    assert at + 1 == len(ids)
    return Words(prompt, words, tuple(tokens), tuple(ids), P2P["max_len"])


def pair(kind: str, number: int) -> tuple[Words, Words]:
    row = P2P[kind][number]
    return toy_words(row["source"], row["source_ids"]), toy_words(row["target"], row["target_ids"])


@pytest.mark.parametrize("number", range(len(P2P["replace"])))
def test_the_table_of_replacement_is_the_published_one(p2p, number):
    close(replacement_table(*pair("replace", number)), p2p[f"replace.{number}.mapper"][0])


@pytest.mark.parametrize("number", range(len(P2P["refine"])))
def test_the_alignment_of_refinement_is_the_published_one(p2p, number):
    source, target = pair("refine", number)
    index, weight = refinement_index(source.ids, target.ids, target.length)
    assert torch.equal(index, p2p[f"refine.{number}.mapper"][0].long())
    close(weight, p2p[f"refine.{number}.alphas"][0])


@pytest.mark.parametrize("kind", ["replace", "refine"])
def test_exchanged_maps_are_the_published_ones_in_every_step(p2p, kind):
    source, target = pair(kind, 0)
    if kind == "refine":
        table, weight = refinement_table(source, target)
    else:
        table, weight = replacement_table(source, target), torch.ones(target.length)
    gates = word_steps(P2P["num_steps"], 0.5, {}, target.length)
    close(gates, p2p[f"{kind}.alpha_time"][:, 0, 0, 0])
    old, new = p2p[f"{kind}.cross_in"].unflatten(0, (2, 1, 2))  # prompts, pictures, heads
    own, other = p2p[f"{kind}.self_in"].unflatten(0, (2, 1, 2))
    for step in range(P2P["num_steps"]):
        found = exchange(old, new, table[None], weight[None], gates[step])
        close(torch.cat([old, found]).flatten(0, 1), p2p[f"{kind}.cross_out.{step}"])
        kept = own if in_window(step, P2P["num_steps"], (0.0, 0.4)) else other
        close(torch.cat([own, kept]).flatten(0, 1), p2p[f"{kind}.self_out.{step}"])


def test_reweighted_maps_are_the_published_ones(p2p):
    _, target = pair("replace", 0)
    factors = torch.ones(target.length)
    factors[list(target.places(target.words[-1]))] = 2.5
    close(factors, p2p["equalizer"][0])
    close(p2p["reweight.in"][None] * factors, p2p["reweight.out"])


def test_the_local_blend_is_the_published_one(p2p):
    source, target = pair("replace", 0)
    for row, words, word in zip(p2p["blend.word_select"], (source, target), P2P["blend_words"], strict=True):
        assert row.nonzero().flatten().tolist() == list(words.places(word))
    x = p2p["blend.x"]
    maps = p2p["blend.word_maps"][None]
    mask = blend_mask(maps, (16, 16), threshold=P2P["blend_threshold"], size=(32, 32))
    close(torch.cat([x[:1], x[:1] + mask[:, None] * (x[1:] - x[:1])]), p2p["blend.out"])
    assert 0 < mask.mean() < 1
