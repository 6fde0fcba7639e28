"""`bench report FOLDER`: the results of `make gpu` as a section of docs/results.md, and as a file beside it.

docs/gpu holds one JSON file a device, with the newest result of every step; the section is made of all of them, and so
is its table of what no GPU has run yet.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.bench.gpu.runner import FINAL, slug
from pipeline.bench.gpu.steps import STAGES, all_steps
from pipeline.bench.gpu.table import headline
from pipeline.bench.gpu.target import Target
from pipeline.commands.flags import pop_flag
from pipeline.errors import UserError
from pipeline.host.provenance import ROOT, commit, sources_digest

BEGIN, END = "<!-- bench report: begin -->", "<!-- bench report: end -->"
"""Around what this writes in docs/results.md."""
ANY_GPU = Target("a GPU", "9.0", 0, 0, None)
NO_STEP_YET = (
    "several GPUs over NCCL, in one node and between nodes",
    "asynchronous saves, which copy from the GPU on a stream of their own",
    "ZeRO-3 offload, with DeepSpeed's CPU Adam beside a GPU",
    "discrete diffusion over peptides: training, held-out numbers, drawing",
    "any GPU but those above",
)
"""What a single GPU and half an hour do not show."""
USAGE = """usage: mnemos bench report FOLDER [--docs FOLDER]

FOLDER holds what `make gpu` wrote. The results are kept in docs/gpu/DEVICE.json, and docs/results.md is brought up to
date: a table per device, and one of what has never run on a GPU."""

NEEDED = {"stage", "step", "status", "device", "memory", "figures", "sources", "written"}
"""Keys that every result has."""

Result = dict[str, Any]


def run_report(words: Sequence[str]) -> None:
    """The command."""
    docs, rest = pop_flag(list(words), "--docs")
    if {"-h", "--help"} & set(rest):
        print(USAGE)
        return
    if len(rest) != 1:
        raise UserError("bench report takes the folder that `make gpu` wrote, and --docs FOLDER")
    pages = ROOT / "docs" if docs is None else Path(docs)
    results = read_results(Path(rest[0]))
    written = keep(results, pages / "gpu")
    update(pages / "results.md", every_result(pages / "gpu"))
    print(f"{len(results)} results are in {', '.join(map(str, written))} and {pages / 'results.md'}")


def read_results(folder: Path) -> list[Result]:
    """Every step's JSON in a folder. Raises UserError where there is none, or none that a GPU made."""
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not JSON ({error}): remove the file, or run make gpu again") from None
        found = content if isinstance(content, list) else [content]
        results += [entry for entry in found if isinstance(entry, dict) and entry.keys() >= NEEDED]
    # All results are in one file, and each in its own.
    results.sort(key=lambda result: result["written"])
    results = list({(entry["device"], entry["stage"], entry["step"]): entry for entry in results}.values())
    if not results:
        raise UserError(f"{folder}: no results of make gpu: name the folder that it wrote to")
    if any(result["memory"] is None for result in results):
        raise UserError(f"{folder}: results of the emulator are no figures of a GPU: run make gpu on one")
    return results


def keep(results: Iterable[Result], folder: Path) -> list[Path]:
    """Puts results in place of older ones of the same step, in a file per device."""
    by_device: dict[str, list[Result]] = {}
    for result in results:
        by_device.setdefault(result["device"], []).append(result)
    written = []
    for device, new in by_device.items():
        path = folder / f"{slug(device)}.json"
        kept = {(old["stage"], old["step"]): old for old in (_load(path) if path.exists() else [])}
        for result in new:
            before = kept.get((result["stage"], result["step"]))
            # A run without the time or a package for a step does not replace what the same code has shown.
            shown = before is not None and before["sources"] == result["sources"] and before["status"] in FINAL
            if not shown or result["status"] in FINAL:
                kept[result["stage"], result["step"]] = _with_commit(result)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(list(kept.values()), indent=1) + "\n")
        written.append(path)
    return written


def _with_commit(result: Result) -> Result:
    """A result from a copy of the sources without git gets the commit of the same sources here."""
    here = commit() if result["commit"] is None and result["sources"] == sources_digest() else None
    return result if here is None or here.endswith("+") else result | {"commit": here}


def _load(path: Path) -> list[Result]:
    return json.loads(path.read_text())


def every_result(folder: Path) -> list[Result]:
    """Those of all devices that the project has figures of."""
    return [result for path in sorted(folder.glob("*.json")) for result in _load(path)]


def update(page: Path, results: Sequence[Result]) -> None:
    """Writes the section between its marks. Raises UserError where the page has none."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{page}: has no place for the section: put {BEGIN} and {END} where it belongs")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(f"{text[:start]}\n\n{section(results)}\n\n{text[end:]}")


def section(results: Sequence[Result]) -> str:
    """Markdown: a table per device, then what has never run."""
    devices = list(dict.fromkeys(result["device"] for result in results))
    parts = [_device(device, [result for result in results if result["device"] == device]) for device in devices]
    return "\n\n".join([*parts, _never_run(results)])


def _device(name: str, results: Sequence[Result]) -> str:
    newest = max(results, key=lambda result: result["written"])
    versions = ", ".join(f"{package} {version}" for package, version in newest["versions"].items())
    lines = [
        f"### {name}",
        "",
        f"Driver {newest['driver']}; {versions}. Times are of one machine in one session.",
        "",
        "| step | result | figures | command | commit, date |",
        "|---|---|---|---|---|",
    ]
    order = {(stage, step.name): index for index, (stage, step) in enumerate(all_steps(ANY_GPU))}
    lines += [_row(r) for r in sorted(results, key=lambda r: order.get((r["stage"], r["step"]), len(order)))]
    return "\n".join(lines)


def _row(result: Result) -> str:
    figures = "; ".join(headline(result)) or result["reason"] or ""
    status = result["status"] + (f": {result['reason']}" if result["status"] not in ("passed", "skipped") else "")
    date = result["written"][:10]
    source = result["commit"][:8] if result["commit"] else f"sources {result['sources'][:8]}"
    cells = (result["step"], status, figures, f"`{_command(result)}`", f"{source}, {date}")
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _command(result: Mapping[str, Any]) -> str:
    """As a person would type it, without the file of figures."""
    words = [word.replace("{python}", "python") for word in result["command"]]
    text = " ".join([*(f"{key}={value}" for key, value in result["environment"].items()), shlex.join(words)])
    text = re.sub(r" (--json )?'(--junitxml=)?\{(result|scratch)\}'", "", text)
    return text.replace(" -p no:cacheprovider", "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _never_run(results: Sequence[Result]) -> str:
    ran = {(result["stage"], result["step"]) for result in results if result["status"] in FINAL}
    left = [(stage, step) for stage, step in all_steps(ANY_GPU) if (stage, step.name) not in ran]
    # Every stage builds.
    left = [(stage, step) for stage, step in left if not step.always or stage == STAGES[0]]
    lines = ["### Never run on a GPU yet", ""]
    lines += ["| what it would show | step | stage of `make gpu` |", "|---|---|---|"]
    lines += [f"| {_cell(step.shows)} | {step.name} | {stage} |" for stage, step in left]
    lines += [f"| {_cell(what)} | none yet | |" for what in NO_STEP_YET]
    return "\n".join(lines)
