"""`edgevlm doctor`: what this machine offers, what is missing, and how to get it. It changes nothing and loads no model."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from .errors import MissingDependencyError
from .runtimes import BACKENDS

__all__ = ["EXTRAS", "Finding", "examine", "missing_modules"]

#: The modules that each extra of the package brings.
EXTRAS = {
    "cpu": ("onnxruntime",),
    "quantize": ("onnx_ir", "ml_dtypes"),
    "tensorrt-rtx": ("onnx_ir", "ml_dtypes", "tensorrt_rtx_bindings", "cuda.bindings"),
    "eval": ("matplotlib", "pycocoevalcap", "scipy"),
    "ray": ("ray",),
    "export": ("torch", "transformers", "onnx", "onnx_ir", "ml_dtypes", "onnxscript", "safetensors", "huggingface_hub"),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `ok` is None where there is nothing to judge; `remedy` says what to do where it is False."""

    what: str
    found: str
    ok: bool | None = None
    remedy: str = ""


def examine() -> list[Finding]:
    """Machine, backends and extras, in that order."""
    return [*_machine(), *_backends(), *_extras()]


def _machine() -> list[Finding]:
    memory = _meminfo()
    free = shutil.disk_usage(Path.cwd()).free
    findings = [
        Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        Finding(
            "python",
            sys.version.split()[0],
            sys.version_info >= (3, 10),
            "" if sys.version_info >= (3, 10) else "3.10 or newer is needed",
        ),
        Finding("processor", f"{_processor()}, {len(os.sched_getaffinity(0))} cores usable"),
        Finding("memory", f"{memory.get('MemTotal', 0) / 1e9:.1f} GB, {memory.get('MemAvailable', 0) / 1e9:.1f} GB available"),
        Finding(
            "disk here", f"{free / 1e9:.1f} GB free", free > 2e9, "" if free > 2e9 else "bundles of 7B models take 4 to 28 GB"
        ),
    ]
    gpu = _gpu()
    findings.append(Finding("gpu", gpu or "none found (nvidia-smi is absent or lists none)", True if gpu else None))
    return findings


def _meminfo() -> dict[str, int]:
    path = Path("/proc/meminfo")
    if not path.exists():
        return {}
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in path.read_text().splitlines()}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        model = Path("/proc/device-tree/model")  # Jetsons have no nvidia-smi before JetPack 6
        return model.read_text().strip("\0") if model.exists() else ""
    query = [tool, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        return "; ".join(
            subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")
        ).strip("; ")
    except (subprocess.SubprocessError, OSError):
        return ""


def _backends() -> list[Finding]:
    findings = []
    for name, backend in BACKENDS.items():
        try:
            reason = backend.unavailable()
        except MissingDependencyError as exc:
            findings.append(Finding(f"backend {name}", "no runtime installed", False, str(exc)))
            continue
        details = backend.details() if reason is None else ""
        found = f"usable{details and f': {details}'}" if reason is None else f"not usable: {reason}"
        caches = f"KV cache in {', '.join(backend.kv_dtypes)}{f' ({backend.kv_note})' if backend.kv_note else ''}"
        # A GPU that is missing is no fault of a CPU box.
        findings.append(Finding(f"backend {name}", f"{found}; {caches}", True if reason is None else None))
    return findings


def missing_modules(extra: str) -> list[str]:
    """What an extra brings and is not installed."""
    return [module for module in EXTRAS[extra] if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _extras() -> list[Finding]:
    findings = []
    for extra, modules in EXTRAS.items():
        missing = missing_modules(extra)
        found = ", ".join(f"{m} {_version(m)}" for m in modules if m not in missing)
        if missing:
            found = f"{found}; missing: {', '.join(missing)}".removeprefix("; ")
        remedy = f"pip install 'edgevlm[{extra}]'" if missing else ""
        findings.append(Finding(f"extra {extra}", found, not missing, remedy))
    both = [d for d in ("onnxruntime", "onnxruntime-gpu") if _version(d) != "?"]
    if len(both) == 2:
        findings.append(
            Finding(
                "onnxruntime",
                "both onnxruntime and onnxruntime-gpu are installed",
                False,
                "they overwrite each other: uninstall both, install one",
            )
        )
    if importlib.util.find_spec("torchvision") is not None and "+cpu" in _version("torch"):
        findings.append(
            Finding(
                "torchvision",
                "installed beside a CPU build of torch",
                False,
                "the two may not match and break transformers; uninstall torchvision",
            )
        )
    return findings


def _version(module: str) -> str:
    other = {
        "onnxruntime": "onnxruntime-gpu",
        "tensorrt_rtx_bindings": "tensorrt-rtx-cu13-bindings",
        "cuda.bindings": "cuda-bindings",
    }.get(module, module)
    for name in (module, module.replace("_", "-"), other):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "?"
