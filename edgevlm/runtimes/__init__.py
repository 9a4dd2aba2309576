"""Backends, best first, and the choice between them, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Part
from ..errors import InputError
from .base import Backend, BackendUnavailable, Memory, PartSession, State
from .ort import CPU, CUDA

__all__ = ["BACKENDS", "Backend", "Choice", "Memory", "PartSession", "State", "open_part"]

BACKENDS: Mapping[str, Backend] = {backend.name: backend for backend in (CUDA(), CPU())}


@dataclass(frozen=True)
class Choice:
    """The backend that runs a part, and why each better one does not: `{"cuda": "…"}`."""

    backend: str
    passed_over: dict[str, str]


def open_part(path: Path, name: str, part: Part, *, backend: str | None, threads: int | None) -> tuple[PartSession, Choice]:
    """Opens a part on the backend asked for, or on the best that works here.

    Raises InputError where the one asked for is unknown or does not work: what was asked for is never replaced silently.
    """
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"There is no backend {backend!r}; there are {', '.join(BACKENDS)}.")
    passed_over: dict[str, str] = {}
    for candidate in [BACKENDS[backend]] if backend else BACKENDS.values():
        reason = candidate.lacks(part) or candidate.unavailable()
        if reason is None:
            try:
                return candidate.open(path, name, part, threads), Choice(candidate.name, passed_over)
            except BackendUnavailable as exc:
                reason = str(exc)
        passed_over[candidate.name] = reason
    why = "; ".join(f"{candidate}: {reason}" for candidate, reason in passed_over.items())
    raise InputError(f"No backend can run the part {name} here. {why}. `edgevlm doctor` shows what is there.")
