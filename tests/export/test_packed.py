"""Checkpoints that AWQ, GPTQ and compressed-tensors tools have quantized: taken as they are, number by number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from packing import Layer, Layout, pack, pack_checkpoint, quantization_config, quantize
from traces import traced_once

pytest.importorskip("torch")
import onnx_ir as ir
from safetensors.numpy import load_file, save_file

from edgevlm import VLM
from edgevlm.bundle import Bundle
from edgevlm.cli import main
from edgevlm.errors import CheckpointError, EdgeVLMError, RecipeError, UnsupportedModelError, WeightsError
from edgevlm.export import packed as module
from edgevlm.export.checkpoint import open_checkpoint
from edgevlm.export.dequantize import write_dequantize
from edgevlm.export.export import export_bundle
from edgevlm.export.packed import PackedWeight, Quantization, find_quantization, split_packed
from edgevlm.export.weights import float_folder, open_source
from edgevlm.graphs import load_graph, part_record, save_graph
from edgevlm.kernels import SWITCH
from edgevlm.quant.quantize import quantize_bundle
from edgevlm.tensors import read_safetensors_index
from edgevlm.verify import verify_bundle

pytestmark = pytest.mark.usefixtures("traced_once")

AWQ, GPTQ, TENSORS = "awq", "gptq", "compressed-tensors"
LAYOUTS = [
    Layout(AWQ, "gemm"),
    Layout(AWQ, "gemm", group=0),
    Layout(AWQ, "gemm", group=32, symmetric=True),
    Layout(AWQ, "gemv", group=32),
    Layout(GPTQ, "gptq"),
    Layout(GPTQ, "gptq", symmetric=True, sorts=True),
    Layout(GPTQ, "gptq", sorts=True),
    Layout(GPTQ, "gptq", 8, symmetric=True),
    Layout(GPTQ, "gptq", 8, sorts=True),
    Layout(GPTQ, "gptq_v2", group=0),
    Layout(GPTQ, "gptq_v2", sorts=True, group=64),
    Layout(TENSORS, "pack-quantized"),
    Layout(TENSORS, "pack-quantized", symmetric=True, sorts=True),
    Layout(TENSORS, "pack-quantized", symmetric=True, group=0),
    Layout(TENSORS, "pack-quantized", 8),
    Layout(TENSORS, "int-quantized", 8, group=0, symmetric=True),
    Layout(TENSORS, "int-quantized", 8, group=0),
    Layout(TENSORS, "int-quantized", 8, symmetric=True),
]
NAMES = [f"{layout.method}-{layout.name}" for layout in LAYOUTS]


def random(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, inputs), np.float32)


def stored(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
    return read_safetensors_index(folder / "model.safetensors")


def read(folder: Path, layer: Layer, layout: Layout) -> PackedWeight:
    """The layer `a.b` as it is read from a file of its own."""
    entries = stored(folder, {f"a.b.{kind}": array for kind, array in pack(layer, layout).items()})
    quantization = find_quantization({"quantization_config": quantization_config(layout)}, "it")
    assert quantization is not None
    rest, packed = split_packed(quantization, entries, "it")
    assert not rest
    assert list(packed) == ["a.b.weight"]
    return packed["a.b.weight"]


def graph_with(packed: PackedWeight, dtype: ir.DataType = ir.DataType.FLOAT, readers: int = 1) -> ir.Model:
    """x `[rows, K]` times the weight, as often as asked."""
    outputs, inputs = packed.shape
    x = ir.Value(name="x", shape=ir.Shape(["rows", inputs]), type=ir.TensorType(dtype))
    weight = ir.Value(name="w", shape=ir.Shape([inputs, outputs]), type=ir.TensorType(dtype))
    nodes = [ir.Node("", "MatMul", [x, weight], name=f"product_{n}") for n in range(readers)]
    for number, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].shape = f"y{number}", ir.Shape(["rows", outputs])
        node.outputs[0].dtype = dtype
    graph = ir.Graph([x], [n.outputs[0] for n in nodes], nodes=nodes, opset_imports={"": 24}, name="g")
    write_dequantize(graph, weight, "w", packed, transposed=True)
    return ir.Model(graph, ir_version=11)


def weights_of(model: ir.Model, folder: Path) -> tuple[np.ndarray, set[str]]:
    """The weights `[N, K]` that the written graph computes with, in the order of its input, and the operators that run."""
    save_graph(model, folder / "part.onnx")
    onnx.checker.check_model(str(folder / "part.onnx"), full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    # 1: products in float32, not in eight bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(str(folder / "part.onnx"), options, providers=["CPUExecutionProvider"])
    x = model.graph.inputs[0]
    assert x.shape is not None
    (found, *_) = session.run(None, {"x": np.eye(x.shape[1], dtype=x.dtype.numpy())})  # type: ignore[union-attr, call-overload]
    return found.T, {node.op_type for node in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node}


# ----------------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_a_layer_means_what_its_format_says(layout: Layout, tmp_path: Path) -> None:
    layer = quantize(random(24, 96), layout)
    packed = read(tmp_path, layer, layout)
    assert (packed.shape, packed.bits, packed.order is not None) == ((24, 96), layout.bits, layout.sorts)
    assert np.array_equal(packed.dequantize(), layer.float32)
    found, operators = weights_of(graph_with(packed), tmp_path)
    assert np.array_equal(found, layer.float32)
    assert "MatMulNBits" in operators  # ONNX Runtime fuses it


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_outputs_of_a_layer_that_holds_several(layout: Layout, tmp_path: Path) -> None:
    layer = quantize(random(24, 96), layout)
    packed = read(tmp_path, layer, layout).rows(2, 3, 12)
    assert packed.shape == (6, 96)
    expected = layer.float32[[2, 3, 4, 14, 15, 16]]
    assert np.array_equal(packed.dequantize(), expected)
    assert np.array_equal(weights_of(graph_with(packed), tmp_path)[0], expected)


@pytest.mark.parametrize(
    ("inputs", "outputs", "group", "block"),
    [(64, 7, 64, 0), (60, 7, 20, 20), (192, 5, 96, 32), (100, 3, 32, 32), (1024, 2, 512, 128), (100, 5, 0, 0), (24, 9, 8, 8),
     (144, 3, 48, 16), (5, 1, 0, 0), (4, 3, 0, 0), (37, 3, 16, 16)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pack-quantized-sym", "pack-quantized", "int-quantized"])
def test_odd_sizes(kind: str, inputs: int, outputs: int, group: int, block: int, tmp_path: Path) -> None:
    name = kind.removesuffix("-sym")
    layout = Layout(TENSORS, name, 8 if name == "int-quantized" else 4, group, symmetric=kind != name)
    layer = quantize(random(outputs, inputs), layout)
    model = graph_with(read(tmp_path, layer, layout))
    node = next(n for n in model.graph if n.op_type == "DequantizeLinear")
    assert node.attributes.get_int("block_size", 0) == block
    assert np.array_equal(weights_of(model, tmp_path)[0], layer.float32)


@pytest.mark.parametrize(
    ("layout", "dtype", "reason"),
    [
        (Layout(AWQ, "gemm", symmetric=True), "INT4", ()),
        (Layout(AWQ, "gemm"), "UINT4", ("zero points of weights",)),
        (Layout(GPTQ, "gptq", 8, symmetric=True), "INT8", ()),
        (Layout(GPTQ, "gptq", 8), "UINT8", ("zero points of weights",)),
        (Layout(TENSORS, "pack-quantized", symmetric=True, group=40), "INT4", ("blocks that are not all full",)),
    ],
)
def test_zero_points_only_where_there_are_any(layout: Layout, dtype: str, reason: tuple[str, ...], tmp_path: Path) -> None:
    model = graph_with(read(tmp_path, quantize(random(16, 96), layout), layout))
    node = next(n for n in model.graph if n.op_type == "DequantizeLinear")
    assert [value.dtype.name for value in node.inputs] == [dtype, "FLOAT", dtype][: len(node.inputs)]  # type: ignore[union-attr]
    assert len(node.inputs) == 2 + dtype.startswith("U")
    assert part_record(model, "part.onnx").onnxruntime_only == reason


def test_half_precision_rounds_once(tmp_path: Path) -> None:
    layout = Layout(AWQ, "gemm")
    layer = quantize(random(16, 64), layout)
    model = graph_with(read(tmp_path, layer, layout), ir.DataType.FLOAT16)
    found, _ = weights_of(model, tmp_path)
    assert found.dtype == np.float16
    assert np.array_equal(found, layer.float32.astype(np.float16))
    assert np.array_equal(model.graph.initializers["w.scales"].const_value.numpy(), layer.scales)  # type: ignore[union-attr]


def test_scales_of_other_types(tmp_path: Path) -> None:
    layout = Layout(TENSORS, "pack-quantized", symmetric=True)
    layer = quantize(random(16, 64), layout)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        changed = Layer(layer.codes, layer.scales.astype(dtype), layer.zeros, layer.groups)
        assert np.array_equal(weights_of(graph_with(read(tmp_path, changed, layout)), tmp_path)[0], changed.float32)
    huge = Layer(layer.codes, np.full(layer.scales.shape, 1e6, np.float32), layer.zeros, layer.groups)
    with pytest.raises(WeightsError, match=r"scales of the quantized layer 'a\.b' have NaN or infinite values in float16"):
        save_graph(graph_with(read(tmp_path, huge, layout), ir.DataType.FLOAT16), tmp_path / "part.onnx")


def test_one_scale_for_all_outputs(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(-128, 128, (6, 32)).astype(np.int8)
    for shape in ((), (1,)):
        scale = np.full(shape, 0.25, np.float32)
        entries = stored(tmp_path, {"a.weight": codes, "a.weight_scale": scale, "b.weight": random(2, 3)})
        quantization = Quantization(TENSORS, {"format": "int-quantized"})
        rest, packed = split_packed(quantization, entries, "it")
        assert list(rest) == ["b.weight"]
        assert np.array_equal(weights_of(graph_with(packed["a.weight"]), tmp_path)[0], codes.astype(np.float32) / 4)


def test_zero_points_of_older_compressed_tensors_are_bytes(tmp_path: Path) -> None:
    layout = Layout(TENSORS, "pack-quantized")
    layer = quantize(random(16, 64), layout)
    tensors = pack(layer, layout) | {"weight_zero_point": (layer.zeros - 8).T.astype(np.int8)}
    entries = stored(tmp_path, {f"a.b.{kind}": array for kind, array in tensors.items()})
    _, packed = split_packed(Quantization(TENSORS, quantization_config(layout)), entries, "it")
    assert np.array_equal(packed["a.b.weight"].dequantize(), layer.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_of_gptq_that_wrap(bits: int, tmp_path: Path) -> None:
    """A zero point 0 is stored as −1: by AutoGPTQ in its own bits, by GPTQModel in the whole word, with a borrow."""
    layer = quantize(random(16, 32), Layout(GPTQ, "gptq", bits))
    zeros = np.random.default_rng(0).integers(0, 2**bits, layer.zeros.shape)
    zeros[:, [0, 3, 7]] = 0
    layer = Layer(layer.codes, layer.scales, zeros, layer.groups)
    layout = Layout(GPTQ, "gptq", bits)
    assert np.array_equal(read(tmp_path, layer, layout).dequantize(), layer.float32)
    ones = np.uint32(0x11111111 if bits == 4 else 0x01010101)
    words = (pack(layer, Layout(GPTQ, "gptq_v2", bits))["qzeros"].view(np.uint32) - ones).view(np.int32)
    entries = stored(tmp_path, {f"a.b.{kind}": a for kind, a in (pack(layer, layout) | {"qzeros": words}).items()})
    config = quantization_config(layout) | {"meta": {"quantizer": ["gptqmodel:4.0.0"]}}
    _, packed = split_packed(Quantization(GPTQ, config), entries, "it")
    assert np.array_equal(packed["a.b.weight"].dequantize(), layer.float32)


def test_layers_with_groups_and_bits_of_their_own(tmp_path: Path) -> None:
    one, two = Layout(GPTQ, "gptq"), Layout(GPTQ, "gptq", 8, 32)  # GPTQModel's `dynamic`
    layers = {"one": quantize(random(16, 64), one), "two": quantize(random(16, 64), two)}
    tensors = {f"{n}.{k}": a for n, layout in (("one", one), ("two", two)) for k, a in pack(layers[n], layout).items()}
    _, packed = split_packed(Quantization(GPTQ, quantization_config(one)), stored(tmp_path, tensors), "it")
    assert {n: (p.bits, p.group_size) for n, p in packed.items()} == {"one.weight": (4, 16), "two.weight": (8, 32)}
    for name, layer in layers.items():
        assert np.array_equal(packed[f"{name}.weight"].dequantize(), layer.float32)


def test_readers_in_one_order_share_a_gather(tmp_path: Path) -> None:
    layout = Layout(GPTQ, "gptq", sorts=True)
    packed = read(tmp_path, quantize(random(16, 64), layout), layout)
    model = graph_with(packed, readers=2)
    assert [n.op_type for n in model.graph].count("Gather") == 1
    assert [n.op_type for n in model.graph].count("DequantizeLinear") == 1
    save_graph(model, tmp_path / "part.onnx")
    session = ort.InferenceSession(tmp_path / "part.onnx", providers=["CPUExecutionProvider"])
    first, second = session.run(None, {"x": random(3, 64)})
    assert np.array_equal(first, second)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[8], LAYOUTS[12], LAYOUTS[3]], ids=lambda layout: layout.name)
def test_memory_is_bounded_and_changes_nothing(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = read(tmp_path, quantize(random(24, 96), layout), layout)
    save_graph(graph_with(packed), tmp_path / "whole.onnx")
    monkeypatch.setattr(module, "_AT_ONCE", 24 * 7)
    rows: list[int] = []

    def codes(numbers: np.ndarray) -> np.ndarray:
        rows.append(len(numbers))
        return packed.codes(numbers)

    counted = PackedWeight(**{**vars(packed), "codes": codes})
    save_graph(graph_with(counted), tmp_path / "pieces.onnx")
    assert max(rows) == 6  # an even number of rows
    assert sum(rows) == 96
    whole, pieces = ((tmp_path / f"{name}.onnx_data").read_bytes() for name in ("whole", "pieces"))
    assert whole == pieces


def test_only_linear_layers(tmp_path: Path) -> None:
    packed = read(tmp_path, quantize(random(16, 64), LAYOUTS[0]), LAYOUTS[0])
    table = ir.Value(name="w", shape=ir.Shape([16, 64]), type=ir.TensorType(ir.DataType.FLOAT))
    ids = ir.Value(name="ids", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
    node = ir.Node("", "Gather", [table, ids])
    graph = ir.Graph([ids], [node.outputs[0]], nodes=[node], opset_imports={"": 24})
    with pytest.raises(UnsupportedModelError, match=r"'embed\.weight' is quantized in the checkpoint, and read by Gather"):
        write_dequantize(graph, table, "embed.weight", packed, transposed=False)


# --------------------------------------------------------------------------------------- whole models


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with quantized weights in float32, not in eight bits: what is left is rounding."""
    add = ort.SessionOptions.add_session_config_entry

    def in_float(self: Any, key: str, value: str) -> Any:
        return add(self, key, "1" if "accuracy_level" in key else value)

    monkeypatch.setattr(ort.SessionOptions, "add_session_config_entry", in_float)
    monkeypatch.setenv(SWITCH, "0")


MODELS: list[tuple[str, Layout, Callable[[tuple[int, ...]], bool]]] = [
    ("clip-llama-gqa-bias", Layout(AWQ, "gemm"), lambda shape: shape[0] % 8 == 0),
    ("clip-qwen2-tied", Layout(GPTQ, "gptq", 8, sorts=True), lambda shape: True),
    ("odd-widths", Layout(TENSORS, "pack-quantized", group=20), lambda shape: True),
    ("qwen2-vl", Layout(GPTQ, "gptq", symmetric=True, sorts=True), lambda shape: shape[1] % 8 == 0),
    ("internvl-chat-internlm2", Layout(AWQ, "gemm", group=8), lambda shape: shape[0] % 8 == 0 and shape[1] % 8 == 0),
    ("qwen-vl", Layout(GPTQ, "gptq", symmetric=True), lambda shape: shape[0] % 8 == 0 and shape[1] % 16 == 0),
]


@pytest.mark.parametrize(("name", "layout", "fits"), MODELS, ids=[name for name, *_ in MODELS])
def test_a_model_answers_as_pytorch_with_the_same_weights(
    tiny: Callable[[str], Any], name: str, layout: Layout, fits: Any, tmp_path: Path, exact_products: None
) -> None:
    layers = pack_checkpoint(tiny(name).checkpoint, tmp_path / "packed", tmp_path / "plain", layout, fits=fits)
    if "chat" in name:  # as lmdeploy writes it: in the configuration of the language model
        config = json.loads((tmp_path / "packed" / "config.json").read_text())
        config["llm_config"]["quantization_config"] = config.pop("quantization_config")
        (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    bundle = export_bundle(str(tmp_path / "packed"), tmp_path / "bundle")
    nodes = [node for part in bundle.manifest.parts for node in load_graph(bundle.part_path(part)).graph]
    assert [node.op_type for node in nodes].count("DequantizeLinear") >= len(layers) > 8
    assert {node.domain for node in nodes} == {""}
    assert set(bundle.manifest.parts["embed_tokens"].weights) <= {"float32", "int64"}
    report = verify_bundle(bundle.folder, str(tmp_path / "plain"))
    assert not report.failures
    assert max(check.max_abs for check in report.parts) < 1e-4
    assert max(check.max_abs for check in report.sequences) < 1e-3
    assert all(check.same_tokens == check.tokens for check in report.sequences)


@pytest.fixture(scope="module")
def awq(tiny: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `packed`, a LLaVA as AutoAWQ writes it, `plain`, the same in float, and its `bundle`."""
    folder = tmp_path_factory.mktemp("awq")
    pack_checkpoint(tiny("clip-llama").checkpoint, folder / "packed", folder / "plain", Layout(AWQ, "gemm"))
    with traced_once():
        export_bundle(str(folder / "packed"), folder / "bundle")
    return folder


def test_initializers_are_the_checkpoints_numbers(awq: Path) -> None:
    graph = load_graph(awq / "bundle" / "onnx" / "decoder.onnx").graph
    plain = load_file(awq / "plain" / "model.safetensors")
    checked = 0
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        codes, scales, zeros = (value.const_value.numpy().astype(np.float32) for value in node.inputs)  # type: ignore[union-attr]
        size = node.attributes.get_int("block_size", 0)
        exact = (codes - zeros.repeat(size, 0)) * scales.repeat(size, 0)
        name = (node.outputs[0].name or "").removesuffix(".dequantized").replace("language_model.", "language_model.model.")
        assert np.array_equal(exact.T, plain[name])
        checked += 1
    assert checked == 14


def test_with_products_in_eight_bits_it_still_answers(awq: Path) -> None:
    report = verify_bundle(awq / "bundle", str(awq / "packed"))  # the reference gets the weights it stands for
    assert not report.failures
    assert report.kind == "int4"
    assert min(check.cosine for check in report.sequences) > 0.99
    vlm = VLM.load(awq / "bundle", capacity=256, threads=1)
    reply = vlm.generate("How many?", images=[np.zeros((20, 30, 3), np.uint8)], max_new_tokens=4)
    assert len(reply.tokens) == 4 or reply.finish_reason == "stop"


def test_the_manifest_says_where_it_comes_from(awq: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Bundle.open(awq / "bundle").manifest
    assert manifest.recipe is not None
    assert manifest.recipe["name"] == "checkpoint: awq"
    assert manifest.recipe["rules"] == []
    assert manifest.recipe["checkpoint"]["config"]["group_size"] == 16
    assert {n: p.onnxruntime_only for n, p in manifest.parts.items() if p.onnxruntime_only} == {
        "decoder": ("zero points of weights",)
    }
    assert main(["inspect", str(awq / "bundle")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "recipe checkpoint: awq" in said
    assert "not on TensorRT decoder (zero points of weights)" in said


def test_quantized_again(awq: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="already quantized with the recipe 'checkpoint: awq'"):
        quantize_bundle(awq / "bundle", tmp_path / "out", "int8")
    with pytest.raises(RecipeError, match=r"packed is already quantized \(awq\); its remaining float weights take"):
        export_bundle(str(awq / "packed"), tmp_path / "out", recipe="int4")
    bundle = export_bundle(str(awq / "packed"), tmp_path / "out", recipe="int8")
    assert bundle.manifest.recipe is not None
    assert bundle.manifest.recipe["name"] == "checkpoint: awq, then int8"
    assert bundle.manifest.recipe["checkpoint"]["method"] == "awq"
    assert {n: sorted(set(p.weights) - {"float32", "int64"}) for n, p in bundle.manifest.parts.items()} == {
        "vision_encoder": ["int8"], "projector": ["int8"], "embed_tokens": ["int8"], "decoder": ["int8", "uint4"],
    }  # fmt: skip
    before, after = (
        load_graph(folder / "onnx" / "decoder.onnx").graph.initializers for folder in (awq / "bundle", bundle.folder)
    )
    names = [name for name in before if name.endswith((".uint4", ".zero_points"))]
    assert len(names) == 28
    assert all(before[n].const_value.tobytes() == after[n].const_value.tobytes() for n in names)  # type: ignore[union-attr]


def test_float_folder_is_removed_and_holds_no_integers(awq: Path) -> None:
    checkpoint = open_checkpoint(str(awq / "packed"))
    with float_folder(checkpoint) as folder:
        config = json.loads((folder / "config.json").read_text())
        assert "quantization_config" not in config
        made, expected = (load_file(path / "model.safetensors") for path in (folder, awq / "plain"))
        assert made.keys() == expected.keys()
        assert all(np.array_equal(made[name], array) for name, array in expected.items())
        assert (folder / "tokenizer.json").is_file()
    assert not folder.exists()
    with float_folder(open_checkpoint(str(awq / "plain"))) as folder:
        assert folder == awq / "plain"


def test_older_files_beside_config_json(awq: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(awq / "packed", tmp_path / "older"))
    config = json.loads((checkpoint / "config.json").read_text())
    said = config.pop("quantization_config")
    (checkpoint / "config.json").write_text(json.dumps(config))
    text = refused(checkpoint)[1]
    assert "has no weight" in text
    older = {"zero_point": True, "q_group_size": said["group_size"], "w_bit": 4, "version": "GEMM"}
    (checkpoint / "quant_config.json").write_text(json.dumps(older))
    tensors = load_file(checkpoint / "model.safetensors")  # as AutoGPTQ writes it for layers that have no bias
    save_file(tensors | {f"{Q_PROJ}.bias": np.zeros(64, np.float16)}, checkpoint / "model.safetensors")
    bundle = export_bundle(str(checkpoint), tmp_path / "bundle")
    made, expected = (manifest.files for manifest in (bundle.manifest, Bundle.open(awq / "bundle").manifest))
    assert {n: f for n, f in made.items() if n != "config.json"} == {n: f for n, f in expected.items() if n != "config.json"}
    (checkpoint / "quant_config.json").write_text("{")
    assert refused(checkpoint)[0] is CheckpointError


def test_weights_and_activations_in_eight_bits_in_half_precision(
    tiny: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """W8A8: the weights are taken, and what the scheme does to activations is said to be left out."""
    layout = Layout(TENSORS, "int-quantized", 8, 0, True)
    pack_checkpoint(tiny("clip-llama").checkpoint, tmp_path / "packed", tmp_path / "plain", layout)
    edit(
        tmp_path / "packed", lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8, "dynamic": True})
    )
    bundle = export_bundle(str(tmp_path / "packed"), tmp_path / "bundle", dtype="fp16")
    weights = bundle.manifest.parts["decoder"].weights
    assert {"float16", "int8"} <= set(weights)
    assert weights.get("float32", 0) < 100  # rotary frequencies
    assert not verify_bundle(bundle.folder, str(tmp_path / "packed")).failures
    assert bundle.manifest.recipe is not None
    assert bundle.manifest.recipe["checkpoint"]["left_out"] == ["activations"]
    assert main(["inspect", str(bundle.folder)]) == 0
    assert "left float activations, which the checkpoint quantizes too" in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------------------------------- what is refused


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    change(config["quantization_config"])
    (checkpoint / "config.json").write_text(json.dumps(config))


def refused(checkpoint: Path) -> tuple[type[EdgeVLMError], str]:
    output = checkpoint.parent / "refused" / "bundle"
    with pytest.raises(EdgeVLMError) as caught:
        export_bundle(str(checkpoint), output)
    assert not output.parent.exists() or not list(output.parent.iterdir())
    return type(caught.value), str(caught.value)


@pytest.fixture
def broken(awq: Path, tmp_path: Path) -> Path:
    """A copy of the AWQ checkpoint, to be broken."""
    return Path(shutil.copytree(awq / "packed", tmp_path / "broken"))


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"already quantized (bitsandbytes). Taken as they are: awq"),
        ({"quant_method": "fp8"}, "already quantized (fp8)."),
        ({"quant_method": "hqq"}, "already quantized (hqq)."),
        ({"bits": 4}, "already quantized (an unknown method)"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "(awq) in the layout 'gemv_fast'"),
        ({"quant_method": "awq", "bits": 3}, "(awq) with 3 bits"),
        ({"quant_method": "gptq", "bits": 3}, "(gptq) with 3 bits"),
        ({"quant_method": "gptq", "bits": 2}, "(gptq) with 2 bits"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "(gptq) in the layout 'marlin'"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "(gptq) in the layout 'marlin'"),
        ({"quant_method": "gptq", "pack_dtype": "int8"}, "in words of int8"),
        ({"quant_method": "gptq", "rotation": "hadamard"}, "with rotation"),
        (
            {"quant_method": TENSORS, "config_groups": {"g": {"weights": {"type": "float", "num_bits": 8}}}},
            "(compressed-tensors) with float weights of 8 bits",
        ),
        ({"quant_method": TENSORS, "sparsity_config": {"format": "sparse-24-bitmask"}}, "and sparse (sparse-24-bitmask)"),
        ({"quant_method": TENSORS, "transform_config": {"config_groups": {"R1": {}}}}, "with transform_config"),
        ({"quant_method": TENSORS, "format": "marlin-24"}, "(compressed-tensors) in the layout 'marlin-24'"),
        ({"quant_method": TENSORS}, "no weight of it is stored so"),
    ],
)
def test_methods_that_are_not_known(broken: Path, said: dict[str, Any], found: str) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    kind, text = refused(broken)
    assert kind is UnsupportedModelError
    assert found in text
    assert "--quantize" in text


Q_PROJ = "language_model.model.layers.0.self_attn.q_proj"


def put(kind: str, array: np.ndarray) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({f"{Q_PROJ}.{kind}": array})


def drop(*kinds: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for kind in kinds:
            del tensors[f"{Q_PROJ}.{kind}"]

    return change


@pytest.mark.parametrize(
    ("change", "kind", "found"),
    [
        (drop("scales"), WeightsError, f"'{Q_PROJ}' has qweight, qzeros, but no scales"),
        (drop("qweight"), WeightsError, f"'{Q_PROJ}' has qzeros, scales, but no qweight"),
        (put("weight", np.ones((64, 64), np.float32)), WeightsError, "both qweight and a float weight"),
        (put("qweight", np.zeros((64, 8), np.int8)), UnsupportedModelError, "has qweight in I8; I32 can be read"),
        (put("scales", np.ones((4, 63), np.float16)), WeightsError, "scales of the shape [4, 63]; [4, 64] fits"),
        (put("qzeros", np.zeros((3, 8), np.int32)), WeightsError, "qzeros of the shape [3, 8]; [4, 8] fits"),
        (put("qweight", np.zeros((4, 8, 2), np.int32)), WeightsError, "qweight of the shape [4, 8, 2]; it is no matrix"),
        (put("qweight", np.zeros((81, 8), np.int32)), WeightsError, "has 81 inputs and scales for 4 groups"),
        (put("qweight", np.zeros((128, 8), np.int32)), WeightsError, "[128, 64]; config.json asks for [64, 64]"),
        (put("bias", np.ones(64, np.float16)), WeightsError, "a layer without one; they do not belong together"),
        (put("scales", np.full((4, 64), np.nan, np.float16)), WeightsError, "have NaN or infinite values"),
    ],
)
def test_layers_that_do_not_fit_together(
    broken: Path, change: Callable[[dict[str, np.ndarray]], object], kind: type[EdgeVLMError], found: str
) -> None:
    tensors = load_file(broken / "model.safetensors")
    change(tensors)
    save_file(tensors, broken / "model.safetensors")
    raised, text = refused(broken)
    assert raised is kind
    assert found in text


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (np.arange(64) // 16 % 2, "groups of inputs (weight_g_idx) of other sizes than 16"),
        (np.arange(60) // 16, "shape [60]; [64] fits"),
    ],
)
def test_groups_that_are_no_blocks(numbers: np.ndarray, said: str, tmp_path: Path) -> None:
    layout = Layout(TENSORS, "pack-quantized", sorts=True)
    layer = quantize(random(16, 64), layout)
    tensors = pack(layer, layout) | {"weight_g_idx": numbers.astype(np.int32)}
    entries = stored(tmp_path, {f"a.b.{kind}": array for kind, array in tensors.items()})
    with pytest.raises(WeightsError) as caught:
        split_packed(Quantization(TENSORS, quantization_config(layout)), entries, "it")
    assert said in str(caught.value)


def test_bits_that_are_seen_in_the_tensors_alone(tmp_path: Path) -> None:
    """compressed-tensors packs any number of bits; a layer of 3 of them has three words for 32 weights."""
    tensors = {
        "a.weight_packed": np.zeros((8, 6), np.int32), "a.weight_scale": np.ones((8, 1), np.float32),
        "a.weight_shape": np.array([8, 64]),
    }  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="layer 'a' has 3 bits a weight; taken are 4 and 8"):
        split_packed(Quantization(TENSORS, {}), stored(tmp_path, tensors), "it")


def test_only_float_weights_are_converted(awq: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"packed is already quantized \(awq\); only float weights are converted"):
        open_source(str(awq / "packed"), lambda _: None)
