"""Which products of a bundle's graphs become kernels."""

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgevlm import VLM
from edgevlm.kernels import SWITCH, unavailable
from edgevlm.kernels import graph as graphs
from edgevlm.kernels.graph import graph_with_kernels
from edgevlm.quant.quantize import quantize_bundle
from edgevlm.scenes import render_scene, sample_scene

needs_kernels = pytest.mark.skipif(unavailable() is not None, reason=f"no kernels: {unavailable()}")


@pytest.fixture(scope="module")
def quantized(shipped, tmp_path_factory: pytest.TempPathFactory):
    """The shipped LLaVA by recipe."""

    @functools.cache
    def made(recipe: str) -> Path:
        folder = tmp_path_factory.mktemp("quantized") / recipe
        quantize_bundle(shipped("llava"), folder, recipe)
        return folder

    return made


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("recipe", ["int4-rtn", "int8"])
def test_every_product_with_a_quantized_weight(quantized, recipe: str) -> None:
    bundle = quantized(recipe)
    for part, own in (("decoder", "MatMulInt4" if recipe == "int4-rtn" else "MatMulInt8"), ("vision_encoder", "MatMulInt8")):
        path = bundle / "onnx" / f"{part}.onnx"
        before = onnx.load(path, load_external_data=False)
        after = onnx.load_from_string(graph_with_kernels(path))
        assert operators(before).count("MatMul") == sum(name in ("MatMulInt4", "MatMulInt8") for name in operators(after))
        assert own in operators(after)
        assert "MatMul" not in operators(after)
        domains = {node.domain for node in after.graph.node if node.op_type == "Attention"}
        assert domains == {"edgevlm"}, "a bool mask, or none"
        assert [value.name for value in after.graph.output] == [value.name for value in before.graph.output]
        assert {entry.domain for entry in after.opset_import} == {"", "edgevlm"}
        made = {name for node in after.graph.node for name in node.output} | {v.name for v in after.graph.input}
        made |= {tensor.name for tensor in after.graph.initializer}
        assert {name for node in after.graph.node for name in node.input if name} <= made


def test_a_float_graph_and_what_is_none(shipped, tmp_path: Path) -> None:
    assert graph_with_kernels(shipped("llava") / "onnx" / "decoder.onnx") is None
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    assert graph_with_kernels(tmp_path / "broken.onnx") is None


def graph_file(folder: Path, *, axis: int = 1, quantized_input: bool = False, twice: bool = False, depth: int = 64) -> Path:
    """A product with an INT8 weight in a file of its own."""
    weight = np.ones((depth, 64), np.int8)
    (folder / "data").write_bytes(weight.tobytes())
    tensor = TensorProto(name="W", data_type=TensorProto.INT8, dims=weight.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="data")
    scales = helper.make_tensor("S", TensorProto.FLOAT, [weight.shape[axis]], np.ones(weight.shape[axis], np.float32))
    nodes = [helper.make_node("DequantizeLinear", ["W", "S"], ["D"], axis=axis)]
    left = "X"
    if quantized_input:
        nodes += [
            helper.make_node("QuantizeLinear", ["X", "s"], ["Q"]),
            helper.make_node("DequantizeLinear", ["Q", "s"], ["XD"]),
        ]
        left = "XD"
    nodes += [helper.make_node("MatMul", [left, "D"], ["Y"])] + [helper.make_node("Neg", ["D"], ["Z"])] * twice
    names = ["Y", "Z"] if twice else ["Y"]
    one = helper.make_tensor("s", TensorProto.FLOAT, [], [1.0])
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("X", TensorProto.FLOAT, [1, depth])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names], [tensor, scales, one],
    )  # fmt: skip
    path = folder / "graph.onnx"
    path.write_bytes(helper.make_model(graph, ir_version=10).SerializeToString())
    return path


def test_what_stays(tmp_path: Path) -> None:
    assert graph_with_kernels(graph_file(tmp_path)) is not None
    assert graph_with_kernels(graph_file(tmp_path, axis=0)) is None, "scales along the inputs"
    assert graph_with_kernels(graph_file(tmp_path, quantized_input=True)) is None, "integers on both sides"
    assert graph_with_kernels(graph_file(tmp_path, twice=True)) is None, "a weight that something else reads"
    assert graph_with_kernels(graph_file(tmp_path, depth=62)) is None, "rows that are not in fours"


@needs_kernels
@pytest.mark.parametrize("recipe", ["int4-rtn", "int8"])
def test_answers_stay(quantized, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    bundle = quantized(recipe)
    with VLM.load(bundle) as own:
        monkeypatch.setenv(SWITCH, "0")
        with VLM.load(bundle) as other:
            for number in range(6):
                picture = render_scene(sample_scene(11_960_000 + number))
                answers = [vlm.generate("Describe the scene.", images=[picture]).text for vlm in (own, other)]
                assert answers[0] == answers[1]


@needs_kernels
def test_pieces_of_attention_become_one(shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower for pictures of any size attends piece by piece."""
    bundle = tmp_path / "qwen2-vl"
    quantize_bundle(shipped("qwen2-vl"), bundle, "int4-rtn")
    path = bundle / "onnx" / "vision_encoder.onnx"
    before = onnx.load(path, load_external_data=False)
    after = onnx.load_from_string(graph_with_kernels(path) or b"")
    layers = operators(before).count("RotaryEmbedding") // 2
    assert operators(before).count("Attention") == 8 * layers
    assert [node.domain for node in after.graph.node if node.op_type == "Attention"] == ["edgevlm"] * layers
    picture = render_scene(sample_scene(11_960_100)).resize((301, 187))
    answers = []
    for pieces in (True, False):
        if pieces:
            monkeypatch.setattr(graphs, "_merge_attention", lambda *_: [])
        else:
            monkeypatch.undo()
        with VLM.load(bundle) as vlm:
            answers.append(vlm.generate("Describe the scene.", images=[picture]))
    assert answers[0].tokens == answers[1].tokens


def test_attention_with_another_mask_stays(tmp_path: Path) -> None:
    """A mask of numbers is added to scores, which our operator does not do."""
    path = graph_file(tmp_path)
    model = onnx.load(path, load_external_data=False)
    for name, kind in (("q", TensorProto.FLOAT), ("m", TensorProto.FLOAT), ("b", TensorProto.BOOL)):
        model.graph.input.append(helper.make_tensor_value_info(name, kind, [1, 1, 4, 4]))
    model.graph.node.extend(
        [
            helper.make_node("Unsqueeze", ["b", "axis"], ["c"]),
            helper.make_node("Attention", ["q", "q", "q", "m"], ["added"], scale=1.0),
            helper.make_node("Attention", ["q", "q", "q", "c"], ["hidden"], scale=1.0),
            helper.make_node("Attention", ["q", "q", "q"], ["softcap"], scale=1.0, softcap=2.0),
            helper.make_node("Attention", ["q", "q", "q"], ["causal"], is_causal=1, scale=1.0),
            helper.make_node("Attention", ["q", "q", "q"], ["plain"], scale=1.0),
        ]
    )
    path.write_bytes(model.SerializeToString())
    after = onnx.load_from_string(graph_with_kernels(path) or b"")
    ours = {node.output[0] for node in after.graph.node if node.op_type == "Attention" and node.domain == "edgevlm"}
    assert ours == {"hidden", "plain"}
