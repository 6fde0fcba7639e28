"""One public function per op; each picks the fastest backend that fits behind it."""

from pipeline.ops.affine_scan import affine_scan
from pipeline.ops.scan import miras_scan

__all__ = ["affine_scan", "miras_scan"]
