"""Updates that are skipped because a gradient was not finite: counted, logged, and limited in a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.callbacks import Callback
from pipeline.engine import StepResult
from pipeline.errors import UserError
from pipeline.parallel.collectives import all_gather_object
from pipeline.run import Run
from pipeline.system import StepOutput


def count_skipped(
    run: Run, outputs: Sequence[StepOutput], position: Mapping[str, Any], callbacks: Iterable[Callback]
) -> None:
    """Counts the run's last step as skipped. Collective; raises UserError when too many in a row were.

    `outputs`: what its micro-batches measured. `position`: where its batch began, as the loader's `state_dict` says.
    """
    progress, limit = run.progress, run.config.optimizer.max_skipped
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    found = where_it_began(run, outputs, position)
    for callback in callbacks:
        callback.on_skip(progress.step, progress.skipped_in_a_row, found)
    if progress.skipped_in_a_row >= limit:
        raise UserError(
            f"step {progress.step}: {limit} updates in a row had a non-finite loss or gradient and were skipped"
            f" (training.log names their batches): lower --lr, or resume from an earlier checkpoint"
        )


def count_overflow(run: Run, result: StepResult, callbacks: Iterable[Callback]) -> None:
    """Counts the run's last step, `result`, as skipped for a loss scale that was too large: it ends no run, since the
    next has a lower scale, down to the least."""
    run.progress.skipped += 1
    assert result.loss_scale is not None
    for callback in callbacks:
        callback.on_overflow(run.progress.step, result.loss_scale)


def where_it_began(run: Run, outputs: Sequence[StepOutput], position: Mapping[str, Any]) -> dict[str, Any]:
    """Where the batch of a skipped step began. Collective.

    By stream: those with a non-finite loss, or else all. Of a loader without streams: its position.
    """
    if "streams" not in position:
        return _readable(position)
    bad = {
        str(int(stream))
        for output, ids in zip(outputs, run.streams, strict=True)
        if not all(bool(value.isfinite()) for value in output.sums.values())
        for stream in ids
    }
    places = {stream: _readable(place) for stream, place in position["streams"].items()}
    local = {stream: place for stream, place in places.items() if stream in bad}
    everyone = all_gather_object(run.topology, (local, places))
    found = {stream: place for bad_ones, _ in everyone for stream, place in bad_ones.items()}
    return found or {stream: place for _, all_of_them in everyone for stream, place in all_of_them.items()}


def _readable(place: Mapping[str, Any]) -> dict[str, int | str]:
    """The part of a position that means something to a person: numbers, and the name of the document that goes on."""
    return {key: value for key, value in place.items() if isinstance(value, int) or (key == "name" and value)}
