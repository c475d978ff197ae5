"""Words of prompts over the pieces of T5-like, CLIP-like and WordPiece tokenizers."""

from types import SimpleNamespace
from typing import Any

import pytest

from condit.encoders.words import Words, split_words, words_of

TEXT = "a skyscraper near grandma's house, rebuilt"


def t5_like(vocabulary: list[str]):
    """Pieces that carry the blank before a word, no begin token, one end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *((piece, -1.0) for piece in vocabulary)]
    made = Tokenizer(models.Unigram(scores, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def clip_like():
    """Letters, the last of a word marked; begin and end tokens."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz,'"
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=77)


def test_text_falls_into_words_marks_and_single_han_characters():
    assert split_words(TEXT) == ["a", "skyscraper", "near", "grandma's", "house", ",", "rebuilt"]
    assert split_words("红苹果 red") == ["红", "苹", "果", "red"]


def test_t5s_pieces_belong_to_their_words_from_the_first_token_on():
    tokenizer = t5_like(["▁a", "▁sky", "scra", "per", "▁near"])
    (words,) = words_of(tokenizer, ["a skyscraper near"], 10)
    assert words.words == ("a", "skyscraper", "near") and words.length == 10
    assert words.tokens == ((0,), (1, 2, 3), (4,))
    assert len(words.ids) == 6 and words.ids[-1] == 1  # the end token


def test_clips_pieces_follow_the_begin_token():
    (words,) = words_of(clip_like(), ["a fox"], 77)
    assert words.tokens == ((1,), (2, 3, 4))


def test_words_are_found_in_any_case_as_phrases_and_every_time():
    (words,) = words_of(clip_like(), ["a fox, a cat"], 77)
    assert words.places("A") == (1, 6) and words.places("fox") == (2, 3, 4)
    assert words.places("a cat") == (6, 7, 8, 9)


def test_an_absent_word_raises_with_those_that_are_there():
    (words,) = words_of(clip_like(), ["a fox"], 77)
    with pytest.raises(ValueError, match="'dog' is not in the prompt 'a fox'. Its words are a, fox"):
        words.places("dog")


def test_a_word_after_the_limit_raises():
    (words,) = words_of(clip_like(), ["a fox and a cat"], 6)
    assert words.tokens[0] == (1,) and words.tokens[-1] == ()
    with pytest.raises(ValueError, match="beyond the first 6 tokens"):
        words.places("cat")


def test_a_tokenizer_without_offsets_is_refused():
    tokenizer: Any = SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match="has no character offsets"):
        words_of(tokenizer, ["a"], 5)


def test_words_are_values():
    assert Words("a", ("a",), ((0,),), (3,), 5) == Words("a", ("a",), ((0,),), (3,), 5)
