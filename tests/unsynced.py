"""Files of tests are left to the cache of the system: no test cuts the power.

A sync takes some 5 ms for every file, in which a core has nothing to do, and its removal half as long again; a run on
several ranks that saves every step has thousands. What is killed loses nothing that was written. Ranks of the real
launchers sync as they do for users, and so do those that are to be killed in the middle of a save.
"""

from __future__ import annotations

import os

SYNCED = "MNEMOS_TESTS_SYNCED"
"""The variable with which ranks that are forked sync nevertheless."""
_sync = os.fsync


def leave_files_to_the_cache() -> None:
    """For this process and those that it forks."""
    # An error for what is no open file stays one.
    os.fsync = lambda descriptor: os.fstat(descriptor) and None


def sync_files() -> None:
    """As they are for users, in this process."""
    os.fsync = _sync
