"""Devices that models are planned and built for: `targets.toml`, read and checked, and the machine that this runs on.

What is not known of a device is None or absent, never a guess; `sources` says where each figure was read.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError

__all__ = ["KINDS", "LOCAL", "Source", "Target", "TensorRT", "find_target", "load_targets", "local_target", "measure_machine"]

LOCAL = "local"
KINDS = ("jetson", "desktop", "workstation", LOCAL)
#: Types that peaks are given for. int8, fp8, int4 and fp4 are both operands' types.
DTYPES = ("fp32", "fp16", "bf16", "int8", "fp8", "int4", "fp4")
_GIB = 1 << 30
_FILE = Path(__file__).with_name("targets.toml")


@dataclass(frozen=True)
class Source:
    """Where a figure was read, and when."""

    title: str
    url: str
    date: str


@dataclass(frozen=True)
class TensorRT:
    """A TensorRT that makes engines for a device: `tensorrt` or `tensorrt-rtx`, the version, and on Jetson the JetPack that
    brings it."""

    flavour: str
    version: str
    jetpack: str = ""


@dataclass(frozen=True)
class Target:
    """A device. `memory` and `usable` are bytes, `usable_reason` why a model may not take all; `bandwidth` bytes a second;
    `flops` dense peaks (never with sparsity) a second, by dtype. None: not known."""

    id: str
    name: str
    kind: str
    memory: int
    usable: int
    usable_reason: str
    bandwidth: float | None
    flops: Mapping[str, float]
    compute_capability: str | None
    tensorrt: tuple[TensorRT, ...]
    unified_memory: bool
    sources: tuple[Source, ...]
    note: str = ""

    @property
    def runs_on_gpu(self) -> bool:
        """Whether parts run as TensorRT engines; else they run on the CPU, by ONNX Runtime."""
        return self.kind != LOCAL


@functools.cache
def load_targets() -> dict[str, Target]:
    """All devices of `targets.toml`, by id."""
    data = _parse(_FILE.read_text(encoding="utf-8"))
    sources = {name: Source(**entry) for name, entry in data["sources"].items()}
    return {entry["id"]: _target(entry, sources) for entry in data["targets"]}


def _parse(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _target(entry: Mapping[str, Any], sources: Mapping[str, Source]) -> Target:
    return Target(
        id=entry["id"],
        name=entry["name"],
        kind=entry["kind"],
        memory=int(entry["memory_gib"] * _GIB),
        usable=int(entry["usable_gib"] * _GIB),
        usable_reason=entry["usable"],
        bandwidth=entry["bandwidth_gb_s"] * 1e9,
        flops={dtype: peak * 1e12 for dtype, peak in entry["tflops"].items()},
        compute_capability=entry["compute_capability"],
        tensorrt=tuple(TensorRT(**version) for version in entry["tensorrt"]),
        unified_memory=entry["unified_memory"],
        sources=tuple(sources[name] for name in entry["sources"]),
        note=entry.get("note", ""),
    )


def find_target(name: str, *, besides: Sequence[str] = ()) -> Target:
    """A device by its id, or this machine (`local`). Raises InputError with the nearest ids and the list of all, and of what
    the caller takes `besides`."""
    if name == LOCAL:
        return local_target()
    targets = load_targets()
    if name in targets:
        return targets[name]
    known = [LOCAL, *besides, *targets]
    near = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.5)
    near += [id for id in targets if name.lower().replace(" ", "-") in id and id not in near][:4]
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    shown = ", ".join([f"{LOCAL} (this machine)", *besides, *targets])
    raise InputError(f"The target {name!r} is not known.{meant} Known are {shown}.")


def local_target(*, measure: bool = False) -> Target:
    """The machine that this runs on, without its GPU; with `measure`, also its memory's bandwidth and its peak, which takes a
    second."""
    memory = _meminfo()
    total, free = memory.get("MemTotal", 0), memory.get("MemAvailable", 0)
    bandwidth, peak = measure_machine() if measure else (None, None)
    return Target(
        id=LOCAL, name=f"this machine, {len(os.sched_getaffinity(0))} cores", kind=LOCAL, memory=total, usable=free,
        usable_reason="what is available now", bandwidth=bandwidth, flops={"fp32": peak} if peak else {},
        compute_capability=None, tensorrt=(), unified_memory=True, sources=(),
        note="Bandwidth and peak are measured in a second, on a machine that may be busy." if measure else "",
    )  # fmt: skip


def _meminfo() -> dict[str, int]:
    path = Path("/proc/meminfo")
    if not path.exists():
        return {}
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in path.read_text(encoding="ascii").splitlines()}


def measure_machine() -> tuple[float, float]:
    """Bytes a second that reading memory reaches, and operations a second of products of float32 matrices, by NumPy with a
    thread for each core."""
    import numpy as np

    cores = len(os.sched_getaffinity(0))
    sources = [np.ones(8 << 20, np.float64) for _ in range(cores)]
    matrices = [np.ones((512, 512), np.float32) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        read = min(_seconds(lambda: list(pool.map(np.sum, sources))) for _ in range(3))
        product = min(_seconds(lambda: list(pool.map(lambda m: m @ m, matrices))) for _ in range(8))
    return sum(source.nbytes for source in sources) / read, cores * 2 * 512**3 / product


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
