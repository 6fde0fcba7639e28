"""Processes: exit codes, signals, the folder lock, sync points, heartbeat."""
