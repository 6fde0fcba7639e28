"""What every test runs under."""

from __future__ import annotations

import signal

from hypothesis import settings

from pipeline.host.hardware import choose_accelerator
from tests.unsynced import leave_files_to_the_cache

choose_accelerator()
leave_files_to_the_cache()

# How long an example takes is the machine's affair, which may be doing something else.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Shells start background jobs, and nohup what follows it, with these ignored; what a test starts would inherit that.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)
