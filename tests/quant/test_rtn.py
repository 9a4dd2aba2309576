"""Round-to-nearest against the plain formula, and against what ONNX Runtime makes of the written graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("onnx_ir")
import onnx_ir as ir
import onnxruntime as ort

from edgevlm import tensors
from edgevlm.errors import RecipeError
from edgevlm.graphs import save_graph
from edgevlm.quant import rtn
from edgevlm.quant.quantize import quantize_graph
from edgevlm.quant.recipe import Recipe, Rule
from edgevlm.quant.rtn import pack_int4, quantize_int4, unpack_int4

SHAPES = [(64, 8), (33, 5), (100, 7), (1, 9), (9, 1), (7, 5), (16, 3), (31, 31), (130, 64)]
DTYPES = [np.float32, np.float16]


def quantize_int8(weight: Any, scale_dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    blocks, scales = rtn.quantize_int8(weight, scale_dtype)
    return np.concatenate(list(blocks())), scales


def quantize_int8_rows(table: Any, scale_dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    blocks, scales = rtn.quantize_int8_rows(table, scale_dtype)
    return np.concatenate(list(blocks())), scales


def weights(shape: tuple[int, int], dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    """Columns of very different magnitude, one of them and one block all zero, and outliers."""
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 1, (1, shape[1]))
    array[:, shape[1] // 2] = 0
    array[: min(16, shape[0] // 2), 0] = 0
    array[rng.integers(shape[0]), rng.integers(shape[1])] *= 20
    return array.astype(dtype)


def reference_int8(weight: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Number by number."""
    quantized, scales = np.zeros(weight.shape, np.int8), np.ones(weight.shape[1], dtype)
    for n in range(weight.shape[1]):
        column = [float(w) for w in weight[:, n]]
        peak = max(abs(w) for w in column)
        if peak:
            scales[n] = dtype(np.float32(peak) / np.float32(127))
            quantized[:, n] = [max(-127, min(127, round(w / float(scales[n])))) for w in column]
    return quantized, scales


def reference_int4(weight: np.ndarray, block: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    blocks = (weight.shape[0] + block - 1) // block
    quantized, scales = np.zeros(weight.shape, np.int8), np.ones((blocks, weight.shape[1]), dtype)
    for n in range(weight.shape[1]):
        for b in range(blocks):
            rows = range(b * block, min(weight.shape[0], (b + 1) * block))
            peak = max((float(weight[k, n]) for k in rows), key=abs)
            if peak:
                scales[b, n] = dtype(np.float32(peak) / np.float32(-8))
                for k in rows:
                    quantized[k, n] = max(-8, min(7, round(float(weight[k, n]) / float(scales[b, n]))))
    return quantized, scales


def close_to(quantized: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for ties, which the inverse of a scale may turn the other way."""
    difference = np.abs(quantized.astype(int) - expected)
    assert difference.max(initial=0) <= 1
    assert (difference != 0).mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_bytes", [1, 1000, 32 << 20])
def test_int8_is_the_formula(shape: tuple[int, int], dtype: type, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", block_bytes)
    weight = weights(shape, dtype)
    quantized, scales = quantize_int8(ir.tensor(weight), np.dtype(dtype))
    expected, expected_scales = reference_int8(weight, dtype)
    np.testing.assert_array_equal(scales, expected_scales)
    close_to(quantized, expected)
    assert (quantized.dtype, scales.dtype) == (np.int8, dtype)
    rows, row_scales = quantize_int8_rows(ir.tensor(np.ascontiguousarray(weight.T)), np.dtype(dtype))
    np.testing.assert_array_equal(rows, quantized.T)
    np.testing.assert_array_equal(row_scales, scales[:, None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [16, 32, 64])
def test_int4_is_the_formula(shape: tuple[int, int], block: int, dtype: type) -> None:
    weight = weights(shape, dtype)
    packed, scales = quantize_int4(ir.tensor(weight), block, np.dtype(dtype))
    expected, expected_scales = reference_int4(weight, block, dtype)
    np.testing.assert_array_equal(scales, expected_scales)
    close_to(unpack_int4(packed, shape).astype(np.int8), expected)
    assert packed.size == -(-weight.size // 2)
    assert scales.shape == (-(-shape[0] // block), shape[1])


@pytest.mark.parametrize("block_bytes", [1, 700])
def test_int4_does_not_depend_on_how_it_is_read(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_int4(ir.tensor(weights((100, 7))), 32, np.dtype(np.float32))
    monkeypatch.setattr(tensors, "BLOCK_BYTES", block_bytes)
    pieces = quantize_int4(ir.tensor(weights((100, 7))), 32, np.dtype(np.float32))
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one, other)


FINITE = st.floats(-1e4, 1e4, width=32)


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=FINITE))
def test_error_is_half_a_step(weight: np.ndarray) -> None:
    slack = 1 + 1e-5
    quantized, scales = quantize_int8(ir.tensor(weight), np.dtype(np.float32))
    usable = np.abs(weight).max(0) / 127 > np.finfo(np.float32).tiny
    error = np.abs(weight - quantized * scales)
    assert (error <= slack * scales / 2)[:, usable].all()
    assert np.abs(quantized).max() <= 127
    assert (quantized[:, ~usable] == 0).all()

    packed, block_scales = quantize_int4(ir.tensor(weight), 16, np.dtype(np.float32))
    values = unpack_int4(packed, weight.shape).astype(np.float32)
    steps = np.repeat(block_scales, 16, 0)[: len(weight)]
    error, bound = np.abs(weight - values * steps), np.abs(steps) / 2
    # The end opposite to the largest weight is 7 steps away, not 8: what lies beyond is clipped.
    clipped = values == 7
    noise = np.abs(weight) <= 8.1 * np.finfo(np.float32).tiny
    assert (error <= slack * np.where(clipped, 2 * bound, bound))[~noise].all()


def test_largest_weight_of_an_int4_block_is_exact() -> None:
    weight = weights((64, 20), np.float32)
    packed, scales = quantize_int4(ir.tensor(weight), 32, np.dtype(np.float32))
    values = unpack_int4(packed, weight.shape).astype(np.float32) * np.repeat(scales, 32, 0)
    for block in (slice(0, 32), slice(32, 64)):
        at = np.abs(weight[block]).argmax(0)[None]
        peaks, found = (np.take_along_axis(a[block], at, 0) for a in (weight, values))
        np.testing.assert_allclose(found, peaks, rtol=1e-6)


def test_small_channels_survive_float16() -> None:
    """A float16 scale of a channel whose weights are some thousandths is subnormal, and still a scale."""
    weight = (np.random.default_rng(0).standard_normal((256, 8)) * 1e-3).astype(np.float16)
    for restored in (
        np.multiply(*quantize_int8(ir.tensor(weight), np.dtype(np.float16)), dtype=np.float32),
        _dequantized_int4(ir.tensor(weight * np.float16(0.1)), 32) * 10,
    ):
        error = np.linalg.norm(weight - restored) / np.linalg.norm(weight.astype(np.float32))
        assert error < 0.15


def _dequantized_int4(tensor: ir.TensorProtocol, block: int) -> np.ndarray:
    packed, scales = quantize_int4(tensor, block, np.dtype(np.float16))
    shape = tuple(int(d) for d in tensor.shape)
    return unpack_int4(packed, shape).astype(np.float32) * np.repeat(scales.astype(np.float32), block, 0)[: shape[0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0, 1e-45, 1e-39, 1e-8, 6e-8])
def test_vanishing_weights_give_finite_numbers(dtype: type, value: float) -> None:
    weight = np.full((32, 3), value, dtype)
    with np.errstate(all="raise", under="ignore"):
        quantized, scales = quantize_int8(ir.tensor(weight), np.dtype(dtype))
        packed, block_scales = quantize_int4(ir.tensor(weight), 32, np.dtype(dtype))
    for codes, steps in ((quantized, scales), (unpack_int4(packed, weight.shape).astype(np.int8), block_scales)):
        assert np.isfinite(steps).all()
        assert (np.abs(steps.astype(np.float32)) > 0).all()
        assert np.abs(codes * steps.astype(np.float32) - weight).max() <= abs(weight.astype(np.float32)).max()


@given(hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(-8, 7)))
def test_packing_round_trip(values: np.ndarray) -> None:
    packed = pack_int4(values)
    assert packed.dtype == np.uint8
    assert packed.size == (values.size + 1) // 2
    np.testing.assert_array_equal(unpack_int4(packed, values.shape).astype(np.int8), values)


def test_packing_is_onnx_layout() -> None:
    np.testing.assert_array_equal(pack_int4(np.array([[1, -2, 7]], np.int8)), [0xE1, 0x07])


# ----------------------------------------------------------------------- what ONNX Runtime reads


def graph_of(weight: np.ndarray, operator: str) -> ir.Model:
    """One MatMul or Gather with the weight as its initializer."""
    dtype = ir.DataType.from_numpy(weight.dtype)
    table = ir.Value(name="w", shape=ir.Shape(weight.shape), type=ir.TensorType(dtype), const_value=ir.tensor(weight, name="w"))
    shape, kind = (["n", weight.shape[0]], dtype) if operator == "MatMul" else (["n"], ir.DataType.INT64)
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(kind))
    node = ir.Node("", operator, [x, table] if operator == "MatMul" else [table, x], name="node")
    y = node.outputs[0]
    y.name, y.shape, y.dtype = "y", ir.Shape(["n", weight.shape[1]]), dtype
    graph = ir.Graph([x], [y], nodes=[node], initializers=[table], opset_imports={"": 24}, name="g")
    return ir.Model(graph, ir_version=11)


def run_plain(path: Path, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(outputs, feeds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "block"), [("int8", 32), ("int4", 16), ("int4", 32), ("int4", 64)])
def test_onnxruntime_reads_the_same_weights(
    tmp_path: Path, shape: tuple[int, int], dtype: type, method: str, block: int
) -> None:
    weight = weights(shape, dtype)
    model = graph_of(weight, "MatMul")
    recipe = Recipe("r", (Rule(method, block_size=block),))
    if method == "int4" and block > shape[0]:
        with pytest.raises(RecipeError, match=rf"has {shape[0]} inputs, fewer than the {block} of a block"):
            quantize_graph(model, "decoder", recipe)
        return
    quantize_graph(model, "decoder", recipe)
    dequantize = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    model.graph.outputs.append(dequantize.outputs[0])
    save_graph(model, tmp_path / "g.onnx")
    (read,) = run_plain(tmp_path / "g.onnx", [dequantize.outputs[0].name], {"x": np.zeros((1, shape[0]), dtype)})
    if method == "int8":
        quantized, scales = quantize_int8(ir.tensor(weight), np.dtype(dtype))
        expected = (quantized.astype(np.float32) * scales.astype(np.float32)).astype(dtype)
    else:
        packed, scales = quantize_int4(ir.tensor(weight), block, np.dtype(dtype))
        steps = np.repeat(scales.astype(np.float32), block, 0)[: shape[0]]
        expected = (unpack_int4(packed, shape).astype(np.float32) * steps).astype(dtype)
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_onnxruntime_picks_the_same_rows(tmp_path: Path, shape: tuple[int, int], dtype: type) -> None:
    table = weights(shape, dtype)
    model = graph_of(table, "Gather")
    quantize_graph(model, "embed_tokens", Recipe("r", (Rule("int4"),)))
    assert sorted({value.const_value.dtype.name for value in model.graph.initializers.values()}) == sorted(
        {"INT8", ir.DataType.from_numpy(table.dtype).name}
    )
    save_graph(model, tmp_path / "g.onnx")
    ids = np.arange(shape[0])[::-1].copy()
    (read,) = run_plain(tmp_path / "g.onnx", ["y"], {"x": ids})
    quantized, scales = quantize_int8_rows(ir.tensor(table), np.dtype(dtype))
    np.testing.assert_array_equal(read, (quantized[ids].astype(dtype) * scales[ids]).astype(dtype))
