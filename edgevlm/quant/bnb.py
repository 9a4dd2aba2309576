"""NF4 and FP4 as bitsandbytes makes them, in the form in which ONNX Runtime runs them.

    MatMul(x, W)  → com.microsoft::MatMulBnb4(x, codes, absmax)

bitsandbytes itself quantizes (`quantize_4bit`, on the CPU), and what it returns is stored as it is: codes two to a byte, the
first in the high half, over the row-major `[out, in]` weight, and the largest magnitude of each block in that order. A block
may begin in one row and end in the next. The operator computes a weight as `codebook[code] * absmax[block]`, which is
bitsandbytes' own product. Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

It is no standard operator, so such a part runs on ONNX Runtime only; and on a CPU it saves memory, not time: the weight is
made float again in every run. Not covered: magnitudes that are quantized once more (`compress_statistics`), which the operator
does not read. bitsandbytes has no dequantization for `in` that is no multiple of the block size on some CPUs (0.50.2 counts
blocks from the beginning of each row there); the operator, like bitsandbytes on GPUs, counts them over the whole weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import MissingDependencyError, RecipeError, WeightsError
from ..tensors import StreamedTensor, column_blocks
from .recipe import Rule

__all__ = ["BLOCK_SIZES", "DOMAIN", "replace_matmul"]

DOMAIN = "com.microsoft"
#: What both bitsandbytes (32 to 4096) and ONNX Runtime's operator (16 to 256) take.
BLOCK_SIZES = (32, 64, 128, 256)
#: bitsandbytes' own.
_DEFAULT = 64
_QUANT_TYPES = {"fp4": 0, "nf4": 1}
#: Weights that bitsandbytes is given in one go; it makes several float32 copies of them.
_AT_ONCE = 1 << 20


def replace_matmul(graph: ir.Graph, node: ir.Node, weight: ir.Value, rule: Rule) -> None:
    """Rewrites `node`, a MatMul whose second input is the initializer `weight` `[K, N]`, in place.

    The codes are made when the weight is written, some megabytes at a time; weights of a float16 graph are rounded to it
    first, as in a model that is loaded in float16. Raises RecipeError for a block size that cannot be expressed and
    MissingDependencyError without bitsandbytes; WeightsError, when the weight is written, where it is not finite.
    """
    tensor = weight.const_value
    assert tensor is not None
    block_size = _DEFAULT if rule.block_size is None else rule.block_size
    if block_size not in BLOCK_SIZES:
        raise RecipeError(
            f"The weight {weight.name} is to be {rule.method} in blocks of {block_size}; bitsandbytes and ONNX Runtime both "
            f"take {', '.join(map(str, BLOCK_SIZES))}."
        )
    _bitsandbytes()
    inner, outer = (int(d) for d in tensor.shape)  # type: ignore[arg-type]
    codes, absmax = f"{weight.name}.{rule.method}", f"{weight.name}.absmax"
    if codes not in graph.initializers:  # two readers of one weight
        made = _Quantized(tensor, block_size, rule.method)
        packed = StreamedTensor(made.codes, ir.DataType.UINT8, (-(-inner * outer // 2),), codes)
        peaks = StreamedTensor(made.absmax, tensor.dtype, (-(-inner * outer // block_size),), absmax)
        for lazy in (packed, peaks):
            value = ir.Value(name=lazy.name, shape=lazy.shape, type=ir.TensorType(lazy.dtype), const_value=lazy)
            graph.register_initializer(value)
    attributes = {"K": inner, "N": outer, "block_size": block_size, "quant_type": _QUANT_TYPES[rule.method]}
    product = ir.Node(
        DOMAIN,
        "MatMulBnb4",
        [node.inputs[0], graph.initializers[codes], graph.initializers[absmax]],
        [ir.AttrInt64(name, number) for name, number in attributes.items()],
        name=node.name,
    )
    old, new = node.outputs[0], product.outputs[0]
    new.shape, new.type, name = old.shape, old.type, old.name
    graph.insert_before(node, product)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name
    graph.opset_imports[DOMAIN] = 1


class _Quantized:
    """Codes and magnitudes of one weight. A pass that makes the codes keeps the magnitudes until they were asked for."""

    def __init__(self, tensor: ir.TensorProtocol, block_size: int, method: str) -> None:
        self._tensor, self._block_size, self._method = tensor, block_size, method
        self._absmax: np.ndarray | None = None
        self._asked = False

    def codes(self) -> Iterator[np.ndarray]:
        """uint8 `[ceil(K · N / 2)]`, in pieces."""
        peaks = []
        for codes, absmax in self._pieces():
            peaks.append(absmax)
            yield codes
        if not self._asked:
            self._absmax = np.concatenate(peaks)

    def absmax(self) -> Iterator[np.ndarray]:
        """`[ceil(K · N / block_size)]`, in the weight's dtype."""
        self._asked = True
        if self._absmax is None:
            yield from (absmax for _, absmax in self._pieces())
        else:
            yield self._absmax
            self._absmax = None

    def _pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        dtype = self._tensor.dtype.numpy()
        for flat in _flat(self._tensor, self._block_size):
            codes, absmax = _quantize(flat, self._block_size, self._method)
            if not np.isfinite(absmax).all():
                raise WeightsError(
                    f"The weight {self._tensor.name or '?'} has NaN or infinite values in {dtype.name}; it cannot be quantized."
                )
            yield codes, absmax.astype(dtype)  # exact: the magnitude of one of the weights


def _flat(tensor: ir.TensorProtocol, block_size: int) -> Iterator[np.ndarray]:
    """The transposed matrix, row-major, in pieces of whole blocks; the last may end with a part of one."""
    rest = np.empty(0, tensor.dtype.numpy())
    for _, columns in column_blocks(tensor):
        with np.errstate(over="ignore"):  # to infinity, which is refused
            rows = np.concatenate([rest, columns.T.astype(rest.dtype).reshape(-1)])
        whole = rows.size - rows.size % block_size
        yield from (rows[first : min(first + _AT_ONCE, whole)] for first in range(0, whole, _AT_ONCE))
        rest = rows[whole:]
    if rest.size:
        yield rest


def _quantize(flat: np.ndarray, block_size: int, method: str) -> tuple[np.ndarray, np.ndarray]:
    import torch

    packed, state = _bitsandbytes().quantize_4bit(torch.from_numpy(flat), blocksize=block_size, quant_type=method)
    return packed.numpy().reshape(-1), state.absmax.numpy()


def _bitsandbytes() -> Any:
    # It advises another package for products on the CPU, which are not made here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    except ImportError as exc:
        raise MissingDependencyError(
            "nf4 and fp4 are quantized by bitsandbytes, which is not installed: `pip install 'edgevlm[bnb]'`."
        ) from exc
    return bitsandbytes.functional
