"""What the parts of a tiny model are really run with: calibration samples through its own bundle. And what they then give."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from edgevlm.bundle import Bundle
from edgevlm.calibration import load_calibration
from edgevlm.graphs import load_graph, save_graph
from edgevlm.quant.fold import Fold, consumers_of, find_fold, origin_of, scale_rows, weight_of

Feeds = Mapping[str, np.ndarray]


@functools.cache
def record(bundle: Path, samples: int = 3) -> Mapping[str, Sequence[Feeds]]:
    """Feeds of every part but `embed_tokens`."""
    opened = Bundle.open(bundle, check_files=False)
    parts = [part for part in opened.manifest.parts if part != "embed_tokens"]
    return load_calibration("scenes", samples=samples).feeds(opened, parts, np.array)


def graphs_of(bundle: Path) -> Iterator[tuple[str, ir.Model]]:
    """The float graphs of the parts that `record` has feeds for, anew each time."""
    for part in record(bundle):
        yield part, load_graph(bundle / "onnx" / f"{part}.onnx")


def run(model: ir.Model, feeds: Sequence[Feeds], folder: Path) -> list[dict[str, np.ndarray]]:
    """The outputs of a graph, in float32, for each of the feeds; the graph is written into a folder and stays as it was."""
    save_graph(model.clone(), folder / "graph.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # activations stay float32
    session = ort.InferenceSession(str(folder / "graph.onnx"), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return [
        {name: np.asarray(out, np.float32) for name, out in zip(names, session.run(names, dict(feed)), strict=True)}
        for feed in feeds
    ]


def folds_of(model: ir.Model) -> list[tuple[ir.Value, list[ir.Node] | None, Fold | None]]:
    """Every value that linear layers read: those layers (None where others read it too), and where a division can go."""
    found: dict[ir.Value, tuple[ir.Value, list[ir.Node] | None, Fold | None]] = {}
    for node in model.graph:
        if weight_of(node) is None or node.inputs[0] is None:
            continue
        value = origin_of(node.inputs[0])
        readers = consumers_of(value)
        alone = readers and all(len(list(node.inputs[1].uses())) == 1 for node in readers)  # type: ignore[union-attr]
        found[value] = value, readers, find_fold(value) if alone else None
    return list(found.values())


def fold_everywhere(model: ir.Model, factors_for: Callable[[Fold], np.ndarray]) -> int:
    """Rescales whatever can be, in place; how many places there were."""
    count = 0
    for _, readers, fold in folds_of(model):
        if fold is None:
            continue
        factors = fold.tie(factors_for(fold))
        assert fold.divide(factors)
        for node in readers or ():
            weight = weight_of(node)
            assert weight is not None
            scale_rows(weight, factors)
        count += 1
    return count


def relative(found: Any, wanted: Any) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float(np.linalg.norm(np.asarray(found) - wanted) / max(np.linalg.norm(wanted), 1e-30))
