"""Words of a prompt and the tokens that they became, for editing: word-level names for columns of attention."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_HAN = "\u3400-\u9fff"  # each character counts as a word: there are no blanks to tell words by
_WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+(?:['’-][^\W_{_HAN}]+)*|[^\w\s]")


@dataclass(frozen=True)
class Words:
    """A prompt as words. tokens[i] are the places of word i's pieces; ids are the tokens before the padding, begin and
    end among them; length counts the tokens with padding. Words behind the encoder's limit have no tokens."""

    prompt: str
    words: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    ids: tuple[int, ...]
    length: int

    def places(self, phrase: str) -> tuple[int, ...]:
        """Tokens of every occurrence of a word, or of several words that follow each other. ValueError if absent."""
        wanted = [w.lower() for w in split_words(phrase)]
        lower = [w.lower() for w in self.words]
        starts = [i for i in range(len(lower) - len(wanted) + 1) if lower[i : i + len(wanted)] == wanted]
        if not wanted or not starts:
            raise ValueError(f"{phrase!r} is no word of {self.prompt!r}; it has {', '.join(self.words) or 'none'}.")
        found = tuple(t for i in starts for tokens in self.tokens[i : i + len(wanted)] for t in tokens)
        if not found:
            raise ValueError(
                f"{phrase!r} stands behind the {self.length} tokens that the encoder reads of this prompt."
            )
        return found


def split_words(text: str) -> list[str]:
    """Words, punctuation marks, single Chinese characters."""
    return _WORD.findall(text)


def words_of(tokenizer: Any, prompts: Sequence[str], limit: int, padded: int | None = None) -> list[Words]:
    """Words by the character offsets of a fast tokenizer of transformers: T5 has no begin token, CLIP has one, and both
    cut words into pieces. padded: the length with padding, None: limit."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} tells no character offsets, so words cannot be found among its tokens. Load "
            "the fast tokenizer (tokenizer.json)."
        )
    read = [tokenizer(prompt, truncation=True, max_length=limit, return_offsets_mapping=True) for prompt in prompts]
    length = padded or limit
    return [align_words(p, r["input_ids"], r["offset_mapping"], length) for p, r in zip(prompts, read, strict=True)]


def align_words(prompt: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], length: int) -> Words:
    """A prompt's words from its token ids and their character offsets, which are of the prompt as given."""
    spans = [m.span() for m in _WORD.finditer(prompt)]
    places: list[list[int]] = [[] for _ in spans]
    for place, (begin, end) in enumerate(offsets):
        for word, (first, last) in enumerate(spans):
            # A piece may hold the blank before its word (T5's mark), never two words.
            if begin < last and first < end:
                places[word].append(place)
    words = tuple(prompt[first:last] for first, last in spans)
    return Words(prompt, words, tuple(map(tuple, places)), tuple(ids), length)
