"""Backends, best first, and the choice between them, part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..bundle import Part
from ..errors import InputError
from .base import Backend, BackendUnavailable, Memory, Model, PartSession, State, Tensor
from .device import Device, Rows
from .frames import DeviceFrame, frame_of
from .ort import CPU
from .ort_cuda import CUDA
from .tensorrt import TensorRT

__all__ = [
    "AUTO", "BACKENDS", "Asked", "Backend", "Choice", "Device", "DeviceFrame", "Memory", "Model", "PartSession", "Rows",
    "State", "Tensor", "ask", "frame_of", "open_part",
]  # fmt: skip

BACKENDS: Mapping[str, Backend] = {backend.name: backend for backend in (TensorRT(), CUDA(), CPU())}
AUTO = "auto"

#: One backend for all parts, or one for each part named; `auto` (or None) is the best that works.
Asked = str | Mapping[str, str] | None


@dataclass(frozen=True)
class Choice:
    """The backend that runs a part, and why each better one does not: `{"cuda": "…"}`."""

    chosen: str
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def tried(self) -> tuple[str, ...]:
        """In their order, the chosen one last."""
        return (*self.reasons, self.chosen)


def ask(asked: Asked, parts: Sequence[str]) -> dict[str, str | None]:
    """What was asked for each part, None: the best that works. Text may be `part=name,part=name`, as on the command line.

    Raises InputError for a backend or a part that there is not.
    """
    if isinstance(asked, str) and "=" in asked:
        pairs = [pair.partition("=") for pair in asked.split(",")]
        asked = {part.strip(): name.strip() for part, _, name in pairs}
    by_part = asked if isinstance(asked, Mapping) else dict.fromkeys(parts, asked or AUTO)
    if unknown := [part for part in by_part if part not in parts]:
        raise InputError(f"A backend is asked for the part {', '.join(map(repr, unknown))}; there are {', '.join(parts)}.")
    for name in by_part.values():
        if name != AUTO and name not in BACKENDS:
            raise InputError(f"There is no backend {name!r}; there are {', '.join(BACKENDS)}, and {AUTO}: the best that works.")
    return {part: None if by_part.get(part, AUTO) == AUTO else by_part[part] for part in parts}


def open_part(
    path: Path, name: str, part: Part, *, backend: str | None = None, threads: int | None = None, model: Model | None = None
) -> tuple[PartSession, Choice]:
    """Opens a part on the backend asked for, or on the best that works here.

    `model` is what the part shares with others; without, it stands alone. Raises InputError where the backend asked for is
    unknown or does not work: what was asked for is never replaced silently.
    """
    model = model or Model(threads=threads)
    wanted = ask(backend, [name])[name]
    reasons: dict[str, str] = {}
    for candidate in [BACKENDS[wanted]] if wanted else BACKENDS.values():
        reason = candidate.lacks(part) or candidate.unavailable()
        if reason is None:
            try:
                return candidate.open(path, name, part, model), Choice(candidate.name, reasons)
            except BackendUnavailable as exc:
                reason = str(exc)
        reasons[candidate.name] = reason
    why = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    raise InputError(f"No backend can run the part {name} here. {why}. `edgevlm doctor` shows what is there.")
