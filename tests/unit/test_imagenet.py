"""data/imagenet.py: a class is found by its label, a synonym, an id or a number, or told what is near."""

import pytest

from condit.data.imagenet import ClassNames, imagenet

# The classes of the official samples of DiT, and the ends of the list.
KNOWN = {
    0: "tench",
    88: "macaw",
    207: "golden retriever",
    279: "Arctic fox",
    360: "otter",
    387: "lesser panda",
    417: "balloon",
    974: "geyser",
    979: "valley",
    999: "toilet tissue",
}


def test_the_thousand_classes_stand_in_the_official_order():
    names = imagenet()
    assert len(names) == len(names.ids) == 1000
    assert list(names.ids) == sorted(names.ids)  # the official order is that of the WordNet ids
    assert {i: names.label(i) for i in KNOWN} == KNOWN


def test_every_label_id_and_number_leads_back_to_its_class():
    names = imagenet()
    for i in range(1000):
        assert names.index(names.label(i)) == names.index(names.ids[i]) == names.index(str(i)) == i


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("Golden Retriever", 207),
        ("golden_retriever", 207),
        ("  golden   retriever ", 207),
        ("red panda", 387),  # a synonym
        ("AILUROPODA MELANOLEUCA", 388),
        ("tench, Tinca tinca", 0),  # the whole line, as other libraries print it
        ("partridge", 86),  # the label of one class, a synonym of another
        ("crane (machine)", 517),
    ],
)
def test_case_spaces_underscores_and_synonyms_are_understood(name, index):
    assert imagenet().index(name) == index


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crane", r"names 2 classes: give 'crane \(bird\)' \(134\) or 'crane \(machine\)' \(517\)"),
        ("Panda", r"'lesser panda' \(387\) or 'giant panda' \(388\)"),
        ("golden retreiver", r"No class 'golden retreiver' among 1000. Near: 'golden retriever' \(207\)"),
        ("retriever", "golden retriever"),
        ("xqzwv", "The first are 'tench', 'goldfish'"),
        ("1000", "No class '1000': they are numbered 0 to 999"),
        ("", "No class ''"),
    ],
)
def test_an_ambiguous_or_unknown_name_raises_with_similar_names(name, message):
    with pytest.raises(ValueError, match=message):
        imagenet().index(name)


def test_a_model_may_have_classes_of_its_own():
    names = ClassNames.of(["7", "red fox, Vulpes", "0"])
    assert names.label(1) == "red fox, Vulpes"
    assert [names.index(name) for name in ("7", "vulpes", "0", "1")] == [0, 1, 2, 1]  # a name before a number
