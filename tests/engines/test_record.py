"""Which engine a machine may load, and the reason for each that it may not. Neither TensorRT nor a GPU is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")  # makes the bundle
from fake_gpu import plan_bytes

from edgevlm.bundle import Bundle, sha256_of
from edgevlm.engines.plan import read_plan_header
from edgevlm.engines.profiles import Profile
from edgevlm.engines.record import (
    FORM,
    Engine,
    EngineKey,
    EngineRecord,
    Host,
    find_engine,
    part_hashes,
    read_records,
    write_records,
)
from edgevlm.errors import EngineError

HOST = Host("tensorrt-rtx", "1.7.1.116", "sm89", "NVIDIA GeForce RTX 4090")
SHAPES = {"past_key_values.0.key": ((1, 4, 64, 16),) * 3}


@pytest.fixture
def opened(bundle: Path, tmp_path: Path) -> Bundle:
    """A bundle beside an engine of its decoder, whose plan is a header alone."""
    found = Bundle.open(bundle, check_files=False)
    folder = tmp_path / "engines" / "rtx-4090"
    folder.mkdir(parents=True)
    (folder / "decoder.plan").write_bytes(plan_bytes())
    graph, weights = part_hashes(found, "decoder")
    key = EngineKey(graph, weights, HOST.flavour, HOST.version, ("sm86", "sm89"), "", "fp16", (Profile("prefill", SHAPES),))
    path = folder / "decoder.plan"
    record = EngineRecord(key, sha256_of(path), path.stat().st_size, 64, 16, {"logits": "float16"}, {}, {"layers": 3}, 1.5)
    write_records(folder, {"decoder": record})
    return replace(found, folder=tmp_path)


def changed(bundle: Bundle, target: str = "rtx-4090", **changes: Any) -> None:
    """The record of the decoder with other facts, of its key or of itself."""
    folder = bundle.folder / "engines" / target
    record = read_records(folder)["decoder"]
    own = {k: v for k, v in changes.items() if k in EngineRecord.__dataclass_fields__}
    key = {k: v for k, v in changes.items() if k not in own}
    write_records(folder, {"decoder": replace(record, key=replace(record.key, **key), **own)})


def test_what_fits_is_found(opened: Bundle) -> None:
    found = find_engine(opened, "decoder", HOST, capacity=64)
    assert isinstance(found, Engine)
    assert (found.target, found.part, found.record.key.precision) == ("rtx-4090", "decoder", "fp16")
    assert found.record.key.profiles == (Profile("prefill", SHAPES),)
    assert found == find_engine(opened, "decoder", HOST, target="rtx-4090")
    assert not (opened.folder / "engines" / "rtx-4090" / "engine.json.part").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"graph": "0" * 64}, "built from another graph of this part"),
        ({"weights": "0" * 64}, "built from other weights of this part"),
        ({"flavour": "tensorrt"}, "built with tensorrt; here is tensorrt-rtx"),
        ({"version": "1.6.0.1"}, "built with tensorrt-rtx 1.6.0.1; here is 1.7.1.116"),
        ({"capabilities": ("sm86", "sm120")}, "built for sm86+sm120; this GPU is sm89"),
        ({"device": "Orin"}, "tuned on Orin; this GPU is NVIDIA GeForce RTX 4090"),
        ({"form": FORM + 1}, f"built in form {FORM + 1}, this EdgeVLM reads form {FORM}"),
        ({"capacity": 32}, "its KV cache has 32 positions; 64 were asked for (capacity=32 bounds it)"),
        ({"size": 5}, "is truncated or replaced: it has 172 bytes, engine.json says 5"),
        ({"sha256": "0" * 64}, "is damaged: its sha256 is not the one in engine.json"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], reason: str, opened: Bundle) -> None:
    changed(opened, **changes)
    found = find_engine(opened, "decoder", HOST, capacity=64)
    assert isinstance(found, str)
    assert found.startswith("rtx-4090: ")
    assert reason in found


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (replace(HOST, capability="sm120"), "this GPU is sm120"),
        (replace(HOST, version="1.8.0.1"), "here is 1.8.0.1"),
        (replace(HOST, flavour="tensorrt"), "here is tensorrt"),
    ],
)
def test_other_machines(host: Host, reason: str, opened: Bundle) -> None:
    found = find_engine(opened, "decoder", host)
    assert isinstance(found, str)
    assert reason in found


def test_a_plan_of_another_version_under_the_same_record(opened: Bundle) -> None:
    path = opened.folder / "engines" / "rtx-4090" / "decoder.plan"
    path.write_bytes(plan_bytes(version=bytes((1, 8, 0, 1))))
    found = find_engine(opened, "decoder", HOST, check_files=False)
    assert isinstance(found, str)
    assert "is a plan of tensorrt-rtx 1.8.0.1, engine.json says tensorrt-rtx 1.7.1.116" in found


def test_one_of_several_targets(opened: Bundle) -> None:
    other = opened.folder / "engines" / "rtx-3090"
    other.mkdir()
    write_records(other, read_records(opened.folder / "engines" / "rtx-4090"))  # whose plan is missing
    found = find_engine(opened, "decoder", HOST)
    assert isinstance(found, Engine)
    assert found.target == "rtx-4090"
    changed(opened, version="1.6.0.1")
    reasons = find_engine(opened, "decoder", HOST)
    assert isinstance(reasons, str)
    assert "rtx-3090: " in reasons
    assert "decoder.plan is missing; rtx-4090: built with tensorrt-rtx 1.6.0.1" in reasons


def test_no_engine_at_all(opened: Bundle) -> None:
    assert find_engine(opened, "projector", HOST) == "no engine was built for the part projector (`edgevlm build`)"
    assert (
        find_engine(opened, "decoder", HOST, target="rtx-5090") == "no engine was built for the part decoder (`edgevlm build`)"
    )


@pytest.mark.parametrize("text", ["", "{}", "null", '{"schema_version": 1, "parts": {"decoder": {"key": 3}}}', "[" * 100_000])
def test_a_record_that_cannot_be_read(text: str, opened: Bundle) -> None:
    path = opened.folder / "engines" / "rtx-4090" / "engine.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EngineError, match=r"engine.json .*`edgevlm build` makes the engines again"):
        read_records(path.parent)
    found = find_engine(opened, "decoder", HOST)
    assert isinstance(found, str)
    assert "engine.json" in found


def test_the_differences_of_two_keys(opened: Bundle) -> None:
    key = read_records(opened.folder / "engines" / "rtx-4090")["decoder"].key
    other = replace(
        key, graph="x", weights="y", version="1.6", precision="bf16", profiles=(), capabilities=("sm120",), form=0, device="a"
    )
    assert other.differences(key) == [
        "the part's graph changed", "the part's weights changed", "version 1.7.1.116 instead of 1.6",
        "capabilities sm86+sm89 instead of sm120", "device none instead of a", "precision fp16 instead of bf16", "other shapes",
        "this EdgeVLM builds another form",
    ]  # fmt: skip
    assert key.differences(key) == []


# ------------------------------------------------------------------------------------------- plan headers


def test_a_header(tmp_path: Path) -> None:
    (tmp_path / "x.plan").write_bytes(plan_bytes(sms=b"sm120 sm86 "))
    header = read_plan_header(tmp_path / "x.plan")
    assert (header.flavour, header.version, header.capabilities) == ("tensorrt-rtx", "1.7.1.116", ("sm86", "sm120"))
    (tmp_path / "x.plan").write_bytes(b"ftrt" + bytes(60))
    header = read_plan_header(tmp_path / "x.plan")
    assert (header.flavour, header.version, header.size) == ("tensorrt", "", 64)


@pytest.mark.parametrize("content", [b"", b"vtrt", b"onnx" * 20, plan_bytes()[:-1], plan_bytes() + b"x"])
def test_what_is_no_whole_plan(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.plan").write_bytes(content)
    with pytest.raises(EngineError, match=r"is no TensorRT plan|the plan in it says"):
        read_plan_header(tmp_path / "x.plan")
    with pytest.raises(EngineError, match=r"cannot be read: No such file"):
        read_plan_header(tmp_path / "y.plan")


def test_the_robot_reads_records_without_the_workshop() -> None:
    script = "import sys, json, edgevlm.engines.record; print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert loaded & {"onnx", "onnx_ir", "ml_dtypes", "torch", "rich", "tensorrt_rtx_bindings"} == set()
