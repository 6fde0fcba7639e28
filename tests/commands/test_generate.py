"""The command: what it prints of each model, and one line for whatever a user can get wrong."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.commands import generate as command
from pipeline.commands.generate import USAGE, GenerateOptions, pop_prompts, show
from pipeline.config import replace
from pipeline.inference import Token, generate, load
from tests.inference.checkpoints import LIMIT, checkpoint, miras, olmo

MODELS = {"olmo": olmo(), "miras": miras()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories by the names of MODELS."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config in MODELS.items():
        checkpoint(folder / name / "checkpoints" / "checkpoint-5", config)
    return folder


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs the command, which must succeed; what it printed, and its line on stderr."""

    def run(*words: Any) -> tuple[str, str]:
        assert main(["generate", *map(str, words)]) == 0
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        return out, line

    return run


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which must end with exit code 2 and one line; the line."""

    def run(*words: Any) -> str:
        assert main(["generate", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert out == "" and line.startswith("mnemos: ") and len(line) < 400
        return line

    return run


@pytest.mark.parametrize("name", list(MODELS))
def test_the_text_is_that_of_the_python_api(name: str, runs: Path, said: Any) -> None:
    model, tokenizer = load(runs / name)
    flags = "--max-new-tokens 9 --temperature 0.8 --top-k 50 --top-p 0.9 --seed 4".split()
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 4}
    out, line = said(runs / name, "--prompt", "def", *flags)
    assert out == generate(model, tokenizer, "def", **options) + "\n"
    assert re.fullmatch(r"mnemos: read 3 tokens in .* s \(\d+ a second\), wrote 9 tokens in .*", line)
    # Several at once; the first is as it was alone.
    (Path("book.txt")).write_text("class é:\n")
    out, line = said(runs / name, "--prompt", "def", "--prompt-file", "book.txt", "--prompt=- dash", *flags)
    texts = generate(model, tokenizer, ["def", "class é:", "- dash"], **options)
    assert out == f"[1] def\n{texts[0]}\n\n[2] class é:\n{texts[1]}\n\n[3] - dash\n{texts[2]}\n"
    assert "read 18 tokens" in line and "wrote 27 tokens" in line


@pytest.mark.parametrize("name", list(MODELS))
def test_a_book_is_read_once_and_asked_many_times(name: str, runs: Path, said: Any) -> None:
    flags = ("--max-new-tokens", 9, "--seed", 4)
    Path("book.txt").write_bytes(b"A book of some length.\r\n")
    out, line = said(runs / name, "--prompt-file", "book.txt", "--save-state", "book", "--max-new-tokens", 0)
    assert out == "" and "read 22 tokens" in line and "wrote" not in line
    assert sorted(path.name for path in Path().iterdir()) == ["book", "book.txt"]
    for question in (" Who?", " What?"):
        wanted, _ = said(runs / name, "--prompt", "A book of some length." + question, *flags)
        out, line = said(runs / name, "--state", "book", "--prompt", question, *flags)
        assert out == wanted and f"read {len(question)} tokens" in line
    wanted, _ = said(runs / name, "--prompt", "A book of some length.", *flags)
    out, line = said(runs / name, "--state", "book", *flags)
    assert out == wanted and "nothing was read" in line
    # Another state of the state, under its name.
    said(runs / name, "--state", "book", "--prompt", " Who?", "--save-state", "book", "--max-new-tokens", 0)
    wanted, _ = said(runs / name, "--prompt", "A book of some length. Who?", *flags)
    assert said(runs / name, "--state", "book", *flags)[0] == wanted


def test_a_checkpoint_and_a_precision_may_be_named(runs: Path, said: Any) -> None:
    folder = runs / "olmo" / "checkpoints" / "checkpoint-5"
    out, _ = said(folder, "--prompt", "a", "--temperature", 0, "--max_new_tokens=4", "--dtype", "float64")
    assert out == said(runs / "olmo", "--prompt", "a", "--temperature", 0, "--max-new-tokens", 4)[0]


def test_a_text_ends_at_the_longest_that_the_model_takes(runs: Path, said: Any) -> None:
    _, line = said(runs / "olmo", "--prompt", "a" * (LIMIT - 4), "--temperature", 0)
    assert "wrote 4 tokens" in line and line.endswith("1 of 1 ended at the longest text that the model takes")
    assert "wrote 128 tokens" in said(runs / "miras", "--prompt", "a" * 40, "--temperature", 0)[1]


def test_what_cannot_be_done_is_refused_before_anything_is_written(runs: Path, refusal: Any) -> None:
    model = runs / "olmo"
    files = {"empty": b"", "line": b"\n", "binary": b"a\0b", "latin": b"caf\xe9", "other": b"text"}
    for name, content in files.items():
        Path(name).write_bytes(content)
    Path("folder").mkdir()
    keep = ("--prompt", "a", "--save-state", "new")
    for words, named in {
        (model,): "give --prompt TEXT, --prompt-file FILE or --state FILE",
        ("--prompt", "a"): "generate needs a model",
        ("absent", *keep): "absent: no such folder",
        (model, "--prompt"): "--prompt needs a value",
        (model, "--prompt", ""): "--prompt is empty: give some text",
        (model, "--prompt", "a\udce9"): "--prompt is not UTF-8",
        (model, "--prompt-file", "absent"): "--prompt-file absent: no such file",
        (model, "--prompt-file", "folder"): "--prompt-file folder is a folder",
        (model, "--prompt-file", "empty"): "--prompt-file empty is empty",
        (model, "--prompt-file", "line"): "--prompt-file line is empty",
        (model, "--prompt-file", "binary"): "--prompt-file binary is binary",
        (model, "--prompt-file", "latin"): "--prompt-file latin is not UTF-8 (byte 3)",
        (model, "--prompt", "a" * (LIMIT + 1), "--save-state", "new"): f"has {LIMIT + 1} tokens",
        (model, "--prompt", "a" * LIMIT): f"has {LIMIT + 1} tokens",
        (model, "--prompt", "a" * LIMIT, "--save-state", "new"): f"with one token more has {LIMIT + 1} tokens",
        (model, "--prompt-file", "/proc/self/mem"): "--prompt-file /proc/self/mem cannot be read",
        (model, "--prompt", "a", "--save-state", "/proc/new"): "/proc/new: cannot be written",
        (model, "--prompt", "a", "--save-state", "other"): "other is there already and is no state file",
        (model, "--prompt", "a", "--save-state", "no/new"): "no/new: there is no folder no",
        (model, "--prompt", "a", "--max-new-tokens", 0): "--max-new-tokens 0 writes nothing",
        (model, *keep, "--max-new-tokens", -1): "--max-new-tokens -1",
        (model, *keep, "--top-p", 2): "--top-p 2.0",
        (model, *keep, "--temperature", "hot"): "--temperature",
        (model, *keep, "--top-q", 2): "unknown flag --top-q: did you mean --top-",
        (model, *keep, "--tokenizer", "absent.model"): "absent.model",
        (model, *keep, "stray"): "'stray' belongs to no flag",
        (model, "--state", "absent"): "absent: no such file: read the text again with --save-state",
        (model, "--state", "other"): "other is no state file",
    }.items():  # fmt: skip
        assert named in refusal(*words), words
    assert sorted(path.name for path in Path().iterdir()) == sorted([*files, "folder"])


def test_a_state_of_another_model_is_refused(runs: Path, said: Any, refusal: Any) -> None:
    said(runs / "olmo", "--prompt", "a", "--save-state", "state", "--max-new-tokens", 0)
    assert "state is the state of another model" in refusal(runs / "miras", "--state", "state")
    assert "in another precision" in refusal(runs / "olmo", "--state", "state", "--dtype", "bfloat16")
    line = refusal(runs / "olmo", "--state", "state", "--prompt", "a" * LIMIT)
    assert f"has {LIMIT} tokens behind the 1 of the state, the model takes {LIMIT}" in line


@pytest.mark.parametrize("name", list(MODELS))
def test_a_checkpoint_without_a_weight_is_refused(name: str, tmp_path: Path, refusal: Any) -> None:
    weight = "backbone.model.layers.1.mlp.up_proj.weight"
    checkpoint(tmp_path / "checkpoint-5", MODELS[name], without=(weight,))
    line = refusal("checkpoint-5", "--prompt", "a")
    assert "trainable.safetensors" in line and weight.removeprefix("backbone.") in line


def test_a_tokenizer_that_is_not_known_is_named_by_its_flag(tmp_path: Path, said: Any, refusal: Any) -> None:
    """Of token files that nothing says the tokenizer of."""
    config = replace(olmo(), data__tokens=("text.npy",))
    model: Any = config.model
    model = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, vocabulary=300))
    checkpoint(tmp_path / "checkpoint-5", dataclasses.replace(config, model=model))
    assert refusal("checkpoint-5", "--prompt", "a").endswith("the model has 300: give --tokenizer NAME")
    assert "wrote 5 tokens" in said("checkpoint-5", "--prompt", "a", "--tokenizer", "bytes", "--max-new-tokens", 5)[1]


def test_ranks_are_refused(runs: Path, refusal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("pipeline.cli.exit_process", lambda code: None)
    assert "start it without a launcher" in refusal(runs / "olmo", "--prompt", "a")


def test_an_interrupt_ends_it_with_one_line(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(tokens: Any, *_: Any) -> None:
        next(iter(tokens))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "show", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["generate", str(runs / "olmo"), "--prompt", "a"])
    assert end.value.code == 130 and capsys.readouterr().err == "mnemos: interrupted\n"


def test_help_names_every_flag_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    assert capsys.readouterr().out == USAGE + "\n"
    for field in dataclasses.fields(GenerateOptions):
        flag = f"--{field.name.replace('_', '-')}"
        (text,) = re.findall(rf"^  {flag} [A-Z]+ +(.*(?:\n {{10,}}.*)*)", USAGE, re.MULTILINE)
        if field.default is not None:
            default = int(field.default) if isinstance(field.default, float) else field.default
            assert f"default {default}" in text, flag
    assert max(map(len, USAGE.splitlines())) <= 120


def test_prompts_are_whatever_follows_their_flag() -> None:
    words = ["run", "--prompt", "--seed", "--seed", "3", "--prompt_file=a=b", "--prompt", "--help"]
    assert pop_prompts(words) == (
        [("--prompt", "--seed"), ("--prompt-file", "a=b"), ("--prompt", "--help")],
        ["run", "--seed", "3"],
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_texts_are_printed_one_after_the_other_as_they_come() -> None:
    """The second waits for the first, and is then printed as far as it is."""
    out, seen = io.StringIO(), []

    def tokens() -> Any:
        for token in (
            Token(0, 1, "a"), Token(1, 1, "x"), Token(2, 1, "!", "eos"),
            Token(0, 1, "b"), Token(1, 1, "y"),
            Token(0, 1, "", "eos"), Token(1, 1, "z"),
            Token(1, 1, ".", "length"),
        ):  # fmt: skip
            yield token
            seen.append(out.getvalue())

    report = show(tokens(), ["one", "two", ""], out)
    assert out.getvalue() == "[1] one\nab\n\n[2] two\nxyz.\n\n[3]\n!\n"
    assert seen[4] == "[1] one\nab" and seen[5] == "[1] one\nab\n\n[2] two\nxy" and seen[6].endswith("xyz")
    assert (report.tokens, report.ended, report.why) == (8, ("eos", "length", "eos"), "; 2 of 3 ended the document")


def test_a_terminal_does_not_obey_what_a_model_writes() -> None:
    tokens = [Token(0, 1, "a\x1b[2J\té\n"), Token(0, 1, "", "eos")]
    terminal, pipe = Terminal(), io.StringIO()
    show(tokens, [""], terminal)
    show(tokens, [""], pipe)
    assert terminal.getvalue() == "a\\x1b[2J\té\n\n" and pipe.getvalue() == "a\x1b[2J\té\n\n"
