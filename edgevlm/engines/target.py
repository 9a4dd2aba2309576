"""What `--target` may be: which flavour of TensorRT builds for it, and for which compute capabilities."""

from __future__ import annotations

import ctypes
import difflib
from dataclasses import dataclass

from ..errors import EngineError, InputError

__all__ = ["BuildTarget", "LocalGPU", "build_target", "local_gpu"]

_RTX = {
    "sm75": ("rtx-2060", "rtx-2070", "rtx-2080", "rtx-2080-ti"),
    "sm86": ("rtx-3050", "rtx-3060", "rtx-3070", "rtx-3080", "rtx-3090", "rtx-a2000", "rtx-a4000", "rtx-a5000", "rtx-a6000"),
    "sm89": ("rtx-4050", "rtx-4060", "rtx-4070", "rtx-4080", "rtx-4090", "rtx-2000-ada", "rtx-4000-ada", "rtx-6000-ada"),
    "sm120": ("rtx-5050", "rtx-5060", "rtx-5070", "rtx-5080", "rtx-5090", "rtx-pro-6000"),
    "sm121": ("gb10",),
}
_JETSON = {
    "sm87": (
        "orin-nano-4gb", "orin-nano-8gb", "orin-nano-super-8gb", "orin-nx-8gb", "orin-nx-16gb", "agx-orin-32gb",
        "agx-orin-64gb",
    ),
    "sm110": ("agx-thor",),
}  # fmt: skip
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
    for capability, names in _RTX.items():
        if name in names:
            return BuildTarget(name, "tensorrt-rtx", (capability,))
    if name in _PORTABLE:
        return BuildTarget(name, "tensorrt-rtx", _PORTABLE[name])
    gpu = local_gpu()
    if name == "local":
        if gpu is None:
            raise EngineError(
                "The target local is this machine's own GPU, and there is none (no driver, or no device). Engines for RTX "
                f"cards are built without one: --target {', '.join((*_PORTABLE, 'rtx-4090'))}, …"
            )
        flavour = "tensorrt-rtx" if gpu.capability in _RTX_CAPABILITIES else "tensorrt"
        return BuildTarget(name, flavour, (gpu.capability,), gpu.name if flavour == "tensorrt" else "")
    for capability, names in _JETSON.items():
        if name in names:
            if gpu is not None and gpu.capability != capability:
                raise EngineError(
                    f"The target {name} is {capability}, the GPU here is {gpu.name} ({gpu.capability}). Classic TensorRT "
                    "builds for the GPU that it runs on: run `edgevlm build` on the Jetson."
                )
            return BuildTarget(name, "tensorrt", (capability,), gpu.name if gpu else "")
    known = [n for group in (*_RTX.values(), *_JETSON.values(), _PORTABLE, ("local",)) for n in group]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise InputError(f"There is no target {name!r}.{hint} There are {', '.join(known)}.")
