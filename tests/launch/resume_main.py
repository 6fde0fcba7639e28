"""Started by test_resume.py on every rank: N steps straight against k steps, a stop, a resume and N - k steps.

Then runs that save at their start, runs that go on by way of OLMo's layout, and a named run, whose folder the time of
its start names. Usage: resume_main OUT DATA. Rank 0 writes OUT/result.json, OUT/start.json, OUT/native.json and
OUT/named.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pipeline.callbacks.metrics import read_rows
from pipeline.checkpoint.manifest import read_manifest, write_manifest
from pipeline.cli import without_local_rank
from pipeline.commands.checkpoint import run_checkpoint
from pipeline.commands.flags import parse_run
from pipeline.config import RunConfig, replace
from pipeline.job import train
from pipeline.recipes.miras import miras_tiny
from pipeline.runtime.exit import exit_process
from pipeline.runtime.ranks import stop
from pipeline.systems.miras.config import MirasConfig
from pipeline.systems.miras.system import MirasSystem
from tests.launch.comparing import content, differences
from tests.launch.olmo_cases import olmo

LAST, MIDDLE = 4, 2
STOPPED = ("zero3 sequence", "zero3 frozen background")
"""Cases that stop and go on in their own folder; the others go on from what the whole run saved on its way."""
STAGES = (0, 1, 3)
"""Of runs that save at their start: DeepSpeed has another optimizer in each; in stage 2 it is that of 1."""


def base(folder: Path, data: Path, **changes: object) -> RunConfig:
    settings: dict[str, object] = {
        "output_dir": folder, "steps": LAST, "sequence_length": 128, "batch_size": 1, "grad_accum": 2, "eval_every": 0,
        "evaluation__steps": 1, "report__plots": False, "parallel__sequence": 1, "data__path": (str(data),),
        "warmup_steps": 2, "data__holdout": 0.2,
    }  # fmt: skip
    if "model" not in changes:
        # One layer without and one with a memory: more of them are saved as these are.
        model = miras_tiny().model
        assert isinstance(model, MirasConfig)
        settings["model__backbone"] = dataclasses.replace(model.backbone, layers=2)
        settings["model__memory"] = dataclasses.replace(model.memory, layers=(1,))
    return replace(miras_tiny(), **{**settings, **changes})


def cases() -> dict[str, dict[str, object]]:
    """Every stage, the sequence shared by the ranks, a frozen backbone, two attachments, bfloat16, saving in the
    background."""
    found: dict[str, dict[str, object]] = {f"zero{stage}": {"zero": f"zero{stage}"} for stage in range(4)}
    found["zero3 bf16"] = {"zero": "zero3", "precision": "bf16"}
    found["zero0 bf16"] = {"zero": "zero0", "precision": "bf16"}
    # As many tokens a step as two data ranks have: the stop comes in a later epoch.
    shared = {"zero": "zero3", "parallel__sequence": 2, "batch_size": 2}
    found["zero3 fp16"] = {**shared, "precision": "fp16"}
    found["zero3 sequence"] = shared
    model = miras_tiny().model
    frozen = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, trainable=False))  # type: ignore[attr-defined, call-arg]
    two_kinds = dataclasses.replace(frozen, memory=dataclasses.replace(frozen.memory, overflow_layers=(3,)))
    found["zero2 frozen"] = {"zero": "zero2", "model": two_kinds}
    found["zero3 frozen background"] = {"zero": "zero3", "model": frozen, "async_save": True, "save_every": 1}
    return found


def from_start(out: Path, data: Path) -> dict[str, object]:
    """By stage: whether a run that saves at its start names that first, and in what one from there differs from it."""
    found: dict[str, object] = {}
    for stage in STAGES:
        first, second, third = (out / f"{name}{stage}" for name in ("begun", "resumed", "plain"))
        same: dict[str, object] = {"zero": f"zero{stage}", "steps": 2, "warmup_steps": 0}
        train(base(first, data, **same, save_at_start=True, save_every=1, keep=5))
        train(base(second, data, **same, resume=str(first / "checkpoints" / "checkpoint-0")))
        runs = [first, second]
        if stage == STAGES[0]:  # saving is the same code in each
            train(base(third, data, **same))
            # A run of no steps holds the model as it begins, and goes on from there.
            untrained = out / f"untrained{stage}"
            for steps in (0, 2):
                train(base(untrained, data, **{**same, "steps": steps}))
            runs += [third, untrained]
        ended = out / f"ended{stage}"
        if stage == STAGES[-1]:
            # No step is left of it: what it stands at is saved in its own folder, and nothing the second time.
            for _ in range(2):
                train(base(ended, data, **same, resume=str(second / "checkpoints" / "checkpoint-2")))
        if dist.get_rank() == 0:
            last = [run / "checkpoints" / "checkpoint-2" for run in runs]
            losses = [[row["loss"] for row in read_rows(run / "metrics.jsonl")] for run in runs]
            found[f"zero{stage}"] = {
                "kept": sorted(path.name for path in (first / "checkpoints").iterdir()),
                "resumed": sorted(path.name for path in (second / "checkpoints").iterdir()),
                "differences": [difference for other in last[1:] for difference in differences(last[0], other)],
                "losses": losses,
                "ended": sorted(path.name for path in ended.glob("checkpoints/*")),
                "untrained": sorted(path.name for path in (out / f"untrained{stage}").glob("checkpoints/*")),
                "changed": unlike(last[1], ended / "checkpoints" / "checkpoint-2") if ended.exists() else [],
            }
        dist.barrier()
    return found


def unlike(one: Path, other: Path) -> list[str]:
    """Where two checkpoints differ, but for the learning rates of the groups, which a step sets before it uses them."""
    left, right = content(one), content(other)
    places = (place for place in left.keys() | right.keys() if left.get(place) != right.get(place))
    return sorted(place for place in places if not place.endswith("/lr"))


def native(out: Path, data: Path) -> dict[str, object]:
    """By kind of decoder: in what a run that goes on from a checkpoint by way of OLMo's layout differs from one that
    goes on from it with the data from its start, and in what its own conversion differs from the first."""
    found: dict[str, object] = {}
    for kind, zero in (("olmo", "zero1"), ("olmo2", "zero3")):
        config = olmo(kind, rows=1, length=64, vocabulary=260)
        begun, here, there = (out / f"{kind}-{name}" for name in ("begun", "here", "there"))
        config = replace(
            config, recipe="olmo_tiny", zero=zero, steps=4, eval_every=0, evaluation__steps=1, report__plots=False,
            data__path=(str(data),), data__holdout=0.2,
        )  # fmt: skip
        train(replace(config, output_dir=begun, stop_after=2))
        if dist.get_rank() == 0:
            checkpoint = begun / "checkpoints" / "checkpoint-2"
            run_checkpoint(["convert", str(begun), str(out / f"{kind}-native"), "--to", "olmo"])
            folder = out / f"{kind}-native" / "step2-unsharded"
            run_checkpoint(["convert", str(folder), str(out / f"{kind}-back"), "--from", "olmo"])
            run_checkpoint(["convert", str(checkpoint), str(out / f"{kind}-whole")])
            without_position(out / f"{kind}-whole")
        dist.barrier()
        for source, run in (("back", there), ("whole", here)):
            train(replace(config, output_dir=run, resume=str(out / f"{kind}-{source}")))
        if dist.get_rank() == 0:
            rows = [read_rows(run / "metrics.jsonl") for run in (here, there)]
            found[kind] = {
                "losses": [[row["loss"] for row in run if row["mode"] == "train"] for run in rows],
                "steps": [row["step"] for row in rows[1] if row["mode"] == "train"],
                "differences": differences(*(run / "checkpoints" / "checkpoint-4" for run in (here, there))),
            }
        dist.barrier()
    return found


def without_position(checkpoint: Path) -> None:
    """Takes from a checkpoint where its run was in the data, and the states of its ranks."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    gone = {name for name in manifest["files"] if name.startswith(("loader", "rng", "carry"))}
    for name in gone:
        (checkpoint / name).unlink()
    files = {name: entry for name, entry in manifest["files"].items() if name not in gone}
    facts = {key: value for key, value in manifest.items() if key not in ("files", "written")}
    write_manifest(checkpoint, {**facts, "world": 0}, files)


def named(out: Path, data: Path) -> dict[str, object]:
    """A run by `--run-name NAME --run-id auto` on ranks that start in different seconds: its folder on every rank, and
    the steps whose heavy metrics were wanted."""
    os.chdir(out)
    words = f"""miras_tiny --run-name exp --run-id auto --steps 7 --log-interval 3 --save-interval 5 --eval-interval 0
        --no-plots --sequence-length 64 --batch-size 1 --parallel.sequence 1 --evaluation.steps 1
        --data.path {data} --data.holdout 0.2""".split()
    wanted: dict[int, bool] = {}
    forward = MirasSystem.forward

    def noted(self, model, batch, carry, context):  # type: ignore[no-untyped-def]
        if context.phase == "train":
            wanted[context.step] = context.heavy_metrics
        else:
            assert not context.heavy_metrics
        return forward(self, model, batch, carry, context)

    time.sleep(1.1 * dist.get_rank())
    MirasSystem.forward = noted  # type: ignore[method-assign]
    try:
        train(parse_run(words, "train", ranks=2))
    finally:
        MirasSystem.forward = forward  # type: ignore[method-assign]
    rows = [row["step"] for path in Path("outputs").rglob("metrics.jsonl") for row in read_rows(path)]
    folders = sorted(path.as_posix() for path in Path("outputs").glob("*/*"))
    files = sorted(path.name for path in Path(folders[0]).iterdir())
    return {"folders": folders, "files": files, "rows": rows, "wanted": wanted}


def main() -> None:
    out, data = map(Path, without_local_rank(sys.argv[1:]))
    # Few CPUs say that they have float16; what training needs of it every one does.
    get_accelerator().is_fp16_supported = lambda: True
    result = {}
    for number, (case, changes) in enumerate(cases().items()):
        straight, stopped = out / f"straight{number}", out / f"stopped{number}"
        if case in STOPPED:
            train(base(straight, data, **changes))
            train(base(stopped, data, **changes, stop_after=MIDDLE))
            train(base(stopped, data, **changes, resume="must"))
        else:
            train(base(straight, data, **changes, save_every=MIDDLE))
            train(base(stopped, data, **changes, resume=str(straight / "checkpoints" / f"checkpoint-{MIDDLE}")))
        if dist.get_rank() == 0:
            rows = [list(read_rows(run / "metrics.jsonl")) for run in (straight, stopped)]
            losses = [[row["loss"] for row in run if row["mode"] == "train"] for run in rows]
            middle = LAST - 1 if changes.get("save_every") else MIDDLE  # of several, the two newest are kept
            begun = stopped if case in STOPPED else straight
            cursors = json.loads((begun / "checkpoints" / f"checkpoint-{middle}" / "loader.json").read_text())
            manifest = json.loads((stopped / "checkpoints" / f"checkpoint-{LAST}" / "manifest.json").read_text())
            result[case] = {
                "losses": losses,
                "stopped": case in STOPPED,
                "scales": [[row.get("loss_scale") for row in run if row["mode"] == "train"] for run in rows],
                "differences": differences(
                    *(run / "checkpoints" / f"checkpoint-{LAST}" for run in (straight, stopped))
                ),
                "epochs": [cursor["epoch"] for cursor in cursors["streams"].values()],
                "offsets": [cursor["offset"] for cursor in cursors["streams"].values()],
                "frozen": manifest["frozen"],
                "kept": sorted(path.name for path in (stopped / "checkpoints").iterdir()),
            }
            (out / "result.json").write_text(json.dumps(result))
        dist.barrier()
    begun = from_start(out, data)
    if dist.get_rank() == 0:
        (out / "start.json").write_text(json.dumps(begun))
    converted = native(out, data)
    if dist.get_rank() == 0:
        (out / "native.json").write_text(json.dumps(converted))
    facts = named(out, data)
    if dist.get_rank() == 0:
        (out / "named.json").write_text(json.dumps(facts))
    stop()
    exit_process(0)


if __name__ == "__main__":
    main()
