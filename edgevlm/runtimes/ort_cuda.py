"""ONNX Runtime on an NVIDIA GPU.

Everything is bound by address: feeds and the KV cache lie in memory of `device`, on whose stream ONNX Runtime works too; what
a part gives stays where ONNX Runtime put it; only logits come to the host. It was run with ONNX Runtime's CPU posing as the
device, never on a GPU: none was at hand. https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Part
from ..errors import BundleError, DeviceError
from .base import Backend, BackendUnavailable, Memory, Model, PartSession, State, Tensor
from .cuda_device import CudaDriver
from .device import Buffer, Device, DeviceTensor, Driver
from .device_session import DeviceMemory, DeviceSession
from .ort import onnxruntime, open_session, outdated

__all__ = ["CUDA"]


class CUDA(Backend):
    name = "cuda"
    provider = "CUDAExecutionProvider"
    place = "cuda"
    # Its TensorScatter is written for every type, so that int8 should run:
    # https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/providers/cuda/llm/tensorscatter.cc
    kv_dtypes = ("float32", "float16")
    kv_note = "int8 was never tried on a GPU"

    def __init__(self, driver: Driver | None = None) -> None:
        self.driver = driver or CudaDriver()

    def unavailable(self) -> str | None:
        if reason := outdated():
            return reason
        if self.provider not in onnxruntime().get_available_providers():
            return f"the installed onnxruntime has no {self.provider} (`pip install 'edgevlm[gpu]'` in place of `[cpu]`)"
        return self.driver.missing()

    def options(self, device: Device) -> Mapping[str, str]:
        """Of the provider: our stream, so that copies and computations stay in order, and no more memory than asked for."""
        return {"user_compute_stream": str(int(device.stream)), "arena_extend_strategy": "kSameAsRequested"}

    def open(self, path: Path, name: str, part: Part, model: Model) -> PartSession:
        try:
            device = model.device(self.driver)
        except DeviceError as exc:
            raise BackendUnavailable(str(exc).rstrip(".")) from exc
        try:
            session = open_session(path, name, model, (self.provider, dict(self.options(device))))
        except BundleError as exc:
            if not _is_memory(exc):
                raise
            raise BackendUnavailable("the GPU's memory does not suffice for it") from exc
        # Asked for a GPU that it cannot use, ONNX Runtime falls back to the CPU without an error.
        if session.get_providers()[0] != self.provider:
            raise BackendUnavailable(f"{self.provider} could not start on this machine (driver, CUDA or cuDNN are missing)")
        return _Session(name, part, device, session, self.place)


def _is_memory(exc: BaseException) -> bool:
    """ONNX Runtime says it in words alone."""
    return any(
        words in str(exc).lower() for words in ("out of memory", "failed to allocate memory", "cudaerrormemoryallocation")
    )


class _Session(DeviceSession):
    def __init__(self, name: str, part: Part, device: Device, session: Any, place: str) -> None:
        super().__init__(name, part, device)
        self.session, self.place = session, place

    def new_state(self, pairs: Mapping[str, str], batch: int, capacity: int) -> State:
        with self.failures():
            return _State(self, pairs, batch, capacity)

    def close(self) -> None:
        self.session = None

    def _run(self, feeds: dict[str, Any], state: State | None, memory: Memory | None) -> dict[str, Tensor]:
        with self.failures():
            # They are held until the run is over.
            tensors = {name: self.on_device(name, feed) for name, feed in feeds.items()}
            binding = self.session.io_binding()
            if memory is not None:
                assert isinstance(memory, DeviceMemory)
                tensors |= memory.tensors
            if state is not None:
                assert isinstance(state, _State)
                tensors |= state.tensors
                for past, present in state.pairs.items():
                    self._bind(binding.bind_output, present, state.tensors[past])
            for name, tensor in tensors.items():
                self._bind(binding.bind_input, name, tensor)
            written = set(state.pairs.values()) if isinstance(state, _State) else set()
            names = [name for name in self.part.outputs if name not in written]
            for name in names:
                binding.bind_output(name, "cpu" if state is not None else self.place)
            self._enqueue(binding)
            values = binding.get_outputs()[len(written) :]
        if state is not None:
            return {name: np.array(value.numpy()) for name, value in zip(names, values, strict=True)}
        return {name: self._found(name, value) for name, value in zip(names, values, strict=True)}

    def _bind(self, bind: Any, name: str, tensor: DeviceTensor) -> None:
        bind(name, self.place, 0, np.dtype(tensor.dtype), list(tensor.shape), tensor.address)

    def _enqueue(self, binding: Any) -> None:
        try:
            self.session.run_with_iobinding(binding)
        except Exception as exc:  # ONNX Runtime's exceptions share no base class
            if _is_memory(exc):
                raise DeviceError("The GPU's memory is full. Load with a smaller capacity, or give smaller pictures.") from exc
            if "CUDA" in str(exc) or "CUDNN" in str(exc):
                self.device.lost = DeviceError(f"The GPU failed ({exc}). Close the model and load it again.", lost=True)
                raise self.device.lost from exc
            raise BundleError(f"ONNX Runtime stopped in the part {self.name}: {exc}") from exc

    def _found(self, name: str, value: Any) -> DeviceTensor:
        return DeviceTensor(self.device, value.shape(), self.dtype(name), _Foreign(value))


class _Foreign(Buffer):
    """Memory that ONNX Runtime allocated, and frees with its value."""

    def __init__(self, value: Any) -> None:
        self._value, self.address, self.size = value, int(value.data_ptr()), int(value.tensor_size_in_bytes())


class _State(State):
    def __init__(self, session: _Session, pairs: Mapping[str, str], batch: int, capacity: int) -> None:
        self._session, self.pairs, self._batch = session, dict(pairs), batch
        self.inputs, self.capacity = frozenset(pairs), capacity
        self.tensors = {name: self._zeros(name, capacity) for name in pairs}

    def _zeros(self, name: str, capacity: int) -> DeviceTensor:
        sizes = {"batch_size": self._batch, "capacity": capacity}
        shape: Sequence[int] = [sizes[d] if isinstance(d, str) else d for d in self._session.part.inputs[name].shape]
        tensor = DeviceTensor(self._session.device, shape, self._session.dtype(name))
        self._session.device.clear(tensor.address, tensor.nbytes)
        return tensor

    def grow(self, capacity: int) -> None:
        with self._session.failures():
            for name, old in list(self.tensors.items()):
                new = self._zeros(name, capacity)
                batch, heads, rows, width = old.shape
                width *= old.itemsize
                self._session.device.copy(new.address, old.address, rows * width, batch * heads, capacity * width, rows * width)
                self.tensors[name] = new
            self.capacity = capacity
