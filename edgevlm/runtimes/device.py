"""A GPU as the backends see it: memory with addresses, one stream of work, and tensors that stay there.

`Device` is the seam: what a CUDA device must offer is abstract, and `cuda_device` offers it; what follows from that (staging in
pinned memory, buffers that free themselves, tensors) is written once, here. Work is queued: a copy has happened after
`synchronize`, and memory is freed behind the work that was queued before.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.record import Host
from ..errors import DeviceError

__all__ = ["Buffer", "Context", "Device", "DeviceTensor", "Driver", "LoadedEngine", "Rows"]

_STAGING = 4 << 20
_ITEM = {"bfloat16": 2}


class Device(ABC):
    """One GPU with one stream. Not thread-safe. After `close`, or once it is lost, nothing works any more."""

    stream: Any = 0
    """The address of the stream, for libraries that queue their own work on it."""

    def __init__(self) -> None:
        self.lost: DeviceError | None = None
        self.closed = False
        self.scratch: Buffer | None = None
        """What all engines compute in, one after the other."""
        self._staging: np.ndarray | None = None
        self._staged = 0

    # what a device offers; every method raises DeviceError

    @abstractmethod
    def allocate(self, size: int) -> int:
        """The address of `size` new bytes, aligned to 256."""

    @abstractmethod
    def free(self, address: int) -> None: ...

    @abstractmethod
    def pin(self, size: int) -> np.ndarray:
        """Host memory that the device reaches by itself, uint8 `[size]`."""

    @abstractmethod
    def unpin(self, memory: np.ndarray) -> None: ...

    @abstractmethod
    def upload(self, to: int, memory: np.ndarray) -> None:
        """Queues a copy out of pinned memory, which must not change before `synchronize`."""

    @abstractmethod
    def download(self, memory: np.ndarray, source: int) -> None:
        """Queues a copy into pinned memory."""

    @abstractmethod
    def copy(self, to: int, source: int, width: int, rows: int = 1, to_pitch: int = 0, source_pitch: int = 0) -> None:
        """Queues a copy on the device: `rows` times `width` bytes, `pitch` bytes from one row to the next."""

    @abstractmethod
    def clear(self, address: int, size: int) -> None:
        """Queues zeros."""

    @abstractmethod
    def wait(self) -> None:
        """Until all that was queued is done."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Any:
        """What `work` queues, as a graph that can be launched; nothing of it runs."""

    @abstractmethod
    def launch(self, graph: Any) -> None: ...

    @abstractmethod
    def drop(self, graph: Any) -> None: ...

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and all there are."""

    @abstractmethod
    def release(self) -> None:
        """Frees whatever is left, and the stream."""

    # what follows

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._staging = self.scratch = None
            self.release()

    def synchronize(self) -> None:
        self.wait()
        self._staged = 0

    def send(self, to: int, array: np.ndarray) -> None:
        """Queues a copy of an array, which may change at once."""
        if array.nbytes:
            memory = self._stage(array.nbytes)
            memory[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self.upload(to, memory)

    def receive(self, source: int, size: int) -> np.ndarray:
        """uint8 `[size]`, when everything queued before is done."""
        if not size:
            return np.empty(0, np.uint8)
        memory = self._stage(size)
        self.download(memory, source)
        self.synchronize()
        return memory.copy()

    def reserve_scratch(self, size: int) -> None:
        if self.scratch is None or self.scratch.size < size:
            self.scratch = None  # the smaller one first: there may not be room for both
            self.scratch = Buffer(self, size)

    def _stage(self, size: int) -> np.ndarray:
        """A piece of pinned memory that no queued copy uses."""
        if self._staging is None or self._staged + size > len(self._staging):
            self.synchronize()
            if self._staging is None or size > len(self._staging):
                if self._staging is not None:
                    self.unpin(self._staging)
                    self._staging = None
                self._staging = self.pin(max(_STAGING, size))
        first, self._staged = self._staged, self._staged + -(-size // 64) * 64
        return self._staging[first : first + size]


class Buffer:
    """Memory on a device, freed when nothing refers to it any more."""

    def __init__(self, device: Device, size: int) -> None:
        self.size = size
        self.address = device.allocate(max(1, size))
        weakref.finalize(self, _free, weakref.ref(device), self.address)


def _free(device: weakref.ref[Device], address: int) -> None:
    alive = device()
    if alive is not None and not alive.closed and alive.lost is None:
        alive.free(address)


class DeviceTensor:
    """A tensor on a device, laid out row by row. Slices of its first axis share its memory; numpy functions see a copy on the
    host, save `np.concatenate` along the first axis, which stays on the device."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: str, buffer: Buffer | None = None, offset: int = 0) -> None:
        self.device, self.shape, self.dtype = device, tuple(int(n) for n in shape), dtype
        self.buffer = Buffer(device, self.nbytes) if buffer is None else buffer
        self._offset = offset

    @classmethod
    def of(cls, device: Device, array: np.ndarray, dtype: str) -> DeviceTensor:
        """A copy of an array."""
        tensor = cls(device, array.shape, dtype)
        tensor.fill(array)
        return tensor

    @staticmethod
    def size_of(shape: Sequence[int], dtype: str) -> int:
        """In bytes."""
        return math.prod(shape) * (_ITEM.get(dtype) or np.dtype(dtype).itemsize)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        return _ITEM.get(self.dtype) or np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return self.size_of(self.shape, self.dtype)

    @property
    def address(self) -> int:
        return self.buffer.address + self._offset

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> DeviceTensor:
        if isinstance(key, tuple):
            tensor = self
            for one in key:
                if one is not None:
                    raise TypeError("a tensor on a device is indexed by its first axis alone")
                tensor = tensor[None]
            return tensor
        if key is None:
            return self._view((1, *self.shape), 0)
        if isinstance(key, slice):
            first, end, step = key.indices(self.shape[0])
            if step != 1:
                raise TypeError("a slice of a tensor on a device has no steps")
            return self._view((max(0, end - first), *self.shape[1:]), first)
        number = range(self.shape[0])[int(key)]
        return self._view(self.shape[1:], number)

    def _view(self, shape: Sequence[int], row: int) -> DeviceTensor:
        stride = math.prod(self.shape[1:]) * self.itemsize
        return DeviceTensor(self.device, shape, self.dtype, self.buffer, self._offset + row * stride)

    def reshape(self, *shape: int) -> DeviceTensor:
        if -1 in shape:
            known = -math.prod(shape)
            shape = tuple(math.prod(self.shape) // known if n == -1 else n for n in shape)
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"a tensor {list(self.shape)} cannot be seen as {list(shape)}")
        return DeviceTensor(self.device, shape, self.dtype, self.buffer, self._offset)

    def fill(self, array: np.ndarray) -> None:
        """Queues a copy of an array of this shape into it."""
        self.device.send(self.address, _encoded(array, self.dtype))

    def put(self, other: DeviceTensor | np.ndarray, row: int) -> None:
        """Queues a copy of rows of the first axis into it, from `row` on."""
        place = self[row : row + len(other)]
        if isinstance(other, DeviceTensor) and other.device is self.device and other.dtype == self.dtype:
            self.device.copy(place.address, other.address, other.nbytes)
        else:
            place.fill(np.asarray(other))

    def numpy(self) -> np.ndarray:
        """A copy on the host; bfloat16 becomes float32."""
        return _decoded(self.device.receive(self.address, self.nbytes), self.dtype).reshape(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is np.concatenate and len(args) == 1 and not kwargs and all(isinstance(t, DeviceTensor) for t in args[0]):
            tensors: Sequence[DeviceTensor] = args[0]
            joined = DeviceTensor(self.device, (sum(map(len, tensors)), *self.shape[1:]), self.dtype)
            row = 0
            for tensor in tensors:
                joined.put(tensor, row)
                row += len(tensor)
            return joined
        return func(*_on_host(args), **_on_host(kwargs))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html; whoever reads it sees finished work."""
        self.device.synchronize()
        if self.dtype == "bfloat16":
            raise TypeError("the interface has no bfloat16")
        return {
            "shape": self.shape, "typestr": np.dtype(self.dtype).str, "data": (self.address, True), "strides": None,
            "version": 3,
        }  # fmt: skip


def _on_host(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.numpy()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_on_host, value))
    if isinstance(value, dict):
        return {key: _on_host(one) for key, one in value.items()}
    return value


def _encoded(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array as the bytes of a type; bfloat16 is the upper half of a float32, rounded to the nearest, ties to even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, dtype=dtype)
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _decoded(content: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return content.view(dtype)
    return (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


class Rows:
    """Rows `[n, width]` that lie in several places: embeddings of tokens and, between them, of pictures. Whoever takes them
    writes them side by side, where they are; numpy sees them joined."""

    def __init__(self, blocks: Sequence[np.ndarray | DeviceTensor], leading: int = 0) -> None:
        self.blocks, self._leading = list(blocks), leading

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,) * self._leading + (sum(map(len, self.blocks)), *self.blocks[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: None) -> Rows:
        """Rows behind one more axis of one."""
        assert key is None
        return Rows(self.blocks, self._leading + 1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        blocks = [np.asarray(block) for block in self.blocks]
        joined = (blocks[0] if len(blocks) == 1 else np.concatenate(blocks)).reshape(self.shape)
        return joined if dtype is None else joined.astype(dtype, copy=False)


class Context(ABC):
    """An engine with one profile chosen, to be run again and again."""

    @abstractmethod
    def set_input(self, name: str, shape: Sequence[int], address: int) -> None: ...

    @abstractmethod
    def set_output(self, name: str, address: int) -> None: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of an output, when all inputs are set."""

    @abstractmethod
    def enqueue(self) -> None:
        """Queues one run."""


class LoadedEngine(ABC):
    """A plan on a device."""

    scratch: int
    """Bytes that it computes in."""

    @abstractmethod
    def context(self, profile: int) -> Context: ...

    @abstractmethod
    def close(self) -> None: ...


class Driver(ABC):
    """What is installed here for GPUs."""

    @abstractmethod
    def missing(self) -> str | None:
        """Why there is no GPU to compute on, or None."""

    @abstractmethod
    def hosts(self) -> Mapping[str, Host] | str:
        """The flavours of TensorRT that can be imported, or why there is none."""

    @abstractmethod
    def open(self) -> Device:
        """The GPU, with a stream of its own. Raises DeviceError."""

    @abstractmethod
    def load(self, device: Device, flavour: str, plan: Path) -> LoadedEngine:
        """Raises DeviceError where memory does not suffice, EngineError where TensorRT refuses the plan."""
