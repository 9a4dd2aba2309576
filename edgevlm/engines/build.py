"""`edgevlm build`: the parts of a bundle become TensorRT engines for a target.

    graph → [`cast`: precision] → [`fit`: what TensorRT insists on] → parsed → [`inspection`] → built → renamed into place

An engine that is there and fits is left alone. Each is whole or not there at all: plans are written into a hidden folder and
renamed, and `engine.json` is replaced behind them, so an interrupted build keeps the parts that were through. The bundle's own
files are not touched. Where TensorRT lies in it is in `tensorrt`; the robot reads what was built with `record`.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ..bundle import Bundle, scratch_folder
from ..errors import EngineError, InputError, OutputError
from ..graphs import load_graph, save_graph
from ..images import ImageProcessor
from .cast import cast_graph
from .fit import fix_dimensions, mark_decomposable, pack_tables, shield_masks
from .inspection import check_network, expected_of
from .lower import lower_graph
from .memory import available_memory, predict_peak
from .plan import read_plan_header
from .profiles import Limits, Profile, limits_for, profiles_for
from .record import (
    EngineKey,
    EngineRecord,
    check_plan,
    digest,
    engine_folder,
    part_hashes,
    read_records,
    write_records,
)
from .target import BuildTarget, build_target
from .tensorrt import TensorRT, open_tensorrt

__all__ = ["PRECISIONS", "Built", "build_engines"]

PRECISIONS = {
    "fp16": ("float16", ir.DataType.FLOAT16),
    "bf16": ("bfloat16", ir.DataType.BFLOAT16),
    "fp32": ("float32", ir.DataType.FLOAT),
}
_TIMINGS = "timing.cache"
_OPSET_24 = (10, 15)


@dataclass(frozen=True)
class Built:
    """What became of a part. `why` says why it was built, and is empty where the engine that was there fits."""

    part: str
    path: Path
    record: EngineRecord
    why: str = ""


def build_engines(
    bundle: str | Path,
    target: str,
    *,
    precision: str = "fp16",
    capacity: int | None = None,
    visual_tokens: int | None = None,
    parts: Sequence[str] | None = None,
    force: bool = False,
    rebuild: bool = False,
    stage: Callable[[str], None] = lambda _: None,
    progress: Callable[[float, str], None] = lambda *_: None,
) -> list[Built]:
    """Builds what is missing or does not fit any more, part by part.

    `parts` are all unless told otherwise; `rebuild` makes them anew even so; `force` tries where the memory is predicted not
    to suffice. Raises InputError, BundleError, EngineError, MissingDependencyError, OutputError.
    """
    chosen = build_target(target)
    if precision not in PRECISIONS:
        raise InputError(f"There is no precision {precision!r}; there are {', '.join(PRECISIONS)}.")
    tensorrt = open_tensorrt(chosen.flavour)
    opened = Bundle.open(bundle)
    limits = limits_for(opened.manifest, capacity=capacity, visual_tokens=visual_tokens, most_tokens=_most_tokens(opened))
    names = _check_parts(opened, parts)
    keys = {name: _key(opened, name, chosen, tensorrt, precision, limits) for name in names}
    reasons = {name: "asked for" if rebuild else _why(opened, name, chosen, keys[name]) for name in names}
    if not force:
        _check_memory(opened, [name for name in names if reasons[name]], precision)
    done = []
    for name in names:
        if reasons[name]:
            stage(f"building {name} for {target} ({reasons[name]})")
            record = _build_part(opened, name, chosen, tensorrt, keys[name], limits, progress)
        else:
            record = read_records(engine_folder(opened, target))[name]
        done.append(Built(name, engine_folder(opened, target) / f"{name}.plan", record, reasons[name]))
    return done


def _check_parts(bundle: Bundle, asked: Sequence[str] | None) -> list[str]:
    parts = bundle.manifest.parts
    if unknown := [name for name in asked or () if name not in parts]:
        raise InputError(f"This bundle has no part {', '.join(unknown)}; it has {', '.join(parts)}.")
    names = [name for name in parts if not asked or name in asked]
    if beyond := [f"{name} ({', '.join(parts[name].onnxruntime_only)})" for name in names if parts[name].onnxruntime_only]:
        others = [name for name in parts if not parts[name].onnxruntime_only]
        instead = f"; --parts {','.join(others)} builds the others" if others else ""
        raise EngineError(
            f"TensorRT does not take what is in {'; '.join(beyond)}: these parts run on ONNX Runtime alone. Quantize with "
            f"int8, or with int4 in blocks that divide the inputs of every layer, for TensorRT{instead}."
        )
    for name in names:
        kept = {info.dtype for tensor, info in parts[name].inputs.items() if tensor.startswith("past_key_values.")}
        if "int8" in kept:
            raise EngineError(
                f"The part {name} keeps its KV cache in int8; TensorRT's cache layer takes floats alone. Quantize with "
                "--kv-cache float for TensorRT."
            )
    return names


def _most_tokens(bundle: Bundle) -> int | None:
    """The most places that the bundle's own preprocessing makes of a picture, or None where it says nothing."""
    manifest = bundle.manifest
    for file, entry in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = bundle.folder / file
        if not path.is_file():
            continue
        config = json.loads(path.read_text(encoding="utf-8"))
        processor = ImageProcessor.from_config({**(config.get(entry, {}) if entry else config), **manifest.image_options})
        return processor.most_places(manifest.image.places)
    return None


def _key(bundle: Bundle, part: str, target: BuildTarget, tensorrt: TensorRT, precision: str, limits: Limits) -> EngineKey:
    graph, weights = part_hashes(bundle, part)
    manifest = bundle.manifest
    return EngineKey(
        graph, weights, tensorrt.flavour, tensorrt.version, target.capabilities, target.device, precision,
        profiles_for(part, manifest.parts[part], manifest, limits), ("strongly_typed", *["lowered"] * _is_old(tensorrt)),
    )  # fmt: skip


def _is_old(tensorrt: TensorRT) -> bool:
    """Whether it lacks Attention, TensorScatter, RMSNormalization and RotaryEmbedding. The first that has them is 10.15."""
    return tensorrt.flavour == "tensorrt" and tensorrt.release < _OPSET_24


def _why(bundle: Bundle, part: str, target: BuildTarget, key: EngineKey) -> str:
    """Why an engine has to be built, empty where the one that is there fits."""
    folder = engine_folder(bundle, target.name)
    try:
        record = read_records(folder).get(part)
    except EngineError as exc:
        return str(exc).split(". `")[0]
    if record is None:
        return "not there yet"
    if differences := key.differences(record.key):
        return ", ".join(differences)
    return check_plan(folder / f"{part}.plan", record) or ""


def _check_memory(bundle: Bundle, parts: Sequence[str], precision: str) -> None:
    available = available_memory()
    if available is None:
        return
    for name in parts:
        part = bundle.manifest.parts[name]
        if (peak := predict_peak(part, PRECISIONS[precision][0])) > available:
            raise OutputError(
                f"Building the part {name} takes about {peak / 1e9:,.1f} GB of memory, and {available / 1e9:,.1f} GB are "
                "available. End other programs, build on a larger machine, or --force to try."
            )


def _build_part(
    bundle: Bundle, part: str, target: BuildTarget, tensorrt: TensorRT, key: EngineKey, limits: Limits,
    progress: Callable[[float, str], None],
) -> EngineRecord:  # fmt: skip
    folder, began = engine_folder(bundle, target.name), time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder) as scratch:
            model = prepare_part(bundle, part, key.precision, key.profiles, lowered="lowered" in key.flags)
            expected = expected_of(model)
            dtypes = _changed_dtypes(bundle, part, model)
            save_graph(model, scratch / "part.onnx")
            del model  # and with it the bundle's mapped weights
            network = tensorrt.parse(scratch / "part.onnx", part)
            layers = check_network(network, expected, part)
            timings = folder / _TIMINGS
            plan, cache = tensorrt.build(
                network, part, key.profiles, target.capabilities, progress=progress,
                timing_cache=timings.read_bytes() if timings.is_file() else b"",
            )  # fmt: skip
            content = memoryview(plan)
            staged = scratch / f"{part}.plan"
            staged.write_bytes(content)
            _check_header(staged, part, key)
            record = EngineRecord(
                key, digest(content), len(content), limits.capacity, limits.visual_tokens, dtypes, expected.aliases, layers,
                round(time.perf_counter() - began, 3),
            )  # fmt: skip
            _put(folder, part, staged, record)
            if cache:
                (scratch / _TIMINGS).write_bytes(cache)
                (scratch / _TIMINGS).replace(timings)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(bundle.folder).free
            raise OutputError(
                f"The disk is full: building the part {part} stopped with {free / 1e6:,.0f} MB free. Nothing of it was left "
                "behind; make room, and build again."
            ) from exc
        raise OutputError(f"The engine of the part {part} cannot be written into {folder}: {exc}.") from exc
    return record


def prepare_part(bundle: Bundle, part: str, precision: str, profiles: Sequence[Profile], *, lowered: bool = False) -> ir.Model:
    """A part's graph as TensorRT gets it; `lowered` for one that knows nothing newer than opset 20."""
    model = load_graph(bundle.part_path(part))
    source = ir.DataType.FLOAT16 if bundle.manifest.dtype == "float16" else ir.DataType.FLOAT
    cast_graph(model, source, PRECISIONS[precision][1])
    fix_dimensions(model, profiles)
    pack_tables(model)
    if lowered:
        lower_graph(model)
    else:
        mark_decomposable(model)
        shield_masks(model)
    return model


def _changed_dtypes(bundle: Bundle, part: str, model: ir.Model) -> dict[str, str]:
    described = bundle.manifest.parts[part]
    was = {name: info.dtype for name, info in (described.inputs | described.outputs).items()}
    names = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
    now = {v.name or "": names.get(v.dtype) for v in (*model.graph.inputs, *model.graph.outputs) if v.dtype is not None}
    return {name: dtype for name, dtype in now.items() if dtype and dtype != was.get(name)}


def _check_header(path: Path, part: str, key: EngineKey) -> None:
    header = read_plan_header(path)
    if header.flavour != key.flavour or (header.version and header.version != key.version):
        raise EngineError(f"{key.flavour} {key.version} wrote a plan of {header.flavour} {header.version} for the part {part}.")
    if header.capabilities and set(header.capabilities) != set(key.capabilities):
        raise EngineError(
            f"The plan of the part {part} is for {'+'.join(header.capabilities)}; asked for were {'+'.join(key.capabilities)}."
        )


def _put(folder: Path, part: str, staged: Path, record: EngineRecord) -> None:
    """The plan takes its place, then its record: in between the two do not fit, which every reader notices."""
    try:
        records = read_records(folder)
    except EngineError:
        records = {}
    staged.replace(folder / f"{part}.plan")
    write_records(folder, {**records, part: record})
