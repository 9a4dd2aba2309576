"""`attention.c` against ONNX Runtime's Attention."""

import ctypes

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgevlm.kernels import find_library, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no kernels: {unavailable()}")


def attention(domain: str, masked: bool, scale: float) -> onnxruntime.InferenceSession:
    names = ["Q", "K", "V", "M"] if masked else ["Q", "K", "V"]
    node = helper.make_node("Attention", names, ["Y"], domain=domain, scale=scale)
    types = dict.fromkeys(names, TensorProto.FLOAT) | ({"M": TensorProto.BOOL} if masked else {})
    graph = helper.make_graph(
        [node], "attention",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("edgevlm", 1)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(find_library()))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_bfloat16(rows: int) -> bool:
    """Whether a key head with so many rows of queries is computed so (MANY_ROWS of `attention.c`)."""
    return rows >= 24 and bool(ctypes.CDLL(str(find_library())).has_bfloat16())


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2), key_heads=st.integers(1, 3), group=st.integers(1, 7), queries=st.integers(1, 60),
    keys=st.integers(1, 150), width=st.integers(1, 130), kind=st.sampled_from(["none", "causal", "window", "random", "blind"]),
    wide=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_onnx_runtime(
    batch: int, key_heads: int, group: int, queries: int, keys: int, width: int, kind: str, wide: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    heads = key_heads * group
    feeds = {
        "Q": rng.standard_normal((batch, heads, queries, width), np.float32),
        "K": rng.standard_normal((batch, key_heads, keys, width), np.float32),
        "V": rng.standard_normal((batch, key_heads, keys, width), np.float32),
    }
    if kind != "none":
        shape = (batch, heads, queries, keys) if wide else (1, 1, queries, keys)
        t, s = np.arange(keys)[None], np.arange(queries)[:, None]
        seen = {
            "causal": t <= s + max(0, keys - queries), "window": abs(t - s - keys // 2) < 5,
            "random": rng.random((queries, keys)) < 0.5, "blind": (rng.random((queries, keys)) < 0.5) & (s % 2 == 0),
        }[kind]  # fmt: skip
        feeds["M"] = np.broadcast_to(seen, shape).copy()
    scale = float(rng.uniform(0.05, 1.5))
    found = attention("edgevlm", "M" in feeds, scale).run(None, feeds)[0]
    limit = 2e-5
    if in_bfloat16(group * queries):
        feeds |= {name: to_bfloat16(feeds[name]) for name in "QKV"}
        limit += 2**-8 * np.abs(feeds["V"]).max()  # weights are rounded, too
    wanted = attention("", "M" in feeds, scale).run(None, feeds)[0]
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < limit


@pytest.mark.parametrize("queries", [9, 40])
def test_large_scores(queries: int) -> None:
    """Exponentials stay within the numbers there are."""
    rng = np.random.default_rng(1)
    feeds = {name: to_bfloat16(200 * rng.standard_normal((1, 2, queries, 32), np.float32)) for name in "QKV"}
    found, wanted = (attention(domain, False, 1.0).run(None, feeds)[0] for domain in ("edgevlm", ""))
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() < (2**-8 if in_bfloat16(queries) else 1e-3) * np.abs(wanted).max()
