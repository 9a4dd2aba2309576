"""Engines really built, without a GPU, for three generations of cards at once; and what ends a build."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from engine_parts import INT4

pytest.importorskip("tensorrt_rtx_bindings")
pytest.importorskip("torch")
import tensorrt_rtx_bindings as trt

from edgevlm.bundle import MANIFEST, Bundle
from edgevlm.cli import main
from edgevlm.demo import MODELS
from edgevlm.engines import build, record, tensorrt
from edgevlm.engines.build import Built, build_engines
from edgevlm.engines.plan import read_plan_header
from edgevlm.engines.record import Host, find_engine, read_records
from edgevlm.engines.target import LocalGPU
from edgevlm.errors import EngineError, InputError, MissingDependencyError, OutputError
from edgevlm.graphs import load_graph
from edgevlm.quant.quantize import quantize_bundle
from edgevlm.quant.recipe import Recipe, Rule

#: AWQ leaves weights in the same form as rounding does.
KINDS: dict[str, str | Recipe | None] = {"fp16": None, "int8": "int8", "int4": "int4-rtn"}
#: Ways that a family may be put together which no shipped model is.
VARIANTS = (
    "clip-mistral-window",
    "blip2-t5",
    "instructblip-llama",
    "flamingo-no-resampler",
    "qwen2.5-vl",
    "qwen3-vl",
)
CASES = [
    *(pytest.param(f"demo/{name}", recipe, id=f"demo-{name}-{kind}") for name in MODELS for kind, recipe in KINDS.items()),
    *(pytest.param(name, None, id=f"{name}-fp16") for name in VARIANTS),
    *(pytest.param(name, INT4, id=f"{name}-int4") for name in VARIANTS[1:]),
]
SMS = ("sm86", "sm89", "sm120")


def copied(source: Path, folder: Path, recipe: str | Recipe | None = None) -> Path:
    """Engines are written into a bundle, and those of the tests are shared. With a recipe, it is quantized on the way."""
    if recipe is not None:
        return quantize_bundle(source, folder / "bundle", recipe).folder
    return Path(shutil.copytree(source, folder / "bundle"))


def edited(bundle: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return bundle


def nodes(bundle: Bundle, part: str, op_type: str) -> list[ir.Node]:
    return [node for node in load_graph(bundle.part_path(part)).graph if node.op_type == op_type]


def by_part(built: list[Built]) -> dict[str, Built]:
    return {one.part: one for one in built}


@pytest.fixture
def small(tiny: Callable[[str], Any], tmp_path: Path) -> Path:
    """A float bundle to build into."""
    return copied(tiny("clip-llama").bundle, tmp_path)


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_every_part_of_every_family(
    name: str, recipe: str | Recipe | None, shipped: Callable[[str], Path], tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    source = shipped(name.removeprefix("demo/")) if name.startswith("demo/") else tiny(name).bundle
    folder = copied(source, tmp_path, recipe)
    built = by_part(build_engines(folder, "rtx", capacity=64))
    bundle = Bundle.open(folder)  # whose own files are as they were
    assert set(built) == set(bundle.manifest.parts)
    for part, one in built.items():
        header, found = read_plan_header(one.path), one.record
        assert (header.flavour, header.version) == ("tensorrt-rtx", trt.__version__)
        assert header.capabilities == found.key.capabilities == SMS
        assert header.size == found.size == one.path.stat().st_size
        attention = nodes(bundle, part, "Attention")
        assert found.layers["attention"] == len(attention)
        assert found.layers["masks"] == sum(len(n.inputs) > 3 and n.inputs[3] is not None for n in attention)
        assert found.layers["cache_updates"] == len(nodes(bundle, part, "TensorScatter"))
        assert found.layers["dequantized"] == len(nodes(bundle, part, "DequantizeLinear"))
        inputs = bundle.manifest.parts[part].inputs
        assert {n for n in found.dtypes if n in inputs} == {n for n, i in inputs.items() if i.dtype == "float32"}
        assert set(found.dtypes.values()) <= {"float16"}
        host = Host("tensorrt-rtx", trt.__version__, "sm120", "any")
        assert getattr(find_engine(bundle, part, host, capacity=64), "path", None) == one.path
    decoder, kv = built["decoder"].record, bundle.manifest.kv_cache
    assert [profile.name for profile in decoder.key.profiles] == ["prefill", "decode"]
    assert decoder.layers["cache_updates"] == 2 * kv.layers
    assert decoder.aliases == {
        f"present.{n}.{w}": f"past_key_values.{n}.{w}" for n in range(kv.layers) for w in ("key", "value")
    }


@pytest.mark.parametrize(("dtype", "precision"), [("fp32", "bf16"), ("fp32", "fp32"), ("fp16", "fp16"), ("fp16", "bf16")])
def test_precisions(dtype: str, precision: str, tiny: Callable[[str], Any], tmp_path: Path) -> None:
    folder = copied(tiny("clip-llama").export(dtype), tmp_path)
    built = by_part(build_engines(folder, "rtx-4090", precision=precision, capacity=40))
    said = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}[precision]
    same = {"fp32": "float32", "fp16": "float16"}[dtype] == said
    assert built["decoder"].record.dtypes.get("logits") == (None if same else said)
    assert built["decoder"].record.layers["cache_updates"] == 4


def test_turing_takes_an_engine_too(small: Path) -> None:
    (one,) = build_engines(small, "rtx-2080", parts=["projector"])
    assert read_plan_header(one.path).capabilities == ("sm75",)


def test_activations_in_eight_bits(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    from edgevlm.calibration import load_calibration

    recipe = Recipe("vision", (Rule("w8a8", parts="vision_encoder", weights="*mlp*"),))
    quantize_bundle(tiny("clip-llama").bundle, tmp_path / "bundle", recipe, calibration=load_calibration("scenes", samples=2))
    (one,) = build_engines(tmp_path / "bundle", "rtx", parts=["vision_encoder"])
    pairs = nodes(Bundle.open(tmp_path / "bundle"), "vision_encoder", "QuantizeLinear")
    assert len(pairs) > 0
    assert one.record.layers["dequantized"] == 2 * len(pairs)


# ------------------------------------------------------------------------------------- what is built again


def test_what_fits_is_left_alone(small: Path) -> None:
    said: list[str] = []
    first = by_part(build_engines(small, "rtx-4090", capacity=64, parts=["projector", "embed_tokens"], stage=said.append))
    assert said == [f"building {part} for rtx-4090 (not there yet)" for part in ("projector", "embed_tokens")]
    times = {part: one.path.stat().st_mtime_ns for part, one in first.items()}
    again = by_part(build_engines(small, "rtx-4090", capacity=64, parts=["projector", "embed_tokens"], stage=said.append))
    assert len(said) == 2
    assert {part: (one.why, one.path.stat().st_mtime_ns) for part, one in again.items()} == {
        p: ("", t) for p, t in times.items()
    }
    other = by_part(build_engines(small, "rtx-4090", capacity=32, precision="bf16", parts=["projector", "embed_tokens"]))
    assert other["embed_tokens"].why == "precision fp16 instead of bf16, other shapes"
    assert other["projector"].why == "precision fp16 instead of bf16"
    (asked,) = build_engines(small, "rtx-4090", capacity=32, precision="bf16", parts=["projector"], rebuild=True)
    assert asked.why == "asked for"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def _garbage(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


def _length(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[16] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (_truncate, "is truncated or replaced"),
    "flipped": (_flip, "is damaged: its sha256"),
    "garbage": (_garbage, "is no TensorRT plan: it begins with b'xxxx'"),
    "length": (_length, "the plan in it says"),
    "missing": (lambda path: path.unlink(), "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "is truncated or replaced: it has 0 bytes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plan_is_named_and_built_again(damage: str, small: Path) -> None:
    spoil, text = DAMAGES[damage]
    (one,) = build_engines(small, "rtx-4090", parts=["projector"])
    spoil(one.path)
    host = Host("tensorrt-rtx", trt.__version__, "sm89", "any")
    reason = find_engine(Bundle.open(small), "projector", host)
    assert isinstance(reason, str)
    assert text in reason
    (again,) = build_engines(small, "rtx-4090", parts=["projector"])
    assert text in again.why
    assert not isinstance(find_engine(Bundle.open(small), "projector", host), str)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"schema_version": 9, "parts": {}}', '{"schema_version": 1, "parts": {"a": 1}}']
)
def test_a_damaged_record_is_named_and_written_again(content: str, small: Path) -> None:
    (one,) = build_engines(small, "rtx-4090", parts=["projector"])
    (one.path.parent / "engine.json").write_text(content, encoding="utf-8")
    host = Host("tensorrt-rtx", trt.__version__, "sm89", "any")
    reason = find_engine(Bundle.open(small), "projector", host)
    assert isinstance(reason, str)
    assert "engine.json" in reason
    (again,) = build_engines(small, "rtx-4090", parts=["projector"])
    assert "engine.json" in again.why
    assert not isinstance(find_engine(Bundle.open(small), "projector", host), str)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"precision": "fp8"}, InputError, "There is no precision 'fp8'; there are fp16, bf16, fp32."),
        ({"capacity": 0}, InputError, "The capacity asked for is 0; it is 2 to"),
        ({"capacity": 1 << 20}, InputError, "this model's context length."),
        ({"visual_tokens": 3}, InputError, "a picture takes 16 in this model at least"),
        (
            {"parts": ["decoder", "resampler"]},
            InputError,
            "This bundle has no part resampler; it has vision_encoder, projector",
        ),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], error: type[Exception], text: str, small: Path) -> None:
    with pytest.raises(error) as caught:
        build_engines(small, "rtx-4090", **options)
    assert text in str(caught.value)
    assert not (small / "engines").exists()


def test_parts_of_onnx_runtime_alone(small: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["parts"]["decoder"]["onnxruntime_only"] = ["com.microsoft::MatMulBnb4"]

    with pytest.raises(EngineError, match=r"in decoder \(com.microsoft::MatMulBnb4\).*--parts vision_encoder,projector,embed"):
        build_engines(edited(small, change), "rtx-4090")
    (one,) = build_engines(small, "rtx-4090", parts=["projector"])
    assert one.path.is_file()


def test_blocks_that_are_not_all_full(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """TensorRT takes the size of a block from the shapes, and would compute something else."""
    folder = copied(tiny("blip2-opt").bundle, tmp_path, "int4-rtn")
    with pytest.raises(EngineError, match=r"decoder \(blocks that are not all full\).*blocks that divide the inputs"):
        build_engines(folder, "rtx-4090")


def test_a_cache_in_int8(small: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for tensors in (manifest["parts"]["decoder"][k] for k in ("inputs", "outputs")):
            for name in tensors:
                if name.startswith(("past", "present")):
                    tensors[name]["dtype"] = "int8"

    with pytest.raises(EngineError, match=r"The part decoder keeps its KV cache in int8.*--kv-cache float"):
        build_engines(edited(small, change), "rtx-4090")


def test_memory_is_predicted_first(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "available_memory", lambda: 100_000_000)
    with pytest.raises(OutputError, match=r"Building the part projector takes about 0.3 GB.* 0.1 GB are available.*--force"):
        build_engines(small, "rtx-4090", parts=["projector"])
    assert not (small / "engines").exists()
    assert len(build_engines(small, "rtx-4090", parts=["projector"], force=True)) == 1


@pytest.mark.parametrize("where", ["save_graph", "write_records"])
def test_a_full_disk(where: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (before,) = build_engines(small, "rtx-4090", parts=["projector"])
    content = (before.path.parent / "engine.json").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, where, full)
    with pytest.raises(OutputError, match=r"The disk is full: building the part embed_tokens stopped with [\d,]+ MB free"):
        build_engines(small, "rtx-4090", parts=["projector", "embed_tokens"])
    assert (before.path.parent / "engine.json").read_bytes() == content
    hidden = [p.name for p in (small / "engines").rglob("*") if p.name.startswith(".")]
    assert hidden == []
    host = Host("tensorrt-rtx", trt.__version__, "sm89", "any")
    assert isinstance(find_engine(Bundle.open(small), "embed_tokens", host), str)
    assert not isinstance(find_engine(Bundle.open(small), "projector", host), str)


@pytest.mark.parametrize("signalled", [True, False])
def test_an_interrupt_ends_the_build_and_leaves_nothing(signalled: bool, small: Path) -> None:
    """Of the part that was being built; TensorRT calls from another thread, where Python raises nothing."""
    build_engines(small, "rtx-4090", parts=["projector"])
    threads = []

    def interrupt(share: float, what: str) -> None:
        assert 0 <= share <= 1
        threads.append(threading.current_thread())
        if not signalled:
            raise KeyboardInterrupt
        if len(threads) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_engines(small, "rtx-4090", parts=["projector", "vision_encoder"], progress=interrupt)
    assert threads
    assert threading.main_thread() not in threads
    assert sorted(p.name for p in (small / "engines").rglob("*")) == ["engine.json", "projector.plan", "rtx-4090"]
    assert set(read_records(small / "engines" / "rtx-4090")) == {"projector"}
    (one,) = build_engines(small, "rtx-4090", parts=["vision_encoder"])
    assert one.why == "not there yet"


def test_a_capability_that_tensorrt_rtx_refuses(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevlm.engines.target import BuildTarget

    monkeypatch.setattr(build, "build_target", lambda _: BuildTarget("h200", "tensorrt-rtx", ("sm90",)))
    with pytest.raises(EngineError, match=r"builds nothing for sm90; it builds for sm75, sm80, sm86, sm89, sm120, sm121\."):
        build_engines(small, "h200", parts=["projector"])


def test_what_tensorrt_says_reaches_the_user(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="the_node")], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("q", TensorProto.UINT8, [2])],
    )  # fmt: skip
    (tmp_path / "x.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(EngineError, match=r"cannot read the part decoder: DynamicQuantizeLinear 'the_node': "):
        tensorrt.open_tensorrt("tensorrt-rtx").parse(tmp_path / "x.onnx", "decoder")


# --------------------------------------------------------------------------------------- classic TensorRT


class _Classic(tensorrt.TensorRT):
    """TensorRT-RTX behind the name and version of classic TensorRT, which cannot be installed everywhere."""

    def _set_capabilities(self, config: Any, capabilities: Any) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)

    def _set_timing_cache(self, config: Any, content: bytes) -> Any:
        return None  # needs a GPU


@pytest.mark.parametrize(("version", "lowered"), [("10.3.0.30", True), ("10.13.3.9", True), ("10.15.1.29", False)])
def test_the_form_of_classic_tensorrt(
    version: str, lowered: bool, tiny: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "open_tensorrt", lambda _: _Classic("tensorrt", trt, version))
    monkeypatch.setattr(build, "_check_header", lambda *_: None)
    monkeypatch.setattr("edgevlm.engines.target.local_gpu", lambda: LocalGPU("Orin", "sm87"))
    folder = copied(tiny("clip-llama").bundle, tmp_path, INT4)
    (one,) = build_engines(folder, "orin-nano-8gb", capacity=48, parts=["decoder"])
    key = one.record.key
    assert (key.flavour, key.version, key.device, key.capabilities) == ("tensorrt", version, "Orin", ("sm87",))
    assert ("lowered" in key.flags) == lowered
    assert one.record.layers["cache_updates"] == (0 if lowered else 4)
    assert bool(one.record.aliases) != lowered


def test_a_jetson_target_elsewhere(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.engines.target.local_gpu", lambda: LocalGPU("NVIDIA RTX 4090", "sm89"))
    with pytest.raises(EngineError, match=r"orin-nx-16gb is sm87, the GPU here is NVIDIA RTX 4090 \(sm89\).*the device itself"):
        build_engines(small, "orin-nx-16gb")


@pytest.mark.parametrize("jetson", [True, False])
def test_classic_tensorrt_is_missing(jetson: bool, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(tensorrt.FLAVOURS, "tensorrt", ("no_such_module",))
    monkeypatch.setattr(tensorrt, "_JETSON", tmp_path if not jetson else Path(__file__))
    tensorrt.open_tensorrt.cache_clear()
    with pytest.raises(MissingDependencyError) as caught:
        build_engines(small, "orin-nano-8gb")
    assert ("sudo apt install python3-libnvinfer" in str(caught.value)) == jetson
    assert ("pip install tensorrt" in str(caught.value)) != jetson
    monkeypatch.setitem(tensorrt.FLAVOURS, "tensorrt-rtx", ("no_such_module",))
    with pytest.raises(MissingDependencyError, match=r"pip install 'edgevlm\[tensorrt-rtx\]'"):
        build_engines(small, "rtx-4090")
    tensorrt.open_tensorrt.cache_clear()


# ------------------------------------------------------------------------------------------ command line


def test_the_command(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", str(small), "--target", "rtx-4090", "--parts", "projector,embed_tokens", "--capacity", "64"]
    assert main(command) == 0
    out = capsys.readouterr()
    assert "built: not there yet" in out.out
    assert "building projector for rtx-4090 (not there yet) …" in out.err
    assert main(command) == 0
    out = capsys.readouterr()
    assert out.out.count("up to date") == 2
    assert out.err == ""
    assert main(["build", str(small), "--target", "rtx-4099"]) == 2
    assert "The target 'rtx-4099' is not known. Did you mean rtx-4090" in capsys.readouterr().err


def test_the_record_says_all_that_decides(small: Path) -> None:
    (one,) = build_engines(small, "rtx-4090", parts=["projector"])
    stored = json.loads((one.path.parent / "engine.json").read_text(encoding="utf-8"))["parts"]["projector"]
    assert set(stored["key"]) == {
        "graph", "weights", "flavour", "version", "capabilities", "device", "precision", "profiles", "flags", "form",
    }  # fmt: skip
    files = Bundle.open(small).manifest.files
    assert stored["key"]["graph"] == files["onnx/projector.onnx"].sha256
    assert stored["key"]["weights"] == files["onnx/projector.onnx_data"].sha256
    assert record.read_records(one.path.parent)["projector"] == one.record
