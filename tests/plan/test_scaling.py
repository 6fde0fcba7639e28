"""`plan --tokens`: times on one device and on eight, and what others have stated."""

from __future__ import annotations

import shlex

import pytest

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.host.devices import find_device
from pipeline.plan.scaling import duration, needed_share, token_counts

GUIDE = "olmo_1b --device A100 --tokens 1B,10B,100B,3T"


def printed(words: str, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The rows of the table, split at two spaces or more."""
    assert main(["plan", *shlex.split(words)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("scaling on"))
    return [[cell for cell in line.split("  ") if cell.strip()] for line in lines[start + 1 :]]


def test_the_guides_table_stands_beside_what_is_possible(capsys: pytest.CaptureFixture[str]) -> None:
    head, *rows = printed(GUIDE, capsys)
    assert [cell.strip() for cell in head][-2:] == ["published for A100", "share of its peak"]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [
        (tokens, devices) for tokens in ("1B", "10B", "100B", "3T") for devices in ("1", "8")
    ]
    # 1e9 tokens x 7.463 GFLOP a token / 312 TFLOP/s: 6.64 hours, and the guide has 5.6.
    assert [cell.strip() for cell in rows[0][2:]] == ["16.6 h", "6.6 h", "5.6 h", "119%: not possible"]
    assert all(row[-1].endswith("not possible") for row in rows)


def test_a_model_of_which_nothing_is_stated_has_no_such_columns(capsys: pytest.CaptureFixture[str]) -> None:
    head, row, _ = printed("olmo2_1b --device H100 --tokens 2.5K --utilisation 0.5", capsys)
    assert [cell.strip() for cell in head] == ["tokens", "devices", "50% of the peak", "least possible"]
    assert row[0].strip() == "2.5K"


def test_numbers_of_tokens() -> None:
    assert token_counts("1B,2.5T, 3") == {"1B": 10**9, "2.5T": 25 * 10**11, "3": 3}


@pytest.mark.parametrize("words", ["", "1X", "-1B", "0", "1B,,2B", "B"])
def test_what_is_no_number_of_tokens_is_refused(words: str) -> None:
    with pytest.raises(UserError, match="give numbers of tokens above 0, such as 1B or 1B,10B,3T"):
        token_counts(words)


def test_a_table_of_times_is_of_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "olmo_1b", "--all-devices", "--tokens", "1B"]) == 2
    assert "--tokens and --all-devices are both given" in capsys.readouterr().err


def test_the_guides_rate_is_more_than_the_device_has() -> None:
    """49,500 tokens/s, which reference and guide have for one A100, is 118 % of it with causal attention."""
    device = find_device("A100")
    assert device is not None
    assert needed_share(49_500 * 3600, 1.0, 1, device, 7.463e9) == pytest.approx(1.184, abs=1e-3)


@pytest.mark.parametrize(
    "hours, text", [(0.5, "30 min"), (1, "1.0 h"), (71, "71.0 h"), (72, "3.0 days"), (8766, "1.0 years")]
)
def test_durations_are_in_units_that_a_person_uses(hours: float, text: str) -> None:
    assert duration(hours) == text
