"""Scores through the harness: those that its own class for transformers gives of the same weights, with their facts."""

from __future__ import annotations

import dataclasses
import logging
import random
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipeline.data.tokenizer import ByteTokenizer, load_tokenizer
from pipeline.downstream.harness_model import HarnessModel
from pipeline.downstream.logits_scorer import LogitsScorer
from pipeline.downstream.quiet import harness
from pipeline.downstream.requests import Likelihood, Request
from pipeline.downstream.scores import Score, as_evaluation, score_tasks
from pipeline.downstream.tasks import Loaded, load_tasks
from pipeline.errors import UserError
from pipeline.inference.texts import decoder_of
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from tests.downstream.small import CHOSEN, DOCUMENTS, write_tasks
from tests.lm.olmo_reference import small_config, small_decoder

ALL = (CHOSEN, f"{CHOSEN}_shots", "last_word", "whole_text", "goes_on")
LIMIT = 40


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    group = "group: words\ntask: [three_words, three_words_shots]\naggregate_metric_list:\n  - metric: acc\n"
    (folder / "words.yaml").write_text(group)
    return load_tasks(["words", *ALL[2:]], str(folder), Topology(), "--tasks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of LIMIT positions and its tokenizer, as `save_pretrained` writes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    found = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*letters, "<end>"])}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>").save_pretrained(found)
    config = small_config("first", tied=True, vocab_size=257, max_position_embeddings=LIMIT)
    small_decoder(config).save_pretrained(found)
    return found


def model_of(folder: Path) -> HarnessModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scorer = LogitsScorer(model, 256, LIMIT)
    return HarnessModel(scorer, load_tokenizer(str(folder)), SyncPoint(Topology()), decoder_of(model))


def test_scores_are_those_of_the_harness_with_transformers(loaded: Loaded, folder: Path) -> None:
    """Its own class, on the folder: likelihoods, truncation, windows of long texts and generated text alike."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    found = score_tasks(loaded, model_of(folder))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    reference = HFLM(str(folder), device="cpu", dtype="float32", batch_size=4)
    expected = evaluate(reference, loaded, bootstrap_iters=0, log_samples=False)["results"]
    assert len(found) == 9
    for score in found:
        value = expected[score.task][f"{score.metric},none"]
        assert score.value == pytest.approx(value, rel=1e-4), score
    assert {score.task: score.truncated for score in found} == {
        CHOSEN: 21, f"{CHOSEN}_shots": 21, "last_word": 7, "whole_text": 0, "goes_on": 7, "words": 42,
    }  # fmt: skip


class Known:
    """A scorer that knows the right answers: a continuation is the likelier the earlier it stands in `best`."""

    limit = None

    def __init__(self, best: list[str]) -> None:
        self.best = best

    def score(self, requests: Any) -> list[Likelihood]:
        texts = [ByteTokenizer().decode(request.continuation).strip() for request in requests]
        return [Likelihood(-float(self.best.index(text)) if text in self.best else -99.0, False) for text in texts]


def known(best: list[str]) -> HarnessModel:
    return HarnessModel(Known(best), ByteTokenizer(), SyncPoint(Topology()))


def only(loaded: Loaded, *names: str) -> Loaded:
    return {"tasks": {name: loaded["tasks"][name] for name in names}, "groups": {}, "group_map": {}}


def test_a_score_comes_with_its_facts(loaded: Loaded) -> None:
    right = [document["choices"][document["gold"]] for document in DOCUMENTS]  # type: ignore[index]
    accuracy, norm = score_tasks(only(loaded, CHOSEN), known(right[:5]))
    # Of the last two documents nothing is known: the first of equals is chosen, and is wrong, unless it was seen above.
    expected = [
        max(document["choices"], key=lambda word: -right[:5].index(word) if word in right[:5] else -99)  # type: ignore
        == document["choices"][document["gold"]]  # type: ignore[index]
        for document in DOCUMENTS
    ]
    share = sum(expected) / 7
    assert 0 < share < 1 and accuracy.value == pytest.approx(share)
    assert accuracy.stderr == pytest.approx((share * (1 - share) / 6) ** 0.5)
    assert accuracy.name == f"downstream/{CHOSEN}/acc" and norm.metric == "acc_norm"
    facts = {"n": 7, "split": "test", "chance": pytest.approx(1 / 3), "shots": 0, "version": "1.5", "truncated": 0}
    assert {name: getattr(accuracy, name) for name in facts} == facts
    assert len(accuracy.prompt_hash) == 16


def test_a_group_is_scored_behind_its_tasks(loaded: Loaded) -> None:
    words = {**only(loaded, CHOSEN, f"{CHOSEN}_shots"), "groups": loaded["groups"]}
    *tasks, group = score_tasks(words, known(["red", "mouse"]))
    assert group.task == "words" and group.n == 14 and group.split == "test" and group.metric == "acc"
    assert group.value == pytest.approx(sum(score.value for score in tasks if score.metric == "acc") / 2)
    assert group.chance == pytest.approx(1 / 3) and group.prompt_hash not in {score.prompt_hash for score in tasks}


def test_prompts_are_the_same_every_time_and_their_hash_says_so(loaded: Loaded) -> None:
    """Examples of a prompt are drawn; the hash is of every request, in order."""
    shots = only(loaded, f"{CHOSEN}_shots")
    first, again = (score_tasks(shots, known(["red"])) for _ in range(2))
    assert first == again
    fewer = score_tasks(shots, known(["red"]), limit=6)
    assert fewer[0].n == 6 and fewer[0].prompt_hash != first[0].prompt_hash
    plain = score_tasks(only(loaded, CHOSEN), known(["red"]))
    assert plain[0].prompt_hash != first[0].prompt_hash and plain[0].shots == 0 and first[0].shots == 2


def test_the_processs_own_state_stays(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    score_tasks(only(loaded, "last_word"), known(["red"]))
    assert (random.random(), np.random.rand(), torch.rand(())) == expected
    printed = capsys.readouterr()
    assert not printed.out and not printed.err


def test_what_other_threads_say_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    """The harness prints and warns in this thread; the monitor of ranks speaks in one of its own."""
    with harness():
        print("a progress bar")
        print("a bar", file=sys.stderr)
        logging.getLogger("lm_eval.tasks").warning("a warning of the harness")
        logging.getLogger("lm_eval.tasks").info("a detail")
        other = threading.Thread(target=lambda: print("rank 1 stalls", file=sys.stderr))
        other.start()
        other.join()
    print("after")
    found = capsys.readouterr()
    assert found.out == "after\n"
    assert found.err.splitlines() == ["a warning of the harness", "rank 1 stalls"]


def test_scalars_hold_the_numbers_and_the_table_all() -> None:
    score = Score("words", "acc", 0.5, None, 4, "test", 0.25, 0, "1.0", 1, "0" * 16)
    other = dataclasses.replace(score, metric="f1", stderr=0.125, chance=None)
    found = as_evaluation([score, other])
    assert found.scalars == {
        "downstream/words/acc": 0.5, "downstream/words/chance": 0.25, "downstream/words/n": 4,
        "downstream/words/f1": 0.5, "downstream/words/f1_stderr": 0.125,
    }  # fmt: skip
    assert list(found.tables["downstream"]) == [dataclasses.asdict(score), dataclasses.asdict(other)]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("goes_on", {}, "task goes_on generates text, which needs a model that is whole on every rank and can decode"),
        (CHOSEN, {"limit": 3}, f"task {CHOSEN}: a continuation of . tokens, and the model reads 3: leave the task out"),
    ],
)
def test_what_a_model_cannot_do_is_one_line(loaded: Loaded, name: str, changes: dict[str, int], message: str) -> None:
    model = known(["red"])
    vars(model.scorer).update(changes)
    with pytest.raises(UserError, match=message):
        score_tasks(only(loaded, name), model)


def test_a_task_that_draws_its_text_is_refused(loaded: Loaded, folder: Path) -> None:
    model, task = model_of(folder), loaded["tasks"]["goes_on"]
    before = dict(task.config.generation_kwargs)
    for changes, message in (
        ({"do_sample": True, "temperature": 0.7}, "task goes_on draws its text at random: only greedy decoding"),
        ({"max_gen_toks": LIMIT}, f"task goes_on generates {LIMIT} tokens, and the model reads {LIMIT} in all"),
    ):
        task.set_config("generation_kwargs", {**before, **changes})
        with pytest.raises(UserError, match=message):
            score_tasks(only(loaded, "goes_on"), model)
    task.set_config("generation_kwargs", before)


def test_a_text_without_a_context_stands_behind_the_end_of_a_document() -> None:
    asked: list[Request] = []

    class Asked(Known):
        def score(self, requests: Any) -> list[Likelihood]:
            asked.extend(requests)
            return super().score(requests)

    from lm_eval.api.instance import Instance

    model = HarnessModel(Asked(["a"]), ByteTokenizer(), SyncPoint(Topology()))
    for context, continuation in (("", "a"), ("b ", "a")):
        model.loglikelihood([Instance("loglikelihood", {}, (context, continuation), 0, ("x", 0, 1))])
    assert asked == [Request([256], [97]), Request([98], [32, 97])], "a space belongs to what follows it"
