"""The GPU behind `device`, by CUDA's runtime (cuda-python's `cuda-bindings`), and TensorRT's engines on it.

It could be written against the packages only, and never be run: no machine with a GPU was at hand.
https://nvidia.github.io/cuda-python/cuda-bindings/latest/module/runtime.html and
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.record import Host
from ..engines.target import local_gpu
from ..engines.tensorrt import FLAVOURS, TensorRT, open_tensorrt
from ..errors import DeviceError, EngineError, MissingDependencyError
from .device import Context, Device, Driver, LoadedEngine

__all__ = ["CudaDriver"]


class CudaDriver(Driver):
    def missing(self) -> str | None:
        if local_gpu() is None:
            return "there is no NVIDIA GPU here, or no driver for it"
        try:
            import cuda.bindings.runtime  # noqa: F401
        except ImportError:
            return "cuda-bindings is not installed (`pip install 'edgevlm[tensorrt-rtx]'`, or `[gpu]`, brings it)"
        return None

    def hosts(self) -> Mapping[str, Host] | str:
        gpu = local_gpu()
        assert gpu is not None
        found, missing = {}, []
        for flavour in FLAVOURS:
            try:
                found[flavour] = Host(flavour, open_tensorrt(flavour).version, gpu.capability, gpu.name)
            except MissingDependencyError as exc:
                missing.append(str(exc))
        return found or " ".join(missing)

    def open(self) -> Device:
        return _CudaDevice()

    def load(self, device: Device, flavour: str, plan: Path) -> LoadedEngine:
        assert isinstance(device, _CudaDevice)
        return _Engine(device, open_tensorrt(flavour), plan)


class _CudaDevice(Device):
    def __init__(self) -> None:
        super().__init__()
        from cuda.bindings import runtime

        self._cuda: Any = runtime
        self._check(runtime.cudaSetDevice(0))
        # Blocking streams would wait for the robot's own work on the default stream.
        (self.stream,) = self._check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        attribute = runtime.cudaDeviceAttr.cudaDevAttrMemoryPoolsSupported
        (self._pools,) = self._check(runtime.cudaDeviceGetAttribute(attribute, 0))
        self._live: set[int] = set()
        self._pinned: dict[int, int] = {}  # address of the array's data → the same, as CUDA gave it

    def _check(self, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a call gave, without its status. Raises DeviceError; all but a full memory is taken for a lost device, since
        CUDA's errors stick to the process."""
        status, *values = answer
        codes = self._cuda.cudaError_t
        if status == codes.cudaSuccess:
            return tuple(values)
        if self.lost is not None:
            raise self.lost
        _, name = self._cuda.cudaGetErrorName(status)
        text = name.decode() if isinstance(name, bytes) else str(name)
        self._cuda.cudaGetLastError()  # an error that does not stick would else be met again by the next call
        if status == codes.cudaErrorMemoryAllocation:
            free, total = self.memory()
            raise DeviceError(
                f"The GPU's memory is full ({free / 1e9:.1f} of {total / 1e9:.1f} GB are free). Load with a smaller capacity, "
                "give smaller pictures, or end other programs on the GPU."
            )
        if status == codes.cudaErrorStreamCaptureUnsupported or status == codes.cudaErrorStreamCaptureInvalidated:
            raise DeviceError(f"This work cannot be captured ({text}).")
        self.lost = DeviceError(
            f"The GPU failed ({text}), and with it all that this model had on it. Close it and load it again; where that "
            "fails too, restart the process.",
            lost=True,
        )
        raise self.lost

    def allocate(self, size: int) -> int:
        cuda = self._cuda
        (address,) = self._check(cuda.cudaMallocAsync(size, self.stream) if self._pools else cuda.cudaMalloc(size))
        self._live.add(int(address))
        return int(address)

    def free(self, address: int) -> None:
        self._live.discard(address)
        self._check(self._cuda.cudaFreeAsync(address, self.stream) if self._pools else self._cuda.cudaFree(address))

    def pin(self, size: int) -> np.ndarray:
        (pointer,) = self._check(self._cuda.cudaHostAlloc(size, 0))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(pointer)))
        self._pinned[array.ctypes.data] = int(pointer)
        return array

    def unpin(self, memory: np.ndarray) -> None:
        self._check(self._cuda.cudaFreeHost(self._pinned.pop(memory.ctypes.data)))

    def upload(self, to: int, memory: np.ndarray) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._check(self._cuda.cudaMemcpyAsync(to, memory.ctypes.data, memory.nbytes, kind, self.stream))

    def download(self, memory: np.ndarray, source: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._check(self._cuda.cudaMemcpyAsync(memory.ctypes.data, source, memory.nbytes, kind, self.stream))

    def copy(self, to: int, source: int, width: int, rows: int = 1, to_pitch: int = 0, source_pitch: int = 0) -> None:
        cuda, kind = self._cuda, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        if rows == 1:
            self._check(cuda.cudaMemcpyAsync(to, source, width, kind, self.stream))
        else:
            self._check(cuda.cudaMemcpy2DAsync(to, to_pitch, source, source_pitch, width, rows, kind, self.stream))

    def clear(self, address: int, size: int) -> None:
        self._check(self._cuda.cudaMemsetAsync(address, 0, size, self.stream))

    def wait(self) -> None:
        self._check(self._cuda.cudaStreamSynchronize(self.stream))

    def capture(self, work: Callable[[], None]) -> Any:
        cuda = self._cuda
        self._check(cuda.cudaStreamBeginCapture(self.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        try:
            work()
        except BaseException:
            cuda.cudaStreamEndCapture(self.stream)
            raise
        (graph,) = self._check(cuda.cudaStreamEndCapture(self.stream))
        try:
            (runnable,) = self._check(cuda.cudaGraphInstantiate(graph, 0))
        finally:
            cuda.cudaGraphDestroy(graph)
        return runnable

    def launch(self, graph: Any) -> None:
        self._check(self._cuda.cudaGraphLaunch(graph, self.stream))

    def drop(self, graph: Any) -> None:
        self._check(self._cuda.cudaGraphExecDestroy(graph))

    def memory(self) -> tuple[int, int]:
        status, free, total = self._cuda.cudaMemGetInfo()
        return (int(free), int(total)) if status == self._cuda.cudaError_t.cudaSuccess else (0, 0)

    def release(self) -> None:
        cuda = self._cuda
        if self.lost is not None:
            return  # every call would fail
        cuda.cudaStreamSynchronize(self.stream)
        for address in self._live:
            cuda.cudaFreeAsync(address, self.stream) if self._pools else cuda.cudaFree(address)
        for pointer in self._pinned.values():
            cuda.cudaFreeHost(pointer)
        cuda.cudaStreamSynchronize(self.stream)
        cuda.cudaStreamDestroy(self.stream)
        self._live.clear()
        self._pinned.clear()


class _Engine(LoadedEngine):
    def __init__(self, device: _CudaDevice, tensorrt: TensorRT, plan: Path) -> None:
        self._device, self._tensorrt = device, tensorrt
        tensorrt.log.clear()
        trt = tensorrt.module
        self._runtime = trt.Runtime(tensorrt.logger)
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self.engine = self._runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            said = "; ".join(message.strip().splitlines()[0] for _, message in tensorrt.log if message.strip())
            if "memory" in said.lower():
                raise DeviceError(f"The GPU's memory does not suffice for {plan.name}: {said}")
            raise EngineError(f"{tensorrt.flavour} {tensorrt.version} does not take {plan.name}: {said or 'no reason given'}")
        self.scratch = int(self.engine.device_memory_size_v2)

    def context(self, profile: int) -> Context:
        strategy = self._tensorrt.module.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(strategy)
        if context is None:
            raise DeviceError("The GPU's memory does not suffice for what an engine computes in.")
        return _Context(self._device, context, profile)

    def close(self) -> None:
        self.engine = self._runtime = None


class _Context(Context):
    def __init__(self, device: _CudaDevice, context: Any, profile: int) -> None:
        self._device, self._context = device, context
        self._stream = int(device.stream)
        if not context.set_optimization_profile_async(profile, self._stream):
            raise EngineError(f"The engine has no profile {profile}.")
        self._scratch = 0

    def set_input(self, name: str, shape: Sequence[int], address: int) -> None:
        if not self._context.set_input_shape(name, tuple(shape)) or not self._context.set_tensor_address(name, address):
            raise EngineError(f"TensorRT refuses {name!r} of the shape {list(shape)}.")

    def set_output(self, name: str, address: int) -> None:
        self._context.set_tensor_address(name, address)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in self._context.get_tensor_shape(name))

    def enqueue(self) -> None:
        scratch = self._device.scratch
        if scratch is not None and scratch.address != self._scratch:
            self._context.set_device_memory(scratch.address, scratch.size)
            self._scratch = scratch.address
        if not self._context.execute_async_v3(self._stream):
            # The status of what went wrong is CUDA's own.
            with contextlib.suppress(AttributeError):
                self._device._check((self._device._cuda.cudaGetLastError()[0],))
            raise DeviceError("TensorRT stopped before the work was queued.")
