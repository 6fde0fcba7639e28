"""A rank that dies or stalls ends the job with its name, instead of leaving the others to wait for it.

heartbeat.py   what a rank says of itself
verdict.py     who is to blame, from what all ranks said
wire.py        how it travels: every rank talks to rank 0, in a thread of its own
watch.py       Watch: what the training loop holds
"""

from pipeline.runtime.heartbeat.diagnosis import Verdict
from pipeline.runtime.heartbeat.monitor import Watch

__all__ = ["Verdict", "Watch"]
