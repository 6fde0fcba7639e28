"""What `eval --suite lifelong` says of its answers: numbers, curves and a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pipeline.evaluation_result import Curve, Evaluation, Row
from pipeline.lm.binomial import wilson
from pipeline.systems.neuromorphic.evaluation.ablations import ALL, BOTH, NOTHING, OWN
from pipeline.systems.neuromorphic.evaluation.lifelong import Answers

SAID = {
    NOTHING: "all on", "WM": "WM off", "PM": "PM off", "EM": "EM off", BOTH: "PM and EM off", ALL: "all off",
    f"{OWN}PM": "PM of another stream", f"{OWN}EM": "EM of another stream",
}  # fmt: skip


def evaluation_of(answers: Sequence[Answers], own: str, chance: float) -> Evaluation:
    """Shares of right answers by distance in documents and in tokens, and after other domains than `own`. Scalars:
    lifelong/WAY/documents_N and forgetting/DOMAIN/documents_N, of the shortest documents."""
    in_own = [answer for answer in answers if answer.domain == own]
    short = [answer for answer in in_own if _is_short(answer, in_own)]
    scalars = {
        f"lifelong/{_key(SAID[answer.way])}/documents_{answer.documents}": answer.right / answer.questions
        for answer in short
    }
    after = [answer for answer in short if answer.way == NOTHING]
    after += [answer for answer in answers if answer.domain != own]
    scalars |= {
        f"forgetting/{_key(answer.domain)}/documents_{answer.documents}": answer.right / answer.questions
        for answer in after
    }
    by_documents = _curve(
        short,
        "Facts asked for in later documents",
        "documents since the fact was told",
        chance,
        lambda answer: answer.documents,
        lambda answer: SAID[answer.way],
    )
    by_tokens = _curve(
        in_own,
        "Facts asked for later, by distance in tokens",
        "tokens since the facts were told",
        chance,
        lambda answer: answer.tokens,
        lambda answer: SAID[answer.way],
        log_x=True,
    )
    forgetting = _curve(
        after,
        "Facts asked for after documents of other domains",
        "documents since the fact was told",
        chance,
        lambda answer: answer.documents,
        lambda answer: answer.domain,
    )
    curves = {
        "lifelong_documents": by_documents, "lifelong_tokens": by_tokens, "lifelong_forgetting": forgetting
    }  # fmt: skip
    return Evaluation(scalars, curves, tables={"lifelong": [_row(answer, chance) for answer in answers]})


def _is_short(answer: Answers, answers: Sequence[Answers]) -> bool:
    """Whether an answer is of the shortest documents: the nearest in tokens at its distance in documents."""
    return answer.tokens == min(a.tokens for a in answers if a.documents == answer.documents)


def _key(said: str) -> str:
    return said.replace(" ", "_").replace("-", "_")


def _row(answer: Answers, chance: float) -> Row:
    low, high = wilson(answer.right, answer.questions)
    return {
        "memories": SAID[answer.way], "domain": answer.domain, "documents": answer.documents, "tokens": answer.tokens,
        "right": answer.right / answer.questions, "low": low, "high": high, "questions": answer.questions,
        "chance": chance,
    }  # fmt: skip


def _curve(
    answers: Sequence[Answers],
    title: str,
    x_label: str,
    chance: float,
    place: Callable[[Answers], int],
    label: Callable[[Answers], str],
    *,
    log_x: bool = False,
) -> Curve:
    """A series a label over the places, of which several lengths of documents may share one. The 95 % interval of the
    first is Wilson's, over questions; the table has those of all."""
    x = sorted({place(answer) for answer in answers})
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for answer in answers:
        right, questions = found.get((label(answer), place(answer)), (0, 0))
        found[label(answer), place(answer)] = right + answer.right, questions + answer.questions
    labels = list(dict.fromkeys(label(answer) for answer in answers))
    series: dict[str, tuple[float, ...]] = {}
    intervals: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {}
    for name in labels:
        at = [found.get((name, p), (0, 0)) for p in x]
        series[name] = tuple(right / questions if questions else math.nan for right, questions in at)
        ends = [wilson(right, questions) for right, questions in at]
        if not intervals:
            intervals[name] = (tuple(low for low, _ in ends), tuple(high for _, high in ends))
    return Curve(
        title,
        x_label,
        "share of right answers",
        tuple(float(p) for p in x),
        series,
        log_x=log_x,
        intervals=intervals,
        interval_over="questions",
        levels={"chance": chance},
    )
