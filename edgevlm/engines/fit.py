"""A bundle's graph as TensorRT takes it: the same operators, with what its parser or builder insists on.

1. A dimension that has one size in every profile is written down: TensorRT-RTX's KV cache layer takes no dynamic capacity.
2. Attention in float32 is marked `TRT_decomposable`: there is no fused kernel for it.
3. Rows gathered from an int8 table come from an int32 table of a quarter of the columns, four codes a number, and are taken
   apart behind the Gather: TensorRT takes an int8 constant in front of DequantizeLinear alone, and would hold a table
   dequantized there as floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ..tensors import StreamedTensor
from .profiles import Profile

__all__ = ["fix_dimensions", "mark_decomposable", "pack_tables"]

_ROWS = 4096


def fix_dimensions(model: ir.Model, profiles: Sequence[Profile]) -> None:
    """Gives named dimensions that have one size in all profiles that size, in place; what lies between is left to be inferred."""
    sizes: dict[str, set[int]] = {}
    for value in model.graph.inputs:
        for i, dimension in enumerate(value.shape or ()):
            if not isinstance(dimension, int):
                seen = sizes.setdefault(str(dimension.value), set())
                seen.update(shape[i] for profile in profiles for shape in profile.shapes[value.name or ""])
    fixed = {name: seen.pop() for name, seen in sizes.items() if len(seen) == 1}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else fixed.get(str(d.value), d) for d in value.shape])
    for node in model.graph:
        for output in node.outputs:
            if output.shape is not None and not output.is_graph_output() and any(not isinstance(d, int) for d in output.shape):
                output.shape = None


def mark_decomposable(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Attention" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT:
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)


def pack_tables(model: ir.Model) -> None:
    """Rewrites every `Cast(Gather(int8 table, ids))`, in place."""
    packed: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.const_value is None or table.const_value.dtype != ir.DataType.INT8:
            continue
        if table not in packed:
            packed[table] = _packed_table(model.graph, table)
        node.replace_input_with(0, packed[table])
        _take_apart(model.graph, node, int(table.const_value.shape[1]))  # type: ignore[arg-type]
    for table in packed:
        del model.graph.initializers[table.name or ""]


def _packed_table(graph: ir.Graph, table: ir.Value) -> ir.Value:
    """int32 `[rows, ceil(columns / 4)]`: c0 + 256 c1 + 256² c2 + 256³ c3 of signed codes, each at least -127."""
    tensor = table.const_value
    assert tensor is not None
    rows, columns = (int(d) for d in tensor.shape.numpy())
    wide = -(-columns // 4)

    def blocks() -> Iterator[np.ndarray]:
        codes = tensor.numpy()
        for first in range(0, rows, _ROWS):
            block = codes[first : first + _ROWS].astype(np.int32)
            block = np.pad(block, ((0, 0), (0, 4 * wide - columns))).reshape(-1, wide, 4)
            yield (block * np.array([1, 1 << 8, 1 << 16, 1 << 24], np.int32)).sum(-1, dtype=np.int32)

    name = f"{table.name}.packed"
    streamed = StreamedTensor(blocks, ir.DataType.INT32, (rows, wide), name)
    value = ir.Value(name=name, shape=ir.Shape((rows, wide)), type=ir.TensorType(ir.DataType.INT32), const_value=streamed)
    graph.register_initializer(value)
    return value


def _take_apart(graph: ir.Graph, gather: ir.Node, columns: int) -> None:
    """int32 `[…, ceil(columns / 4)]` behind a Gather → its codes as int32 `[…, columns]`, for all that read it."""
    name, rest = gather.name or "gather", gather.outputs[0]
    readers = list(rest.uses())
    rest.dtype = ir.DataType.INT32
    rest.shape = None
    here, digits = gather, []

    def add(op_type: str, *inputs: ir.Value, attributes: tuple[ir.Attr, ...] = ()) -> ir.Value:
        nonlocal here
        node = ir.Node("", op_type, list(inputs), list(attributes), name=f"{name}_codes_{op_type.lower()}_{len(used)}")
        used.append(node)
        graph.insert_after(here, node)
        here = node
        node.outputs[0].name, node.outputs[0].dtype = node.name, ir.DataType.INT32
        return node.outputs[0]

    used: list[ir.Node] = []
    half, base = (_number(graph, f"{name}.{n}", n) for n in (128, 256))
    for _ in range(3):
        digit = add("Sub", add("Mod", add("Add", rest, half), base), half)
        digits.append(digit)
        rest = add("Div", add("Sub", rest, digit), base)
    digits.append(rest)
    last = _ints(graph, f"{name}.last", [-1])
    stacked = add("Concat", *(add("Unsqueeze", d, last) for d in digits), attributes=(ir.AttrInt64("axis", -1),))
    flat = add("Reshape", stacked, _ints(graph, f"{name}.flat", [0] * (_rank(gather) - 1) + [-1]))
    if columns % 4:
        bounds = (_ints(graph, f"{name}.{end}", [n]) for end, n in (("first", 0), ("columns", columns)))
        flat = add("Slice", flat, *bounds, last)
    for use in readers:
        use.node.replace_input_with(use.idx, flat)


def _rank(gather: ir.Node) -> int:
    ids = gather.inputs[1]
    assert ids is not None
    assert ids.shape is not None
    return len(ids.shape) + 1


def _number(graph: ir.Graph, name: str, number: int) -> ir.Value:
    return _constant(graph, name, np.array(number, np.int32))


def _ints(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    return _constant(graph, name, np.array(numbers, np.int64))


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
