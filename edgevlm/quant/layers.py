"""The linear layers of one part under a recipe that looks at calibration samples: what their weights become.

Segment by segment (`calibrate`): run it over the samples, fold factors (AWQ, SmoothQuant), then round (AWQ with searched
scales, GPTQ). What comes out is put on the shelf, and the segment's float weights are let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import RecipeError, WeightsError
from . import awq, gptq, rtn
from .calibrate import Feeds, InputStats, Segment, Shelf, run_segment, segments_of
from .fold import consumers_of, find_fold, origin_of, scale_rows, weight_of
from .recipe import Recipe, Rule
from .scales import search_scales
from .smooth import smooth_factors
from .w8a8 import activation_scale

__all__ = ["Prepared", "block_of", "prepare_layers"]

#: Least and greatest code of a method.
CODES = {"int4": (-8, 7), "int3": (-4, 3)}
#: Weights of fewer bytes are part of a segment's graph, larger ones are fed to it.
_SMALL = 1 << 16


@dataclass
class Prepared:
    """What calibration decided: `weights`, by name, the codes (INT4: packed) and scales; `activations`, by the value's name, the
    scale; `caches`, by the input's name, the largest magnitudes `[H, D]`; `layers`, a record of each for the report."""

    weights: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    activations: dict[str, float] = field(default_factory=dict)
    caches: dict[str, np.ndarray] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Layer:
    """A linear layer, its weight `[K, N]` and rule."""

    node: ir.Node
    weight: ir.Value
    rule: Rule

    @property
    def value(self) -> str:
        """The name of its input."""
        assert self.node.inputs[0] is not None
        return self.node.inputs[0].name or ""

    def matrix(self) -> np.ndarray:
        return rtn.stored_matrix(self.weight.const_value)


def block_of(rule: Rule, part: str, weight: ir.Value) -> int:
    """Inputs that share a scale. Raises RecipeError where the weight has fewer than its rule asks for."""
    assert weight.const_value is not None
    inner = int(weight.const_value.shape[0])  # type: ignore[arg-type]
    if rule.block_size is None:
        return min(32, inner)
    if rule.block_size > inner:
        raise RecipeError(
            f"The weight {weight.name} of the part {part} has {inner} inputs, fewer than the {rule.block_size} of a block that "
            f"the recipe asks for. Give it a rule of its own with a smaller block_size (0: one scale a channel), or leave it float."
        )
    return rule.block_size or inner


def prepare_layers(
    model: ir.Model, part: str, recipe: Recipe, feeds: Sequence[Feeds], shelf: Shelf, step: Callable[[int, int], None]
) -> Prepared:
    """Decides about every linear layer of a part that the recipe calibrates. Folds factors into the model's weights.

    `step` is told which segment begins, of how many.
    """
    graph, prepared = model.graph, Prepared()
    caches = _caches(graph) if recipe.kv_cache != "float" else {}
    segments = segments_of(graph)
    samples: list[dict[str, np.ndarray]] = [dict(feed) for feed in feeds]
    for number, segment in enumerate(segments):
        step(number, len(segments))
        layers = [layer for layer in _layers(segment, part, recipe) if layer.rule.calibrated]
        watched = {layer.value: layer for layer in layers}
        here = [name for name in caches if caches[name] in segment.nodes]
        new = {name: caches[name].inputs[1].name or "" for name in here}  # type: ignore[union-attr]
        grams = frozenset(layer.value for layer in layers if "gptq" in layer.rule.algorithm)
        weights, small = _initializers(segment)
        stats = run_segment(segment, weights, small, samples, [*watched, *new.values()], model.opset_imports, shelf, grams)
        _forget(samples, segments[number + 1 :])
        every, layers = (
            layers,
            list({layer.weight: layer for layer in layers}.values()),
        )  # one for each weight, whoever reads it
        for layer in every:
            _check(layer, part, stats.get(layer.value))
        nearest = {layer.weight: _nearest_error(layer, part, stats[layer.value]) for layer in layers}
        before = {layer.weight: layer.weight.const_value for layer in layers}
        _fold(graph, segment, layers, stats)
        for name, value in new.items():
            found = stats.get(value)
            if found is not None:
                heads = int(caches[name].inputs[0].shape[1])  # type: ignore[union-attr, index, arg-type]
                prepared.caches[name] = found.peak.reshape(heads, -1)
        for layer in every:
            if layer.rule.method == "w8a8":
                prepared.activations[layer.value] = activation_scale(stats[layer.value], layer.rule.range)
        for layer in layers:
            _round(layer, part, stats[layer.value], nearest[layer.weight], prepared, shelf)
            layer.weight.const_value = before[layer.weight]  # its codes are what is kept
        for value in {v for node in segment.nodes for v in node.inputs if v is not None and v.is_initializer()}:
            if isinstance(value.const_value, ir.Tensor) and value.const_value.nbytes > _SMALL:
                value.const_value = ir.Tensor(shelf.put(value.const_value.numpy()), name=value.name)
    return prepared


def _layers(segment: Segment, part: str, recipe: Recipe) -> Iterator[_Layer]:
    for node in segment.nodes:
        weight = weight_of(node)
        if weight is not None:
            yield _Layer(node, weight, recipe.rule_for(part, weight.name or ""))


def _caches(graph: ir.Graph) -> dict[str, ir.Node]:
    """The KV cache's inputs, and what writes each."""
    return {
        value.name: use.node  # type: ignore[misc]
        for value in graph.inputs
        if (value.name or "").startswith("past_key_values.")
        for use in value.uses()
        if use.node.op_type == "TensorScatter"
    }


def _initializers(segment: Segment) -> tuple[dict[str, np.ndarray], list[ir.Value]]:
    """What is fed, and what is part of the graph."""
    large: dict[str, np.ndarray] = {}
    small: dict[str, ir.Value] = {}
    for value in (v for node in segment.nodes for v in node.inputs if v is not None and v.is_initializer()):
        assert value.const_value is not None
        assert value.name is not None
        if value.const_value.nbytes > _SMALL:
            large[value.name] = np.asarray(value.const_value.numpy())
        else:
            small[value.name] = value
    return large, list(small.values())


def _forget(samples: list[dict[str, np.ndarray]], later: Sequence[Segment]) -> None:
    wanted = {name for segment in later for name in segment.takes}
    for sample in samples:
        for name in set(sample) - wanted:
            del sample[name]


# -------------------------------------------------------------------------------------------- folding


def _fold(graph: ir.Graph, segment: Segment, layers: list[_Layer], stats: dict[str, InputStats]) -> None:
    """Finds factors for every group of layers that read one value, and folds them where they can go."""
    by_node = {layer.node: layer for layer in layers}
    done: set[str] = set()
    for layer in layers:
        assert layer.node.inputs[0] is not None
        value = origin_of(layer.node.inputs[0])
        found = stats.get(layer.value)
        if found is None or value.name in done:
            continue
        done.add(value.name or "")
        readers = consumers_of(value)
        rules = [by_node[node].rule for node in readers or () if node in by_node]
        smooth = next((rule for rule in rules if rule.method == "w8a8"), None)
        if readers is None or not (smooth or any("awq" in rule.algorithm for rule in rules)):
            continue
        weights = [weight for node in readers if (weight := weight_of(node)) is not None]
        inside = value.producer() in segment.nodes and all(node in segment.nodes for node in readers)
        fold = find_fold(value, graph) if inside and all(len(list(w.uses())) == 1 for w in weights) else None
        if fold is None or fold.width != len(found.peak):
            continue
        matrices = [rtn.stored_matrix(weight.const_value) for weight in weights]
        if smooth:
            factors = fold.tie(smooth_factors(found.peak, matrices, smooth.smooth))
        else:
            rule = next(rule for rule in rules if "awq" in rule.algorithm)
            low, high = CODES[rule.method]
            block = rule.block_size if rule.block_size is not None else 32

            def round_trip(
                weight: np.ndarray, _: np.ndarray, low: int = low, high: int = high, block: int = block
            ) -> np.ndarray:
                return _dequantized(*rtn.quantize_blocks(weight, block, low, high, np.dtype(np.float32)))

            factors = awq.search_factors(found.rows, found.mean, matrices, round_trip, fold.tie)
        if (factors == 1).all():
            continue
        fold.divide(factors)
        for weight in weights:
            scale_rows(weight, factors)
        for name in {node.inputs[0].name for node in readers if node.inputs[0] is not None}:
            if name in stats:
                stats[name].divide(factors)
        if fold.cached in stats:
            stats[fold.cached].divide(fold.shared(factors))


def _dequantized(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 `[K, N]` of codes `[K, N]` and scales `[blocks, N]`, whose blocks are equal but for a last one."""
    block = -(-len(codes) // len(scales))
    block = next(b for b in (block, 1 << (block - 1).bit_length()) if -(-len(codes) // b) == len(scales))
    return codes * np.repeat(scales.astype(np.float32), block, 0)[: len(codes)]


# ------------------------------------------------------------------------------------------- rounding


def _check(layer: _Layer, part: str, found: InputStats | None) -> None:
    name = layer.weight.name
    if found is None:
        raise RecipeError(
            f"No calibration sample reached the weight {name} of the part {part}. Give samples that use it, or a rule without "
            "calibration."
        )
    if not np.isfinite(layer.matrix()).all():
        raise WeightsError(f"The weight {name} of the part {part} has NaN or infinite values; it cannot be quantized.")
    if not np.isfinite(found.peak).all():
        raise RecipeError(f"What calibration saw enter the weight {name} of the part {part} has NaN or infinite values.")


def _nearest_error(layer: _Layer, part: str, found: InputStats) -> float:
    """What rounding to nearest, without folding, would do to the layer's output."""
    matrix, rule = layer.matrix(), layer.rule
    if rule.method == "w8a8":
        codes, scales = rtn.quantize_channels(matrix, np.dtype(np.float32))
        return _relative_error(found.rows, matrix, _rounded(found.rows, activation_scale(found, "minmax")), codes * scales)
    rounded = rtn.quantize_blocks(matrix, block_of(rule, part, layer.weight), *CODES[rule.method], np.dtype(np.float32))
    return _relative_error(found.rows, matrix, found.rows, _dequantized(*rounded))


def _round(layer: _Layer, part: str, found: InputStats, nearest: float, prepared: Prepared, shelf: Shelf) -> None:
    assert layer.weight.const_value is not None
    name, rule, matrix, dtype = layer.weight.name or "", layer.rule, layer.matrix(), layer.weight.const_value.dtype.numpy()
    rows, packed = found.rows, None
    record: dict[str, Any] = {"part": part, "weight": name, "method": rule.method}
    if rule.method == "w8a8":
        rows, (codes, scales) = _rounded(rows, prepared.activations[layer.value]), rtn.quantize_channels(matrix, dtype)
        wide = codes * scales.astype(np.float32)
        record |= {"smooth": rule.smooth, "range": rule.range}
    else:
        block, (low, high) = block_of(rule, part, layer.weight), CODES[rule.method]
        try:
            if "gptq" in rule.algorithm:
                assert found.gram is not None
                codes, scales = gptq.quantize(matrix, found.gram, block, low, high, dtype, importance=found.importance)
            else:
                codes, scales = _round_searched(matrix, found.importance, block, low, high, dtype)
        except RecipeError as exc:
            raise RecipeError(f"The weight {name} of the part {part}: {exc}") from exc
        wide, packed = _dequantized(codes, scales), rtn.pack_int4(codes)
        record |= {"algorithm": rule.algorithm, "block_size": block}
    prepared.weights[name] = shelf.put(codes if packed is None else packed), scales
    error = _relative_error(found.rows, matrix, rows, wide)
    record |= {"relative_error": round(error, 6), "relative_error_nearest": round(nearest, 6), "rows": found.count}
    prepared.layers.append(record)


def _rounded(rows: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(np.rint(rows / scale), -127, 127) * np.float32(scale)


def _round_searched(
    matrix: np.ndarray, importance: np.ndarray, block: int, low: int, high: int, dtype: np.dtype[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Codes `[K, N]` and scales `[blocks, N]`, each block's scale the one that loses least on the calibration rows."""
    inner, outer = matrix.shape
    codes, scales = np.empty((inner, outer), np.int8), np.empty((-(-inner // block), outer), dtype)
    for number, first in enumerate(range(0, inner, block)):
        rows = slice(first, min(inner, first + block))
        wanted = search_scales(matrix[rows], importance[rows], low, high)
        scales[number], inverse = rtn.usable_scales(wanted, 1, dtype)
        codes[rows] = rtn.round_to_codes(np.array(matrix[rows]), inverse, low, high)
    return codes, scales


def _relative_error(rows: np.ndarray, matrix: np.ndarray, rounded_rows: np.ndarray, rounded: np.ndarray) -> float:
    """‖X̂Ŵ − XW‖ / ‖XW‖."""
    wanted = rows @ matrix
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(rounded_rows @ rounded - wanted)) / norm if norm else 0.0
