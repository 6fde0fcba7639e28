"""Stopping before the last step: a signal or a deadline, noted at any moment, acted on between micro-batches."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

DEADLINE = 1
"""The request of a deadline; any other above 0 is the number of a signal."""
REQUESTS = (DEADLINE, signal.SIGINT, signal.SIGTERM)
REPEAT_TIMEOUT = 1.0
"""Seconds after which another SIGINT means that the person will not wait for the checkpoint. Launchers send several."""


class Stopped(Exception):
    """All ranks agreed to stop; raised on every one between the same two micro-batches."""

    reported = False
    """Whether it has been printed."""

    def __init__(self, request: int) -> None:
        self.signal = None if request == DEADLINE else signal.Signals(request)
        super().__init__("--max-hours have passed" if self.signal is None else self.signal.name)

    @property
    def exit_code(self) -> int:
        """0 for a deadline, which was planned; 128 + N for signal N, so that a supervisor sees an unfinished run."""
        return 0 if self.signal is None else 128 + self.signal


class StopRequests:
    """This rank's own: SIGTERM, SIGINT, and `--max-hours` since it was made. The context holds the handlers."""

    def __init__(self, max_hours: float | None = None) -> None:
        self.max_hours = max_hours
        self._begun = time.monotonic()
        self._signal = 0
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def pending(self) -> int:
        """0, DEADLINE or the number of a signal; the largest of all ranks is what they act on."""
        late = self.max_hours is not None and time.monotonic() - self._begun >= 3600 * self.max_hours
        return self._signal or (DEADLINE if late else 0)

    def __enter__(self) -> StopRequests:
        # Python runs handlers in the main thread alone, and lets no other set them.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal and number == signal.SIGINT and now - self._since > REPEAT_TIMEOUT:
            raise KeyboardInterrupt
        if not self._signal:
            self._signal, self._since = number, now
