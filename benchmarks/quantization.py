"""What quantization costs in answers, and whether calibration earns its keep: every shipped model, several recipes.

    python benchmarks/quantization.py                         # all models and settings; about an hour on two cores
    python benchmarks/quantization.py --model llava --setting defaults --questions 1000

Settings:

- `defaults`: the built-in recipes.
- `three-bits`: the decoder's linear layers in three bits with one scale a channel, everything else float. The small models
  hardly lose anything at four bits in blocks of 32, so this is where methods differ.
- `outliers`: a quarter of the channels of every norm's output, and of what else can be rescaled, are made 10 times larger and
  the weights that read them 10 times smaller: the same function, exactly, with channels as uneven as those of large models.
  Three bits with one scale a channel.
- `vision-outliers`: the same done to an eighth of the vision encoder's channels, 100 times. Its activations are then
  quantized to eight bits, with and without SmoothQuant.

Each row has the exact match with its interval, the difference to the float model with the p value of the paired test of
`edgevlm.evaluation.statistics`, and the mean relative error of the calibrated layers' outputs, beside that of rounding to
nearest. Answers are kept in the work folder, so an interrupted run goes on. Prints tables, and writes `quantization.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from edgevlm.bundle import Bundle, publish_bundle, seal
from edgevlm.demo import MODELS
from edgevlm.evaluation.records import Outcome
from edgevlm.evaluation.run import evaluate
from edgevlm.evaluation.statistics import Comparison, compare_with_first, group_by_picture, mean_interval
from edgevlm.evaluation.suites import SuiteSpec
from edgevlm.export.export import export_bundle
from edgevlm.graphs import load_graph, part_record, save_graph
from edgevlm.quant.fold import consumers_of, find_fold, origin_of, scale_rows, weight_of
from edgevlm.quant.quantize import quantize_bundle
from edgevlm.quant.recipe import RECIPES, Recipe, Rule

WAYS = ("rtn", "awq", "gptq", "awq-gptq")


def decoder_alone(method: str, block_size: int) -> list[Recipe]:
    """The decoder's linear layers by every algorithm, everything else float."""
    head = Rule("float", "decoder", "*lm_head.*", optional=True)
    return [Recipe(f"{method}-{way}", (head, Rule(method, "decoder", block_size=block_size, algorithm=way))) for way in WAYS]


def eight_bits(part: str) -> list[Recipe]:
    return [
        Recipe(f"w8a8-{name}", (Rule("w8a8", part, smooth=smooth, range=how),))
        for name, smooth, how in (("plain", 0.0, "minmax"), ("plain-mse", 0.0, "mse"), ("smooth", 0.5, "minmax"))
    ]


@dataclass(frozen=True)
class Setting:
    """Recipes, and the part that gets outlier channels: how much larger they are, and which share of all channels."""

    recipes: list[Recipe]
    part: str = ""
    factor: float = 1.0
    share: float = 0.0


SETTINGS = {
    "defaults": Setting(list(RECIPES.values())),
    "three-bits": Setting(decoder_alone("int3", 0)),
    "outliers": Setting(decoder_alone("int3", 0), "decoder", 10.0, 1 / 4),
    "vision-outliers": Setting(eight_bits("vision_encoder"), "vision_encoder", 100.0, 1 / 8),
}


def inject_outliers(source: Path, output: Path, part: str, factor: float, share: float) -> None:
    """A float bundle that computes the same function with outlier channels in one part."""
    bundle = Bundle.open(source)
    graph = load_graph(bundle.part_path(part))
    rng, done = np.random.default_rng(0), set()
    for node in list(graph.graph):
        value = origin_of(node.inputs[0]) if weight_of(node) is not None and node.inputs[0] is not None else None
        if value is None or value in done:
            continue
        done.add(value)
        readers = consumers_of(value)
        fold = find_fold(value) if readers else None
        if readers is None or fold is None:
            continue
        factors = np.ones(fold.width, np.float32)
        factors[rng.choice(fold.width, round(share * fold.width), replace=False)] = 1 / factor
        # A value that several places read is as large in all of them.
        factors = np.array([factors[fold.slots == slot].min() for slot in fold.slots], np.float32)
        fold.divide(factors)
        for weight in {weight for reader in readers if (weight := weight_of(reader)) is not None}:
            scale_rows(weight, factors)
    with publish_bundle(output, force=True) as folder:
        for name in bundle.manifest.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(name), folder / name)
        file = bundle.manifest.parts[part].file
        save_graph(graph, folder / file)
        parts = {**bundle.manifest.parts, part: part_record(graph, file)}
        seal(folder, dataclasses.replace(bundle.manifest, parts=parts))


def measure(model: str, setting: str, questions: int, work: Path) -> list[dict[str, Any]]:
    """One row for the float bundle and for each recipe."""
    chosen = SETTINGS[setting]
    base = work / model
    if not base.exists():
        export_bundle(f"demo/{model}", base)
    if chosen.part:
        changed = work / f"{model}-{setting}"
        if not changed.exists():
            inject_outliers(base, changed, chosen.part, chosen.factor, chosen.share)
        base = changed
    bundles = [base]
    for recipe in chosen.recipes:
        bundles.append(work / f"{model}-{setting}-{recipe.name}")
        if not bundles[-1].exists():
            quantize_bundle(base, bundles[-1], recipe)
    suite, outcomes = evaluate([str(path) for path in bundles], SuiteSpec("scenes", limit=questions), work / "answers")
    groups = group_by_picture(suite.items)
    comparisons: Sequence[Comparison | None] = [None, *compare_with_first(outcomes, groups)]
    return [
        row(path, outcome, comparison, groups) for path, outcome, comparison in zip(bundles, outcomes, comparisons, strict=True)
    ]


def row(path: Path, outcome: Outcome, comparison: Comparison | None, groups: dict[str, int]) -> dict[str, Any]:
    report = path / "reports" / "quantization.json"
    layers = json.loads(report.read_text())["layers"] if report.is_file() else []
    interval = mean_interval(outcome.scores, groups)
    return {
        "bundle": path.name,
        "megabytes": outcome.subject.size / 1e6,
        "exact_match": 100 * statistics.mean(outcome.scores.values()),
        "interval": [interval.low, interval.high],
        "difference": comparison.difference if comparison else 0.0,
        "p": comparison.p if comparison else None,
        "layer_error": statistics.mean(layer["relative_error"] for layer in layers) if layers else None,
        "layer_error_nearest": statistics.mean(layer["relative_error_nearest"] for layer in layers) if layers else None,
    }


def show(model: str, setting: str, rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=f"{model}, {setting}", box=None, pad_edge=False, header_style="bold", title_justify="left")
    for column in ("", "MB", "exact match", "95 %", "difference", "p", "layer error", "to nearest"):
        table.add_column(column, justify="right" if column else "left")
    for each in rows:
        low, high = each["interval"]
        error = [f"{100 * e:.2f} %" if (e := each[k]) is not None else "" for k in ("layer_error", "layer_error_nearest")]
        table.add_row(
            each["bundle"].removeprefix(f"{model}-"), f"{each['megabytes']:.2f}", f"{each['exact_match']:.1f}",
            f"{low:.1f} – {high:.1f}", f"{each['difference']:+.1f}", "" if each["p"] is None else f"{each['p']:.2g}", *error,
        )  # fmt: skip
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="may be given several times (default: all)")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="may be given several times (default: all)")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path("build/quantization"), help="folder for bundles and answers")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 128)
    arguments.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for setting in arguments.setting or SETTINGS:
        for model in arguments.model or MODELS:
            found.setdefault(setting, {})[model] = rows = measure(model, setting, arguments.questions, arguments.work)
            show(model, setting, rows, console)
            (arguments.work / "quantization.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
