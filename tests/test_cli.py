"""The command line: quick help, and one line with exit code 2 for whatever a user can get wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import __version__, cli
from pipeline.cli import main, without_local_rank
from pipeline.commands.flags import parse_run
from pipeline.config import RunConfig, replace
from pipeline.config_file import save_config
from pipeline.errors import DeviceLostError, LostRankError, UserError
from pipeline.recipes import all_recipes
from pipeline.recipes.miras import miras_tiny
from pipeline.runtime.exit import exit_code
from pipeline.runtime.stop import Stopped

ROOT = Path(cli.__file__).parents[1]
HEAVY = ("torch", "tyro", "deepspeed", "transformers", "numpy", "matplotlib", "pydantic", "yaml")


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Apart from the runs that a checkout may hold under outputs/.
    monkeypatch.chdir(tmp_path)
    """No launcher started this process, and a rank that ends at once does not end the tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "_exit", sys.exit)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a command would have waited, one number each time."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def code_of(*words: str) -> int:
    try:
        return main(list(words))
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]):
    """Runs a command that must end with exit code 2, nothing on stdout and one readable line on stderr: returns it."""

    def run(*words: str) -> str:
        assert code_of(*words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("mnemos: ")
        # No box of the parser's, and nothing that one must scroll for.
        assert "---" not in line and "│" not in line
        assert len(line) < 400
        return line

    return run


def process(*words: str) -> subprocess.CompletedProcess[str]:
    # As a person starts it: importing the engine into this very process has set the accelerator for its children.
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_help_answers_in_less_than_a_second() -> None:
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        answer = process("-m", "pipeline", "--help")
        times.append(time.perf_counter() - begun)
        assert answer.returncode == 0 and answer.stdout.startswith("usage: ") and answer.stderr == ""
    assert min(times) < 1


def test_help_imports_nothing_heavy() -> None:
    script = (
        f"import sys; from pipeline.cli import main; main(['--help']); print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert process("-c", script).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_help_names_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert set(cli.COMMANDS) <= set(lines)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mnemos {__version__}\n"


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str]):
    """What a command answers to --help."""

    def run(*words: str) -> str:
        try:
            code = main([*words, "--help"])
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return run


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_takes_help(command: str, help_of) -> None:
    out = help_of(command)
    assert out.startswith("usage: ") and command in out


def test_help_of_plan_names_its_own_flags(help_of) -> None:
    out = help_of("plan")
    assert [flag for flag in ("--ranks", "--device", "--utilisation") if flag not in out] == []


def test_recipes_are_listed_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(all_recipes())
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    "words, named",
    [
        ("fly", ["'fly'", "train", "doctor"]),
        ("train", ["recipe", "miras_tiny"]),
        ("train --steps 3", ["recipe", "miras_tiny"]),
        ("train miras_giant", ["'miras_giant'", "miras_tiny"]),
        ("plan miras_giant", ["'miras_giant'"]),
        ("check", ["recipe"]),
        ("trian miras_tiny", ["'trian'", "did you mean train?"]),
        ("miras_tiny", ["'miras_tiny'", "did you mean train miras_tiny?"]),
        ("train miras_tinny", ["'miras_tinny'", "did you mean miras_tiny"]),
        ("bench throughput mirastiny", ["'mirastiny'", "did you mean miras_tiny?"]),
        ("bench throughpt", ["'throughpt'", "did you mean throughput?"]),
        ("bench", ["throughput, dense, kernels, decode, resume", "none"]),
        ("checkpoint verfy x", ["'verfy'", "did you mean verify?"]),
        ("checkpoint verify x --quik", ["--quik", "did you mean --quick?"]),
        ("train miras_tiny --step 3", ["--step:", "did you mean --steps? "]),
        ("train miras_tiny --step=3", ["--step:", "did you mean --steps? "]),
        ("train miras_tiny --stepz 3", ["--stepz", "--steps?"]),
        ("train miras_tiny -steps 3", ["unknown flag -steps", "did you mean --steps?"]),
        ("train miras_tiny --sequnce-length 64", ["--sequnce-length", "--sequence-length?"]),
        ("train miras_tiny --rule delta", ["--rule", "did you mean --model.memory.rule?"]),
        ("train miras_tiny --zzz 3", ["unknown flag --zzz (", "--help-all"]),
        ("plan miras_tiny --rank 2", ["--rank:", "did you mean --ranks?"]),
        ("bench throughput miras_tiny --repeat 2", ["--repeat:", "did you mean --repeats?"]),
        ("train miras_tiny --dry-run True", ["'True' belongs to no flag"]),
        ("train miras_tiny stray", ["stray"]),
        ("train miras_tiny --steps many", ["--steps", "'many'"]),
        ("train miras_tiny --steps 1.5", ["--steps", "'1.5'"]),
        ("train miras_tiny --lr fast", ["--lr", "'fast'"]),
        ("train miras_tiny --model.memory.layers 1 two", ["--model.memory.layers", "'two'"]),
        ("plan miras_tiny --model.memory.layers upper9", ["upper9", "has 4 layers", "give upper4"]),
        ("check miras --model.backbone.pretrained ./absent", ["--model.backbone.pretrained ./absent: no such folder"]),
        ("train miras_tiny --steps", ["--steps"]),
        ("train miras_tiny --optimizer.betas 0.9", ["--optimizer.betas"]),
        ("train miras_tiny --precision fp8", ["--precision", "'fp8'", "'bf16'"]),
        ("train miras_tiny --optimizer.schedule wavy", ["--optimizer.schedule", "'wavy'", "'cosine'"]),
        ("train miras_tiny --model.memory.rule hebb", ["--model.memory.rule", "'hebb'", "'delta'"]),
        ("train miras_tiny --steps -1", ["--steps is -1"]),
        ("train miras_tiny --model.backbone.heads 3", ["--model.backbone.heads 3"]),
        ("train miras_recall --data.recall.pairs 0", ["pairs is 0"]),
        ("train miras_recall --model.recall.pairs 0", ["pairs is 0"]),
        ("train miras_recall --data.recall.pair 3", ["--data.recall.pair:", "--data.recall.pairs"]),
        ("train miras_tiny --data.recall.pairs 3", ["unknown flag --data.recall.pairs"]),
        ("check miras_recall --model.recall.max_gap 300", ["max_gap 300"]),
        ("plan miras_recall --model.recall.keys 60", ["--model.backbone.vocabulary 49", "93 ids"]),
        ("train miras_tiny --config", ["--config needs a value"]),
        ("train --config absent.yaml", ["absent.yaml", "no such file"]),
        ("recipes tiny", ["'tiny'"]),
        ("doctor now", ["'now'"]),
        ("eval", ["checkpoint"]),
        ("eval absent/checkpoint-3", ["absent/checkpoint-3"]),
        ("generate", ["needs a model"]),
        ("genrate x", ["'genrate'", "did you mean generate?"]),
        ("generate absent --prompt text", ["absent: no such folder"]),
        ("generate absent --promt text", ["--promt", "did you mean --prompt?"]),
        ("export", ["CHECKPOINT", "DIR"]),
        ("export absent out", ["absent: no such folder", "run directory"]),
        ("export absent out --memry-only", ["--memry-only", "did you mean --memory-only?"]),
        ("plan miras_tiny --ranks many", ["--ranks", "'many'"]),
        ("plan miras_tiny --ranks", ["--ranks"]),
        ("plan miras_tiny --ranks 0", ["--ranks"]),
        ("plan miras_tiny --ranks 2 --utilisation 0", ["--utilisation"]),
        ("plan miras_tiny --parallel.sequence 2 --ranks 3", ["--parallel.sequence 2", "3"]),
        ("plan miras_tiny --ranks 2 --device Abacus", ["--device Abacus", "H200"]),
        ("plan miras_tiny --ranks 2 --zero zero9", ["--zero zero9", "zero3"]),
        ("check miras_tiny --launch-ranks many", ["--launch-ranks", "many"]),
        ("check miras_tiny --launch-ranks 0", ["ranks"]),
        ("check miras_tiny --parallel.sequence 2 --launch-ranks 3", ["--parallel.sequence 2", "3"]),
        ("check miras_tiny --parallel.sequence 8 --launch-ranks 8", ["--parallel.sequence 8", "heads"]),
        ("check miras_recall --zero zero9", ["--zero zero9", "zero3"]),
        ("check miras_recall --resume absent", ["--resume absent"]),
        ("check miras_recall --init-from absent", ["--init-from absent"]),
        ("check miras_recall --sequence-length 40", ["--sequence-length 40"]),
        ("check miras_recall --model.backbone.vocabulary 40", ["--model.backbone.vocabulary 40"]),
        ("check miras_recall --model.memory.backend abacus", ["--model.memory.backend", "abacus", "torch"]),
        ("check miras_recall --model.attention.backend abacus", ["--model.attention.backend", "abacus", "sdpa"]),
        ("check miras_recall --output-dir /dev/null/run", ["--output-dir /dev/null/run"]),
        ("check miras_tiny --launch-ranks 2 --data.path absent.txt", ["absent.txt"]),
    ],
)
def test_a_mistake_is_named_in_one_line(words: str, named: list[str], refusal) -> None:
    line = refusal(*words.split())
    assert [name for name in named if name not in line] == []


def test_a_row_of_a_file_that_is_wrong_is_named_in_one_line(refusal) -> None:
    Path("bad.csv").write_text("label,target,sequence\n0,,ACDEF\n1,P04637,ACD1F\n0,,ACDEG\n")
    line = refusal("check", "mimir_small", "--data.path", "bad.csv")
    assert "bad.csv, line 3: 'ACD1F' has '1'" in line


@pytest.mark.parametrize("words", ["train miras_tiny --stepz 3", "train miras_tiny --steps many", "eval absent"])
def test_a_mistake_is_one_line_of_a_process_too(words: str) -> None:
    """Nothing of a library's is said beside it either."""
    answer = process("-m", "pipeline", *words.split())
    assert (answer.returncode, answer.stdout) == (2, "")
    (line,) = answer.stderr.splitlines()
    assert line.startswith("mnemos: ")


@pytest.mark.parametrize("ranks", [None, "2"], ids=["alone", "of two"])
def test_a_mistake_is_said_by_the_first_rank_alone_and_the_others_wait_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, waits: list[float], ranks: str | None
) -> None:
    if ranks is not None:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("RANK", "0")
    assert code_of("train", "miras_giant") == 2
    assert "miras_giant" in capsys.readouterr().err
    assert waits == []
    monkeypatch.setenv("RANK", "1")
    assert code_of("train", "miras_giant") == 2
    assert capsys.readouterr() == ("", "")
    assert len(waits) == (ranks is not None)


def test_a_full_disk_is_one_line(refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/metrics.jsonl")

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    line = refusal("train")
    assert "no space left" in line and "run/metrics.jsonl" in line


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EROFS, errno.ESTALE])
def test_a_file_that_the_system_refuses_is_one_line(refusal, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(words: object) -> None:
        raise OSError(number, os.strerror(number), "data/part-1.txt")

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    assert refusal("train") == f"mnemos: data/part-1.txt: {os.strerror(number)}: correct it, or name another"


def test_an_error_of_the_system_that_names_no_file_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: object) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    with pytest.raises(ConnectionRefusedError):
        main(["train"])


def test_a_full_disk_of_one_rank_alone_is_said_by_that_rank(refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank has other disks and goes on: if this one says nothing, nobody does."""

    def fail(words: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/profile")

    monkeypatch.setenv("RANK", "5")
    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    line = refusal("train")
    assert "rank 5" in line and "no space left" in line


def test_a_rank_that_alone_has_no_gpu_says_so(refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts it, which counts no devices: two ranks on a machine of one GPU."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pipeline.runtime.ranks.on_gpu", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    line = refusal("train", "miras_recall")
    assert "rank 1" in line and "no GPU 1 here" in line


@pytest.mark.parametrize("error", [UserError("fix it"), Stopped(signal.SIGTERM)], ids=repr)
def test_what_has_been_said_is_not_said_again(
    error: UserError | Stopped, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: object) -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    code = code_of("train")
    assert code == exit_code(error) and len(capsys.readouterr().err.splitlines()) == 1
    error.reported = True
    assert code_of("train") == code and capsys.readouterr().err == ""


@pytest.mark.parametrize(("code", "advice"), [(3, "the same command"), (1, "its own lines"), (2, "its own lines")])
def test_what_another_rank_exits_with_is_what_this_one_does(
    code: int, advice: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher of several nodes gives the largest code, and 3 means: start again."""

    def fail(words: object) -> None:
        raise LostRankError("rank 1 (node-2): gone", code=code, should_report=True)

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    assert code_of("train") == code
    assert f"rank 1 (node-2): gone; {advice}" in capsys.readouterr().err


def test_a_lost_gpu_ends_the_process_at_once_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a launcher: what the interpreter would free on the GPU at its end may abort it."""
    done: list[str] = []

    def train(config: object, requests: object) -> None:
        raise DeviceLostError("cuda:0 is lost: start again with the backend 'torch'")

    def exit_process(code: int) -> None:
        done.append(f"left with {code}")
        raise SystemExit(code)

    monkeypatch.setattr("pipeline.job.train", train)
    monkeypatch.setattr("pipeline.runtime.ranks.stop", lambda: done.append("stopped"))
    monkeypatch.setattr(cli, "exit_process", exit_process)
    with pytest.raises(SystemExit):
        main(["train", "miras_tiny"])
    assert done == ["left with 2"]
    assert capsys.readouterr().err == "mnemos: cuda:0 is lost: start again with the backend 'torch'\n"


def test_a_signal_while_it_still_imports_is_left_to_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that it ended there would leave the others waiting for it."""
    before = signal.getsignal(signal.SIGTERM)

    def parse(words: object, name: str, ranks: int) -> RunConfig:
        os.kill(os.getpid(), signal.SIGTERM)
        return replace(miras_tiny(), max_hours=1.0)

    found = []
    monkeypatch.setattr(cli, "parse_run", parse)
    monkeypatch.setattr("pipeline.job.train", lambda config, requests: found.append(requests))
    assert main(["train", "miras_tiny"]) == 0
    assert found[0].pending == signal.SIGTERM and found[0].max_hours == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_error_that_no_user_caused_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    with pytest.raises(OSError, match="broken"):
        main(["train"])


@given(st.data())
def test_a_local_rank_is_dropped_wherever_a_launcher_puts_it(data: st.DataObject) -> None:
    words = ["train", "miras_tiny", "--steps", "3", "--data.path", "a", "b"]
    inserted = data.draw(
        st.sampled_from([["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"], ["--local-rank", "1"]])
    )
    place = data.draw(st.integers(0, len(words)))
    assert without_local_rank([*words[:place], *inserted, *words[place:]]) == words


def test_a_local_rank_before_the_command_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--local_rank=0", "recipes"]) == 0
    assert "miras_tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, field, value",
    [
        ("--bs 2", "batch_size", 2),
        ("--batch-size 2", "batch_size", 2),
        ("--batch_size 2", "batch_size", 2),
        ("--max-seq-length 2048", "sequence_length", 2048),
        ("--max_seq_length 2048", "sequence_length", 2048),
        ("--max-steps 7", "steps", 7),
        ("--max_steps 7", "steps", 7),
        ("--max-steps-override 7", "steps", 7),
        ("--steps=7", "steps", 7),
        ("--output_dir some/where", "output_dir", Path("some/where")),
        ("--init-from old", "init_from", Path("old")),
        ("--dry-run", "dry_run", True),
        ("--lr 1e-5", "lr", 1e-5),
        ("--stop-after 5", "stop_after", 5),
        ("--save-interval 9", "save_every", 9),
        ("--save_interval=9", "save_every", 9),
        ("--eval-interval 9", "eval_every", 9),
        ("--eval_interval=9", "eval_every", 9),
        ("--val-interval 9", "eval_every", 9),
    ],
)
def test_flags_and_their_aliases(words: str, field: str, value: object) -> None:
    assert getattr(parse_run(["miras_tiny", *words.split()], "train"), field) == value


@pytest.mark.parametrize(
    "words, field, value",
    [
        ("--log-interval 9", "log_every", 9),
        ("--log_interval=9", "log_every", 9),
        ("--plot-interval 9", "plot_every", 9),
        ("--no-plots", "plots", False),
        ("--no_plots", "plots", False),
    ],
)
def test_aliases_of_intervals_are_plain_flags(words: str, field: str, value: object) -> None:
    report = parse_run(["miras_tiny", *words.split()], "train").report
    assert (getattr(report, field), getattr(miras_tiny().report, field) == value) == (value, False)


def test_flags_of_sections() -> None:
    words = """--parallel.sequence 4 --data.path a b --optimizer.betas 0.8 0.9 --report.no-plots
        --model.memory.layers 0 3 --model.memory.rule delta --no-activation-checkpointing"""
    config = parse_run(["miras_tiny", *words.split()], "train")
    assert (config.parallel.sequence, config.data.path, config.optimizer.betas) == (4, ("a", "b"), (0.8, 0.9))
    assert (config.report.plots, config.model.memory.layers, config.model.memory.rule) == (False, (0, 3), "delta")
    assert config.model.backbone == miras_tiny().model.backbone


@pytest.mark.parametrize(
    "words, ranks, degree",
    [
        ("", 1, 1),
        ("", 2, 2),
        ("", 3, 1),
        ("", 8, 2),
        ("--steps 3", 1, 1),
        ("--parallel.sequence 2", 1, 2),
        ("--parallel.sequence=2", 3, 2),
    ],
)
def test_a_recipes_sequence_degree_fits_the_ranks_and_a_stated_one_is_left_alone(
    words: str, ranks: int, degree: int
) -> None:
    assert parse_run(["miras_tiny", *words.split()], "train", ranks=ranks).parallel.sequence == degree


@pytest.mark.parametrize("flag", ["--config run.yaml", "--config=run.yaml"])
@pytest.mark.parametrize(
    ("fields", "words", "degree"),
    [
        ("steps: 3", "", 1),
        ("parallel: {timeout_minutes: 5}", "", 1),
        ("steps: 3", " --parallel.sequence 2", 2),
        ("parallel: {sequence: 2}", "", 2),
    ],
)
def test_a_config_file_of_a_few_fields_fits_the_ranks_unless_it_states_the_degree(
    flag: str, fields: str, words: str, degree: int, tmp_path: Path
) -> None:
    """On one rank the recipe's own degree was held against a file that says nothing of it."""
    (tmp_path / "run.yaml").write_text(f"recipe: miras_tiny\n{fields}\n")
    command = f"{flag}{words}".split()
    assert parse_run(command, "train", ranks=1).parallel.sequence == degree


def test_no_flags_are_the_recipe() -> None:
    assert parse_run(["miras_tiny"], "train") == miras_tiny()


@pytest.mark.parametrize("form", ["--config {}", "--config={}", "miras_tiny --config {}", "--config {} --seed 0"])
def test_a_config_file_is_run_again(form: str, tmp_path: Path) -> None:
    config = replace(miras_tiny(), steps=9, data__path=("x",), output_dir=tmp_path / "run")
    save_config(config, tmp_path / "config.yaml")
    assert parse_run(form.format(tmp_path / "config.yaml").split(), "train") == config


def test_flags_stand_over_a_config_file(tmp_path: Path) -> None:
    save_config(replace(miras_tiny(), steps=9), tmp_path / "config.yaml")
    config = parse_run(["--config", str(tmp_path / "config.yaml"), "--steps", "11", "--seed", "4"], "train")
    assert config == replace(miras_tiny(), steps=11, seed=4)


def test_a_config_file_of_another_recipe_is_refused(tmp_path: Path) -> None:
    save_config(miras_tiny(), tmp_path / "config.yaml")
    with pytest.raises(UserError, match="a run of miras_tiny, not of miras_64k"):
        parse_run(["miras_64k", "--config", str(tmp_path / "config.yaml")], "train")
