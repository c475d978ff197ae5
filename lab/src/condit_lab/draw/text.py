"""What tells the MM-DiT the words: a CLIP text tower trained with it, and two rulers of experiments: the frozen tower
of the embedded CLIP, and learned codes of style and concept in place of words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.encoders.clip import embed_text
from condit.encoders.clip_model import CLIPTextTransformer, TextConfig
from condit.encoders.clip_tokenizer import SPECIAL_TOKENS, ClipTokenizer
from condit.weights.tiny import load_clip
from condit_lab.draw.data import Drawing, all_captions
from condit_lab.training.clip_files import make_tokenizer


def whole_word_tokenizer(captions: Iterable[str], *, vocab_size: int, limit: int) -> ClipTokenizer:
    """WordPiece of which half is learned pieces, the rest the commonest words as a whole (Chinese: characters).
    Commas are left out: they would take a fifth of the tokens."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    texts = list(captions)
    learned = make_tokenizer(texts, vocab_size=vocab_size // 2).tokenizer
    no_commas = normalizers.Replace(Regex("[,，、]"), " ")
    normaliser = normalizers.Sequence([no_commas, normalizers.BertNormalizer(lowercase=True)])
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text, times in Counter(texts).items():
        for word, _ in splitter.pre_tokenize_str(normaliser.normalize_str(text)):
            counts[word] += times
    # The trainer numbers equally common pieces differently from call to call.
    known = set(learned.get_vocab())
    vocabulary = [*SPECIAL_TOKENS, *sorted(known.difference(SPECIAL_TOKENS))]
    for word, times in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(vocabulary) >= vocab_size or times < 2:
            break
        if word not in known:
            vocabulary.append(word)
    rust = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    rust.normalizer, rust.pre_tokenizer = normaliser, splitter
    rust.post_processor = learned.post_processor
    return ClipTokenizer(rust, limit)


class TrainedText(nn.Module):
    """A CLIP text tower that is trained along: ids (B, L) -> token states (B, L, width), pooled vector (B, width)."""

    def __init__(self, tokenizer: ClipTokenizer, *, width: int, layers: int):
        super().__init__()
        self.tokenizer, self.width, self.pooled_width = tokenizer, width, width
        self.text_model = CLIPTextTransformer(
            TextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                vocab_size=len(tokenizer),
                max_position_embeddings=tokenizer.limit,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        self.text_projection = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.text_projection.weight)
        for table in (self.text_model.embeddings.token_embedding, self.text_model.embeddings.position_embedding):
            nn.init.normal_(table.weight, std=0.02)

    def ids(self, captions: Sequence[str]) -> Tensor:
        """(B, L) int16."""
        return self.tokenizer.ids(captions).to(torch.int16)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.text_model(ids.long())
        return out.last_hidden_state, self.text_projection(out.pooler_output)


class FrozenText(nn.Module):
    """The embedded CLIP's text tower, not trained."""

    def __init__(self, folder: Path):
        super().__init__()
        self.clip, self.tokenizer = load_clip(folder)
        self.requires_grad_(False)
        self.width, self.pooled_width = 192, 256

    def ids(self, captions: Sequence[str]) -> Tensor:
        return self.tokenizer.ids(captions).to(torch.int16)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        states, embedding = embed_text(self.clip, ids.long())
        return states, embedding * (embedding.shape[-1] / 2) ** 0.5


class Codes(nn.Module):
    """One learned vector a concept and one a style: how far words could lead at best."""

    def __init__(self, rows: Sequence[Drawing], width: int):
        super().__init__()
        keys = [*sorted({row.concept for row in rows}), *sorted({row.style for row in rows})]
        self.numbers = {key: i + 1 for i, key in enumerate(keys)}  # 0: nothing is told
        self.table, self.pool = nn.Embedding(len(keys) + 1, width), nn.Linear(2 * width, width)
        self.width, self.pooled_width = width, width

    def ids(self, captions: Sequence[str]) -> Tensor:
        """From "concept|style" in place of a caption."""
        numbers = [[self.numbers.get(part, 0) for part in (caption or "|").split("|")] for caption in captions]
        return torch.tensor(numbers, dtype=torch.int16)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        states = self.table(ids.long())
        return states, F.silu(self.pool(states.flatten(1)))


Text = TrainedText | FrozenText | Codes


def caption_table(text: Text, rows: Sequence[Drawing]) -> tuple[Tensor, Tensor]:
    """Tokens of every caption, (captions, L) int16, row after row; and where each row's begin, (rows + 1,)."""
    if isinstance(text, Codes):
        return text.ids([f"{row.concept}|{row.style}" for row in rows]), torch.arange(len(rows) + 1)
    captions = list(all_captions(rows))
    starts = torch.tensor([0, *(len(row.captions) for row in rows)]).cumsum(0)
    return torch.cat([text.ids(captions[i : i + 4096]) for i in range(0, len(captions), 4096)]), starts
