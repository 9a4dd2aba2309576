"""Weights that are read when they are needed, and never held together.

`StoredTensor` is a tensor of a safetensors file, memory-mapped: what onnx_ir writes as an initializer, cast and
transposed block by block on the way. It knows nothing of graphs, families or quantization.
"""

from __future__ import annotations

import json
import math
import struct
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

__all__ = [
    "StoredTensor",
    "StreamedNibbles",
    "StreamedTensor",
    "WeightEntry",
    "column_blocks",
    "read_safetensors_index",
    "row_blocks",
]

#: Bytes of float32 that one block of a weight may take while it is cast, transposed or quantized.
BLOCK_BYTES = 32 << 20

#: safetensors' dtype names that a model's weights come in.
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
#: And those of weights that a checkpoint holds quantized.
_INTEGERS: dict[str, np.dtype[Any]] = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}


@dataclass(frozen=True)
class WeightEntry:
    """Where one tensor lies: file, byte offset, shape, and dtype as safetensors names it.

    Rows of a larger tensor may lie in several runs of equal length, each `stride` rows behind the one before.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str
    runs: int = 1
    stride: int = 0

    @property
    def readable(self) -> bool:
        """Whether it is floating point of a width that can be read here (not FP8, not packed integers)."""
        return self.dtype in _DTYPES

    @property
    def mappable(self) -> bool:
        """Whether numpy can map it: floating point as above, or integers."""
        return self.dtype in _DTYPES or self.dtype in _INTEGERS

    def rows(self, first: int, count: int, period: int) -> WeightEntry:
        """The rows from `first` on, `count` of every `period`, as a tensor of its own. `period` divides the rows there are."""
        runs, rest = self.shape[0] // period, self.shape[1:]
        row = math.prod(rest) * (self._numpy_dtype().itemsize if self.mappable else 1)
        return replace(self, offset=self.offset + first * row, shape=(runs * count, *rest), runs=runs, stride=period)

    def map(self) -> np.ndarray:
        """The tensor, memory-mapped and read-only; of one in several runs a copy, where it has more than one dimension."""
        dtype = self._numpy_dtype()
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        if self.runs == 1:
            return np.memmap(self.path, dtype, "r", self.offset, self.shape)
        count, row = self.shape[0] // self.runs, math.prod(self.shape[1:])
        whole = np.memmap(self.path, dtype, "r", self.offset, ((self.runs - 1) * self.stride * row + count * row,))
        steps = (self.stride * row * dtype.itemsize, dtype.itemsize)
        return np.lib.stride_tricks.as_strided(whole, (self.runs, count * row), steps, writeable=False).reshape(self.shape)

    def _numpy_dtype(self) -> np.dtype[Any]:
        return _DTYPES[self.dtype] if self.dtype in _DTYPES else _INTEGERS[self.dtype]


def read_safetensors_index(path: Path) -> dict[str, WeightEntry]:
    """The header of a file that the safetensors library has already validated.

    The library itself copies every tensor it returns; with the offsets, the operating system can map them instead.
    Format: https://github.com/huggingface/safetensors#format
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: WeightEntry(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }


class _BlockTensor(ir.TensorProtocol):
    """A tensor whose rows are made when they are written, some at a time."""

    def __init__(self, dtype: ir.DataType, shape: tuple[int, ...], name: str) -> None:
        self.dtype, self.shape, self.name = dtype, ir.Shape(shape), name
        self.doc_string: str | None = None
        self.metadata_props: dict[str, str] = {}
        self.meta: dict[str, Any] = {}

    @property
    def size(self) -> int:
        return math.prod(self.shape.numpy())

    @property
    def nbytes(self) -> int:
        return int(self.size * self.dtype.itemsize)

    @abstractmethod
    def numpy(self) -> np.ndarray: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.numpy().__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.numpy().__dlpack_device__()

    def tobytes(self) -> bytes:
        return self.numpy().tobytes()


class StreamedTensor(_BlockTensor):
    """A tensor whose rows `blocks` makes, anew each time it is called."""

    def __init__(
        self, blocks: Callable[[], Iterator[np.ndarray]], dtype: ir.DataType, shape: tuple[int, ...], name: str
    ) -> None:
        super().__init__(dtype, shape, name)
        self._blocks = blocks

    @property
    def raw(self) -> Callable[[], Iterator[np.ndarray]]:
        return self._blocks

    def numpy(self) -> np.ndarray:
        return np.concatenate([np.empty((0, *self.shape.numpy()[1:]), self.dtype.numpy()), *self._blocks()])

    def tofile(self, file: Any) -> None:
        for block in self._blocks():
            file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)  # bfloat16 alone has no buffer


class StreamedNibbles(StreamedTensor):
    """A tensor of four-bit integers whose packed bytes `blocks` makes, two elements each, the first in the low half."""

    @property
    def nbytes(self) -> int:
        return -(-self.size // 2)

    def numpy(self) -> np.ndarray:
        packed = np.concatenate([np.empty(0, np.uint8), *self._blocks()])
        codes = np.stack([packed & 0xF, packed >> 4], -1).reshape(-1)[: self.size]
        signed = self.dtype == ir.DataType.INT4
        return ((codes ^ 8).astype(np.int8) - 8 if signed else codes).astype(self.dtype.numpy()).reshape(self.shape.numpy())

    def tobytes(self) -> bytes:
        return b"".join(block.tobytes() for block in self._blocks())


class StoredTensor(_BlockTensor):
    """A weight of a checkpoint as an onnx_ir tensor of another dtype, transposed if asked (two dimensions only)."""

    def __init__(self, entry: WeightEntry, dtype: ir.DataType, name: str, *, transposed: bool = False) -> None:
        super().__init__(dtype, entry.shape[::-1] if transposed else entry.shape, name)
        self.entry, self.transposed = entry, transposed

    @property
    def raw(self) -> WeightEntry:
        return self.entry

    def stored(self) -> np.ndarray:
        """The memory-mapped tensor in its own dtype, transposed as a view."""
        array = self.entry.map()
        return array.T if self.transposed else array

    def numpy(self) -> np.ndarray:
        return np.ascontiguousarray(self.stored(), self.dtype.numpy())

    def tofile(self, file: Any) -> None:
        """Writes block by block, so that the whole is never in memory."""
        array = self.stored()
        if array.ndim < 2:
            file.write(self.tobytes())
            return
        for part in _parts(len(array), array.size // max(1, len(array))):
            file.write(np.ascontiguousarray(array[part], self.dtype.numpy()).data)


def column_blocks(tensor: ir.TensorProtocol) -> Iterator[tuple[slice, np.ndarray]]:
    """The columns of a matrix `[K, N]`, in blocks, as float32 `[K, n]`."""
    array = _stored(tensor)
    for part in _parts(array.shape[1], array.shape[0]):
        yield part, array[:, part].astype(np.float32)


def row_blocks(tensor: ir.TensorProtocol) -> Iterator[tuple[slice, np.ndarray]]:
    """The rows of a matrix `[R, C]`, in blocks, as float32 `[r, C]`."""
    array = _stored(tensor)
    for part in _parts(array.shape[0], array.shape[1]):
        yield part, array[part].astype(np.float32)


def _stored(tensor: ir.TensorProtocol) -> np.ndarray:
    return tensor.stored() if isinstance(tensor, StoredTensor) else tensor.numpy()


def _parts(lines: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (4 * max(1, width)))
    for first in range(0, lines, step):
        yield slice(first, min(first + step, lines))
