"""Round to nearest: symmetric INT8 per output channel, symmetric INT4 in blocks of the input dimension.

    int8   scale[n] = max|w[:, n]| / 127             q = round(w / scale) in -127 … 127
    int4   scale[b, n] = w[k, n] / -8 at the k of block b where |w| is largest; q = round(w / scale) in -8 … 7

INT4's largest weight thus lands exactly on -8, the end of the range that a symmetric scale would otherwise waste
(llama.cpp's Q4_0 does the same, https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c). No zero
point, because TensorRT takes none. Written here because libraries quantize whole models in memory; this reads a
weight in blocks of columns, so that memory does not grow with the model, and the same weight gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..errors import WeightsError
from ..tensors import column_blocks, row_blocks

__all__ = ["quantize_int4", "quantize_int8", "quantize_int8_rows"]

#: Makes the rows of a quantized weight, some at a time.
Blocks = Callable[[], Iterator[np.ndarray]]

#: Bytes of packed INT4 that are made in one go.
_PACKED_AT_ONCE = 4 << 20


def usable_scales(
    peak: np.ndarray, top: float, scale_dtype: np.dtype[Any], name: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The scales as they are stored, and their inverse (0 for an all-zero channel, whose scale is 1).

    Dividing by the stored scale, not by the exact one, keeps the rounding error of a float16 scale out of the weights.
    """
    if not np.isfinite(peak).all():
        raise WeightsError(f"The weight {name or '?'} has NaN or infinite values; it cannot be quantized.")
    scale = (peak / top).astype(scale_dtype)
    # The inverse of a scale that is subnormal in float32 would overflow.
    usable = np.abs(scale.astype(np.float32)) >= np.finfo(np.float32).tiny
    scale = np.where(usable, scale, np.ones_like(scale))
    return scale, np.where(usable, np.float32(1) / scale.astype(np.float32), np.float32(0))


def stored_matrix(tensor: ir.TensorProtocol | None) -> np.ndarray:
    """All of a tensor as float32, without a copy where it is."""
    assert tensor is not None
    return np.asarray(tensor.numpy()).astype(np.float32, copy=False)


def _dims(tensor: ir.TensorProtocol) -> tuple[int, int]:
    rows, columns = (int(d) for d in tensor.shape)  # type: ignore[arg-type]
    return rows, columns


def round_to_codes(block: np.ndarray, inverse: np.ndarray | np.float32, low: int, high: int) -> np.ndarray:
    """Overwrites `block`, which is a copy already: more copies would be the largest thing in memory."""
    np.multiply(block, inverse, out=block)
    np.rint(block, out=block)
    return np.clip(block, low, high, out=block)


def quantize_int8(weight: ir.TensorProtocol, scale_dtype: np.dtype[np.generic]) -> tuple[Blocks, np.ndarray]:
    """`[K, N]` → int8 `[K, N]` in blocks of rows, scales `[N]`. The weight is read twice, and never held: the output layer of a
    large vocabulary would be the largest thing in memory."""
    outer = _dims(weight)[1]
    scales, inverse = np.empty(outer, scale_dtype), np.empty(outer, np.float32)
    for part, block in column_blocks(weight):
        scales[part], inverse[part] = usable_scales(np.maximum(block.max(0), -block.min(0)), 127, scale_dtype, weight.name)

    def blocks() -> Iterator[np.ndarray]:
        for _, block in row_blocks(weight):
            yield round_to_codes(block, inverse, -127, 127).astype(np.int8)

    return blocks, scales


def quantize_int8_rows(table: ir.TensorProtocol, scale_dtype: np.dtype[np.generic]) -> tuple[Blocks, np.ndarray]:
    """An embedding table `[V, H]` → int8 `[V, H]` in blocks of rows, scales `[V, 1]`."""
    rows = _dims(table)[0]
    scales, inverse = np.empty((rows, 1), scale_dtype), np.empty((rows, 1), np.float32)
    for part, block in row_blocks(table):
        scales[part, 0], inverse[part, 0] = usable_scales(np.maximum(block.max(1), -block.min(1)), 127, scale_dtype, table.name)

    def blocks() -> Iterator[np.ndarray]:
        for part, block in row_blocks(table):
            yield round_to_codes(block, inverse[part], -127, 127).astype(np.int8)

    return blocks, scales


def quantize_int4(
    weight: ir.TensorProtocol, block_size: int, scale_dtype: np.dtype[np.generic], low: int = -8, high: int = 7
) -> tuple[np.ndarray, np.ndarray]:
    """`[K, N]` → int4 packed two to a byte, low nibble first, uint8 `[ceil(K·N / 2)]`; scales `[ceil(K / block), N]`.

    A last block that `K` does not fill is shorter, as DequantizeLinear has it.
    """
    inner, outer = _dims(weight)
    quantized = np.empty((inner, outer), np.int8)
    scales = np.empty((-(-inner // block_size), outer), scale_dtype)
    for part, columns in column_blocks(weight):
        quantized[:, part], scales[:, part] = quantize_blocks(columns, block_size, low, high, scale_dtype, weight.name)
    return pack_int4(quantized), scales


def quantize_blocks(
    columns: np.ndarray, block_size: int, low: int, high: int, scale_dtype: np.dtype[Any], name: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """float32 `[K, N]` → codes int8 `[K, N]`, scales `[ceil(K / block), N]`; 0 is one block."""
    inner, outer = columns.shape
    block_size = block_size or inner
    codes = np.empty((inner, outer), np.int8)
    scales = np.empty((-(-inner // block_size), outer), scale_dtype)
    for number, first in enumerate(range(0, inner, block_size)):
        rows = slice(first, min(inner, first + block_size))
        block = columns[rows]
        peak = np.take_along_axis(block, np.abs(block).argmax(0)[None], 0)[0]
        scales[number], inverse = usable_scales(peak, low, scale_dtype, name)
        codes[rows] = round_to_codes(block * inverse, np.float32(1), low, high)
    return codes, scales


def quantize_channels(columns: np.ndarray, scale_dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """float32 `[K, N]` → int8 `[K, N]`, scales `[N]`: `quantize_int8` of what is in memory."""
    scales, inverse = usable_scales(np.abs(columns).max(0), 127, scale_dtype)
    return round_to_codes(columns * inverse, np.float32(1), -127, 127).astype(np.int8), scales


def pack_int4(values: np.ndarray) -> np.ndarray:
    """int8 in -8 … 7 → uint8, two to a byte in row-major order, low nibble first (ONNX's layout of INT4)."""
    flat = values.reshape(-1).view(np.uint8)
    packed = np.empty((flat.size + 1) // 2, np.uint8)
    for first in range(0, packed.size, _PACKED_AT_ONCE):
        end = first + _PACKED_AT_ONCE
        low, high = flat[2 * first : 2 * end : 2], flat[2 * first + 1 : 2 * end : 2]
        np.bitwise_and(low, 0xF, out=packed[first:end])
        packed[first : first + high.size] |= high << 4
    return packed


def unpack_int4(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The reverse of `pack_int4`, as ml_dtypes int4."""
    flat = np.stack([packed & 0xF, packed >> 4], -1).reshape(-1)[: int(np.prod(shape))]
    return ((flat ^ 8).astype(np.int8) - 8).astype(ml_dtypes.int4).reshape(shape)
