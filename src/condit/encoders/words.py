"""Words of a prompt and their tokens, for editing: word-level names for columns of attention."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HAN = "\u3400-\u9fff"  # each character counts as a word, as there are no spaces between words
_WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+(?:['’-][^\W_{_HAN}]+)*|[^\w\s]")


@dataclass(frozen=True)
class Words:
    """A prompt as words. tokens[i] are the positions of word i's tokens; ids are the token numbers without padding,
    with begin and end; length counts the tokens with padding. Words beyond the encoder's limit have no tokens."""

    prompt: str
    words: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    ids: tuple[int, ...]
    length: int

    def places(self, phrase: str) -> tuple[int, ...]:
        """Token positions of every occurrence of a word or of consecutive words. Raises ValueError if there is none
        within the encoder's limit."""
        query = [w.lower() for w in split_words(phrase)]
        lower = [w.lower() for w in self.words]
        starts = [i for i in range(len(lower) - len(query) + 1) if lower[i : i + len(query)] == query]
        if not query or not starts:
            raise ValueError(
                f"{phrase!r} is not in the prompt {self.prompt!r}. Its words are {', '.join(self.words) or 'none'}."
            )
        positions = tuple(t for i in starts for tokens in self.tokens[i : i + len(query)] for t in tokens)
        if not positions:
            raise ValueError(f"{phrase!r} is beyond the first {self.length} tokens, which the encoder reads.")
        return positions


def split_words(text: str) -> list[str]:
    """Words, punctuation marks and single Chinese characters."""
    return _WORD.findall(text)


def words_of(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], limit: int, padded: int | None = None
) -> list[Words]:
    """Words by the character offsets of a fast tokenizer. T5 has no begin token, CLIP has one; both split words into
    pieces. padded: the length with padding, None: limit. Raises ValueError for a tokenizer without offsets."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} has no character offsets, which map words to tokens. Load the fast tokenizer "
            "(tokenizer.json)."
        )
    encodings = [
        tokenizer(prompt, truncation=True, max_length=limit, return_offsets_mapping=True) for prompt in prompts
    ]
    length = padded or limit
    return [
        align_words(p, e["input_ids"], e["offset_mapping"], length) for p, e in zip(prompts, encodings, strict=True)
    ]


def align_words(prompt: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], length: int) -> Words:
    """A prompt's words from its token numbers and their character offsets in the prompt."""
    spans = [m.span() for m in _WORD.finditer(prompt)]
    positions: list[list[int]] = [[] for _ in spans]
    for position, (begin, end) in enumerate(offsets):
        for word, (first, last) in enumerate(spans):
            # A piece may contain the space before its word (T5's mark), never two words.
            if begin < last and first < end:
                positions[word].append(position)
    words = tuple(prompt[first:last] for first, last in spans)
    return Words(prompt, words, tuple(map(tuple, positions)), tuple(ids), length)
