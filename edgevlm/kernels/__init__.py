"""Products with INT4 and INT8 weights (`matmul.c`), and attention (`attention.c`), for x86 processors with AVX-512 VNNI, as
operators for ONNX Runtime.

They are compiled when the package is installed, where there is a C compiler; without them, ONNX Runtime's own kernels do the
same. See docs/performance.md for what they gain.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path

__all__ = ["SWITCH", "find_library", "unavailable"]

#: Set to 0, this environment variable leaves all products to ONNX Runtime.
SWITCH = "EDGEVLM_KERNELS"


@functools.cache
def _library() -> Path | None:
    return next(iter(sorted(Path(__file__).parent.glob("_operators*.so"))), None)


@functools.cache
def _usable(library: Path) -> bool:
    return bool(ctypes.CDLL(str(library)).edgevlm_usable())


def unavailable() -> str | None:
    """Why ONNX Runtime's own kernels are used here, or None."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"they are for x86, this is {platform.machine()}"
    library = _library()
    if library is None:
        return "they were not compiled: install a C compiler, then the package again"
    return None if _usable(library) else "this processor has no AVX-512 VNNI"


def find_library() -> Path | None:
    """The library for `SessionOptions.register_custom_ops_library`, or None where it cannot be used."""
    return None if unavailable() else _library()
