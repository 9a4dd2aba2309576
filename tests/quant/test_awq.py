"""The factors of AWQ against the search written out plainly, and against doing nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
from edgevlm.quant.awq import search_factors
from edgevlm.quant.rtn import quantize_blocks

Trip = Callable[[np.ndarray], np.ndarray]


def rounding(block: int, low: int = -8, high: int = 7) -> Trip:
    def round_trip(weight: np.ndarray) -> np.ndarray:
        codes, scales = quantize_blocks(weight, block, low, high, np.dtype(np.float32))
        return codes * np.repeat(scales, block, 0)[: len(codes)]

    return round_trip


def alike(factors: np.ndarray) -> np.ndarray:
    return factors


def layer(inner: int, outers: list[int], outliers: int, rows: int = 200) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Rows of which some inputs are thirty times as loud, their mean magnitudes, and weights."""
    rng = np.random.default_rng(inner)
    loud = np.ones(inner)
    loud[rng.permutation(inner)[:outliers]] = 30
    x = (rng.standard_normal((rows, inner)) * loud).astype(np.float32)
    return x, np.abs(x).mean(0), [rng.standard_normal((inner, outer)).astype(np.float32) for outer in outers]


def loss(rows: np.ndarray, weights: list[np.ndarray], factors: np.ndarray, trip: Trip) -> float:
    """What rounding the scaled weights does to the layers' outputs."""
    off = [(rows / factors) @ trip(w * factors[:, None]) - rows @ w for w in weights]
    return float(sum(np.square(o, dtype=np.float64).sum() for o in off))


def powers(mean: np.ndarray) -> list[np.ndarray]:
    """`mean|x|ᵅ` around 1, for every α of the grid."""
    grid = [mean.astype(np.float64) ** (step / 20) for step in range(21)]
    return [factors / np.sqrt(factors.max() * factors.min()) for factors in grid]


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("outers", [[24], [24, 8, 40]])
def test_the_best_of_the_grid(outers: list[int], block: int) -> None:
    rows, mean, weights = layer(64, outers, 3)
    found = search_factors(rows, mean, weights, rounding(block), alike)
    losses = [loss(rows, weights, factors.astype(np.float32), rounding(block)) for factors in powers(mean)]
    assert loss(rows, weights, found, rounding(block)) == pytest.approx(min(losses), rel=1e-3)
    np.testing.assert_allclose(found, powers(mean)[int(np.argmin(losses))], rtol=1e-3)


@pytest.mark.parametrize(("outliers", "share"), [(1, 0.5), (4, 0.5)])
@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-4, 3)])
def test_loud_inputs_lose_less(outliers: int, share: float, low: int, high: int) -> None:
    rows, mean, weights = layer(128, [64], outliers)
    trip = rounding(32, low, high)
    found = search_factors(rows, mean, weights, trip, alike)
    assert loss(rows, weights, found, trip) < share * loss(rows, weights, np.ones_like(found), trip)
    loud = mean > 10
    assert found[loud].min() > found[~loud].max(), "the loud ones are larger in the weights"


@pytest.mark.parametrize("seed", range(8))
def test_never_worse_than_doing_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    inner = int(rng.integers(1, 70))
    rows = rng.standard_normal((int(rng.integers(1, 40)), inner)).astype(np.float32) ** 3
    weights = [rng.standard_normal((inner, int(rng.integers(1, 20)))).astype(np.float16) for _ in range(2)]
    found = search_factors(rows, np.abs(rows).mean(0), weights, rounding(16), alike)
    wide = [weight.astype(np.float32) for weight in weights]
    assert loss(rows, wide, found, rounding(16)) <= loss(rows, wide, np.ones_like(found), rounding(16)) * (1 + 1e-6)


def test_a_rounding_that_loses_nothing_is_left_alone() -> None:
    rows, mean, weights = layer(32, [8], 2)
    np.testing.assert_array_equal(search_factors(rows, mean, weights, alike, alike), np.ones(32))


def test_what_is_tied_is_equal_and_chosen_as_such() -> None:
    rows, mean, weights = layer(64, [32], 4)

    def pairs(factors: np.ndarray) -> np.ndarray:
        return np.exp(np.log(factors).reshape(-1, 2).mean(1)).repeat(2).astype(np.float32)

    found = search_factors(rows, mean, weights, rounding(32), pairs)
    np.testing.assert_array_equal(found[::2], found[1::2])
    losses = [loss(rows, weights, pairs(factors), rounding(32)) for factors in powers(mean)]
    assert loss(rows, weights, found, rounding(32)) == pytest.approx(min(losses), rel=1e-3)
    assert (found != 1).any()


@pytest.mark.filterwarnings("error")
def test_inputs_that_are_silent_or_deafening() -> None:
    """Factors stay within what a float16 norm holds."""
    rows, _, weights = layer(64, [32], 0)
    rows[:, 0], rows[:, 1], rows[:, 2] = 0, rows[:, 1] * 1e8, rows[:, 2] * 1e-8
    found = search_factors(rows, np.abs(rows).mean(0), weights, rounding(32), alike)
    assert np.isfinite(found).all()
    assert found.min() >= 1e-3
    assert found.max() <= 1e3
    loud = np.float32(1e25)
    rows, mean, weights = layer(64, [32], 3)
    wanted = search_factors(rows, mean, weights, rounding(32), alike)
    np.testing.assert_allclose(search_factors(rows, mean * loud, weights, rounding(32), alike), wanted, rtol=1e-3)
    nothing = search_factors(rows * 0, np.zeros(64, np.float32), weights, rounding(32), alike)
    np.testing.assert_array_equal(nothing, np.ones(64))
