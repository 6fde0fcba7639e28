"""A task in the harness's YAML form, with data of its own: which of three words follows a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

CHOICES = [["red", "green", "blue"], ["cat", "do", "mouse"], ["one", "two", "three"], ["up", "down", "left"]]
DOCUMENTS = [
    {"text": f"Item {number} of the list, which goes on for a while, is", "choices": CHOICES[number % 4], "gold": gold}
    for number, gold in enumerate([0, 2, 1, 1, 0, 2, 2])
]
CHOSEN = "three_words"
"""A task of seven documents with three choices each: `acc` and `acc_norm`, on the split `test`."""


def write_tasks(folder: Path) -> Path:
    """The folder with the tasks: `three_words`, `three_words_shots` (two examples in the prompt), `last_word` (a
    likelihood), `whole_text` (of a text without a context) and `goes_on` (generates)."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    accuracy = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    choice = {
        **shared, "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold", "metric_list": accuracy, "metadata": {"version": 1.5},
    }  # fmt: skip
    write(folder, {**choice, "task": CHOSEN})
    write(folder, {**choice, "task": f"{CHOSEN}_shots", "num_fewshot": 2, "fewshot_split": "train"})
    mean = [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ]
    last = {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": " {{choices[gold]}}"}
    write(folder, {**shared, **last, "task": "last_word", "metric_list": mean})
    bits = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    whole = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    write(folder, {**shared, **whole, "task": "whole_text", "metric_list": bits})
    match = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    goes_on = {
        **shared, "task": "goes_on", "output_type": "generate_until", "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[gold]}}", "metric_list": match,
        "generation_kwargs": {"until": ["."], "max_gen_toks": 5, "do_sample": False},
    }  # fmt: skip
    write(folder, goes_on)
    return folder


def write(folder: Path, task: dict[str, object]) -> None:
    (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
