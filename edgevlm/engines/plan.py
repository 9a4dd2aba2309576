"""What a TensorRT plan says of itself, read from its bytes: neither TensorRT nor a GPU is needed.

NVIDIA documents no format. What is read here was seen in plans of TensorRT-RTX 1.7 (magic `vtrt`): the length of the whole at
byte 16, the version at byte 24, and the compute capabilities that it was built for in a text `accelerators={sm86 sm89 }`. Of
classic TensorRT's plans (`ftrt`) the magic alone is known.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from ..errors import EngineError

__all__ = ["PlanHeader", "read_plan_header"]

_RTX, _CLASSIC = b"vtrt", b"ftrt"
_HEADER = struct.Struct("<4s12xQ4B")
_ACCELERATORS = re.compile(rb"accelerators=\{((?:sm\d+ ?)+)\}")


@dataclass(frozen=True)
class PlanHeader:
    """`flavour` is `tensorrt-rtx` or `tensorrt`; `version` and `capabilities` (`sm89`) are empty where they cannot be read."""

    flavour: str
    size: int
    version: str = ""
    capabilities: tuple[str, ...] = ()


def read_plan_header(path: Path) -> PlanHeader:
    """Raises EngineError where the file is no plan, or not the whole of one."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            if len(head) == _HEADER.size and head[:4] == _RTX:
                _, length, *version = _HEADER.unpack(head)
                if length != size:
                    raise EngineError(f"{path} has {size:,} bytes; the plan in it says {length:,}.")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    found = {name for match in _ACCELERATORS.finditer(content) for name in match[1].decode().split()}
                capabilities = tuple(sorted(found, key=lambda name: int(name[2:])))
                return PlanHeader("tensorrt-rtx", size, ".".join(map(str, version)), capabilities)
    except OSError as exc:
        raise EngineError(f"{path} cannot be read: {exc.strerror}.") from exc
    if head[:4] == _CLASSIC:
        return PlanHeader("tensorrt", size)
    raise EngineError(f"{path} is no TensorRT plan: it begins with {head[:4]!r}.")
