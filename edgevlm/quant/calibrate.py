"""What goes into the linear layers of a part, seen by running the part's own graph over calibration samples, some layers at a
time.

A graph is cut where the fewest values cross, so that a segment's weights stay below a bound (a layer, for a large model), and
each segment runs over all samples before the next one. Weights enter a segment as inputs, memory-mapped from the bundle; values
that cross, and what was recorded of the samples, lie in files, and are read when their turn comes. So a model is calibrated
that does not fit in memory.

Written here because calibrators (ONNX Runtime's, Olive's, Neural Compressor's) run the whole model with all its weights, and
keep every activation. It knows nothing of families: feeds come from the caller.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ..errors import BundleError, MissingDependencyError

__all__ = ["Array", "Feeds", "InputStats", "Segment", "Shelf", "Shelved", "run_segment", "segments_of"]

#: Rows of a layer's input that are kept to measure errors with.
ROWS = 1024
#: Bytes of weights, as float32, that a segment should stay below.
SEGMENT_BYTES = 1 << 30


class Shelved:
    """An array in a file of its own, read anew each time it is looked at; the file goes when nobody can any more.

    Not a memory map: each of those keeps a file descriptor, and a model has more weights than a process may have of them.
    """

    def __init__(self, array: np.ndarray, path: Path) -> None:
        self.shape, self.dtype, self._path = array.shape, array.dtype, path
        weakref.finalize(self, path.unlink, missing_ok=True)
        with path.open("wb") as file:  # `ndarray.tofile` has no word for a disk that is full
            file.write(np.ascontiguousarray(array).data)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.fromfile(self._path, self.dtype).reshape(self.shape)
        return array if dtype is None else array.astype(dtype, copy=False)


#: An array in memory, or on the shelf.
Array = np.ndarray | Shelved
#: What a part is run with, input by input.
Feeds = Mapping[str, Array]


class Shelf:
    """A folder for arrays, so that only what is looked at is in memory."""

    def __init__(self, folder: Path, smallest: int = 1 << 18) -> None:
        self._folder, self._smallest, self._count = folder, smallest, 0

    def put(self, array: np.ndarray) -> Array:
        """The same array, in a file where it is large. One number that stands for all (a broadcast one) stays as it is."""
        if array.ndim and not any(array.strides):
            return array
        if array.nbytes < self._smallest:
            return np.array(array)
        self._count += 1
        return Shelved(array, self._folder / str(self._count))


@dataclass
class InputStats:
    """What went into a layer, `K` numbers wide, over all samples.

    `rows` float32 `[R, K]`, some of them evenly spread; `peak` `[K]`, the largest absolute value of each number; `mean` `[K]`,
    the mean absolute one; `gram` float32 `[K, K]`, the sum of `xᵀx` over all rows, where it was asked for.
    """

    count: int
    rows: np.ndarray
    peak: np.ndarray
    mean: np.ndarray
    gram: np.ndarray | None = None

    def divide(self, factors: np.ndarray) -> None:
        """The layer's input was divided by `[K]` factors."""
        self.rows, self.peak, self.mean = self.rows / factors, self.peak / factors, self.mean / factors
        if self.gram is not None:
            self.gram = self.gram / factors[:, None] / factors[None, :]

    def some(self, most: int) -> np.ndarray:
        """At most so many of the rows, evenly spread."""
        return self.rows[np.linspace(0, len(self.rows) - 1, min(most, len(self.rows))).round().astype(int)]

    @property
    def importance(self) -> np.ndarray:
        """Mean square of each input, `[K]`."""
        return np.square(self.rows).mean(0)


class _Collector:
    """Gathers the statistics of one value, sample by sample."""

    def __init__(self, samples: int, *, gram: bool, heads: bool) -> None:
        self._share, self._wanted, self._heads = -(-ROWS // samples), gram, heads
        self._gram: np.ndarray | None = None
        self._rows: list[np.ndarray] = []
        self._count = 0
        self._peak: Any = 0.0
        self._sum: Any = 0.0

    def add(self, x: np.ndarray) -> None:
        if self._heads:  # their numbers side by side
            x = x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1] * x.shape[3])
        rows = x.reshape(-1, x.shape[-1]).astype(np.float32, copy=False)
        if not len(rows):
            return
        self._count += len(rows)
        magnitude = np.abs(rows)
        self._peak = np.maximum(self._peak, magnitude.max(0))
        self._sum = self._sum + magnitude.sum(0, dtype=np.float64)
        places = np.unique(np.linspace(0, len(rows) - 1, min(self._share, len(rows))).round().astype(int))
        self._rows.append(np.array(rows[places]))
        if self._wanted:
            gram = rows.T @ rows
            self._gram = gram if self._gram is None else np.add(self._gram, gram, out=self._gram)

    def result(self) -> InputStats | None:
        if not self._count:
            return None
        mean = (self._sum / self._count).astype(np.float32)
        return InputStats(self._count, np.concatenate(self._rows), self._peak, mean, self._gram)


@dataclass
class Segment:
    """Nodes in their order, the values that they take from before (`takes`) and that are wanted behind them (`gives`)."""

    nodes: list[ir.Node]
    takes: list[str] = field(default_factory=list)
    gives: list[str] = field(default_factory=list)


def segments_of(graph: ir.Graph, most: int | None = None, together: Iterable[Iterable[ir.Node]] = ()) -> list[Segment]:
    """Cuts a graph, in its order, into segments with weights of `most` bytes (`SEGMENT_BYTES`), and with at least half of what
    would fit: where the fewest groups of nodes that belong `together` are cut, and the fewest values cross.

    A node with more weights than that is alone.
    """
    most, nodes = SEGMENT_BYTES if most is None else most, list(graph)
    place = {node: number for number, node in enumerate(nodes)}
    bytes_of = [sum(_float_bytes(v) for v in node.inputs if v is not None) for node in nodes]
    # How many values cross the line behind each node.
    change = np.zeros(len(nodes) + 1, int)
    for node in nodes:
        for value in node.outputs:
            last = max((place[use.node] for use in value.uses()), default=place[node])
            change[place[node]] += 1
            change[last] -= 1
    crossing = np.cumsum(change)
    for group in together:
        places = [place[node] for node in group]
        crossing[min(places) : max(places)] += len(nodes)
    segments: list[Segment] = []
    first = 0
    while first < len(nodes):
        total, end = 0, first
        while end < len(nodes) and (end == first or total + bytes_of[end] <= most):
            total, end = total + bytes_of[end], end + 1
        if end < len(nodes):  # of the best places the last one
            from_here = np.cumsum(bytes_of[first:end])
            window = np.where(2 * from_here >= total, crossing[first:end], np.iinfo(int).max)
            end = first + int(np.flatnonzero(window == window.min())[-1]) + 1
        segments.append(Segment(nodes[first:end]))
        first = end
    for segment in segments:
        inside = set(segment.nodes)
        taken = (v for node in segment.nodes for v in node.inputs if v is not None and not v.is_initializer())
        segment.takes = list(dict.fromkeys(v.name or "" for v in taken if v.producer() not in inside))
        segment.gives = [
            value.name or ""
            for node in segment.nodes
            for value in node.outputs
            if any(use.node not in inside for use in value.uses())
        ]
    return segments


def _float_bytes(value: ir.Value) -> int:
    return 4 * value.const_value.size if value.is_initializer() and value.const_value is not None else 0


def run_segment(
    segment: Segment,
    weights: Mapping[str, np.ndarray],
    small: Sequence[ir.Value],
    samples: list[dict[str, Array]],
    watched: Iterable[str],
    opsets: Mapping[str, int],
    shelf: Shelf,
    grams: Iterable[str] = (),
    heads: Iterable[str] = (),
) -> dict[str, InputStats]:
    """Runs a segment over the samples, each a dictionary of the values there are so far, which gets what the segment gives.

    `weights` are fed as inputs, the `small` initializers are part of the graph. Returns the statistics of the `watched` values,
    with Gram matrices of those in `grams`. Values in `heads`, `[B, heads, S, D]`, are watched too, as rows of `heads · D`
    numbers.
    """
    grams, heads = set(grams), set(heads)
    watched = list(dict.fromkeys([*watched, *sorted(heads)]))
    produced = {value.name for node in segment.nodes for value in node.outputs}
    fetched = list(dict.fromkeys([*segment.gives, *(name for name in watched if name in produced)]))
    collectors = {name: _Collector(len(samples), gram=name in grams, heads=name in heads) for name in watched}
    session = _session(segment, weights, small, samples[0], fetched, opsets) if fetched else None
    for sample in samples:
        feeds = {name: np.asarray(sample[name], order="C") for name in segment.takes}
        out = dict(zip(fetched, _run(session, fetched, {**feeds, **weights}), strict=True)) if session else {}
        for name, collector in collectors.items():
            collector.add(out[name] if name in out else np.asarray(sample[name]))
        for name in segment.gives:
            sample[name] = shelf.put(out[name])
    return {name: found for name, collector in collectors.items() if (found := collector.result()) is not None}


def _session(
    segment: Segment, weights: Mapping[str, np.ndarray], small: Sequence[ir.Value], sample: Feeds,
    outputs: Sequence[str], opsets: Mapping[str, int],
) -> Any:  # fmt: skip
    try:
        import onnxruntime as ort
    except ImportError as exc:
        raise MissingDependencyError(
            "Calibration runs the bundle's graphs with ONNX Runtime, which is not installed: `pip install 'edgevlm[cpu]'`."
        ) from exc

    def typed(name: str, array: Array) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)

    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in segment.nodes],
        "segment",
        [*(typed(name, sample[name]) for name in segment.takes), *(typed(name, array) for name, array in weights.items())],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [onnx.numpy_helper.from_array(np.asarray(value.const_value), value.name) for value in small],
    )
    model = onnx.helper.make_model(
        graph, ir_version=11, opset_imports=[onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # ONNX Runtime's exceptions share no base class
        raise BundleError(f"ONNX Runtime cannot run a part of the graph for calibration: {exc}") from exc


def _run(session: Any, outputs: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    try:
        found: list[np.ndarray] = session.run(outputs, feeds)
    except Exception as exc:  # ONNX Runtime's exceptions share no base class
        raise BundleError(f"ONNX Runtime stopped in a part of the graph that calibration runs: {exc}") from exc
    return found
