"""OLMo's own configuration files, as runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.commands.flags import parse_run
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.recipes.olmo import olmo2_1b, olmo_1b
from pipeline.systems.olmo.config import OlmoConfig
from pipeline.systems.olmo.native_run import SCHEDULES

PARTS: dict[str, Any] = {
    "run_name": "mine",
    "model": {
        "d_model": 2048, "n_heads": 16, "n_layers": 16, "mlp_ratio": 8, "weight_tying": True, "alibi": False,
        "rope": True, "flash_attention": False, "attention_dropout": 0.0, "attention_layer_norm": False,
        "include_bias": False, "block_type": "sequential", "layer_norm_type": "default",
        "layer_norm_with_affine": False, "activation_type": "swiglu", "residual_dropout": 0.0,
        "embedding_dropout": 0.0, "max_sequence_length": 2048, "vocab_size": 50280, "embedding_size": 50304,
        "init_fn": "mitchell",
    },
    "optimizer": {"name": "adamw", "learning_rate": 4e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]},
    "scheduler": {"name": "cosine_with_warmup", "t_warmup": 500, "alpha_f": 0.1},
    "max_duration": 7640, "global_train_batch_size": 64, "device_train_microbatch_size": 8,
    "precision": "amp_bf16", "max_grad_norm": 1.0, "save_interval": 1000, "eval_interval": "${save_interval}",
    "data": {"paths": ["a.npy"], "num_workers": 4},
}  # fmt: skip
NORMS = {
    "layer_norm_type": "rms", "layer_norm_with_affine": True, "attention_layer_norm": True, "norm_after": True,
}  # fmt: skip


def read(folder: Path, *flags: str, ranks: int = 1, **changes: Any) -> RunConfig:
    """The run of the file in which sections are changed by key, and other fields whole."""
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in PARTS.items()}
    for key, value in changes.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    file = folder / "olmo.yaml"
    file.write_text(yaml.safe_dump(content))
    return parse_run(["--config", str(file), *flags], "train", ranks=ranks)


def test_the_guides_file_is_the_recipe(tmp_path: Path) -> None:
    found, recipe = read(tmp_path), olmo_1b()
    assert found.model == recipe.model
    for name in ("steps", "lr", "warmup_steps", "weight_decay", "clip", "sequence_length", "batch_size", "grad_accum"):
        assert getattr(found, name) == getattr(recipe, name), name
    assert found.optimizer == recipe.optimizer
    assert (found.save_every, found.eval_every, found.precision) == (1000, 1000, "bf16")
    assert found.output_dir == Path("outputs/mine")
    assert (found.data.tokens, found.data.token_dtype) == (("a.npy",), "uint16")


def test_flags_of_the_guides_command_stand_over_the_file(tmp_path: Path) -> None:
    found = read(
        tmp_path, "--max_duration=7630", "--save_interval=7", "--eval_interval=9", "--global_train_batch_size=32",
        "--device_train_microbatch_size=4", "--scheduler.t_warmup=11", "--data.paths=[x/1.npy, x/2.npy]", ranks=2,
    )  # fmt: skip
    assert (found.steps, found.save_every, found.eval_every, found.warmup_steps) == (7630, 7, 9, 11)
    assert (found.batch_size, found.grad_accum, found.global_batch_size) == (4, 4, 32)
    assert found.data.tokens == ("x/1.npy", "x/2.npy")


SCHEDULED = {"max_duration": 4, "scheduler": {"t_max": 100}}
"""Training stops at step 4 of a schedule of 100."""


@pytest.mark.parametrize(
    "flags, steps, stop_after",
    [
        ("", 100, 4),
        ("--max_duration=50", 100, 50),
        ("--max-duration 50 --max_duration 60", 100, 60),
        ("--max_duration=100", 100, 100),
        ("--max_duration=6553600T", 100, 50),
        ("--max_duration=6553600T --global_train_batch_size=32", 100, 100),
        ("--max_duration=6553601T --device_train_microbatch_size=16", 100, 51),
        ("--steps 50", 50, None),
        ("--max-steps 50 --max_duration=20", 50, 20),
        ("--steps 50 --stop-after 30", 50, 30),
        ("--stop-after 30", 100, 30),
    ],
)
def test_max_duration_is_where_training_stops(tmp_path: Path, flags: str, steps: int, stop_after: int | None) -> None:
    found = read(tmp_path, *flags.split(), **SCHEDULED)
    assert (found.steps, found.stop_after) == (steps, stop_after)
    if not flags:
        native = read(tmp_path, max_duration=7, scheduler={"t_max": 7})
        assert (native.steps, native.stop_after) == (7, 7), "the schedule has a length of its own"


def test_max_duration_stops_a_recipe_that_stops_before_its_schedule_ends() -> None:
    found = parse_run(["olmo2_1b", "--max_duration=50"], "train", ranks=1)
    assert (found.steps, found.stop_after) == (olmo2_1b().steps, 50)
    found = parse_run(["olmo2_1b", "--max_duration=4e12T"], "train", ranks=8)
    assert found == parse_run(["olmo2_1b"], "train", ranks=8)
    assert parse_run(["olmo2_1b", "--steps", "50"], "train", ranks=1).stop_after is None


def test_max_duration_is_the_length_of_a_schedule_without_one() -> None:
    for value, steps in (("7630", 7630), ("7_630", 7630), ("1e9T", 7630), ("131072T", 1), ("131073T", 2)):
        found = parse_run(["olmo_1b", f"--max_duration={value}"], "train", ranks=4)
        assert (found.steps, found.stop_after) == (steps, None), value
    found = parse_run(["olmo_1b", "--max_duration=10", "--stop-after", "5"], "train", ranks=1)
    assert (found.steps, found.stop_after) == (10, 5)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--max_duration=200", "--max-duration is '200', 200 steps, and the schedule ends at 100: give --steps 200"),
        ("--max_duration=50 --stop-after 30", "--max-duration and --stop-after are both given"),
        ("--max_duration=2ep", "--max-duration is '2ep': give it in steps, or in tokens as 4e12T"),
        ("--max_duration=1.5", "--max-duration is '1.5': give a whole number, 0 or more"),
        ("--max_duration=infT", "--max-duration is 'inf': give a number"),
        ("--max_duration=0", "--max-duration is '0': give 1 or more"),
        ("--max_duration", "--max_duration needs a value"),
    ],
)
def test_a_duration_that_is_none_is_refused_in_a_line(tmp_path: Path, flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        read(tmp_path, *flags.split(), **SCHEDULED)
    assert "\n" not in str(refusal.value)


def test_olmo2s_file_in_tokens_is_the_recipe_of_olmo2(tmp_path: Path) -> None:
    model = {
        **NORMS, "weight_tying": False, "rope_theta": 500000, "layer_norm_eps": "1e-6", "max_sequence_length": 4096,
        "vocab_size": 100278, "embedding_size": 100352, "init_fn": "normal", "init_cutoff_factor": 3,
    }  # fmt: skip
    found = read(
        tmp_path, model=model, max_duration="4e12T", softmax_auxiliary_loss=True, auxiliary_loss_multiplier="1e-5",
        optimizer={"eps": "1e-8", "decay_norm_and_bias": True},
        scheduler={"units": "tokens", "t_warmup": 8388608000, "t_max": "5e12", "warmup_min_lr": 0.0},
        global_train_batch_size=512, device_train_microbatch_size=4,
    )  # fmt: skip
    recipe = olmo2_1b()
    assert found.model == recipe.model and found.optimizer == recipe.optimizer
    assert (found.steps, found.stop_after, found.warmup_steps) == (recipe.steps, recipe.stop_after, recipe.warmup_steps)


def test_keys_without_effect_are_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(tmp_path, evaluators=[], fsdp={"precision": "mixed"}, optimizer={"momentum": 1}, save_folder="${path.x:1}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("olmo.yaml: no effect here: evaluators, fsdp, optimizer.momentum, save_folder")
    assert "no effect" not in named(capsys, tmp_path), "all of the guide's file has one"


def named(capsys: pytest.CaptureFixture[str], folder: Path, **changes: Any) -> str:
    """The line of what has no effect."""
    read(folder, **changes)
    return capsys.readouterr().err.strip()


def test_fields_that_have_a_flag_here_are_taken(tmp_path: Path) -> None:
    found = read(
        tmp_path, activation_checkpointing="whole_layer", compile={}, stop_at=50, save_folder=str(tmp_path / "out"),
        model={"eos_token_id": 0},
    )  # fmt: skip
    assert found.activation_checkpointing and found.compile
    assert (found.steps, found.stop_after, found.data.eos_id) == (7640, 50, 0)
    assert found.output_dir == tmp_path / "out", "save_folder is where OLMo saves, whatever the run's name"
    assert read(tmp_path, "--run-name", "b", save_folder="a").output_dir == Path("outputs/b")
    plain = read(tmp_path, activation_checkpointing=None, compile=None, stop_at=9999, save_folder=None)
    assert plain == read(tmp_path)
    assert not plain.activation_checkpointing and not plain.compile and plain.data.eos_id is None
    ends = read(tmp_path, max_duration=100, stop_at=50, scheduler={"t_max": 60})
    assert (ends.steps, ends.stop_after) == (60, 50), "it never goes beyond its schedule"


def test_the_tokenizer_of_the_file_is_taken_where_it_is_one_of_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tok.model").touch()
    for name, taken in (
        ("bytes", "bytes"),
        (str(tmp_path), str(tmp_path)),
        ("allenai/gpt-neox-olmo-dolma-v1_5", "allenai/gpt-neox-olmo-dolma-v1_5"),
        ("allenai/OLMo-1B-0724-hf@refs/pr/3", "allenai/OLMo-1B-0724-hf@refs/pr/3"),
        ("gpt2", "gpt2"),
        ("~/tok.model", "~/tok.model"),
        ("tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json", "allenai/OLMo-1B-0724-hf"),
        ("tokenizers/allenai_dolma2.json", olmo2_1b().data.tokenizer),
    ):
        assert read(tmp_path, tokenizer={"identifier": name, "truncate_direction": "right"}).data.tokenizer == taken
        assert capsys.readouterr().err == ""
    for name in ("tokenizers/mine.json", "mine.model", "/gone/tok", "~nosuchuser/tok"):
        assert read(tmp_path, tokenizer={"identifier": name}).data.tokenizer == olmo_1b().data.tokenizer
        assert capsys.readouterr().err.strip().endswith("no effect here: tokenizer.identifier")


def test_fields_are_named_whose_value_has_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert named(capsys, tmp_path, save_folder="s3://bucket/x").endswith("no effect here: save_folder")
    assert named(capsys, tmp_path, compile={"fullgraph": False}).endswith("no effect here: compile.fullgraph")
    cutoff = "model.init_cutoff_factor (weights are cut off at 3 standard deviations)"
    for model in ({"init_fn": "normal"}, {"init_fn": "normal", "init_cutoff_factor": 2}, {"init_cutoff_factor": 4}):
        assert named(capsys, tmp_path, model=model).endswith(f"no effect here: {cutoff}"), model
    for model in ({"init_fn": "normal", "init_cutoff_factor": 3.0}, {"init_cutoff_factor": None}):
        assert named(capsys, tmp_path, model=model) == "", model


@pytest.mark.parametrize("name, warmup_steps", [("constant", 0), ("constant_with_warmup", 500)])
def test_a_constant_schedule_has_no_end(tmp_path: Path, name: str, warmup_steps: int) -> None:
    """And OLMo's `constant` has no warm-up either."""
    found = read(tmp_path, max_duration=100, scheduler={"name": name, "t_max": 50})
    assert (found.steps, found.stop_after, found.warmup_steps) == (100, None, warmup_steps)
    assert found.optimizer.schedule == "constant"
    assert SCHEDULES["constant"] == "constant_with_warmup", "what is written comes back with its warm-up"


def test_a_dry_run_of_the_file_is_one_here(tmp_path: Path) -> None:
    assert read(tmp_path, dry_run=True, load_path=None).dry_run
    assert not read(tmp_path, "--no-dry-run", dry_run=True).dry_run
    assert not read(tmp_path, dry_run=False).dry_run


def test_sizes_of_the_file_are_the_models(tmp_path: Path) -> None:
    model = {"mlp_hidden_size": 96, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "clip_qkv": 8.0, "n_layers": 3}
    found = read(tmp_path, model=model).model
    assert isinstance(found, OlmoConfig)
    sizes = found.backbone
    assert (sizes.width, sizes.heads, sizes.kv_heads, sizes.ffn, sizes.clip_qkv, sizes.layers) == (32, 4, 2, 48, 8.0, 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"alibi": True}}, "model: alibi is True, and a first OLMo has False"),
        ({"model": {"activation_type": "gelu"}}, "model: activation_type is 'gelu', and"),
        ({"model": {"norm_after": True}}, "model: norm_after is True, and"),
        ({"model": {**NORMS, "clip_qkv": 8}}, "model: clip_qkv is 8.0, and a second OLMo does not clip"),
        ({"model": {"d_model": "wide"}}, "model: d_model is 'wide': give a whole number"),
        ({"model": {"n_layers": 1.5}}, "model: n_layers is 1.5: give a whole number"),
        ({"model": {"residual_dropout": 0.1}}, "model: residual_dropout is 0.1, and here there is no dropout"),
        ({"model": {"layer_norm_eps": "small"}}, "model: layer_norm_eps is 'small': give a number"),
        ({"model": {"init_fn": "fan_in"}}, "model: init_fn is 'fan_in': only mitchell and normal"),
        ({"model": {"n_heads": 3}}, "d_model 2048 is not divisible by n_heads 3"),
        ({"optimizer": {"name": "lionw"}}, "optimizer.name is 'lionw': only adamw"),
        ({"optimizer": {"betas": 0.9}}, "optimizer.betas is 0.9: give two numbers"),
        ({"optimizer": "adamw"}, "optimizer is 'adamw': give it as a section"),
        ({"scheduler": {"name": "max_scheduler"}}, "scheduler.name is 'max_scheduler': give one of"),
        ({"scheduler": {"units": "epochs"}}, "scheduler.units is 'epochs': give steps or tokens"),
        (
            {"load_path": "s3://a/step9-unsharded"},
            "load_path is 's3://a/step9-unsharded': convert it with `mnemos check",
        ),
        (
            {"max_duration": 100, "scheduler": {"t_max": 50}},
            "scheduler.t_max is 50, 50 steps, and training goes on to 100: here it ends with its schedule: raise",
        ),
        ({"max_duration": math.inf}, "max_duration is 'inf': give a number"),
        ({"max_duration": "infT"}, "max_duration is 'inf': give a number"),
        ({"max_duration": 1.5}, "max_duration is '1.5': give a whole number, 0 or more"),
        ({"max_duration": 10**400}, "max_duration is '10.*0': give a number"),
        ({"max_duration": None}, "max_duration is 'None': give a number"),
        ({"max_duration": -1}, "max_duration is '-1': give a whole number, 0 or more"),
        ({"scheduler": {"t_warmup": 0.5}}, "scheduler.t_warmup is '0.5': give a whole number"),
        ({"scheduler": {"t_max": math.nan}}, "scheduler.t_max is 'nan': give a number"),
        ({"scheduler": {"alpha_f": math.inf}}, "scheduler.alpha_f is inf: give a number"),
        ({"seed": math.nan}, "seed is nan: give a number"),
        ({"seed": -1}, "seed is -1: give a whole number, 0 or more"),
        ({"seed": 10**30}, "seed is 10.*0: give at most 2147483647"),
        (
            {"optimizer": {"learning_rate": 0}, "scheduler": {"warmup_min_lr": 0}},
            "learning_rate is 0: give a value above",
        ),
        ({"optimizer": {"betas": [0.9, math.inf]}}, "optimizer.betas is inf: give a number"),
        (
            {"global_train_batch_size": 0, "max_duration": "1e6T"},
            "global_train_batch_size is 0: give a whole number, 1",
        ),
        ({"global_train_batch_size": 64.5}, "global_train_batch_size is 64.5: give a whole number, 1 or more"),
        ({"device_train_microbatch_size": None}, "device_train_microbatch_size is None: give a number"),
        ({"save_num_checkpoints_to_keep": math.inf}, "save_num_checkpoints_to_keep is inf: give a number"),
        ({"save_num_checkpoints_to_keep": -2}, "save_num_checkpoints_to_keep is -2: give a whole number, -1"),
        ({"save_interval": 1.5}, "save_interval is 1.5: give a whole number"),
        ({"model": {"rope_theta": math.inf}}, "model: rope_theta is inf: give a number"),
        ({"activation_checkpointing": "one_in_two"}, "activation_checkpointing is 'one_in_two': give whole_layer, or"),
        ({"compile": True}, "compile is True: give it as a section, or null"),
        ({"stop_at": 0}, "stop_at is 0: give a whole number, 1 or more"),
        ({"dry_run": "no"}, "dry_run is 'no': give true or false"),
        ({"softmax_auxiliary_loss": 1.5}, "softmax_auxiliary_loss is 1.5: give true or false"),
        ({"max_duration": "2ep"}, "max_duration is '2ep': give it in steps, or in tokens"),
        ({"precision": "fp64"}, "precision is 'fp64': give one of amp_bf16"),
        ({"data": {"paths": "a.npy"}}, "data.paths is 'a.npy': give a list of files"),
        ({"data": {"memmap_dtype": "int8"}}, "data.memmap_dtype is 'int8': give uint16 or uint32"),
        ({"eval_interval": "${save_intervall}"}, "eval_interval is .*which the file does not have"),
        ({"run_name": "${oc.env:X}"}, "run_name is .*: give its value, or leave it out"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        read(tmp_path, **changes)
    assert "\n" not in str(refusal.value) and "olmo.yaml" in str(refusal.value)


def test_a_file_of_another_form_is_refused_as_before(tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("steps: 3\n")
    with pytest.raises(UserError, match="`recipe` must name one of"):
        parse_run(["--config", str(file)], "train")
