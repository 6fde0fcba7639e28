"""Converting shards as DeepSpeed lays them out, refusing what cannot be converted, and reading pickles safely."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.utils.tensor_fragment import fragment_address

from pipeline.checkpoint import universal, universal_convert
from pipeline.checkpoint.manifest import problems, read_manifest
from pipeline.checkpoint.safe import FORCE, load_pickle, weights_only
from pipeline.checkpoint.universal import check_switchable, convert, is_universal
from pipeline.errors import UserError
from tests.checkpoint.whole import write_whole

SHAPES = {"a": (3, 3), "b": (1,)}
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
VALUES = {
    kind: {"a": torch.arange(9.0).reshape(3, 3) + 100 * place, "b": torch.tensor([50.0 + place])}
    for place, kind in enumerate(KINDS)
}
STEP = 7.0
OPTIMIZERS = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
Change = Callable[[dict[str, Any]], None]


def flat(kind: str) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in VALUES[kind].values()])


def model_states(**more: Any) -> dict[str, Any]:
    counters = {"global_steps": 7, "global_samples": 14, "skipped_steps": 0, "dp_world_size": 2, "mp_world_size": 1}
    module = {"a": VALUES["fp32"]["a"], "b": VALUES["fp32"]["b"], "seen": torch.tensor(5.0)}
    return {"module": module, "buffer_names": ["seen"], "param_shapes": [SHAPES], "ds_version": "x", **counters, **more}


def state(parts: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"step": torch.tensor(STEP), **{kind: parts[kind] for kind in KINDS[1:]}}


def stage1(folder: Path) -> None:
    """Two ranks with 5 values each of a flat group of 10."""
    torch.save(model_states(), folder / "mp_rank_00_model_states.pt")
    places = [{"a": fragment_address(5, 0)}, {"a": fragment_address(4, 0), "b": fragment_address(1, 4)}]
    for rank, place in enumerate(places):
        parts = {kind: flat(kind)[5 * rank : 5 * rank + 5] for kind in KINDS}
        optimizer = {
            "zero_stage": 1,
            "loss_scaler": LossScaler(1.0),
            "base_optimizer_state": {"state": {0: state(parts)}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            "single_partition_of_fp32_groups": [parts["fp32"]],
            "param_slice_mappings": [place],
        }
        torch.save({"optimizer_state_dict": optimizer}, folder / OPTIMIZERS[rank])


def stage3(folder: Path) -> None:
    """Two ranks with half of each parameter, padded: 5 + 4 of `a`, 1 + 0 of `b`."""
    torch.save(model_states(), folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    padding = torch.full((1,), -1.0)
    for rank in range(2):
        parts = {}
        for kind in KINDS:
            whole = flat(kind)
            first = [whole[:5], whole[9:]] if rank == 0 else [whole[5:9], padding, padding]
            parts[kind] = torch.cat(first)
        optimizer = {
            "optimizer_state_dict": {"state": {0: state(parts)}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            "fp32_flat_groups": [parts["fp32"]],
        }
        torch.save({"optimizer_state_dict": optimizer}, folder / OPTIMIZERS[rank])


def stage0(folder: Path) -> None:
    """torch's own state, numbered in the order of the groups, which is not the model's."""
    states = {place: state({kind: VALUES[kind][name] for kind in KINDS}) for place, name in enumerate("ba")}
    groups = [{"lr": 0.1, "params": [0], "parameters": ["b"]}, {"lr": 0.2, "params": [1], "parameters": ["a"]}]
    optimizer = {"state": states, "param_groups": groups}
    torch.save(model_states(optimizer=optimizer, param_shapes=None), folder / "mp_rank_00_model_states.pt")


STAGES = {0: stage0, 1: stage1, 3: stage3}


def with_manifest(folder: Path, stage: int) -> Path:
    write_whole(folder, {"world": 2, "zero_stage": stage, "step": 7, "versions": {"deepspeed": "x"}})
    return folder


def checkpoint(folder: Path, stage: int) -> Path:
    folder.mkdir(parents=True)
    STAGES[stage](folder)
    (folder / "trainer_state.json").write_text('{"step": 7}')
    (folder / "rng-00000.pt").write_bytes(b"as it is")
    return with_manifest(folder, stage)


def change(folder: Path, name: str, part: Change) -> None:
    content = load_pickle(folder / name)
    part(content)
    torch.save(content, folder / name)


def read(folder: Path, name: str, kind: str) -> torch.Tensor:
    content = load_pickle(folder / "zero" / name / f"{kind}.pt")
    return content if kind == "step" else content["param"]


@pytest.mark.parametrize("stage", STAGES)
def test_numbers_only_move(tmp_path: Path, stage: int) -> None:
    # DeepSpeed's own converter takes the folder for a regular expression.
    source, out = checkpoint(tmp_path / "run (a+b)[1]" / "checkpoint-7", stage), tmp_path / "run (a+b)[1]" / "out"
    convert(source, out)
    assert problems(out, hashes=True) == [] and problems(source, hashes=True) == []
    for name in SHAPES:
        for kind in KINDS:
            found = read(out, name, kind)
            assert found.dtype == torch.float32 and torch.equal(found, VALUES[kind][name])
            assert (out / "zero" / name / f"{kind}.pt").stat().st_size < 2000, "the parameter alone, not its shard"
        assert read(out, name, "step") == STEP
    manifest = read_manifest(out)
    assert manifest is not None
    assert (manifest["format"], manifest["world"], manifest["zero_stage"]) == ("universal", 2, stage)
    assert is_universal(out) and not is_universal(source)
    assert json.loads((out / "trainer_state.json").read_text()) == {"step": 7}
    assert (out / "rng-00000.pt").read_bytes() == b"as it is"
    states = load_pickle(out / "mp_rank_00_model_states.pt")
    assert states["global_samples"] == 14 and states["module"] == {"seen": torch.tensor(5.0)}
    groups = load_pickle(out / "zero" / "optimizer_state.pt")["param_groups"]
    assert [group["lr"] for group in groups] == ([0.1, 0.2] if stage == 0 else [0.1])
    assert {path.name for path in out.iterdir()} == {
        "zero", "mp_rank_00_model_states.pt", "trainer_state.json", "rng-00000.pt", "manifest.json"
    }  # fmt: skip
    assert not list(tmp_path.rglob("*.partial"))


def test_before_the_first_update_the_moments_are_zero(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint-7", 1)
    for name in OPTIMIZERS:
        change(source, name, lambda content: content["optimizer_state_dict"]["base_optimizer_state"]["state"].clear())
    convert(with_manifest(source, 1), tmp_path / "out")
    assert torch.equal(read(tmp_path / "out", "a", "fp32"), VALUES["fp32"]["a"])
    assert not read(tmp_path / "out", "a", "exp_avg").any() and read(tmp_path / "out", "a", "step") == 0


def base_state(content: dict[str, Any]) -> dict[str, Any]:
    return content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]


def rename(content: dict[str, Any]) -> None:
    content["param_shapes"] = [{"../a": (3, 3), "b": (1,)}]


def rename_pieces(content: dict[str, Any]) -> None:
    (pieces,) = content["optimizer_state_dict"]["param_slice_mappings"]
    pieces["../a"] = pieces.pop("a")


class Hostile:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("pwned",)


MODEL = "mp_rank_00_model_states.pt"
REFUSED: dict[str, tuple[int, dict[str, Change], str]] = {
    "an unknown state": (
        1, {OPTIMIZERS[1]: lambda c: base_state(c).update(momentum_buffer=torch.ones(1))},
        "rank 1 has the unknown state 'momentum_buffer'",
    ),
    "a missing state": (1, {OPTIMIZERS[0]: lambda c: base_state(c).pop("exp_avg")}, "rank 0 lacks the state 'exp_avg'"),
    "one rank without state": (
        1, {OPTIMIZERS[0]: lambda c: base_state(c).clear()}, "rank 0 lacks the state 'exp_avg'"
    ),
    "ranks that disagree": (1, {OPTIMIZERS[0]: lambda c: base_state(c)["step"].add_(1)}, "[7.0, 8.0]"),
    "a piece that is lost": (
        1, {OPTIMIZERS[1]: lambda c: c["optimizer_state_dict"]["param_slice_mappings"][0].pop("a")},
        "5 of the 9 values of fp32 of a",
    ),
    "elastic shards": (
        1, {OPTIMIZERS[0]: lambda c: c["optimizer_state_dict"].update(base_optimizer_state=[])}, "elastic_checkpoint"
    ),
    "a name that leaves the folder": (1, {MODEL: rename, **dict.fromkeys(OPTIMIZERS, rename_pieces)}, "'../a'"),
    "another DeepSpeed": (1, {MODEL: lambda c: c.pop("param_shapes")}, "have no 'param_shapes'"),
    "a shard too short": (
        3, {OPTIMIZERS[1]: lambda c: c["optimizer_state_dict"].update(fp32_flat_groups=[torch.ones(2)])},
        "values of fp32 of a",
    ),
    "no names": (0, {MODEL: lambda c: c["optimizer"]["param_groups"][0].pop("parameters")}, "2 ranks with --zero"),
    "another optimizer": (
        0, {MODEL: lambda c: c.update(optimizer={"optimizer_state_dict": c["optimizer"]})}, "does not use"
    ),
    "what a pickle would run": (1, {MODEL: lambda c: c.update(more=Hostile())}, "posix.mkdir"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_refused_in_one_line(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stage, changes, reason = REFUSED[case]
    source = checkpoint(tmp_path / "checkpoint-7", stage)
    for name, part in changes.items():
        change(source, name, part)
    refused(with_manifest(source, stage), tmp_path / "out", reason)


def refused(source: Path, out: Path, reason: str) -> None:
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        convert(source, out)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert sorted(source.parent.rglob("*")) == before, "nothing is left behind"


def test_what_is_damaged_incomplete_there_or_done_already_is_refused(tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "checkpoint-7", 1), tmp_path / "out"
    convert(source, out)
    refused(source, out, "exists already")
    refused(out, tmp_path / "again", "universal format already")
    (source / OPTIMIZERS[1]).unlink()
    refused(source, tmp_path / "again", f"{OPTIMIZERS[1]}: missing")
    refused(with_manifest(source, 1), tmp_path / "again", f"{OPTIMIZERS[1]}: missing, of 2 ranks")
    stage1(source)
    (source / "offloaded_tensors").mkdir()
    (source / "offloaded_tensors" / "0.swp").write_bytes(b"")
    refused(with_manifest(source, 1), tmp_path / "again", "NVMe")
    with (source / MODEL).open("r+b") as handle:
        handle.seek(300)
        handle.write(b"?")
    refused(source, tmp_path / "again", "content differs from its hash")
    (source / "manifest.json").unlink()
    refused(source, tmp_path / "again", "the save did not finish")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "checkpoint-7", 1)

    def fail(folder: Path, *_: Any) -> None:
        assert len(list(folder.rglob("*.pt"))) > 5
        raise error

    monkeypatch.setattr(universal_convert, "write_manifest", fail)
    with pytest.raises((UserError, KeyboardInterrupt)) as found:
        convert(source, tmp_path / "out")
    assert isinstance(error, KeyboardInterrupt) or "No space left on device): make room" in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_zero_cannot_take_steps_that_differ_within_a_group(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint-7", 0)
    change(source, MODEL, lambda content: content["optimizer"]["state"][1]["step"].add_(1))
    convert(with_manifest(source, 0), tmp_path / "out")
    saved = universal._Saved(tmp_path / "out")
    assert (saved.step_of(["a"]), saved.step_of(["b"])) == (8.0, 7.0)
    with pytest.raises(UserError, match=r"'b' was updated 7 times and 'a' 8 times, .* with --zero zero0"):
        saved.step_of(["a", "b"])


def test_files_of_torch_are_read_without_running_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    torch.save({"x": Hostile()}, path)
    with pytest.raises(UserError, match=r"x\.pt: holds something else than tensors .*posix\.mkdir"):
        load_pickle(path)
    for content in (b"", b"not a file of torch", path.read_bytes()[:200]):
        path.write_bytes(content)
        for mmap in (False, True):
            with pytest.raises(UserError, match=r"x\.pt: cannot be read"):
                load_pickle(path, mmap=mmap)
    with pytest.raises(UserError, match="No such file"):
        load_pickle(tmp_path / "none.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("before", [None, "0"])
def test_loads_by_others_are_safe_too(tmp_path: Path, before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(FORCE, raising=False)
    if before is not None:
        monkeypatch.setenv(FORCE, before)
    torch.save({"x": Hostile()}, tmp_path / "x.pt")
    torch.save({"x": LossScaler(1.0)}, tmp_path / "y.pt")
    with pytest.raises(Exception, match="mkdir"), weights_only():
        torch.load(tmp_path / "x.pt", weights_only=False)
    with weights_only():
        assert isinstance(torch.load(tmp_path / "y.pt", weights_only=False)["x"], LossScaler)
    assert os.environ.get(FORCE) == before
    assert not (tmp_path / "pwned").exists()


def test_an_engine_that_no_switch_can_fill_is_refused_at_the_start() -> None:
    engine: Any = SimpleNamespace(deepspeed=SimpleNamespace(optimizer=torch.optim.AdamW([torch.zeros(1)])))
    check_switchable(engine, "zero0")
    engine.deepspeed.optimizer = object()
    reason = (
        r"^--zero mine\.json: a run of several phases is resumed at every switch, and a universal checkpoint cannot be"
    )
    with pytest.raises(UserError, match=reason):
        check_switchable(engine, "mine.json")
