"""GPTQ: weights rounded one input after the other, each rounding error made up for by the inputs that are still to come.

E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
https://arxiv.org/abs/2210.17323. With `X` the rows that calibration saw enter the layer and `H = XᵀX`, a layer's output
error is tr(ΔᵀHΔ), Δ = W − Ŵ. Computed here in the equal form without an inverse of H ("The Geometry of LLM Quantization:
GPTQ as Babai's Nearest Plane Algorithm", https://arxiv.org/abs/2507.18553): with H = R·Rᵀ, R upper triangular in the order
of quantization, the error is Σ_i ‖R_ii·Δ_i + Σ_{j<i} R_ji·Δ_j‖², so input i is rounded from

    w_i + Σ_{j<i} R_ji · Δ_j / R_ii          which would make its term zero.

That is one Cholesky factorization in place of three steps (Cholesky, inverse, Cholesky of the inverse), and the errors of
a batch of inputs reach the next batch as one matrix product, as in the paper.

The blocks and their scales are chosen before, from the original weights, and stay where they are whatever the order
("static groups" in the authors' code), so that the result is an ordinary block-quantized weight. Written here because no
library takes a matrix: GPTQModel, AutoGPTQ and llm-compressor quantize torch modules of a model they hold in memory,
ONNX Runtime's GPTQ goes through neural-compressor, which loads the whole ONNX model. It knows nothing of graphs.
"""

from __future__ import annotations

import numpy as np

from ..errors import RecipeError
from .rtn import usable_scales
from .scales import search_scales

__all__ = ["quantize"]

#: Inputs whose errors are passed on in one matrix product.
_BATCH = 128
#: Output channels that are worked on at a time: they do not depend on each other.
_CHANNELS = 1024
#: Bytes of the matrix that one step of copying or factoring it may take beside it.
_STRIP = 32 << 20
#: How often the damping is made ten times larger before the matrix is given up.
_ATTEMPTS = 4


def quantize(
    weight: np.ndarray,
    gram: np.ndarray,
    block_size: int,
    low: int,
    high: int,
    scale_dtype: np.dtype[np.generic],
    *,
    act_order: bool = True,
    damp: float = 0.01,
    importance: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`weight` `[K, N]`, `gram` = XᵀX `[K, K]` → int8 `[K, N]` in `low` … `high`, scales `[ceil(K / block_size), N]`.

    A block of more than `K` inputs is one block (0 says the same), a last one that `K` does not fill is shorter. Scales put the
    block's largest weight on `low`, as `rtn` does; with `importance` (`[K]`, for example the diagonal of `gram`) they are
    searched. `act_order` starts with the inputs of the largest activations. `damp` is added to the diagonal, as a part of its
    mean, and more of it where the matrix needs it (few calibration rows). Inputs that calibration never saw (a zero on the
    diagonal) are rounded to nearest. So is a whole output channel that GPTQ would make worse, as it may with few inputs:
    the error is never larger than that of rounding to nearest with the same scales, and equal to it where `gram` is diagonal.

    Layers that read the same input may be given together, side by side: the factorization is the larger part of the time.
    Memory beside the arguments and the result: `8·K²` bytes, some 30 kB a row of `weight` and 64 MiB (1.4 GB at K = 11,008).
    The same arguments give the same values. Raises RecipeError, without the layer's name.
    """
    if gram.shape != (len(weight), len(weight)):
        raise RecipeError(f"GPTQ needs a matrix of {len(weight)} by {len(weight)} activations, not {gram.shape}.")
    diagonal = np.diagonal(gram).astype(np.float64)
    if not np.isfinite(diagonal).all() or (diagonal < 0).any():
        raise RecipeError("The activations that GPTQ was calibrated with have NaN or infinite values.")
    inner, outer = weight.shape
    block = min(block_size or inner, inner)
    # The factor's columns are worked through from the last to the first.
    order = (np.argsort(-diagonal, kind="stable") if act_order else np.arange(inner))[::-1]
    factor = _factor_gram(gram, order, damp)
    quantized = np.empty((inner, outer), np.int8)
    scales = np.empty((-(-inner // block), outer), scale_dtype)
    for first in range(0, outer, _CHANNELS):
        part = slice(first, first + _CHANNELS)
        columns = weight[:, part].astype(np.float32)
        if not np.isfinite(columns).all():
            raise RecipeError("The weights have NaN or infinite values; they cannot be quantized.")
        scales[:, part], inverse = _block_scales(columns, block, low, high, scales.dtype, importance)
        steps = scales[:, part].astype(np.float32)[order // block]
        quantized[order, part] = _round_in_order(columns[order], factor, steps, inverse[order // block], low, high)
    return quantized, scales


def _block_scales(
    columns: np.ndarray, block: int, low: int, high: int, scale_dtype: np.dtype[np.generic], importance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Scales of all blocks `[ceil(K / block), n]`, as stored, and their inverse."""
    pairs = []
    for first in range(0, len(columns), block):
        weight = columns[first : first + block]
        if importance is None:
            pairs.append(usable_scales(np.take_along_axis(weight, np.abs(weight).argmax(0)[None], 0)[0], low, scale_dtype))
        else:
            pairs.append(usable_scales(search_scales(weight, importance[first : first + block], low, high), 1, scale_dtype))
    return np.stack([scale for scale, _ in pairs]), np.stack([inverse for _, inverse in pairs])


def _round_in_order(
    weight: np.ndarray, factor: np.ndarray, steps: np.ndarray, inverse: np.ndarray, low: int, high: int
) -> np.ndarray:
    """Codes `[K, n]` of the weights `[K, n]`, both in the order of `factor`, which is worked through from its end."""
    inner, outer = weight.shape
    codes, nearest = np.empty((inner, outer), np.int8), np.clip(np.rint(weight * inverse), low, high)
    # What rounding does, this way and to nearest, side by side: one product then tells what either does to the output.
    delta = np.concatenate([weight, weight - nearest * steps], 1)
    error = np.zeros((2, outer), np.float64)
    for end in range(inner, 0, -_BATCH):
        first = max(0, end - _BATCH)
        inside = factor[first:end, first:end].astype(np.float32)
        passed = factor[end:, first:end].astype(np.float32).T @ delta[end:]
        for row in range(end - first - 1, -1, -1):
            at, own = first + row, inside[row, row]
            passed[row] += inside[row + 1 :, row] @ delta[at + 1 : end]
            wanted = weight[at] + passed[row, :outer] / own
            code = np.clip(np.rint(wanted * inverse[at]), low, high)
            codes[at], delta[at, :outer] = code, weight[at] - code * steps[at]
            passed[row] += own * delta[at]
        error += np.square(passed, dtype=np.float64).sum(0).reshape(2, outer)
    worse = error[0] > error[1]
    codes[:, worse] = nearest[:, worse].astype(np.int8)
    return codes


def _factor_gram(gram: np.ndarray, order: np.ndarray, damp: float) -> np.ndarray:
    """The lower triangular factor (float64) of the damped matrix, in the given order; above its diagonal are leftovers."""
    diagonal = np.diagonal(gram).astype(np.float64)
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    for attempt in range(_ATTEMPTS):
        matrix = np.empty(gram.shape, np.float64)
        for part in _strips(len(matrix), len(matrix)):
            matrix[part] = gram[order[part]][:, order]
        # An input without activations goes with no other; its place on the diagonal only has to be there.
        np.fill_diagonal(matrix, np.where(live, diagonal + damp * 10**attempt * mean, mean)[order])
        try:
            _factor_in_place(matrix)
        except np.linalg.LinAlgError:
            continue
        return matrix
    raise RecipeError(
        "GPTQ finds no way through what calibration saw of this layer: its activations have NaN or infinite values, or too few "
        "of them were seen. Calibrate with more samples, or use another algorithm for it."
    )


def _factor_in_place(matrix: np.ndarray) -> None:
    """Cholesky, block by block, of the lower triangle. NumPy's own holds three copies. Raises LinAlgError."""
    inner = len(matrix)
    for first in range(0, inner, _BATCH):
        end = min(first + _BATCH, inner)
        corner = np.linalg.cholesky(matrix[first:end, first:end])
        if not np.isfinite(corner).all():
            raise np.linalg.LinAlgError("not finite")
        matrix[first:end, first:end] = corner
        inverse = np.linalg.inv(corner).T
        for part in _strips(inner, _BATCH, end):
            matrix[part, first:end] = matrix[part, first:end] @ inverse
        for part in _strips(inner, inner, end):
            matrix[part, end : part.stop] -= matrix[part, first:end] @ matrix[end : part.stop, first:end].T


def _strips(rows: int, width: int, first: int = 0) -> list[slice]:
    step = max(1, _STRIP // (8 * width))
    return [slice(start, min(start + step, rows)) for start in range(first, rows, step)]
