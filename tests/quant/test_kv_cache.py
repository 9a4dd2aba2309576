"""Decoders that keep keys and values in int8, against the same decoders with floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import onnx_ir as ir

from edgevlm.bundle import Bundle, KVCache, Manifest
from edgevlm.errors import InputError, RecipeError
from edgevlm.generate import Decoder
from edgevlm.graphs import load_graph, part_record, save_graph
from edgevlm.quant.kv_cache import cache_updates, quantize_kv_cache
from edgevlm.runtimes import BACKENDS, PartSession, open_part

FAMILIES = [
    "clip-llama-gqa-bias", "clip-mistral-window", "odd-widths", "blip2-opt", "blip2-t5-published", "instructblip-t5",
    "flamingo", "flamingo-every-second", "internvl-qwen3-tied", "internvl-chat-internlm2", "qwen2-vl-odd",
    "qwen2.5-vl-windows", "qwen3-vl", "qwen-vl",
]  # fmt: skip
ROWS = 12


class Pair:
    """A decoder as exported, and the same with an int8 cache calibrated on one sequence of random rows."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        opened = Bundle.open(bundle, check_files=False)
        self.manifest: Manifest = opened.manifest
        self.part, self.folder = opened.manifest.parts["decoder"], folder
        self.session, _ = open_part(opened.part_path("decoder"), "decoder", self.part, backend="cpu", threads=1)
        self.kv: KVCache = replace(self.manifest.kv_cache, dtype="int8")
        self.path = folder / "decoder.onnx"
        graph = load_graph(opened.part_path("decoder"))
        self.updates = cache_updates(graph)
        self.peaks = self._peaks()
        quantize_kv_cache(graph, self.peaks)
        folder.mkdir(parents=True, exist_ok=True)
        save_graph(graph, self.path)
        rounding = load_graph(opened.part_path("decoder"))
        round_rows(rounding, graph)
        save_graph(rounding, folder / "rounding.onnx")
        self.rounding, _ = open_part(folder / "rounding.onnx", "decoder", self.part, backend="cpu", threads=1)
        self.small_part = part_record(graph, self.path.name)
        self.small, self.choice = open_part(self.path, "decoder", self.small_part, backend=None, threads=1)

    def decoder(self, session: PartSession, batch: int = 1, capacity: int = 64) -> Decoder:
        manifest = self.manifest
        decoder = Decoder(session, manifest.kv_cache, capacity, batch, manifest.cross_attention)
        if cross := manifest.cross_attention:
            rng = np.random.default_rng(9)
            names = [f"cross_key_values.{n}.{which}" for n in range(cross.layers) for which in ("key", "value")]
            shape = (1, cross.heads, 5, cross.head_dim)
            blocks = {name: rng.standard_normal(shape, np.float32).repeat(batch, 0) for name in names}
            decoder.remember([("seen", lambda: blocks)])
        return decoder

    def rows(self, batch: int = 1, length: int = ROWS, seed: int = 0) -> np.ndarray:
        shape = (batch, length, self.part.inputs["inputs_embeds"].shape[2])
        return np.random.default_rng(seed).standard_normal(shape, np.float32)  # type: ignore[arg-type]

    def forward(
        self, decoder: Decoder, rows: np.ndarray, start: list[int] | None = None, last: list[int] | None = None
    ) -> np.ndarray:
        batch, length = rows.shape[:2]
        begin, end = np.array(start or [0] * batch), np.array(last or [length - 1] * batch)
        turns = None
        if "mrope_position_ids" in self.part.inputs:
            turns = np.broadcast_to(begin[:, None] + np.arange(length), (3, batch, length)).copy()
        seen = np.ones((batch, length, decoder.cross_length), bool) if self.manifest.cross_attention else None
        return decoder.forward(rows, begin, end, seen, turns)

    def _peaks(self) -> dict[str, np.ndarray]:
        decoder = self.decoder(self.session)
        self.forward(decoder, self.rows(length=40, seed=5))
        return {name: np.abs(array).max((0, 2)) for name, array in arrays(decoder).items()}


def round_rows(graph: ir.Model, small: ir.Model) -> None:
    """What goes into a float cache, rounded to what the int8 cache of `small` can hold."""
    for name, rows in cache_updates(graph).items():
        scatter = next(use.node for use in rows.uses() if use.node.op_type == "TensorScatter")
        inverse = small.graph.initializers[f"{name}.inverse_scales"].const_value
        assert inverse is not None
        ends = [ir.Value(name=f"{name}.{end}", const_value=ir.tensor(inverse.numpy().dtype.type(end))) for end in (-128, 127)]
        factor = ir.Value(name=f"{name}.factor", const_value=ir.tensor(inverse.numpy()))
        for value in (*ends, factor):
            graph.graph.register_initializer(value)
        steps = [ir.Node("", "Mul", [rows, factor], name=f"{name}.a")]
        steps.append(ir.Node("", "Round", [steps[-1].outputs[0]], name=f"{name}.b"))
        steps.append(ir.Node("", "Clip", [steps[-1].outputs[0], *ends], name=f"{name}.c"))
        steps.append(ir.Node("", "Div", [steps[-1].outputs[0], factor], name=f"{name}.d"))
        graph.graph.insert_before(scatter, steps)
        scatter.replace_input_with(1, steps[-1].outputs[0])


def arrays(decoder: Decoder) -> dict[str, np.ndarray]:
    return decoder._state._arrays  # type: ignore[attr-defined, no-any-return]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def pair(tiny: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            made[name] = Pair(tiny(name).bundle, tmp_path_factory.mktemp("int8") / name)
        return made[name]

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_like_floats(pair: Callable[[str], Pair], name: str) -> None:
    """Prefill in two chunks, then single steps: exactly what rounding the rows does, and close to what they were."""
    both = pair(name)
    wide, rounding, small = (both.decoder(session) for session in (both.session, both.rounding, both.small))
    rows = both.rows(length=30)
    for first, end in ((0, 11), (11, 24), *((n, n + 1) for n in range(24, 30))):
        expected, exact, found = (both.forward(d, rows[:, first:end], [first]) for d in (wide, rounding, small))
        assert cosine(exact, found) > 0.9999
        # Attention of a random T5, which does not scale its scores, is all or nothing.
        assert cosine(expected, found) > (0.8 if "t5" in name else 0.98)
        assert (expected != found).any()
    for which, array in arrays(small).items():
        loud = both.peaks[which].max()
        steps = np.where(both.peaks[which] == 0, loud, np.maximum(both.peaks[which], loud / 1000))[None, :, None] / 127
        stored, kept = array[:, :, :30], arrays(wide)[which][:, :, :30]
        inside = np.abs(kept) < 127 * steps
        if ".0." in which:  # deeper layers see what the earlier ones have rounded
            assert np.abs((stored * steps - kept) / steps)[inside].max() <= 0.501
        assert inside.mean() > 0.9
        assert not array[:, :, 30:].any()


@pytest.mark.parametrize("name", ["clip-llama-gqa-bias", "blip2-t5-published", "flamingo-every-second", "qwen2-vl-odd"])
def test_ragged_batch(pair: Callable[[str], Pair], name: str) -> None:
    both = pair(name)
    rows, lengths = both.rows(2, 9), [9, 4]
    together = both.decoder(both.small, batch=2)
    logits = both.forward(together, rows, None, [n - 1 for n in lengths])
    following = both.forward(together, both.rows(2, 1, seed=3), lengths)
    for number, length in enumerate(lengths):
        alone = both.decoder(both.small)
        expected = both.forward(alone, rows[number : number + 1, :length])
        np.testing.assert_allclose(logits[number], expected[0], rtol=1e-3, atol=2e-3)
        expected = both.forward(alone, both.rows(2, 1, seed=3)[number : number + 1], [length])
        assert cosine(following[number], expected[0]) > 0.9999


@pytest.mark.parametrize("name", ["clip-llama-gqa-bias", "blip2-t5-published"])
def test_in_place_and_a_quarter(pair: Callable[[str], Pair], name: str) -> None:
    both = pair(name)
    wide, small = (both.decoder(session) for session in (both.session, both.small))
    state = small._state
    both.forward(small, both.rows())
    for array, value in zip(state._arrays.values(), state._values.values(), strict=True):  # type: ignore[attr-defined]
        assert (array.dtype, value.data_type()) == (np.int8, "tensor(int8)")
        assert value.data_ptr() == array.ctypes.data, "what is bound is the buffer itself"
    places = {value.data_ptr() for value in state._values.values()}  # type: ignore[attr-defined]
    outputs = state.binding.get_outputs()[: len(places)]  # type: ignore[attr-defined]
    assert {value.data_ptr() for value in outputs} == places, "present is past"
    held = [sum(array.nbytes for array in arrays(decoder).values()) for decoder in (wide, small)]
    assert held[0] == 4 * held[1]
    assert held[1] == 64 * both.kv.bytes_per_token() == 64 * both.manifest.kv_cache.bytes_per_token() // 4


def test_growing(pair: Callable[[str], Pair]) -> None:
    both = pair("clip-llama-gqa-bias")
    grown, fresh = both.decoder(both.small, capacity=400), both.decoder(both.small, capacity=400)
    rows = both.rows(length=300)
    both.forward(grown, rows[:, :250])
    assert grown._state.capacity == 256
    logits = both.forward(grown, rows[:, 250:], [250])
    assert grown._state.capacity == 400
    np.testing.assert_allclose(logits, both.forward(fresh, rows), rtol=1e-3, atol=2e-3)


def test_half_precision(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    both = Pair(tiny("clip-llama-gqa-bias").export("fp16"), tmp_path)
    assert {info.dtype for name, info in both.small_part.inputs.items() if "past" in name} == {"int8"}
    found, expected = (both.forward(both.decoder(session), both.rows()) for session in (both.small, both.session))
    assert cosine(found, expected) > 0.999


def test_louder_than_calibration_saturates(pair: Callable[[str], Pair], tmp_path: Path, tiny: Callable[[str], Any]) -> None:
    both = pair("clip-llama-gqa-bias")
    graph = load_graph(Bundle.open(tiny("clip-llama-gqa-bias").bundle, check_files=False).part_path("decoder"))
    quiet = {name: peak / 50 for name, peak in both.peaks.items()}
    for peak in quiet.values():
        peak[0, 0], peak[0, 1] = 0, 1e-30
    quantize_kv_cache(graph, quiet)
    save_graph(graph, tmp_path / "decoder.onnx")
    session, _ = open_part(tmp_path / "decoder.onnx", "decoder", both.small_part, backend="cpu", threads=1)
    decoder = Decoder(session, both.kv, 64)
    assert np.isfinite(both.forward(decoder, both.rows())).all()
    stored = arrays(decoder)["past_key_values.0.key"][:, :, :ROWS]
    assert {stored.min(), stored.max()} == {-128, 127}


def test_graph_is_standard_and_small(pair: Callable[[str], Pair]) -> None:
    """No operator outside the standard, no copy of the cache's scales, and cross-attention left alone."""
    both = pair("blip2-t5-published")
    graph = load_graph(both.path)
    assert {node.domain for node in graph.graph} == {""}
    layers = both.kv.layers
    kinds = [node.op_type for node in graph.graph]
    assert kinds.count("QuantizeLinear") == 2 * layers
    added = both.small_part.nodes - both.part.nodes
    assert added == 2 * layers * 4  # a product and a rounding before, a cast and a product after
    for name, info in both.small_part.inputs.items():
        assert info.dtype == ("int8" if name.startswith("past_key_values.") else both.part.inputs[name].dtype)
    for name, info in both.small_part.outputs.items():
        assert info.dtype == ("int8" if name.startswith("present.") else "float32")
    extra = sum(both.small_part.weights.values()) - sum(both.part.weights.values())
    assert 0 < extra < 100 * layers * both.kv.heads * both.kv.head_dim


# --------------------------------------------------------------------------------------------------- refused


def decoder_graph(tiny: Callable[[str], Any]) -> ir.Model:
    return load_graph(Bundle.open(tiny("clip-llama").bundle, check_files=False).part_path("decoder"))


def test_part_without_a_cache(tiny: Callable[[str], Any]) -> None:
    graph = load_graph(Bundle.open(tiny("clip-llama").bundle, check_files=False).part_path("vision_encoder"))
    with pytest.raises(RecipeError, match=r"has no KV cache: none of its inputs is called past_key_values\.N\.key"):
        quantize_kv_cache(graph, {})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda peaks: peaks.pop("past_key_values.1.value"),
            r"saw nothing of the KV cache past_key_values\.1\.value; it saw past_",
        ),
        (lambda peaks: peaks.clear(), r"saw nothing of the KV cache past_key_values\.0\.key; it saw no cache"),
        (
            lambda peaks: peaks.update({"past_key_values.0.key": np.ones((4, 3))}),
            r"past_key_values\.0\.key has \d+ heads of \d+; calibration gave \[4, 3\]",
        ),
        (
            lambda peaks: peaks["past_key_values.0.value"].fill(np.nan),
            r"NaN or infinite values in the KV cache past_key_values\.0\.v",
        ),
        (lambda peaks: peaks["past_key_values.0.value"].fill(np.inf), "NaN or infinite"),
    ],
)
def test_peaks_that_do_not_fit(tiny: Callable[[str], Any], spoil: Callable[[dict[str, np.ndarray]], object], says: str) -> None:
    graph = decoder_graph(tiny)
    kv = Bundle.open(tiny("clip-llama").bundle, check_files=False).manifest.kv_cache
    peaks = {name: np.ones((kv.heads, kv.head_dim)) for name in cache_updates(graph)}
    before = len(graph.graph)
    spoil(peaks)
    with pytest.raises(RecipeError, match=says):
        quantize_kv_cache(graph, peaks)
    assert len(graph.graph) == before


def test_not_twice(tiny: Callable[[str], Any]) -> None:
    graph = decoder_graph(tiny)
    kv = Bundle.open(tiny("clip-llama").bundle, check_files=False).manifest.kv_cache
    peaks = {name: np.ones((kv.heads, kv.head_dim)) for name in cache_updates(graph)}
    quantize_kv_cache(graph, peaks)
    with pytest.raises(RecipeError, match=r"past_key_values\.0\.key is INT8"):
        quantize_kv_cache(graph, peaks)


def test_a_cache_of_another_form(tiny: Callable[[str], Any]) -> None:
    graph = decoder_graph(tiny)
    kv = Bundle.open(tiny("clip-llama").bundle, check_files=False).manifest.kv_cache
    peaks = {name: np.ones((kv.heads, kv.head_dim)) for name in cache_updates(graph)}
    scatter = next(node for node in graph.graph if node.op_type == "TensorScatter")
    graph.graph.insert_after(scatter, ir.Node("", "Neg", [scatter.outputs[0]], name="neg"))
    with pytest.raises(RecipeError, match=r"Neg reads the KV cache present\.0\.key; only Attention"):
        quantize_kv_cache(graph, peaks)
    graph.graph.insert_after(scatter, ir.Node("", "Neg", [scatter.inputs[0]], name="neg2"))
    with pytest.raises(RecipeError, match=r"past_key_values\.0\.key is read by .*Neg.*not by one TensorScatter"):
        quantize_kv_cache(graph, peaks)


# -------------------------------------------------------------------------------------------------- backends


def test_backends_say_what_they_have(pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    both = pair("clip-llama-gqa-bias")
    assert both.choice.tried == ("tensorrt", "cuda", "cpu")
    assert both.choice.reasons["cuda"] == (
        "it has no KV cache in int8, only in float32, float16 (int8 was never tried on a GPU)"
    )
    with pytest.raises(InputError, match=r"No backend can run the part decoder here\. cuda: it has no KV cache in int8"):
        open_part(both.path, "decoder", both.small_part, backend="cuda", threads=1)
    monkeypatch.setattr(BACKENDS["cpu"], "kv_dtypes", ("float32",))
    with pytest.raises(InputError, match=r"cpu: it has no KV cache in int8, only in float32\. `edgevlm doctor`"):
        open_part(both.path, "decoder", both.small_part, backend="cpu", threads=1)
    assert BACKENDS["cpu"].lacks(both.part) is None
