"""Captions as conditions: an encoder in the place of a network's embedding of classes.

    (1)  a caption is its words, lower case; a word is its hash in 0..BUCKETS-1, so that there is no vocabulary to keep
    (2)  e = W mean over words of  h + attention(h),   h = E[word] + P[place]

The condition stays a number: the index of a caption in a table that the model carries, and the table may be changed for
captions that were not in training. The last row, no caption, has an embedding of its own.
"""

import hashlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError

BUCKETS, LENGTH = 4096, 32
EMPTY = BUCKETS


def words(caption: str) -> list[int]:
    """Eq. (1), at most ``LENGTH`` words.

    Raises:
        ConfigError: no word in it, or more than that.
    """
    found = re.findall(r"\w+", caption.lower())
    if not 0 < len(found) <= LENGTH:
        raise ConfigError(f"caption {caption!r} has {len(found)} words: expected 1 to {LENGTH}")
    digests = (hashlib.blake2b(word.encode(), digest_size=8).digest() for word in found)
    return [int.from_bytes(digest, "little") % BUCKETS for digest in digests]


class Captions(nn.Module):
    """``embed(index (B,))`` -> (B, width), index 0..P-1 of a caption, P for none."""

    def __init__(self, captions: Sequence[str], width: int) -> None:
        super().__init__()
        heads = next(h for h in (4, 2, 1) if width % h == 0)
        self.word, self.place = nn.Embedding(BUCKETS + 1, width), nn.Embedding(LENGTH, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)
        self.none = nn.Parameter(torch.zeros(width))
        self.register_buffer("table", torch.empty(0, dtype=torch.int64), persistent=False)
        self.set(captions)

    def set(self, captions: Sequence[str]) -> None:
        """Replace the table of captions.

        Raises:
            ConfigError: a caption without words, or with too many.
        """
        rows = [words(caption) for caption in captions]
        longest = max(map(len, rows))
        padded = [row + [EMPTY] * (longest - len(row)) for row in rows]
        self.table = torch.tensor(padded, dtype=torch.int64, device=self.table.device)

    def forward(self, index: Tensor) -> Tensor:
        """Each caption of the batch is encoded once."""
        present, back = index.unique(return_inverse=True)
        given = present < len(self.table)
        encoded = self.encode(self.table[present.clamp(max=len(self.table) - 1)])
        return torch.where(given[:, None], encoded, self.none)[back]

    def encode(self, tokens: Tensor) -> Tensor:
        """Eq. (2): tokens (P, L) -> (P, width)."""
        blank = tokens == EMPTY
        h = self.word(tokens) + self.place.weight[: tokens.shape[1]]
        normal = self.norm(h)
        h = h + self.attention(normal, normal, normal, key_padding_mask=blank, need_weights=False)[0]
        kept = (~blank)[..., None].to(h)
        return self.out((h * kept).sum(1) / kept.sum(1))
