"""The spatial decoder: what the columns and the memories say, put together for the head, token by token.

Three steps, each of queries that attend to a few keys of the same token: the layers of a column become its summary,
summaries and memories become thalamic tokens, and these are read by the query of the columns' output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipeline.systems.neuromorphic.columns import ColumnFeedForward, ColumnLinear, ColumnNorm
from pipeline.systems.neuromorphic.config import NeuromorphicConfig

COLUMN_HEAD_WIDTH = 32
SUMMARY_LAYERS = THALAMIC_LAYERS = 2
KINDS = ("column", "procedural", "episodic", "working")
"""Of what a thalamic token attends to, in the order of the rows of `kinds`."""


class SpatialDecoder(nn.Module):
    """Layers of each column -> its summary; summaries and memories -> thalamic tokens; these -> the head's input.

    Changed against the prototype, unless `as_published`: keys have no bias, which no softmax sees; the attention of the
    one query to itself is its value projection, without queries and keys, which no result depends on.
    """

    def __init__(self, config: NeuromorphicConfig) -> None:
        super().__init__()
        sizes, published = config.sizes, config.as_published
        columns, width, inner = sizes.columns, sizes.column_width, sizes.decoder_width
        heads = next(heads for heads in range(max(1, width // COLUMN_HEAD_WIDTH), 0, -1) if width % heads == 0)
        self.layers = nn.Parameter(torch.empty(columns, sizes.layers, width))
        self.summary = nn.Parameter(torch.empty(columns, width))
        self.summary_blocks = nn.ModuleList(
            [Block(columns, width, heads, key_bias=published) for _ in range(SUMMARY_LAYERS)]
        )
        self.summary_norm = ColumnNorm(columns, width)

        self.from_column = nn.Linear(width, inner)
        self.from_procedural = nn.Linear(width, inner)
        self.from_episodic = nn.Linear(sizes.episodic_width, inner)
        self.from_working = nn.Linear(sizes.width, inner)
        self.kinds = nn.Parameter(torch.empty(len(KINDS), inner))
        self.columns = nn.Parameter(torch.empty(columns, inner))
        self.thalamic = nn.Parameter(torch.empty(sizes.thalamic_tokens, inner))
        self.thalamic_blocks = nn.ModuleList(
            [Block(1, inner, sizes.decoder_heads, key_bias=published) for _ in range(THALAMIC_LAYERS)]
        )
        self.thalamic_norm = nn.LayerNorm(inner)

        self.query = nn.Linear(sizes.width, inner)
        self.blocks = nn.ModuleList(
            [Block(1, inner, sizes.decoder_heads, key_bias=published, alone=True) for _ in range(sizes.decoder_layers)]
        )
        self.output = nn.Linear(inner, sizes.width, bias=False)

    def forward(self, layers: Tensor, procedural: Tensor, episodic: Tensor | None, working: Tensor) -> Tensor:
        """layers [L, B, N, P, H], what each layer of each column gave; procedural [N, P, H]: the values of procedural
        memory, weighted by their strengths and averaged over layers and columns; episodic [N, P, E] alike, None where
        there is no episodic memory; working [N, P, D]. Returns what the head reads, [N, P, D]."""
        top = rearrange(layers[-1], "b n p h -> n p (b h)")
        keys = rearrange(layers, "l b n p h -> b n p l h") + self.layers[:, None, None]
        summaries = self.summary[:, None, None, None].expand(-1, *working.shape[:2], 1, -1)
        for block in self.summary_blocks:
            summaries = block(summaries, keys)
        summaries = rearrange(self.summary_norm(summaries), "b n p 1 h -> n p b h")

        tokens = [self.from_column(summaries) + self.kinds[0] + self.columns]
        memories = ((self.from_procedural, procedural), (self.from_episodic, episodic), (self.from_working, working))
        for kind, (project, said) in zip(self.kinds[1:], memories, strict=True):
            if said is not None:
                tokens.append((project(said) + kind).unsqueeze(-2))
        said = torch.cat(tokens, dim=-2).unsqueeze(0)
        thalamic = self.thalamic.expand(1, *working.shape[:2], -1, -1)
        for block in self.thalamic_blocks:
            thalamic = block(thalamic, said)
        thalamic = self.thalamic_norm(thalamic)

        query = self.query(top)[None, :, :, None]
        for block in self.blocks:
            query = block(query, thalamic)
        return top + self.output(query[0, :, :, 0])


class Block(nn.Module):
    """Pre-norm attention to keys, which are not normed, and a feed-forward part; `alone`: before it, attention of the
    one query to itself."""

    def __init__(self, columns: int, width: int, heads: int, *, key_bias: bool, alone: bool = False) -> None:
        super().__init__()
        self.alone: Attention | OneToken | None = None
        if alone:
            self.alone_norm = ColumnNorm(columns, width)
            self.alone = Attention(columns, width, heads, key_bias=True) if key_bias else OneToken(columns, width)
        self.norm = ColumnNorm(columns, width)
        self.attention = Attention(columns, width, heads, key_bias=key_bias)
        self.feed_forward = ColumnFeedForward(columns, width)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """query [columns, N, P, Q, width] and keys [columns, N, P, K, width] -> like query."""
        if self.alone is not None:
            normed = self.alone_norm(query)
            query = query + self.alone(normed, normed)
        query = query + self.attention(self.norm(query), keys)
        return self.feed_forward(query)


class Attention(nn.Module):
    """Multi-head attention of a few queries of a token to a few keys of the same token."""

    def __init__(self, columns: int, width: int, heads: int, *, key_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = ColumnLinear(columns, width, width)
        self.key = ColumnLinear(columns, width, width, bias=key_bias)
        self.value = ColumnLinear(columns, width, width)
        self.output = ColumnLinear(columns, width, width)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """query [columns, N, P, Q, width] and keys [columns, N, P, K, width] -> like query."""
        by_head = "c n p k (h d) -> (c n p) h k d"
        q, k, v = (
            rearrange(part, by_head, h=self.heads) for part in (self.query(query), self.key(keys), self.value(keys))
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        columns, rows, tokens = query.shape[:3]
        return self.output(rearrange(mixed, "(c n p) h q d -> c n p q (h d)", c=columns, n=rows, p=tokens))


class OneToken(nn.Module):
    """Attention of one query to itself: softmax over one key is 1, so what is left is a value and an output map."""

    def __init__(self, columns: int, width: int) -> None:
        super().__init__()
        self.value = ColumnLinear(columns, width, width)
        self.output = ColumnLinear(columns, width, width)

    def forward(self, query: Tensor, _: Tensor) -> Tensor:
        """query [columns, ..., width] alike."""
        return self.output(self.value(query))
