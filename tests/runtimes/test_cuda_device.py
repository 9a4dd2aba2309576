"""What can be known of the calls to CUDA and TensorRT without a GPU: that they are there, and what becomes of their errors."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgevlm.engines.target import local_gpu
from edgevlm.errors import DeviceError
from edgevlm.runtimes import cuda_device
from edgevlm.runtimes.cuda_device import CudaDriver, _CudaDevice


def read_of(*owners: str) -> set[str]:
    """The attributes that the file reads of these names, or of `self.NAME`."""
    found = set()
    for node in ast.walk(ast.parse(Path(cuda_device.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            owner = node.value
            if (
                isinstance(owner, (ast.Name, ast.Attribute))
                and (owner.id if isinstance(owner, ast.Name) else owner.attr) in owners
            ):
                found.add(node.attr)
    return found


def test_cuda_has_what_is_called() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    names = {name for name in read_of("runtime", "cuda", "_cuda") if name.startswith("cuda")}
    assert len(names) > 20
    assert [name for name in names if not hasattr(runtime, name)] == []
    assert [name for name in read_of("codes") if not hasattr(runtime.cudaError_t, name)] == []
    assert hasattr(runtime.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")


def test_tensorrt_has_what_is_called() -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    assert [n for n in read_of("_context") if n not in dir(trt.IExecutionContext)] == []
    assert [n for n in read_of("engine") if n not in dir(trt.ICudaEngine)] == []
    assert [n for n in read_of("_runtime") if n not in dir(trt.Runtime)] == []
    assert "USER_MANAGED" in trt.ExecutionContextAllocationStrategy.__members__


@pytest.mark.skipif(local_gpu() is not None, reason="this machine has the GPU")
def test_no_gpu_is_a_reason() -> None:
    assert CudaDriver().missing() == "there is no NVIDIA GPU here, or no driver for it"


class Cuda:
    """CUDA's runtime as far as a device needs it, with the statuses that a test wants."""

    cudaError_t = SimpleNamespace(
        cudaSuccess=0, cudaErrorMemoryAllocation=2, cudaErrorStreamCaptureUnsupported=900, cudaErrorStreamCaptureInvalidated=901
    )
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)

    def __init__(self) -> None:
        self.status, self.calls = 0, list[tuple[str, tuple[Any, ...]]]()

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, 1_000_000_000, 8_000_000_000

    def cudaGetErrorName(self, status: int) -> tuple[int, bytes]:
        return 0, b"cudaErrorLaunchFailure"

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> tuple[Any, ...]:
            self.calls.append((name, given))
            return (self.status, 4096) if name.startswith("cudaMalloc") else (self.status,)

        return call


@pytest.fixture
def device() -> _CudaDevice:
    made = _CudaDevice.__new__(_CudaDevice)
    super(_CudaDevice, made).__init__()
    made._cuda, made.stream, made._pools, made._live, made._pinned = Cuda(), 7, 1, set(), {}
    return made


def test_memory_that_is_full_is_no_lost_device(device: _CudaDevice) -> None:
    device._cuda.status = 2
    with pytest.raises(DeviceError, match=r"memory is full \(1\.0 of 8\.0 GB are free\)") as caught:
        device.allocate(100)
    assert not caught.value.lost
    device._cuda.status = 0
    assert device.allocate(100) == 4096
    device.free(4096)
    assert device._live == set()


def test_a_lost_device_says_the_same_ever_after(device: _CudaDevice) -> None:
    device._cuda.status = 719
    with pytest.raises(DeviceError, match=r"The GPU failed \(cudaErrorLaunchFailure\)") as caught:
        device.synchronize()
    assert caught.value.lost
    device._cuda.status = 2
    with pytest.raises(DeviceError) as again:
        device.allocate(1)
    assert again.value is caught.value
    device.close()


def test_what_cannot_be_captured(device: _CudaDevice) -> None:
    device._cuda.status = 901
    with pytest.raises(DeviceError, match="cannot be captured") as caught:
        device.wait()
    assert not caught.value.lost


def test_copies_are_queued_on_the_stream_with_their_pitches(device: _CudaDevice) -> None:
    device.copy(10, 20, 4, 3, 16, 8)
    device.copy(10, 20, 4)
    device.upload(10, np.zeros(5, np.uint8))
    (first, (name, given), (_, up)) = device._cuda.calls
    assert first == ("cudaMemcpy2DAsync", (10, 16, 20, 8, 4, 3, 3, 7))
    assert (name, given) == ("cudaMemcpyAsync", (10, 20, 4, 3, 7))
    assert (up[0], up[2:]) == (10, (5, 1, 7))
