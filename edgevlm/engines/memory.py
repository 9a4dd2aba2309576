"""How much memory a build takes, predicted before it begins."""

from __future__ import annotations

from pathlib import Path

from ..bundle import Part

__all__ = ["available_memory", "predict_peak"]

_BASE = 450 << 20
_PER_BYTE = 3.0
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def predict_peak(part: Part, precision: str) -> int:
    """Bytes that building a part takes at its peak."""
    return int(_BASE + _PER_BYTE * weight_bytes(part, precision))


def weight_bytes(part: Part, precision: str) -> int:
    """Bytes of a part's weights in an engine: floats in its precision, codes as they are."""
    return sum(size // _BYTES[dtype] * _BYTES[precision] if dtype in _BYTES else size for dtype, size in part.weights.items())


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
