"""The line of an evaluation: each figure with those of what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping

Scalars = Mapping[str, float]


def headline(found: Scalars) -> str:
    """Of the second phase, or of the first, whose scalars have `converged`."""
    return _fixed_point(found) if "converged" in found else _prediction(found)


def _prediction(found: Scalars) -> str:
    nats = f"val {found['loss']:.3f} | ppl {math.exp(min(found['loss'], 700.0)):.2f}"
    return (
        f"{nats} (unigram {found['unigram_ppl']:.2f}, context at zero {found['context_zero_ppl']:.2f}) |"
        f" accuracy {found['accuracy']:.4f} (unigram {found['unigram_accuracy']:.4f})"
    )


def _fixed_point(found: Scalars) -> str:
    """A baseline that was not measured, as before there are any, is left out."""
    beside = {"untrained": "converged/random_init", "from pass to pass": "converged_pass_to_pass"}
    converged = _beside(found, "converged", "{:.2%}", beside)
    held_out = _beside(found, "converged_val", "{:.2%}", {"untrained": "converged_val/random_init"})
    line = f"converged {converged}, held out {held_out}"
    if "effective_rank/val" in found:
        train, val = (
            _beside(
                found, f"effective_rank/{side}", "{:.1%}",
                {"untrained": f"effective_rank/random_init_{side}", "independent numbers": "effective_rank/gaussian"},
            )
            for side in ("train", "val")
        )  # fmt: skip
        final = _beside(found, "final_diff", "{:.3g}", {"untrained": "final_diff/random_init"})
        relative = _beside(
            found, "final_diff_relative", "{:.2g}", {"untrained": "final_diff_relative/random_init"}
        )  # fmt: skip
        line += f" | effective rank {train}, held out {val} | final_diff {final}, as a share of the norm {relative}"
    return line


def _beside(found: Scalars, scalar: str, shown: str, baselines: Mapping[str, str]) -> str:
    """A figure, and in brackets those of the same name by what they are of."""
    others = [f"{words} {shown.format(found[name])}" for words, name in baselines.items() if name in found]
    return shown.format(found[scalar]) + (f" ({', '.join(others)})" if others else "")
