"""A bundle's graph as TensorRT takes it: the same operators, with what its parser or builder insists on.

1. A dimension that has one size in every profile is written down: TensorRT-RTX's KV cache layer takes no dynamic capacity.
2. Attention is marked `TRT_decomposable`: what no fused kernel covers (float32, some head sizes without a mask) is then
   computed in steps, and what one covers still takes it.
3. Rows gathered from an int8 table come from an int32 table of a quarter of the columns, four codes a number, and are taken
   apart behind the Gather: TensorRT takes an int8 constant in front of DequantizeLinear alone, and would hold a table
   dequantized there as floats.
4. A mask that comes from an input unchanged is negated twice in front of Attention. Without, TensorRT-RTX 1.7 ends with
   `tactics_tiled_layout.cpp: CHECK(op->input_layouts().size() > idx) failed` (T5's cross-attention).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ..tensors import StreamedTensor
from .profiles import Profile

__all__ = ["fix_dimensions", "mark_decomposable", "pack_tables", "shield_masks"]

_ROWS = 4096
_SHAPING = ("Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "Slice", "Identity")


def fix_dimensions(model: ir.Model, profiles: Sequence[Profile]) -> None:
    """Gives named dimensions with one size in all profiles that size, in place."""
    sizes: dict[str, set[int]] = {}
    for value in model.graph.inputs:
        for i, dimension in enumerate(value.shape or ()):
            if not isinstance(dimension, int):
                seen = sizes.setdefault(str(dimension.value), set())
                seen.update(shape[i] for profile in profiles for shape in profile.shapes[value.name or ""])
    fixed = {name: seen.pop() for name, seen in sizes.items() if len(seen) == 1}
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else fixed.get(str(d.value), d) for d in value.shape])


def mark_decomposable(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)


def shield_masks(model: ir.Model) -> None:
    shielded: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        if mask is None or mask.dtype != ir.DataType.BOOL or not _comes_from_input(mask):
            continue
        if mask not in shielded:
            value = mask
            for i in range(2):
                negation = ir.Node("", "Not", [value], name=f"{mask.name}.not.{i}")
                model.graph.insert_before(node, negation)
                value = negation.outputs[0]
                value.name, value.dtype, value.shape = negation.name, mask.dtype, mask.shape
            shielded[mask] = value
        node.replace_input_with(3, shielded[mask])


def _comes_from_input(value: ir.Value) -> bool:
    while (node := value.producer()) is not None and node.op_type in _SHAPING and node.inputs[0] is not None:
        value = node.inputs[0]
    return value.is_graph_input()


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
    """int32 `[rows, ceil(columns / 4)]`: c0 + 256 c1 + 256² c2 + 256³ c3 of signed codes of at least -127, each a quarter of
    the columns away from the one before."""
    tensor = table.const_value
    assert tensor is not None
    rows, columns = (int(d) for d in tensor.shape.numpy())
    wide = -(-columns // 4)

    def blocks() -> Iterator[np.ndarray]:
        codes = tensor.numpy()
        for first in range(0, rows, _ROWS):
            block = codes[first : first + _ROWS].astype(np.int32)
            block = np.pad(block, ((0, 0), (0, 4 * wide - columns))).reshape(-1, 4, wide)
            yield (block * np.array([[1], [1 << 8], [1 << 16], [1 << 24]], np.int32)).sum(1, dtype=np.int32)

    name = f"{table.name}.packed"
    streamed = StreamedTensor(blocks, ir.DataType.INT32, (rows, wide), name)
    value = ir.Value(name=name, shape=ir.Shape((rows, wide)), type=ir.TensorType(ir.DataType.INT32), const_value=streamed)
    graph.register_initializer(value)
    return value


def _take_apart(graph: ir.Graph, gather: ir.Node, columns: int) -> None:
    """int32 `[…, ceil(columns / 4)]` behind a Gather → its codes as int32 `[…, columns]`, for all that read it."""
    name, rest = gather.name or "gather", gather.outputs[0]
    readers = list(rest.uses())
    rest.dtype, rest.shape = ir.DataType.INT32, None
    here, digits, count = gather, [], itertools.count()

    def add(op_type: str, *inputs: ir.Value, attributes: tuple[ir.Attr, ...] = ()) -> ir.Value:
        nonlocal here
        node = ir.Node("", op_type, list(inputs), list(attributes), name=f"{name}.codes.{next(count)}")
        graph.insert_after(here, node)
        here = node
        node.outputs[0].name, node.outputs[0].dtype = node.name, ir.DataType.INT32
        return node.outputs[0]

    half, base = (_constant(graph, f"{name}.{n}", np.array(n, np.int32)) for n in (128, 256))
    for _ in range(3):
        digits.append(add("Sub", add("Mod", add("Add", rest, half), base), half))
        rest = add("Div", add("Sub", rest, digits[-1]), base)
    codes = add("Concat", *digits, rest, attributes=(ir.AttrInt64("axis", -1),))
    if columns % 4:
        bounds = ((f"{name}.{what}", n) for what, n in (("first", 0), ("columns", columns), ("axis", -1)))
        codes = add("Slice", codes, *(_constant(graph, text, np.array([n], np.int64)) for text, n in bounds))
    for use in readers:
        use.node.replace_input_with(use.idx, codes)


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
