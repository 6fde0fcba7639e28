"""Export as a user meets it: trained, resumed and saved by one and by two ranks, exported, loaded elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.export.gate import case_of
from pipeline.inference.trained import find, load_trained, read_run
from pipeline.parallel.topology import Topology
from pipeline.system import StepContext, create_system
from tests.launch.harness import launch, single

STEPS, PROMPT = 6, "def load(path):"
SMALL = ("--eval-every", "0", "--evaluation.steps", "1", "--report.no-plots", "--zero", "zero3")
RECIPES = ("olmo_tiny", "miras_tiny")
ELSEWHERE = """
import json, sys
import torch
import transformers
from safetensors.torch import load_file, save_file

folder, ids, out, prompt = sys.argv[1:]
trusted = {"trust_remote_code": "auto_map" in json.load(open(f"{folder}/config.json"))}
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **trusted).eval()
with torch.no_grad():
    logits = model(load_file(ids)["ids"]).logits
save_file({"logits": logits.float().contiguous()}, out)
generate = transformers.pipeline("text-generation", folder, **trusted)
text = generate(prompt, max_new_tokens=20, do_sample=False)[0]["generated_text"]
own = [name for name in sys.modules if name.partition(".")[0] in ("pipeline", "deepspeed")]
print(json.dumps({"class": type(model).__name__, "text": text, "own": own}))
"""


def train(ranks: int, recipe: str, out: Path, *words: str) -> None:
    command = ["pipeline", "train", recipe, "--output-dir", str(out), "--steps", str(STEPS), *SMALL]
    command += ["--parallel.sequence", str(ranks), *words]
    done = single(*command) if ranks == 1 else launch(ranks, *command)
    assert done.returncode == 0, done.stdout + done.stderr


def export(run: Path, out: Path) -> str:
    done = single("pipeline", "export", str(run), str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def elsewhere(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits, class and text of a folder in a process that has transformers, and none of this project's modules."""
    place = folder.parent
    save_file({"ids": ids}, place / "ids.safetensors")
    words = [str(folder), str(place / "ids.safetensors"), str(place / "logits.safetensors"), PROMPT]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules")}
    # Isolated: neither this folder nor the environment's is looked through for modules of that name.
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, *words], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return load_file(place / "logits.safetensors")["logits"], json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_checkpoint_is_one_export_that_computes_the_same_elsewhere(
    recipe: str, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    train(2, recipe, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / f"checkpoint-{STEPS}"
    folders = []
    for ranks in (1, 2):
        run, out = tmp_path / f"by {ranks}", tmp_path / f"exported {ranks}"
        train(ranks, recipe, run, "--resume", str(checkpoint))
        manifest = json.loads((run / "checkpoints" / f"checkpoint-{STEPS}" / "manifest.json").read_text())
        assert manifest["world"] == ranks and manifest["zero_stage"] == 3
        print(export(run, out))
        folders.append({path.name: path.read_bytes() for path in out.iterdir() if path.name != "README.md"})
    assert folders[0] == folders[1] and "model.safetensors" in folders[0]

    config = read_run(find(checkpoint))
    trained = load_trained(checkpoint, config, create_system(config))
    case = case_of(trained, tmp_path, None)
    logits, facts = elsewhere(tmp_path / "exported 2", case.ids)
    difference = float((logits[0, list(case.positions)] - case.states["logits"]).abs().max())
    assert difference < 1e-5
    # The losses that training would have, which no logits of ours go into.
    labels = torch.cat([case.ids[:, 1:], torch.full((1, 1), IGNORED)], 1)
    places = torch.arange(case.ids.shape[1]).unsqueeze(0)
    batch = TokenBatch(case.ids, labels, torch.zeros_like(labels), places, torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        context = StepContext(Topology(), 0, "evaluation", 1, {"predict": True})
        losses = trained.system.forward(trained.model, batch, {}, context).tokens["losses"]
    expected = F.cross_entropy(logits[0], labels[0], ignore_index=IGNORED, reduction="none")
    assert float((losses[0] - expected).abs().max()) < 1e-5
    assert facts["own"] == [] and facts["text"].startswith(PROMPT) and len(facts["text"]) > len(PROMPT)
    record_property(f"{recipe}: class", facts["class"])
    record_property(f"{recipe}: largest difference of a logit", f"{difference:.1e}")
