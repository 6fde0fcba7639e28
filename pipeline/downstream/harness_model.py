"""The model as lm-evaluation-harness sees it. Imported where tasks are run, since the harness takes its time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pipeline.data.tokenizer import Tokenizer
from pipeline.downstream.generation import Prompt, continuations, prompt_room
from pipeline.downstream.requests import Request, Scorer, removed
from pipeline.errors import UserError
from pipeline.lm.decoding import Decoder
from pipeline.parallel.collectives import all_gather_object
from pipeline.runtime.sync import SyncPoint

ROWS = 16
"""Prompts that are gone on with side by side."""


class HarnessModel(TemplateLM):
    """Every rank is asked for all requests, and gets all answers: the ranks divide the work among themselves.

    A text is encoded as in training, without special tokens; one without a context stands behind the token that ends
    documents.
    """

    def __init__(
        self, scorer: Scorer, tokenizer: Tokenizer, sync_point: SyncPoint, decoder: Decoder | None = None
    ) -> None:
        """`decoder`: for tasks that generate text, whole on every rank; None: they are refused."""
        super().__init__()
        self.scorer, self.text, self.sync_point, self.decoder = scorer, tokenizer, sync_point, decoder
        self.truncated: Counter[str] = Counter()
        """Requests by task whose first tokens were left out, since the model reads no more."""
        self._tasks: list[str] = []

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        found: list[int] = self.text.encode(string).tolist()
        return found

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each continuation behind its context: nats, and whether it is what greedy decoding gives."""
        self._tasks = [str(request.task_name) for request in requests]
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        asked = [Request(context, continuation) for _, context, continuation in requests]
        for task, request in zip(self._tasks, asked, strict=True):
            self._check(task, request)
            self.truncated[task] += removed(request, self.scorer.limit) > 0
        return [(found.log_likelihood, found.greedy) for found in self.scorer.score(asked)]

    def _check(self, task: str, request: Request) -> None:
        limit, length = self.scorer.limit, len(request.continuation)
        if not length:
            raise UserError(f"task {task}: the tokenizer has no tokens for a continuation: leave the task out")
        if limit is not None and length > limit:
            raise UserError(
                f"task {task}: a continuation of {length} tokens, and the model reads {limit}: leave the task out"
            )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of each whole text. What the model cannot read at once is read in windows, each behind the last token of the
        one before it; the last window reaches back as far as it can."""
        windows: list[Request] = []
        ends = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text)
            longest = self.scorer.limit or max(1, len(ids))
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=longest, context_len=1)
            windows += [Request(*make_disjoint_window(pair)) for pair in pairs]
            ends.append(len(windows))
        found = [value for value, _ in self.scorer.score(windows)]
        return [math.fsum(found[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What greedy decoding goes on with. Raises UserError for a task that draws."""
        if self.decoder is None:
            raise UserError(
                f"task {requests[0].task_name} generates text, which needs a model that is whole on every rank and can"
                " decode: leave the task out"
            )
        topology = self.sync_point.topology
        prompts = [self._prompt(request) for request in requests]
        answers: dict[int, str] = {}
        for begin in range(0, len(prompts), ROWS * topology.world):
            self.sync_point("evaluation")
            numbers = range(begin + topology.rank, min(begin + ROWS * topology.world, len(prompts)), topology.world)
            texts = continuations(self.decoder, self.text, [prompts[number] for number in numbers])
            answers.update(zip(numbers, texts, strict=True))
        for part in all_gather_object(topology, answers):
            answers.update(part)
        return [answers[number] for number in range(len(prompts))]

    def _prompt(self, request: Instance) -> Prompt:
        context, given = request.args
        options = normalize_gen_kwargs(given)
        if options["do_sample"]:
            raise UserError(f"task {request.task_name} draws its text at random: only greedy decoding is supported")
        assert self.decoder is not None
        most, ids = options["max_gen_toks"], self.tok_encode(context) or [self.prefix_token_id]
        room = prompt_room(self.decoder, most)
        if room is not None and room < 1:
            raise UserError(
                f"task {request.task_name} generates {most} tokens, and the model reads {self.decoder.limit} in all:"
                " leave the task out"
            )
        self.truncated[str(request.task_name)] += room is not None and len(ids) > room
        return Prompt(ids, most, tuple(word for word in _words(options["until"]) if word))


def _words(until: Sequence[str] | str) -> Sequence[str]:
    return (until,) if isinstance(until, str) else until
