"""From DeepSpeed's shards to its universal layout: every parameter whole, in files of its own.

DeepSpeed's own converter (deepspeed.checkpoint.ds_to_universal) is not called. It cannot read ZeRO-0; from ZeRO-3 it
drops `step`; it unpickles whatever it finds, takes folder names for regular expressions and writes a file per
parameter, state and rank before it merges them. Its layout is kept, and tests compare the two.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pipeline.checkpoint.files import Entry, check_new, checksum, new_folder, write_shard
from pipeline.checkpoint.manifest import problems, read_manifest, write_manifest
from pipeline.checkpoint.safe import load_pickle
from pipeline.errors import UserError
from pipeline.loss_scale import scale_state

FORMAT = "universal"
PARAMETERS = "zero"
"""The folder of the parameters' folders."""
MASTER, MOMENTS, STEP = "fp32", ("exp_avg", "exp_avg_sq"), "step"
TENSORS = (MASTER, *MOMENTS)
MODEL_STATES = "mp_rank_00_model_states.pt"
OPTIMIZER_STATE = "optimizer_state.pt"
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
LOSS_SCALE = "loss_scale"
VERSION = 0.4
"""Of the universal layout, as DeepSpeed counts."""


@dataclass(frozen=True)
class Saved:
    """A trained parameter as its optimizer had it: TENSORS in float32, whole, and how many updates they have seen."""

    name: str
    tensors: Mapping[str, Tensor]
    step: float


def is_universal(checkpoint: Path) -> bool:
    """Whether a complete checkpoint is in the universal format."""
    return (read_manifest(checkpoint) or {}).get("format") == FORMAT


def convert(checkpoint: Path, out: Path) -> None:
    """Writes `checkpoint` to the new folder `out` in the universal format; one process, no process group.

    Raises UserError, with nothing left behind, for what cannot be converted.
    """
    check_new(out)
    wrong = problems(checkpoint, hashes=True)
    if wrong:
        raise UserError(wrong[0])
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    if manifest.get("format") == FORMAT:
        raise UserError(f"{checkpoint}: is in the universal format already: resume from it as it is")
    with new_folder(out) as partial:
        try:
            files = _write(checkpoint, manifest, partial)
        except KeyError as error:
            version = manifest.get("versions", {}).get("deepspeed")
            raise UserError(
                f"{checkpoint}: cannot be converted: its shards, of DeepSpeed {version}, have no {error}: use this"
                " program's version of DeepSpeed"
            ) from error
        facts = {key: value for key, value in manifest.items() if key not in ("files", "written")}
        write_manifest(partial, {**facts, "format": FORMAT}, files)


def _write(checkpoint: Path, manifest: dict[str, Any], folder: Path) -> dict[str, Entry]:
    files: dict[str, Entry] = {}
    source = Shards(checkpoint, manifest)

    def write(name: str, content: Any) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files[name] = write_shard(content, path)

    shapes = {}
    for saved in source.parameters():
        place = f"{PARAMETERS}/{saved.name}"
        for kind, tensor in saved.tensors.items():
            write(f"{place}/{kind}.pt", {"cat_dim": 0, "param": tensor})
        write(f"{place}/{STEP}.pt", torch.tensor(saved.step))
        shapes[saved.name] = tuple(saved.tensors[MASTER].shape)
    write(f"{PARAMETERS}/{OPTIMIZER_STATE}", source.optimizer_state())
    write(MODEL_STATES, {**source.model_states(), "param_shapes": [shapes]})
    for name in manifest["files"]:
        if not name.endswith("_states.pt"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / name, path)
            files[name] = checksum(path)
    return files


class Shards:
    """DeepSpeed's shards of one checkpoint, whatever its ZeRO stage; tensors are read when they are used."""

    def __init__(self, checkpoint: Path, manifest: Mapping[str, Any], *, moments: bool = True) -> None:
        self.checkpoint, self._moments = checkpoint, MOMENTS if moments else ()
        self.stage, self.world = int(manifest["zero_stage"]), int(manifest["world"])
        if any(name.startswith("offloaded_tensors/") for name in manifest["files"]):
            self._refuse("its optimizer state is in the files of an NVMe offload: resume it as it was saved")
        model = "zero_pp_rank_0_mp_rank_00_model_states.pt" if self.stage == 3 else MODEL_STATES
        self._model: dict[str, Any] = load_pickle(self._present(model), mmap=True)
        self._optimizers = [load_pickle(path, mmap=True)["optimizer_state_dict"] for path in self._optimizer_files()]

    def parameters(self) -> Iterator[Saved]:
        """Every trained parameter, one at a time. Raises UserError."""
        found = self._whole() if self.stage == 0 else self._stage3() if self.stage == 3 else self._flat()
        seen = set()
        for saved in found:
            # It becomes the name of a folder.
            if saved.name in seen or saved.name in ("", ".", "..") or "/" in saved.name or "\\" in saved.name:
                self._refuse(f"{saved.name!r} cannot be the name of a parameter's folder")
            seen.add(saved.name)
            yield saved
        if not seen:
            self._refuse("it holds no trained parameter")

    def optimizer_state(self) -> dict[str, Any]:
        """What the optimizer holds besides tensors: the groups' hyper-parameters, as they were."""
        groups = self._torch_state()["param_groups"]
        plain = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        return {"param_groups": plain, "zero_stage": self.stage, "ds_version": self._model["ds_version"]}

    def model_states(self) -> dict[str, Any]:
        """Buffers, counters, and the loss scale (None where there was none), which the ranks have alike."""
        module = self._model["module"]
        return {
            "module": {name: module[name].clone() for name in self._model["buffer_names"]},
            "buffer_names": list(self._model["buffer_names"]),
            **{key: self._model[key] for key in (*COUNTERS, "dp_world_size", "mp_world_size", "ds_version")},
            LOSS_SCALE: scale_state(self._model["optimizer"] if self.stage == 0 else self._optimizers[0]),
            "universal_checkpoint_info": {"universal_checkpoint_version": VERSION},
        }

    def _optimizer_files(self) -> list[Path]:
        if self.stage == 0:
            return []  # it is in the model's file
        plain, other = (
            [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(self.world)]
            for prefix in ("", "bf16_")
        )
        found = other if any((self.checkpoint / name).is_file() for name in other) else plain
        return [self._present(name) for name in found]

    def _present(self, name: str) -> Path:
        path = self.checkpoint / name
        if not path.is_file():
            raise UserError(f"{path}: missing, of {self.world} ranks at ZeRO stage {self.stage}: restore the file")
        return path

    def _torch_state(self) -> dict[str, Any]:
        """The state_dict of torch's optimizer (of rank 0, where they differ)."""
        if self.stage == 0:
            content = self._model["optimizer"]
            return content.get("optimizer_state_dict", content)
        return self._optimizers[0]["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]

    def _stage3(self) -> Iterator[Saved]:
        """Each parameter is padded to a multiple of the ranks and cut in equal parts; parts of a sub-group follow."""
        for index, shapes in enumerate(self._model["param_shapes"]):
            masters = [optimizer["fp32_flat_groups"][index] for optimizer in self._optimizers]
            states = [optimizer["optimizer_state_dict"]["state"].get(index) for optimizer in self._optimizers]
            flat, step = self._group(masters, states, f"sub-group {index}")
            offset = 0
            for name, shape in shapes.items():
                part = -(-math.prod(shape) // self.world)
                pieces = {key: [tensor[offset : offset + part] for tensor in parts] for key, parts in flat.items()}
                yield self._join(name, shape, pieces, step, padded=True)
                offset += part

    def _flat(self) -> Iterator[Saved]:
        """A group is one flat tensor in equal parts; a rank's shard has the places of its parameters' pieces."""
        for index, shapes in enumerate(self._model["param_shapes"]):
            if any(not isinstance(optimizer["base_optimizer_state"], dict) for optimizer in self._optimizers):
                self._refuse("zero_optimization.elastic_checkpoint leaves out what is needed: save without it")
            masters = [optimizer["single_partition_of_fp32_groups"][index] for optimizer in self._optimizers]
            states = [optimizer["base_optimizer_state"]["state"].get(index) for optimizer in self._optimizers]
            flat, step = self._group(masters, states, f"group {index}")
            places = [optimizer["param_slice_mappings"][index] for optimizer in self._optimizers]
            for name, shape in shapes.items():
                pieces = {
                    key: [
                        tensor[place[name].start : place[name].start + place[name].numel]
                        for tensor, place in zip(parts, places, strict=True)
                        if name in place
                    ]
                    for key, parts in flat.items()
                }
                yield self._join(name, shape, pieces, step)

    def _whole(self) -> Iterator[Saved]:
        """Without ZeRO torch's optimizer counts the parameters in the order of its groups and has no names."""
        content, state_dict = self._model["optimizer"], self._torch_state()
        if content is not state_dict and "fp32_groups" not in content:
            self._refuse("its optimizer is one that this program does not use")
        for index, group in enumerate(state_dict["param_groups"]):
            names = group.get("parameters")
            if names is None or len(names) != len(group["params"]):
                self._refuse(
                    "it was saved without ZeRO before parameters were named there: resume it on"
                    f" {self.world} ranks with --zero zero0"
                )
            for place, (name, number) in enumerate(zip(names, group["params"], strict=True)):
                weight = self._model["module"][name]
                master = content["fp32_groups"][index][place] if content is not state_dict else weight
                flat, step = self._group([master], [state_dict["state"].get(number)], name)
                yield self._join(name, weight.shape, flat, step)

    def _group(
        self, masters: Iterable[Tensor], states: Sequence[dict[str, Any] | None], what: str
    ) -> tuple[dict[str, list[Tensor]], float]:
        """The parts of each of TENSORS by rank, and the step they share."""
        flat = {MASTER: list(masters)}
        if not any(states):
            # No update has been made: every one was skipped, or none of the gradients exists.
            return {**flat, **{key: [torch.zeros_like(part) for part in flat[MASTER]] for key in self._moments}}, 0.0
        for rank, state in enumerate(states):
            keys = set(state or ())
            if keys != {*MOMENTS, STEP}:
                odd = sorted(keys.symmetric_difference({*MOMENTS, STEP}))[0]
                verb = "has the unknown state" if odd in keys else "lacks the state"
                self._refuse(f"the optimizer of rank {rank} {verb} {odd!r} for {what}: only Adam's can be converted")
        known = [state for state in states if state]
        steps = {float(state[STEP]) for state in known}
        if len(steps) != 1:
            self._refuse(f"its ranks have made different numbers of updates of {what}: {sorted(steps)}")
        for key in self._moments:
            flat[key] = [state[key] for state in known]
        return flat, steps.pop()

    def _join(
        self,
        name: str,
        shape: Sequence[int],
        pieces: Mapping[str, Sequence[Tensor]],
        step: float,
        *,
        padded: bool = False,
    ) -> Saved:
        numel = math.prod(shape)
        tensors = {}
        for key, parts in pieces.items():
            whole = torch.cat([part.reshape(-1) for part in parts]).float() if parts else torch.empty(0)
            if whole.numel() != numel and not (padded and numel <= whole.numel() < numel + self.world):
                self._refuse(f"its shards hold {whole.numel()} of the {numel} values of {key} of {name}")
            if whole.numel() > numel:
                whole = whole[:numel].clone()  # torch.save writes all of the memory that a view belongs to
            tensors[key] = whole.reshape(tuple(shape))
        return Saved(name, tensors, step)

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(f"{self.checkpoint}: cannot be converted: {reason}")
