"""What exported folders compute when transformers alone loads them.

This file is also a program of its own, which imports nothing of this project, and runs as where it is not installed:

    python reload.py REQUEST

REQUEST is a JSON file, a list of cases: `folder`, what was exported; `out`, where to write, without an ending; `ids`
[1, tokens]; `positions`, those that are kept; `texts`, for the tokenizer, none where the folder has none.
Writes OUT.safetensors, with the hidden states of `states_of` and `logits` [positions, vocabulary] in float32, and
OUT.json, with the `class` of the model, its `tokens` by text, and their texts again; or with an `error`.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NOT_NEEDED = ("pipeline", "deepspeed", "tyro")
"""What nobody who loads an exported folder needs."""
HEAD, LAST = "lm_head", "last norm"


class _Without:
    """A finder of modules, as where these packages are not installed."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] in NOT_NEEDED:
            return None
        found: ModuleSpec | None = self._finder.find_spec(name, path, target)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def states_of(model: nn.Module, run: Callable[[], Any], positions: Sequence[int]) -> tuple[dict[str, Tensor], Any]:
    """Hidden states of a decoder while `run` is called, [positions, width] by name in float32: of the embedding, behind
    every block, and what goes into the head; and what `run` gives.

    The blocks are a `layers`, the head is an `lm_head`; a model may read a text in pieces, one after the other. What
    has no such module, or does not call it, is left out.
    """
    found: dict[str, list[Tensor]] = {}

    def noted(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            hidden = inputs[0] if inputs else keywords["hidden_states"]
            found.setdefault(name, []).append(hidden.detach().float())

        return hook

    handles = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last == "layers" and isinstance(module, nn.ModuleList):
            for number, block in enumerate(module):
                place = f"block {number - 1}" if number else "embedding"
                handles.append(block.register_forward_pre_hook(noted(place), with_kwargs=True))
        elif last == HEAD:
            handles.append(module.register_forward_pre_hook(noted(LAST), with_kwargs=True))
    try:
        with torch.no_grad():
            given = run()
    finally:
        for handle in handles:
            handle.remove()
    whole = {name: torch.cat(parts, 1)[0] for name, parts in found.items()}
    # A head may have been asked for these positions alone.
    return {name: _kept(value, positions) for name, value in whole.items()}, given


def _kept(value: Tensor, positions: Sequence[int]) -> Tensor:
    return value if len(value) == len(positions) else value[list(positions)]


def _reloaded(case: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, positions = case["folder"], case["positions"]
    settings = json.loads((Path(folder) / "config.json").read_text())
    trusted = {"local_files_only": True, "trust_remote_code": "auto_map" in settings}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trusted).eval()
    keywords = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        keywords["logits_to_keep"] = torch.tensor(positions)
    ids = torch.tensor(case["ids"])
    states, output = states_of(model, lambda: model(ids, **keywords), positions)
    states["logits"] = _kept(output.logits[0].float(), positions)
    facts: dict[str, Any] = {"class": type(model).__name__}
    if case["texts"]:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokens = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in case["texts"]]
        again = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
        facts |= {"tokens": tokens, "texts": again, "eos": tokenizer.eos_token_id}
    return states, facts


def main(request: str) -> None:
    """Runs every case of a request."""
    from safetensors.torch import save_file

    for case in json.loads(Path(request).read_text()):
        try:
            states, facts = _reloaded(case)
            apart = {name: value.contiguous().clone() for name, value in states.items()}
            save_file(apart, f"{case['out']}.safetensors")
        except Exception as error:  # whatever transformers, or the code in a folder, meets
            facts = {"error": f"{type(error).__name__}: {error}"}
        Path(f"{case['out']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    sys.meta_path[:] = map(_Without, sys.meta_path)
    main(sys.argv[1])
