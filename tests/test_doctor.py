"""The doctor: says what is there, what is missing, and what to do about it; never fails itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from edgevlm import doctor
from edgevlm.doctor import Finding, examine


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_what_it_looks_at() -> None:
    found = by_name(examine())
    wanted = {"system", "python", "processor", "memory", "disk here", "gpu", "backend cpu", "backend cuda", "extra cpu",
              "extra quantize", "extra export"}  # fmt: skip
    assert wanted <= set(found)
    assert found["python"].found == sys.version.split()[0]
    assert found["backend cpu"].ok is True
    assert "onnxruntime" in found["extra cpu"].found


def test_what_is_wrong_has_a_remedy() -> None:
    for finding in examine():
        assert finding.ok is not False or finding.remedy, finding


def test_missing_packages_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name in ("torch", "onnx_ir") else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    found = by_name(examine())
    assert found["extra export"].ok is False
    assert "missing: torch, onnx_ir" in found["extra export"].found
    assert found["extra export"].remedy == "pip install 'edgevlm[export]'"
    assert found["extra quantize"].ok is False
    assert found["extra cpu"].ok is True


def test_a_machine_without_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = by_name(examine())
    assert found["backend cpu"].ok is False
    assert "edgevlm[cpu]" in found["backend cpu"].remedy


@pytest.mark.parametrize("answer", ["Orin, 8 GiB, 540.1, 8.7\n", "", None])
def test_a_gpu_tool_that_answers_or_breaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str | None) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{answer}'\n" if answer is not None else "#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(tool) if name == "nvidia-smi" else None)
    gpu = by_name(examine())["gpu"]
    assert (gpu.found, gpu.ok) == (("Orin, 8 GiB, 540.1, 8.7", True) if answer else (gpu.found, None))
    assert gpu.found


def test_two_runtimes_that_overwrite_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda module: "1.0")
    finding = by_name(examine())["onnxruntime"]
    assert finding.ok is False
    assert "uninstall both" in finding.remedy
