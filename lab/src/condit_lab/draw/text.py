"""What tells the MM-DiT the words: a CLIP text tower that is trained with it, and a sketch of the caption, fitted once.
Without it, words are read late (docs/log.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.encoders.clip_model import CLIPTextTransformer, TextConfig
from condit.encoders.clip_tokenizer import SPECIAL_TOKENS, ClipTokenizer
from condit_lab.draw.data import Drawing, all_captions
from condit_lab.draw.sketch import Sketch
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


@dataclass(frozen=True)
class TextStates:
    """Captions as the MM-DiT reads them: token states (B, L, width), pooled vector (B, width), and a coarse drawing
    as codes, (B, tokens, channels)."""

    states: Tensor
    pooled: Tensor
    sketch: Tensor


class TrainedText(nn.Module):
    """A CLIP text tower that is trained along; and the sketch and the looks of words (the vectors that the sketch has
    for them), which stay as fitted."""

    def __init__(self, tokenizer: ClipTokenizer, sketch: Sketch, *, width: int, layers: int):
        super().__init__()
        self.tokenizer, self.width, self.sketch = tokenizer, width, sketch
        looks = sketch.words.weight.shape[1]
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
        self.looks_to_states, self.looks_to_pooled = (nn.Linear(looks, width, bias=False) for _ in range(2))
        for linear in (self.looks_to_states, self.looks_to_pooled):
            nn.init.zeros_(linear.weight)
        self.looks: Tensor
        self.register_buffer("looks", torch.zeros(len(tokenizer), looks))

    def ids(self, captions: Sequence[str]) -> Tensor:
        """(B, L) int16."""
        return self.tokenizer.ids(captions).to(torch.int16)

    def forward(self, ids: Tensor) -> TextStates:
        """Of caption ids (B, L)."""
        out = self.text_model(ids.long())
        looks = F.embedding(ids.long(), self.looks)
        return TextStates(
            out.last_hidden_state + self.looks_to_states(looks),
            self.text_projection(out.pooler_output) + self.looks_to_pooled(looks.sum(1)),
            self.sketch(ids),
        )


def caption_table(text: TrainedText, rows: Sequence[Drawing]) -> tuple[Tensor, Tensor]:
    """Tokens of every caption, (captions, L) int16, row after row; and where each row's begin, (rows + 1,)."""
    captions = list(all_captions(rows))
    starts = torch.tensor([0, *(len(row.captions) for row in rows)]).cumsum(0)
    return torch.cat([text.ids(captions[i : i + 4096]) for i in range(0, len(captions), 4096)]), starts
