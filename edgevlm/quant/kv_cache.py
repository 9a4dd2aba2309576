"""The KV cache in eight bits: a quarter of the memory of a float32 cache, and no operator that the standard lacks.

Every channel of every head of a layer's keys and values has one fixed scale: the largest magnitude that calibration
saw of it is 127 steps. What a graph had as

    present = TensorScatter(past, new, position)                  y = Attention(q, present_key, present_value, mask)

becomes, with past and present int8 and still one buffer,

    present = TensorScatter(past, QuantizeLinear(new / scale, 1), position)
    y = Attention(q · key scales, Cast(present_key), Cast(present_value), mask) · value scales

since q·(s ∘ k) = (q ∘ s)·k, and what attention makes is linear in the values. So the scales meet the few rows of a step, and of
the cache only the type is changed on the way; QuantizeLinear rounds to nearest and saturates where a later prompt is louder
than calibration was. KIVI measures that keys have outliers in fixed channels, which is why each has a scale of its own
(https://arxiv.org/abs/2402.02750). What cross-attention reads stays as it is. It knows nothing of families or backends;
libraries that have such a cache (transformers, TensorRT-LLM) have it inside of their own runtimes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ..errors import RecipeError

__all__ = ["cache_inputs", "cache_updates", "quantize_kv_cache"]

_CACHE = re.compile(r"past_key_values\.\d+\.(key|value)")
#: The largest magnitude is this many steps.
_STEPS = 127


def cache_inputs(model: ir.Model) -> list[str]:
    """The inputs that hold keys and values; a decoder has them."""
    return [past.name for past in model.graph.inputs if past.name is not None and _CACHE.fullmatch(past.name)]


def cache_updates(model: ir.Model) -> dict[str, ir.Value]:
    """The rows that a step writes, `[B, H_kv, S, D]`, by the cache input that they are written into: what calibration looks at.

    Raises RecipeError where the graph has no cache, or one of another form.
    """
    updates = {name: _input(_scatter(_find(model, name)), 1) for name in cache_inputs(model)}
    for name, rows in updates.items():
        if rows.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or rows.shape is None or len(rows.shape) != 4:
            raise RecipeError(
                f"What is written into the KV cache {name} is {rows.dtype} of the shape {rows.shape}: it is no float cache."
            )
    if not updates:
        raise RecipeError(
            "This part has no KV cache: none of its inputs is called past_key_values.N.key or .value. "
            "An int8 KV cache is for decoders."
        )
    return updates


def quantize_kv_cache(model: ir.Model, peaks: Mapping[str, np.ndarray]) -> None:
    """Rewrites, in place, a decoder whose keys and values are floats into one that keeps them in int8.

    `peaks` has, for each input that `cache_updates` names, the largest magnitudes `[H_kv, D]` that were written into it. A
    channel that calibration hardly saw gets the scale of a thousandth of the layer's loudest, one that it never saw that of
    the loudest itself. Raises RecipeError where something of that is missing or does not fit; the graph is then unchanged.
    """
    updates = cache_updates(model)
    scales = {name: _scales(name, rows, peaks) for name, rows in updates.items()}
    attentions = {name: _attentions(_scatter(_find(model, name))) for name in updates}
    for name, readers in attentions.items():
        _store_int8(model.graph, _find(model, name), scales[name])
        for attention in readers:
            _widen(model.graph, attention, 1 if name.endswith("key") else 2, scales[name])


def _scatter(past: ir.Value) -> ir.Node:
    """What writes into a cache, the only one to read it (its shape aside)."""
    readers = [use.node for use in past.uses() if use.node.op_type != "Shape"]
    if len(readers) != 1 or readers[0].op_type != "TensorScatter" or readers[0].inputs[0] is not past:
        raise RecipeError(
            f"The KV cache {past.name} is read by {', '.join(node.op_type for node in readers) or 'nothing'}, not by one "
            "TensorScatter: only caches as `edgevlm export` writes them are kept in int8."
        )
    return readers[0]


def _find(model: ir.Model, name: str) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == name)


def _input(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None
    return value


def _scales(name: str, rows: ir.Value, peaks: Mapping[str, np.ndarray]) -> np.ndarray:
    """`[H_kv, D]`, in the type of the rows."""
    shape = rows.shape
    assert shape is not None
    assert rows.dtype is not None
    if name not in peaks:
        raise RecipeError(f"Calibration saw nothing of the KV cache {name}; it saw {', '.join(sorted(peaks)) or 'no cache'}.")
    peak = np.asarray(peaks[name], np.float64)
    if peak.shape != (shape[1], shape[3]):
        raise RecipeError(f"The KV cache {name} has {shape[1]} heads of {shape[3]}; calibration gave {list(peak.shape)}.")
    if not np.isfinite(peak).all():
        raise RecipeError(f"Calibration saw NaN or infinite values in the KV cache {name}. Its weights or samples are broken.")
    loudest = float(np.abs(peak).max(initial=0)) or 1.0
    dtype = rows.dtype.numpy()
    peak = np.where(peak == 0, loudest, np.maximum(np.abs(peak), loudest / 1000))
    return np.maximum(peak / _STEPS, np.finfo(dtype).smallest_normal).astype(dtype)  # its inverse is finite then


def _attentions(scatter: ir.Node) -> list[ir.Node]:
    """What reads a present cache. Raises RecipeError where it is not attention alone."""
    present = scatter.outputs[0]
    readers = [(use.node, use.idx) for use in present.uses() if use.node.op_type != "Shape"]
    for node, place in readers:
        query = node.inputs[0]
        heads = query.shape[1] if query is not None and query.shape is not None and len(query.shape) == 4 else None
        if node.op_type != "Attention" or place not in (1, 2) or not isinstance(heads, int):
            raise RecipeError(
                f"{node.op_type} reads the KV cache {present.name}; only Attention with a query [batch, heads, rows, width] "
                "can read one of int8."
            )
    return [node for node, _ in readers]


def _store_int8(graph: ir.Graph, past: ir.Value, scales: np.ndarray) -> None:
    scatter = _scatter(past)
    rows, present = _input(scatter, 1), scatter.outputs[0]
    assert rows.dtype is not None
    one = _constant(graph, f"{past.name}.one", np.ones((), scales.dtype))
    zero = _constant(graph, f"{past.name}.zero", np.zeros((), np.int8))
    inverse = _constant(
        graph, f"{past.name}.inverse_scales", (1 / scales.astype(np.float64)).astype(scales.dtype)[None, :, None]
    )
    scaled = _node(graph, scatter, "Mul", [rows, inverse], f"{past.name}.scaled", rows.dtype, rows.shape)
    codes = _node(graph, scatter, "QuantizeLinear", [scaled, one, zero], f"{past.name}.codes", ir.DataType.INT8, rows.shape)
    scatter.replace_input_with(1, codes)
    past.dtype = present.dtype = ir.DataType.INT8


def _widen(graph: ir.Graph, attention: ir.Node, place: int, scales: np.ndarray) -> None:
    """The cache as floats without their scales, which go to the query (keys) or to what comes out (values)."""
    present, query, out = _input(attention, place), _input(attention, 0), attention.outputs[0]
    assert query.dtype is not None
    assert query.shape is not None
    assert out.dtype is not None
    to = ir.AttrInt64("to", int(query.dtype))
    name = f"{present.name}.{attention.name}"
    wide = _node(graph, attention, "Cast", [present], f"{name}.cast", query.dtype, present.shape, [to])
    attention.replace_input_with(place, wide)
    # Query heads are grouped by the key head that they share.
    group = int(query.shape[1]) // len(scales)  # type: ignore[arg-type]
    factors = _constant(graph, f"{name}.scales", np.repeat(scales, group, 0)[None, :, None])
    if place == 1:
        attention.replace_input_with(
            0, _node(graph, attention, "Mul", [query, factors], f"{name}.query", query.dtype, query.shape)
        )
        return
    uses = list(out.uses())
    scaled = ir.Node("", "Mul", [out, factors], name=f"{name}.output")
    result = scaled.outputs[0]
    result.name, result.dtype, result.shape = f"{name}.output", out.dtype, out.shape
    graph.insert_after(attention, scaled)
    for use in uses:
        use.node.replace_input_with(use.idx, result)


def _node(
    graph: ir.Graph, before: ir.Node, op_type: str, inputs: list[ir.Value], name: str, dtype: ir.DataType,
    shape: ir.Shape | None, attributes: list[ir.Attr] | None = None,
) -> ir.Value:  # fmt: skip
    """The output of a new operator, put before another one."""
    node = ir.Node("", op_type, inputs, attributes or [], name=name)
    graph.insert_before(before, node)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, dtype, shape
    return node.outputs[0]


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(np.array(array, order="C"), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
