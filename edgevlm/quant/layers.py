"""The linear layers of one part under a recipe that looks at calibration samples: what their weights become.

Segment by segment (`calibrate`): run it over the samples, fold factors (AWQ, SmoothQuant), then round (AWQ with searched
scales, GPTQ). What comes out is put on the shelf, and the segment's float weights are let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import RecipeError, WeightsError
from . import awq, gptq, rtn
from .calibrate import Array, Feeds, InputStats, Segment, Shelf, run_segment, segments_of
from .fold import Fold, consumers_of, find_fold, origin_of, scale_rows, weight_of
from .kv_cache import cache_inputs, cache_updates
from .recipe import Recipe, Rule
from .scales import search_scales
from .smooth import smooth_factors
from .w8a8 import activation_scale

__all__ = ["Prepared", "block_of", "prepare_layers"]

#: Least and greatest code of a method.
CODES = {"int4": (-8, 7), "int3": (-4, 3)}
#: Weights of fewer bytes are part of a segment's graph, larger ones are fed to it.
_SMALL = 1 << 16
#: Calibration rows that the errors in the report are measured on, and about how many inputs at a time.
_ROWS, _INPUTS = 128, 512
#: What numbers of a float16 graph should stay below; its greatest is 65,504, and other samples may be louder.
_FLOAT16 = 16384.0


@dataclass
class Prepared:
    """What calibration decided: `weights`, by name, the codes (INT4: packed) and scales; `activations`, by the name of the
    node, the scale of its input; `caches`, by the input's name, the largest magnitudes `[H, D]`; `layers`, a record of each."""

    weights: dict[str, tuple[Array, np.ndarray]] = field(default_factory=dict)
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

    def stored(self) -> np.ndarray:
        """The weight as it is stored; a strip of it is cast faster, and in less memory, than the whole."""
        assert self.weight.const_value is not None
        return np.asarray(self.weight.const_value.numpy())


def block_of(rule: Rule, part: str, weight: ir.Value) -> int:
    """Inputs that share a scale. Raises RecipeError where the weight has fewer than its rule asks for."""
    assert weight.const_value is not None
    inner = int(weight.const_value.shape[0])  # type: ignore[arg-type]
    if rule.block_size is None:
        return 32  # also of fewer inputs, one block that is not full: ONNX Runtime fuses no size but powers of two from 16
    if rule.block_size > inner:
        raise RecipeError(
            f"The weight {weight.name} of the part {part} has {inner} inputs, fewer than the {rule.block_size} of a block that "
            "the recipe asks for. Give it a rule of its own with a smaller block_size (0: one scale a channel), or leave it "
            "float."
        )
    return rule.block_size or inner


def prepare_layers(
    model: ir.Model, part: str, recipe: Recipe, feeds: Sequence[Feeds], shelf: Shelf, step: Callable[[int, int], None]
) -> Prepared:
    """Decides about every linear layer of a part that the recipe calibrates. Folds factors into the model's weights.

    `step` is told which segment begins, of how many.
    """
    graph, prepared = model.graph, Prepared()
    caches = cache_updates(model) if recipe.kv_cache != "float" and cache_inputs(model) else {}
    segments = segments_of(graph, together=_folding(graph, part, recipe))
    samples: list[dict[str, Array]] = [dict(feed) for feed in feeds]
    for number, segment in enumerate(segments):
        step(number, len(segments))
        layers = [layer for layer in _layers(segment.nodes, part, recipe) if layer.rule.calibrated]
        new = {name: rows for name, rows in caches.items() if rows.producer() in segment.nodes}
        watched, grams = [layer.value for layer in layers], [x.value for x in layers if "gptq" in x.rule.algorithm]
        weights, small = _initializers(segment)
        heads = [rows.name or "" for rows in new.values()]
        stats = run_segment(segment, weights, small, samples, watched, model.opset_imports, shelf, grams=grams, heads=heads)
        _forget(samples, segments[number + 1 :])
        for layer in layers:
            _check(layer, part, stats.get(layer.value))
        every, layers = layers, list({layer.weight: layer for layer in layers}.values())  # one a weight, whoever reads it
        nearest = {layer.weight: _nearest_error(layer, part, stats[layer.value]) for layer in layers}
        before = {layer.weight: layer.weight.const_value for layer in layers}
        _fold(segment, every, stats)
        for name, rows in new.items():
            found = stats.get(rows.name or "")
            if found is not None:
                prepared.caches[name] = found.peak.reshape(int(rows.shape[1]), -1)  # type: ignore[index, arg-type]
        for layer in every:
            if layer.rule.method == "w8a8":
                prepared.activations[layer.node.name or ""] = activation_scale(stats[layer.value], layer.rule.range)
        for layer in layers:
            _round(layer, part, stats[layer.value], nearest[layer.weight], prepared, shelf)
            layer.weight.const_value = before[layer.weight]  # its codes are what is kept
        for value in {v for node in segment.nodes for v in node.inputs if v is not None and v.is_initializer()}:
            if isinstance(value.const_value, ir.Tensor) and value.const_value.nbytes > _SMALL:
                value.const_value = _shelved(value.const_value, shelf)
    return prepared


def _shelved(tensor: ir.TensorProtocol, shelf: Shelf) -> ir.TensorProtocol:
    array = shelf.put(np.asarray(tensor.numpy()))
    shape, name = ir.Shape(array.shape), tensor.name
    return ir.LazyTensor(lambda: ir.Tensor(np.asarray(array), name=name), dtype=tensor.dtype, shape=shape, name=name)


def _folding(graph: ir.Graph, part: str, recipe: Recipe) -> Iterator[list[ir.Node]]:
    """Layers that factors could be folded for, each with what would take them."""
    for layer in _layers(graph, part, recipe):
        assert layer.node.inputs[0] is not None
        value = origin_of(layer.node.inputs[0])
        if layer.rule.method == "w8a8" or "awq" in layer.rule.algorithm:
            fold, readers = find_fold(value), consumers_of(value)
            yield [
                *(readers or ()),
                *(use.node for target in (fold.targets if fold else ()) for use in target.uses()),
                layer.node,
            ]


def _layers(nodes: Iterable[ir.Node], part: str, recipe: Recipe) -> Iterator[_Layer]:
    for node in nodes:
        weight = weight_of(node)
        if weight is not None:
            yield _Layer(node, weight, recipe.rule_for(part, weight.name or ""))


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


def _forget(samples: list[dict[str, Array]], later: Sequence[Segment]) -> None:
    wanted = {name for segment in later for name in segment.takes}
    for sample in samples:
        for name in set(sample) - wanted:
            del sample[name]


# -------------------------------------------------------------------------------------------- folding


def _fold(segment: Segment, layers: list[_Layer], stats: dict[str, InputStats]) -> None:
    """Finds factors for every group of layers that read one value, and folds them where they can go."""
    rules = {layer.node: layer.rule for layer in layers}
    done: set[ir.Value] = set()
    for layer in layers:
        assert layer.node.inputs[0] is not None
        value, found = origin_of(layer.node.inputs[0]), stats[layer.value]
        readers = consumers_of(value) if value not in done else None
        done.add(value)
        fold = _fold_within(segment, value, readers) if readers else None
        if readers is None or fold is None or fold.width != len(found.peak):
            continue
        factors = _factors([rules[node] for node in readers if node in rules], readers, fold, found)
        if factors is None or not _fits(readers, factors, found) or not fold.divide(factors):
            continue
        for node in readers:
            weight = weight_of(node)
            assert weight is not None
            scale_rows(weight, factors)
        for name in {node.inputs[0].name or "" for node in readers if node.inputs[0] is not None} & set(stats):
            stats[name].divide(factors)
        if fold.cached is not None and fold.cached[0] in stats:
            stats[fold.cached[0]].divide(fold.cached_factors(factors))


def _fold_within(segment: Segment, value: ir.Value, readers: list[ir.Node]) -> Fold | None:
    """A fold that changes nothing outside of a segment: what came before is rounded already."""
    weights = [weight for node in readers if (weight := weight_of(node)) is not None]
    if value.producer() not in segment.nodes or any(len(list(weight.uses())) > 1 for weight in weights):
        return None
    fold, inside = find_fold(value), set(segment.nodes)
    changed = [*readers, *(use.node for target in (fold.targets if fold else ()) for use in target.uses())]
    return fold if all(node in inside for node in changed) else None


def _factors(rules: list[Rule], readers: list[ir.Node], fold: Fold, found: InputStats) -> np.ndarray | None:
    """What the rules of the layers that read a value want it to be divided by, or None."""
    weights = [weight.const_value for node in readers if (weight := weight_of(node)) is not None]
    smooth = next((rule for rule in rules if rule.method == "w8a8"), None)
    aware = next((rule for rule in rules if "awq" in rule.algorithm), None)
    if smooth is not None:
        factors = fold.tie(smooth_factors(found.peak, [rtn.stored_matrix(weight) for weight in weights], smooth.smooth))
    elif aware is not None:
        low, high = CODES[aware.method]
        block = 32 if aware.block_size is None else aware.block_size or fold.width

        def round_trip(weight: np.ndarray) -> np.ndarray:
            return _dequantized(*rtn.quantize_blocks(weight, block, low, high, np.dtype(np.float32)), block)

        stored = [np.asarray(weight.numpy()) for weight in weights if weight is not None]
        factors = awq.search_factors(found.rows, found.mean, stored, round_trip, fold.tie)
    else:
        return None
    return None if (factors == 1).all() else factors


def _fits(readers: list[ir.Node], factors: np.ndarray, found: InputStats) -> bool:
    """Whether a graph that computes in float16 can hold what the factors make larger: inputs, and the rows of weights."""
    for node in readers:
        weight = weight_of(node)
        assert weight is not None
        assert weight.const_value is not None
        if weight.const_value.dtype != ir.DataType.FLOAT16:
            continue
        peaks = np.array([np.abs(row).max() for row in np.asarray(weight.const_value.numpy())], np.float32)
        if max(float((found.peak / factors).max()), float((peaks * factors).max())) > _FLOAT16:
            return False
    return True


def _dequantized(codes: np.ndarray, scales: np.ndarray, block: int) -> np.ndarray:
    """float32 `[K, N]` of codes `[K, N]` and scales `[ceil(K / block), N]`."""
    return codes * np.repeat(scales.astype(np.float32), block, 0)[: len(codes)]


# ------------------------------------------------------------------------------------------- rounding


def _check(layer: _Layer, part: str, found: InputStats | None) -> None:
    name = layer.weight.name
    if found is None:
        raise RecipeError(
            f"No calibration sample reached the weight {name} of the part {part}. Give samples that use it, or a rule without "
            "calibration."
        )
    stored = layer.stored()
    if not all(np.isfinite(stored[strip]).all() for strip in _strips(len(stored))):
        raise WeightsError(f"The weight {name} of the part {part} has NaN or infinite values; it cannot be quantized.")
    if not np.isfinite(found.peak).all():
        raise RecipeError(f"What calibration saw enter the weight {name} of the part {part} has NaN or infinite values.")


def _nearest_error(layer: _Layer, part: str, found: InputStats) -> float:
    """What rounding to nearest, without folding, would do to the layer's output."""
    rule, rows = layer.rule, found.some(_ROWS)
    if rule.method == "w8a8":
        matrix = layer.matrix()
        codes, scales = rtn.quantize_channels(matrix, np.dtype(np.float32))
        rounded = _rounded(rows, activation_scale(found, "minmax"))
        return _relative_error(rows, matrix, rounded, lambda strip, _: codes[strip] * scales, 1)
    block, (low, high) = block_of(rule, part, layer.weight), CODES[rule.method]

    def nearest(_: slice, weight: np.ndarray) -> np.ndarray:
        return _dequantized(*rtn.quantize_blocks(weight, block, low, high, np.dtype(np.float32)), block)

    return _relative_error(rows, layer.stored(), rows, nearest, block)


def _round(layer: _Layer, part: str, found: InputStats, nearest: float, prepared: Prepared, shelf: Shelf) -> None:
    assert layer.weight.const_value is not None
    name, rule, matrix, dtype = layer.weight.name or "", layer.rule, layer.stored(), layer.weight.const_value.dtype.numpy()
    rows = rounded_rows = found.some(_ROWS)
    packed = None
    record: dict[str, Any] = {"part": part, "weight": name, "method": rule.method}
    if rule.method == "w8a8":
        rounded_rows = _rounded(rows, prepared.activations[layer.node.name or ""])
        block, (codes, scales) = len(matrix), rtn.quantize_channels(layer.matrix(), dtype)
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
        packed = rtn.pack_int4(codes)
        record |= {"algorithm": rule.algorithm, "block_size": block}
    prepared.weights[name] = shelf.put(codes if packed is None else packed), scales
    steps = np.atleast_2d(scales)

    def made(strip: slice, _: np.ndarray) -> np.ndarray:
        return _dequantized(codes[strip], steps[strip.start // block : -(-strip.stop // block)], block)

    error = _relative_error(rows, matrix, rounded_rows, made, block)
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
        weight = matrix[rows].astype(np.float32)
        scales[number], inverse = rtn.usable_scales(search_scales(weight, importance[rows], low, high), 1, dtype)
        codes[rows] = rtn.round_to_codes(weight, inverse, low, high)
    return codes, scales


def _relative_error(
    rows: np.ndarray,
    matrix: np.ndarray,
    rounded_rows: np.ndarray,
    rounded: Callable[[slice, np.ndarray], np.ndarray],
    block: int,
) -> float:
    """‖X̂Ŵ − XW‖ / ‖XW‖. `rounded` makes some rows of Ŵ, as many as fill blocks, from where they are and the same rows of W."""
    wanted = np.zeros((len(rows), matrix.shape[1]), np.float32)
    off = np.zeros_like(wanted)
    for strip in _strips(len(matrix), block):
        weight = matrix[strip].astype(np.float32)
        wanted += rows[:, strip] @ weight
        off += rounded_rows[:, strip] @ rounded(strip, weight)
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(off - wanted)) / norm if norm else 0.0


def _strips(inputs: int, block: int = 1) -> Iterator[slice]:
    """Some inputs at a time, whole blocks of them."""
    step = -(-_INPUTS // block) * block
    for first in range(0, inputs, step):
        yield slice(first, min(first + step, inputs))
