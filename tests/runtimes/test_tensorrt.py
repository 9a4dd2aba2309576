"""The TensorRT backend on a GPU that is none: whole models answer through it as they do on the CPU, features stay where they
are, and each reason for passing it over is said."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
from asking import load, logits_of, picture
from fake_gpu import HOST, FakeDevice, FakeDriver, add_engines, changed_host
from tinies import Tiny

from edgevlm import doctor, generate, runtimes
from edgevlm.cli import main
from edgevlm.errors import CapacityError, DeviceError, ImageError, InputError
from edgevlm.runtimes.tensorrt import TensorRT
from edgevlm.vlm import VLM

#: One of each family, and each way that something enters a decoder.
FAMILIES = (
    "clip-llama", "blip2-opt-350m", "blip2-t5-tied", "instructblip-llama", "flamingo-every-second", "flamingo-every-third",
    "internvl-qwen2", "qwen-vl", "qwen2-vl", "qwen2.5-vl-windows", "qwen3-vl",
)  # fmt: skip
A, B = picture(1), picture(2, 30, 64)
TOKENS = 12


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Stands for what is installed."""
    fake = FakeDriver()
    monkeypatch.setattr(
        runtimes, "BACKENDS", {"tensorrt": TensorRT(fake)} | {n: b for n, b in runtimes.BACKENDS.items() if n != "tensorrt"}
    )
    return fake


@pytest.fixture
def with_engines(tiny: Callable[[str], Tiny], tmp_path: Path) -> Callable[..., Path]:
    def copied(name: str, **options: Any) -> Path:
        folder = Path(shutil.copytree(tiny(name).bundle, tmp_path / name))
        add_engines(folder, **options)
        return folder

    return copied


@pytest.fixture
def small(with_engines: Callable[..., Path], driver: FakeDriver) -> Path:
    return with_engines("clip-llama", capacity=256)


def _fits(vlm: VLM, pictures: list[Any]) -> bool:
    try:
        vlm.stream("What changed?", images=pictures).close()
    except CapacityError:
        return False
    return True


def same(vlm: VLM, cpu: VLM, atol: float, **asked: Any) -> None:
    got, seen = logits_of(vlm, max_new_tokens=TOKENS, **asked)
    expected, wanted = logits_of(cpu, max_new_tokens=TOKENS, **asked)
    assert got.timings.reused_tokens == expected.timings.reused_tokens
    np.testing.assert_allclose(seen[0], wanted[0], atol=atol, rtol=atol)
    if atol < 1e-3:
        assert got.tokens == expected.tokens


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "two-caches"])
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_the_cpu(
    name: str, in_place: bool, with_engines: Callable[..., Path], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "CHUNK", 16)  # several chunks, of which the last is not full
    folder = with_engines(name, in_place=in_place)
    with load(folder, backend="tensorrt", capacity=128) as vlm:
        cpu = load(folder, backend="cpu", capacity=128)
        assert {choice.chosen for choice in vlm.backends.values()} == {"tensorrt"}
        (device,) = driver.devices
        same(vlm, cpu, 1e-4, prompt="How many cubes are there?", images=[A])
        assert device.launches > 0  # the steps of an answer are one graph, or two where caches swap
        assert device.captures <= (1 if in_place else 2)
        same(vlm, cpu, 1e-4, prompt="How many red cubes?", images=[A])
        same(vlm, cpu, 1e-4, prompt="What is it?", images=[B])
        if vlm._family.PICTURES[1] != 1 and _fits(vlm, [A, B]):
            same(vlm, cpu, 1e-4, prompt="What changed?", images=[A, B])
        if vlm._family.PICTURES[0] == 0:
            same(vlm, cpu, 1e-4, prompt="Is there a cube in the world, and if so, what colour does it have?")
    assert device.used == 0
    assert device.closed


def test_half_precision_is_half_precision(with_engines: Callable[..., Path], driver: FakeDriver) -> None:
    folder = with_engines("clip-llama", precision="fp16", capacity=128)
    vlm, cpu = load(folder, backend="tensorrt", capacity=100), load(folder, backend="cpu", capacity=100)
    same(vlm, cpu, 5e-2, prompt="How many cubes are there?", images=[A])
    assert vlm._sessions["decoder"].dtype("past_key_values.0.key") == "float16"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["clip-llama", "internvl-qwen2", "qwen2.5-vl-windows", "blip2-opt-350m"])
def test_features_stay_on_the_device(name: str, with_engines: Callable[..., Path], driver: FakeDriver) -> None:
    vlm = load(with_engines(name), backend="tensorrt")
    (device,) = driver.devices
    device.downloads.clear()
    vlm.generate("How many cubes?", images=[A], max_new_tokens=TOKENS)
    logits = vlm.bundle.manifest.parts["decoder"].outputs["logits"].shape[2]
    assert device.downloads == [4 * logits] * TOKENS  # type: ignore[operator]


def test_each_part_goes_its_own_way(small: Path, driver: FakeDriver) -> None:
    for backend in ({"decoder": "cpu"}, {"vision_encoder": "cpu", "decoder": "tensorrt"}, "projector=cpu"):
        vlm = load(small, backend=backend, capacity=100)
        chosen = {part: choice.chosen for part, choice in vlm.backends.items()}
        asked = dict(pair.split("=") for pair in backend.split(",")) if isinstance(backend, str) else backend
        assert chosen == {part: asked.get(part, "tensorrt") for part in chosen}
        same(vlm, load(small, backend="cpu", capacity=100), 1e-4, prompt="How many cubes are there?", images=[A])


# ---------------------------------------------------------------------------------------------- reasons


def reason(folder: Path, part: str = "decoder", **options: Any) -> str:
    vlm = load(folder, **options)
    choice = vlm.backends[part]
    assert choice.tried == ("tensorrt", "cuda", "cpu")
    said = choice.reasons["tensorrt"]
    with pytest.raises(InputError) as caught:
        load(folder, backend={part: "tensorrt"}, **options)
    assert said in str(caught.value)
    assert f"No backend can run the part {part} here. tensorrt: " in str(caught.value)
    return said


def test_doctor_says_what_it_would_run_on(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BACKENDS", runtimes.BACKENDS)
    (found,) = [finding for finding in doctor.examine() if finding.what == "backend tensorrt"]
    assert found.ok
    assert found.found.startswith("usable: tensorrt-rtx 1.7.1.116 on Fake GeForce (sm89); KV cache in")
    driver.found = "TensorRT-RTX is not installed."
    (found,) = [finding for finding in doctor.examine() if finding.what == "backend tensorrt"]
    assert found.ok is None
    assert found.found.startswith("not usable: TensorRT-RTX is not installed.")


def test_driver_missing(small: Path, driver: FakeDriver) -> None:
    driver.reason = "there is no NVIDIA GPU here, or no driver for it"
    assert reason(small) == driver.reason


def test_module_missing(small: Path, driver: FakeDriver) -> None:
    driver.found = "TensorRT-RTX is not installed. `pip install 'edgevlm[tensorrt-rtx]'` brings it."
    assert reason(small) == driver.found


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"capability": "sm120"}, "rtx-4090: built for sm89; this GPU is sm120"),
        ({"version": "1.8.0.1"}, "rtx-4090: built with tensorrt-rtx 1.7.1.116; here is 1.8.0.1"),
        ({"flavour": "tensorrt"}, "rtx-4090: built with tensorrt-rtx; here is tensorrt"),
    ],
)
def test_engine_of_another_machine(facts: dict[str, str], said: str, small: Path, driver: FakeDriver) -> None:
    driver.found = changed_host(**facts)
    assert reason(small) == said


def test_no_engine(bundle: Path, driver: FakeDriver) -> None:
    assert reason(bundle) == "no engine was built for the part decoder (`edgevlm build`)"


def test_capacity_too_small(small: Path, driver: FakeDriver) -> None:
    assert reason(small, capacity=300) == (
        "rtx-4090: its KV cache has 256 positions; 300 were asked for (capacity=256 bounds it)"
    )
    vlm = load(small, capacity=300)
    assert {part: choice.chosen for part, choice in vlm.backends.items()} == {
        part: "cpu" if part == "decoder" else "tensorrt" for part in vlm.backends
    }


def test_pictures_too_large(with_engines: Callable[..., Path], driver: FakeDriver) -> None:
    folder = with_engines("qwen2-vl", visual_tokens=8)
    said = reason(folder, "vision_encoder")
    assert said.startswith("rtx-4090: built for pictures of up to 8 visual tokens; here they may take ")
    assert said.endswith("(visual_tokens=8 bounds them)")
    vlm = load(folder, backend="tensorrt", visual_tokens=8)
    same(vlm, load(folder, backend="cpu", visual_tokens=8), 1e-4, prompt="What is it?", images=[picture(1, 300, 200)])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "is truncated or replaced"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "is damaged: its sha256"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["truncated", "flipped", "missing"],
)
def test_damaged_plan(damage: Callable[[Path], Any], said: str, small: Path, driver: FakeDriver) -> None:
    damage(small / "engines" / "rtx-4090" / "decoder.plan")
    assert said in reason(small, capacity=100)


def test_out_of_memory_at_load(small: Path, driver: FakeDriver) -> None:
    driver.memory_size = 100
    assert "The GPU's memory is full" in reason(small, capacity=100)


def test_no_room_for_the_cache_at_load(small: Path, driver: FakeDriver) -> None:
    probe = load(small, capacity=100, backend={"decoder": "cpu"})
    driver.memory_size = driver.devices[-1].used + 200_000  # the decoder's plan, and not its cache
    probe.close()
    said = reason(small, capacity=100)
    assert said.startswith("rtx-4090: the KV cache of 256 positions takes 0.00 GB of the GPU's memory, and")
    vlm = load(small, capacity=100)
    assert {part for part, choice in vlm.backends.items() if choice.chosen == "cpu"} == {"decoder"}
    assert vlm.generate("How many?", images=[A], max_new_tokens=2).tokens


def test_a_backend_or_part_that_there_is_not(small: Path, driver: FakeDriver) -> None:
    with pytest.raises(InputError, match="no backend 'tpu'; there are tensorrt, cuda, cpu, and auto"):
        load(small, backend={"decoder": "tpu"})
    with pytest.raises(InputError, match=r"for the part 'encoder'; there are .*vision_encoder"):
        load(small, backend="encoder=cpu")


def test_the_command_line_says_why(small: Path, driver: FakeDriver, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    A.save(tmp_path / "a.png")
    driver.found = changed_host(capability="sm120")
    asked = ["run", str(small), "--image", str(tmp_path / "a.png"), "--prompt", "What?", "--max-new-tokens", "2"]
    assert main(asked) == 0
    said = capsys.readouterr().err
    assert "cpu: " in said
    assert "not on tensorrt: rtx-4090: built for sm89; this GPU is sm120" in said
    driver.found = {HOST.flavour: HOST}
    assert main([*asked, "--backend", "decoder=cpu", "--capacity", "100"]) == 0
    said = capsys.readouterr().err
    assert "tensorrt: " in said
    assert "cpu: decoder" in said
    assert main([*asked, "--backend", "tensorrt", "--capacity", "400"]) == 2


# ---------------------------------------------------------------------------------------------- failures


def test_out_of_memory_in_the_middle(small: Path, driver: FakeDriver) -> None:
    vlm, cpu = load(small, backend="tensorrt", capacity=100), load(small, backend="cpu", capacity=100)
    (device,) = driver.devices
    vlm.generate("What?", images=[B], max_new_tokens=1)
    device.synchronize()
    driver.memory_size = device.used
    stream = vlm.stream("How many cubes are there?", images=[A])
    with pytest.raises(DeviceError, match=r"In the part vision_encoder: The GPU's memory is full") as caught:
        next(stream)
    assert not caught.value.lost
    assert stream.reply.finish_reason == "error"
    driver.memory_size = 1 << 32
    same(vlm, cpu, 1e-4, prompt="How many cubes are there?", images=[A])
    vlm.close()
    assert device.used == 0


@pytest.mark.parametrize("after", [1, 5, 40])
def test_lost_device(after: int, small: Path, driver: FakeDriver) -> None:
    vlm = load(small, backend="tensorrt", capacity=100)
    (device,) = driver.devices
    driver.lose_at = device.operations + after
    stream = vlm.stream("How many cubes are there?", images=[A])
    with pytest.raises(DeviceError, match="The GPU failed") as caught:
        list(stream)
    assert caught.value.lost
    with pytest.raises(DeviceError, match="Load it again"):
        vlm.generate("And now?")
    vlm.close()
    vlm.close()
    with pytest.raises(InputError, match="closed; load it again"):
        vlm.generate("And now?")
    assert device.used == 0


def test_a_graph_that_cannot_be_captured(small: Path, driver: FakeDriver) -> None:
    driver.no_graphs = True
    vlm, cpu = load(small, backend="tensorrt", capacity=100), load(small, backend="cpu", capacity=100)
    with pytest.warns(RuntimeWarning, match=r"part decoder runs without a CUDA graph, slower: This work cannot be captured"):
        same(vlm, cpu, 1e-4, prompt="How many cubes are there?", images=[A])
    assert driver.devices[0].captures == 1  # and then it is left alone


def test_what_the_profiles_do_not_take(small: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "CHUNK", 300)
    vlm = load(small, backend="tensorrt", capacity=256)
    with pytest.raises(CapacityError, match=r"The engine of the part vision_encoder takes 'pixel_values' from .* it was given"):
        vlm._run("vision_encoder", {"pixel_values": np.zeros((0, *vlm._pixels(A).shape[1:]), np.float32)})


def test_what_nobody_closes_is_closed_when_it_is_gone(small: Path, driver: FakeDriver) -> None:
    vlm = load(small, backend="tensorrt", capacity=100)
    vlm.generate("How many cubes?", images=[A], max_new_tokens=2)
    (device,) = driver.devices
    del vlm
    gc.collect()
    assert device.closed
    assert device.used == 0


def test_nothing_grows(small: Path, driver: FakeDriver) -> None:
    vlm = load(small, backend="tensorrt", capacity=100)
    (device,) = driver.devices
    used = []
    for number in range(30):
        vlm.generate("How many cubes?", images=[picture(number)], max_new_tokens=3)
        device.synchronize()
        used.append((device.used, len(device.live), len(device.pinned)))
    assert len(set(used[12:])) == 1


def test_frames_of_the_fake_are_checked() -> None:
    """The fake finds what it is there to find."""
    device = FakeDevice(FakeDriver())
    address = device.allocate(16)
    device.clear(address, 16)
    device.free(address)
    device.clear(address, 16)
    with pytest.raises(AssertionError, match="are not allocated"):
        device.synchronize()


# ------------------------------------------------------------------------------------- frames on the GPU


class OnGPU:
    """A frame in the memory of the stand-in, as cupy or PyTorch would hand it over."""

    def __init__(self, device: FakeDevice, array: np.ndarray) -> None:
        self.array = np.array(array, order="C")  # NumPy hands no read-only one over
        device.lend(self.array, self.array.ctypes.data, self.array.nbytes)


class ByInterface(OnGPU):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.array.shape, "typestr": self.array.dtype.str, "data": (self.array.ctypes.data, False), "version": 3
        }  # fmt: skip


class ByDLPack(OnGPU):
    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        assert stream is not None
        return self.array.__dlpack__()


@pytest.mark.parametrize("kind", [ByInterface, ByDLPack])
def test_frames_on_the_gpu(kind: type[OnGPU], small: Path, driver: FakeDriver) -> None:
    vlm, cpu = load(small, backend="tensorrt", capacity=100), load(small, backend="cpu", capacity=100)
    (device,) = driver.devices
    expected = cpu.generate("How many cubes?", images=[A], max_new_tokens=TOKENS)
    pixels = vlm._pixels(A)[0].astype(np.float32)
    device.uploads.clear()
    reply = vlm.generate("How many cubes?", images=[kind(device, pixels)], max_new_tokens=TOKENS)
    assert reply.tokens == expected.tokens
    assert max(device.uploads) < pixels.nbytes  # what there is are numbers and positions of tokens
    device.downloads.clear()
    reply = vlm.generate("How many cubes?", images=[kind(device, np.asarray(A))], max_new_tokens=TOKENS)
    assert reply.tokens == expected.tokens
    assert device.downloads[0] == A.width * A.height * 3  # once: it is resized on the host
    with pytest.raises(ImageError, match=r"float32 \[3, 7, 9\]; this model takes \[3, "):
        vlm.generate("What?", images=[kind(device, np.zeros((3, 7, 9), np.float32))])
    with pytest.raises(ImageError, match=r"is (float64|.*float64 \[3, 8, 8\])"):
        vlm.generate("What?", images=[kind(device, np.zeros((3, 8, 8)))])
    with pytest.raises(ImageError, match="no part of this model"):
        cpu.generate("What?", images=[kind(device, pixels)])


def test_frames_on_the_host_by_dlpack(bundle: Path) -> None:
    import torch

    vlm = load(bundle, backend="cpu")
    tensor = torch.from_numpy(np.array(A))
    one, other = (vlm.generate("How many cubes?", images=[image], max_new_tokens=TOKENS) for image in (tensor, A))
    assert one.tokens == other.tokens
    with pytest.raises(ImageError):
        vlm.generate("What?", images=[tensor.float()])
