"""How a run ends, whatever ended it."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from pipeline.callbacks import Callback
from pipeline.callbacks.progress import log_end
from pipeline.checkpoint.save import Saver
from pipeline.errors import RankError, UserError, out_of_space
from pipeline.files.output import not_written
from pipeline.run import Run
from pipeline.run_folder import write_run_file
from pipeline.runtime.exit import exit_message, log_line
from pipeline.runtime.heartbeat import HeartbeatMonitor
from pipeline.runtime.stop import Stopped


@contextlib.contextmanager
def recorded_end(
    run: Run, saver: Saver, callbacks: Sequence[Callback], monitor: HeartbeatMonitor | None
) -> Iterator[None]:
    """Around the steps of a run: whatever ends them, run.json records it, and the save and the callbacks end too."""
    status = "failed"
    shared: Stopped | UserError | None = None
    try:
        yield
        done = run.progress.phase_done and not (run.phases and run.phases.after)
        status = "running" if run.goes_on else "finished" if done else "stopped"
    except Stopped as stop:
        status, shared = "stopped" if stop.signal is None else "interrupted", stop
        raise
    except UserError as error:
        shared = error
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except OSError as error:
        if not out_of_space(error):
            raise
        # Libraries write pictures, events and traces; they name no file.
        shared = not_written(Path(error.filename or run.folder), error)
        raise shared from error
    finally:
        end_run(run, status, shared, saver, callbacks, monitor)


@contextlib.contextmanager
def recorded_switch(ended: Run) -> Iterator[None]:
    """Around the start of the next phase: what fails in it is a failure of the run, whose last phase has ended."""
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        if isinstance(error, Stopped):
            status = "stopped" if error.signal is None else "interrupted"
        if ended.is_main:
            parts = {"run.json": write_run_file, "training.log": log_end}
            _end_parts([(name, functools.partial(part, ended, status)) for name, part in parts.items()], error)
        raise


def end_run(
    run: Run,
    status: str,
    shared: Stopped | UserError | None,
    saver: Saver,
    callbacks: Sequence[Callback],
    monitor: HeartbeatMonitor | None,
) -> None:
    """How the run ends, and why, is printed before anything that may take long or never return.

    `shared`: what all ranks end by, or what this one alone cannot write. Whatever goes wrong here, the run's own
    outcome counts.
    """
    if isinstance(shared, UserError) and monitor is not None:
        # The others end by the same error, and must not be held to have failed while this rank goes on.
        monitor.ends(shared)
    if run.is_main and shared is not None:
        with contextlib.suppress(OSError), tqdm.external_write_mode(file=sys.stderr):  # there may be a bar
            log_line(exit_message(shared))
        shared.reported = True
    last: list[tuple[str, Callable[[], None]]] = []
    if run.is_main:
        last.append(("run.json", functools.partial(write_run_file, run, status)))
    # A run that fails prints the reason before the other ranks, which wait for it, take it for lost.
    last.append(("the save", functools.partial(saver.close, waits=status != "failed")))
    last += [(type(callback).__name__, functools.partial(callback.on_end, status)) for callback in callbacks]
    _end_parts(last, shared)


def _end_parts(parts: Sequence[tuple[str, Callable[[], None]]], reason: BaseException | None) -> None:
    """Ends each part by its name. What goes wrong is a warning: `reason`, which ended the run, counts."""
    for name, part in parts:
        try:
            part()
        except Exception as error:
            # One line names what cannot be written; the other files of the folder would only repeat it.
            if not (isinstance(error, RankError) and isinstance(reason, RankError)):
                warnings.warn(f"{name} did not end well: {error}", stacklevel=3)
