"""Likelihoods by a system's own forward pass: on any ZeRO stage, sequence-parallel degree and number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.capabilities import ScoresText
from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.downstream.requests import Likelihood, Request, groups, rows_of, width_of
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, StepContext

MULTIPLE = 64
"""Rows are as long as a multiple of this: fewer shapes, each of which some backends compile anew."""
PIECE = 2048
"""Least number of tokens that one forward pass reads of a text without a limit; as many whole sequences as that
takes."""


class SystemScorer:
    """A model that `System.forward` runs, sharded or not.

    Every data rank reads its share of the texts, in as many forward passes of the same shape as the others: ZeRO-3
    gathers weights in each. A text is one document from its first token on. Where the system has no limit, a long text
    is read piece by piece through the carry.
    """

    def __init__(self, system: ScoresText, model: nn.Module, sync_point: SyncPoint, padding: int) -> None:
        """`padding`: an id of the vocabulary that stands behind texts."""
        self.system, self.model, self.sync_point, self.padding = system, model, sync_point, padding
        self.limit = system.text_limit()

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[Likelihood]:
        config, topology = self.system.config, self.sync_point.topology
        sums = torch.zeros(len(requests), 2, dtype=torch.float64, device=next(self.model.parameters()).device)
        rows = config.evaluation.batch_size or config.batch_size
        budget = rows * config.sequence_length
        was_training = self.model.training
        self.model.eval()
        try:
            widths = [self._width(request) for request in requests]
            for members, width in groups(widths, budget, topology.data):
                count = math.ceil(len(members) / topology.data)
                own = members[topology.data_rank * count : (topology.data_rank + 1) * count]
                texts = [requests[number] for number in own]
                # A rank that has fewer texts than others reads one that no one asks about.
                texts += [Request([self.padding], [])] * (count - len(own))
                found = self._read(*rows_of(texts, self.limit, width, self.padding))
                sums[own] += found[: len(own)]
        finally:
            self.model.train(was_training)
        if topology.world > 1:
            # Ranks of a sequence have read different tokens, data ranks different texts: what is not theirs is 0.
            dist.all_reduce(sums)
        return [Likelihood(-nats, wrong == 0) for nats, wrong in sums.tolist()]

    def _width(self, request: Request) -> int:
        """Tokens of the row that a request is read in."""
        multiple = math.lcm(MULTIPLE, self.sync_point.topology.sequence)
        return -(-width_of(request, self.limit) // multiple) * multiple

    def _read(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Of ids and labels [rows, width]: nats, and tokens that are not the likeliest, [rows, 2] float64, of what this
        rank has read."""
        topology, device = self.sync_point.topology, next(self.model.parameters()).device
        whole = self.system.config.sequence_length
        piece = ids.shape[1] if self.limit is not None else -(-PIECE // whole) * whole
        options: dict[str, Any] = {"predict": True}
        context = StepContext(topology, self.system.config.seed, "evaluation", 1, options)
        carry: Carry = {}
        sums = torch.zeros(ids.shape[0], 2, dtype=torch.float64, device=device)
        for start in range(0, ids.shape[1], piece):
            part = slice(start, start + piece)
            self.sync_point("evaluation")
            positions = torch.arange(ids.shape[1])[part].expand(ids.shape[0], -1)
            streams = torch.arange(ids.shape[0]) + topology.data_rank * ids.shape[0]
            batch = TokenBatch(ids[:, part], labels[:, part], torch.zeros_like(ids[:, part]), positions, streams)
            output = self.system.forward(self.model, batch.to(device), carry, context)
            carry = output.carry
            local = batch.labels[:, topology.shard(batch.labels.shape[1])].to(device)
            counted = local != IGNORED
            sums[:, 0] += (output.tokens["losses"].double() * counted).sum(1)
            sums[:, 1] += ((output.tokens["predictions"] != local) & counted).sum(1)
        return sums
