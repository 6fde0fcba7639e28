"""What the system says of itself to a person: what was chosen, how an evaluation went, how its memories are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipeline.systems.miras.config import MemoryConfig, MirasConfig


def memory_line(kinds: Sequence[MemoryConfig], backends: Sequence[str]) -> str:
    """`titans, residual; layers 1 and 3; 4 heads x 32; backend cpu`, for each attachment and its backend."""
    return " | ".join(map(_kind, kinds, backends)) or "none"


def _kind(memory: MemoryConfig, backend: str) -> str:
    heads = f"{memory.heads} heads x {memory.head_dim}; backend {backend}"
    if memory.attachment == "slots":
        return f"{memory.slots.count} slots in chunks of {memory.slots.chunk}; {layers(memory.layers)}; {heads}"
    chunk = "" if memory.chunk_start is None else f" with gradients by chunks of {memory.chunk_start}"
    segments = f" in segments of {memory.context}" if memory.attachment == "mac" else ""
    return f"{memory.rule}{chunk}, {memory.attachment}{segments}; {layers(memory.layers)}; {heads}"


def distillation_line(sizes: MirasConfig, length: int, trained: int | None) -> str:
    """`KL to full attention; 640 random tokens a row beyond the window of 256`."""
    settings, window = sizes.distillation, sizes.attention.window
    weights = {
        "KL": settings.kl, "hidden states": settings.hidden, "attention's output": settings.attention,
        "cross-entropy": settings.cross_entropy,
    }  # fmt: skip
    terms = [name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items() if weight]
    tokens = f"{settings.tokens} random" if settings.tokens else "all"
    lower = ", from the first memory's layer on" if settings.lower_layers == "window" else ""
    line = f"{' + '.join(terms)}; teacher: full attention{lower}; {tokens} tokens a row beyond the window of {window}"
    if trained is not None and length > trained:
        line += f", up to {trained} tokens into the document: the backbone sees no further, or was not trained to, so"
        line += " later ones are not compared"
    return line


def layers(numbers: Sequence[int | str]) -> str:
    """`layer 2`, `layers 1 and 3`, `layers 8, 10, 12 and 14`, `layers 0 to 29`."""
    first, end = numbers[0], numbers[-1]
    if len(numbers) > 2 and isinstance(first, int) and list(numbers) == [*range(first, first + len(numbers))]:
        return f"layers {first} to {end}"
    *most, last = map(str, numbers)
    return f"layers {', '.join(most)} and {last}" if most else f"layer {last}"


def caption(sizes: MirasConfig) -> str:
    """What tells one run from another in a picture: `window 64, titans on layers 1 and 3`."""
    attention, memory = sizes.attention, sizes.memory
    reach = "full attention" if attention.kind == "full" else f"window {attention.window}"
    what = f"{memory.slots.count} slots" if memory.attachment == "slots" else memory.rule
    return f"{reach}, {what} on {layers(memory.layers)}" if memory.layers else f"{reach}, no memory"


def headline(scalars: Mapping[str, float]) -> str:
    """`val 2.245 | memory off 2.588 (+0.343), emptied 2.347 (+0.102) | 3.24 bpb`; recall as `98.9 % right, memory off
    6.2 %, emptied 6.2 %`."""
    parts = [f"val {scalars['loss']:.3f}"]
    off = scalars.get("memory_off/loss")
    if off is not None:
        emptied = scalars.get("memory_emptied/loss")
        beside = "" if emptied is None else f", emptied {emptied:.3f} ({emptied - scalars['loss']:+.3f})"
        parts.append(f"memory off {off:.3f} ({off - scalars['loss']:+.3f}){beside}")
    if "bpb" in scalars:
        parts.append(f"{scalars['bpb']:.2f} bpb")
    if "recall" in scalars:
        without = scalars.get("memory_off/recall")
        beside = "" if without is None else f", memory off {100 * without:.1f} %"
        if "memory_emptied/recall" in scalars:
            beside += f", emptied {100 * scalars['memory_emptied/recall']:.1f} %"
        parts.append(f"{100 * scalars['recall']:.1f} % right{beside}")
    if "gap/worth" in scalars:
        parts.append(gap_line(scalars))
    return " | ".join(parts)


def gap_line(scalars: Mapping[str, float]) -> str:
    """`gap closed 5.4 % (3.1 to 7.9), by the document's own state 2.1 % (0.9 to 3.2), remembering worth 0.0127 (0.0098
    to 0.0151)`; intervals where there are any."""

    def found(key: str, scale: float, digits: str, unit: str) -> str:
        value, low, high = (scale * scalars[f"gap/{key}{end}"] for end in ("", "_low", "_high"))
        sure = "" if math.isnan(low) or math.isnan(high) else f" ({low:{digits}} to {high:{digits}})"
        return f"{value:{digits}}{unit}{sure}"

    worth = f"remembering worth {found('worth', 1, '.4f', '')}"
    if "gap/closed" not in scalars:
        return worth
    if math.isnan(scalars["gap/closed"]):
        return f"no gap to full attention, {worth}"
    parts = [f"gap closed {found('closed', 100, '.1f', ' %')}"]
    for key, by in (("closed_own", "by the document's own state"), ("closed_equal", "a window of equal state")):
        if f"gap/{key}" in scalars:
            parts.append(f"{by} {found(key, 100, '.1f', ' %')}")
    return ", ".join([*parts, worth])


def health(metrics: Mapping[str, float]) -> str:
    """The health numbers of docs/memory_health.md, in their order; empty without a memory or a window."""
    parts = []
    if "norm_M" in metrics:
        alpha, eta, theta = (metrics[f"memory/{name}"] for name in ("alpha", "eta", "theta"))
        parts = [
            f"|M| {metrics['norm_M']:.3g}, |S| {metrics['norm_S']:.3g}",
            f"forget {alpha:.2g}, momentum {eta:.2g}, step {theta:.2g}",
            f"half-life {metrics['memory/half_life']:.0f} tokens",
        ]
    if "memory/slots_used" in metrics:
        parts.append(f"{100 * metrics['memory/slots_used']:.0f} % of the slots used")
        parts.append(f"{metrics['memory/tokens_per_slot']:.3g} tokens each")
    if "memory/importance_nats" in metrics:
        parts.append(f"importance {metrics['memory/importance_nats']:.3g} nats")
    if "beyond_window" in metrics:
        parts.append(f"{100 * metrics['beyond_window']:.0f} % beyond the window")
    return " | ".join(parts)
