"""Activations in eight bits with a scale found before: `QuantizeLinear` and `DequantizeLinear` in front of a linear layer.

Symmetric, one scale a tensor: what TensorRT takes, and what ONNX Runtime fuses with an INT8 weight into an integer product.
Every layer has a pair of its own, also where several read one value: on x86 ONNX Runtime turns int8 activations into uint8,
whose products are an order of magnitude faster there, and does so only where nothing else reads the pair.

The scale puts on 127 what `range` says: `minmax` the largest value of all samples, `percentile` what 99.99 % of them stay
below, `mse` the value at which rounding and clipping together lose least. Both of these look at a sample of rows. ONNX
Runtime's static quantization has the same choices; it runs whole models and keeps every activation, see `calibrate`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .calibrate import InputStats

__all__ = ["activation_scale", "quantize_input"]

_PERCENTILE = 99.99
#: Shares of the largest value that `mse` tries.
_SHARES = np.linspace(1.0, 0.1, 46)
_SAMPLE = 1 << 18


def activation_scale(stats: InputStats, how: str) -> float:
    """The scale of a layer's input, by `minmax`, `percentile` or `mse`. An input that is always zero has 1."""
    peak = float(stats.peak.max())
    if how == "percentile":
        peak = float(np.percentile(np.abs(stats.rows), _PERCENTILE)) or peak
    elif how == "mse":
        magnitude = np.abs(stats.rows).ravel()
        peak *= _best_share(magnitude[:: max(1, magnitude.size // _SAMPLE)].astype(np.float64), peak)
    return peak / 127 or 1.0


def _best_share(sample: np.ndarray, peak: float) -> float:
    """At which share of the peak rounding and clipping lose least."""
    losses = []
    for share in _SHARES:
        scale = max(peak * float(share) / 127, np.finfo(np.float64).tiny)
        losses.append(np.square(np.minimum(np.rint(sample / scale), 127) * scale - sample).sum())
    return float(_SHARES[int(np.argmin(losses))])


def stored_scale(scale: float, dtype: ir.DataType) -> np.ndarray:
    """A scale as a graph of this type holds it, whose inverse is finite too."""
    kind = dtype.numpy()
    return np.array(max(scale, float(np.finfo(kind).smallest_normal)), kind)


def quantize_input(graph: ir.Graph, node: ir.Node, scale: float) -> None:
    """Puts a pair in front of a linear layer."""
    value = node.inputs[0]
    assert value is not None
    dtype, name = value.dtype or ir.DataType.FLOAT, f"{node.name}_input"
    step = _constant(graph, f"{name}.scale", stored_scale(scale, dtype))
    zero = _constant(graph, f"{name}.zero_point", np.array(0, np.int8))
    quantize = ir.Node("", "QuantizeLinear", [value, step, zero], name=f"{name}_quantize")
    widen = ir.Node("", "DequantizeLinear", [quantize.outputs[0], step, zero], name=f"{name}_dequantize")
    for output, end, kind in ((quantize.outputs[0], "int8", ir.DataType.INT8), (widen.outputs[0], "dequantized", dtype)):
        output.name, output.shape, output.dtype = f"{name}.{end}", value.shape, kind
    graph.insert_before(node, [quantize, widen])
    node.replace_input_with(0, widen.outputs[0])


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
