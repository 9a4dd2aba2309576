"""Factors folded into graphs: the same function, wherever one finds a place; and a place where every family has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from recorded import fold_everywhere, folds_of, graphs_of, record, relative, run
from tinies import Tiny

pytest.importorskip("torch")
from edgevlm.graphs import load_graph
from edgevlm.quant.fold import Fold, consumers_of, find_fold, scale_rows, weight_of

pytestmark = pytest.mark.usefixtures("one_thread")

#: Of the values that linear layers read: how many take factors, of how many. What is missing are GELUs, what comes from another
#: part, and what a residual reads too, as in BERT and OPT-350M.
FOUND = {
    "clip-llama": {"vision_encoder": (6, 8), "projector": (0, 2), "decoder": (9, 9)},
    "clip-llama-gqa-bias": {"vision_encoder": (6, 8), "projector": (0, 2), "decoder": (9, 9)},
    "clip-qwen2-tied": {"vision_encoder": (6, 8), "projector": (0, 2), "decoder": (9, 9)},
    "siglip-qwen2": {"vision_encoder": (9, 12), "projector": (0, 2), "decoder": (9, 9)},
    "odd-widths": {"vision_encoder": (6, 8), "projector": (0, 2), "decoder": (9, 9)},
    "blip2-opt": {"vision_encoder": (6, 8), "qformer": (5, 17), "projector": (0, 1), "decoder": (9, 9)},
    "blip2-opt-350m": {"vision_encoder": (6, 8), "qformer": (6, 19), "projector": (0, 1), "decoder": (6, 11)},
    "blip2-t5": {
        "vision_encoder": (6, 8), "qformer": (5, 17), "projector": (0, 1), "text_encoder": (12, 12), "cross_kv": (0, 1),
        "decoder": (11, 13),
    },
    "blip2-t5-tied": {
        "vision_encoder": (6, 8), "qformer": (5, 17), "projector": (0, 1), "text_encoder": (8, 8), "cross_kv": (0, 1),
        "decoder": (11, 13),
    },
    "instructblip-llama": {"vision_encoder": (6, 8), "qformer": (5, 23), "projector": (0, 1), "decoder": (9, 9)},
    "flamingo-every-second": {"vision_encoder": (6, 8), "resampler": (4, 10), "cross_kv": (0, 1), "decoder": (23, 25)},
    "flamingo-every-third": {"vision_encoder": (6, 8), "cross_kv": (0, 1), "decoder": (16, 17)},
    "internvl-qwen2": {"vision_encoder": (9, 12), "projector": (1, 2), "decoder": (9, 9)},
    "internvl-llama-rms": {"vision_encoder": (9, 12), "projector": (1, 2), "decoder": (9, 9)},
    "internvl-qwen3-tied": {"vision_encoder": (9, 12), "projector": (1, 2), "decoder": (9, 9)},
    "qwen-vl": {"vision_encoder": (9, 12), "resampler": (2, 6), "decoder": (9, 9)},
    "qwen-vl-two-heads": {"vision_encoder": (6, 8), "resampler": (2, 6), "decoder": (9, 9)},
    "qwen2-vl": {"vision_encoder": (10, 14), "decoder": (9, 9)},
    "qwen2.5-vl": {"vision_encoder": (13, 14), "decoder": (9, 9)},
    "qwen2.5-vl-windows": {"vision_encoder": (17, 18), "decoder": (9, 9)},
    "qwen3-vl": {"vision_encoder": (12, 18), "decoder": (9, 9)},
}  # fmt: skip
ALWAYS = (
    "clip-llama", "blip2-opt-350m", "blip2-t5-tied", "instructblip-llama", "flamingo-every-second", "flamingo-every-third",
    "qwen-vl", "qwen2.5-vl-windows",
)  # fmt: skip
EVERY = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in FOUND]


def uneven(seed: int, spread: float = 1.0) -> Callable[[Fold], np.ndarray]:
    rng = np.random.default_rng(seed)
    return lambda fold: np.exp(rng.normal(0, spread, fold.width)).astype(np.float32)


@pytest.mark.parametrize("name", EVERY)
def test_folding_changes_nothing(tiny: Callable[[str], Tiny], name: str, tmp_path: Path) -> None:
    bundle = tiny(name).bundle
    found = {}
    for part, graph in graphs_of(bundle):
        feeds, operators = record(bundle)[part], [node.op_type for node in graph.graph]
        wanted = run(graph, feeds, tmp_path)
        every = folds_of(graph)
        found[part] = fold_everywhere(graph, uneven(len(operators))), len(every)
        assert [node.op_type for node in graph.graph] == operators
        folded = run(graph, feeds, tmp_path)
        inside = {fold.cached[0] for _, _, fold in every if fold and fold.cached}
        for before, after in zip(wanted, folded, strict=True):
            for output, value in before.items():
                scaled = inside and output.startswith("present.") and output.endswith(".value")
                assert (relative(after[output], value) < 1e-5) != bool(scaled), (part, output)
    assert found == FOUND[name]


@pytest.mark.parametrize("name", ["flamingo-every-second", pytest.param("clip-llama-gqa-bias", marks=pytest.mark.slow)])
def test_half_precision_keeps_its_type(tiny: Callable[[str], Tiny], name: str, tmp_path: Path) -> None:
    bundle = tiny(name).export("fp16")
    for part, graph in graphs_of(bundle):
        feeds = record(bundle)[part]
        wanted = run(graph, feeds, tmp_path)
        types = {v.name: v.const_value.dtype for v in graph.graph.initializers.values()}  # type: ignore[union-attr]
        fold_everywhere(graph, uneven(1, 0.5))
        assert {v.name: v.const_value.dtype for v in graph.graph.initializers.values()} == types  # type: ignore[union-attr]
        for before, after in zip(wanted, run(graph, feeds, tmp_path), strict=True):
            for output, value in before.items():
                if not output.startswith("present."):
                    assert relative(after[output], value) < 1e-2, (part, output)


def test_what_a_cache_holds_is_divided_too(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """`cached` says by how much, head by head, where query heads share values."""
    bundle = tiny("qwen2.5-vl-windows").bundle
    graph, feeds = dict(graphs_of(bundle))["decoder"], record(bundle)["decoder"]
    before = run(graph, feeds, tmp_path)
    value, readers, fold = next(entry for entry in folds_of(graph) if entry[2] and entry[2].cached)
    assert fold is not None
    assert readers is not None
    heads = before[0]["present.0.value"].shape[1]
    factors = fold.tie(uneven(3)(fold))
    assert len(np.unique(fold.slots)) < fold.width, "query heads share values"
    fold.divide(factors)
    scale_rows(readers[0].inputs[1], factors)  # type: ignore[arg-type]
    own = fold.cached_factors(factors).reshape(heads, 1, -1)
    for old, new in zip(before, run(graph, feeds, tmp_path), strict=True):
        assert relative(new["present.0.value"], old["present.0.value"] / own) < 1e-6
        assert relative(new["present.0.key"], old["present.0.key"]) < 1e-6
        assert relative(new["logits"], old["logits"]) < 1e-5
    assert value.name


# --------------------------------------------------------------------------------------- graphs by hand

RNG = np.random.default_rng(0)


def parsed(body: str, **weights: Any) -> ir.Model:
    """A graph `[B, S, 8]` → `[B, S, …]`, in ONNX's text, with initializers of these shapes."""
    arrays = {
        name: RNG.standard_normal(value).astype(np.float32) if isinstance(value, tuple) else np.asarray(value)
        for name, value in weights.items()
    }
    kinds = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64", np.dtype(np.float16): "float16"}
    listed = ", ".join(
        f"{kinds[array.dtype]}{list(array.shape) if array.ndim else ''} {name} = "
        f"{{{', '.join(str(x) for x in array.ravel().tolist())}}}"
        for name, array in arrays.items()
    )
    text = f'<ir_version: 10, opset_import: ["" : 24]>\ng (float[B, S, 8] x) => (float[B, S, N] y) <{listed}> {{ {body} }}'
    import onnx

    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = ir.serde.deserialize_model(proto)
    for number, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{number}"
    return model


def last_layer(model: ir.Model) -> ir.Value:
    node = [node for node in model.graph if weight_of(node) is not None][-1]
    assert node.inputs[0] is not None
    return node.inputs[0]


#: A graph whose last linear layer reads what can be divided.
FOLDS = {
    "norm": ("h = LayerNormalization(x, n, b) y = MatMul(h, w)", {"n": (8,), "b": (8,), "w": (8, 4)}),
    "norm without bias": ("h = LayerNormalization(x, n) y = MatMul(h, w)", {"n": (8,), "w": (8, 4)}),
    "RMS norm": ("h = RMSNormalization(x, n) y = MatMul(h, w)", {"n": (8,), "w": (8, 4)}),
    "norm of many operators": (
        "s = Mul(x, x) m = ReduceMean<keepdims=1>(s, a) r = Sqrt(m) u = Div(x, r) h = Mul(n, u) y = MatMul(h, w)",
        {"n": (8,), "a": [-1], "w": (8, 4)},
    ),
    "linear": ("h = MatMul(x, v) y = MatMul(h, w)", {"v": (8, 6), "w": (6, 4)}),
    "bias": ("h = MatMul(x, v) k = Add(b, h) y = MatMul(k, w)", {"v": (8, 6), "b": (6,), "w": (6, 4)}),
    "ReLU": ("h = MatMul(x, v) k = Relu(h) y = MatMul(k, w)", {"v": (8, 6), "w": (6, 4)}),
    "scale of a layer": ("h = MatMul(x, v) k = Mul(h, s) y = MatMul(k, w)", {"v": (8, 6), "s": (6,), "w": (6, 4)}),
    "gated": (
        "g = MatMul(x, v) t = Sigmoid(g) a = Mul(g, t) u = MatMul(x, q) h = Mul(a, u) y = MatMul(h, w)",
        {"v": (8, 6), "q": (8, 6), "w": (6, 4)},
    ),
    "gated the other way": (
        "g = MatMul(x, v) t = Gelu(g) u = MatMul(x, q) h = Mul(u, t) y = MatMul(h, w)",
        {"v": (8, 6), "q": (8, 6), "w": (6, 4)},
    ),
    "split": (
        "h = MatMul(x, v) a, c = Split<axis=-1, num_outputs=2>(h) t = Tanh(a) k = Mul(t, c) y = MatMul(k, w)",
        {"v": (8, 12), "w": (6, 4)},
    ),
    "slices of one layer": (
        "h = MatMul(x, v) a = Slice(h, i0, i6, i2) c = Slice(h, i6, i12, i2) t = Tanh(a) k = Mul(t, c) y = MatMul(k, w)",
        {"v": (8, 12), "w": (6, 4), "i0": [0], "i6": [6], "i12": [12], "i2": [2]},
    ),
    "four places side by side": (
        "h = LayerNormalization(x, n, b) k = Reshape(h, s) y = MatMul(k, w)",
        {"n": (8,), "b": (8,), "s": [1, -1, 32], "w": (32, 4)},
    ),
    "the last token": (
        "h = LayerNormalization(x, n, b) k = Gather<axis=1>(h, i) y = MatMul(k, w)",
        {"n": (8,), "b": (8,), "i": [0], "w": (8, 4)},
    ),
}


@pytest.mark.parametrize("case", FOLDS)
def test_patterns(case: str, tmp_path: Path) -> None:
    body, weights = FOLDS[case]
    model = parsed(body, **weights)
    feeds = [{"x": RNG.standard_normal((1, 4, 8)).astype(np.float32)}]
    wanted = run(model, feeds, tmp_path)[0]["y"]
    value = last_layer(model)
    fold, readers = find_fold(value), consumers_of(value)
    assert fold is not None
    assert readers is not None
    factors = fold.tie(uneven(5)(fold))
    assert fold.divide(factors)
    scale_rows(readers[0].inputs[1], factors)  # type: ignore[arg-type]
    assert relative(run(model, feeds, tmp_path)[0]["y"], wanted) < 1e-5
    assert np.abs(factors - 1).max() > 0.1


NO_FOLDS = {
    "GELU": ("h = MatMul(x, v) k = Gelu(h) y = MatMul(k, w)", {"v": (8, 6), "w": (6, 4)}),
    "quick GELU": (
        "h = MatMul(x, v) t = Sigmoid(h) k = Mul(h, t) y = MatMul(k, w)",
        {"v": (8, 6), "w": (6, 4)},
    ),
    "a residual in front of the norm's input is fine, behind it is not": (
        "h = LayerNormalization(x, n) k = Add(h, x) y = MatMul(k, w)",
        {"n": (8,), "w": (8, 4)},
    ),
    "a weight that two layers read": (
        "h = MatMul(x, v) k = MatMul(h, v) t = Tanh(k) z = Add(h, t) y = MatMul(z, w)",
        {"v": (8, 8), "w": (8, 4)},
    ),
    "a norm's scale that two norms read": (
        "h = LayerNormalization(x, n) k = LayerNormalization(h, n) y = MatMul(k, w)",
        {"n": (8,), "w": (8, 4)},
    ),
    "half of a layer, where the whole is needed as it is": (
        "h = MatMul(x, v) a, c = Split<axis=-1, num_outputs=2>(h) t = Tanh(h) k = MatMul(t, q) z = Add(a, b) y = MatMul(z, w)",
        {"v": (8, 8), "q": (8, 4), "b": (4,), "w": (4, 4)},
    ),
    "slices that overlap": (
        "h = MatMul(x, v) a = Slice(h, i0, i6, i2) c = Slice(h, i4, i10, i2) t = Tanh(a) k = Mul(t, c) y = MatMul(k, w)",
        {"v": (8, 12), "w": (6, 4), "i0": [0], "i6": [6], "i4": [4], "i10": [10], "i2": [2]},
    ),
    "one bias for all": ("h = MatMul(x, v) k = Add(h, b) y = MatMul(k, w)", {"v": (8, 6), "b": (1,), "w": (6, 4)}),
    "a bias that is a table read twice": (
        "h = MatMul(x, v) k = Add(h, b) z = MatMul(k, w) y = Add(z, b)",
        {"v": (8, 4), "b": (4,), "w": (4, 4)},
    ),
    "a transposed row": (
        "h = MatMul(x, v) k = Transpose<perm=[0, 2, 1]>(h) y = MatMul(k, w)",
        {"v": (8, 6), "w": (4, 4)},
    ),
    "a norm over two dimensions": (
        "h = LayerNormalization<axis=1>(x, n) y = MatMul(h, w)",
        {"n": (4, 8), "w": (8, 4)},
    ),
    "an input": ("y = MatMul(x, w)", {"w": (8, 4)}),
    "a sum of two": (
        "h = MatMul(x, v) k = MatMul(x, q) z = Add(h, k) y = MatMul(z, w)", {"v": (8, 6), "q": (8, 6), "w": (6, 4)},
    ),
    "softmax": ("h = MatMul(x, v) k = Softmax(h) y = MatMul(k, w)", {"v": (8, 6), "w": (6, 4)}),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_FOLDS)
def test_what_takes_no_factors(case: str) -> None:
    body, weights = NO_FOLDS[case]
    assert find_fold(last_layer(parsed(body, **weights))) is None


def test_a_value_that_something_else_reads() -> None:
    body = "h = LayerNormalization(x, n) z = MatMul(h, w) t = Tanh(h) y = Add(z, t)"
    model = parsed(body, n=(8,), w=(8, 8))
    assert consumers_of(last_layer(model)) is None


def test_a_float16_scale_that_cannot_hold_the_result_is_left() -> None:
    model = parsed("h = LayerNormalization(x, n, b) y = MatMul(h, w)", n=(8,), b=(8,), w=(8, 4))
    norm = model.graph.initializers["n"]
    norm.const_value = ir.Tensor(np.full(8, 100, np.float16), name="n")
    fold = find_fold(last_layer(model))
    assert fold is not None
    before = {v.name: np.array(v.const_value.numpy()) for v in fold.targets if v.const_value}
    assert not fold.divide(np.full(8, 1e-3, np.float32))
    assert all((np.asarray(v.const_value.numpy()) == before[v.name]).all() for v in fold.targets if v.const_value)
    assert fold.divide(np.full(8, 0.5, np.float32))
    assert norm.const_value.dtype == ir.DataType.FLOAT16


def test_tied_factors() -> None:
    fold = Fold(np.array([0, 1, 0, 1]), [])
    tied = fold.tie(np.array([1, 2, 4, 8], np.float32))
    np.testing.assert_allclose(tied, [2, 4, 2, 4], rtol=1e-6)
    np.testing.assert_allclose(Fold(np.arange(3), []).tie(np.array([1, 2, 3], np.float32)), [1, 2, 3], rtol=1e-6)


def test_a_cache_from_outside_stays(tiny: Callable[[str], Tiny]) -> None:
    """Keys and values of pictures come from another part: what reads them has no place for factors."""
    bundle = tiny("flamingo-every-second").bundle
    graph = load_graph(bundle / "onnx" / "decoder.onnx")
    without = [value for value, readers, fold in folds_of(graph) if readers and fold is None]
    assert len(without) == 2
    assert all(value.producer().op_type == "Reshape" for value in without)  # type: ignore[union-attr]
