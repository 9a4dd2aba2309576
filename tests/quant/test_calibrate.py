"""Graphs run in pieces over samples: the same outputs and the same statistics, and nothing kept that nobody takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from recorded import folds_of, graphs_of, record, relative, run
from tinies import Tiny

pytest.importorskip("torch")
from edgevlm.errors import BundleError
from edgevlm.quant.calibrate import InputStats, Shelf, Shelved, run_segment, segments_of
from edgevlm.quant.fold import weight_of

pytestmark = pytest.mark.usefixtures("one_thread")

ALWAYS = (
    "clip-llama", "blip2-opt-350m", "blip2-t5-tied", "instructblip-llama", "flamingo-every-second", "flamingo-every-third",
    "qwen-vl", "qwen2.5-vl-windows",
)  # fmt: skip
LATER = (
    "siglip-qwen2", "odd-widths", "blip2-opt", "internvl-qwen2", "internvl-chat-internlm2", "qwen2-vl", "qwen3-vl",
    "qwen-vl-odd", "flamingo-no-resampler",
)  # fmt: skip
EVERY = [*ALWAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)]


def calibrate(model: ir.Model, feeds: Any, shelf: Shelf, most: int) -> tuple[dict[str, InputStats], list[dict[str, Any]], int]:
    """Statistics of all that linear layers read, what is left of the samples, and how many segments there were."""
    segments, samples = segments_of(model.graph, most), [dict(feed) for feed in feeds]
    outputs = [value.name for value in model.graph.outputs]
    found: dict[str, InputStats] = {}
    for number, segment in enumerate(segments):
        watched = [node.inputs[0].name for node in segment.nodes if weight_of(node) is not None]
        values = {v.name: v for node in segment.nodes for v in node.inputs if v is not None and v.is_initializer()}
        large = {name: value for name, value in values.items() if value.const_value.nbytes > 4096}
        arrays = {name: np.asarray(value.const_value.numpy()) for name, value in large.items()}
        small = [value for name, value in values.items() if name not in large]
        # What the graph gives is not wanted by a segment; here it is, to be compared.
        segment.gives += [
            v.name for node in segment.nodes for v in node.outputs if v.name in outputs and v.name not in segment.gives
        ]
        found |= run_segment(segment, arrays, small, samples, watched, model.opset_imports, shelf, grams=watched)
        later = {name for segment in segments[number + 1 :] for name in segment.takes} | set(outputs)
        for sample in samples:
            for name in set(sample) - later:
                del sample[name]
    return found, samples, len(segments)


@pytest.mark.parametrize("name", EVERY)
def test_pieces_are_the_whole(tiny: Callable[[str], Tiny], name: str, tmp_path: Path) -> None:
    bundle, shelf = tiny(name).bundle, Shelf(tmp_path / "shelf", smallest=64)
    (tmp_path / "shelf").mkdir()
    for part, graph in graphs_of(bundle):
        feeds = record(bundle)[part]
        wanted = run(graph, feeds, tmp_path)
        whole, _, one = calibrate(graph, feeds, shelf, 1 << 30)
        pieces, samples, many = calibrate(graph, feeds, shelf, 1)
        assert one == 1
        linear = [node for node in graph.graph if weight_of(node) is not None]
        assert many >= len(linear), "every linear layer is alone"
        assert whole.keys() == pieces.keys() == {node.inputs[0].name for node in linear}  # type: ignore[union-attr]
        for value, stats in whole.items():
            other = pieces[value]
            assert stats.count == other.count
            assert relative(other.rows, stats.rows) < 1e-4, (part, value)
            for field in ("peak", "mean", "gram", "importance"):
                assert relative(getattr(other, field), getattr(stats, field)) < 1e-4, (part, value, field)
        for sample, outputs in zip(samples, wanted, strict=True):
            assert set(sample) == set(outputs)
            for output, exact in outputs.items():
                assert relative(sample[output], exact) < 1e-4, (part, output)


@pytest.mark.parametrize("name", ["clip-llama", "qwen2.5-vl-windows"])
@pytest.mark.parametrize("most", [1, 20_000, 200_000])
def test_segments(tiny: Callable[[str], Tiny], name: str, most: int) -> None:
    for _, graph in graphs_of(tiny(name).bundle):
        nodes = list(graph.graph)
        segments = segments_of(graph.graph, most)
        assert [node for segment in segments for node in segment.nodes] == nodes
        inputs, there = {value.name for value in graph.graph.inputs}, set()
        for number, segment in enumerate(segments):
            assert set(segment.takes) <= inputs | there
            there |= set(segment.gives)
            later = {name for after in segments[number + 1 :] for name in after.takes}
            assert set(segment.gives) <= later, "nothing is kept that no later segment takes"
            weights = sum(
                4 * v.const_value.size
                for node in segment.nodes
                for v in node.inputs
                if v is not None and v.is_initializer() and v.const_value is not None
            )
            assert weights <= most or len(segment.nodes) == 1 or not any(weight_of(node) is not None for node in segment.nodes)


def test_cuts_keep_folds_whole(tiny: Callable[[str], Tiny]) -> None:
    """Every layer is a segment, cut where the hidden state crosses, and so are the last norm and the head."""
    graph = dict(graphs_of(tiny("clip-llama").bundle))["decoder"].graph
    size = sum(4 * v.const_value.size for v in graph.initializers.values() if "layers.1." in (v.name or "") and v.const_value)
    folds = [
        [*(use.node for target in fold.targets for use in target.uses()), *(readers or ())]
        for _, readers, fold in folds_of(ir.Model(graph, ir_version=11))
        if fold is not None
    ]
    segments = segments_of(graph, size + 4096, folds)
    assert len(segments) == 3
    assert all(len(segment.gives) <= 5 for segment in segments)
    for group in folds:
        assert sum(any(node in segment.nodes for node in group) for segment in segments) == 1
    last = [node.op_type for node in segments[-1].nodes]
    assert (last[0], last[-1], last.count("MatMul")) == ("RMSNormalization", "MatMul", 1)


def test_segments_are_not_cut_to_pieces(tiny: Callable[[str], Tiny]) -> None:
    for name in ("clip-llama", "qwen2.5-vl-windows"):
        for _, graph in graphs_of(tiny(name).bundle):
            total = sum(4 * v.const_value.size for v in graph.graph.initializers.values() if v.const_value)
            for share in (2, 3, 5, 9):
                assert len(segments_of(graph.graph, total // share)) <= 2 * share + 2


# ------------------------------------------------------------------------------------------- statistics


def copying(rank: int) -> ir.Model:
    """A graph whose value `h` is its input `x`."""
    import onnx

    shape = ", ".join(f"d{n}" for n in range(rank))
    text = f"""<ir_version: 10, opset_import: ["" : 24]>
    g (float[{shape}] x) => (float[{shape}] y) {{ h = Identity(x) y = Identity(h) }}"""
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def stats_of(arrays: list[np.ndarray], shelf: Shelf, **options: Any) -> InputStats | None:
    model = copying(arrays[0].ndim)
    (segment,) = segments_of(model.graph)
    samples: list[Any] = [{"x": array} for array in arrays]
    watched = [] if "heads" in options else ["h"]
    return run_segment(segment, {}, [], samples, watched, model.opset_imports, shelf, **options).get("h")


def test_statistics(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, length, 5)).astype(np.float32) for length in (7, 1, 300)]
    stats = stats_of(arrays, Shelf(tmp_path), grams=["h"])
    assert stats is not None
    rows = np.concatenate([array.reshape(-1, 5) for array in arrays])
    assert stats.count == len(rows)
    np.testing.assert_allclose(stats.peak, np.abs(rows).max(0))
    np.testing.assert_allclose(stats.mean, np.abs(rows).mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert {tuple(row) for row in stats.rows.tolist()} <= {tuple(row) for row in rows.tolist()}
    assert len(stats.rows) == 14 + 2 + 342, "all of the short ones, a third of 1,024 of the long one"
    assert stats.some(10).shape == (10, 5)
    np.testing.assert_allclose(stats.importance, np.square(stats.rows).mean(0), rtol=1e-5)


def test_division_of_statistics(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays, factors = [rng.standard_normal((1, 40, 6)).astype(np.float32)], rng.uniform(0.5, 2, 6).astype(np.float32)
    stats, wanted = (stats_of(a, Shelf(tmp_path), grams=["h"]) for a in (arrays, [arrays[0] / factors]))
    assert stats is not None
    assert wanted is not None
    stats.divide(factors)
    for field in ("rows", "peak", "mean", "gram"):
        np.testing.assert_allclose(getattr(stats, field), getattr(wanted, field), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 3, 5, 4), (1, 2, 3, 5, 4)])
def test_rows_are_along_the_last_dimension(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Whatever is in front of it: a linear layer's input may have four dimensions, as a KV cache has."""
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    stats = stats_of([array], Shelf(tmp_path))
    assert stats is not None
    np.testing.assert_array_equal(stats.peak, array.reshape(-1, shape[-1]).max(0))


def test_heads_are_side_by_side(tmp_path: Path) -> None:
    array = np.random.default_rng(2).standard_normal((2, 3, 5, 4)).astype(np.float32)
    stats = stats_of([array], Shelf(tmp_path), heads=["h"])
    assert stats is not None
    assert stats.count == 10
    np.testing.assert_array_equal(stats.peak.reshape(3, 4), np.abs(array).max((0, 2)))


def test_nothing_seen(tmp_path: Path) -> None:
    assert stats_of([np.zeros((1, 0, 4), np.float32)], Shelf(tmp_path)) is None


def test_onnxruntime_that_stops(tmp_path: Path) -> None:
    model = copying(3)
    (segment,) = segments_of(model.graph)
    with pytest.raises(BundleError, match="ONNX Runtime stopped"):
        run_segment(segment, {}, [], [{"x": np.zeros((1, 2, 4), np.float32)}, {"x": np.zeros((1, 4), np.float32)}], ["h"],
                    model.opset_imports, Shelf(tmp_path))  # fmt: skip
    segment.nodes[0].op_type = "Nonsense"
    with pytest.raises(BundleError, match="cannot run a part of the graph"):
        run_segment(segment, {}, [], [{"x": np.zeros((1, 2, 4), np.float32)}], ["h"], model.opset_imports, Shelf(tmp_path))


# ------------------------------------------------------------------------------------------------ shelf


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.bool_, np.uint8])
def test_what_is_put_on_the_shelf_comes_back(dtype: Any, order: Any, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, smallest=100)
    array = np.asarray(np.random.default_rng(0).integers(0, 2, (30, 40)).astype(dtype), order=order)
    kept = shelf.put(array)
    assert len(list(tmp_path.iterdir())) == 1
    assert (kept.shape, kept.dtype, kept.ndim) == (array.shape, array.dtype, 2)
    np.testing.assert_array_equal(np.asarray(kept), array)
    assert np.asarray(kept, np.float64).dtype == np.float64
    array[:] = 0
    assert np.asarray(kept).any(), "a copy"


def test_what_is_small_stays_in_memory(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, smallest=100)
    array = np.ones(3, np.float32)
    kept = shelf.put(array)
    array[:] = 0
    assert isinstance(kept, np.ndarray)
    assert kept.all()
    scalar = shelf.put(np.array(5))
    assert scalar.shape == ()
    assert np.asarray(scalar) == 5
    zeros = np.broadcast_to(np.zeros((), np.float32), (1, 8, 10_000, 64))
    assert shelf.put(zeros) is zeros, "an empty cache costs nothing"
    assert list(tmp_path.iterdir()) == []


def test_files_go_with_what_they_hold(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, smallest=1)
    kept = [shelf.put(np.full(8, n)) for n in range(5)]
    assert len(list(tmp_path.iterdir())) == 5
    assert [int(np.asarray(one)[0]) for one in kept] == list(range(5))
    del kept[1:]
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1


def test_the_shelf_keeps_no_file_open(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, smallest=1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = [shelf.put(np.full(8, n)) for n in range(300)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    assert len(kept) == 300


def test_a_full_disk_says_so() -> None:
    """Of numpy's own words for it none has an error number."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")

    with pytest.raises(OSError, match="No space left") as caught:
        Shelved(np.zeros(1 << 20), _Keeping("/dev/full"))
    assert caught.value.errno == 28


class _Keeping(type(Path())):  # type: ignore[misc]
    """A path that is not removed."""

    def unlink(self, missing_ok: bool = False) -> None: ...
