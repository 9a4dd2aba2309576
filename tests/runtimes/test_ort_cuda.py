"""ONNX Runtime on a GPU: its CPU poses as the device, with memory, copies and addresses of the stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

pytest.importorskip("torch")
from asking import load, logits_of, picture
from fake_gpu import FakeDriver
from tinies import Tiny

from edgevlm import generate, runtimes
from edgevlm.errors import DeviceError, InputError
from edgevlm.runtimes import ort_cuda
from edgevlm.runtimes.ort_cuda import CUDA
from edgevlm.vlm import VLM

A, B = picture(1), picture(2, 30, 64)
FAMILIES = (
    "clip-llama", "blip2-t5-tied", "instructblip-llama", "flamingo-every-second", "internvl-qwen2", "qwen-vl",
    "qwen2.5-vl-windows",
)  # fmt: skip


class Posing(CUDA):
    provider, place = "CPUExecutionProvider", "cpu"

    def options(self, device: Any) -> dict[str, str]:
        return {}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake, enqueue, found = FakeDriver(), ort_cuda._Session._enqueue, ort_cuda._Session._found

    def in_order(self: Any, binding: Any) -> None:
        self.device.synchronize()  # a GPU would go on behind what is queued
        enqueue(self, binding)

    def lent(self: Any, name: str, value: Any) -> Any:
        self.device.lend(value, value.data_ptr(), value.tensor_size_in_bytes())
        return found(self, name, value)

    monkeypatch.setattr(ort_cuda._Session, "_enqueue", in_order)
    monkeypatch.setattr(ort_cuda._Session, "_found", lent)
    others = {n: b for n, b in runtimes.BACKENDS.items() if n == "cpu"}
    monkeypatch.setattr(runtimes, "BACKENDS", {"cuda": Posing(fake)} | others)
    return fake


def same(vlm: VLM, cpu: VLM, **asked: Any) -> None:
    got, seen = logits_of(vlm, max_new_tokens=12, **asked)
    expected, wanted = logits_of(cpu, max_new_tokens=12, **asked)
    assert got.timings.reused_tokens == expected.timings.reused_tokens
    np.testing.assert_allclose(seen, wanted, atol=1e-5)
    assert got.tokens == expected.tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_the_cpu(
    name: str, tiny: Callable[[str], Tiny], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "CHUNK", 16)
    monkeypatch.setattr(generate, "STEP", 16)  # the cache grows on the device
    with load(tiny(name).bundle, backend="cuda") as vlm:
        cpu = load(tiny(name).bundle, backend="cpu")
        assert {choice.chosen for choice in vlm.backends.values()} == {"cuda"}
        (device,) = driver.devices
        same(vlm, cpu, prompt="How many cubes are there?", images=[A])
        same(vlm, cpu, prompt="How many red cubes?", images=[A])
        same(vlm, cpu, prompt="What is it?", images=[B])
        assert device.downloads == []  # logits come by ONNX Runtime itself, and nothing else does
    assert device.used == 0


def test_between_two_backends_features_are_copied(tiny: Callable[[str], Tiny], driver: FakeDriver) -> None:
    folder = tiny("clip-llama").bundle
    for backend in ("decoder=cpu", "vision_encoder=cpu"):
        same(load(folder, backend=backend), load(folder, backend="cpu"), prompt="How many?", images=[A])


def test_silent_fallback_is_noticed(tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime runs on the CPU when a GPU cannot be started; here a provider that gives no session of its own."""
    cuda, session = CUDA(FakeDriver()), ort.InferenceSession
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(runtimes, "BACKENDS", {"cuda": cuda, "cpu": runtimes.BACKENDS["cpu"]})
    monkeypatch.setattr(
        ort, "InferenceSession", lambda model, options, providers: session(model, options, ["CPUExecutionProvider"])
    )
    folder = tiny("clip-llama").bundle
    with pytest.raises(InputError, match="CUDAExecutionProvider could not start"):
        load(folder, backend="cuda")
    choice = load(folder).backends["decoder"]
    assert choice.tried == ("cuda", "cpu")
    assert "could not start" in choice.reasons["cuda"]


@pytest.mark.parametrize(
    ("said", "lost", "words"),
    [
        (
            "Failed to allocate memory for requested buffer of size 5",
            False,
            "In the part vision_encoder: The GPU's memory is full",
        ),
        ("CUDA failure 719: unspecified launch failure", True, "In the part vision_encoder: The GPU failed .*launch failure"),
    ],
)
def test_failures_in_the_middle(
    said: str, lost: bool, words: str, tiny: Callable[[str], Tiny], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = load(tiny("clip-llama").bundle, backend="cuda")
    session = vlm._sessions["vision_encoder"]

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def run_with_iobinding(self, binding: Any) -> None:
            raise RuntimeError(said)

    real = session.session  # type: ignore[attr-defined]
    session.session = Broken()  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match=words) as caught:
        vlm.generate("What?", images=[A])
    assert caught.value.lost is lost
    session.session = real  # type: ignore[attr-defined]
    if lost:
        with pytest.raises(DeviceError, match="load it again"):
            vlm.generate("What?", images=[A])
    else:
        same(vlm, load(tiny("clip-llama").bundle, backend="cpu"), prompt="What?", images=[A])
    vlm.close()
