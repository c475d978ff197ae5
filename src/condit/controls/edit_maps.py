"""Attention maps of two prompts, exchanged word by word: prompt-to-prompt (Hertz et al. 2022, arXiv:2208.01626).

Maps are (..., N image tokens, L text tokens) after the softmax. Each way of editing is a table R (L source, L target)
and a weight a (L target): M* = a (M_source R) + (1 - a) M_target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from condit.encoders.words import Words


def replacement_table(source: Words, target: Words, *, tail: str = "official") -> Tensor:
    """R (L, L) for prompts of equally many words: pieces of a changed word share those of the word in its place.

    After the last changed word the official code continues with column j from row j, which is wrong if the numbers of
    pieces before it differ; tail="aligned" continues at each prompt's position. Raises ValueError for unequal counts.
    """
    if len(source.words) != len(target.words):
        raise ValueError(
            f"replace needs prompts with as many words: {source.prompt!r} has {len(source.words)}, {target.prompt!r} "
            f"{len(target.words)}. Use cross='refine', which adds and drops words."
        )
    length = target.length
    changed = [
        (s, t)
        for word, other, s, t in zip(source.words, target.words, source.tokens, target.tokens, strict=True)
        if word != other and s and t
    ]
    table = torch.zeros(length, length)
    row = column = 0
    while row < length and column < length:
        if changed and changed[0][0][0] == row:
            s, t = changed.pop(0)
            for place in t:
                table[list(s), place] = 1.0 if len(s) == len(t) else 1 / len(t)
            if len(s) == len(t):
                table[list(s)] = 0
                table[list(s), list(t)] = 1
            row, column = row + len(s), column + len(t)
            continue
        table[row if changed or tail == "aligned" else column, column] = 1
        row, column = row + 1, column + 1
    return table


def refinement_index(source: Sequence[int], target: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
    """For each target token the source token that it is aligned with (L,), -1 for a new one; and a (L,), 0 for new.

    Global alignment (Needleman & Wunsch 1970) of token numbers: match 1, mismatch -1, gap 0. After the target's end
    tokens keep their own position.
    """
    rows, columns = len(source), len(target)
    score = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            same = 1 if source[i - 1] == target[j - 1] else -1
            score[i][j] = max(score[i][j - 1], score[i - 1][j], score[i - 1][j - 1] + same)
    index, i, j = torch.arange(length), rows, columns
    while j > 0:
        if i == 0 or score[i][j] == score[i][j - 1]:
            j -= 1
            index[j] = -1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            index[j] = i
    return index, (index >= 0).float()


def refinement_table(source: Words, target: Words) -> tuple[Tensor, Tensor]:
    """R (L, L) and a (L,) of `refinement_index`."""
    index, weight = refinement_index(source.ids, target.ids, target.length)
    table = torch.zeros(target.length, target.length)
    old = index >= 0
    table[index[old], torch.arange(target.length)[old]] = 1
    return table, weight


def exchange(source: Tensor, target: Tensor, table: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """The target's new map: gate (a (M_source R) + (1 - a) M_target) + (1 - gate) M_target.

    Maps (B, H, N, L), table (B, L, L), weight (B, L); gate broadcasts to (B, 1, 1, L): 1 while a word is exchanged.
    """
    mapped = torch.einsum("bhns,bst->bhnt", source, table)
    weight = weight[:, None, None]
    return gate * (mapped * weight + target * (1 - weight)) + (1 - gate) * target


def word_steps(steps: int, fraction: float, words: Mapping[tuple[int, ...], float], length: int) -> Tensor:
    """In which steps each token is exchanged, (steps + 1, length) of 0 and 1: before step int(f (steps + 1)).

    fraction for all tokens; `words` for the tokens of single words.
    """
    until = torch.full((length,), int(fraction * (steps + 1)))
    for tokens, own in words.items():
        until[list(tokens)] = int(own * (steps + 1))
    return (torch.arange(steps + 1)[:, None] < until).float()


def blend_mask(
    maps: Tensor, grid: tuple[int, int], *, threshold: float = 0.3, size: tuple[int, int] | None = None
) -> Tensor:
    """The region of words of either prompt, (B, h, w) of 0 and 1: maps (B, K, N) of K prompts over the token grid.

    3 x 3 maximum, nearest resize to `size` (None: the grid), a share of the image's own maximum above `threshold`,
    union over the prompts. A prompt whose map is zero everywhere counts for nothing.
    """
    pooled = F.max_pool2d(maps.unflatten(-1, grid), 3, 1, 1)
    if size is not None and size != grid:
        pooled = F.interpolate(pooled, size=size)
    largest = pooled.amax((-2, -1), keepdim=True)
    return ((pooled / largest.clamp(min=1e-12)) > threshold).any(1).float()
