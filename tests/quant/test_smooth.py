"""SmoothQuant's factors against its formula, and what they do to rounding in eight bits."""

from __future__ import annotations

import numpy as np
import pytest

from edgevlm.quant.smooth import smooth_factors


def problem(outers: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(len(outers))
    return rng.uniform(0.1, 50, 48).astype(np.float32), [rng.standard_normal((48, n)).astype(np.float32) for n in outers]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.85, 1])
@pytest.mark.parametrize("outers", [[16], [16, 3, 40]])
def test_formula(outers: list[int], share: float) -> None:
    """`max|x|ᵅ / max|w|¹⁻ᵅ`, the maximum over all layers that read it; up to a constant, whose middle is 1."""
    peak, weights = problem(outers)
    heavy = np.abs(np.concatenate(weights, 1)).max(1).astype(np.float64)
    wanted = peak.astype(np.float64) ** share / heavy ** (1 - share)
    found = smooth_factors(peak, weights, share)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found / found[0], wanted / wanted[0], rtol=1e-4)
    assert found.max() * found.min() == pytest.approx(1, rel=1e-4)


def test_a_share_of_nothing_and_of_all() -> None:
    peak, weights = problem([16])
    np.testing.assert_array_equal(smooth_factors(peak, weights, 0), np.ones(48))
    divided = peak / smooth_factors(peak, weights, 1)
    np.testing.assert_allclose(divided, divided[0], rtol=1e-4, err_msg="all inputs are as loud as each other")


def test_half_makes_both_sides_alike() -> None:
    peak, weights = problem([16])
    factors = smooth_factors(peak, weights, 0.5)
    ratio = (peak / factors) / (np.abs(weights[0]).max(1) * factors)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_wide_channels_lose_less() -> None:
    rng = np.random.default_rng(0)
    loud = np.where(np.arange(64) % 16 == 3, 60, 1)
    rows = (rng.standard_normal((300, 64)) * loud).astype(np.float32)
    weight = rng.standard_normal((64, 32)).astype(np.float32)

    def loss(factors: np.ndarray) -> float:
        x, w = rows / factors, weight * factors[:, None]
        steps = np.abs(x).max() / 127, np.abs(w).max(0) / 127
        rounded = (np.rint(x / steps[0]) * steps[0]) @ (np.rint(w / steps[1]) * steps[1])
        return float(np.square(rounded - rows @ weight).sum())

    factors = smooth_factors(np.abs(rows).max(0), [weight], 0.5)
    assert loss(factors) < 0.2 * loss(np.ones(64, np.float32))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("share", [0.3, 0.5, 1])
def test_silent_inputs_and_empty_weights(share: float) -> None:
    peak, weights = problem([16])
    peak[:3], weights[0][2:5] = 0, 0
    found = smooth_factors(peak, weights, share)
    assert np.isfinite(found).all()
    assert (found > 0).all()
    np.testing.assert_allclose(smooth_factors(peak * 0, [weights[0] * 0], share), 1, rtol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loud", [1e-25, 1e25])
def test_how_loud_all_are_changes_nothing(loud: float) -> None:
    peak, weights = problem([16])
    np.testing.assert_allclose(smooth_factors(peak * np.float32(loud), weights, 1), smooth_factors(peak, weights, 1), rtol=1e-3)


def test_half_precision_weights() -> None:
    peak, weights = problem([16])
    halves = [weight.astype(np.float16) for weight in weights]
    np.testing.assert_allclose(smooth_factors(peak, halves, 0.5), smooth_factors(peak, weights, 0.5), rtol=2e-3)
