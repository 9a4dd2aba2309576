"""Activations in eight bits with a scale found before: `QuantizeLinear` and `DequantizeLinear` in front of a linear layer.

Symmetric, one scale a tensor: what TensorRT takes, and what ONNX Runtime fuses with an INT8 weight into an integer product.
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
    """The scale of a layer's input, by `minmax`, `percentile` or `mse`."""
    peak = float(stats.peak.max())
    magnitude = np.abs(stats.rows).ravel()
    if how == "percentile":
        peak = float(np.percentile(magnitude, _PERCENTILE))
    elif how == "mse":
        sample = magnitude[:: max(1, magnitude.size // _SAMPLE)].astype(np.float64)
        losses = []
        for share in _SHARES:
            scale = max(peak * share / 127, np.finfo(np.float32).tiny)
            losses.append(np.square(np.clip(np.rint(sample / scale), 0, 127) * scale - sample).sum())
        peak *= float(_SHARES[int(np.argmin(losses))])
    return max(peak / 127, float(np.finfo(np.float32).tiny)) if peak > 0 else 1.0


def quantize_input(graph: ir.Graph, value: ir.Value, readers: list[ir.Node], scale: float) -> None:
    """Puts the pair between a value and the linear layers that read it."""
    dtype = value.dtype or ir.DataType.FLOAT
    step = ir.Value(name=f"{value.name}.scale", shape=ir.Shape([]), type=ir.TensorType(dtype))
    step.const_value = ir.Tensor(np.array(scale, dtype.numpy()), name=step.name)
    zero = ir.Value(name=f"{value.name}.zero_point", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT8))
    zero.const_value = ir.Tensor(np.array(0, np.int8), name=zero.name)
    graph.register_initializer(step)
    graph.register_initializer(zero)
    quantize = ir.Node("", "QuantizeLinear", [value, step, zero], name=f"{value.name}_quantize")
    widen = ir.Node("", "DequantizeLinear", [quantize.outputs[0], step, zero], name=f"{value.name}_dequantize")
    quantize.outputs[0].name, quantize.outputs[0].shape = f"{value.name}.int8", value.shape
    quantize.outputs[0].dtype = ir.DataType.INT8
    widen.outputs[0].name, widen.outputs[0].shape, widen.outputs[0].dtype = f"{value.name}.dequantized", value.shape, dtype
    graph.insert_before(readers[0], [quantize, widen])
    for node in readers:
        node.replace_input_with(0, widen.outputs[0])
