"""The DeepSpeed configuration of a run, and whether DeepSpeed takes it: asked before a rank starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pydantic
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from pipeline.config import RunConfig
from pipeline.errors import UserError, brief, shown
from pipeline.files.json_file import read_json
from pipeline.host.hardware import has_bf16, on_gpu
from pipeline.host.package import config_folder
from pipeline.precision import precision_of

CONFIG_FOLDER = config_folder()

ZERO = "zero_optimization"
UNSAVED = ("elastic_checkpoint", "mics_shard_size", "round_robin_gradients")
"""Settings of ZeRO whose shards are others than the rest's. With the last, 0.19.8 says that parameters are in other
places of its shards than where they are."""
DECIDED = (
    *("optimizer", "scheduler", "fp16", "gradient_allreduce_op", "managed_gradient_accumulation", "torch_autocast"),
    *("sequence_parallel_size", "tensor_parallel", "expert_parallel", "pipeline", "hybrid_engine", "data_efficiency"),
    *("checkpoint", "datastates_ckpt"),
)
"""Settings of what the recipe or the engine decides. Some would change what is trained without a word: with sums in
place of means, gradients grow with the ranks."""
DIVISORS = ("gradient_predivide_factor",)
DTYPES = ("grad_accum_dtype", "param_dtype", "buffer_dtype")
NAMES = [name for kind in DtypeEnum for name in kind._all_values if isinstance(name, str) and "." not in name]
UNSUPPORTED = {
    (ZERO, "compute_grad_norm"): (False, "the norm of the gradients is clipped and logged"),
    (ZERO, "legacy_stage1"): (True, "DeepSpeed has removed it"),
    (ZERO, "allgather_bucket_size"): (0, "a bucket holds something: give a number above 0"),
    ("bf16", "bf16_master_weights_and_grads"): (True, "master weights are float32"),
}
"""Values that DeepSpeed's models let pass, and why training stops at them."""


FP16 = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 1, "min_loss_scale": 1}
"""The dynamic loss scale halves when a gradient overflows, at the first time too (hysteresis 1): stage 0 has no other
way, and so all stages do the same. It doubles after so many updates without."""


def check_precision(config: RunConfig) -> None:
    """Raises UserError where this process's device does not train in the run's precision."""
    dtype = precision_of(config)
    if dtype == torch.bfloat16 and not has_bf16():
        raise UserError(
            f"--precision {config.precision}: {torch.cuda.get_device_name()} has no bfloat16: give fp16, or auto"
        )
    if dtype == torch.float16 and not get_accelerator().is_fp16_supported():
        device = torch.cuda.get_device_name() if on_gpu() else "this CPU"
        raise UserError(
            f"--precision {config.precision}: DeepSpeed does not train in float16 on {device}: give"
            f" {'fp32' if on_gpu() else 'fp32 or bf16'}"
        )


def config_path(name: str) -> Path:
    """The file that `--zero NAME` means."""
    path = Path(name) if name.endswith(".json") else CONFIG_FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONFIG_FOLDER.glob("*.json")))
        raise UserError(f"--zero {name}: no such DeepSpeed configuration; known: {known}, or the path of a JSON file")
    return path


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the named file with every "auto" decided. Raises UserError."""
    path = config_path(config.zero)
    resolved = read_json(path, "correct the file")
    check_settings(path, resolved)
    decided = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.grad_accum,
        "gradient_clipping": config.clip,
    }
    for key, value in decided.items():
        if resolved.get(key, "auto") not in ("auto", value):
            given = shown(resolved[key])
            raise UserError(f'{path}: {key} is {given} but the run says {value}: write "auto" there')
        resolved[key] = value
    resolved.pop("train_batch_size", None)
    bf16 = resolved.setdefault("bf16", {})
    if bf16.get("enabled", "auto") == "auto":
        bf16["enabled"] = precision_of(config) == torch.bfloat16
    if precision_of(config) == torch.float16:
        if bf16["enabled"]:
            raise UserError(f'{path}: bf16.enabled is true but the run computes in float16: write "auto" there')
        resolved["fp16"] = dict(FP16)
    resolved.setdefault("zero_allow_untested_optimizer", True)
    # Which optimizer an offload takes is decided below, by the device.
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    resolved.setdefault("steps_per_print", 2**31)
    check_accepted(path, resolved)
    return resolved


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def check_settings(path: Path, content: Any) -> None:
    """Raises UserError, which names file and key, for what this program does not leave to a DeepSpeed configuration."""
    if not isinstance(content, dict) or not all(isinstance(content.get(name, {}), dict) for name in (ZERO, "bf16")):
        raise UserError(f"{path}: not a DeepSpeed configuration: see the files of ds_configs")
    zero = content.get(ZERO, {})
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: {ZERO}.stage is {shown(stage)}: give 0, 1, 2 or 3")
    unsaved = [key for key in UNSAVED if zero.get(key) not in (None, False, 0, -1)]
    if offload_device(content, "offload_optimizer") == "nvme":
        unsaved.append("NVMe offload")
    if unsaved:
        raise UserError(f"{path}: {unsaved[0]} has no checkpoints here: leave it out")
    for section in DECIDED:
        if section in content:
            raise UserError(f"{path}: {section!r} is decided by the recipe: leave it out")
    for (section, key), (value, why) in UNSUPPORTED.items():
        found = content.get(section, {}).get(key)
        if type(found) is type(value) and found == value:
            raise UserError(f"{path}: {section}.{key} is {value!r}, but {why}")
    if offload_device(content, "offload_param") == "nvme" and not zero["offload_param"].get("nvme_path"):
        raise UserError(f"{path}: {ZERO}.offload_param.device is 'nvme': give its nvme_path as well")
    if zero.get("zenflow") is not None:
        raise UserError(f"{path}: {ZERO}.zenflow has an optimizer of its own: leave it out")
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        extra = field.json_schema_extra
        if name in zero and isinstance(extra, dict) and extra.get("deprecated"):
            raise UserError(f"{path}: {ZERO}.{name} is deprecated: write {extra.get('new_param') or 'nothing'} instead")


def offload_device(ds_config: Mapping[str, Any], part: str) -> str:
    """Where `offload_optimizer` or `offload_param` puts its tensors: none, cpu or nvme."""
    section = ds_config.get(ZERO, {}).get(part)
    return str(section.get("device", "none")) if isinstance(section, dict) else "none"


def check_accepted(path: Path, ds_config: Mapping[str, Any]) -> None:
    """Raises UserError, which names file and key, unless DeepSpeed reads all of a resolved configuration.

    Its models refuse wrong values, and unknown keys, of the sections that have one. Of the rest DeepSpeed looks up what
    it knows and passes over everything else: without a misspelt section, training would go on.
    """
    asked = _Section(ds_config)
    problem: str | None = None
    try:
        DeepSpeedConfig(asked)
    except pydantic.ValidationError as error:
        problem = _first_error(error, ds_config, asked.last)
    except Exception as error:  # whatever a value of another type meets there
        problem = f"{asked.last}: DeepSpeed does not take it ({brief(error) or type(error).__name__}): correct it"
    problem = next(_wrong_values(ds_config, asked), problem) or next(_unread(ds_config, asked), None)
    if problem is not None:
        raise UserError(f"{path}: {problem}")


class _Section(dict):
    """A section of a configuration that notes which keys DeepSpeed looks up, and what it takes in their absence."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__((key, _Section(value) if isinstance(value, dict) else value) for key, value in content.items())
        self.asked: dict[Any, Any] = {}
        self.last = ""
        """The key that was looked up last: where reading stopped, when it stopped."""

    def _note(self, key: Any, default: Any = None) -> None:
        if self.asked.get(key) is None:
            self.asked[key] = default
        self.last = str(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._note(key, default)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self._note(key)
        return super().__contains__(key)

    # What is taken as a whole, by ** for a model or key by key, is read in full.
    def __iter__(self) -> Iterator[Any]:
        self.asked.update(dict.fromkeys(set(super().keys()) - set(self.asked)))
        return super().__iter__()

    def keys(self) -> Any:
        return self

    def items(self) -> Any:
        iter(self)
        return super().items()

    def __copy__(self) -> _Section:
        return self  # DeepSpeed reads a copy


def _wrong_values(content: Mapping[str, Any], section: _Section, where: str = "") -> Iterator[str]:
    """Values of another kind than DeepSpeed's default for their key, which it would meet in training."""
    for key, value in content.items():
        default, name = section.asked.get(key), f"{where}{key}"
        inner = dict.get(section, key)
        if isinstance(value, dict) and isinstance(inner, _Section):
            yield from _wrong_values(value, inner, f"{name}.")
        elif isinstance(default, bool) and isinstance(value, (int, float, str, type(None))):
            if not isinstance(value, bool):
                yield f"{name} is {shown(value)}: give true or false"
        elif isinstance(default, (int, float)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                yield f"{name} is {shown(value)}: give a number"
            elif key in DIVISORS and not value > 0:
                yield f"{name} is {shown(value)}: give a number above 0"
    if where:
        return
    # Their defaults are None, and DeepSpeed reads the values later.
    steps, dtypes = content.get("steps_per_print"), content.get("data_types")
    if type(steps) is not int or steps < 1:
        yield f"steps_per_print is {shown(steps)}: give a whole number above 0"
    for key in DTYPES:
        dtype = dtypes.get(key) if isinstance(dtypes, dict) else None
        if dtype is not None and dtype not in NAMES:
            yield f"data_types.{key} is {shown(dtype)}: give one of {', '.join(sorted(NAMES))}"


def _unread(content: Mapping[str, Any], section: _Section, where: str = "") -> Iterator[str]:
    """Keys that DeepSpeed has not looked up."""
    for key, value in content.items():
        inner = dict.get(section, key)
        if key not in section.asked:
            zero = {name for field, info in DeepSpeedZeroConfig.model_fields.items() for name in (field, info.alias)}
            hint = f"it belongs in {ZERO}" if not where and key in zero else _meant(key, section.asked)
            yield f"DeepSpeed knows no {shown(f'{where}{key}')} and would pass over it: {hint}"
        elif isinstance(value, dict) and isinstance(inner, _Section) and inner.asked:
            yield from _unread(value, inner, f"{where}{key}.")


def _first_error(error: pydantic.ValidationError, content: Mapping[str, Any], section: str) -> str:
    """The first thing that a model of DeepSpeed finds wrong, with the key's whole name."""
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    if not place or place[0] not in content:
        place.insert(0, section)
    name = brief(".".join(place), 80)
    if first["type"] == "extra_forbidden":
        parent = _model(error.title, [part for part in first["loc"][:-1] if isinstance(part, str)])
        fields = parent.model_fields if parent is not None else {}
        known = [info.alias or field for field, info in fields.items()]
        return f"DeepSpeed knows no {shown('.'.join(place))}: {_meant(place[-1], known)}"
    message = brief(first["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    given = first["input"]
    plain = given is None or isinstance(given, (bool, int, float, str, list))
    return f"{name}: {message}" + (f" (it is {shown(given)})" if plain else "")


def _model(title: str, place: Iterable[str]) -> type[pydantic.BaseModel] | None:
    """The model that a section, named by the outermost model and the keys down to it, is of."""
    found = next((model for model in _subclasses(DeepSpeedConfigModel) if model.__name__ == title), None)
    for key in place:
        if found is None:
            return None
        fields = {info.alias or field: info for field, info in found.model_fields.items()}
        kinds = (fields[key].annotation, *get_args(fields[key].annotation)) if key in fields else ()
        found = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)), None)
    return found


def _subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from _subclasses(inner)


def _meant(key: object, known: Iterable[object]) -> str:
    near = difflib.get_close_matches(str(key), [str(name) for name in known], n=1, cutoff=0.8)
    return f"did you mean {near[0]!r}?" if near else "leave it out"
