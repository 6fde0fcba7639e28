"""The prototype's checks of contexts that are of no use: an identity, or an attractor."""

from __future__ import annotations

from collections.abc import Mapping

IDENTITY = 0.95
"""A mean cosine above it is an identity: of a context before and after the blocks, or of one and its embedding."""
SAME_DISTANCE, SAME_COSINE = 0.1, 0.99
"""All contexts are one where two of them are less than so far apart, and their cosine is above that."""
LEAST_NORM = LEAST_SPREAD = 0.1
"""Below them contexts are about zero, and about their mean."""


def is_attractor(scalars: Mapping[str, float]) -> bool:
    """Whether all contexts are about the same one, or about zero: as the prototype has it, with the root of the mean
    squared distance in place of the mean distance, which is not above it."""
    near = scalars["distance_of_contexts"] < SAME_DISTANCE
    return (near and scalars["cosine_of_contexts"] > SAME_COSINE) or scalars["norm"] < LEAST_NORM
