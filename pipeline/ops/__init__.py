"""One public function per op; each picks the fastest backend that fits behind it."""

from pipeline.ops.scan import miras_scan

__all__ = ["miras_scan"]
