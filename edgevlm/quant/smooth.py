"""SmoothQuant: a part of what makes activations hard to round moves into the weights.

G. Xiao et al., "SmoothQuant", https://arxiv.org/abs/2211.10438: layers that read the same input share the factors
`s = max|x|ᵅ / max|w|¹⁻ᵅ` of each input number, `α` the share that moves. A few channels of a vision encoder's activations are
tens of times as wide as the others; with one scale for all of them in eight bits, the others would be left with a few levels.
Where the factors go is up to `fold`. A formula: no library is needed for it, and those that have it apply it to torch modules.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["smooth_factors"]


def smooth_factors(peak: np.ndarray, weights: Sequence[np.ndarray], share: float) -> np.ndarray:
    """Factors `[K]` by which activations with the largest magnitudes `peak` `[K]` are divided."""
    if share == 0:
        return np.ones_like(peak)
    heavy = np.max([np.abs(weight).max(1) for weight in weights], axis=0)
    peak = np.maximum(peak, 1e-5 * max(float(peak.max()), 1e-30))
    heavy = np.maximum(heavy, 1e-5 * max(float(heavy.max()), 1e-30))
    factors = peak ** np.float32(share) / heavy ** np.float32(1 - share)
    # Their middle is 1: a constant common to all would change nothing but the range of a float16 norm.
    factors /= np.sqrt(factors.max()) * np.sqrt(factors.min())
    return np.clip(factors, 1e-4, 1e4).astype(np.float32)
