"""A graph in another float type: what a bundle computes in float32 or float16, an engine computes in float16, bfloat16 or
float32.

TensorRT takes the types of a strongly typed network as they stand, so this is where an engine's precision is decided:

1. Every value of the type `source` gets the type `target`: inputs, outputs, weights, what lies between, and what a Cast makes.
2. What angles and indices are made of stays as it was: whatever leads to a Cos, a Sin or a Cast to integers. A position above
   2,048 has no float16 of its own, one above 256 no bfloat16.
3. Where the two meet stands a Cast.

Norms need nothing: LayerNormalization and RMSNormalization compute in float32 whatever goes in (`stash_type`). Weights are cast
block by block when they are written. It knows nothing of parts or engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import EngineError
from ..tensors import StreamedTensor, row_blocks

__all__ = ["cast_graph", "fill_types"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
#: What gives another type than its first input has; others keep it.
_TYPED = {
    "Shape": ir.DataType.INT64, "Size": ir.DataType.INT64, "ArgMax": ir.DataType.INT64, "ArgMin": ir.DataType.INT64,
    "Equal": ir.DataType.BOOL, "Less": ir.DataType.BOOL, "LessOrEqual": ir.DataType.BOOL, "Greater": ir.DataType.BOOL,
    "GreaterOrEqual": ir.DataType.BOOL, "IsNaN": ir.DataType.BOOL, "QuantizeLinear": ir.DataType.INT8,
}  # fmt: skip
#: Where the type comes from another input.
_BY_INPUT = {"Where": 1, "DequantizeLinear": 1, "Range": 0}
#: Numbers this large are written for "never", as in the mask of an unseen place; they become the target's own largest.
_NEVER = 1e9


def cast_graph(model: ir.Model, source: ir.DataType, target: ir.DataType) -> None:
    """Rewrites a graph, in place, from one float type to another; weights follow when they are written.

    Raises EngineError, then, for a weight that is beyond the range of `target`.
    """
    fill_types(model.graph)
    if source == target:
        return
    kept = _angles_and_indices(model.graph, source)
    cast: dict[ir.Value, ir.Value] = {}
    for value in model.graph.inputs:
        if value.dtype == source:
            value.dtype = target
    for node in list(model.graph):
        if node in kept:
            _widen_inputs(model.graph, node, source, target, cast)
        else:
            _cast_node(model.graph, node, kept, source, target, cast)
    for i, value in enumerate(model.graph.outputs):
        if value.producer() in kept and value.dtype == source:
            model.graph.outputs[i] = _meeting(model.graph, value, target, cast, before=None)
    for value in list(model.graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[value.name or ""]


def fill_types(graph: ir.Graph) -> None:
    """Gives a type to every value that has none: exporters leave some out."""
    for node in graph:
        for output in node.outputs:
            if output.dtype is not None:
                continue
            place = _BY_INPUT.get(node.op_type, 0)
            read = node.inputs[place] if len(node.inputs) > place else None
            kept = read.dtype if read is not None else None
            if node.op_type == "Cast":
                kept = ir.DataType(node.attributes["to"].as_int())
            if (known := _TYPED.get(node.op_type) or kept) is not None:
                output.dtype = known


def _angles_and_indices(graph: ir.Graph, source: ir.DataType) -> set[ir.Node]:
    """The nodes that compute in `source` what ends in a Cos, a Sin or an integer."""
    kept: set[ir.Node] = set()
    waiting = []
    for node in graph:
        value = node.inputs[0] if node.inputs else None
        integer = node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) not in _FLOATS
        if value is not None and value.dtype == source and (integer or node.op_type in ("Cos", "Sin")):
            waiting.append(node)
    while waiting:
        node = waiting.pop()
        kept.add(node)
        for value in node.inputs:
            before = value.producer() if value is not None and value.dtype == source else None
            if before is not None and before not in kept:
                waiting.append(before)
    return kept


def _widen_inputs(
    graph: ir.Graph, node: ir.Node, source: ir.DataType, target: ir.DataType, cast: dict[ir.Value, ir.Value]
) -> None:
    """A node that stays reads what was cast before it through a Cast back."""
    for place, value in enumerate(node.inputs):
        if value is not None and value.is_graph_input() and value.dtype == target and node.op_type != "Cast":
            node.replace_input_with(place, _meeting(graph, value, source, cast, before=node))


def _cast_node(
    graph: ir.Graph, node: ir.Node, kept: set[ir.Node], source: ir.DataType, target: ir.DataType,
    cast: dict[ir.Value, ir.Value],
) -> None:  # fmt: skip
    for place, value in enumerate(node.inputs):
        if value is None or value.dtype != source:
            continue
        if value.const_value is not None and value.producer() is None:
            node.replace_input_with(place, _cast_weight(graph, value, target, cast, node))
        elif value.producer() in kept and node.op_type != "Cast":
            node.replace_input_with(place, _meeting(graph, value, target, cast, before=node))
    for name, attribute in list(node.attributes.items()):
        if name in ("to", "output_dtype") and attribute.as_int() == int(source):
            node.attributes[name] = ir.AttrInt64(name, int(target))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == source:
            array = _narrow(attribute.as_tensor().numpy(), target, node.name or node.op_type)
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(array, dtype=target))
    for output in node.outputs:
        if output.dtype == source:
            output.dtype = target


def _meeting(
    graph: ir.Graph, value: ir.Value, to: ir.DataType, cast: dict[ir.Value, ir.Value], before: ir.Node | None
) -> ir.Value:
    """The value in another type, cast once for all its readers. Without `before` it is an output, and keeps its name."""
    if value in cast and before is not None:
        return cast[value]
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(to))], name=f"{value.name}_{to.name.lower()}")
    made = node.outputs[0]
    made.name, made.dtype, made.shape = node.name, to, value.shape
    producer = value.producer()
    if before is None:
        made.name, value.name = value.name, f"{value.name}_{to.name.lower()}"
        graph.append(node)
    elif producer is not None:
        graph.insert_after(producer, node)
    else:
        graph.insert_before(graph[0], node)
    cast[value] = made
    return made


def _cast_weight(
    graph: ir.Graph, value: ir.Value, target: ir.DataType, cast: dict[ir.Value, ir.Value], reader: ir.Node
) -> ir.Value:
    """The weight in the target type. One that nodes in both types read is there twice."""
    if value in cast:
        return cast[value]
    tensor, name = value.const_value, f"{value.name}.{target.name.lower()}"
    assert tensor is not None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    narrow: ir.TensorProtocol
    if len(shape) < 2:
        floor = reader.op_type == "QuantizeLinear"
        narrow = ir.tensor(_narrow(tensor.numpy(), target, value.name or "", floor=floor), dtype=target, name=name)
    else:

        def blocks() -> Iterator[np.ndarray]:
            for _, block in row_blocks(tensor):
                yield _narrow(block, target, value.name or "")

        narrow = StreamedTensor(blocks, target, shape, name)
    made = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(target), const_value=narrow)
    graph.register_initializer(made)
    cast[value] = made
    return made


def _narrow(array: np.ndarray, target: ir.DataType, name: str, *, floor: bool = False) -> np.ndarray:
    """Raises EngineError where a number is beyond the type's range. With `floor`, none becomes too small to be divided by."""
    import ml_dtypes

    kind: Any = target.numpy()
    limits = ml_dtypes.finfo(kind)
    largest = float(limits.max)
    wide = np.asarray(array, np.float32)
    beyond = np.isfinite(wide) & (np.abs(wide) > largest)
    if beyond.any():
        if (np.abs(wide[beyond]) < _NEVER).any():
            raise EngineError(
                f"The weight {name} has values up to {float(np.abs(wide[beyond]).max()):.3g}; {target.name.lower()} ends at "
                f"{largest:.3g}. Build with --precision bf16 or fp32."
            )
        wide = np.where(beyond, np.sign(wide) * largest, wide)
    if floor:
        wide = np.maximum(wide, float(limits.smallest_normal))
    return wide.astype(kind)
