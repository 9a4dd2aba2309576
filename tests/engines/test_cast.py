"""A graph in another float type: what follows, what stays, and what cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from engine_parts import part_feeds

pytest.importorskip("torch")

from edgevlm.bundle import Bundle
from edgevlm.engines.cast import cast_graph, fill_types
from edgevlm.errors import EngineError
from edgevlm.graphs import load_graph, save_graph

FLOAT, HALF, BRAIN = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def parsed(text: str, **weights: np.ndarray) -> ir.Model:
    """A graph in ONNX's text form, with the weights that it names."""
    import onnx.parser

    graph = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 24]> {text}'))
    for name, array in weights.items():
        value = next(i for node in graph.graph for i in node.inputs if i is not None and i.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)
        graph.graph.register_initializer(value)
    return graph


def session(model: ir.Model, folder: Path) -> ort.InferenceSession:
    save_graph(model, folder / "cast.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(folder / "cast.onnx"), options, providers=["CPUExecutionProvider"])


def turns(model: ir.Model, folder: Path, positions: np.ndarray) -> np.ndarray:
    return session(model, folder).run(None, {"p": positions, "x": np.ones((1, 1, 2), model.graph.inputs[1].dtype.numpy())})[0]


TURN = """g (int64[1, s] p, float[1, s, 2] x) => (float[1, s, 2] y) {
  wide = Cast<to = 1>(p)
  column = Unsqueeze(wide, last)
  angle = Mul(column, frequency)
  cosine = Cos(angle)
  y = Mul(x, cosine)
}"""


def test_angles_keep_their_precision(tmp_path: Path) -> None:
    frequency = np.array([1.0, 0.01], np.float32)
    model = parsed(TURN, frequency=frequency, last=np.array([-1]))
    cast_graph(model, FLOAT, HALF)
    kinds = {node.op_type: node.outputs[0].dtype for node in model.graph if node.op_type in ("Cos", "Mul")}
    assert kinds["Cos"] == FLOAT
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [ir.DataType.INT64, HALF, HALF]
    place = 30_001  # which float16 cannot hold
    found = turns(model, tmp_path, np.array([[place]]))
    np.testing.assert_allclose(found[0, 0], np.cos(place * frequency.astype(np.float64)), atol=2e-3)


def test_a_graph_that_is_in_that_type_already(tmp_path: Path) -> None:
    model = parsed(TURN, frequency=np.array([1.0, 0.5], np.float32), last=np.array([-1]))
    before = [(node.op_type, node.name) for node in model.graph]
    cast_graph(model, FLOAT, FLOAT)
    assert [(node.op_type, node.name) for node in model.graph] == before


def test_a_weight_that_both_types_read_is_there_twice(tmp_path: Path) -> None:
    model = parsed(
        """g (float[2] x) => (float[2] y) {
          c = Cos(w)
          a = Mul(x, w)
          y = Add(a, c)
        }""",
        w=np.array([3.0, 4.0], np.float32),
    )
    cast_graph(model, FLOAT, HALF)
    assert {v.const_value.dtype for v in model.graph.initializers.values() if v.const_value is not None} == {FLOAT, HALF}
    (found,) = session(model, tmp_path).run(None, {"x": np.ones(2, np.float16)})
    np.testing.assert_allclose(found, np.array([3, 4]) + np.cos([3, 4]), rtol=2e-3)


def test_an_output_that_stays_is_cast_and_keeps_its_name(tmp_path: Path) -> None:
    model = parsed("g (float[2] x) => (float[2] y) { y = Cos(x) }")
    cast_graph(model, FLOAT, HALF)
    assert (model.graph.outputs[0].name, model.graph.outputs[0].dtype) == ("y", HALF)
    (found,) = session(model, tmp_path).run(["y"], {"x": np.array([0, 1], np.float16)})
    np.testing.assert_allclose(found, np.cos([0, 1]), rtol=1e-3)


def test_indices_keep_their_precision(tmp_path: Path) -> None:
    model = parsed(
        """g (int64[n] p, float[1] x) => (int64[n] i, float[1] y) {
          wide = Cast<to = 1>(p)
          half = Div(wide, two)
          i = Cast<to = 7>(half)
          y = Mul(x, two)
        }""",
        two=np.array([2.0], np.float32),
    )
    cast_graph(model, FLOAT, BRAIN)
    wide = next(node for node in model.graph if node.op_type == "Div")
    assert wide.outputs[0].dtype == FLOAT
    assert model.graph.outputs[1].dtype == BRAIN


@pytest.mark.parametrize("number", [1e5, -7e4])
def test_a_weight_beyond_the_range_is_named(number: float, tmp_path: Path) -> None:
    model = parsed("g (float[1, 2] x) => (float[1, 2] y) { y = Mul(x, heavy) }", heavy=np.array([[1, number]], np.float32))
    cast_graph(model, FLOAT, HALF)
    with pytest.raises(EngineError, match=r"The weight heavy has values up to .*; float16 ends at 6.55e\+04.*--precision bf16"):
        save_graph(model, tmp_path / "x.onnx")


@pytest.mark.parametrize("never", [np.finfo(np.float32).min, -1e9, -np.inf])
def test_what_stands_for_never_becomes_the_smallest(never: float, tmp_path: Path) -> None:
    model = parsed("g (float[2] x) => (float[2] y) { y = Add(x, mask) }", mask=np.array([0, never], np.float32))
    cast_graph(model, FLOAT, HALF)
    (found,) = session(model, tmp_path).run(None, {"x": np.zeros(2, np.float16)})
    assert found[0] == 0
    assert found[1] == (-np.inf if np.isinf(never) else np.finfo(np.float16).min)


def test_a_step_of_quantization_stays_above_zero() -> None:
    model = parsed(
        "g (float[2] x) => (float[2] y) { q = QuantizeLinear(x, s, z) \n y = DequantizeLinear(q, s, z) }",
        s=np.array(1e-12, np.float32), z=np.array(0, np.int8),
    )  # fmt: skip
    cast_graph(model, FLOAT, HALF)
    scale = next(v.const_value for v in model.graph.initializers.values() if v.const_value and v.const_value.dtype == HALF)
    assert scale.numpy() == np.finfo(np.float16).smallest_normal


@pytest.mark.parametrize("name", ["clip-llama", "blip2-t5", "flamingo", "internvl-llama-rms", "qwen2.5-vl"])
@pytest.mark.parametrize("target", [HALF, BRAIN])
def test_every_value_has_a_type_that_fits(name: str, target: ir.DataType, tiny: Callable[[str], Any]) -> None:
    bundle = Bundle.open(tiny(name).bundle, check_files=False)
    for part in bundle.manifest.parts:
        model = load_graph(bundle.part_path(part))
        cast_graph(model, FLOAT, target)
        wanted = {v.name: v.dtype for v in (*model.graph.inputs, *model.graph.outputs)}
        assert FLOAT not in wanted.values()
        for node in model.graph:
            if node.op_type in ("Add", "Mul", "MatMul", "Sub", "Div", "Concat", "Where"):
                read = [v.dtype for v in node.inputs if v is not None and v.dtype != ir.DataType.BOOL]
                assert len(set(read)) == 1, (part, node.name)
                assert node.outputs[0].dtype == read[0], (part, node.name)


@pytest.mark.parametrize("name", ["clip-llama", "blip2-t5", "qwen2-vl"])
def test_half_precision_answers_alike(name: str, tiny: Callable[[str], Any], tmp_path: Path) -> None:
    bundle = Bundle.open(tiny(name).bundle, check_files=False)
    for part, info in bundle.manifest.parts.items():
        feeds = part_feeds(info, bundle.manifest)
        want = ort.InferenceSession(str(bundle.part_path(part)), providers=["CPUExecutionProvider"]).run(None, feeds)
        model = load_graph(bundle.part_path(part))
        cast_graph(model, FLOAT, HALF)
        halves = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in feeds.items()}
        found = session(model, tmp_path).run(None, halves)
        for a, b in zip(found, want, strict=True):
            assert np.abs(a.astype(np.float32) - b).max() <= 0.02 * max(1.0, np.abs(b).max()), part


def test_types_that_an_exporter_left_out() -> None:
    model = parsed("g (float[2] x, float[2] y) => (bool[2] z) { s = Shape(x) \n a = Sigmoid(x) \n z = Less(a, y) }")
    for node in model.graph:
        node.outputs[0].dtype = None
    fill_types(model.graph)
    assert [node.outputs[0].dtype for node in model.graph] == [ir.DataType.INT64, FLOAT, ir.DataType.BOOL]
