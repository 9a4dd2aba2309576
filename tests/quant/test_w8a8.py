"""The scales of activations against what they should be, where their pairs are, and the integer products they become."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
import onnx_ir as ir
import onnxruntime as ort
from recorded import relative, run

from edgevlm.bundle import Bundle
from edgevlm.calibration import load_calibration
from edgevlm.quant.calibrate import InputStats
from edgevlm.quant.quantize import quantize_bundle
from edgevlm.quant.w8a8 import activation_scale, quantize_input, stored_scale
from edgevlm.runtimes import open_part

RANGES = ("minmax", "percentile", "mse")


def stats_of(rows: np.ndarray) -> InputStats:
    rows = rows.astype(np.float32)
    return InputStats(len(rows), rows, np.abs(rows).max(0), np.abs(rows).mean(0))


def loss(rows: np.ndarray, scale: float) -> float:
    rounded = np.clip(np.rint(rows / scale), -127, 127) * scale
    return float(np.square(rounded - rows).sum())


# --------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("shape", [(1, 1), (200, 33), (1024, 300)])
def test_scales(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).standard_normal(shape) * 3 - 1
    stats = stats_of(rows)
    stats.peak = stats.peak * 2  # rows are some of all; the peak is that of all
    magnitude = np.abs(stats.rows)
    assert activation_scale(stats, "minmax") == pytest.approx(2 * magnitude.max() / 127)
    assert activation_scale(stats, "percentile") == pytest.approx(np.percentile(magnitude, 99.99) / 127)
    found = activation_scale(stats, "mse")
    tried = [2 * magnitude.max() / 127 * share for share in np.linspace(1, 0.1, 46)]
    assert found == pytest.approx(min(tried, key=lambda scale: loss(stats.rows, scale)))


@pytest.mark.parametrize("degrees", [2, 3])
def test_heavy_tails_lose_less_by_squared_error(degrees: int) -> None:
    rows = np.random.default_rng(1).standard_t(degrees, (1000, 64))
    stats = stats_of(rows)
    scales = {how: activation_scale(stats, how) for how in RANGES}
    assert scales["percentile"] < scales["minmax"]
    assert scales["mse"] < scales["minmax"]
    losses = {how: loss(stats.rows, scale) for how, scale in scales.items()}
    assert losses["mse"] < 0.9 * losses["minmax"]
    assert losses["mse"] <= losses["percentile"] * 1.02


@pytest.mark.parametrize("how", RANGES)
def test_silence(how: str) -> None:
    assert activation_scale(stats_of(np.zeros((20, 8))), how) == 1


@pytest.mark.parametrize("how", RANGES)
@pytest.mark.parametrize("loud", [1e-30, 1e30])
def test_hardly_anything_and_very_much(how: str, loud: float) -> None:
    rows = np.random.default_rng(2).standard_normal((50, 8))
    plain, scaled = (activation_scale(stats_of(rows * factor), how) for factor in (1, loud))
    assert scaled / loud == pytest.approx(plain, rel=1e-3)


def test_a_single_spike_among_zeros() -> None:
    """The percentile of almost nothing is zero, which is no scale."""
    rows = np.zeros((1000, 100))
    rows[3, 4] = 5
    assert activation_scale(stats_of(rows), "percentile") == pytest.approx(5 / 127)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e-7, 0.02, 100.0])
def test_the_inverse_of_a_stored_scale_is_finite(scale: float, dtype: ir.DataType) -> None:
    stored = stored_scale(scale, dtype)
    assert stored.dtype == dtype.numpy()
    assert stored.shape == ()
    assert stored > 0
    with np.errstate(over="raise"):
        assert np.isfinite(stored.dtype.type(1) / stored)
    if scale > 1e-3:
        assert float(stored) == pytest.approx(scale, rel=1e-3)


# ----------------------------------------------------------------------------------------------- pairs


def two_layers(dtype: str) -> ir.Model:
    """Two linear layers that read one value."""
    text = f"""<ir_version: 10, opset_import: ["" : 24]>
    g ({dtype}[n, 4] x) => ({dtype}[n, 3] y, {dtype}[n, 2] z) <{dtype}[n, 4] h> {{
        h = Identity(x)
        y = MatMul(h, v)
        z = MatMul(h, w)
    }}"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    rng, kind = np.random.default_rng(0), ir.DataType.FLOAT if dtype == "float" else ir.DataType.FLOAT16
    for number, (node, outer) in enumerate(zip(list(model.graph)[1:], (3, 2), strict=True)):
        node.name = f"layer{number}"
        array = rng.standard_normal((4, outer)).astype(kind.numpy())
        value = ir.Value(name=node.inputs[1].name, const_value=ir.tensor(array, name=node.inputs[1].name))  # type: ignore[union-attr]
        value.shape, value.dtype = ir.Shape(array.shape), kind
        model.graph.register_initializer(value)
        node.replace_input_with(1, value)
    return model


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_every_layer_has_a_pair_of_its_own(dtype: str, tmp_path: Path) -> None:
    model = two_layers(dtype)
    layers = [node for node in model.graph if node.op_type == "MatMul"]
    for node in layers:
        quantize_input(model.graph, node, 0.05)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 2
    for node in layers:
        widen = node.inputs[0].producer()  # type: ignore[union-attr]
        narrow = widen.inputs[0].producer()  # type: ignore[union-attr]
        assert (narrow.op_type, widen.op_type) == ("QuantizeLinear", "DequantizeLinear")  # type: ignore[union-attr]
        assert narrow.inputs[0].name == "h"  # type: ignore[union-attr]
        assert [value.name for value in narrow.inputs[1:]] == [value.name for value in widen.inputs[1:]]  # type: ignore[union-attr]
        assert len(list(widen.outputs[0].uses())) == len(list(narrow.outputs[0].uses())) == 1  # type: ignore[union-attr]
    x = np.random.default_rng(1).uniform(-9, 9, (6, 4)).astype(np.float32 if dtype == "float" else np.float16)
    (found,) = run(model, [{"x": x}], tmp_path)
    onnx.checker.check_model(str(tmp_path / "graph.onnx"), full_check=True)
    rounded = np.clip(np.rint(x.astype(np.float32) / np.float32(0.05)), -128, 127) * 0.05
    for node, name in zip(layers, "yz", strict=True):
        weight = node.inputs[1].const_value.numpy().astype(np.float32)  # type: ignore[union-attr]
        assert relative(found[name], rounded @ weight) < (1e-4 if dtype == "float" else 5e-3)


# ------------------------------------------------------------------------------------ integer products


@pytest.fixture(scope="module")
def eight_bits(tiny: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("w8a8") / "bundle"
            quantize_bundle(tiny(name).bundle, made[name], "w8a8", calibration=load_calibration(samples=4))
        return made[name]

    return make


@pytest.mark.parametrize("name", ["clip-llama", "blip2-opt-350m", "qwen2.5-vl-windows"])
def test_onnxruntime_multiplies_integers(
    eight_bits: Callable[[str], Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the runtime's own options: no linear layer with a pair stays a product of floats."""
    opened = Bundle.open(eight_bits(name), check_files=False)
    before = Counter(n.op_type for n in onnx.load(opened.part_path("vision_encoder"), load_external_data=False).graph.node)
    layers = before["QuantizeLinear"]
    assert layers >= 8
    session_options = ort.SessionOptions

    def options() -> ort.SessionOptions:
        made = session_options()
        made.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        return made

    monkeypatch.setattr(ort, "SessionOptions", options)
    part = opened.manifest.parts["vision_encoder"]
    open_part(opened.part_path("vision_encoder"), "vision_encoder", part, backend="cpu", threads=1)
    after = Counter(n.op_type for n in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node)
    integer = {"MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm"}
    assert sum(after[kind] for kind in integer) == layers, after
    assert after["QuantizeLinear"] <= layers
    assert after["MatMulNBits"] == 0, "eight bits of weights alone"


@pytest.mark.parametrize("name", ["clip-llama", "blip2-opt-350m", "qwen2.5-vl-windows"])
def test_vision_is_near_the_float_one(eight_bits: Callable[[str], Path], tiny: Callable[[str], Any], name: str) -> None:
    floats, integers = (Bundle.open(path, check_files=False) for path in (tiny(name).bundle, eight_bits(name)))
    feeds = load_calibration(samples=2, seed=9).feeds(floats, ["vision_encoder"], np.array)["vision_encoder"]
    found = []
    for opened in (floats, integers):
        part = opened.manifest.parts["vision_encoder"]
        session, _ = open_part(opened.part_path("vision_encoder"), "vision_encoder", part, backend="cpu", threads=1)
        found.append(np.concatenate([next(iter(session.run(dict(feed)).values())).ravel() for feed in feeds]))
    assert 0 < relative(found[1], found[0]) < 0.05
