"""The canonical graph in operators of opset 20, for a TensorRT whose parser knows no newer ones: JetPack 6 has 10.3.

1. `RMSNormalization` is written out in float32.
2. `RotaryEmbedding` becomes products of the two halves of a row with cosines and sines.
3. `TensorScatter` becomes `ScatterElements` into the same cache of fixed capacity. The result is another tensor than the input,
   so a step copies the cache.
4. `Attention` becomes two products around a softmax, with the query heads that share a key head below each other,
   `[B, H_kv, G·S, D]` against `[B, H_kv, T, D]`, so that keys and values are not repeated.
5. `Clip` of integers becomes `Max` and `Min`.

What is left must be in the list of operators that TensorRT 10.1's parser has, or is named:
https://github.com/onnx/onnx-tensorrt/blob/10.1-GA/docs/operators.md (10.3 has no list of its own). Blocks of INT4 weights stay
as they are: that parser takes their size from the shape of the scales. It works on graphs in any float type, and knows nothing
of engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ..errors import EngineError
from .cast import fill_types

__all__ = ["KNOWN", "lower_graph"]

#: Operators of that list which stand in bundles, or may.
KNOWN = frozenset((
    "Abs", "Add", "And", "ArgMax", "Cast", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv", "Cos",
    "CumSum", "DequantizeLinear", "Div", "Einsum", "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather",
    "GatherElements", "GatherND", "Gelu", "Gemm", "Greater", "GreaterOrEqual", "Identity", "LayerNormalization", "Less",
    "LessOrEqual", "Log", "MatMul", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pad", "Pow",
    "QuantizeLinear", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu",
    "Reshape", "Round", "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax",
    "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze",
    "Where", "Xor",
))  # fmt: skip
_OPSET, _OPSET_BLOCKS = 20, 21
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def lower_graph(model: ir.Model) -> None:
    """Rewrites a graph in place. Raises EngineError, naming the node, for what has no older form."""
    fill_types(model.graph)
    writer = _Writer(model.graph)
    for node in list(model.graph):
        if rule := _RULES.get(node.op_type):
            rule(writer, node)
    if unknown := [node for node in model.graph if node.op_type not in KNOWN or node.domain]:
        node = unknown[0]
        raise EngineError(
            f"TensorRT before 10.15 has no {node.domain and node.domain + '::'}{node.op_type}, which the node {node.name} is. "
            "A newer TensorRT is needed, or ONNX Runtime."
        )
    blocks = any(node.attributes.get_int("block_size", 0) for node in model.graph)
    model.graph.opset_imports[""] = _OPSET_BLOCKS if blocks else _OPSET


class _Writer:
    """Puts nodes before another, and constants into a graph once for all who ask."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: dict[tuple[object, ...], ir.Value] = {}

    def add(self, before: ir.Node, op_type: str, name: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        """The output of a new node; its type is that of the first input, unless `to` says otherwise."""
        options = [
            ir.AttrInt64(key, value) if isinstance(value, int) else ir.AttrInt64s(key, value)
            for key, value in attributes.items()
        ]
        node = ir.Node("", op_type, list(inputs), options, name=name)
        self.graph.insert_before(before, node)
        output = node.outputs[0]
        output.name = name
        to = int(ir.DataType.INT64) if op_type == "Shape" else attributes.get("to")
        dtype = ir.DataType(to) if isinstance(to, int) else inputs[0].dtype
        if dtype is not None:
            output.dtype = dtype
        return output

    def constant(self, array: np.ndarray) -> ir.Value:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.made:
            name = f"lowered.{len(self.made)}"
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(value)
            self.made[key] = value
        return self.made[key]

    def ints(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, np.int64))

    def number(self, number: float, dtype: ir.DataType | None) -> ir.Value:
        assert dtype is not None
        return self.constant(np.array(number).astype(dtype.numpy()))

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """The value takes the place of a node's output, name and all."""
        old = node.outputs[0]
        name, shape, dtype = old.name, old.shape, old.dtype
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        value.name, value.shape = name, shape
        if dtype is not None:
            value.dtype = dtype


def _name(node: ir.Node) -> str:
    """What new nodes are named after; no two nodes have one output."""
    return node.name or node.outputs[0].name or ""


def _read(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None
    return value


def _rms_norm(writer: _Writer, node: ir.Node) -> None:
    x, scale = _read(node, 0), _read(node, 1)
    if node.attributes.get_int("axis", -1) != -1:
        raise EngineError(f"The norm {node.name} is not over the last dimension; it has no form for TensorRT before 10.15.")
    add, name = writer.add, _name(node)
    wide = add(node, "Cast", f"{name}.wide", x, to=int(ir.DataType.FLOAT))
    square = add(node, "Mul", f"{name}.square", wide, wide)
    mean = add(node, "ReduceMean", f"{name}.mean", square, writer.ints(-1), keepdims=1)
    shifted = add(node, "Add", f"{name}.shifted", mean, writer.number(node.attributes.get_float("epsilon", 1e-5), wide.dtype))
    normed = add(node, "Div", f"{name}.normed", wide, add(node, "Sqrt", f"{name}.root", shifted))
    assert x.dtype is not None
    narrow = add(node, "Cast", f"{name}.narrow", normed, to=int(x.dtype))
    writer.replace(node, add(node, "Mul", f"{name}.scaled", narrow, scale))


def _rotary(writer: _Writer, node: ir.Node) -> None:
    x, cosines, sines = (_read(node, i) for i in range(3))
    options = node.attributes
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        raise EngineError(f"{node.name} looks its angles up; it has no form for TensorRT before 10.15.")
    if any(options.get_int(key, 0) for key in ("interleaved", "num_heads", "rotary_embedding_dim")):
        raise EngineError(f"{node.name} is interleaved or partial; TensorRT before 10.15 has no form for it.")
    add, name = writer.add, _name(node)
    half = int(cosines.shape[-1]) if cosines.shape is not None and isinstance(cosines.shape[-1], int) else None
    if half is None and x.shape is not None and isinstance(x.shape[3], int):
        half = x.shape[3] // 2
    if half is None:
        raise EngineError(f"The width of {node.name} is not known; it has no form for TensorRT before 10.15.")

    def cut(part: str, first: int, end: int) -> ir.Value:
        return add(node, "Slice", f"{name}.{part}", x, writer.ints(first), writer.ints(end), writer.ints(-1))

    left, right = cut("left", 0, half), cut("right", half, 2 * half)
    cosines = add(node, "Unsqueeze", f"{name}.cosines", cosines, writer.ints(1))
    sines = add(node, "Unsqueeze", f"{name}.sines", sines, writer.ints(1))

    def product(part: str, a: ir.Value, b: ir.Value) -> ir.Value:
        return add(node, "Mul", f"{name}.{part}", a, b)

    real = add(node, "Sub", f"{name}.real", product("lc", left, cosines), product("rs", right, sines))
    other = add(node, "Add", f"{name}.other", product("rc", right, cosines), product("ls", left, sines))
    writer.replace(node, add(node, "Concat", f"{name}.turned", real, other, axis=-1))


def _scatter(writer: _Writer, node: ir.Node) -> None:
    past, rows, start = (_read(node, i) for i in range(3))
    if past.dtype not in _FLOATS:
        raise EngineError(
            f"The KV cache {past.name} is {past.dtype and past.dtype.name.lower()}; TensorRT before 10.15 scatters floats. "
            "Quantize with --kv-cache float."
        )
    add, name = writer.add, _name(node)
    shape = add(node, "Shape", f"{name}.shape", rows)
    count = add(node, "Gather", f"{name}.count", shape, writer.number(2, ir.DataType.INT64), axis=0)
    zero, one = (writer.number(n, ir.DataType.INT64) for n in (0, 1))
    steps = add(node, "Range", f"{name}.steps", zero, count, one)
    column = add(node, "Unsqueeze", f"{name}.start", start, writer.ints(1, 2, 3))
    places = add(node, "Unsqueeze", f"{name}.places", steps, writer.ints(0, 1, 3))
    index = add(node, "Expand", f"{name}.index", add(node, "Add", f"{name}.at", column, places), shape)
    writer.replace(node, add(node, "ScatterElements", f"{name}.written", past, index, rows, axis=2))


def _attention(writer: _Writer, node: ir.Node) -> None:
    query, key, value = (_read(node, i) for i in range(3))
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    beyond = [i for i in range(4, len(node.inputs)) if node.inputs[i] is not None]
    if beyond or len(node.outputs) > 1 or any(node.attributes.get_int(k, 0) for k in ("is_causal", "q_num_heads")):
        raise EngineError(f"{node.name} is an Attention with a cache or causality of its own; bundles have an explicit mask.")
    heads, width = _static(query, 1, node), _static(query, 3, node)
    groups = heads // _static(key, 1, node)
    add, name = writer.add, _name(node)
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(width)
    query = add(node, "Mul", f"{name}.scaled", query, writer.number(scale, query.dtype))
    if groups > 1:
        query = add(node, "Reshape", f"{name}.grouped", query, writer.ints(0, heads // groups, -1, width))
    turned = add(node, "Transpose", f"{name}.keys", key, perm=[0, 1, 3, 2])
    scores = add(node, "MatMul", f"{name}.scores", query, turned)
    if mask is not None:
        scores = _masked(writer, node, scores, mask, groups)
    shares = add(node, "Softmax", f"{name}.attention.softmax", scores, axis=-1)
    seen = add(node, "MatMul", f"{name}.seen", shares, value)
    if groups > 1:
        seen = add(node, "Reshape", f"{name}.ungrouped", seen, writer.ints(0, heads, -1, _static(value, 3, node)))
    writer.replace(node, seen)


def _masked(writer: _Writer, node: ir.Node, scores: ir.Value, mask: ir.Value, groups: int) -> ir.Value:
    """Heads of one group are rows below each other, so the mask is repeated; one that differs by head is laid out like them."""
    add, name = writer.add, _name(node)
    by_head = mask.shape is not None and len(mask.shape) == 4 and mask.shape[1] != 1
    if groups > 1 and by_head:
        raise EngineError(f"{name} has a mask for each head and shares keys; TensorRT before 10.15 has no form for it.")
    if groups > 1:
        known = writer.made.get((mask, groups))
        mask = known or add(node, "Concat", f"{name}.repeated", *[mask] * groups, axis=-2)
        writer.made[(mask, groups)] = mask
    if mask.dtype != ir.DataType.BOOL:
        return add(node, "Add", f"{name}.attention.mask", scores, mask)
    import ml_dtypes

    assert scores.dtype is not None
    never = writer.number(float(ml_dtypes.finfo(scores.dtype.numpy()).min), scores.dtype)
    masked = add(node, "Where", f"{name}.attention.mask", mask, scores, never)
    masked.dtype = scores.dtype
    return masked


def _static(value: ir.Value, place: int, node: ir.Node) -> int:
    size = value.shape[place] if value.shape is not None and len(value.shape) == 4 else None
    if not isinstance(size, int):
        raise EngineError(f"The heads or widths of {node.name} are not known; it has no form for TensorRT before 10.15.")
    return size


def _clip(writer: _Writer, node: ir.Node) -> None:
    value = _read(node, 0)
    if value.dtype in _FLOATS:
        return  # that parser's Clip takes floats alone
    for place, op_type in ((1, "Max"), (2, "Min")):
        bound = node.inputs[place] if len(node.inputs) > place else None
        if bound is not None:
            value = writer.add(node, op_type, f"{_name(node)}.{op_type.lower()}", value, bound)
    writer.replace(node, value)


_RULES: dict[str, Callable[[_Writer, ir.Node], None]] = {
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotary,
    "TensorScatter": _scatter,
    "Attention": _attention,
    "Clip": _clip,
}
