"""A decoder with memory as a causal language model of transformers: `generate`, pipelines, `from_pretrained`.

It is the model that is trained here, not another one: `MirasModel` reads whole texts, `MirasDecoder` goes on with them.
An exported folder carries this module and what it imports (pipeline/export/code.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from pipeline.lm.decoder_config import kv_heads
from pipeline.lm.decoding_cache import MemoryCache
from pipeline.parallel.topology import Topology
from pipeline.systems.miras.causal_lm_config import MnemosConfig, config_of
from pipeline.systems.miras.decoding.decoder import MirasDecoder
from pipeline.systems.miras.initial_values import initial_value
from pipeline.systems.miras.model import MirasModel
from pipeline.systems.miras.slots import importance_surrogate

__all__ = ["MemoryCache", "MnemosConfig", "MnemosForCausalLM", "causal_lm_of", "register"]

IGNORED = -100
"""The label of a token that does not count, as everywhere in transformers."""


class MnemosForCausalLM(PreTrainedModel, GenerationMixin):
    """Parameters are those of `MirasModel`, under `model.`; the dtype is any, the sums are those of the parallel pass.

    Each row is one text from its start. Padding, on either side, is left out: a row gives what it gives alone.
    """

    config_class = MnemosConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"model.backbone.lm_head.weight": "model.backbone.model.embed_tokens.weight"}
    # What a memory has taken in cannot be taken back, as assisted decoding would need.
    _is_stateful = True

    def __init__(self, config: MnemosConfig, model: MirasModel | None = None) -> None:
        """`model`: one of these sizes that there is already, whose parameters are shared."""
        super().__init__(config)
        for parameter in () if model is None else model.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self.model = MirasModel(config.sections(), config.backbone_config()) if model is None else model
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Gives every parameter that was not loaded its random initial value."""
        sections = self.config.sections()
        for name, parameter in self.model.named_parameters():
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.copy_(initial_value(name, parameter.shape, sections, None))
                parameter._is_hf_initialized = True
        super().initialize_weights()

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        if missing_keys is not None and self.config.tie_word_embeddings:
            # A tied head has no weight in the model's state (`LossHead.tie`), so it was not asked for in the files.
            missing_keys |= self.all_tied_weights_keys.keys()
        super().tie_weights(missing_keys, recompute_mapping)

    def decoder(self) -> MirasDecoder:
        """What reads text with this model, and continues it a token at a time."""
        return MirasDecoder(self.model, limit=self.config.text_limit)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.backbone.model.embed_tokens
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.model.backbone.lm_head
        return head

    def resize_token_embeddings(self, *_: Any, **__: Any) -> nn.Embedding:
        raise NotImplementedError("the vocabulary of a model with memory is that of its training")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # `forward` makes a MemoryCache.
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits in float32 (float64 of a model in float64) behind the tokens.

        Args:
            input_ids: [rows, columns] int64; with `past_key_values` the new columns alone.
            attention_mask: 0 where there is no token, [rows, columns], or of all columns with those in the cache.
            past_key_values: a `MemoryCache`, which is changed in place.
            labels: like input_ids, shifted here; -100 where none counts. The loss is the mean in nats.
            use_cache: read with a cache, without gradients. By default where none are asked for, nor labels.
            logits_to_keep: columns at the end whose logits are given, 0: all; or an index of columns.
            output_hidden_states: of the embedding, behind each layer, and of the last norm in place of the last layer;
                not with a cache.
            num_items_in_batch: what the sum of the losses is divided by.

        Raises ValueError for arguments that do not fit each other.
        """
        _check(input_ids, attention_mask, kwargs)
        assert input_ids is not None
        with_states = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        if use_cache is None:
            free = labels is None and not with_states and not torch.is_grad_enabled()
            use_cache = past_key_values is not None or (self.config.use_cache and free)
        if use_cache and (labels is not None or with_states):
            what = "labels" if labels is not None else "output_hidden_states"
            raise ValueError(f"{what} are of whole texts: give use_cache=False, and no past_key_values")
        mask = None if attention_mask is None else _new_columns(attention_mask, input_ids, past_key_values)
        if use_cache:
            output = self._cached(input_ids, mask, past_key_values, logits_to_keep)
        elif past_key_values is not None and past_key_values.get_seq_length():
            raise ValueError("past_key_values go on with a text, and use_cache=False reads a whole one: leave one out")
        else:
            output = self._whole(input_ids, mask, labels, logits_to_keep, with_states, num_items_in_batch)
        return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()

    def _cached(
        self, ids: Tensor, mask: Tensor | None, cache: Cache | None, keep: int | Tensor
    ) -> CausalLMOutputWithPast:
        if cache is None:
            cache = MemoryCache()
        if not isinstance(cache, MemoryCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}: give a MemoryCache, or none")
        if isinstance(cache.decoder, MirasDecoder) and cache.decoder.model is not self.model:
            raise ValueError("past_key_values are those of another model")
        logits = cache.extend(self.decoder, ids, mask, every=not (isinstance(keep, int) and keep == 1))
        return CausalLMOutputWithPast(logits=logits[:, _kept(keep)], past_key_values=cache)

    def _whole(
        self,
        ids: Tensor,
        mask: Tensor | None,
        labels: Tensor | None,
        keep: int | Tensor,
        with_states: bool,
        items: Tensor | int | None,
    ) -> CausalLMOutputWithPast:
        """One parallel pass over whole texts, with gradients."""
        segments = torch.zeros_like(ids)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        back = None
        if mask is not None and not bool(mask.all()):
            # A text begins at the first place, where chunks of the memory begin; behind it padding is another document.
            order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
            back = order.argsort(dim=1)[..., None]
            ids, counts = ids.gather(1, order), mask.sum(dim=1, keepdim=True)
            segments = (positions >= counts).to(torch.int64)
            positions = positions - counts * segments
        states: list[Tensor] | None = [] if with_states else None
        found = self.model(ids, None, segments, positions, None, Topology(), states=states)
        hidden = _in_order(found.hidden, back)
        loss = None
        if labels is not None:
            counted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            if mask is not None:
                # Neither padding, nor the token behind it: nothing was read before that one.
                counted = counted.masked_fill(~(mask & F.pad(mask[:, 1:], (0, 1))), IGNORED)
            losses, _ = self.model.backbone.lm_head(hidden, counted.to(hidden.device))
            beside = importance_surrogate(found.health, kv_heads(self.model.backbone.config))
            loss = (losses.sum() + beside) / ((counted != IGNORED).sum().clamp_min(1) if items is None else items)
        logits: Tensor = self.model.backbone.lm_head(hidden[:, _kept(keep)])
        all_states = None
        if states is not None:
            all_states = (*(_in_order(state, back) for state in states[:-1]), hidden)
        if logits.dtype != torch.float64:
            logits = logits.float()
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=all_states)


def causal_lm_of(model: MirasModel, *, limit: int | None) -> MnemosForCausalLM:
    """The model as transformers has it, in evaluation mode; its parameters are shared. `limit`: tokens of a text at the
    most, None: any number."""
    config = config_of(model.config, model.backbone.config, limit=limit)
    config.dtype = next(model.parameters()).dtype
    return MnemosForCausalLM(config, model).eval()


def register() -> None:
    """Makes the Auto classes of transformers know the model, in this process."""
    AutoConfig.register(MnemosConfig.model_type, MnemosConfig, exist_ok=True)
    AutoModelForCausalLM.register(MnemosConfig, MnemosForCausalLM, exist_ok=True)


def _check(ids: Tensor | None, mask: Tensor | None, others: dict[str, Any]) -> None:
    if ids is None:
        raise ValueError("give input_ids: a model with memory takes no inputs_embeds")
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"attention_mask is {list(mask.shape)}: give [rows, columns], 0 where there is no token")
    if others.get("output_attentions"):
        raise ValueError("output_attentions: attention weights are not kept here")


def _new_columns(mask: Tensor, ids: Tensor, cache: Cache | None) -> Tensor:
    """The mask of the columns of `ids`, bool."""
    columns = ids.shape[1]
    past = 0 if cache is None else cache.get_seq_length()
    if mask.shape[0] != ids.shape[0] or mask.shape[1] not in (columns, past + columns):
        raise ValueError(f"attention_mask is {list(mask.shape)}; expected {[len(ids), past + columns]}")
    return mask[:, -columns:].to(ids.device).bool()


def _kept(keep: int | Tensor) -> slice | Tensor:
    """Which columns' logits are given."""
    if isinstance(keep, int):
        return slice(-keep, None) if keep else slice(None)
    return keep


def _in_order(x: Tensor, back: Tensor | None) -> Tensor:
    """x [rows, columns, width] with its columns as they were given; back [rows, columns, 1]."""
    return x if back is None else x.gather(1, back.expand_as(x))
