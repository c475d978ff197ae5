"""encoders/clip.py, text.py and image.py: the embedded encoders with random weights."""

import pytest
import torch
import torch.nn.functional as F

from condit.encoders.clip import (
    CONCEPT,
    STYLE,
    embed_image,
    embed_text,
    normalise,
    style_statistics,
    token_ids,
)
from condit.encoders.clip_tokenizer import TOKEN_LIMIT
from condit.encoders.image import TinyImage
from condit.encoders.text import Text, TinyText
from condit_lab.training.clip_files import make_clip, make_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"  # once forward, once backward: each letter also inside a word
CORPUS = ["a red apple", "a rocket in the sky", "红苹果", "火箭", f"{LETTERS} {LETTERS[::-1]}"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CORPUS, vocab_size=200)


@pytest.fixture(scope="module")
def clip(tokenizer):
    torch.manual_seed(0)
    return make_clip(len(tokenizer)).eval().requires_grad_(False)


@pytest.mark.parametrize("word", ["apple", "苹果", "zebra", "rockets"])
def test_known_and_unknown_words_become_pieces_never_the_unknown_token(tokenizer, word):
    (encoding,) = tokenizer.encode([word])
    ids = encoding.ids
    assert tokenizer.unk_token_id not in ids and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id


def test_case_does_not_matter(tokenizer):
    assert tokenizer.encode(["Red APPLE"])[0].ids == tokenizer.encode(["red apple"])[0].ids


def test_prompts_of_any_length_fill_the_limit_and_keep_their_end(tokenizer):
    ids = token_ids(tokenizer, ["", "apple", "apple " * 5000])
    assert ids.shape == (3, TOKEN_LIMIT)
    assert (ids == tokenizer.eos_token_id).sum(1).tolist() == [1, 1, 1]


def test_concept_and_style_fill_the_space_and_have_unit_length_each():
    actual = normalise(torch.randn(3, STYLE.stop))
    assert CONCEPT.stop == STYLE.start
    for part in (CONCEPT, STYLE):
        torch.testing.assert_close(actual[:, part].norm(dim=-1), torch.ones(3))


def test_padding_does_not_change_the_embedding(clip, tokenizer):
    short = torch.tensor([tokenizer.encode(["a red apple"])[0].ids])
    _, alone = embed_text(clip, short)
    _, padded = embed_text(clip, token_ids(tokenizer, ["a red apple"]))
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)  # attention over another number of keys


def test_image_states_start_with_the_embedding_layer_and_keep_all_patches(clip):
    hidden, embedding = embed_image(clip, torch.rand(2, 3, 128, 128))
    assert hidden.shape == (7, 2, 65, 192) and embedding.shape == (2, 256)


def test_style_statistics_do_not_depend_on_the_place_of_a_patch():
    hidden = torch.randn(7, 2, 65, 192)
    shuffled = torch.cat([hidden[:, :, :1], hidden[:, :, 1:].flip(2)], 2)
    assert style_statistics(hidden).shape == (2, 768)
    torch.testing.assert_close(style_statistics(shuffled), style_statistics(hidden), rtol=0, atol=1e-5)


def test_image_features_have_the_declared_width_for_any_size(clip):
    encoder, image = TinyImage(clip), torch.rand(1, 3, 128, 128) * 2 - 1
    assert encoder(image).shape == (1, TinyImage.features)
    large = F.interpolate(image, scale_factor=2, mode="nearest")
    assert encoder(large).shape == (1, TinyImage.features)


def test_text_has_states_a_pooled_vector_of_unit_variance_and_a_canvas(clip, tokenizer):
    text = TinyText(clip, tokenizer)(["a red apple", "火箭"])
    assert text.tokens.shape == (2, TOKEN_LIMIT, 192) and text.canvas is not None and text.canvas.shape == (2, 64, 16)
    torch.testing.assert_close(text.pooled.square().mean(-1), torch.ones(2))


def test_the_canvas_is_the_ridge_regression_of_thumbnails(clip, tokenizer):
    torch.manual_seed(0)
    encoder = TinyText(clip, tokenizer, tokens=2, channels=3)
    pooled, truth = torch.randn(4000, 256), torch.randn(6, 256) / 16
    encoder.fit_canvas(pooled, pooled @ truth.mT + 5, ridge=1e-6)
    torch.testing.assert_close(encoder.canvas.weight, truth, rtol=0, atol=1e-4)  # the ridge pulls a little
    torch.testing.assert_close(encoder.canvas.bias, torch.full((6,), 5.0), rtol=0, atol=1e-3)


def test_rows_of_a_text_are_taken_from_every_part():
    text = Text(torch.arange(3)[:, None, None], torch.arange(3)[:, None], torch.arange(3)[:, None, None])
    rows = text.rows(torch.tensor([2, 0]))
    assert rows.tokens.flatten().tolist() == rows.pooled.flatten().tolist() == [2, 0]
    assert rows.canvas is not None and rows.canvas.flatten().tolist() == [2, 0]
    assert Text(text.tokens, text.pooled).rows(torch.tensor([0])).canvas is None
