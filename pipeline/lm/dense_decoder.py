"""Decodes with a `...ForCausalLM` of transformers whose past is the keys and values of attention."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from pipeline.errors import UserError
from pipeline.lm.decoding import Decoder, DecodingState

PIECE = 1024
"""Tokens that are read at a time: what lies between the layers is of these alone."""
SPARE = 256
"""Columns that a cache has room for, at the least, each time that it grows."""


class GrowingLayer(DynamicLayer):
    """transformers' cache of a layer that sees everything, with room for more: a token is written beside the others,
    where its own layer copies all of them."""

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values [rows, heads, tokens, dim]; gives all that there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        assert self.keys is not None and self.values is not None
        before = self.keys.shape[2]
        after = before + key_states.shape[2]
        if self._room is None or self._room[0].shape[2] < after:
            room = after + max(SPARE, after // 2)
            self._room = (_with_room(self.keys, room), _with_room(self.values, room))
        for kept, new in zip(self._room, (key_states, value_states), strict=True):
            kept[:, :, before:after] = new
        self.keys, self.values = (kept[:, :, :after] for kept in self._room)
        return self.keys, self.values


def _with_room(tensor: Tensor, columns: int) -> Tensor:
    room = tensor.new_empty(*tensor.shape[:2], columns, tensor.shape[3])
    room[:, :, : tensor.shape[2]] = tensor
    return room


class DenseState(DecodingState):
    """A cache of transformers with a column per token of the longest row; shorter rows are padded on the left."""

    def __init__(self, cache: DynamicCache, lengths: Tensor) -> None:
        self.cache = cache
        self._lengths = lengths

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> Tensor:
        return self._lengths

    @property
    def columns(self) -> int:
        """Tokens of the longest row."""
        return _longest(self._lengths)

    def grow(self, tokens: int) -> None:
        """Counts tokens that the cache has taken in."""
        self._lengths = self._lengths + tokens

    def tensors(self) -> dict[str, Tensor]:
        """lengths [rows]; of each layer keys and values [rows, heads, columns, dim], where it has a sliding window the
        last columns alone."""
        found = {"lengths": self._lengths}
        layers: Any = self.cache.layers
        for number, layer in enumerate(layers):
            # One that uses the keys of another has none.
            if layer.keys is not None and layer.values is not None:
                found[f"layers.{number}.keys"], found[f"layers.{number}.values"] = layer.keys, layer.values
        return found


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if len(lengths) else 0


class DenseDecoder(Decoder):
    """Any decoder of transformers whose past is keys and values alone; in evaluation mode, on one device.

    Rows of different lengths are padded on the left, and what is padded is masked: its weight in attention is exactly
    0. Positions count each row's own tokens.
    """

    def __init__(self, model: Any) -> None:
        """Raises UserError for a model that keeps more of the past than keys and values."""
        self.model = model
        self._config = model.config.get_text_config(decoder=True)
        self.vocab_size = int(self._config.vocab_size)
        self.limit = getattr(self._config, "max_position_embeddings", None)
        self._takes = set(inspect.signature(model.forward).parameters)
        layers = self._cache().layers
        self._windows = [x.sliding_window if isinstance(x, DynamicSlidingWindowLayer) else None for x in layers]
        probe = DenseState(self._cache(), torch.zeros(1, dtype=torch.int64))
        self._forward(torch.zeros(1, 1, dtype=torch.int64), probe, last=True)
        self._kept = {name: tensor[:0, :, :0] for name, tensor in probe.tensors().items() if name != "lengths"}
        """Of no rows and no columns: the names, shapes and kinds of what the cache holds."""

    def _cache(self) -> DynamicCache:
        kinds = getattr(self._config, "layer_types", None) or ()
        cache = DynamicCache(config=self._config)
        for number, layer in enumerate(cache.layers):
            # Where a chunk begins would depend on the padding.
            if type(layer) is DynamicLayer:
                cache.layers[number] = GrowingLayer()
            elif type(layer) not in (DynamicSlidingWindowLayer, DummyLayer) or "chunked_attention" in kinds:
                kept = kinds[number] if kinds else type(layer).__name__
                raise UserError(
                    f"{type(self.model).__name__}: its layer {number} is of the kind {kept}, which cannot be decoded"
                    " here: give a model whose layers have full attention or a sliding window"
                )
        return cache

    def empty(self, rows: int) -> DenseState:
        kept = {name: tensor.new_empty(rows, *tensor.shape[1:]) for name, tensor in self._kept.items()}
        return self._state(kept, torch.zeros(rows, dtype=torch.int64))

    def read(self, ids: Tensor, state: DecodingState) -> Tensor:
        if not ids.shape[1]:
            raise ValueError("no tokens to read")
        for piece in ids.split(PIECE, dim=1):
            found = self._forward(piece, state, last=True)
        return found[:, -1]

    def logits(self, ids: Tensor, state: DecodingState) -> Tensor:
        return torch.cat([self._forward(piece, state, last=False) for piece in ids.split(PIECE, dim=1)], dim=1)

    def step(self, ids: Tensor, state: DecodingState) -> Tensor:
        return self._forward(ids.unsqueeze(1), state, last=True)[:, -1]

    @torch.no_grad()
    def _forward(self, ids: Tensor, state: DecodingState, *, last: bool) -> Tensor:
        """Logits behind the tokens [rows, tokens], or behind the last; [rows, tokens, vocabulary]."""
        state = _own(state)
        tokens, device, columns = ids.shape[1], self.model.device, state.columns
        options: dict[str, Any] = {}
        padding = (columns - state.lengths).unsqueeze(1)
        if bool(padding.any()):
            column = torch.arange(columns + tokens)
            options["attention_mask"] = (column >= padding).long().to(device)
            if "position_ids" in self._takes:
                options["position_ids"] = (column[columns:] - padding).to(device)
        if last and "logits_to_keep" in self._takes:
            options["logits_to_keep"] = 1
        output = self.model(ids.to(device), past_key_values=state.cache, use_cache=True, **options)
        state.grow(tokens)
        logits: Tensor = output.logits[:, -1:] if last else output.logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def select(self, state: DecodingState, rows: Tensor) -> DenseState:
        tensors, rows = _own(state).tensors(), rows.cpu()
        lengths = tensors.pop("lengths")[rows]
        columns = _longest(lengths)
        kept = {}
        for name, tensor in tensors.items():
            # What is padding of every row that stays is left out.
            unused = tensor.shape[2] - self._width(name, columns)
            kept[name] = tensor[rows.to(tensor.device), :, unused:]
        return self._state(kept, lengths)

    def join(self, states: Sequence[DecodingState]) -> DenseState:
        every = [_own(state).tensors() for state in states]
        lengths = torch.cat([tensors["lengths"] for tensors in every])
        columns = _longest(lengths)
        kept = {}
        for name in self._kept:
            width = self._width(name, columns)
            parts = [tensors[name] for tensors in every]
            kept[name] = torch.cat([F.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])
        return self._state(kept, lengths)

    def restore(self, tensors: Mapping[str, Tensor]) -> DenseState:
        if set(tensors) != {"lengths", *self._kept}:
            odd = min(set(tensors) ^ {"lengths", *self._kept})
            raise ValueError(f"{odd}: {'is not of' if odd in tensors else 'is missing for'} this model")
        lengths = tensors["lengths"].cpu()
        if lengths.dim() != 1 or lengths.dtype != torch.int64 or bool((lengths < 0).any()):
            raise ValueError("lengths: no counts of tokens")
        columns, kept = _longest(lengths), {}
        for name, own in self._kept.items():
            shape = (len(lengths), own.shape[1], self._width(name, columns), own.shape[3])
            if tensors[name].shape != shape or tensors[name].dtype != own.dtype:
                found = f"{tuple(tensors[name].shape)}, {tensors[name].dtype}"
                raise ValueError(f"{name}: is {found}, this model has {shape}, {own.dtype}")
            # Its own: the state is changed in place.
            kept[name] = tensors[name].to(own.device, copy=True)
        return self._state(kept, lengths.clone())

    def _width(self, name: str, columns: int) -> int:
        """Columns that a layer keeps of so many; a sliding window has the token that is read besides."""
        window = self._windows[int(name.split(".")[1])]
        return columns if window is None else min(columns, window - 1)

    def _state(self, kept: Mapping[str, Tensor], lengths: Tensor) -> DenseState:
        """Of tensors that nothing else holds."""
        cache = self._cache()
        layers: Any = cache.layers
        for number, layer in enumerate(layers):
            name = f"layers.{number}"
            if f"{name}.keys" in kept:
                keys, values = kept[f"{name}.keys"], kept[f"{name}.values"]
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
                if isinstance(layer, DynamicSlidingWindowLayer):
                    layer.cumulative_length = _longest(lengths)
        return DenseState(cache, lengths)


def _own(state: DecodingState) -> DenseState:
    if not isinstance(state, DenseState):
        raise TypeError(f"a {type(state).__name__} is not a state of this decoder")
    return state
