"""`swish.c` against numpy."""

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgevlm.kernels import find_library, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no kernels: {unavailable()}")


def swish(x: np.ndarray, gate: np.ndarray | None, alpha: float) -> np.ndarray:
    names = ["X", "G"][: 1 + (gate is not None)]
    node = helper.make_node("Swish", names, ["Y"], domain="edgevlm", alpha=alpha)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in [*names, "Y"]]
    graph = helper.make_graph([node], "swish", values[:-1], values[-1:])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(find_library()))
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("edgevlm", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"X": x} | ({"G": gate} if gate is not None else {}))[0]


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 41), min_size=1, max_size=4), size=st.sampled_from([1e-3, 1.0, 30.0, 1e4, 1e30]),
    gated=st.booleans(), alpha=st.sampled_from([1.0, 1.702]),
)  # fmt: skip
def test_equals_numpy(shape: list[int], size: float, gated: bool, alpha: float) -> None:
    rng = np.random.default_rng(len(shape))
    x = (size * rng.standard_normal(shape)).astype(np.float32)
    gate = rng.standard_normal(shape).astype(np.float32) if gated else None
    with np.errstate(over="ignore"):
        wanted = x.astype(np.float64) / (1 + np.exp(-alpha * x.astype(np.float64)))
    if gate is not None:
        wanted = wanted * gate
    found = swish(x, gate, alpha)
    assert found.shape == x.shape
    # What is rounded in an exponent counts as often as the exponent is large.
    assert (np.abs(found - wanted) <= 1e-6 * np.abs(wanted) * (1 + np.abs(x)) + 1e-30).all()


def test_many_numbers() -> None:
    x = np.linspace(-20, 20, 50_001, dtype=np.float32)
    assert np.allclose(swish(x, None, 1.0), x / (1 + np.exp(-x.astype(np.float64))), rtol=1e-5, atol=1e-30)
