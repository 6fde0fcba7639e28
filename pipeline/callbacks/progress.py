"""What a person sees while it runs: a bar on a terminal, plain lines otherwise, and training.log in any case."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from pipeline.callbacks.base import Callback, StepRecord
from pipeline.callbacks.metrics import perplexity
from pipeline.callbacks.samples import finite
from pipeline.callbacks.spikes import SPIKES
from pipeline.evaluation_result import CHANCE, COUNT, STDERR, TASKS
from pipeline.files.output import writing
from pipeline.run import Run
from pipeline.runtime.exit import silence
from pipeline.system import Evaluation, Sample
from pipeline.units import human_count

BAR = "{n_fmt}/{total_fmt} |{bar}| {desc}"
"""What the bar shows; it takes the columns that the text leaves of a terminal's width."""

LEAST_WAIT = 0.01
"""Share of the time that is waited for data from which on a line says it."""


class ProgressLines(Callback):
    """Loss, learning rate, gradient norm, tokens/s, peak memory, ETA; MFU only where the device's peak is known, the
    wait for data only where there is one. The bar has the perplexity too, where the system measures nats per token.

    Evaluations come in the system's words, with its health at the last logged step.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.last = run.last_step
        self.bar: tqdm | None = None
        self.seconds_per_step: float | None = None
        self.metrics: dict[str, float] = {}
        self.watched, self.verbose = True, run.config.report.verbose

    def on_start(self) -> None:
        for what, text in self.run.chosen.items():
            self._log(f"{what}: {text}")
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.last, initial=self.run.progress.step, bar_format=BAR, dynamic_ncols=True)

    def on_step(self, record: StepRecord) -> None:
        seconds = self.run.tokens_per_step / record.tok_s
        # Smoothed, so that the ETA does not jump with every slow step.
        before = self.seconds_per_step
        self.seconds_per_step = seconds if before is None else 0.9 * before + 0.1 * seconds
        eta = f"ETA {clock(self.seconds_per_step * (self.last - record.step))}"
        norm = "skipped" if record.grad_norm is None else f"{record.grad_norm:.3f}"
        loss, lr, speed = f"loss {record.loss:.4f}", f"lr {record.lr:.2e}", f"{human_count(record.tok_s)} tok/s"
        parts = [
            self._step(record.step),
            *self._phase(),
            f"{loss:<12}",
            f"{lr:<11}",
            f"{f'grad {norm}':<12}",
            f"{speed:<11}",
            f"{f'{record.peak_memory / 2**30:.2f} GiB':<9}",
        ]
        if record.mfu is not None:
            parts.append(f"MFU {record.mfu:.1%}")
        if record.data_wait >= LEAST_WAIT:
            parts.append(f"data {record.data_wait:.0%}")
        self.metrics = record.metrics
        if self.verbose:
            parts += [f"{name} {value:.4g}" for name, value in record.metrics.items()]
        if self.run.config.report.progress_line:
            self._log(self._progress(record))
        line = "  ".join([*parts, eta])
        if self.bar is None or self.verbose:
            self._print(line)
        if self.bar is not None:
            self.bar.n = record.step
            # The lines leave it out: it is exp of what they show, and they have no room for it in 100 columns.
            ppl = [] if record.token_loss is None else [f"ppl {_short(perplexity(record.token_loss))}"]
            self.bar.set_description_str("  ".join([*self._phase(brief=True), loss, *ppl, lr, speed, eta]))
        self._write(line)

    def _progress(self, record: StepRecord) -> str:
        """How far the pass over the data is that the step ends in; the phase, of a system that counts no passes."""
        run, per_step = self.run, self.run.tokens_per_step
        done, steps = float(run.progress.phase_step), float(run.phase.steps)
        if (epoch := run.epoch(record.step)) is not None:
            # The end of a pass, not the start of the next.
            begun = max(0, math.ceil(epoch - 1e-9) - 1)
            steps = done / epoch if epoch else steps
            done -= begun * steps
        left = (steps - done) * per_step / record.tok_s
        return (
            f"Progress: {round(done * per_step):,}/{round(steps * per_step):,} ({done / steps:.1%})"
            f" | Speed: {record.tok_s:.0f} tok/s | ETA: {left:.0f}s"
        )

    def _step(self, step: int) -> str:
        # As wide as the last one, so that columns stand under each other.
        return f"step {step}/{self.last}".ljust(len(f"step {self.last}/{self.last}"))

    def _phase(self, *, brief: bool = False) -> list[str]:
        """The phase and, unless `brief`, the step in it, of a run that has several; the epoch, of a system that counts
        them."""
        progress, epoch = self.run.progress, self.run.epoch(self.run.progress.step)
        step = f"{progress.phase_step}/{self.run.end_of_phase - progress.phase_start}"
        phase = progress.phase if brief else f"{progress.phase} {step}"
        return [*([phase] if self.run.several else []), *([] if epoch is None else [f"epoch {epoch:.2f}"])]

    def on_skip(self, step: int, in_a_row: int, batch: dict[str, Any]) -> None:
        where = json.dumps(batch, sort_keys=True)
        self._log(f"step {step}: non-finite loss or gradient, update skipped ({in_a_row} in a row); batch: {where}")

    def on_overflow(self, step: int, loss_scale: float) -> None:
        self._log(f"step {step}: gradients overflow at loss scale {loss_scale:g}, update skipped; the scale is lowered")

    def on_spike(self, step: int, grad_norm: float, median: float, batch: dict[str, Any]) -> None:
        self._log(
            f"step {step}: gradient norm {grad_norm:.3g}, {grad_norm / median:.1f} times its running median; its batch"
            f" is in {self.run.folder / SPIKES}"
        )

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self._log(f"{self._step(step)}  {self.run.system.headline(evaluation)}")
        beside = [self.run.system.health(self.metrics) if self.metrics else "", " | ".join(_scores(evaluation.scalars))]
        for line in filter(None, beside):
            self._log(f"{'':<{len(self._step(step))}}  {line}")

    def on_judged(self, step: int, is_best: bool) -> None:
        progress, patience = self.run.progress, self.run.config.evaluation.patience
        text = f"{progress.best_of} {progress.best:.4g} of step {progress.best_step}"
        if is_best:
            self._log(f"{self._step(step)}  the best so far: {text}")
        elif patience:
            self._log(
                f"{self._step(step)}  no better than {text}: {progress.not_better} of --evaluation.patience {patience}"
            )

    def on_ablations(self, step: int, ablations: Mapping[str, Evaluation]) -> None:
        for part, evaluation in ablations.items():
            self._log(f"{self._step(step)}  without {part}: {self.run.system.headline(evaluation)}")

    def on_samples(self, step: int, samples: Mapping[str, Sample]) -> None:
        self._log(f"{self._step(step)}  samples in {self.run.folder / 'samples'}: {', '.join(samples)}")
        if self.verbose:
            for name, sample in samples.items():
                text = sample if isinstance(sample, str) else json.dumps(finite(sample), ensure_ascii=False)
                self._print(f"{name}:\n{text.rstrip()}")

    def on_checkpoint(self, name: str) -> None:
        self._log(f"saved {self.run.folder / 'checkpoints' / name}")

    def on_end(self, status: str) -> None:
        if self.bar is not None:
            self.bar.close()
        if status == "running":
            status = f"phase {self.run.progress.phase} ended"
        self._log(f"{status} at step {self.run.progress.step}: {self.run.folder}")

    def _log(self, line: str) -> None:
        self._print(line)
        self._write(line)

    def _print(self, line: str) -> None:
        if self.watched:
            try:
                if self.bar is None:
                    print(line, flush=True)
                else:
                    self.bar.write(line, file=sys.stderr)
            except OSError:
                # A launcher that is ending takes the terminal with it; the checkpoint that is due matters more.
                self.watched = False
                silence(sys.stdout if self.bar is None else sys.stderr)

    def _write(self, line: str) -> None:
        log_line(self.run, line)


def _scores(scalars: Mapping[str, float]) -> list[str]:
    """`sciq/acc 0.712` of every task and metric."""
    named = {name.removeprefix(TASKS): value for name, value in scalars.items() if name.startswith(TASKS)}
    facts = (STDERR, CHANCE, COUNT)
    return [f"{name} {value:.4g}" for name, value in named.items() if not name.endswith(facts)]


def log_end(run: Run, status: str) -> None:
    """The last line of a run that ended outside of a phase. Raises RankError."""
    log_line(run, f"{status} at step {run.progress.step}, before the next phase: {run.folder}")


def log_line(run: Run, line: str) -> None:
    """A line of training.log, with the time."""
    path = run.folder / "training.log"
    # The name of a folder may be no text.
    with writing(path), path.open("a", encoding="utf-8", errors="backslashreplace") as handle:
        handle.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")


def _short(ppl: float) -> str:
    """A perplexity in three digits: 12.2, 32K."""
    return human_count(ppl) if ppl < 1e15 else f"{ppl:.0e}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    if not math.isfinite(seconds):
        return "?"
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
