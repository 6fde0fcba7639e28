"""The code that an exported folder carries: what it is, and that it is enough."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_relative_import_files

from pipeline.export import code
from pipeline.export.code import HASH, PREFIX, ROOT, carried_files, carried_modules, carry_code, code_hash
from pipeline.systems.miras import causal_lm
from pipeline.systems.miras.causal_lm import MnemosForCausalLM
from tests.launch.parity_main import VOCABULARY, mixed
from tests.systems.miras.harness import built, tokens

NEEDED = {"torch", "einops", "transformers"}
"""Packages beside the standard library, of the code that is carried."""


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return carried_files(causal_lm.__name__)


def test_it_needs_torch_einops_and_transformers_alone(files: dict[str, str]) -> None:
    """And nothing of what trains: no DeepSpeed, no command line, no data."""
    found = set()
    for name, text in files.items():
        tree = ast.parse(text)
        optional = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and node not in optional:
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node not in optional and node.level == 0:
                found.add(str(node.module).partition(".")[0])
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and "." not in (node.module or "")
                named = [node.module] if node.module else [alias.name for alias in node.names]
                assert {f"{module}.py" for module in named} <= files.keys(), name
        assert "import pipeline" not in text and "from pipeline" not in text
    assert found - set(sys.stdlib_module_names) == NEEDED
    trains = re.compile("launch|data|checkpoint|engine")
    assert not [name for name in carried_modules(causal_lm.__name__) if trains.search(name)]


def without_imports(tree: ast.Module) -> list[str]:
    return [ast.dump(node) for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.If)]


def test_every_file_is_the_modules_own_but_for_its_imports(files: dict[str, str]) -> None:
    modules = carried_modules(causal_lm.__name__)
    assert len(files) == len(modules) and f"{ROOT}.py" in files
    for module in modules:
        name = ROOT if module == causal_lm.__name__ else PREFIX + module.partition(".")[2].replace(".", "_")
        own = ast.parse(Path(str(sys.modules[module].__file__)).read_text())
        carried = ast.parse(files[f"{name}.py"])
        assert without_imports(own) == without_imports(carried), module


def test_transformers_finds_every_file_at_once(files: dict[str, str], tmp_path: Path) -> None:
    """From the file of the model: it reads no file twice, and copies what it finds."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = get_relative_import_files(tmp_path / f"{ROOT}.py")
    assert {Path(path).name for path in found} | {f"{ROOT}.py"} == files.keys()
    assert len(found) == len(files) - 1


def test_imports_are_rewritten_whatever_their_form(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        '"""Doc."""\nfrom typing import TYPE_CHECKING\nfrom pipeline.ops import chunks as parts, scan_native\n'
        "from pipeline.ops.scan import (\n    miras_scan,\n    check as see,\n)\nif TYPE_CHECKING:\n"
        "    from pipeline.engine import Engine\n"
        "def f():\n    from pipeline.errors import UserError\n    return UserError\n"
    )
    own = code._source
    monkeypatch.setattr(code, "_source", lambda name: source if name == "pipeline.units" else own(name))
    text = carried_files("pipeline.units")[f"{ROOT}.py"]
    assert "from . import mnemos_ops_chunks as parts\nfrom . import mnemos_ops_scan_native as scan_native\n" in text
    assert "from .mnemos_ops_scan import miras_scan, check as see\nif TYPE_CHECKING:\n    pass\n" in text
    assert "    from .mnemos_errors import UserError\n    return UserError\n" in text
    assert "pipeline.engine" not in carried_modules("pipeline.units")
    source = "import pipeline.errors\n"
    with pytest.raises(AssertionError, match="units, line 1"):
        carried_files("pipeline.units")


def test_a_class_of_transformers_carries_nothing(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    assert carry_code(model, tmp_path) == [] and not list(tmp_path.iterdir()) and not hasattr(model.config, HASH)


FRESH = """
import sys

# As where they are not installed.
sys.modules |= dict.fromkeys(["pipeline", "deepspeed", "tyro", "lm_eval"])
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

folder, again, expected = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
asked = torch.load(expected)
with torch.no_grad():
    torch.testing.assert_close(model(asked["ids"], use_cache=False).logits, asked["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(asked["ids"]).logits, asked["logits"], rtol=0, atol=1e-5)
options = {"max_new_tokens": 6, "do_sample": False}
assert model.generate(asked["ids"], **options).tolist() == asked["greedy"].tolist()
assert model.generate(asked["ids"], num_beams=3, **options).tolist() == asked["beams"].tolist()
generate = pipeline("text-generation", folder, trust_remote_code=True)
texts = generate(["w1 w2 w3 w4", "w5 w6"], batch_size=2, return_full_text=False, **options)
assert [row[0]["generated_text"] for row in texts] == asked["texts"], texts
assert generate(["w5 w6"], return_full_text=False, **options)[0][0]["generated_text"] == asked["texts"][1]

model.save_pretrained(again)
copied = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
assert AutoConfig.from_pretrained(again, trust_remote_code=True).memory == model.config.memory
state = model.state_dict()
assert all(torch.equal(value, state[name]) for name, value in copied.state_dict().items())
assert torch.equal(copied(asked["ids"]).logits, model(asked["ids"]).logits)
"""
"""A process that has transformers alone: loads, generates, pads, saves, and loads what it saved."""


def test_the_folder_is_enough_in_a_process_without_this_package(tmp_path: Path) -> None:
    system, trained = built(mixed(), dtype=torch.float32)
    model: Any = system.exported(trained)
    assert isinstance(model, MnemosForCausalLM)
    folder = tmp_path / "a model-1.0"
    folder.mkdir()
    carried = carry_code(model, folder)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    tokenizer.save_pretrained(folder)
    assert getattr(model.config, HASH) == code_hash(folder) and len(carried) == len(list(folder.glob("*.py")))

    ids = tokens()[None, :32].clamp(min=1)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    texts = []
    for prompt in ([1, 2, 3, 4], [5, 6]):
        whole = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
        texts.append(tokenizer.decode(whole, skip_special_tokens=True))
    asked = {
        "ids": ids,
        "logits": model(ids, use_cache=False).logits.detach(),
        "greedy": model.generate(ids, **options),
        "beams": model.generate(ids, num_beams=3, **options),
        "texts": texts,
    }
    torch.save(asked, tmp_path / "asked.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder), str(tmp_path / "again"), str(tmp_path / "asked.pt")],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_hash_is_of_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = code_hash(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert code_hash(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    second = code_hash(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    assert len({first, second, code_hash(tmp_path)}) == 3
