"""The scale of a block of weights that loses least, where some inputs matter more than others.

    min over s of  Σ_k h_k · (w_k − s · q_k)²,   q_k = clip(round(w_k / s), low, high)

Clipping a few large weights often costs less than coarse steps for all others. Tried are scales that put the largest weight
on either end of the range, and on ever smaller parts of it; then the best one is fitted: for numbers `q` that stay, the least
error is at s = Σ h·w·q / Σ h·q². llama.cpp searches its block scales this way
(https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c, `make_qx_quants`). Written here because the
libraries that search scales do it inside of whole models (AWQ's `auto_clip`, for one, on torch modules).
"""

from __future__ import annotations

import numpy as np

__all__ = ["search_scales"]

#: Parts of the range that are tried. Over a whole channel of normal weights, three bits clip best at about half of the peak.
_SHRINK = np.linspace(1.0, 0.4, 13, dtype=np.float32)


def search_scales(block_weight: np.ndarray, importance: np.ndarray, low: int, high: int) -> np.ndarray:
    """Signed scales `[n]` of one block `[k, n]`, float32, whose inputs weigh `importance` (`[k]` or `[k, n]`, not negative).

    The error is never larger than that of the scale that puts the largest weight on `low`, which is what rounding to nearest
    takes. Inputs that all weigh nothing count alike. An all-zero column has the scale 0. As a stored scale and its inverse:
    `rtn.usable_scales(search_scales(…), 1, scale_dtype)`.
    """
    weight = np.asarray(block_weight, np.float32)
    peak = np.take_along_axis(weight, np.abs(weight).argmax(0)[None], 0)[0]
    unit = np.where(peak == 0, np.float32(1), peak)
    relative = weight / unit  # within -1 … 1, so that squares of tiny or huge weights stay finite
    spread = _spread(importance, weight.shape)
    weighted = relative * spread
    best, gain = np.zeros_like(peak), np.full_like(peak, -1)
    for end in (low, high)[: 1 if low == -high else 2]:
        for part in _SHRINK:
            codes = np.clip(np.rint(relative * (end / part)), low, high)
            power = np.einsum("kn,kn->n", codes * spread, codes)
            along = np.einsum("kn,kn->n", weighted, codes)
            fitted = np.divide(along, power, out=np.zeros_like(along), where=power > 0)
            better = along * fitted > gain
            best, gain = np.where(better, fitted, best), np.where(better, along * fitted, gain)
    return np.where(peak == 0, np.float32(0), best * unit)


def _spread(importance: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`[k, 1]` or `[k, n]` (float32) of mean 1."""
    spread = np.asarray(importance, np.float64).reshape(shape[0], -1)
    mean = spread.mean(0, keepdims=True)
    return np.where(mean > 0, spread / np.where(mean > 0, mean, 1), 1).astype(np.float32)
