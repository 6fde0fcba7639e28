"""Flags of other trainers' command lines."""

from __future__ import annotations

import pytest

from pipeline.commands.flags import parse_run, with_listed_paths
from pipeline.errors import UserError


@pytest.mark.parametrize(
    "value, names",
    [("[a.npy]", ["a.npy"]), ("['a b.npy', \"c.npy\"]", ["a b.npy", "c.npy"]), (" [ x , y ] ", ["x", "y"])],
)
@pytest.mark.parametrize("joined", [True, False])
def test_a_list_of_paths_is_that_of_token_files(value: str, names: list[str], joined: bool) -> None:
    words = [f"--data.paths={value}"] if joined else ["--data.paths", value]
    assert with_listed_paths(["olmo_1b", *words, "--steps", "3"]) == [
        "olmo_1b",
        "--steps",
        "3",
        "--data.tokens",
        *names,
    ]
    assert parse_run(["olmo_1b", *words], "train", ranks=1).data.tokens == tuple(names)


@pytest.mark.parametrize("value", ["a.npy", "[a.npy", "[]", "[a,,b]"])
def test_a_path_that_is_no_list_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"give a list, --data.paths='\[FILE, ...\]', or --data.tokens FILE"):
        with_listed_paths([f"--data.paths={value}"])
