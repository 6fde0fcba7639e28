"""Records that cannot be used: refused, or skipped and reported."""

from __future__ import annotations

import logging

from pipeline.data.sources.base import Document
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

_NAMED = 1000
"""Records that are named one by one; more of them are counted."""


class RecordLog:
    """Stops at a record that has a problem or, with `skip`, names and counts it; counts what is read as U+FFFD.

    A record that comes again is reported once. `should_report`: whether this rank reports; every rank counts.
    """

    def __init__(self, *, skip: bool, remedy: str, should_report: bool = True) -> None:
        self._skip, self._remedy, self._should_report = skip, remedy, should_report
        self.skipped = self.undecodable = 0
        self.first_problem: str | None = None
        self._named: set[str] = set()

    def refuse_or_skip(self, document: Document) -> None:
        """Raises UserError for a record that has a problem, unless such are passed over."""
        assert document.problem is not None
        if not self._skip:
            raise UserError(f"{document.problem}: {self._remedy}")
        self.first_problem = self.first_problem or document.problem
        if self._is_new(document):
            self.skipped += 1
            if self._should_report and (len(self._named) < _NAMED or _is_round(self.skipped)):
                logger.warning("%s: passed over (%d so far)", document.problem, self.skipped)

    def note(self, document: Document) -> None:
        """Counts documents that hold what is no text, and warns at the 1st, 10th, 100th, ... of them."""
        if document.undecodable and self._is_new(document):
            self.undecodable += 1
            if self._should_report and _is_round(self.undecodable):
                logger.warning(
                    "%s holds what is no text in its encoding, which is read as U+FFFD (%d documents so far)",
                    document.name,
                    self.undecodable,
                )

    def _is_new(self, document: Document) -> bool:
        if document.name in self._named:
            return False
        if len(self._named) < _NAMED:
            self._named.add(document.name)
        return True


def _is_round(count: int) -> bool:
    """Whether it is a power of ten."""
    return count == 10 ** (len(str(count)) - 1)
