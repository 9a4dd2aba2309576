"""How near `edgevlm plan` comes to the memory that a process really takes: predicted beside measured, on this machine's CPU.

    python benchmarks/plan_memory.py                     # the shipped models, float and INT4; a minute or two
    python benchmarks/plan_memory.py --scale 0.5b        # LLaVA with a decoder of Qwen2-0.5B's shape; 9 GB of disk, minutes
    python benchmarks/plan_memory.py --scale 1.5b        # with one of Qwen2-1.5B's shape; 20 GB of disk

Each bundle is made, planned from its manifest for `local`, and then run in a process of its own (`--repeats` of them: what the
allocator keeps of freed memory differs from run to run, most for INT8): it loads, answers about one picture, and answers again
with a prompt that nearly fills the context. What is compared is the peak of its resident memory (`VmHWM`), median of the runs.

Prints a table and writes `plan_memory.json` into the work folder. Linux only. Exit codes: 0 all within `--limit` percent; 1
not; 2 it could not be measured; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from export_memory import (
    IMAGE_TOKEN,
    LLAVA_NAMES,
    PAD_TOKEN,
    MeasurementError,
    check_disk,
    machine,
    packages,
    run_measured,
    watch,
    weight_shapes,
    write_companions,
    write_weights,
)
from rich.console import Console
from rich.table import Table

from edgevlm.export.checkpoint import ASSETS
from edgevlm.plan.advice import Request
from edgevlm.plan.run import outline_model, plan
from edgevlm.targets import local_target

#: Widths and depths of Qwen2-0.5B's and 1.5B's decoders: hidden, intermediate, layers, heads, KV heads.
DECODERS = {"0.5b": (896, 4864, 24, 14, 2), "1.5b": (1536, 8960, 28, 12, 2)}
#: Bytes of all files for each parameter: checkpoint, float bundle, quantized ones.
BYTES = 2 + 4 + 1.2 + 0.9

ANSWER = """
import json, re, sys
from edgevlm import VLM
from edgevlm.scenes import render_scene, sample_scene
bundle, context, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
vlm = VLM.load(bundle, capacity=context, check_files=False, threads=int(sys.argv[4]))
picture = render_scene(sample_scene(0), side)
first = vlm.generate("What is this?", images=[picture], max_new_tokens=2)
read = first.timings.prompt_tokens
words, reply = 8, first
while True:  # as many words as the context takes
    try:
        vlm.stream(" ".join(["word"] * words), images=[picture], max_new_tokens=2).close()
    except Exception:
        break
    words *= 2
low, high = words // 2, words
while high - low > 8:
    middle = (low + high) // 2
    try:
        vlm.stream(" ".join(["word"] * middle), images=[picture], max_new_tokens=2).close()
        low = middle
    except Exception:
        high = middle
if low > 4:
    reply = vlm.generate(" ".join(["word"] * low), images=[picture], max_new_tokens=4)
status = open("/proc/self/status").read()
peak = 1024 * int(re.search(r"^VmHWM:\\s+(\\d+)", status, re.M)[1])
print(json.dumps({"peak": peak, "prompt": reply.timings.prompt_tokens, "prefill_ms": reply.timings.prefill,
                  "tokens_per_second": reply.timings.tokens_per_second, "first": read}))
"""


def make_config(scale: str) -> Any:
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config

    hidden, intermediate, layers, heads, kv_heads = DECODERS[scale]
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14,
        projection_dim=768,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=32768, bos_token_id=1, eos_token_id=2,
        pad_token_id=PAD_TOKEN, tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=576, vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=True, architectures=["LlavaForConditionalGeneration"],
        dtype=torch.float16,
    )  # fmt: skip


def bundles(options: Namespace, folder: Path, console: Console) -> Iterator[tuple[str, Path, int, int]]:
    """Name, folder, context and side of the picture of everything that is measured."""
    if options.bundles:
        yield from ((path.name, path, options.context, options.side) for path in options.bundles)
        return
    checkpoints: list[tuple[str, str, int, int]]
    if options.scale == "demo":
        shipped = sorted(path.parent.relative_to(ASSETS).as_posix() for path in ASSETS.glob("demo/*/config.json"))
        checkpoints = [(name.removeprefix("demo/"), name, 256, 224) for name in shipped]
    else:
        config = make_config(options.scale)
        shapes = weight_shapes(config, LLAVA_NAMES)
        parameters = sum(_product(shape) for shape in shapes.values())
        check_disk(folder, 2 * parameters, int((BYTES - 2) * parameters))
        (folder / "checkpoint").mkdir()
        write_companions(folder / "checkpoint", config)
        write_weights(folder / "checkpoint", shapes, "fp16", 5_000_000_000, console)
        checkpoints = [(f"llava {options.scale}", str(folder / "checkpoint"), options.context, 336)]
    log = folder / "output.txt"
    for name, model, context, side in checkpoints:
        source = folder / "float"
        watch(["-m", "edgevlm", "export", "--model", model, "--output", str(source)], log, f"The export of {name}")
        for recipe in options.recipe:
            path = source
            if recipe != "float":
                path = folder / recipe
                command = ["-m", "edgevlm", "quantize", str(source), "--recipe", recipe, "--output", str(path)]
                watch(command, log, f"Quantizing {name}")
            yield f"{name} {recipe}", path, context, side
            if path != source:
                shutil.rmtree(path)
        shutil.rmtree(source)


def _product(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def measure(options: Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Makes, plans and runs everything inside the empty `folder`."""
    rows = []
    for name, path, context, side in bundles(options, folder, console):
        made = plan(outline_model(str(path)), local_target(), Request(context, 1, (side, side)))
        runs = []
        for _ in range(options.repeats):
            log = folder / "answer.txt"
            asked = ["-c", ANSWER, str(path), str(context), str(side), str(options.threads)]
            watch(asked, log, f"Loading and asking {name}")
            runs.append(json.loads(log.read_text(encoding="utf-8").splitlines()[-1]))
        peaks = [run["peak"] for run in runs]
        measured = int(statistics.median(peaks))
        rows.append({
            "name": name, "context": context, "prompt": runs[0]["prompt"], "predicted": made.memory.total, "measured": measured,
            "peaks": peaks, "error": made.memory.total / measured - 1,
            "stored": sum(part.size for part in made.outline.parts.values()),
            "prefill_ms": statistics.median(run["prefill_ms"] for run in runs),
            "tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs),
        })  # fmt: skip
        console.print(f"{name}: predicted {made.memory.total / 1e6:,.0f} MB, measured {measured / 1e6:,.0f} MB")
    if not rows:
        raise MeasurementError("There is nothing to measure: no shipped models were found.")
    return {
        "machine": machine() | {"load": os.getloadavg()}, "packages": packages(), "limit": options.limit, "rows": rows,
        "within_limit": all(abs(row["error"]) <= options.limit / 100 for row in rows),
    }  # fmt: skip


def print_table(result: dict[str, Any], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("bundle", "weights MB", "context", "predicted MB", "measured MB", "error", "all runs MB"):
        table.add_column(column, justify="left" if column == "bundle" else "right")
    for row in result["rows"]:
        numbers = [f"{row[key] / 1e6:,.0f}" for key in ("stored", "predicted", "measured")]
        runs = ", ".join(f"{peak / 1e6:,.0f}" for peak in row["peaks"])
        colour = "green" if abs(row["error"]) <= result["limit"] / 100 else "red"
        error = f"[{colour}]{100 * row['error']:+.1f} %[/]"
        table.add_row(row["name"], numbers[0], f"{row['context']:,}", *numbers[1:], error, runs)
    console.print(table)


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(description="Compares predicted with measured memory.", allow_abbrev=False)
    add = parser.add_argument
    add("--work", type=Path, default=Path("build/plan-memory"), help="where it writes (default: build/plan-memory)")
    add("--scale", choices=("demo", *DECODERS), default="demo", help="the shipped models, or LLaVA with such a decoder")
    add("--recipe", action="append", default=[], help="float, int8, int4-rtn; may be given several times")
    add("--bundles", nargs="+", type=Path, help="bundles that are there already, instead")
    add("--context", type=int, default=2048, help="of large models and given bundles (default: 2048)")
    add("--side", type=int, default=336, help="of the picture that given bundles are asked about (default: 336)")
    add("--repeats", type=int, default=3, help="processes for each (default: 3)")
    add("--threads", type=int, default=2, help="cores to use (default: 2)")
    add("--limit", type=float, default=10.0, metavar="PERCENT", help="error that is allowed (default: 10)")
    add("--keep", action="store_true", help="leave checkpoint and bundles in the work folder")
    options = parser.parse_args(argv)
    options.recipe = options.recipe or (["float", "int4-rtn"] if options.scale == "demo" else ["float", "int8", "int4-rtn"])
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    return run_measured(options, options.scale, "plan_memory.json", measure, print_table)


if __name__ == "__main__":
    sys.exit(main())
