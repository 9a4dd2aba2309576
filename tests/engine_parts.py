"""Parts for the tests of engines: weights that TensorRT takes, and inputs that could come from the runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgevlm.bundle import Manifest, Part
from edgevlm.quant.recipe import RECIPES

#: Its blocks fill the weights of every tiny model; TensorRT takes no others.
INT4 = replace(
    RECIPES["int4-rtn"],
    rules=tuple(replace(rule, block_size=4) if rule.method == "int4" else rule for rule in RECIPES["int4-rtn"].rules),
)
CAPACITY, ROWS, START = 64, 5, 3


def part_feeds(part: Part, manifest: Manifest, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Random inputs of a part, that could come from the runtime."""
    rng = np.random.default_rng(0)
    sizes = {
        "batch_size": 1, "sequence_length": rows, "capacity": CAPACITY, "image_tokens": max(1, manifest.image.places),
        "cross_length": 7, "source_length": 6, "instruction_length": 5, "frames": 1, "places": 6, "windows": 2,
    }  # fmt: skip
    feeds: dict[str, np.ndarray] = {}
    for name, info in part.inputs.items():
        shape = [sizes[d] if isinstance(d, str) else d for d in info.shape]
        if name in ("position_ids", "mrope_position_ids") and "last_token_index" in part.inputs:
            feeds[name] = np.broadcast_to(START + np.arange(rows), shape).copy()
        elif name == "last_token_index":
            feeds[name] = np.array([rows - 1])
        elif name == "window_index":
            feeds[name] = np.arange(np.prod(shape)).reshape(shape) % 24
        elif name == "window_place":
            feeds[name] = np.arange(np.prod(shape)).reshape(shape)
        elif info.dtype == "bool":
            feeds[name] = rng.random(shape) < 0.8
            feeds[name][..., 0] = True
        elif info.dtype == "int64":
            feeds[name] = rng.integers(0, 3, shape)
        else:
            feeds[name] = rng.standard_normal(shape).astype(info.dtype)
    return feeds


def run_part(path: Path, feeds: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(outputs, feeds)
