"""Intervals of shares that may be 0 or 1, where a bootstrap has no width."""

from __future__ import annotations

import math

Z = 1.959963984540054
"""Of a normal distribution, the half-width of its middle 95 %."""


def wilson(right: float, count: float, z: float = Z) -> tuple[float, float]:
    """Lower and upper end of Wilson's score interval for `right` of `count` (E. B. Wilson, JASA 22, 1927).

    >>> tuple(round(end, 3) for end in wilson(96, 96))
    (0.962, 1.0)
    """
    if not count:
        return math.nan, math.nan
    share = right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    # Exactly 0 and 1 at the ends, whatever is rounded.
    return 0.0 if right == 0 else max(0.0, middle - half), 1.0 if right == count else min(1.0, middle + half)
