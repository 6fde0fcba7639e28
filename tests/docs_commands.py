"""The commands that the pages show: found, checked by the project's own parsers, and run where that is possible here.

Every ``bash`` block is a block of commands, and so is an indented block or a ``text`` block with a line that begins
with ``$`` or with a program of the project. Where a block has a command that cannot be run here, a comment right
before it says why::

    <!-- not run here: needs eight GPUs -->

Such a block is checked all the same: recipes, flags, values, layouts, test files and make targets must exist. What is
below an ``output of`` comment is made by `tests.docs_blocks`.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.bench import BENCHES
from pipeline.bench.dense import DEFAULT, DenseOptions
from pipeline.bench.dense import _split as split_dense
from pipeline.bench.kernels import KernelOptions
from pipeline.bench.resume import ResumeOptions
from pipeline.bench.throughput import ThroughputOptions, _split
from pipeline.cli import COMMANDS
from pipeline.commands.fetch import MODELS
from pipeline.commands.flags import parse_flags, parse_run, pop_flag, split_flags
from pipeline.commands.generate import GenerateOptions, pop_prompts
from pipeline.evals.suites import pop_suite
from pipeline.export.command import parse as parse_export
from pipeline.launch.request import CPU_RANKS, split
from pipeline.parallel.topology import Topology, check_degrees
from pipeline.system import create_system
from pipeline.systems.mimir.sampling.options import PeptideOptions
from tests.launch.fork_server import preload

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

RUN = "outputs/prepared"
TEXTS = "my_texts"
"""What the folder in which commands are run holds: a run with a checkpoint, and a folder of texts."""

TOKENS, PEPTIDES = "tokens", "my_peptides"
"""The token files that pages make of these texts, and the folder of the peptides that they make."""
LENGTH = "1536"
"""Tokens of a text of an evaluation, in place of what a page says."""
QUERIES = "4"
"""Questions of an evaluation, where a page does not say how many."""
WIDEST = 1024
"""The widest model of which a step is made here."""
TINY = "tiny"
"""The tier of models of which a step is made here."""

MARK = re.compile(r"<!-- not run here: (.+) -->")
_FENCE = re.compile(r"(`{3,}|~{3,})(\w*)")
_COMMAND = re.compile(r"(\w+=\S+ +)*(\$ |\./|\.ci/|(python|mnemos|make|torchrun|deepspeed|pytest|pip|docker|source) )")
_OPERATORS = {"&&", "||", "|", ";", "&", "(", ")", "<", ">", "<<", ">>", ";;"}
_PREFIXES = {"exec", "if", "then", "else", "do", "while", "!", "time", "nohup"}


class UnknownCommand(ValueError):
    """A program that is not the project's."""


@dataclass(frozen=True)
class Block:
    """A block of commands of a page."""

    line: int
    """Number of its first line, from 1."""
    text: str
    reason: str | None
    """Why it is not run here, as its mark says; None without a mark."""

    def commands(self) -> list[list[str]]:
        """The words of every simple command, without comments, variables and the output of console blocks."""
        text = self.text.replace("\\\n", " ")
        console = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
        return [words for line in console or text.splitlines() for words in _simple_commands(line)]


def _simple_commands(line: str) -> Iterator[list[str]]:
    line = re.sub(r"\[(recipe )?flags\]", "", line).replace("[RECIPE]", "miras_tiny")
    line = re.sub(r"\[(--[^\]]+)\]", r"\1", line)  # an option that may be left out
    line = re.sub(r"\$\{?\w+\}?", "1", line)  # a variable: a number is right as a rank, an address and a folder
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in _OPERATORS:
            words.append(word)
            continue
        while words and (words[0] in _PREFIXES or re.match(r"\w+=", words[0])):
            del words[0]
        if "bash" in words and "-c" in words:
            yield from _simple_commands(words[words.index("-c") + 1])
        elif words:
            yield words
        words = []


def find_blocks(text: str) -> list[Block]:
    """The blocks of commands of a page. Raises ValueError for a mark that no block follows."""
    lines = text.splitlines()
    found: list[Block] = []
    index = 0
    mark: tuple[int, str] | None = None
    while index < len(lines):
        line, start = lines[index], index
        index += 1
        if given := MARK.fullmatch(line):
            if mark is not None:
                raise ValueError(f"line {mark[0]}: a mark without a block of commands")
            mark = (start + 1, given[1])
            continue
        body: list[str] | None = None
        if fence := _FENCE.match(line.lstrip()):
            end = next((i for i in range(index, len(lines)) if lines[i].strip() == fence[1]), None)
            if end is None:
                raise ValueError(f"line {start + 1}: the fenced block does not end")
            inside = lines[index:end]
            if start and lines[start - 1].startswith("<!-- output of: "):
                pass  # tests/test_docs_blocks.py runs it, and compares what it prints
            elif fence[2] in ("bash", "sh", "shell") or (fence[2] in ("", "text", "console") and _any_command(inside)):
                body = inside
            first, index = index + 1, end + 1
        elif line.startswith("    ") and (start == 0 or not lines[start - 1].strip() or mark is not None):
            while index < len(lines) and (lines[index].startswith("    ") or not lines[index].strip()):
                index += 1
            inside = [part[4:] for part in lines[start:index]]
            first, body = start + 1, inside if _any_command(inside) else None
        elif not line.strip():
            continue
        if body is not None:
            found.append(Block(first, "\n".join(body), mark[1] if mark else None))
        elif mark is not None:
            raise ValueError(f"line {mark[0]}: a mark without a block of commands")
        mark = None
    if mark is not None:
        raise ValueError(f"line {mark[0]}: a mark without a block of commands")
    return found


def _any_command(lines: list[str]) -> bool:
    return any(_COMMAND.match(line) for line in lines)


def own_recipes(text: str) -> frozenset[str]:
    """Recipes that a page itself defines, in its Python."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    return frozenset(re.findall(r"^def (\w+)", code, re.MULTILINE))


def check(words: list[str], own: Collection[str] = ()) -> list[str] | None:
    """Checks a command, as far as that is possible without running it.

    Returns the words of `mnemos` that run it here, on one rank and without saving; None when it is not run here. Raises
    UserError or ValueError for what is wrong, UnknownCommand for a program of others. `own`: recipes that exist only
    once a page's code was typed in.
    """
    if any(word.rpartition("/")[2] in own for word in words):
        return None
    program, *rest = words
    if program == "./launch.sh":
        return _launch(rest)
    if program == "deepspeed":
        request = split(rest)
        _expect("--module" in request.launcher and request.run[:2] == ["pipeline", "train"], words)
        return _train(request.run[2:], request.number("--num_gpus") or CPU_RANKS)
    if program == "torchrun":
        return _torchrun(rest)
    if program == "mnemos":
        return _mnemos(rest)
    if words[:3] == ["python", "-m", "pipeline"]:
        return _mnemos(words[3:])
    if words[:3] == ["python", "-m", "pytest"]:
        return _pytest(words[3:])
    if words[:2] == ["docker", "run"]:
        _launch(words[next(i for i, word in enumerate(words) if word in ("./launch.sh", "mnemos")) + 1 :])
        return None
    if program == "make":
        return _make(rest)
    if program == "python" and rest and (ROOT / rest[0]).is_file():
        return None
    if (ROOT / program).is_file() and os.access(ROOT / program, os.X_OK):
        return None
    raise UnknownCommand(f"{program!r} is not a program of the project")


def _expect(right: bool, words: list[str]) -> None:
    if not right:
        raise ValueError(f"not understood: {shlex.join(words)}")


def _launch(words: list[str]) -> list[str] | None:
    request = split(words)
    if "--setup-only" in words:
        _expect(words == ["--setup-only"], words)
        return None
    ranks = request.number("--num_gpus") or CPU_RANKS
    if "--include" in request.launcher:
        ranks = len(request.text("--include").partition(":")[2].split(","))
    elif "--hostfile" in request.launcher:
        ranks = 2 * 8  # the nodes of every example
    return _train(request.run, ranks)


def _torchrun(words: list[str]) -> list[str] | None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    _expect(given.module and [given.training_script, *given.training_script_args[:1]] == ["pipeline", "train"], words)
    nodes = int(given.nnodes.rpartition(":")[2])
    return _train(given.training_script_args[1:], int(given.nproc_per_node) * nodes)


def _train(words: list[str], ranks: int) -> list[str] | None:
    found = _train_once(tuple(words), ranks)
    return None if found is None else list(found)


@functools.cache
def _train_once(given: tuple[str, ...], ranks: int) -> tuple[str, ...] | None:
    words = list(given)
    if "--help" in words or "--help-all" in words:
        return ("train", *words)
    config = parse_run(words, "train", ranks=ranks)
    check_degrees(ranks, config.parallel.sequence)
    create_system(config).check(Topology(world=ranks, sequence=config.parallel.sequence))
    backbone = getattr(config.model, "backbone", None)
    if backbone is None and config.data.path:
        return None  # what such a system reads is not text
    if backbone is not None and (backbone.pretrained is not None or backbone.width > WIDEST):
        return None
    if getattr(config.model, "embedding", None) is not None or config.init_from is not None:
        return None  # a model of a hub, or a checkpoint of another run
    if getattr(config.model, "tier", TINY) != TINY:
        return None  # data of a hub, and a model of 50M parameters or more
    # A dry run is one step, that saves nothing, in any case.
    for flag in ("--output-dir", "--stop-after", "--seed"):
        _, words = pop_flag(words, flag)
    path, words = pop_flag(words, "--data.path")
    return ("train", *words, *(["--data.path", TEXTS] if path else []), "--batch-size", "1", "--dry-run")


def _mnemos(words: list[str]) -> list[str] | None:
    _expect(bool(words) and words[0] in COMMANDS, words)
    command, *rest = words
    if command == "train":
        return _train(rest, 1)
    if command == "bench":
        return _bench(rest)
    if command == "eval":
        # A folder of tasks, and the run of a control, have to be there.
        _, given = pop_flag(rest[1:], "--task-path")
        _, given = pop_flag(given, "--control")
        suite = pop_suite(given)[0].name
        if suite in ("contexts", "downstream", "lifelong"):
            return None  # it needs a checkpoint of another system; the tasks' data come from a hub
        lengths, given = pop_flag(rest[1:], "--lengths")
        short = ["--lengths", LENGTH] if lengths else []
        if suite == "recall" and "--queries" not in given:
            short += ["--queries", QUERIES]
        return ["eval", RUN, *given, *short, "--evaluation.steps", "1", "--report.no-plots"]
    if command == "generate":
        return _generate(rest)
    if command == "data":
        return ["data", *rest] if any(word.startswith((TEXTS, TOKENS, PEPTIDES)) for word in rest) else None
    if command == "export":
        parse_export(rest)
        return None
    if command == "fetch":
        _expect(rest[:1] in ([name] for name in MODELS), words)
        return None
    if command == "checkpoint":
        if {"--to", "--from"} & set(rest):
            return None  # it needs a checkpoint of another system
        return ["checkpoint", rest[0], RUN, *(["converted"] if rest[0] == "convert" else rest[2:])]
    return words


def _generate(words: list[str]) -> list[str] | None:
    prompts, rest = pop_prompts(words)
    _expect(bool(rest) and not rest[0].startswith("-"), words)
    if "-n" in rest:
        parse_flags(PeptideOptions(), rest[1:], "mnemos generate")
        return None  # it needs a checkpoint of another system
    parse_flags(GenerateOptions(), rest[1:], "mnemos generate")
    _, flags = pop_flag(rest[1:], "--max-new-tokens")
    given = [f"{flag}={f'{TEXTS}/0.txt' if flag == '--prompt-file' else text}" for flag, text in prompts]
    return ["generate", RUN, *given, *flags, "--max-new-tokens", "2"]


def _bench(words: list[str]) -> None:
    _expect(bool(words) and words[0] in BENCHES, words)
    name, *rest = words
    if name == "kernels":
        parse_flags(KernelOptions(), rest, "bench kernels")
    elif name == "report":
        _expect(len(rest) == 1, words)
    elif name == "dense":
        own, run = split_dense(rest)
        parse_run(run or [*DEFAULT], "bench dense", parse_flags(DenseOptions(), own, "bench dense"))
    elif name in ("throughput", "resume"):
        options = ThroughputOptions() if name == "throughput" else ResumeOptions()
        names = ("ranks", "bench-steps", "repeats", "json")
        own, run = _split(rest) if name == "throughput" else split_flags(rest, names)
        parse_run(run or ["miras_tiny"], f"bench {name}", parse_flags(options, own, f"bench {name}"))


def _pytest(words: list[str]) -> None:
    files = [word for word in words if word.startswith("tests")]
    names = " ".join(path.read_text() for file in files for path in _sources(ROOT / file))
    chosen, rest = pop_flag(words, "-k")
    for word in re.findall(r"\w+", chosen or ""):
        _expect(word in ("and", "or", "not") or word in names, words)
    marks, rest = pop_flag(rest, "-m")
    known = re.findall(r'^ +"(\w+):', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    _expect(set(re.findall(r"\w+", marks or "")) <= {"and", "or", "not", *known}, words)
    _expect({word for word in rest if word not in files} <= {"-s", "-rP", "-q"}, words)


def _sources(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"there is no {path.relative_to(ROOT)}")
    return [path] if path.is_file() else sorted(path.rglob("test_*.py"))


def _make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^(\w+):", text, re.MULTILINE)
    for word in words:
        name, given, _ = word.partition("=")
        _expect(f"{name}=" in text or f"$({name})" in text if given else name in targets, ["make", *words])


def run_all(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Runs commands one after the other in the current folder; returns each one's exit code and output.

    Each is a child of this process, whose imports it shares: DeepSpeed can be set up only once in a process.
    """
    preload()
    results = []
    for words in commands:
        log = Path("command.log")
        pid = os.fork()
        if pid == 0:
            _run(words, log)
        _, status = os.waitpid(pid, 0)
        results.append((os.waitstatus_to_exitcode(status), log.read_text()))
    return results


def _run(words: list[str], log: Path) -> None:
    from pipeline.cli import main

    code: int | str | None = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = main(words)
    except SystemExit as end:  # --help
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def main() -> None:
    """Reads a JSON list of commands, runs them, and writes their exit codes and outputs as JSON to the file named."""
    import json

    Path(sys.argv[1]).write_text(json.dumps(run_all(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
