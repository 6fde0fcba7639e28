"""A rank that dies or stalls ends the job with its name, instead of leaving the others to wait for it.

status.py       what a rank reports of itself
diagnosis.py    who is to blame, from what all ranks reported
connection.py   how it travels: every rank talks to rank 0, in a thread of its own
server.py       rank 0's end
client.py       every other rank's end
monitor.py      HeartbeatMonitor: what the training loop holds
"""

from pipeline.runtime.heartbeat.diagnosis import Diagnosis
from pipeline.runtime.heartbeat.monitor import HeartbeatMonitor

__all__ = ["Diagnosis", "HeartbeatMonitor"]
