"""Targets, limits and the shapes that engines are built for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edgevlm.bundle import Bundle, ImageTokens, TensorInfo
from edgevlm.engines import memory
from edgevlm.engines.build import _most_tokens
from edgevlm.engines.profiles import Limits, limits_for, profiles_for
from edgevlm.engines.target import LocalGPU, build_target, local_gpu
from edgevlm.errors import EngineError, InputError


def shapes(bundle: Bundle, part: str, limits: Limits) -> dict[str, dict[str, Any]]:
    manifest = bundle.manifest
    return {p.name: p.shapes for p in profiles_for(part, manifest.parts[part], manifest, limits)}


def opened(tiny: Callable[[str], Any], name: str) -> Bundle:
    return Bundle.open(tiny(name).bundle, check_files=False)


@pytest.mark.parametrize(("capacity", "chunk", "decode"), [(300, 256, 8), (64, 64, 8), (5, 5, 5), (2, 2, 2)])
def test_the_decoder_has_two_profiles(capacity: int, chunk: int, decode: int, tiny: Callable[[str], Any]) -> None:
    bundle = opened(tiny, "clip-llama-gqa-bias")
    found = shapes(bundle, "decoder", Limits(capacity, 16))
    assert list(found) == ["prefill", "decode"]
    assert found["prefill"]["inputs_embeds"] == ((1, 1, 64), (1, chunk, 64), (1, chunk, 64))
    assert found["decode"]["position_ids"] == ((1, 1), (1, 1), (1, decode))
    for profile in found.values():
        assert profile["past_key_values.1.value"] == ((1, 2, capacity, 16),) * 3


def test_tiles_are_a_batch_for_what_sees_the_picture_alone(tiny: Callable[[str], Any]) -> None:
    bundle = opened(tiny, "internvl-qwen2")
    places = bundle.manifest.image.places
    assert _most_tokens(bundle) == 13 * places
    limits = limits_for(bundle.manifest, most_tokens=13 * places)
    assert limits.visual_tokens == min(13 * places, limits.capacity)
    tiles = limits.visual_tokens // places
    assert shapes(bundle, "vision_encoder", limits)["all"]["pixel_values"][2][0] == tiles > 1
    assert shapes(bundle, "embed_tokens", limits)["all"]["input_ids"] == (
        (1, 1),
        (1, min(256, limits.capacity)),
        (1, limits.capacity),
    )
    few = limits_for(bundle.manifest, visual_tokens=3 * places + 1)
    assert shapes(bundle, "projector", few)["all"]["vision_features"][2][0] == 3


def test_pictures_of_any_size(tiny: Callable[[str], Any]) -> None:
    bundle = opened(tiny, "qwen2.5-vl-windows")
    limits = limits_for(bundle.manifest, visual_tokens=30)
    found = shapes(bundle, "vision_encoder", limits)["all"]
    side = bundle.manifest.patches.window
    assert found["pixel_values"][0][:2] == (1, 1)
    assert found["pixel_values"][2][:2] == (1, 30)
    assert found["window_index"][2][0] == -(-30 // side)
    # Every picture of so many places, however thin, has no more windows.
    windows = max(-(-rows // side) * -(-(30 // rows) // side) for rows in range(1, 31))
    assert windows <= found["window_index"][2][0]


def test_what_is_read_beside_the_text(tiny: Callable[[str], Any]) -> None:
    flamingo, t5 = opened(tiny, "flamingo"), opened(tiny, "blip2-t5")
    places = flamingo.manifest.cross_attention.places
    found = shapes(flamingo, "decoder", limits_for(flamingo.manifest, capacity=64))["prefill"]
    assert found["cross_attention_mask"] == ((1, 1, 1), (1, 64, places), (1, 64, 10 * places))
    found = shapes(t5, "decoder", limits_for(t5.manifest, capacity=64))["decode"]
    assert found["cross_key_values.0.key"][2][2] == 64
    assert shapes(t5, "text_encoder", limits_for(t5.manifest, capacity=64))["all"]["attention_mask"][2] == (1, 64)


def test_a_part_without_a_dynamic_dimension(tiny: Callable[[str], Any]) -> None:
    bundle = opened(tiny, "clip-llama")
    part = replace(bundle.manifest.parts["projector"], inputs={"x": TensorInfo("float32", (1, 4))})
    (profile,) = profiles_for("projector", part, bundle.manifest, Limits(64, 16))
    assert profile.shapes == {}
    part = replace(part, inputs={"x": TensorInfo("float32", ("moons", 4))})
    with pytest.raises(InputError, match=r"The input 'x' has the dynamic dimension 'moons', of which no size is known"):
        profiles_for("projector", part, bundle.manifest, Limits(64, 16))


@pytest.mark.parametrize("capacity", [0, 1, -5, 10**9, True, 2.5])
def test_odd_capacities(capacity: Any, tiny: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match=r"The capacity asked for is .*; it is 2 to "):
        limits_for(opened(tiny, "clip-llama").manifest, capacity=capacity)


@pytest.mark.parametrize("tokens", [0, -1, 15, True])
def test_odd_visual_tokens(tokens: Any, tiny: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match="The visual tokens asked for are"):
        limits_for(opened(tiny, "clip-llama").manifest, visual_tokens=tokens)


def test_a_picture_that_is_larger_than_the_cache(tiny: Callable[[str], Any]) -> None:
    manifest = opened(tiny, "qwen2-vl").manifest
    assert limits_for(manifest, capacity=20, most_tokens=16384).visual_tokens == 20
    assert limits_for(replace(manifest, image=ImageTokens("", -1, 0)), capacity=20).visual_tokens == 20


# ------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize(
    ("name", "flavour", "capabilities"),
    [
        ("rtx-2080", "tensorrt-rtx", ("sm75",)),
        ("rtx-3090", "tensorrt-rtx", ("sm86",)),
        ("rtx-6000-ada", "tensorrt-rtx", ("sm89",)),
        ("rtx-5070", "tensorrt-rtx", ("sm120",)),
        ("gb10", "tensorrt-rtx", ("sm121",)),
        ("rtx", "tensorrt-rtx", ("sm86", "sm89", "sm120")),
        ("agx-orin-64gb", "tensorrt", ("sm87",)),
        ("agx-thor", "tensorrt", ("sm110",)),
    ],
)
def test_targets(name: str, flavour: str, capabilities: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.engines.target.local_gpu", lambda: None)
    found = build_target(name)
    assert (found.name, found.flavour, found.capabilities, found.device) == (name, flavour, capabilities, "")


@pytest.mark.parametrize(("name", "near"), [("rtx4090", "rtx-4090"), ("orin-nano", "orin-nano-8gb"), ("RTX-3090", "rtx-3090")])
def test_a_name_that_is_nearly_one(name: str, near: str) -> None:
    with pytest.raises(InputError) as caught:
        build_target(name)
    assert near in str(caught.value).split("Known are ")[0]


@pytest.mark.parametrize("name", ["", "тостер", "../x", "rtx-9999/..", "local "])
def test_odd_names(name: str) -> None:
    with pytest.raises(InputError, match=r"is not known\..*Known are local \(this machine\), rtx, orin-nano-4gb"):
        build_target(name)


@pytest.mark.parametrize(
    ("capability", "flavour", "device"),
    [("sm89", "tensorrt-rtx", ""), ("sm87", "tensorrt", "a GPU"), ("sm90", "tensorrt", "a GPU")],
)
def test_this_machine(capability: str, flavour: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.engines.target.local_gpu", lambda: LocalGPU("a GPU", capability))
    found = build_target("local")
    assert (found.flavour, found.capabilities, found.device) == (flavour, (capability,), device)


def test_this_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert local_gpu() is None
    with pytest.raises(EngineError, match="The target local is this machine's own GPU, and there is none"):
        build_target("local")


def test_a_driver_that_lists_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: 100  # CUDA_ERROR_NO_DEVICE

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
    assert local_gpu() is None


# ------------------------------------------------------------------------------------------------- memory


def test_memory_follows_weights_and_precision(tiny: Callable[[str], Any]) -> None:
    part = replace(opened(tiny, "clip-llama").manifest.parts["decoder"], weights={"float32": 4_000_000_000})
    half, whole = (memory.predict_peak(part, precision) for precision in ("float16", "float32"))
    assert 7e9 < half < 8e9 < whole < 10e9
    codes = replace(part, weights={"int4": 500_000_000})
    assert memory.predict_peak(codes, "float16") == memory.predict_peak(codes, "float32") < 4e9


def test_available_memory_is_plausible() -> None:
    found = memory.available_memory()
    assert found is None or 0 < found < 1 << 50


def test_a_machine_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    assert memory.available_memory() is None
