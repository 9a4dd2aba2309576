"""A quantized layer of a checkpoint in the bundle's standard form.

    4 bits   INT4 where every zero point is the middle of the range, else UINT4 and zero points
    8 bits   INT8, UINT8 likewise
    groups   DequantizeLinear(axis 0, block_size) on [K, N]; one group: axis 1, a scale for each output
    order    where the inputs of a group do not lie together (act-order), rows are sorted, and a Gather sorts the layer's input

Integers, zero points and scales keep their values; integers are repacked when they are written, a piece at a time. Scales are
stored in the graph's dtype. ONNX Runtime fuses blocks of a power of two, 16 to 256, and TensorRT takes no shorter last block:
groups of other sizes become several blocks with one scale, where that helps. Permutations are not folded into the layer before,
since several layers with orders of their own may read one input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd

import numpy as np
import onnx_ir as ir

from ..errors import UnsupportedModelError, WeightsError
from ..quant.rtn import pack_int4
from ..tensors import StreamedNibbles, StreamedTensor
from .packed import PackedWeight

__all__ = ["write_dequantize"]

_TYPES = {
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
}


def write_dequantize(graph: ir.Graph, weight: ir.Value, name: str, packed: PackedWeight, *, transposed: bool) -> None:
    """Puts a quantized weight in the place of `weight`, an initializer without a value that is not part of the graph yet.

    Raises UnsupportedModelError where something else than a linear layer reads it, WeightsError where scales are not finite.
    """
    readers = [node for node in graph if any(use.node is node for use in weight.uses())]
    other = [use.node.op_type for use in weight.uses() if (use.node.op_type, use.idx) != ("MatMul", 1)]
    if other or not transposed:
        raise UnsupportedModelError(
            f"The weight {name!r} is quantized in the checkpoint, and read by {other[0] if other else 'nothing linear'}; only "
            "weights of linear layers are taken as they are. Export the checkpoint with float weights and quantize it with "
            "--quantize."
        )
    if not readers:
        return
    assert weight.dtype is not None
    output = _dequantized(graph, readers[0], name, packed, weight.dtype)
    for node in readers:
        node.replace_input_with(1, output)
        if packed.order is not None:
            assert node.inputs[0] is not None
            node.replace_input_with(0, _sorted(graph, node.inputs[0], name, packed.order))


def _dequantized(graph: ir.Graph, reader: ir.Node, name: str, packed: PackedWeight, dtype: ir.DataType) -> ir.Value:
    outputs, inputs = packed.shape
    symmetric = packed.zeros is None or bool((packed.zeros() == 1 << (packed.bits - 1)).all())
    kind = _TYPES[packed.bits, symmetric]
    block = _block_size(inputs, packed.group_size)
    stored = np.arange(0, inputs, block) // packed.group_size if block else np.zeros(1, np.int64)
    shape = (len(stored), outputs) if block else (outputs,)

    def codes() -> Iterator[np.ndarray]:
        for rows in packed.pieces(np.arange(inputs) if packed.order is None else packed.order):
            yield _stored(packed.codes(rows), kind)

    def scales() -> Iterator[np.ndarray]:
        with np.errstate(over="ignore"):
            array = packed.scales()[stored].astype(dtype.numpy()).reshape(shape)
        if not np.isfinite(array).all():
            raise WeightsError(
                f"The scales of the quantized layer {packed.name!r} have NaN or infinite values in {array.dtype.name}."
            )
        yield array

    def zeros() -> Iterator[np.ndarray]:
        assert packed.zeros is not None
        yield _stored(packed.zeros()[stored].reshape(shape), kind)

    values = [
        _initializer(graph, f"{name}.{kind.name.lower()}", kind, (inputs, outputs), codes),
        _initializer(graph, f"{name}.scales", dtype, shape, scales),
        *([] if symmetric else [_initializer(graph, f"{name}.zero_points", kind, shape, zeros)]),
    ]
    attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
    node = ir.Node(
        "", "DequantizeLinear", values, [ir.AttrInt64(key, number) for key, number in attributes.items()],
        name=f"{reader.name}_dequantize",
    )  # fmt: skip
    output = node.outputs[0]
    output.name, output.shape, output.dtype = f"{name}.dequantized", ir.Shape([inputs, outputs]), dtype
    graph.insert_before(reader, node)
    return output


def _block_size(inputs: int, group: int) -> int:
    """Inputs of a block; 0 where all are one."""
    if group >= inputs:
        return 0
    if group & (group - 1) == 0 and 16 <= group <= 256 and inputs % group == 0:
        return group
    common = gcd(inputs, group, 128)
    return common if common >= 16 else group


def _stored(codes: np.ndarray, kind: ir.DataType) -> np.ndarray:
    """Unsigned integers `[rows, N]` as their bytes are written: signed ones less the middle of their range."""
    if kind in (ir.DataType.INT4, ir.DataType.UINT4):
        return pack_int4(np.ascontiguousarray(codes ^ np.uint8(8 * (kind == ir.DataType.INT4))).view(np.int8))
    return (codes ^ np.uint8(0x80)).view(np.int8) if kind == ir.DataType.INT8 else codes


def _initializer(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], blocks: Callable[[], Iterator[np.ndarray]]
) -> ir.Value:
    streamed = StreamedNibbles if dtype in (ir.DataType.INT4, ir.DataType.UINT4) else StreamedTensor
    tensor = streamed(blocks, dtype, shape, name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _sorted(graph: ir.Graph, value: ir.Value, name: str, order: np.ndarray) -> ir.Value:
    """The last axis of a value in another order; layers that read it in the same order share one Gather."""
    for use in value.uses():
        indices = use.node.inputs[1] if use.node.op_type == "Gather" and use.idx == 0 else None
        known = indices.const_value if indices is not None else None
        if known is not None and known.shape == (len(order),) and np.array_equal(known.numpy(), order):
            return use.node.outputs[0]
    numbers = ir.Value(name=f"{name}.order", shape=ir.Shape([len(order)]), type=ir.TensorType(ir.DataType.INT64))
    numbers.const_value = ir.Tensor(order.astype(np.int64), name=numbers.name)
    graph.register_initializer(numbers)
    node = ir.Node("", "Gather", [value, numbers], [ir.AttrInt64("axis", -1)], name=f"{name}.sort")
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = f"{name}.sorted", value.shape, value.type
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return node.outputs[0]
