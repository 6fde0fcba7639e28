"""One public function per op; each picks the fastest backend that fits behind it. `MemoryLayer` is one as a layer."""

from pipeline.ops.affine_scan import affine_scan
from pipeline.ops.gates import Gates, bounded_gates
from pipeline.ops.memory_layer import MemoryLayer, MemoryState
from pipeline.ops.scan import miras_scan

__all__ = ["Gates", "MemoryLayer", "MemoryState", "affine_scan", "bounded_gates", "miras_scan"]
