"""The embedded CLIP's tokenizer: WordPiece over lower-case words and single Chinese characters, read by the library
`tokenizers` alone, because importing transformers takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from condit.encoders.words import Words, align_words

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[BOS]", "[EOS]")
TOKEN_LIMIT = 24


class ClipTokenizer:
    """Texts -> token ids between [BOS] and [EOS], at most `limit` of them."""

    def __init__(self, tokenizer: Tokenizer, limit: int = TOKEN_LIMIT):
        self.limit = limit
        tokenizer.enable_truncation(limit)
        tokenizer.no_padding()  # a saved file may ask for it
        self.tokenizer = tokenizer
        ids: list[int] = []
        for token in SPECIAL_TOKENS:
            number = tokenizer.token_to_id(token)
            if number is None:
                raise ValueError(
                    f"the tokenizer has no token {token!r}. Expected the tokenizer.json of the model 'tiny'."
                )
            ids.append(number)
        self.pad_token_id, self.unk_token_id, self.bos_token_id, self.eos_token_id = ids

    @classmethod
    def load(cls, folder: str | Path, limit: int = TOKEN_LIMIT) -> ClipTokenizer:
        """From a folder with tokenizer.json."""
        return cls(Tokenizer.from_file(str(Path(folder) / "tokenizer.json")), limit)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Ids and character offsets of each text, without padding."""
        return self.tokenizer.encode_batch(list(texts))

    def ids(self, texts: Sequence[str]) -> Tensor:
        """(B, limit) token ids, padded."""
        rows = [encoding.ids for encoding in self.encode(texts)]
        return torch.tensor([row + [self.pad_token_id] * (self.limit - len(row)) for row in rows])

    def words(self, prompts: Sequence[str]) -> list[Words]:
        """The prompts as words over their tokens."""
        encodings = self.encode(prompts)
        return [align_words(p, e.ids, e.offsets, self.limit) for p, e in zip(prompts, encodings, strict=True)]
