"""The example of the page, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

from pipeline.commands.checkpoint import run_checkpoint
from pipeline.errors import UserError
from pipeline.inference.load import load
from tests.checkpoint.test_olmo_native import native

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "checkpoints.md"


def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "olmo_tiny" / "checkpoints" / "checkpoint-7"
    run_checkpoint(["convert", str(native(tmp_path / "native")), str(folder), "--from", "olmo"])
    capsys.readouterr()
    exec(compile(example, "example", "exec"), {})
    assert capsys.readouterr().out.startswith(f"torch.Size([1, {len('def load(path):')}, 260])")


def test_load_is_a_name_of_lm_and_no_other_is() -> None:
    import pipeline.lm

    assert pipeline.lm.load is load
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        pipeline.lm.other  # noqa: B018


def test_a_folder_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.OlmoConfig(**sizes, num_key_value_heads=2, vocab_size=32)
    transformers.OlmoForCausalLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights, such as model\.layers\.1\.mlp\.up_proj"):
        load(tmp_path)
