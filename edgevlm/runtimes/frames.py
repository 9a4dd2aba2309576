"""Frames that other libraries hold: on the host by DLPack, on a GPU by DLPack or `__cuda_array_interface__`.

https://dmlc.github.io/dlpack/latest/c_api.html, https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ImageError
from .device import Buffer, Device, DeviceTensor

__all__ = ["DeviceFrame", "frame_of"]

_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_KINDS = {0: "int", 1: "uint", 2: "float", 6: "bool"}


class DeviceFrame(Buffer):
    """A picture in a GPU's memory, which stays its owner's: `shape` and `dtype` as numpy names it."""

    def __init__(self, owner: Any, address: int, shape: Sequence[int], dtype: str) -> None:
        self._owner, self.address, self.shape, self.dtype = owner, address, tuple(shape), dtype
        self.size = math.prod(shape) * np.dtype(dtype).itemsize
        if dtype == "uint8" and len(shape) == 3 and shape[2] == 3:
            self.height, self.width = shape[:2]
        elif dtype in ("float16", "float32") and len(shape) == 3 and shape[0] == 3:
            self.height, self.width = shape[1:]
        else:
            raise ImageError(
                f"The frame on the GPU is {dtype} {list(shape)}; it is uint8 [height, width, 3], or float16 or float32 [3, "
                "height, width] as the model's own preprocessing would give it."
            )

    @property
    def ready(self) -> bool:
        """Whether it is what the vision encoder takes."""
        return self.dtype != "uint8"

    def on(self, device: Device) -> DeviceTensor:
        """The same memory, as the device's sessions take it."""
        return DeviceTensor(device, self.shape, self.dtype, self)


def frame_of(source: Any, stream: int) -> Any:
    """A DeviceFrame for what lies on a GPU, finished before what `stream` does next; an array for what lies on the host and
    has DLPack; anything else as it is. Raises ImageError."""
    if isinstance(source, (np.ndarray, str, bytes)) or not hasattr(source, "__dlpack__"):
        described = getattr(source, "__cuda_array_interface__", None)
        return source if described is None else _from_interface(source, described)
    if source.__dlpack_device__()[0] in _CUDA:
        return _from_capsule(source.__dlpack__(stream=stream or 1))
    try:
        return np.from_dlpack(source)
    except (BufferError, RuntimeError, TypeError, ValueError) as exc:
        raise ImageError(f"a {type(source).__name__} cannot be read by DLPack: {exc}") from exc


def _from_interface(source: Any, described: dict[str, Any]) -> DeviceFrame:
    shape, dtype = described["shape"], np.dtype(described["typestr"]).name
    _check_layout(shape, described.get("strides"), np.dtype(dtype).itemsize)
    waiting = described.get("stream")
    if waiting is not None:
        raise ImageError(
            f"the frame is still being written on the stream {waiting:#x}; synchronize it first, or give the frame by DLPack"
        )
    return DeviceFrame(source, int(described["data"][0]), shape, dtype)


def _check_layout(shape: Sequence[int], strides: Sequence[int] | None, item: int) -> None:
    expected = [item * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if strides is not None and list(strides) != expected:
        raise ImageError("the frame on the GPU has gaps, or its axes are turned; make it contiguous first")


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)), ("offset", ctypes.c_uint64),
    )  # fmt: skip


def _from_capsule(capsule: Any) -> DeviceFrame:
    """The capsule keeps its name, so that it frees what it stands for when nothing refers to it any more."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = ctypes.cast(pointer(capsule, b"dltensor"), ctypes.POINTER(_Tensor)).contents
    shape = [int(tensor.shape[i]) for i in range(tensor.ndim)]
    kind = _KINDS.get(tensor.code, f"code {tensor.code}, ")
    item = tensor.bits // 8
    strides = [int(tensor.strides[i]) * item for i in range(tensor.ndim)] if tensor.strides else None
    _check_layout(shape, strides, item)
    name = f"{kind}{tensor.bits}"
    if name not in ("uint8", "float16", "float32"):
        raise ImageError(f"the frame on the GPU is {name}; it is uint8, float16 or float32")
    return DeviceFrame(capsule, int(tensor.data or 0) + int(tensor.offset), shape, name)
