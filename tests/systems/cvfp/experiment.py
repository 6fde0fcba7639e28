"""The runs of the acceptance experiment: the standard library's files, a tokenizer trained on them, both phases and a
control, as a user starts them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.callbacks.metrics import read_rows
from tests.launch.harness import single

THREADS = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}


@dataclass(frozen=True)
class Sizes:
    """Of the experiment; a small one shows that it runs."""

    width: int = 768
    layers: int = 6
    documents: int = 781
    """To train on, of up to 128 tokens each, 100K tokens; a tenth of all is held out beside them."""
    vocab: int = 4096
    iterations: int = 10
    epochs: int = 10


def train_tokenizer(folder: Path, vocab: int, pattern: str = "*.py") -> Path:
    """A byte-level BPE tokenizer of those of the standard library's files, as transformers saves it."""
    import sysconfig

    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not folder.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=["<|endoftext|>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        others = {"site-packages", "test", "tests"}
        files = sorted(Path(sysconfig.get_path("stdlib")).glob(pattern))
        tokenizer.train([str(path) for path in files if others.isdisjoint(path.parts)], trainer)
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
        wrapped.save_pretrained(folder)
    return folder


def mnemos(*words: str) -> None:
    done = single("pipeline", *words, timeout=4 * 3600, **THREADS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


class Runs:
    """Runs in a folder, which go on where they were when the experiment is started again."""

    def __init__(self, folder: Path, sizes: Sizes, *flags: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(folder / "tokenizer", sizes.vocab)
        self.folder = folder
        # Both ways of the second phase begin at the weights that the first one ended with, and know nothing else of it.
        self.flags = (
            "--data.dataset", "stdlib", "--data.tokenizer", str(tokenizer), "--data.holdout", "0.1",
            "--num-samples", str(sizes.documents), "--cache-dir", str(folder / "cache"), "--model.embedding", "None",
            "--context-dim", str(sizes.width), "--num-layers", str(sizes.layers),
            "--max-iterations", str(sizes.iterations), "--epochs.train", str(sizes.epochs), "--keep", "1", *flags,
        )  # fmt: skip

    def train(self, name: str, *flags: str) -> Path:
        """The run of this name, once it has ended."""
        run = self.folder / name
        mnemos("train", "cvfp_100k", *self.flags, *flags, "--output-dir", str(run))
        return run

    def first_phase(self, name: str = "fixed_point", *flags: str) -> Path:
        return self.train(name, "--phases", "fixed_point", *flags)

    def second_phase(self, name: str, first: Path, *flags: str) -> Path:
        return self.train(name, "--phases", "prediction", "--init-from", str(chosen(first)), *flags)


def chosen(run: Path) -> Path:
    """The best checkpoint of a run, or the newest where none was judged."""
    folder = run / "checkpoints"
    best = folder / "best"
    return folder / (best if best.exists() else folder / "latest").read_text().strip()


def contexts(run: Path, *flags: str) -> dict[str, float]:
    """The scalars of `eval CHECKPOINT --suite contexts`, of the run's `chosen` one; a NaN for what is not finite."""
    checkpoint = chosen(run)
    mnemos("eval", str(checkpoint), "--suite", "contexts", *flags)
    written = run / "evals" / checkpoint.name / "contexts" / "evaluation.json"
    found: dict[str, Any] = json.loads(written.read_text())["scalars"]
    return {name: float("nan") if value is None else value for name, value in found.items()}


def rows(run: Path, mode: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(run / "metrics.jsonl") if row["mode"] == mode]
