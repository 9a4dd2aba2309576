"""What `edgevlm build --target` may be: a device of `targets.toml`, the GPU that is here, or all RTX cards at once; and which
flavour of TensorRT builds for it, for which compute capabilities."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from ..errors import EngineError
from ..targets import LOCAL, find_target

__all__ = ["BuildTarget", "LocalGPU", "build_target", "local_gpu"]

#: One plan for the RTX cards of three generations.
_PORTABLE = {"rtx": ("sm86", "sm89", "sm120")}
#: What TensorRT-RTX builds for without one of these being there.
_RTX_CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


@dataclass(frozen=True)
class BuildTarget:
    """`device` is the GPU's name where plans are tuned on the one that is there."""

    name: str
    flavour: str
    capabilities: tuple[str, ...]
    device: str = ""


@dataclass(frozen=True)
class LocalGPU:
    name: str
    capability: str


def local_gpu() -> LocalGPU | None:
    """The first GPU, as the driver names it, or None where there is no driver or no GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = (ctypes.c_int() for _ in range(3))
    name = ctypes.create_string_buffer(256)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetName(name, len(name), device):
        return None
    for number, into in ((75, major), (76, minor)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if cuda.cuDeviceGetAttribute(ctypes.byref(into), number, device):
            return None
    return LocalGPU(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}")


def build_target(name: str) -> BuildTarget:
    """Raises InputError for an unknown name, EngineError where it is built elsewhere."""
    if name in _PORTABLE:
        return BuildTarget(name, "tensorrt-rtx", _PORTABLE[name])
    gpu = local_gpu()
    if name == LOCAL:
        if gpu is None:
            raise EngineError(
                "The target local is this machine's own GPU, and there is none (no driver, or no device). Engines for RTX "
                f"cards are built without one: --target {', '.join((*_PORTABLE, 'rtx-4090'))}, …"
            )
        flavour = "tensorrt-rtx" if gpu.capability in _RTX_CAPABILITIES else "tensorrt"
        return BuildTarget(name, flavour, (gpu.capability,), gpu.name if flavour == "tensorrt" else "")
    target = find_target(name, besides=tuple(_PORTABLE))
    capability = f"sm{(target.compute_capability or '').replace('.', '')}"
    if any(version.flavour == "tensorrt-rtx" for version in target.tensorrt):
        return BuildTarget(name, "tensorrt-rtx", (capability,))
    if gpu is not None and gpu.capability != capability:
        raise EngineError(
            f"The target {name} is {capability}, the GPU here is {gpu.name} ({gpu.capability}). Classic TensorRT builds for "
            "the GPU that it runs on: run `edgevlm build` on the device itself."
        )
    return BuildTarget(name, "tensorrt", (capability,), gpu.name if gpu else "")
