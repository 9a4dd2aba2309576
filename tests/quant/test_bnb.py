"""NF4 and FP4: what ONNX Runtime's operator computes with is what bitsandbytes dequantizes, bit for bit."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
import torch
from bitsandbytes import functional as bitsandbytes

from edgevlm import VLM, tensors
from edgevlm.bundle import Bundle
from edgevlm.errors import MissingDependencyError, RecipeError, WeightsError
from edgevlm.graphs import part_record, save_graph
from edgevlm.quant import bnb
from edgevlm.quant.quantize import quantize_bundle
from edgevlm.quant.recipe import Recipe, Rule
from edgevlm.tensors import StoredTensor, StreamedTensor, WeightEntry

METHODS = ["nf4", "fp4"]
FLOATS = {np.float32: ir.DataType.FLOAT, np.float16: ir.DataType.FLOAT16}


def graph_of(weight: ir.TensorProtocol, readers: int = 1) -> ir.Model:
    """x `[rows, K]` times a weight `[K, N]`, as often as asked."""
    inner, outer = weight.shape.numpy()
    x = ir.Value(name="x", shape=ir.Shape(["rows", inner]), type=ir.TensorType(weight.dtype))
    value = ir.Value(name="w", shape=weight.shape, type=ir.TensorType(weight.dtype), const_value=weight)
    nodes = [ir.Node("", "MatMul", [x, value], name=f"product_{n}") for n in range(readers)]
    for number, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].shape = f"y{number}", ir.Shape(["rows", outer])
        node.outputs[0].dtype = weight.dtype
    graph = ir.Graph([x], [n.outputs[0] for n in nodes], nodes=nodes, initializers=[value], opset_imports={"": 24}, name="g")
    return ir.Model(graph, ir_version=11)


def replaced(weight: ir.TensorProtocol, rule: Rule, readers: int = 1) -> ir.Model:
    model = graph_of(weight, readers)
    for node in list(model.graph):
        bnb.replace_matmul(model.graph, node, model.graph.initializers["w"], rule)
    del model.graph.initializers["w"]
    return model


def products(model: ir.Model, folder: Path, inner: int) -> list[np.ndarray]:
    """What the written graph makes of the identity matrix: the weights that it computes with."""
    save_graph(model, folder / "part.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(folder / "part.onnx"), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(inner, dtype=model.graph.inputs[0].dtype.numpy())})


def dequantized(weight: np.ndarray, block_size: int, method: str) -> np.ndarray:
    """bitsandbytes there and back, `[K, N]`. As one row: where blocks run over several, its CPU kernel is wrong (0.50.2)."""
    flat = torch.from_numpy(np.ascontiguousarray(weight.T).reshape(-1))
    packed, state = bitsandbytes.quantize_4bit(flat, blocksize=block_size, quant_type=method)
    return bitsandbytes.dequantize_4bit(packed, state).numpy().reshape(weight.shape[::-1]).T


def random(inner: int, outer: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((inner, outer)).astype(dtype)


SHAPES = [(64, 3), (128, 5), (256, 2), (96, 7), (100, 9), (33, 5), (63, 2), (130, 6), (1, 77), (7, 1), (1, 1)]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("block_size", bnb.BLOCK_SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_bitsandbytes_own(method: str, block_size: int, dtype: Any, tmp_path: Path) -> None:
    for inner, outer in SHAPES:
        weight = random(inner, outer, dtype)
        (found,) = products(replaced(ir.tensor(weight, name="w"), Rule(method, block_size=block_size)), tmp_path, inner)
        expected = dequantized(weight, block_size, method)
        assert found.dtype == expected.dtype == dtype
        assert np.array_equal(found, expected), (inner, outer)
        assert not np.array_equal(found, weight) or inner * outer == 1


@pytest.mark.parametrize("method", METHODS)
def test_as_a_matrix_where_bitsandbytes_takes_one(method: str, tmp_path: Path) -> None:
    weight = random(128, 6)
    packed, state = bitsandbytes.quantize_4bit(torch.from_numpy(weight.T.copy()), blocksize=64, quant_type=method)
    expected = bitsandbytes.dequantize_4bit(packed, state).numpy()
    model = replaced(ir.tensor(weight, name="w"), Rule(method))  # 64 is bitsandbytes' own block size
    (found,) = products(model, tmp_path, 128)
    assert np.array_equal(found, expected.T)
    stored = model.graph.initializers[f"w.{method}"].const_value
    assert stored is not None
    assert np.array_equal(stored.numpy(), packed.numpy().reshape(-1))


@pytest.mark.parametrize("method", METHODS)
def test_zero_blocks_and_extremes(method: str, tmp_path: Path) -> None:
    weight = random(64, 8)
    weight[:, 1] = 0
    weight[:, 2] = -0.0
    weight[:, 3] *= 1e-30
    weight[:, 4] *= 1e30
    weight[5, 5] = 1e4
    weight[:, 7] = 0
    (found,) = products(replaced(ir.tensor(weight, name="w"), Rule(method)), tmp_path, 64)
    assert np.array_equal(found, dequantized(weight, 64, method))
    assert not found[:, [1, 2, 7]].any()
    zeros = np.zeros((33, 3), np.float16)
    (found,) = products(replaced(ir.tensor(zeros, name="w"), Rule(method)), tmp_path, 33)
    assert not found.any()


def test_pieces_and_order_of_writing_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(100, 37)
    whole, state = bitsandbytes.quantize_4bit(torch.from_numpy(weight.T.reshape(-1).copy()), blocksize=64, quant_type="nf4")
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 1300)  # three columns
    monkeypatch.setattr(bnb, "_AT_ONCE", 128)
    for first, second in (("w.nf4", "w.absmax"), ("w.absmax", "w.nf4")):
        model = replaced(ir.tensor(weight, name="w"), Rule("nf4"))
        made = {name: model.graph.initializers[name].const_value.numpy() for name in (first, second)}  # type: ignore[union-attr]
        again = {name: model.graph.initializers[name].const_value.numpy() for name in (first, second)}  # type: ignore[union-attr]
        for arrays in (made, again):
            assert np.array_equal(arrays["w.nf4"], whole.numpy().reshape(-1))
            assert np.array_equal(arrays["w.absmax"], state.absmax.numpy())
    pieces = list(bnb._Quantized(ir.tensor(weight, name="w"), 64, "nf4").codes())
    assert max(piece.size for piece in pieces) <= 64
    assert len(pieces) > 20


def test_a_checkpoints_weight_is_read_where_it_lies(tmp_path: Path) -> None:
    stored = random(9, 40)
    (tmp_path / "weights").write_bytes(b"12" + stored.tobytes())
    entry = WeightEntry(tmp_path / "weights", 2, (9, 40), "F32")
    for dtype, kind in FLOATS.items():
        lazy = StoredTensor(entry, kind, "w", transposed=True)
        (found,) = products(replaced(lazy, Rule("nf4")), tmp_path, 40)
        assert np.array_equal(found, dequantized(stored.T.astype(dtype), 64, "nf4"))


def test_two_readers_share_one_weight(tmp_path: Path) -> None:
    weight = random(48, 5)
    model = replaced(ir.tensor(weight, name="w"), Rule("fp4", block_size=32), readers=2)
    assert sorted(model.graph.initializers) == ["w.absmax", "w.fp4"]
    one, two = products(model, tmp_path, 48)
    assert np.array_equal(one, two)


def test_form_and_what_is_said_of_it() -> None:
    model = replaced(ir.tensor(random(64, 3), name="w"), Rule("nf4"))
    (node,) = model.graph
    assert (node.domain, node.op_type, node.name) == ("com.microsoft", "MatMulBnb4", "product_0")
    assert {name: node.attributes.get_int(name) for name in node.attributes} == {
        "K": 64, "N": 3, "block_size": 64, "quant_type": 1,
    }  # fmt: skip
    assert model.opset_imports == {"": 24, "com.microsoft": 1}
    assert model.graph.outputs[0].name == "y0"
    record = part_record(model, "part.onnx")
    assert record.onnxruntime_only == ("com.microsoft::MatMulBnb4",)
    assert record.weights == {"float32": 3 * 4, "uint8": 96}
    assert part_record(graph_of(ir.tensor(random(64, 3), name="w")), "part.onnx").onnxruntime_only == ()


@pytest.mark.parametrize("block_size", [0, 16, 48, 512, 4096])
def test_block_sizes_that_one_of_both_does_not_take(block_size: int) -> None:
    with pytest.raises(RecipeError, match=rf"weight w is to be nf4 in blocks of {block_size}; .* take 32, 64, 128, 256"):
        replaced(ir.tensor(random(64, 3), name="w"), Rule("nf4", block_size=block_size))


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, np.float32), (np.inf, np.float16), (1e6, np.float16)])
def test_weights_that_are_not_finite(value: float, dtype: Any) -> None:
    weight = random(64, 70)
    weight[3, 69] = value

    def rows() -> Any:
        yield weight

    lazy = StreamedTensor(rows, FLOATS[dtype], (64, 70), "w")
    model = replaced(lazy, Rule("nf4"))
    with pytest.raises(WeightsError, match=f"The weight w has NaN or infinite values in {np.dtype(dtype).name}"):
        model.graph.initializers["w.nf4"].const_value.numpy()  # type: ignore[union-attr]


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def blocked(name: str, *rest: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(MissingDependencyError, match=r"edgevlm\[bnb\]"):
        replaced(ir.tensor(random(64, 3), name="w"), Rule("nf4"))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_bundle_answers(llava: Callable[[str], Any], method: str, dtype: str, tmp_path: Path) -> None:
    recipe = Recipe(method, (Rule("float", "decoder", "*lm_head*"), Rule(method, "decoder"), Rule(method, "projector")))
    source = llava("odd-widths").export(dtype)  # 60 and 100 inputs: blocks run over several rows
    quantize_bundle(source, tmp_path / "bundle", recipe)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert {n for n, part in manifest.parts.items() if part.onnxruntime_only} == {"decoder", "projector"}
    reply = VLM.load(tmp_path / "bundle", capacity=128, threads=1).generate("How many?", max_new_tokens=5)
    assert len(reply.tokens) == 5 or reply.finish_reason == "stop"

    def logits(bundle: Path) -> np.ndarray:
        from edgevlm.runtimes import open_part

        part = Bundle.open(bundle).manifest.parts["decoder"]
        session, _ = open_part(bundle / part.file, "decoder", part, backend="cpu", threads=1)
        rng = np.random.default_rng(0)
        names = {
            n: [2 if d == "batch_size" else 7 if isinstance(d, str) else d for d in i.shape] for n, i in part.inputs.items()
        }
        feeds: dict[str, np.ndarray] = {n: rng.standard_normal(s, np.float32) for n, s in names.items()}
        feeds |= {"position_ids": np.tile(np.arange(7), (2, 1)), "last_token_index": np.array([6, 6])}
        return session.run(feeds)["logits"].astype(np.float32)

    exact, found = logits(source), logits(tmp_path / "bundle")
    assert 0 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.4
