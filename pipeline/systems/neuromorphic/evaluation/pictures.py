"""The six pictures of a run, and the keys of metrics.jsonl that each one shows."""

from __future__ import annotations

from pipeline.panel import Panel, Panels
from pipeline.systems.neuromorphic.config import Sizes
from pipeline.systems.neuromorphic.evaluation.ablations import ALL, BOTH, OWN, cost_of
from pipeline.systems.neuromorphic.statistics import MODULES


def panels(sizes: Sizes) -> Panels:
    """Training, procedural and episodic memory, gates, working memory, gradients."""
    return {
        "training": _training(),
        "pm": _procedural(sizes),
        "em": _episodic(sizes),
        "gates": _gates(sizes),
        "wm": _working(sizes),
        "gradients": _gradients(sizes),
    }


def _training() -> list[Panel]:
    costs = ["WM", "PM", "EM", BOTH, ALL, f"{OWN}PM", f"{OWN}EM"]
    return [
        Panel("Loss", "nats", {"loss": "loss"}),
        Panel("Perplexity", "", {"perplexity": "ppl"}, log=True),
        Panel("Learning rate", "", {"learning rate": "lr"}),
        Panel("Throughput", "tokens per second", {"tokens per second": "tok_s"}),
        Panel("Gradient norm", "before clipping", {"gradient norm": "grad_norm"}, log=True),
        Panel("Strengths above .9 of their budget", "penalty", {"penalty": "reg"}),
        Panel("What a memory is worth", "nats per token without it", {name: cost_of(name) for name in costs}),
    ]


def _by_column(title: str, y_label: str, sizes: Sizes, key: str) -> Panel:
    """A line a column, of a key with `{b}` in it."""
    return Panel(title, y_label, {f"column {b}": key.format(b=b) for b in range(sizes.columns)})


def _by_layer(title: str, y_label: str, sizes: Sizes, key: str) -> Panel:
    """A line an instance, of a key with `{b}` and `{l}` in it."""
    names = [(b, layer) for b in range(sizes.columns) for layer in range(sizes.layers)]
    return Panel(title, y_label, {f"column {b}, layer {layer}": key.format(b=b, l=layer) for b, layer in names})


def _grid(title: str, sizes: Sizes, key: str) -> Panel:
    """The last values, layers by columns."""
    rows = [[key.format(b=b, l=layer) for b in range(sizes.columns)] for layer in range(sizes.layers)]
    return Panel(title, "layer", grid=rows, x_label="column")


def _procedural(sizes: Sizes) -> list[Panel]:
    return [
        _by_layer("Mean strength", "a", sizes, "pm_b{b}_l{l}_a_mean"),
        _by_layer("Sum of strengths", "of at most 4", sizes, "pm_b{b}_l{l}_a_sum"),
        Panel("Use of the budget", "share", {"all": "pm_budget_util_global"}),
        _by_column("Commit rate", "p", sizes, "pm_commit_rate_b{b}"),
        _by_layer("Eligibility", "norm", sizes, "pm_b{b}_l{l}_elig_norm"),
        _by_layer("Slots with a strength", "share", sizes, "pm_b{b}_l{l}_nonzero"),
        _grid("Sum of strengths, last", sizes, "pm_b{b}_l{l}_a_sum"),
    ]


def _episodic(sizes: Sizes) -> list[Panel]:
    return [
        _by_column("Mean strength", "S", sizes, "em_b{b}_S_mean"),
        _by_column("Sum of strengths", "of at most 8", sizes, "em_b{b}_S_sum"),
        Panel("Use of the budget", "share", {"all": "em_budget_util_global"}),
        _by_column("Gain of writes", "g", sizes, "em_g_em_mean_b{b}"),
        _by_column("Novelty", "", sizes, "em_novelty_mean_b{b}"),
        _by_column("Episodes", "share of slots", sizes, "em_b{b}_nonzero"),
        Panel("Candidates", "a span", {"written": "em_written_mean", "into an episode": "em_matched_mean"}),
    ]


def _gates(sizes: Sizes) -> list[Panel]:
    return [
        _by_layer("Kept of h", "mean of a", sizes, "b{b}_l{l}_gate_a_mean"),
        _by_layer("Saturated gates", "share of a below .05 or above .95", sizes, "b{b}_l{l}_gate_a_saturation"),
        _by_layer("Added to h", "mean of |b|", sizes, "b{b}_l{l}_gate_b_magnitude"),
        _by_layer("Hidden state", "norm of h", sizes, "b{b}_l{l}_h_norm"),
        _grid("Kept of h, last", sizes, "b{b}_l{l}_gate_a_mean"),
    ]


def _working(sizes: Sizes) -> list[Panel]:
    return [
        Panel("Use of the window", "share", {"all": "wm_buffer_util"}),
        Panel(
            "Entropy of attention",
            "nats",
            {"mean": "wm_entropy_mean", **{f"head {h}": f"wm_entropy_h{h}" for h in range(sizes.working_heads)}},
        ),
    ]


def _gradients(sizes: Sizes) -> list[Panel]:
    corners = [(b, layer) for b in (0, sizes.columns - 1) for layer in (0, sizes.layers - 1)]
    ends = {f"column {b}, layer {layer}": f"gnorm_b{b}_l{layer}" for b, layer in corners}
    return [
        Panel("Gradients by module", "norm", {module: f"gnorm_{module}" for module in MODULES.values()}, log=True),
        _by_layer("Gradients of the layers", "norm", sizes, "gnorm_b{b}_l{l}"),
        Panel("First and last", "norm", ends, log=True),
        _grid("Gradients of the layers, last", sizes, "gnorm_b{b}_l{l}"),
    ]
