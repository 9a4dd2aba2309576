"""Searched scales against rounding to nearest and against trying very many scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("onnx_ir")

from edgevlm.quant.rtn import round_to_codes, usable_scales
from edgevlm.quant.scales import search_scales


def loss(weight: np.ndarray, scale: np.ndarray, importance: np.ndarray, low: int, high: int) -> np.ndarray:
    stored, inverse = usable_scales(scale.astype(np.float32), 1, np.dtype(np.float32))
    codes = round_to_codes(weight * inverse, np.float32(1), low, high)
    error = weight.astype(np.float64) - codes * stored.astype(np.float64)
    return (importance.reshape(len(weight), -1) * np.square(error)).sum(0)


def peaks(weight: np.ndarray) -> np.ndarray:
    return np.take_along_axis(weight, np.abs(weight).argmax(0)[None], 0)[0]


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-4, 3), (-127, 127)])
@pytest.mark.parametrize("inner", [1, 2, 32, 333])
def test_better_than_the_peak_and_near_the_best(inner: int, low: int, high: int) -> None:
    rng = np.random.default_rng(inner)
    weight = (rng.standard_normal((inner, 20)) ** 3).astype(np.float32)
    for importance in (rng.uniform(0, 1, inner), rng.uniform(0, 1, (inner, 20)), np.ones(inner)):
        scale = search_scales(weight, importance, low, high)
        found = loss(weight, scale, importance, low, high)
        plain = loss(weight, peaks(weight) / low, importance, low, high)
        assert (found <= plain * (1 + 1e-4) + 1e-12).all()
        many = [peaks(weight) / end * part for end in (low, high) for part in np.linspace(0.05, 1.05, 300)]
        best = np.min([loss(weight, scale, importance, low, high) for scale in many], 0).sum()
        if inner > 2:
            assert found.sum() <= 1.1 * best


FINITE = st.floats(-1e4, 1e4, width=32)


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=FINITE))
def test_never_worse_than_the_peak(weight: np.ndarray) -> None:
    importance = np.arange(len(weight)) % 3
    scale = search_scales(weight, importance, -8, 7)
    assert np.isfinite(scale).all()
    usable = np.abs(peaks(weight)) > 1e-30
    even = np.ones_like(importance) if not importance.any() else importance
    found, plain = (loss(weight, s, even, -8, 7) for s in (scale, peaks(weight) / -8))
    assert (found <= plain * (1 + 1e-3) + 1e-9 * np.square(peaks(weight), dtype=np.float64))[usable].all()


def test_nothing_to_weigh() -> None:
    weight = np.zeros((16, 3), np.float32)
    weight[:, 1] = np.linspace(-3, 2, 16)
    scale = search_scales(weight, np.zeros(16), -8, 7)
    assert scale[0] == scale[2] == 0
    np.testing.assert_array_equal(scale, search_scales(weight, np.full(16, 5.0), -8, 7))
    huge = search_scales(weight * np.float32(1e37), np.full(16, 1e-30), -8, 7)
    np.testing.assert_allclose(huge, scale * np.float32(1e37), rtol=1e-4)
