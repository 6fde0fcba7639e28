"""Adds up a step's losses and metrics on the device and turns them into one record over all ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.callbacks.base import StepRecord
from pipeline.engine import StepResult
from pipeline.event_counts import EventCounts
from pipeline.gradient_norms import gradient_norms
from pipeline.host.hardware import peak_flops, peak_memory, utilisation
from pipeline.parallel.loss import reduce_sums
from pipeline.run import Run
from pipeline.system import StepOutput


class Meter:
    """Everything since the last record. Until the next, nothing is copied from the device and no rank waits."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.flops = run.system.flops(run.config.sequence_length, run.phase).total
        self.peak = peak_flops(run.config.report.peak_tflops)
        self.by_step = run.phase.until is not None
        self.events = EventCounts(run)
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        self.latest: dict[str, Tensor] = {}
        """Sums of the last step alone."""
        self.latest_counts: Mapping[str, float] = {}
        self.steps = 0
        self.waited = 0.0
        """Seconds in which this rank waited for its batches."""
        self.begun = time.perf_counter()

    def add(self, output: StepOutput) -> None:
        """One micro-batch."""
        for term, value in output.sums.items():
            self._plus(f"loss/{term}", value)
        for name, (value, count) in output.metrics.items():
            self._plus(f"metric/{name}", value)
            self._plus(f"count/{name}", count)

    def add_gradients(self) -> None:
        """Norms of the gradients of the step's micro-batches, before its update, of a system that measures them.
        Collective."""
        norms = gradient_norms(self.run)
        if norms is not None:
            self.add(norms)

    def _plus(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        for sums in (self.sums, self.latest) if self.by_step else (self.sums,):
            sums[name] = sums[name] + value if name in sums else value

    def add_counts(self, counts: Mapping[str, float]) -> None:
        """The global counts of one step, whose micro-batches are then added."""
        self.steps += 1
        self.latest, self.latest_counts = {}, counts
        for term, count in counts.items():
            self.counts[term] = self.counts.get(term, 0) + count

    def add_wait(self, seconds: float) -> None:
        """Time in which the loader was waited for."""
        self.waited += seconds

    def seconds(self) -> float:
        """Time since the last record."""
        return time.perf_counter() - self.begun

    def numbers(self) -> dict[str, float]:
        """Loss and metrics of the last step alone, and the labels counted since the start of the run, in a phase with a
        stopping rule: summed over ranks, and equal on them to the bit. Collective."""
        loss, metrics = self._reduce(self.latest, self.latest_counts)
        tokens = self.run.progress.tokens + int(self.counts[self.run.system.token_term])
        return {**metrics, "loss": loss, "tokens": tokens}

    def _reduce(self, sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """The loss that is minimised (each term's mean, added up), and metrics, terms among them if several."""
        totals = reduce_sums(sums, self.run.topology, self.run.device)
        means = {term: float(totals[f"loss/{term}"]) / max(1, count) for term, count in counts.items()}
        metrics = {}
        for name, value in totals.items():
            kind, _, metric = name.partition("/")
            if kind == "metric":
                metrics[metric] = float(value / totals[f"count/{metric}"].clamp_min(1))
        if len(means) > 1:
            metrics |= {f"loss/{term}": mean for term, mean in means.items()}
        return sum(means.values()), metrics

    def _token_loss(self, loss: float, metrics: Mapping[str, float]) -> float | None:
        weight = self.run.system.token_weight
        # Of several terms, that of the tokens; of one alone, the loss.
        return metrics.get(f"loss/{self.run.system.token_term}", loss) / weight if weight else None

    def record(self, step: int, result: StepResult) -> StepRecord:
        """Reduces over ranks and starts anew. Collective. Updates the run's tokens and elapsed time."""
        run, elapsed = self.run, self.seconds()
        loss, metrics = self._reduce(self.sums, self.counts)
        metrics |= self.events.metrics()
        # Bytes are whole in float64.
        largest = torch.tensor([float(peak_memory()), self.waited], dtype=torch.float64, device=run.device)
        if run.topology.world > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        memory, waited = largest.tolist()
        run.progress.tokens += int(self.counts[run.system.token_term])
        run.progress.elapsed += elapsed
        tok_s = self.steps * run.tokens_per_step / elapsed
        self._clear()
        return StepRecord(
            step=step,
            loss=loss,
            lr=result.lr,
            grad_norm=None if result.skipped else result.grad_norm,
            tok_s=tok_s,
            tokens=run.progress.tokens,
            elapsed=run.progress.elapsed,
            peak_memory=int(memory),
            data_wait=min(1.0, waited / elapsed),
            mfu=utilisation(tok_s, self.flops, run.topology.world, self.peak),
            metrics=metrics,
            token_loss=self._token_loss(loss, metrics),
            loss_scale=result.loss_scale,
        )
