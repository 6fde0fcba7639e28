"""What enters every token of a pass at fixed weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.system import Carry
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.documents import DocumentBatch
from pipeline.systems.cvfp.model.reader import Reader, shifted
from pipeline.systems.cvfp.phase import DocumentLoader
from pipeline.systems.cvfp.starts import start_of, with_ends


@torch.no_grad()
def exact_inputs(
    reader: Reader, loader: DocumentLoader, sizes: CvfpConfig, sync_point: SyncPoint, place: str
) -> Iterator[tuple[DocumentBatch, Tensor]]:
    """The micro-batches of a pass over what `loader` has, on the model's device, each with the contexts [rows, L, D]
    before its tokens. Collective.

    Of documents they are those of the recurrence from zero. Of a stream a pass before finds the context at the end of
    each of its parts, where the next part then begins: exact in the first two parts, and in others as far as a context
    forgets what stood more than a part before it. With `prediction.context` zero they are zero.
    """
    zero, carries = sizes.prediction.context == "zero", dict[int, Carry]()
    warm_up = sizes.carry != "document" and not zero
    for iteration in range(2 if warm_up else 1):
        for _ in range(loader.slots):
            for micro, unmoved in enumerate(next_step(loader, sync_point, place)):
                batch = unmoved.to(reader.device)
                if zero:
                    yield batch, torch.zeros(*batch.ids.shape, reader.width, device=reader.device)
                    continue
                carry = carries.get(micro, {})
                start = start_of(batch, carry, reader.width, sync_point.topology, way=sizes.carry, other=False)
                contexts = reader.contexts(batch.ids, batch.mask, start)
                carries[micro] = with_ends(batch, contexts, start, carry)
                if iteration or not warm_up:
                    yield batch, shifted(contexts, start)
