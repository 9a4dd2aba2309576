"""What a larger picture costs where pictures may have any size: patches, places, time and memory.

    python benchmarks/resolution.py                 # Qwen2.5-VL-3B's tower, about 10 minutes on two cores
    python benchmarks/resolution.py --scale tiny    # the same steps within a minute

Writes a checkpoint with the real tower and a decoder of two layers, random weights, and exports it to INT8 twice: with the
queries of whole-frame attention in blocks, as EdgeVLM does it, and all at once. Every size is then asked about in a
process of its own, the two ways in turn, over several rounds; the picture is new each time.

Prints medians with their ranges and writes `resolution.json` into the work folder. *memory* is the largest anonymous memory
while answering, less what the loaded bundle takes. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export_memory import (
    QWEN_NAMES,
    MeasurementError,
    Scale,
    machine,
    make_qwen_config,
    packages,
    scratch,
    watch,
    weight_shapes,
    write_qwen_companions,
    write_weights,
)
from rich.console import Console
from rich.table import Table

SCALES = {
    "3b": Scale(2048, 2048, 2, 16, 1280, 3420, 32, 16, 0, 0, 4_000_000_000, kv_heads=2),
    "tiny": Scale(128, 256, 2, 4, 64, 128, 2, 4, 0, 0, 500_000_000, kv_heads=2),
}
SIZES = ((448, 448), (640, 480), (896, 896), (1280, 960))
WAYS = {"blocks": "queries in blocks", "whole": "all at once"}

EXPORT = """
import sys
from edgevlm.models import qwen2_vl
from edgevlm.export.export import export_bundle
if sys.argv[3] == "whole":
    qwen2_vl.ROW_BLOCKS = 1
export_bundle(sys.argv[1], sys.argv[2], recipe="int8")
"""
ANSWER = """
import json, re, sys
from pathlib import Path
from edgevlm import VLM
from edgevlm.scenes import render_scene, sample_scene
def anonymous():
    found = re.findall(r"^(?:RssAnon|VmSwap):\\s+(\\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * sum(map(int, found))
vlm = VLM.load(sys.argv[1], capacity=8192, check_files=False)
loaded = anonymous()
width, height = int(sys.argv[2]), int(sys.argv[3])
picture = render_scene(sample_scene(int(sys.argv[4])), max(width, height)).resize((width, height))
reply = vlm.generate("What?", images=[picture], max_new_tokens=1)
print(json.dumps({"loaded": loaded, "vision_ms": reply.timings.vision, "first_token_ms": reply.timings.first_token,
                  "places": reply.pictures[0].tokens}))
"""


def measure(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Takes all steps inside the empty `folder`."""
    scale = SCALES[options.scale]
    config = make_qwen_config(scale, "fp16")
    checkpoint, output = folder / "checkpoint", folder / "output.txt"
    checkpoint.mkdir()
    write_qwen_companions(checkpoint, config)
    write_weights(checkpoint, weight_shapes(config, QWEN_NAMES), "fp16", scale.shard_bytes, console)
    for way in WAYS:
        watch(["-c", EXPORT, str(checkpoint), str(folder / way), way], output, "The export")
    taken: dict[tuple[str, tuple[int, int]], list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for size in SIZES:
            for way in WAYS:
                asked = [str(part) for part in (folder / way, *size, number)]
                usage = watch(["-c", ANSWER, *asked], output, f"A picture of {size[0]} x {size[1]}")
                answer = json.loads(output.read_text(encoding="utf-8"))
                answer["memory"] = usage.peak_anonymous_bytes - answer["loaded"]
                taken.setdefault((way, size), []).append(answer)
        console.print(f"round {number + 1} of {options.rounds}")
    rows = [
        {
            "way": way,
            "width": size[0],
            "height": size[1],
            "places": int(runs[0]["places"]),
            "patches": 4 * int(runs[0]["places"]),
        }
        | {name: sorted(run[name] for run in runs) for name in ("vision_ms", "first_token_ms", "memory", "loaded")}
        for (way, size), runs in taken.items()
    ]
    return {"scale": options.scale, "machine": machine(), "packages": packages(), "rows": rows}


def print_table(result: dict[str, Any], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"{result['scale']}, INT8", title_justify="left")
    for column in ("picture", "patches", "places", "whole-frame attention", "vision ms", "memory MB"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            f"{row['width']} x {row['height']}", f"{row['patches']:,}", f"{row['places']:,}", WAYS[row["way"]],
            _spread(row["vision_ms"]), _spread([size / 1e6 for size in row["memory"]]),
        )  # fmt: skip
    console.print(table)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({values[0]:,.0f}–{values[-1]:,.0f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures what larger pictures cost.", allow_abbrev=False)
    parser.add_argument(
        "--work", type=Path, default=Path("build/resolution"), help="where it writes (default: build/resolution)"
    )
    parser.add_argument("--scale", choices=SCALES, default="3b", help="3b: Qwen2.5-VL-3B's tower; tiny (default: 3b)")
    parser.add_argument("--rounds", type=int, default=3, help="times that every size is asked about (default: 3)")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and bundles in the work folder")
    options = parser.parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with scratch(options.work / options.scale, options.keep) as folder:
            result = measure(options, folder, console)
    except (MeasurementError, OSError, subprocess.SubprocessError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    (options.work / "resolution.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
