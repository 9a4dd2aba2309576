"""How much memory a build takes, predicted before it begins: a base, and a multiple of the weights by their type.

Measured with TensorRT-RTX 1.7 on decoders of 24 and 142 million weights, as the largest anonymous memory of the process; the
numbers are in docs/engines.md. It holds weights as parsed, optimized and serialized, and unpacks INT4 to bytes. Pages of mapped
files are not counted, they can be dropped. What classic TensorRT takes while it times kernels is not known here.
"""

from __future__ import annotations

from pathlib import Path

from ..bundle import Part

__all__ = ["available_memory", "predict_peak"]

_BASE = 260e6
#: Bytes of memory for each byte of weights.
_FACTORS = {"float32": 2.2, "float16": 3.6, "bfloat16": 3.6, "int8": 3.0, "uint8": 3.0, "int4": 6.0, "uint4": 6.0}
_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


def predict_peak(part: Part, precision: str) -> int:
    """Bytes that building a part takes at its peak; `precision` is what its floats become."""
    peak = _BASE
    for dtype, size in part.weights.items():
        if dtype in _WIDTHS:
            dtype, size = precision, size // _WIDTHS[dtype] * _WIDTHS[precision]
        peak += _FACTORS.get(dtype, 3.0) * size
    return int(peak)


def available_memory() -> int | None:
    """Bytes that this process may still take, or None where that is not known."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = {line.split(":")[0]: line.split()[1] for line in meminfo.read_text(encoding="ascii").splitlines()}
        limits.append(1024 * int(lines.get("MemAvailable", "0")))
    most, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if most.is_file() and used.is_file() and (text := most.read_text(encoding="ascii").strip()).isdigit():
        limits.append(int(text) - int(used.read_text(encoding="ascii")))
    return min(limits, default=None)
