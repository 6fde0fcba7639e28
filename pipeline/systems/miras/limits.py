"""The region where the memory cannot grow (tests/ops/test_scan_stability.py derives and checks it)."""

MAX_FORGET = 0.01
"""Largest forget rate per token."""
MAX_MOMENTUM = 0.99
"""Largest momentum: nearer to 1 the norm that bounds the state holds for smaller forget rates only."""
STEP_MARGIN = 0.9
"""Largest step size, as a share of (1 - eta)^2."""
