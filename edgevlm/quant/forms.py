"""How a quantized weight is written, in standard ONNX that ONNX Runtime and TensorRT both read.

    MatMul(x, W)     → MatMul(x, DequantizeLinear(Wq, scales))        int8: axis 1; int4: axis 0 with block_size
    Gather(W, ids)   → Mul(Cast(Gather(Wq, ids)), Gather(scales, ids))

Codes and scales are computed when they are written, one weight at a time, unless calibration has made them before. Written
here because ONNX Runtime's quantizers load the whole model, and write its own operators for four bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from ..tensors import StreamedTensor
from . import rtn

__all__ = ["write_gather", "write_int4", "write_int8"]

#: Codes (or what makes their rows in blocks) and scales.
Pair = Callable[[], tuple[Any, np.ndarray]]


def write_int8(graph: ir.Graph, node: ir.Node, weight: ir.Value, pair: Pair | None = None) -> None:
    """A linear layer's weight as INT8 with a scale for each output channel."""
    tensor, dtype = weight.const_value, _dtype(weight)
    assert tensor is not None
    inner, outer = _dims(weight)
    lazy = _Quantized(pair or (lambda: rtn.quantize_int8(tensor, dtype)))
    _write(graph, node, weight, "int8", ir.DataType.INT8, (inner, outer), (outer,), lazy, axis=1)


def write_int4(
    graph: ir.Graph, node: ir.Node, weight: ir.Value, block_size: int, pair: Pair | None = None, low: int = -8, high: int = 7
) -> None:
    """A linear layer's weight as INT4 (packed) with a scale for each block of inputs of an output channel."""
    tensor, dtype = weight.const_value, _dtype(weight)
    assert tensor is not None
    inner, outer = _dims(weight)
    lazy = _Quantized(pair or (lambda: rtn.quantize_int4(tensor, block_size, dtype, low, high)))
    scales = (-(-inner // block_size), outer)
    _write(graph, node, weight, "int4", ir.DataType.INT4, (inner, outer), scales, lazy, axis=0, block_size=block_size)


def _write(
    graph: ir.Graph, node: ir.Node, weight: ir.Value, kind: str, dtype: ir.DataType, shape: tuple[int, ...],
    scale_shape: tuple[int, ...], lazy: _Quantized, **attributes: int,
) -> None:  # fmt: skip
    tensor, quantized = weight.const_value, f"{weight.name}.{kind}"
    assert tensor is not None
    if quantized in graph.initializers:  # two readers of one weight
        node.replace_input_with(1, next(iter(graph.initializers[quantized].uses())).node.outputs[0])
        return
    inputs = [
        _initializer(graph, quantized, dtype, shape, lazy.weight),
        _initializer(graph, f"{weight.name}.scales", tensor.dtype, scale_shape, lazy.scales),
    ]
    options = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    dequantize = ir.Node("", "DequantizeLinear", inputs, options, name=f"{node.name}_dequantize")
    output = dequantize.outputs[0]
    output.name, output.shape, output.dtype = f"{weight.name}.dequantized", ir.Shape(shape), tensor.dtype
    graph.insert_before(node, dequantize)
    node.replace_input_with(1, output)


def write_gather(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    """An embedding table as INT8 with a scale for each row."""
    # DequantizeLinear has no scale for each row of what a Gather picks, so the two factors are gathered and multiplied.
    # Four bits would save little here (one table of the model) and Gather takes no INT4.
    tensor = weight.const_value
    assert tensor is not None
    lazy = _Quantized(lambda: rtn.quantize_int8_rows(tensor, tensor.dtype.numpy()))
    rows, width = _dims(weight)
    names = f"{weight.name}.rows.int8", f"{weight.name}.rows.scales"
    if names[0] not in graph.initializers:  # the first reader of the table
        _initializer(graph, names[0], ir.DataType.INT8, (rows, width), lazy.weight)
        _initializer(graph, names[1], tensor.dtype, (rows, 1), lazy.scales)
    table, scales = (graph.initializers[name] for name in names)
    ids, old = node.inputs[1], node.outputs[0]
    picked = ir.Node("", "Gather", [table, ids], name=f"{node.name}_rows")
    cast = ir.Node("", "Cast", [picked.outputs[0]], [ir.AttrInt64("to", int(tensor.dtype))], name=f"{node.name}_cast")
    scale = ir.Node("", "Gather", [scales, ids], name=f"{node.name}_scales")
    product = ir.Node("", "Mul", [cast.outputs[0], scale.outputs[0]], name=f"{node.name}_dequantize")
    product.outputs[0].shape, product.outputs[0].type = old.shape, old.type
    for step in (picked, cast, scale):
        step.outputs[0].name = step.name
    graph.insert_before(node, [picked, cast, scale, product])
    name = old.name
    ir.convenience.replace_all_uses_with(old, product.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    product.outputs[0].name = name


class _Quantized:
    """A weight and its scales, computed together when the first of them is written, and kept until both were."""

    def __init__(self, compute: Pair) -> None:
        self._compute = compute
        self._pair: dict[str, Any] = {}

    def _take(self, which: str) -> Any:
        if which not in self._pair:
            self._pair = dict(zip(("weight", "scales"), self._compute(), strict=True))
        return self._pair.pop(which)

    def weight(self) -> Any:
        """An array, or what makes its rows in blocks."""
        return self._take("weight")

    def scales(self) -> np.ndarray:
        array: np.ndarray = self._take("scales")
        return array


def _dims(weight: ir.Value) -> tuple[int, int]:
    assert weight.const_value is not None
    rows, columns = (int(d) for d in weight.const_value.shape)  # type: ignore[arg-type]
    return rows, columns


def _dtype(weight: ir.Value) -> np.dtype[Any]:
    assert weight.const_value is not None
    return weight.const_value.dtype.numpy()


def _initializer(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Callable[[], Any]
) -> ir.Value:
    def tensor() -> ir.TensorProtocol:
        array = compute()
        if dtype == ir.DataType.INT4:
            return ir.PackedTensor(array, dtype, shape=ir.Shape(shape), name=name)
        return ir.Tensor(array, dtype=dtype, name=name)

    lazy: ir.TensorProtocol
    if dtype == ir.DataType.INT8:
        lazy = StreamedTensor(lambda: compute()(), dtype, shape, name)
    else:
        lazy = ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(value)
    return value
