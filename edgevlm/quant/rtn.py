"""Round to nearest: symmetric INT8 per output channel, symmetric INT4 in blocks of the input dimension.

    int8   scale[n] = max|w[:, n]| / 127             q = round(w / scale) in -127 … 127
    int4   scale[b, n] = w[k, n] / -8 at the k of block b where |w| is largest; q = round(w / scale) in -8 … 7

INT4's largest weight thus lands exactly on -8, the end of the range that a symmetric scale would otherwise waste
(llama.cpp's Q4_0 does the same, https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c). No zero
point, because TensorRT takes none. Written here because libraries quantize whole models in memory; this reads a
weight in blocks of columns, so that memory does not grow with the model, and the same weight gives the same bytes.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..tensors import column_blocks, row_blocks

__all__ = ["quantize_int4", "quantize_int8", "quantize_int8_rows"]


def _scales(peak: np.ndarray, top: float, scale_dtype: np.dtype[np.generic]) -> tuple[np.ndarray, np.ndarray]:
    """The scales as they are stored, and their inverse (0 for an all-zero channel, whose scale is 1).

    Dividing by the stored scale, not by the exact one, keeps the rounding error of a float16 scale out of the weights.
    """
    scale = (peak / top).astype(scale_dtype)
    # The inverse of a scale that is subnormal in float32 would overflow.
    usable = np.abs(scale.astype(np.float32)) >= np.finfo(np.float32).tiny
    scale = np.where(usable, scale, np.ones_like(scale))
    return scale, np.where(usable, np.float32(1) / scale.astype(np.float32), np.float32(0))


def _dims(tensor: ir.TensorProtocol) -> tuple[int, int]:
    rows, columns = (int(d) for d in tensor.shape)  # type: ignore[arg-type]
    return rows, columns


def quantize_int8(weight: ir.TensorProtocol, scale_dtype: np.dtype[np.generic]) -> tuple[np.ndarray, np.ndarray]:
    """`[K, N]` → int8 `[K, N]`, scales `[N]`."""
    inner, outer = _dims(weight)
    quantized = np.empty((inner, outer), np.int8)
    scales = np.empty(outer, scale_dtype)
    for part, block in column_blocks(weight):
        scales[part], inverse = _scales(np.abs(block).max(0), 127, scale_dtype)
        quantized[:, part] = np.rint(block * inverse).clip(-127, 127)
    return quantized, scales


def quantize_int8_rows(table: ir.TensorProtocol, scale_dtype: np.dtype[np.generic]) -> tuple[np.ndarray, np.ndarray]:
    """An embedding table `[V, H]` → int8 `[V, H]`, scales `[V, 1]`."""
    rows, width = _dims(table)
    quantized = np.empty((rows, width), np.int8)
    scales = np.empty((rows, 1), scale_dtype)
    for part, block in row_blocks(table):
        scales[part, 0], inverse = _scales(np.abs(block).max(1), 127, scale_dtype)
        quantized[part] = np.rint(block * inverse[:, None]).clip(-127, 127)
    return quantized, scales


def quantize_int4(
    weight: ir.TensorProtocol, block_size: int, scale_dtype: np.dtype[np.generic]
) -> tuple[np.ndarray, np.ndarray]:
    """`[K, N]` → int4 packed two to a byte, low nibble first, uint8 `[ceil(K·N / 2)]`; scales `[ceil(K / block), N]`.

    A last block that `K` does not fill is shorter, as DequantizeLinear has it.
    """
    inner, outer = _dims(weight)
    blocks = -(-inner // block_size)
    quantized = np.empty((inner, outer), np.int8)
    scales = np.empty((blocks, outer), scale_dtype)
    for part, columns in column_blocks(weight):
        for number in range(blocks):
            rows = slice(number * block_size, min(inner, (number + 1) * block_size))
            block = columns[rows]
            peak = np.take_along_axis(block, np.abs(block).argmax(0)[None], 0)[0]
            scales[number, part], inverse = _scales(peak, -8, scale_dtype)
            quantized[rows, part] = np.rint(block * inverse).clip(-8, 7)
    return pack_int4(quantized), scales


def pack_int4(values: np.ndarray) -> np.ndarray:
    """int8 in -8 … 7 → uint8, two to a byte in row-major order, low nibble first (ONNX's layout of INT4)."""
    flat = values.reshape(-1).view(np.uint8)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] & 0xF) | (flat[1::2] << 4)


def unpack_int4(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The reverse of `pack_int4`, as ml_dtypes int4."""
    flat = np.stack([packed & 0xF, packed >> 4], -1).reshape(-1)[: int(np.prod(shape))]
    return ((flat ^ 8).astype(np.int8) - 8).astype(ml_dtypes.int4).reshape(shape)
