"""GPTQ against the paper's algorithm done one weight at a time, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
import onnx_ir as ir

from edgevlm.errors import RecipeError
from edgevlm.quant import gptq, rtn
from edgevlm.quant.gptq import quantize

FLOAT = np.dtype(np.float32)
INT4, INT3, INT8 = (-8, 7), (-4, 3), (-128, 127)


def layer(inner: int, outer: int, rows: int = 400, seed: int = 0, mix: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the Gram matrix of inputs that go together and differ in size."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((inner, outer)).astype(np.float32)
    mixing = mix * rng.standard_normal((inner, inner)) / np.sqrt(inner) + 0.3 * np.eye(inner)
    x = rng.standard_normal((rows, inner)) @ mixing * 10.0 ** rng.uniform(-0.5, 0.5, inner)
    return weight, (x.T @ x).astype(np.float32)


def restored(codes: np.ndarray, scales: np.ndarray, block: int) -> np.ndarray:
    return codes * np.repeat(scales.astype(np.float64), min(block or len(codes), len(codes)), 0)[: len(codes)]


def output_error(weight: np.ndarray, found: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Of each output channel: the diagonal of ΔᵀGΔ."""
    delta = weight.astype(np.float64) - found
    return np.einsum("kn,kn->n", delta, gram.astype(np.float64) @ delta)


def nearest(weight: np.ndarray, block: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounding to nearest as `rtn` does it, for any range."""
    return quantize(weight, np.eye(len(weight), dtype=np.float32), block, low, high, FLOAT)


def by_the_paper(
    weight: np.ndarray, gram: np.ndarray, scales: np.ndarray, block: int, low: int, high: int, *, act_order: bool, damp: float
) -> np.ndarray:
    """One input at a time; after each, all others move, and the inverse loses a row and a column (OBQ's equations 2 and 3)."""
    matrix = gram.astype(np.float64)
    dead = np.diag(matrix) == 0
    mean = np.diag(matrix)[~dead].mean()
    matrix[np.diag_indices_from(matrix)] += np.where(dead, mean, damp * mean)
    inverse = np.linalg.inv(matrix)
    left, codes = weight.astype(np.float64), np.zeros(weight.shape, np.int8)
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(len(weight))
    for k in order:
        scale = scales[k // min(block or len(weight), len(weight))].astype(np.float64)
        codes[k] = np.clip(np.rint(left[k] / scale), low, high)
        error = (left[k] - codes[k] * scale) / inverse[k, k]
        left -= np.outer(inverse[:, k], error)
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("inner", "outer", "block", "bits"),
    [(64, 8, 32, INT4), (300, 6, 32, INT4), (33, 5, 16, INT3), (129, 3, 0, INT4), (50, 4, 64, INT3), (17, 2, 16, INT8)],
)
def test_is_the_papers_algorithm(inner: int, outer: int, block: int, bits: tuple[int, int], act_order: bool) -> None:
    weight, gram = layer(inner, outer, seed=inner)
    if inner == 64:
        gram[5], gram[:, 5] = 0, 0
    codes, scales = quantize(weight, gram, block, *bits, FLOAT, act_order=act_order, damp=0.02)
    expected = by_the_paper(weight, gram, scales, block, *bits, act_order=act_order, damp=0.02)
    plain = output_error(weight, restored(*nearest(weight, block, *bits), block), gram)
    better = output_error(weight, restored(expected, scales, block), gram) < plain
    assert better.mean() > 0.7, "the setting hardly tells the two apart"
    assert (codes != expected)[:, better].mean() < 2e-3  # ties that float32 turns the other way
    np.testing.assert_allclose(
        output_error(weight, restored(codes, scales, block), gram)[better],
        output_error(weight, restored(expected, scales, block), gram)[better],
        rtol=1e-2,
    )


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [INT4, INT3])
@pytest.mark.parametrize("rows", [5, 60, 1000])
@pytest.mark.parametrize(("inner", "outer", "block"), [(96, 16, 32), (41, 1, 16), (200, 40, 0), (1, 3, 32), (2, 1, 16)])
def test_never_worse_than_rounding_to_nearest(
    inner: int, outer: int, block: int, rows: int, bits: tuple[int, int], act_order: bool
) -> None:
    for seed in range(3):
        weight, gram = layer(inner, outer, rows, seed)
        codes, scales = quantize(weight, gram, block, *bits, FLOAT, act_order=act_order)
        plain, same_scales = nearest(weight, block, *bits)
        np.testing.assert_array_equal(scales, same_scales)
        mine = output_error(weight, restored(codes, scales, block), gram)
        theirs = output_error(weight, restored(plain, scales, block), gram)
        assert (mine <= theirs * (1 + 1e-4) + 1e-9).all()
        if outer > 10:
            assert mine.sum() < 0.9 * theirs.sum()
        assert codes.dtype == np.int8
        assert bits[0] <= codes.min()
        assert codes.max() <= bits[1]


@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(64, 8), (33, 5), (1, 9), (130, 7)])
@pytest.mark.parametrize("block", [16, 32])
def test_independent_inputs_are_rounded_to_nearest(shape: tuple[int, int], block: int, scale_dtype: type) -> None:
    weight, _ = layer(*shape)
    weight[:, 0] = 0
    weight[:16, -1] = 0
    diagonal = np.random.default_rng(1).uniform(0.01, 100, shape[0])
    diagonal[::7] = 0
    packed, expected_scales = rtn.quantize_int4(ir.tensor(weight), block, np.dtype(scale_dtype))
    for act_order in (True, False):
        codes, scales = quantize(weight, np.diag(diagonal), block, *INT4, np.dtype(scale_dtype), act_order=act_order)
        np.testing.assert_array_equal(codes, rtn.unpack_int4(packed, shape).astype(np.int8))
        np.testing.assert_array_equal(scales, expected_scales)
        assert scales.dtype == scale_dtype


def test_inputs_never_seen() -> None:
    weight, gram = layer(64, 10)
    dead = [0, 7, 63]
    gram[dead], gram[:, dead] = 0, 0
    codes, scales = quantize(weight, gram, 32, *INT4, FLOAT)
    np.testing.assert_array_equal(codes[dead], nearest(weight, 32, *INT4)[0][dead])
    alive = [k for k in range(64) if k not in dead]
    assert (codes[alive] != nearest(weight, 32, *INT4)[0][alive]).any()
    nothing, _ = quantize(weight, np.zeros((64, 64), np.float32), 32, *INT4, FLOAT)
    np.testing.assert_array_equal(nothing, nearest(weight, 32, *INT4)[0])
    assert scales.shape == (2, 10)


def test_one_row_of_calibration_fits_exactly_where_it_can() -> None:
    """The Gram matrix of one row has rank one: all of the error is in one direction, and damping alone holds the rest."""
    weight, _ = layer(48, 6)
    row = np.random.default_rng(3).standard_normal((1, 48))
    for scale in (1e-4, 1.0, 1e4):
        gram = (scale * row).T @ (scale * row)
        codes, scales = quantize(weight, gram, 16, *INT4, FLOAT)
        mine = output_error(weight, restored(codes, scales, 16), gram).sum()
        assert mine < 0.05 * output_error(weight, restored(*nearest(weight, 16, *INT4), 16), gram).sum()


def test_damping_grows_where_the_matrix_needs_it() -> None:
    weight, gram = layer(40, 4, rows=3)
    gram = gram.astype(np.float64)
    gram -= 0.05 * np.trace(gram) / 40 * np.eye(40)  # what a sum in low precision may look like: not positive definite
    gram[np.diag_indices(40)] = np.maximum(np.diag(gram), 1e-3)
    codes, scales = quantize(weight, gram, 16, *INT4, FLOAT)
    assert np.isfinite(scales).all()
    assert codes.any()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda w, g: (w, g[:-1]), r"needs a matrix of 20 by 20 activations, not \(19, 20\)"),
        (lambda w, g: (w, np.where(np.eye(20) > 0, np.nan, g)), "NaN or infinite"),
        (lambda w, g: (w, np.where(np.eye(20) > 0, g, np.inf)), "NaN or infinite"),
        (lambda w, g: (w, np.where(np.eye(20) > 0, g, 1e6 * g.max())), "Calibrate with more samples"),
        (lambda w, g: (np.where(w == w.max(), np.nan, w), g), "The weights have NaN or infinite values"),
    ],
)
def test_bad_input(spoil: object, says: str) -> None:
    weight, gram = spoil(*layer(20, 3))  # type: ignore[operator]
    with pytest.raises(RecipeError, match=says):
        quantize(weight, gram, 16, *INT4, FLOAT)


def test_searched_scales_do_not_lose() -> None:
    """Three bits over a whole channel of many inputs: the step that fits the largest weight is too coarse for the rest."""
    weight, gram = layer(256, 12, rows=1000)
    plain, searched = (quantize(weight, gram, 0, *INT3, FLOAT, importance=i) for i in (None, np.diag(gram)))
    errors = [output_error(weight, restored(*found, 0), gram).sum() for found in (plain, searched)]
    assert errors[1] < 0.9 * errors[0]


def test_same_bytes_however_it_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = layer(150, 20)
    first = quantize(weight, gram, 32, *INT4, FLOAT)
    again = quantize(weight.astype(np.float64), gram, 32, *INT4, FLOAT)
    before = weight.copy(), gram.copy()
    monkeypatch.setattr(gptq, "_STRIP", 1)
    strips = quantize(weight, gram, 32, *INT4, FLOAT)
    for other in (again, strips):
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)
    monkeypatch.setattr(gptq, "_CHANNELS", 7)
    assert (quantize(weight, gram, 32, *INT4, FLOAT)[0] != first[0]).mean() < 1e-3
    np.testing.assert_array_equal(before[0], weight)
    np.testing.assert_array_equal(before[1], gram)
