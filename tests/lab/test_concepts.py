"""The judge of concepts on features made to order."""

import pytest
import torch

from condit_lab.suites.concepts import ConceptJudge, index

DIM, CONCEPTS, STYLES = 24, 12, 8


@pytest.fixture(scope="module")
def icons() -> tuple[torch.Tensor, list[str]]:
    """A weak concept and a strong style in every feature."""
    generator = torch.Generator().manual_seed(0)
    concept = torch.randn(CONCEPTS, 1, DIM, generator=generator)
    style = 6 * torch.randn(1, STYLES, 3, generator=generator) @ torch.randn(3, DIM, generator=generator)
    noise = 0.3 * torch.randn(CONCEPTS, STYLES, DIM, generator=generator)
    return (concept + style + noise).flatten(0, 1), [f"concept {c:02d}" for c in range(CONCEPTS) for _ in range(STYLES)]


def test_concepts_are_named_although_styles_differ_more(icons):
    features, concepts = icons
    names, numbers = index(concepts)
    plain = torch.stack([features[numbers == c].mean(0) for c in range(len(names))])
    nearest = torch.cdist(features, plain).argmin(1)
    judge = ConceptJudge.fit(features, concepts)
    assert (nearest == numbers).float().mean() < 0.7
    assert (judge.ranks(features, concepts, [True] * len(concepts)) == 0).float().mean() > 0.95


def test_an_icon_is_left_out_of_its_own_prototype(icons):
    features, concepts = icons
    judge = ConceptJudge.fit(features, concepts)
    without = ConceptJudge(judge.concepts, judge.whiten, judge.prototypes.clone(), judge.counts)
    x = features @ judge.whiten
    without.prototypes[0] = x[1:STYLES].mean(0)
    one = judge.ranks(features[:2], concepts[:2], [True, False])
    assert one[0] == without.ranks(features[:1], concepts[:1])
    assert one[1] == judge.ranks(features[1:2], concepts[1:2])


def test_random_features_are_named_by_chance():
    generator = torch.Generator().manual_seed(1)
    features, concepts = torch.randn(400, DIM, generator=generator), [str(i % 40) for i in range(400)]
    judge = ConceptJudge.fit(features, concepts)
    assert (judge.ranks(features, concepts, [True] * len(concepts)) == 0).float().mean() < 0.08


def test_a_judge_needs_two_icons_of_a_concept():
    with pytest.raises(ValueError, match="No concept has two icons"):
        ConceptJudge.fit(torch.randn(3, DIM), ["a", "b", "c"])
