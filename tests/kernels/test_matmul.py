"""The products of `matmul.c` against numpy: with the same rounding of activations, and with none."""

import platform
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgevlm.kernels import SWITCH, find_library, unavailable

GROUP = 128
needs_kernels = pytest.mark.skipif(unavailable() is not None, reason=f"no kernels: {unavailable()}")


def test_they_are_there_where_they_can_be() -> None:
    info = Path("/proc/cpuinfo")
    able = platform.machine() == "x86_64" and info.is_file() and "avx512_vnni" in info.read_text()
    if able and shutil.which("cc"):
        assert unavailable() is None


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert unavailable() == f"{SWITCH} is 0"
    assert find_library() is None


def session(
    bits: int, weight: np.ndarray, scales: np.ndarray, bias: np.ndarray | None, block: int
) -> onnxruntime.InferenceSession:
    depth, columns = weight.shape
    if bits == 4:
        pairs = weight.reshape(-1, 2) & 15
        weight = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8).reshape(depth, columns // 2)
    constants = {"W": weight, "S": scales} | ({} if bias is None else {"B": bias})
    attributes = {"block_size": block} if bits == 4 else {}
    node = helper.make_node(f"MatMulInt{bits}", ["X", *constants], ["Y"], domain="edgevlm", **attributes)
    graph = helper.make_graph(
        [node], "product",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["batch", "rows", depth])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[onnx.OperatorSetIdProto(domain="edgevlm", version=1)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(find_library()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def rounded(rows: np.ndarray, group: int) -> np.ndarray:
    """Rows as the kernels see them: int8 with one scale for each group of neighbours."""
    out = np.empty_like(rows)
    for first in range(0, rows.shape[-1], group):
        part = rows[..., first : first + group]
        peak = np.abs(part).max(-1, keepdims=True)
        scale = np.where(peak > 0, peak / 127, 1)
        out[..., first : first + group] = np.round(part / scale) * scale
    return out


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.sampled_from([4, 8]))
def test_equals_numpy(data: st.DataObject, bits: int) -> None:
    depth = 4 * data.draw(st.integers(1, 80), "depth / 4")
    columns = data.draw(st.integers(1, 200), "columns") * (2 if bits == 4 else 1)
    rows, batch = data.draw(st.integers(1, 27), "rows"), data.draw(st.integers(1, 2), "batch")
    block = data.draw(st.sampled_from([16, 20, 32, 64, 128, 256]), "block") if bits == 4 else GROUP
    size = data.draw(st.sampled_from([1e-6, 1.0, 1e4]), "size of scales")
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    weight = rng.integers(-8, 8, (depth, columns)) if bits == 4 else rng.integers(-128, 128, (depth, columns))
    scales = (size * rng.uniform(0.1, 1, (-(-depth // block), columns) if bits == 4 else columns)).astype(np.float32)
    bias = (size * rng.standard_normal(columns)).astype(np.float32) if data.draw(st.booleans(), "bias") else None
    x = rng.standard_normal((batch, rows, depth)).astype(np.float32)
    x[:, :, : depth // 2] *= data.draw(st.sampled_from([0, 1, 300]), "size of some activations")
    product = session(bits, weight.astype(np.int8), scales, bias, block)
    found = product.run(None, {"X": x})[0]
    float_weight = weight * (np.repeat(scales, block, 0)[:depth] if bits == 4 else scales)
    plus = 0 if bias is None else bias
    wanted = rounded(x.astype(np.float64), block * max(1, GROUP // block)) @ float_weight + plus
    assert found.shape == (batch, rows, columns)
    # Scales of INT4 are kept in float16, and a number halfway between two may be rounded either way.
    size_of_sums = np.abs(x.astype(np.float64)) @ np.abs(float_weight)
    assert (np.abs(found - wanted) <= 2e-3 * size_of_sums + 1e-6 * np.abs(plus)).all()


@needs_kernels
def test_no_rows_and_nothing_but_zeros() -> None:
    weight = np.ones((32, 8), np.int8)
    product = session(8, weight, np.ones(8, np.float32), None, GROUP)
    assert product.run(None, {"X": np.zeros((1, 0, 32), np.float32)})[0].shape == (1, 0, 8)
    assert (product.run(None, {"X": np.zeros((1, 3, 32), np.float32)})[0] == 0).all()


@needs_kernels
def test_threads_and_many_sessions() -> None:
    """Each session has its own packed weights, and gives them back."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 5, 64)).astype(np.float32)
    for _ in range(3):
        weights = [rng.integers(-8, 8, (64, 128)).astype(np.int8) for _ in range(4)]
        scales = np.full((2, 128), 0.01, np.float32)
        sessions = [session(4, weight, scales, None, 32) for weight in weights]
        for weight, product in zip(weights, sessions, strict=True):
            assert np.allclose(product.run(None, {"X": x})[0], rounded(x, GROUP) @ (weight * 0.01), atol=0.01)
