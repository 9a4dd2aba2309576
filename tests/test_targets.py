"""The list of devices: complete, dense, sourced; and what is said about one that is not there."""

from __future__ import annotations

import re

import pytest

from edgevlm.errors import InputError
from edgevlm.targets import DTYPES, KINDS, LOCAL, Target, find_target, load_targets, local_target

TARGETS = load_targets()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_a_target_is_whole(target: Target) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", target.id)
    assert target.kind in KINDS
    assert target.kind != LOCAL
    assert 0 < target.usable < target.memory
    assert target.usable_reason
    assert target.bandwidth is not None
    assert 30e9 < target.bandwidth < 2e12
    assert target.flops
    assert set(target.flops) <= set(DTYPES)
    assert re.fullmatch(r"\d+\.\d", target.compute_capability or "")
    assert target.tensorrt
    assert all(source.title and source.url.startswith("https://") and source.date >= "2018" for source in target.sources)
    assert target.sources
    # Narrower types are never slower, and nothing was taken from a sheet's sparse column for one type alone.
    order = [target.flops[dtype] for dtype in ("fp16", "fp8", "fp4") if dtype in target.flops]
    assert order == sorted(order)
    if {"fp16", "int8"} <= set(target.flops):
        assert target.flops["int8"] / target.flops["fp16"] == pytest.approx(2, rel=0.01) or target.kind == "desktop"


def test_the_devices_that_people_ask_for_are_there() -> None:
    wanted = {
        "orin-nano-8gb", "orin-nano-8gb-super", "orin-nx-8gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb", "agx-thor",
        "gb10", "rtx-2080-ti", "rtx-3060-12gb", "rtx-3090", "rtx-4060", "rtx-4090", "rtx-5090", "rtx-4090-laptop", "rtx-a6000",
        "rtx-6000-ada",
    }  # fmt: skip
    assert wanted <= set(TARGETS)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("rtx-4090", "fp16", 165.2), ("rtx-4090", "fp8", 330.3), ("rtx-4090", "int8", 660.6), ("rtx-5080", "fp4", 900.4),
        ("agx-orin-64gb", "int8", 85.2), ("orin-nano-8gb", "int8", 20.5), ("orin-nano-8gb-super", "int8", 33.4),
        ("agx-thor", "fp4", 1035), ("rtx-a400", "fp16", 10.85),
    ],
)  # fmt: skip
def test_peaks_are_dense(name: str, dtype: str, peak: float) -> None:
    assert TARGETS[name].flops[dtype] == pytest.approx(peak * 1e12, rel=0.005)


def test_jetsons_share_their_memory_and_name_their_jetpack() -> None:
    for target in TARGETS.values():
        assert target.unified_memory == (target.kind == "jetson" or target.id == "gb10")
        flavours = {version.flavour for version in target.tensorrt}
        assert flavours == {"tensorrt"} if target.kind == "jetson" else "tensorrt-rtx" in flavours
        assert all(version.jetpack for version in target.tensorrt if target.kind == "jetson")
    assert [v.version for v in TARGETS["orin-nx-16gb"].tensorrt] == ["10.3", "10.16"]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("orin-nano", "orin-nano-8gb"), ("RTX4090", "rtx-4090"), ("thor", "agx-thor"), ("rtx 4090", "rtx-4090")],
)
def test_an_unknown_target_names_the_nearest_and_all(asked: str, meant: str) -> None:
    with pytest.raises(InputError) as caught:
        find_target(asked)
    text = str(caught.value)
    assert text.startswith(f"The target {asked!r} is not known. Did you mean ")
    assert meant in text.partition("Known are")[0]
    assert "Known are local (this machine), orin-nano-4gb" in text


def test_nonsense_gets_the_list_without_a_guess() -> None:
    with pytest.raises(InputError, match=r"The target '§' is not known\. Known are local"):
        find_target("§")


def test_this_machine() -> None:
    target = find_target(LOCAL)
    assert target.kind == LOCAL
    assert 0 < target.usable <= target.memory
    assert target.bandwidth is None
    assert not target.runs_on_gpu
    measured = local_target(measure=True)
    assert measured.bandwidth is not None
    assert measured.bandwidth > 1e8
    assert measured.flops["fp32"] > 1e8


def test_the_list_is_in_the_package() -> None:
    from pathlib import Path

    import tomllib

    import edgevlm

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    data = project["tool"]["setuptools"]["package-data"]["edgevlm"]
    assert {"targets.toml", "plan/published.json"} <= set(data)
    assert (Path(edgevlm.__file__).parent / "targets.toml").is_file()
