"""AWQ: inputs with large activations are made larger in the weights before these are rounded, and smaller in what makes them.

J. Lin et al., "AWQ: Activation-aware Weight Quantization", https://arxiv.org/abs/2306.00978. Layers that read the same input
share factors `s = mean|x|ᵅ`; α is the one of 21 from 0 to 1 whose rounded weights change the layers' outputs least over the
calibration rows. With α = 0 nothing changes, so it is never worse there than rounding to nearest. Where the factors go is up
to `fold`; the scales of the blocks, AWQ's clipping, to `scales`.

Written here because AutoAWQ (archived) and llm-compressor do it to torch modules, with a list of layers for every architecture;
here the graph says what reads what, in every part of every family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["search_factors"]

_GRID = 20
#: Rows and output channels that the search looks at. Rows differ more than the channels of one layer do.
_ROWS, _CHANNELS = 512, 128


def search_factors(
    rows: np.ndarray,
    mean: np.ndarray,
    weights: Sequence[np.ndarray],
    round_trip: Callable[[np.ndarray], np.ndarray],
    tie: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Factors `[K]` for layers with the weights `[K, N]` that read rows `[R, K]` of mean magnitude `[K]`.

    `round_trip` is what quantization makes of a weight, `tie` makes factors equal that must be.
    """
    rows = rows[np.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).round().astype(int)]
    channels = [np.linspace(0, w.shape[1] - 1, min(_CHANNELS, w.shape[1])).round().astype(int) for w in weights]
    weights = [weight[:, picked].astype(np.float32) for weight, picked in zip(weights, channels, strict=True)]
    wanted = [rows @ weight for weight in weights]
    best, least = np.ones_like(mean), np.inf
    for step in range(_GRID + 1):
        factors = tie(_factors(mean, step / _GRID))
        scaled = rows / factors
        error = 0.0
        for weight, target in zip(weights, wanted, strict=True):
            rounded = round_trip(weight * factors[:, None])
            error += float(np.square(scaled @ rounded - target, dtype=np.float64).sum())
        if error < least:
            best, least = factors, error
    return best


def _factors(mean: np.ndarray, alpha: float) -> np.ndarray:
    """Around 1, and not so far from it that a float16 norm would lose them."""
    factors = np.maximum(mean, 1e-4 * max(float(mean.max()), 1e-30)) ** np.float32(alpha)
    factors /= np.sqrt(factors.max()) * np.sqrt(factors.min())  # whose product float32 might not hold
    return np.clip(factors, 1e-3, 1e3).astype(np.float32)
