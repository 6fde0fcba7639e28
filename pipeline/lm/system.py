"""The base class of language-model systems: packed text on a decoder of transformers."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.data.batch import IGNORED, Counts, StatefulLoader, TokenBatch
from pipeline.data.build import build_loader, build_source
from pipeline.data.byte_lengths import byte_lengths_of
from pipeline.data.run_tokenizer import run_tokenizer
from pipeline.data.sources.base import Source
from pipeline.data.tokenizer import Tokenizer
from pipeline.data.tokens.build import sidecar_of
from pipeline.data.tokens.listing import TokenListing, list_token_data
from pipeline.data.tokens.sidecar import makers_of
from pipeline.errors import UserError
from pipeline.lm.config import BackboneConfig
from pipeline.lm.decoder_config import kv_heads, sliding_window
from pipeline.lm.held_out_files import named_files, open_files
from pipeline.lm.pretrained import (
    backbone_config,
    check_fetched,
    check_path,
    is_local,
    pretrained_tensors,
    trained_length,
)
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import full_shape
from pipeline.system import Phase, System


class LanguageModelSystem(System[TokenBatch]):
    """What systems with a decoder share: its checks, the data of text, and how held-out text is measured."""

    def __init__(self, config: RunConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        self.backbone_section = backbone
        self.backbone = backbone_config(backbone)
        self._source: Source | None = None
        self._held_out: StatefulLoader[TokenBatch] | None = None
        self._files: dict[str, StatefulLoader[TokenBatch]] | None = None
        self._byte_lengths: tuple[Tensor | None] | None = None

    def check(self, topology: Topology) -> None:
        """Raises UserError when heads or sequence cannot be divided over the ranks, the vocabulary has no room for the
        recall task, local weights are not whole, or a held-out file has no name."""
        named_files(self.config)
        if is_local(self.backbone_section):
            pretrained_tensors(self.backbone_section)
        task = self.config.data.recall
        if task is not None and task.vocab_size > self.backbone.vocab_size:
            raise UserError(
                f"--model.backbone.vocabulary {self.backbone.vocab_size}: the recall task has"
                f" {task.vocab_size} ids: give as many or more"
            )
        for what, count in self.divided().items():
            if count % topology.sequence:
                raise UserError(
                    f"--parallel.sequence {topology.sequence} does not divide the {count} {what}: choose a degree that"
                    " does"
                )

    def divided(self) -> dict[str, int]:
        """What the ranks of a sequence divide among them, by name."""
        return {
            "sequence length": self.config.sequence_length,
            "attention heads": self.backbone.num_attention_heads,
            "key-value heads": kv_heads(self.backbone),
        }

    def loader(self, phase: Phase, topology: Topology) -> StatefulLoader[TokenBatch]:
        # Opened before the first step: not the first evaluation, an hour later, is to find that a file is not there.
        self.file_loaders(topology)
        return self.open_loader(topology, held_out=False)

    def open_loader(self, topology: Topology, *, held_out: bool) -> StatefulLoader[TokenBatch]:
        """Training or held-out data of this data rank."""
        # Before its tokenizer is missed, which is in the same folder.
        check_fetched(self.backbone_section)
        if not held_out and self.config.data.tokenizer == self.backbone_section.pretrained:
            check_path(self.backbone_section)
        if self.config.data.recall is None and not self.config.data.tokens:
            self._source = self._source or build_source(self.config, self.files)
        return build_loader(
            self.config,
            topology,
            vocab_size=self.backbone.vocab_size,
            held_out=held_out,
            files=self.files,
            source=self._source,
        )

    def held_out(self, phase: Phase, topology: Topology) -> StatefulLoader[TokenBatch]:
        """The held-out loader at its start: opened once, so that what it has read stays read."""
        if self._held_out is None:
            self._held_out = self.open_loader(topology, held_out=True)
        else:
            self._held_out.reset()
        return self._held_out

    def file_loaders(self, topology: Topology) -> Mapping[str, StatefulLoader[TokenBatch]]:
        """Of the held-out files that have a name, each at its start."""
        if self._files is None:
            self._files = open_files(self.config, topology, self.backbone.vocab_size)
        for loader in self._files.values():
            loader.reset()
        return self._files

    def count(self, batch: TokenBatch) -> Counts:
        return {self.token_term: int((batch.labels != IGNORED).sum())}

    def tokenizer(self, makers: Mapping[str, str] | None = None) -> Tokenizer:
        """That of the run's data. `makers`: of its token files, as `makers_of`; None: their sidecars say it. Raises
        UserError where the data is no text, or its tokenizer is not known."""
        check_fetched(self.backbone_section)
        data = self.config.data
        if data.recall is not None:
            raise UserError("it was trained on the recall task, whose ids stand for no text: give another model")
        if makers is None and data.tokens:
            listed = self.files if isinstance(self.files, TokenListing) else list_token_data(data)
            makers = makers_of(sidecar_of(file) for source in listed.training for file in source.files)
        return run_tokenizer(data, self.backbone.vocab_size, makers or {})

    def text_limit(self) -> int | None:
        """Tokens of a text that attention sees at once: as many as the model was trained with, here or before. A system
        whose carry goes on from pass to pass has no limit."""
        lengths = self.config.sequence_length, trained_length(self.backbone_section) or 0
        return min(max(lengths), sliding_window(self.backbone) or max(lengths))

    def byte_lengths(self) -> Tensor | None:
        """Bytes of text that each token id stands for; None where that is not known."""
        # Its tokenizer is loaded for it, and evaluations ask again.
        if self._byte_lengths is None:
            self._byte_lengths = (byte_lengths_of(self.config.data, self.files, self.backbone.vocab_size),)
        (lengths,) = self._byte_lengths
        if lengths is None or lengths.numel() >= self.backbone.vocab_size:
            return lengths
        # Rows that pad the vocabulary stand for nothing.
        return F.pad(lengths, (0, self.backbone.vocab_size - lengths.numel()))


def is_linear_weight(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter, sharded or not, is the matrix of a linear layer; that of an embedding is not, nor is one
    that a head shares with it."""
    return name.endswith(".weight") and len(full_shape(parameter)) == 2 and "embed_tokens" not in name
