"""The cache of a causal language model whose state is that of a `Decoder`, for `generate` of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from pipeline.lm.decoding import Decoder, DecodingState


class MemoryCache(Cache):
    """What the model keeps of the rows of text that it has read. An empty one can be given to `generate` or `forward`;
    what comes back goes on from there, and `copy.deepcopy` keeps the text that was read for other continuations.

    Columns are those of `input_ids`, padding included; padding is not read. A cache cannot be cut back.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.decoder: Decoder | None = None
        self.state: DecodingState | None = None
        self.columns = 0

    def extend(self, build: Callable[[], Decoder], ids: Tensor, mask: Tensor | None, *, every: bool) -> Tensor:
        """Goes on with ids [rows, columns] where mask [rows, columns] bool says so (None: everywhere).

        Logits [rows, columns, vocabulary], or of the last column alone unless `every`. In a column without a token:
        those of the row's last token before it; zeros where there is none. An empty cache builds its decoder.
        """
        if self.decoder is None or self.state is None:
            self.decoder = build()
            self.state = self.decoder.empty(len(ids))
        decoder = self.decoder
        if self.state.rows != len(ids):
            raise ValueError(f"input_ids have {len(ids)} rows, and past_key_values {self.state.rows}")
        self.columns += ids.shape[1]
        if mask is None or bool(mask.all()):
            return _logits(decoder, ids, self.state, every=every)
        return self._padded(decoder, ids, mask, every=every)

    def _padded(self, decoder: Decoder, ids: Tensor, mask: Tensor, *, every: bool) -> Tensor:
        assert self.state is not None
        counts = mask.sum(dim=1)
        groups, parts = [], []
        precise = torch.float32
        found: dict[int, Tensor] = {}
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero().squeeze(1)
            part = decoder.select(self.state, rows.cpu())
            if count:
                tokens = ids[rows][mask[rows]].view(len(rows), count)
                logits = _logits(decoder, tokens, part, every=every)
                precise = logits.dtype
                found |= dict(zip(rows.tolist(), logits, strict=True))
            groups.append(rows.cpu())
            parts.append(part)
        self.state = decoder.select(decoder.join(parts), torch.cat(groups).argsort())
        columns = ids.shape[1] if every else 1
        out = torch.zeros(len(ids), columns, decoder.vocab_size, dtype=precise, device=ids.device)
        last = mask.cumsum(dim=1) - 1
        for row, logits in found.items():
            index = last[row] if every else last.new_zeros(1)
            read = index >= 0
            out[row, read] = logits[index[read]].to(out.device)
        return out

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.rows

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self._select(torch.arange(self.state.rows).repeat_interleave(repeats))

    def reset(self) -> None:
        self.decoder = self.state = None
        self.columns = 0

    def crop(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("a memory cannot forget its last tokens: copy the cache before they are read")

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryCache:
        # The decoder holds the model, which is not copied.
        new = MemoryCache()
        new.decoder, new.columns = self.decoder, self.columns
        if self.decoder is not None and self.state is not None:
            new.state = self.decoder.select(self.state, torch.arange(self.state.rows))
        return new

    def __repr__(self) -> str:
        return f"MemoryCache(rows={0 if self.state is None else self.state.rows}, columns={self.columns})"

    def _select(self, rows: Tensor) -> None:
        if self.decoder is not None and self.state is not None:
            self.state = self.decoder.select(self.state, rows.cpu().to(torch.int64))


def _logits(decoder: Decoder, ids: Tensor, state: DecodingState, *, every: bool) -> Tensor:
    """Of ids [rows, tokens] without padding: [rows, tokens, vocabulary], or [rows, 1, vocabulary] of the last."""
    if ids.shape[1] == 1:
        # The next step may overwrite what it gives.
        return decoder.step(ids[:, 0], state).unsqueeze(1).clone()
    return decoder.logits(ids, state) if every else decoder.read(ids, state).unsqueeze(1)
