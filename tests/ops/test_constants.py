"""The mark is torch's own, and importing the ops does not import the compiler."""

from __future__ import annotations

import subprocess
import sys

import torch

from pipeline.ops.constants import constant_result


def test_the_mark_is_that_of_torch() -> None:
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert constant_result(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs))


def test_the_ops_do_not_import_the_compiler() -> None:
    words = [sys.executable, "-c", "import sys, pipeline.ops; sys.exit('torch._dynamo' in sys.modules)"]
    assert subprocess.run(words, check=False).returncode == 0
