"""A recipe applied to a graph, and `edgevlm quantize`: a float bundle becomes a quantized one, without torch.

    float graph → [calibration: factors folded, codes chosen (`layers`)] → standard form (`forms`) → weights streamed to disk

Weights are quantized when they are written, one at a time. Quantizing while exporting is the same code on the same graph,
hence the same bytes. It knows nothing of families or backends; calibration samples come from the caller.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from ..bundle import Bundle, Part, check_output, publish_bundle, seal
from ..errors import CalibrationError, RecipeError
from ..graphs import Progress, load_graph, part_record, save_graph
from .calibrate import Array, Feeds, Shelf
from .forms import write_gather, write_int4, write_int8
from .kv_cache import cache_inputs, cache_updates, quantize_kv_cache
from .layers import CODES, Prepared, block_of, prepare_layers
from .recipe import Recipe, load_recipe

__all__ = ["Calibration", "check_recipe", "open_calibration", "quantizable", "quantize_bundle", "quantize_graph"]

REPORT = "reports/quantization.json"


class Calibration(Protocol):
    """Samples for every part. See `edgevlm.calibration`."""

    def identity(self) -> Mapping[str, Any]:
        """What it is, for the manifest."""

    def feeds(
        self, bundle: Bundle, parts: Sequence[str], shelf: Callable[[np.ndarray], Array]
    ) -> Mapping[str, Sequence[Feeds]]:
        """What each of the parts is run with, sample by sample; arrays are put on the shelf."""


def quantize_bundle(
    source: str | Path,
    output: str | Path,
    recipe: str | Path | Recipe,
    *,
    calibration: Calibration | str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    stage: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Writes a quantized copy of a float bundle. `calibration` is what a recipe that looks at samples gets to see: a set, or
    what `load_calibration` takes (the package's scenes, unless told otherwise).

    Raises RecipeError, BundleError, OutputError, WeightsError and what the calibration raises.
    """
    chosen = load_recipe(recipe)
    check_output(output, force=force)
    bundle = Bundle.open(source)
    manifest = bundle.manifest
    if manifest.recipe is not None:
        raise RecipeError(
            f"{source} is already quantized with the recipe {manifest.recipe.get('name')!r}. "
            "Quantize the float bundle it came from."
        )
    samples = open_calibration(calibration) if chosen.calibrated else None
    graphs = {name: load_graph(bundle.part_path(name)) for name in manifest.parts}
    check_recipe(chosen, graphs)
    with publish_bundle(output, force=force) as folder, ExitStack() as stack:
        graph_files = {name for part in manifest.parts.values() for name in (part.file, f"{part.file}_data")}
        parts: dict[str, Part] = {}
        layers: list[dict[str, Any]] = []
        feeds: Mapping[str, Sequence[Feeds]] = {}
        wanted: list[str] = []
        if samples is not None:
            shelf = Shelf(Path(stack.enter_context(TemporaryDirectory(dir=folder, prefix=".shelf-"))))
            stage("running the calibration samples")
            wanted = [name for name, graph in graphs.items() if _looks(chosen, name, graph)]
            feeds = samples.feeds(bundle, wanted, shelf.put)
            if missed := [name for name in wanted if not feeds.get(name)]:
                raise CalibrationError(
                    f"No calibration sample reached the part {', '.join(missed)}, which the recipe {chosen.name!r} calibrates."
                )
        for name in manifest.parts:
            graph = graphs.pop(name)
            prepared = None
            if name in wanted:
                stage(f"calibrating {name}")
                prepared = prepare_layers(graph, name, chosen, feeds[name], shelf, _segment_stage(stage, name))
                layers += prepared.layers
            stage(f"quantizing {name}")
            quantize_graph(graph, name, chosen, prepared)
            (folder / manifest.parts[name].file).parent.mkdir(parents=True, exist_ok=True)
            save_graph(graph, folder / manifest.parts[name].file, progress)
            parts[name] = part_record(graph, manifest.parts[name].file)
        stack.close()
        for name in sorted(set(manifest.files) - graph_files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(name), folder / name)
        described = chosen.to_dict()
        if samples is not None:
            described["calibration"] = dict(samples.identity())
            (folder / REPORT).parent.mkdir(exist_ok=True)
            text = json.dumps({"recipe": described, "layers": layers}, indent=2, ensure_ascii=False)
            (folder / REPORT).write_text(text + "\n", encoding="utf-8")
        cache = next((i.dtype for n, i in parts["decoder"].inputs.items() if n.startswith("past_key_values.")), None)
        kept = dataclasses.replace(manifest.kv_cache, dtype=cache or manifest.kv_cache.dtype)
        seal(folder, dataclasses.replace(manifest, parts=parts, recipe=described, kv_cache=kept))
    return Bundle.open(output, check_files=False)


def check_recipe(recipe: Recipe, graphs: Mapping[str, ir.Model]) -> None:
    """Raises RecipeError where a recipe does not fit a model's graphs, by part: before any work is done."""
    recipe.require_matches({part: quantizable(graph) for part, graph in graphs.items()})
    for part, graph in graphs.items():
        if recipe.kv_cache != "float" and cache_inputs(graph):
            cache_updates(graph)
        for node, weight in _weights(graph.graph):
            rule = recipe.rule_for(part, weight.name or "")
            if node.op_type == "MatMul" and rule.method in CODES:
                block_of(rule, part, weight)


def open_calibration(calibration: Calibration | str | Path | None) -> Calibration:
    """A calibration set, by name, file or folder; the package's scenes without one."""
    if calibration is not None and not isinstance(calibration, str | Path):
        return calibration
    from ..calibration import load_calibration  # runs bundles, and is above this package but for this default

    return load_calibration(calibration or "scenes")


def _segment_stage(stage: Callable[[str], None], part: str) -> Callable[[int, int], None]:
    return lambda number, count: stage(f"calibrating {part}, {number + 1} of {count}") if count > 1 else None


def _looks(recipe: Recipe, part: str, graph: ir.Model) -> bool:
    """Whether the recipe calibrates something in a part."""
    cached = recipe.kv_cache != "float" and cache_inputs(graph)
    return bool(cached) or any(recipe.rule_for(part, name).calibrated for name in quantizable(graph, linear=True))


def quantizable(model: ir.Model, *, linear: bool = False) -> list[str]:
    """Names of the weights that a recipe may quantize, of `linear` layers alone or of embedding tables too."""
    return list(dict.fromkeys(w.name or "" for node, w in _weights(model.graph) if not linear or node.op_type == "MatMul"))


def _weights(graph: ir.Graph) -> list[tuple[ir.Node, ir.Value]]:
    found = []
    for node in graph:
        place = {"MatMul": 1, "Gather": 0}.get(node.op_type)
        weight = node.inputs[place] if place is not None and not node.domain else None
        if weight is not None and _is_weight(weight):
            found.append((node, weight))
    return found


def quantize_graph(model: ir.Model, part: str, recipe: Recipe, prepared: Prepared | None = None) -> None:
    """Rewrites, in place, every MatMul and Gather whose weight the recipe quantizes.

    `prepared` is what calibration made of the layers whose rules ask for it.
    """
    graph = model.graph
    for node, weight in _weights(graph):
        rule = recipe.rule_for(part, weight.name or "")
        if rule.method == "float":
            continue
        if node.op_type == "Gather":
            write_gather(graph, node, weight)
            continue
        if rule.calibrated and prepared is None:
            raise RecipeError(
                f"The rule for the weight {weight.name} of the part {part} ({rule.method}, {rule.algorithm}) looks at "
                "calibration samples; there are none."
            )
        made = prepared.weights.get(weight.name or "") if prepared and rule.calibrated else None
        if rule.method in CODES:
            packed = (lambda made=made: (np.asarray(made[0]), made[1])) if made else None
            write_int4(graph, node, weight, block_of(rule, part, weight), packed, *CODES[rule.method])
        elif rule.method in ("nf4", "fp4"):
            from .bnb import replace_matmul

            replace_matmul(graph, node, weight, rule)
        else:
            pair = (lambda made=made: (lambda: iter([np.asarray(made[0])]), made[1])) if made else None
            write_int8(graph, node, weight, pair)
            if rule.method == "w8a8" and prepared:
                from .w8a8 import quantize_input

                quantize_input(graph, node, prepared.activations[node.name or ""])
    if recipe.kv_cache != "float" and cache_inputs(model):
        quantize_kv_cache(model, prepared.caches if prepared else {})
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[value.name]  # type: ignore[arg-type]


def _is_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    return (
        value.is_initializer()
        and tensor is not None
        and len(tensor.shape) == 2
        and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    )
