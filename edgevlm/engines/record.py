"""Engines on disk: `engines/<target>/<part>.plan`, and `engine.json` beside them, which says what each was built from and for.

An engine is used where everything fits: the part's graph and weights, the flavour and version of TensorRT, the GPU, and the
plan's own bytes. Whatever does not is named. This module is the robot's too: it needs neither TensorRT nor a GPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import Bundle, decode_json, sha256_of
from ..errors import EngineError, ManifestError
from .plan import read_plan_header
from .profiles import Profile

__all__ = [
    "FORM",
    "RECORD",
    "Engine",
    "EngineKey",
    "EngineRecord",
    "Host",
    "check_plan",
    "engine_folder",
    "find_engine",
    "part_hashes",
    "read_records",
    "write_records",
]

RECORD = "engine.json"
#: Grows with every change of what is made of the same graph, so that older engines are built again.
FORM = 1
_SCHEMA = 1


@dataclass(frozen=True)
class EngineKey:
    """All that decides what an engine is. `graph` and `weights` are the sha256 of the part's files in the bundle; `device` is
    the GPU's name where the plan was tuned on it, else empty."""

    graph: str
    weights: str
    flavour: str
    version: str
    capabilities: tuple[str, ...]
    device: str
    precision: str
    profiles: tuple[Profile, ...]
    flags: tuple[str, ...] = ()
    form: int = FORM

    def differences(self, other: EngineKey) -> list[str]:
        """What is another here than there, for people: `precision fp16 instead of bf16`."""
        said = []
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine == theirs:
                continue
            if field.name in ("graph", "weights"):
                said.append(f"the part's {field.name} changed")
            elif field.name == "profiles":
                said.append("other shapes")
            elif field.name == "form":
                said.append("this EdgeVLM builds another form")
            else:
                said.append(f"{field.name} {_shown(theirs)} instead of {_shown(mine)}")
        return said


def _shown(value: Any) -> str:
    return ("+".join(value) if isinstance(value, tuple) else str(value)) or "none"


@dataclass(frozen=True)
class EngineRecord:
    """One engine in `engine.json`. `dtypes` are what inputs and outputs have in the plan, where it is not what the part says;
    `aliases` which output lies in the memory of which input; `layers` counts what the inspection found."""

    key: EngineKey
    sha256: str
    size: int
    capacity: int
    visual_tokens: int
    dtypes: dict[str, str]
    aliases: dict[str, str]
    layers: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class Engine:
    """An engine that may be loaded."""

    path: Path
    part: str
    target: str
    record: EngineRecord


@dataclass(frozen=True)
class Host:
    """What would run an engine: flavour and version of TensorRT, compute capability (`sm89`) and name of the GPU."""

    flavour: str
    version: str
    capability: str
    device: str


def engine_folder(bundle: Bundle, target: str) -> Path:
    return bundle.folder / "engines" / target


def part_hashes(bundle: Bundle, part: str) -> tuple[str, str]:
    """sha256 of a part's graph and of its weights (empty: all of them are in the graph)."""
    file = bundle.manifest.parts[part].file
    weights = bundle.manifest.files.get(f"{file}_data")
    return bundle.manifest.files[file].sha256, weights.sha256 if weights else ""


def read_records(folder: Path) -> dict[str, EngineRecord]:
    """The engines in a folder, by part; none where there is no `engine.json`. Raises EngineError where it cannot be read."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("schema_version") != _SCHEMA:
            raise EngineError(f"{path} is not of the kind that this EdgeVLM writes. `edgevlm build` makes the engines again.")
        records: dict[str, EngineRecord] = decode_json(dict[str, EngineRecord], data.get("parts"), str(path))
    except (OSError, ValueError, RecursionError, ManifestError) as exc:
        raise EngineError(f"{path} is damaged ({exc}). `edgevlm build` makes the engines again.") from exc
    return records


def write_records(folder: Path, records: Mapping[str, EngineRecord]) -> None:
    """Replaces `engine.json` as a whole. Raises OSError."""
    content = {"schema_version": _SCHEMA, "parts": {name: dataclasses.asdict(record) for name, record in records.items()}}
    staged = folder / f"{RECORD}.part"
    try:
        staged.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        staged.replace(folder / RECORD)
    finally:
        staged.unlink(missing_ok=True)


def check_plan(path: Path, record: EngineRecord, *, hashes: bool = True) -> str | None:
    """Why a plan is not the one that the record speaks of, or None."""
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != record.size:
        return f"{path} is truncated or replaced: it has {size:,} bytes, {RECORD} says {record.size:,}"
    try:
        header = read_plan_header(path)
        if header.flavour != record.key.flavour or (header.version and header.version != record.key.version):
            said = f"{record.key.flavour} {record.key.version}"
            return f"{path} is a plan of {header.flavour} {header.version}, {RECORD} says {said}"
        if hashes and sha256_of(path) != record.sha256:
            return f"{path} is damaged: its sha256 is not the one in {RECORD}"
    except (EngineError, OSError) as exc:
        return str(exc).rstrip(".")
    return None


def find_engine(
    bundle: Bundle,
    part: str,
    host: Host,
    *,
    capacity: int | None = None,
    visual_tokens: int | None = None,
    target: str | None = None,
    check_files: bool = True,
) -> Engine | str:
    """The engine of a part that the host can run, or why there is none. `capacity` is the longest sequence that is asked for,
    `visual_tokens` the most that a picture may take.

    With several, the first target by name; `target` asks for one. Nothing is loaded, and nothing is changed.
    """
    root = bundle.folder / "engines"
    folders = [root / target] if target else sorted(p for p in root.glob("*") if p.is_dir() and not p.name.startswith("."))
    reasons = []
    for folder in folders:
        try:
            record = read_records(folder).get(part)
        except EngineError as exc:
            reasons.append(str(exc).rstrip("."))
            continue
        if record is None:
            continue
        reason = next(_misfits(bundle, part, record, host, capacity, visual_tokens), None)
        reason = reason or check_plan(folder / f"{part}.plan", record, hashes=check_files)
        if reason is None:
            return Engine(folder / f"{part}.plan", part, folder.name, record)
        reasons.append(f"{folder.name}: {reason}")
    return "; ".join(reasons) or f"no engine was built for the part {part} (`edgevlm build`)"


def _misfits(
    bundle: Bundle, part: str, record: EngineRecord, host: Host, capacity: int | None, visual_tokens: int | None
) -> Iterator[str]:
    key = record.key
    graph, weights = part_hashes(bundle, part)
    if key.form != FORM:
        yield f"built in form {key.form}, this EdgeVLM reads form {FORM}"
    if key.graph != graph:
        yield "built from another graph of this part"
    if key.weights != weights:
        yield "built from other weights of this part"
    if key.flavour != host.flavour:
        yield f"built with {key.flavour}; here is {host.flavour}"
    if key.version != host.version:
        yield f"built with {key.flavour} {key.version}; here is {host.version}"
    if host.capability not in key.capabilities:
        yield f"built for {'+'.join(key.capabilities)}; this GPU is {host.capability}"
    if key.device and key.device != host.device:
        yield f"tuned on {key.device}; this GPU is {host.device}"
    if capacity is not None and part == "decoder" and capacity > record.capacity:
        bound = f"capacity={record.capacity} bounds it"
        yield f"its KV cache has {record.capacity:,} positions; {capacity:,} were asked for ({bound})"
    if visual_tokens is not None and visual_tokens > record.visual_tokens and _takes_pictures(bundle, part):
        yield (
            f"built for pictures of up to {record.visual_tokens:,} visual tokens; here they may take {visual_tokens:,} "
            f"(visual_tokens={record.visual_tokens} bounds them)"
        )


def _takes_pictures(bundle: Bundle, part: str) -> bool:
    """Whether what a picture takes is a dynamic size of this part."""
    dynamic = {d for info in bundle.manifest.parts[part].inputs.values() for d in info.shape if isinstance(d, str)}
    return bool(dynamic & {"places", "windows", "image_tokens"})


def digest(content: memoryview | bytes) -> str:
    return hashlib.sha256(content).hexdigest()
