"""A DeepSpeed configuration that DeepSpeed would not take, or would pass over, is refused before a rank starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

import pipeline.precision
from pipeline import ds_config
from pipeline.ds_config import CONFIG_FOLDER, DECIDED, FP16, check_precision, deepspeed_config, offload_device
from pipeline.engine import _answered_by
from pipeline.errors import UserError
from pipeline.precision import different_precision, precision_here, precision_of
from pipeline.recipes.miras import miras_tiny

SHIPPED = sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))


@pytest.fixture
def resolve(tmp_path: Path):
    """The resolved configuration of a file with this content."""

    def run(content: Any) -> dict[str, Any]:
        path = tmp_path / "mine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return deepspeed_config(dataclasses.replace(miras_tiny(), zero=str(path)))

    return run


@pytest.fixture
def refusal(resolve, tmp_path: Path):
    """The one line that a file with this content is refused with."""

    def run(content: Any) -> str:
        with pytest.raises(UserError) as caught:
            resolve(content)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / 'mine.json'}: ")
        assert message.isprintable() and len(message) < 400
        return message.removeprefix(f"{tmp_path / 'mine.json'}: ")

    return run


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **settings}}


WRONG = {
    "fractional": (
        zero(reduce_bucket_size=0.5),
        "zero_optimization.reduce_bucket_size: Input should be a valid integer",
    ),
    "zero": (
        zero(reduce_bucket_size=0),
        "zero_optimization.reduce_bucket_size: Input should be greater than 0 (it is 0)",
    ),
    "zero, where the model lets it pass": (zero(allgather_bucket_size=0), "allgather_bucket_size is 0"),
    "negative": (zero(stage3_max_live_parameters=-1), "stage3_max_live_parameters: Input should be greater"),
    "a string": (zero(overlap_comm="sometimes"), "zero_optimization.overlap_comm: Input should be a valid boolean"),
    "misspelt": (
        zero(reduce_bucket_sise=5),
        "DeepSpeed knows no 'zero_optimization.reduce_bucket_sise': did you mean 'reduce_bucket_size'?",
    ),
    "misspelt deeper": (
        zero(offload_optimizer={"device": "cpu", "pin_memry": True}),
        "'zero_optimization.offload_optimizer.pin_memry': did you mean 'pin_memory'?",
    ),
    "wrong deeper": (
        zero(offload_optimizer={"device": "disk"}),
        "zero_optimization.offload_optimizer.device: Input should be 'none', 'cpu' or 'nvme' (it is 'disk')",
    ),
    "a section of another type": (zero(offload_optimizer=5), "zero_optimization.offload_optimizer: Input should be"),
    "a section misspelt": (
        {"zero_optimisation": {"stage": 3}},
        "DeepSpeed knows no 'zero_optimisation' and would pass over it: did you mean 'zero_optimization'?",
    ),
    "a setting of ZeRO outside its section": ({"stage": 3}, "'stage' and would pass over it: it belongs in zero_opt"),
    "a comment": ({"_comment": "mine"}, "'_comment' and would pass over it: leave it out"),
    "misspelt where there is no model": (
        {"data_types": {"grad_acum_dtype": "fp32"}},
        "'data_types.grad_acum_dtype' and would pass over it: did you mean 'grad_accum_dtype'?",
    ),
    "a type without a model": ({"data_types": []}, "data_types: DeepSpeed does not take it"),
    "no such dtype": (
        {"data_types": {"grad_accum_dtype": "fp99"}},
        "data_types.grad_accum_dtype is 'fp99': give one of",
    ),
    "no such dtype of communication": (
        {"communication_data_type": "fp99"},
        "communication_data_type: DeepSpeed does not",
    ),
    "no whole number": ({"steps_per_print": 0}, "steps_per_print is 0: give a whole number above 0"),
    "no factor": ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0: give a number above 0"),
    "no switch": ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown is 'yes': give true or false"),
    "a monitor": ({"tensorboard": {"enable": True}}, "'tensorboard.enable': did you mean 'enabled'?"),
    "a removed section": ({"nebula": {}}, "nebula: DeepSpeed does not take it (Nebula checkpointing has been removed"),
    "a deprecated name": (
        zero(cpu_offload=True),
        "zero_optimization.cpu_offload is deprecated: write offload_optimizer",
    ),
    "no norm": (zero(compute_grad_norm=False), "compute_grad_norm is False, but the norm of the gradients is clipped"),
    "masters of low precision": ({"bf16": {"bf16_master_weights_and_grads": True}}, "master weights are float32"),
    "another optimizer": (zero(zenflow={}), "zenflow has an optimizer of its own"),
    "a disk without a path": (zero(offload_param={"device": "nvme"}), "give its nvme_path as well"),
    "a stage that is no number": (zero(stage=True), "zero_optimization.stage is True: give 0, 1, 2 or 3"),
    "a key twice": ('{"bf16": {}, "bf16": {}}', "not JSON ('bf16' is given twice: keep one): correct the file"),
    "too deep": ("[" * 10_000, "not JSON (nested deeper than 100 levels): correct the file"),
    "no object": ("[1]", "not a DeepSpeed configuration"),
}


@pytest.mark.parametrize(("content", "reason"), WRONG.values(), ids=WRONG.keys())
def test_what_deepspeed_would_stop_at_or_pass_over_is_refused(refusal, content: Any, reason: str) -> None:
    assert reason in refusal(content)


@pytest.mark.parametrize("section", DECIDED)
def test_what_is_decided_here_is_refused_even_when_empty(refusal, section: str) -> None:
    """With gradient_allreduce_op "sum" gradients would grow with the ranks; an empty datastates_ckpt switches it on."""
    assert f"{section!r} is decided by the recipe: leave it out" in refusal({section: {}})


@pytest.mark.parametrize("name", DeepSpeedZeroConfig.model_fields)
def test_a_wrong_value_of_any_setting_of_zero_names_the_setting(refusal, name: str) -> None:
    key = DeepSpeedZeroConfig.model_fields[name].alias or name
    assert key in refusal({"zero_optimization": {key: {"no": "such"}}})


GOOD = {
    "nothing": {},
    "numbers that are whole": zero(reduce_bucket_size=5e8),
    "auto": zero(reduce_bucket_size="auto", offload_optimizer="auto"),
    "null": zero(offload_optimizer=None),
    "prefetching switched off": zero(stage=3, stage3_prefetch_bucket_size=0, sub_group_size=0),
    "an offload": zero(offload_optimizer={"device": "cpu"}),
    "sections without a model": {"data_types": {"grad_accum_dtype": "bf16"}, "flops_profiler": {"enabled": True}},
    "monitors": {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True, "output_path": "x"}},
    "timers": {"timers": {"throughput": {"enabled": False}}, "wall_clock_breakdown": True, "steps_per_print": 10},
    "the rest": {"comms_logger": {"enabled": True}, "aio": {"block_size": 1048576}, "communication_data_type": "fp16"},
}


@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD.keys())
def test_what_deepspeed_takes_is_left_as_it_is(resolve, content: dict[str, Any]) -> None:
    resolved = resolve(content)
    assert {key: resolved[key] for key in content} == content


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_runs_own_values_are_taken_whatever_deepspeed_has_by_default(clip: float) -> None:
    """0: no clipping, where DeepSpeed's default is a number above."""
    config = dataclasses.replace(miras_tiny(), clip=clip, batch_size=1, grad_accum=3)
    assert deepspeed_config(config)["gradient_clipping"] == clip


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_hold_nothing_that_deepspeed_passes_over(resolve, name: str) -> None:
    resolve((CONFIG_FOLDER / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("content", "device"),
    [({}, "none"), (zero(), "none"), (zero(offload_param=None), "none"), (zero(offload_param="auto"), "none"),
     (zero(offload_param={}), "none"), (zero(offload_param={"device": "cpu"}), "cpu")],
)  # fmt: skip
def test_where_an_offload_goes(content: dict[str, Any], device: str) -> None:
    assert offload_device(content, "offload_param") == device


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Makes this machine one with a GPU of some compute capability, or with a CPU of some kind."""

    def have(gpu: str | None = None, *, bf16: bool = True, fp16: bool = True, amx: bool = False) -> None:
        for module in (ds_config, pipeline.precision):
            monkeypatch.setattr(module, "on_gpu", lambda: gpu is not None)
            monkeypatch.setattr(module, "has_bf16", lambda: bf16)
        monkeypatch.setattr(pipeline.precision, "has_amx", lambda: amx)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
        monkeypatch.setattr(ds_config.get_accelerator(), "is_fp16_supported", lambda: fp16)

    return have


def of(precision: Any, **changes: Any) -> Any:
    return dataclasses.replace(miras_tiny(), precision=precision, **changes)


def test_auto_is_what_the_device_computes_fast_in(machine) -> None:
    chosen = {}
    for name, facts in {
        "H100": {"gpu": "H100"},
        "T4": {"gpu": "T4", "bf16": False},
        "CPU": {},
        "CPU with AMX": {"amx": True},
        "H100 beside AMX": {"gpu": "H100", "amx": True},
        "T4 beside AMX": {"gpu": "T4", "bf16": False, "amx": True},
    }.items():
        machine(**facts)
        chosen[name] = tuple(str(precision_of(of(auto))).removeprefix("torch.") for auto in ("auto", "auto-amx"))
    assert chosen == {
        "H100": ("bfloat16", "bfloat16"),
        "T4": ("float16", "float16"),
        "CPU": ("float32", "float32"),
        "CPU with AMX": ("float32", "bfloat16"),
        "H100 beside AMX": ("bfloat16", "bfloat16"),
        "T4 beside AMX": ("float16", "float16"),
    }


def test_ranks_that_chose_other_precisions_are_named(machine) -> None:
    ranks = []
    for facts in ({"gpu": "A100"}, {"gpu": "A100"}, {"gpu": "Tesla T4", "bf16": False}):
        machine(**facts)
        ranks.append(precision_here(of("auto")))
    assert different_precision("auto", ranks[:2]) is None
    assert different_precision("auto", ranks) == (
        "--precision auto: rank 2 on Tesla T4 computes in float16, and rank 0 on A100 in bfloat16: give a precision"
        " that all devices have"
    )


def test_a_precision_that_the_device_has_not_is_refused(machine) -> None:
    machine("Tesla T4", bf16=False)
    for works in ("auto", "auto-amx", "fp16", "fp32"):
        check_precision(of(works))
    with pytest.raises(UserError, match=r"^--precision bf16: Tesla T4 has no bfloat16: give fp16, or auto$"):
        check_precision(of("bf16"))
    machine(fp16=False)
    for works in ("auto", "auto-amx", "bf16", "fp32"):
        check_precision(of(works))
    reason = r"^--precision fp16: DeepSpeed does not train in float16 on this CPU: give fp32 or bf16$"
    with pytest.raises(UserError, match=reason):
        check_precision(of("fp16"))
    machine("Tesla P100", bf16=False, fp16=False)
    with pytest.raises(UserError, match=r"^--precision auto: DeepSpeed .* on Tesla P100: give fp32$"):
        check_precision(of("auto"))


@pytest.mark.parametrize("name", SHIPPED)
def test_float16_has_a_dynamic_loss_scale_in_every_shipped_file(name: str) -> None:
    resolved = deepspeed_config(of("fp16", zero=name))
    assert resolved["fp16"] == FP16 and resolved["bf16"]["enabled"] is False
    for other in ("fp32", "bf16"):
        assert "fp16" not in deepspeed_config(of(other, zero=name))


def test_a_file_that_asks_for_bfloat16_is_no_file_for_float16(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}}))
    with pytest.raises(UserError, match=r'mine\.json: bf16\.enabled is true but .* float16: write "auto" there'):
        deepspeed_config(of("fp16", zero=str(path)))


def test_what_deepspeed_refuses_at_its_start_is_laid_on_the_users_file_and_on_no_other() -> None:
    reason = r"--zero mine\.json: DeepSpeed does not start with it \(no GPU\): correct it"
    with pytest.raises(UserError, match=reason), _answered_by("mine.json"):
        raise AssertionError("no GPU")
    for zero, error in (
        ("zero3", AssertionError()),
        ("mine.json", RuntimeError("NCCL error")),
        ("mine.json", OSError()),
    ):
        with pytest.raises(type(error)), _answered_by(zero):
            raise error
