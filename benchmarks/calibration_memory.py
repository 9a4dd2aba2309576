"""How much memory and time calibrating a model of 7B size takes: LLaVA-1.5-7B to INT4 with AWQ or GPTQ, layer by layer.

    python benchmarks/calibration_memory.py                        # 28 GB of disk at most, most of an hour; removed then
    python benchmarks/calibration_memory.py --recipe int4-gptq
    python benchmarks/calibration_memory.py --scale tiny           # the same steps within a minute

1. Writes a checkpoint of the real architecture at real size with random weights, and exports it as a float16 bundle, as
   `export_memory` does. The checkpoint is removed after that.
2. Quantizes the bundle with `python -m edgevlm quantize`, which runs calibration samples (pictures that the package draws, with
   questions and answers) through the bundle's own graphs, and samples the anonymous memory of that process every 20 ms, stage
   by stage: a stage is a line that it prints. A bundle that computes in float16 is used because float32 would take 28 GB.

Weights are random, so how well the result answers says nothing; the errors it prints show that every layer was calibrated.
Prints a table and writes `calibration_memory.json` into the work folder. Linux only. Exit codes: 0 within the limit; 1 the
calibration took more anonymous memory than `--limit-gb`; 2 it could not be measured; 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export_memory import (
    FAMILIES,
    MeasurementError,
    check_disk,
    machine,
    packages,
    run_measured,
    watch,
    weight_shapes,
    write_weights,
)
from rich.console import Console
from rich.table import Table

RECIPES = ("int4", "int4-gptq")
MODEL = FAMILIES["llava"]
#: A line that `edgevlm quantize` prints when it begins one of several pieces of the decoder.
PIECE = re.compile(r"calibrating decoder, (\d+) of (\d+)")


@dataclass
class Stage:
    """What was done from `began` (seconds) until the next stage, and the most anonymous memory meanwhile."""

    name: str
    began: float
    seconds: float = 0.0
    peak_anonymous_bytes: int = 0


class Stages:
    """Reads what a process prints, while it runs."""

    def __init__(self, log: Path) -> None:
        self._log, self._read = log, 0
        self.found = [Stage("starting", 0.0)]

    def each(self, seconds: float, anonymous: int) -> None:
        with self._log.open("rb") as file:
            file.seek(self._read)
            lines = file.read().rpartition(b"\n")
        self._read += len(lines[0]) + len(lines[1])
        self.found += [
            Stage(line.decode().removesuffix(" …"), seconds) for line in lines[0].splitlines() if line.endswith("…".encode())
        ]
        last = self.found[-1]
        last.seconds, last.peak_anonymous_bytes = seconds - last.began, max(last.peak_anonymous_bytes, anonymous)


# ------------------------------------------------------------------------------------------- the run


def measure(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Takes the two steps inside the empty `folder`."""
    source = folder / "float"
    made = make_bundle(options, folder, source, console)
    return made | calibrate(options, folder, source, console)


def make_bundle(options: argparse.Namespace, folder: Path, source: Path, console: Console) -> dict[str, Any]:
    """Writes a checkpoint and exports it to `source`."""
    scale = MODEL.scales[options.scale]
    scale = dataclasses.replace(scale, layers=options.layers or scale.layers)
    config = MODEL.config(scale, "fp16")
    shapes = weight_shapes(config, MODEL.names)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    check_disk(folder, 2 * parameters, 2 * parameters)  # when the second bundle is written, the checkpoint is gone
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    MODEL.companions(checkpoint, config)
    began = time.perf_counter()
    size = write_weights(checkpoint, shapes, "fp16", scale.shard_bytes, console)
    written = time.perf_counter() - began
    console.print(f"checkpoint: {parameters:,} parameters, {size / 1e9:.2f} GB, written in {written:.0f} s")
    command = ["-m", "edgevlm", "export", "--model", str(checkpoint), "--output", str(source), "--dtype", "fp16"]
    export = watch(command, folder / "output.txt", "The export")
    if not options.keep:
        shutil.rmtree(checkpoint)
    return {
        "decoder_layers": scale.layers,
        "checkpoint": {"parameters": parameters, "bytes": size, "seconds": written},
        "export": asdict(export) | {"bundle_bytes": bytes_of(source)},
    }


def calibrate(options: argparse.Namespace, folder: Path, source: Path, console: Console) -> dict[str, Any]:
    """Quantizes the float bundle `source`."""
    bundle, output, log = folder / "bundle", folder / "output.txt", folder / "stages.txt"
    stages = Stages(log)
    command = ["-m", "edgevlm", "quantize", str(source), "--output", str(bundle), "--recipe", options.recipe]
    command += ["--calibration", "scenes", "--samples", str(options.samples)]
    try:
        usage = watch(command, output, "The calibration", errors=log, each=stages.each)
    except MeasurementError:
        console.print(log.read_text(encoding="utf-8"), markup=False, end="")
        raise
    console.print(output.read_text(encoding="utf-8"), markup=False, end="")
    layers = json.loads((bundle / "reports" / "quantization.json").read_text(encoding="utf-8"))["layers"]
    limit = int(options.limit_gb * 1e9)
    return {
        "scale": options.scale,
        "recipe": options.recipe,
        "samples": options.samples,
        "machine": machine() | {"load": os.getloadavg()},
        "packages": packages(),
        "quantize": asdict(usage) | {"bundle_bytes": bytes_of(bundle), "stages": [asdict(stage) for stage in stages.found]},
        "calibrated": {
            "weights": len(layers),
            "rows": max(layer["rows"] for layer in layers),
            "relative_error": statistics.mean(layer["relative_error"] for layer in layers),
            "relative_error_nearest": statistics.mean(layer["relative_error_nearest"] for layer in layers),
        },
        "limit_bytes": limit,
        "within_limit": usage.peak_anonymous_bytes <= limit,
    }


def bytes_of(bundle: Path) -> int:
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())


def print_table(result: dict[str, Any], console: Console) -> None:
    checkpoint, export, run, seen = (result[step] for step in ("checkpoint", "export", "quantize", "calibrated"))
    title = f"LLaVA-1.5 {result['scale']}: {checkpoint['parameters'] / 1e9:.2f} G parameters, "
    title += f"{result['decoder_layers']} decoder layers, {result['recipe']}, {result['samples']} samples"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for column in ("step", "seconds", "peak anonymous GB", "peak resident GB", "on disk GB", ""):
        table.add_column(column, justify="left" if column in ("step", "") else "right")

    def add(
        step: str,
        seconds: float,
        anonymous: int | None = None,
        resident: int | None = None,
        disk: int | None = None,
        remark: str = "",
    ) -> None:
        sizes = ("" if n is None else f"{n / 1e9:.2f}" for n in (anonymous, resident, disk))
        table.add_row(step, f"{seconds:,.1f}", *sizes, remark)

    add("write the checkpoint", checkpoint["seconds"], disk=checkpoint["bytes"])
    add(
        "export as float16",
        export["seconds"],
        export["peak_anonymous_bytes"],
        export["peak_resident_bytes"],
        export["bundle_bytes"],
    )
    for name, seconds, peak in summed_up(run["stages"]):
        add(f"  {name}", seconds, peak)
    verdict = "[green]within[/]" if result["within_limit"] else "[red]over[/]"
    remark = f"{verdict} the limit of {result['limit_bytes'] / 1e9:.2f} GB; peak after {run['peak_at_seconds']:.0f} s"
    add(
        "calibrate and quantize",
        run["seconds"],
        run["peak_anonymous_bytes"],
        run["peak_resident_bytes"],
        run["bundle_bytes"],
        remark,
    )
    console.print(table)
    console.print(
        f"{seen['weights']} weights calibrated on {seen['rows']:,} rows each: relative error of their outputs "
        f"{seen['relative_error']:.4f} on average, rounded to nearest {seen['relative_error_nearest']:.4f}."
    )


def summed_up(stages: list[dict[str, Any]]) -> list[tuple[str, float, int]]:
    """Name, seconds and peak of every stage; the pieces of the decoder as one, with median and range of their seconds."""
    pieces = [stage for stage in stages if PIECE.match(stage["name"])]
    rows: list[tuple[str, float, int]] = []
    for stage in stages:
        if stage not in pieces:
            rows.append((stage["name"], stage["seconds"], stage["peak_anonymous_bytes"]))
        elif stage is pieces[0]:
            seconds = [piece["seconds"] for piece in pieces]
            name = f"calibrating decoder: {len(pieces)} pieces, {min(seconds):.0f} to {max(seconds):.0f} s, "
            name += f"median {statistics.median(seconds):.0f}"
            rows.append((name, sum(seconds), max(piece["peak_anonymous_bytes"] for piece in pieces)))
    return rows


# ------------------------------------------------------------------------------------------ command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    purpose = "Measures memory and time of calibrating and quantizing a model of 7B size."
    parser = argparse.ArgumentParser(description=purpose, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--work",
        type=Path,
        default=Path("build/calibration-memory"),
        help="where it writes (default: build/calibration-memory)",
    )
    add("--scale", choices=MODEL.scales, default="7b", help="7b: real size; wide: its widths, two layers; tiny (default: 7b)")
    add("--layers", type=int, metavar="N", help="decoder layers, instead of as many as the scale has")
    add("--recipe", choices=RECIPES, default="int4", help="int4: AWQ; int4-gptq (default: int4)")
    add("--samples", type=int, default=16, metavar="N", help="calibration samples (default: 16)")
    add("--limit-gb", type=float, default=8, metavar="GB", help="anonymous memory that the calibration may take (default: 8)")
    add("--keep", action="store_true", help="leave checkpoint and bundles in the work folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    name = f"{options.scale}-{options.recipe}"
    return run_measured(options, name, "calibration_memory.json", measure, print_table)


if __name__ == "__main__":
    sys.exit(main())
