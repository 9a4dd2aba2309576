"""A network that lost something is refused, whatever it lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from engine_parts import CAPACITY, part_feeds, run_part

pytest.importorskip("torch")

from edgevlm.bundle import Bundle
from edgevlm.engines.build import prepare_part
from edgevlm.engines.fit import pack_tables
from edgevlm.engines.inspection import Expected, check_network, expected_of
from edgevlm.engines.profiles import Limits, profiles_for
from edgevlm.engines.tensorrt import Layer, Network
from edgevlm.errors import EngineError
from edgevlm.graphs import load_graph, save_graph
from edgevlm.quant.quantize import quantize_bundle

EXPECTED = Expected(("x", "past"), ("y", "present"), {"a": "mask"}, {"s": ("past", "present")}, ("a.attention.mask",))
LAYERS = (
    Layer("s", "KV_CACHE_UPDATE", ("past", "rows", "at"), ("present",)),
    Layer("a_AttentionInput", "ATTENTION_INPUT", ("x", "present", "v", "mask"), ("b",)),
    Layer("a_AttentionOutput", "ATTENTION_OUTPUT", ("b",), ("y",)),
    Layer("a.attention.mask", "SELECT", ("m",), ("n",)),
)


def network(*layers: Layer, inputs: tuple[str, ...] = ("x", "past"), outputs: tuple[str, ...] = ("y", "present")) -> Network:
    return Network(dict.fromkeys(inputs, "float16"), dict.fromkeys(outputs, "float16"), list(layers))


def test_a_whole_network() -> None:
    found = check_network(network(*LAYERS), EXPECTED, "decoder")
    assert found == {"layers": 4, "attention": 1, "masks": 1, "cache_updates": 1, "dequantized": 0}
    assert EXPECTED.aliases == {"present": "past"}


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (network(*LAYERS, inputs=("past",)), "the input x was dropped"),
        (network(*[replace(LAYERS[1], inputs=("q", "present", "v", "mask")), LAYERS[0]]), "the input x was dropped"),
        (network(*LAYERS, outputs=("present",)), "the output y is missing"),
        (network(LAYERS[0], replace(LAYERS[2], inputs=("x",))), "the attention layer a is missing"),
        (network(LAYERS[0], replace(LAYERS[1], inputs=("x", "present", "v"))), "the attention layer a lost its mask mask"),
        (network(LAYERS[0], replace(LAYERS[1], inputs=("x", "k", "v", ""))), "the attention layer a lost its mask mask"),
        (network(replace(LAYERS[0], kind="SCATTER"), *LAYERS[1:]), "the cache update s is missing"),
        (
            network(replace(LAYERS[0], inputs=("copy", "rows", "past")), *LAYERS[1:]),
            "the cache update s does not write past into present",
        ),
        (
            network(replace(LAYERS[0], outputs=("copy",)), *LAYERS[1:]),
            "the cache update s does not write past into present",
        ),
        (network(*LAYERS[:3]), "the layer a.attention.mask is missing"),
    ],
)
def test_what_was_lost_is_named(broken: Network, text: str) -> None:
    with pytest.raises(EngineError) as caught:
        check_network(broken, EXPECTED, "decoder")
    assert f"did not read the part decoder as it is: {text}." in str(caught.value)


def test_what_is_expected_of_a_decoder(tiny: Callable[[str], Any]) -> None:
    bundle = Bundle.open(tiny("flamingo").bundle, check_files=False)
    found = expected_of(load_graph(bundle.part_path("decoder")))
    kv, cross = bundle.manifest.kv_cache.layers, bundle.manifest.cross_attention.layers
    assert len(found.attention) == kv + cross
    assert all(found.attention.values())
    assert len(found.caches) == 2 * kv > 0
    assert set(found.inputs) == set(bundle.manifest.parts["decoder"].inputs)


def test_tensorrt_drops_an_input_of_attention_and_is_caught(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    import onnx.parser

    from edgevlm.engines.tensorrt import open_tensorrt

    text = """<ir_version: 10, opset_import: ["" : 24]>
    g (float16[1,2,4,16] q, float16[1,2,4,16] k, int64[1] n) => (float16[1,2,4,16] y) {
      [a] y = Attention(q, k, k, , , , n)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    save_graph(model, tmp_path / "x.onnx")
    parsed = open_tensorrt("tensorrt-rtx").parse(tmp_path / "x.onnx", "decoder")
    with pytest.raises(EngineError, match="the input n was dropped"):
        check_network(parsed, expected_of(model), "decoder")


# --------------------------------------------------------------------------------- what is fitted, first


@pytest.mark.parametrize("columns", [8, 5, 4, 3, 1, 257])
def test_packed_tables_hold_what_they_held(columns: int, tmp_path: Path) -> None:
    import onnx.parser

    codes = np.random.default_rng(0).integers(-127, 128, (50, columns), np.int8, endpoint=False)
    codes[:2] = [[-127], [127]]
    text = """<ir_version: 10, opset_import: ["" : 24]>
    g (int64[b, s] ids) => (float[b, s, w] y) {
      [take] rows = Gather(table, ids)
      y = Cast<to = 1>(rows)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    table = model.graph[0].inputs[0]
    assert table is not None
    table.const_value, table.dtype, table.shape = ir.tensor(codes, name="table"), ir.DataType.INT8, ir.Shape(codes.shape)
    model.graph.register_initializer(table)
    pack_tables(model)
    assert {v.const_value.dtype for v in model.graph.initializers.values() if v.const_value} <= {
        ir.DataType.INT32,
        ir.DataType.INT64,
    }
    save_graph(model, tmp_path / "x.onnx")
    ids = np.array([[0, 1, 7], [49, 3, 3]])
    (found,) = ort.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"]).run(None, {"ids": ids})
    np.testing.assert_array_equal(found, codes[ids])


@pytest.mark.parametrize("name", ["clip-llama", "blip2-t5", "flamingo", "qwen2-vl"])
def test_fitted_parts_answer_alike(name: str, tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """What is fitted to TensorRT is still standard ONNX, its hint for attention aside."""
    bundle = quantize_bundle(tiny(name).bundle, tmp_path / "int8", "int8")
    for part, info in bundle.manifest.parts.items():
        limits = Limits(CAPACITY, 64)
        model = prepare_part(bundle, part, "fp32", profiles_for(part, info, bundle.manifest, limits))
        attention = [node for node in model.graph if node.op_type == "Attention"]
        assert all(node.attributes.pop("TRT_decomposable").as_int() == 1 for node in attention)
        save_graph(model, tmp_path / "fitted.onnx")
        outputs, feeds = list(info.outputs), part_feeds(info, bundle.manifest)
        for a, b in zip(
            run_part(tmp_path / "fitted.onnx", feeds, outputs), run_part(bundle.part_path(part), feeds, outputs), strict=True
        ):
            assert np.abs(a - b).max() <= 1e-5 * max(1.0, np.abs(b).max()), part
