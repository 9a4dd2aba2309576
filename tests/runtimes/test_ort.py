"""ONNX Runtime behind the backend interface: state in place, checks before a run, and reasons instead of silence."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import onnxruntime as ort

from edgevlm.bundle import Bundle, TensorInfo
from edgevlm.errors import BundleError, InputError
from edgevlm.runtimes import PartSession, State, open_part

PAIRS = {f"past_key_values.{i}.{w}": f"present.{i}.{w}" for i in range(2) for w in ("key", "value")}


def opened(bundle: Path, part: str) -> PartSession:
    found = Bundle.open(bundle, check_files=False)
    session, choice = open_part(found.part_path(part), part, found.manifest.parts[part], backend="cpu", threads=1)
    assert (choice.chosen, choice.reasons) == ("cpu", {})
    return session


@pytest.fixture(params=["fp32", "fp16"])
def decoder(request: pytest.FixtureRequest, llava: Callable[[str], Any]) -> PartSession:
    return opened(llava("clip-llama").export(request.param), "decoder")


def step(start: int, length: int, batch: int = 1) -> dict[str, np.ndarray]:
    embeds = np.random.default_rng(start).standard_normal((batch, length, 64), np.float32)
    positions = np.broadcast_to(start + np.arange(length), (batch, length))
    return {"inputs_embeds": embeds, "position_ids": positions, "last_token_index": np.full(batch, length - 1)}


@pytest.mark.parametrize("batch", [1, 3])
def test_in_place_is_what_an_unbound_session_gives(decoder: PartSession, batch: int) -> None:
    dtype = np.dtype(decoder.part.inputs["inputs_embeds"].dtype)
    past = {name: np.zeros((batch, 4, 16, 16), dtype) for name in PAIRS}
    state = decoder.new_state(PAIRS, batch, 16)
    start = 0
    for length in (5, 1, 1, 6, 1):
        feeds = step(start, length, batch)
        plain = decoder.run(feeds | past)
        bound = decoder.run(feeds, state)
        assert set(bound) == {"logits"}
        np.testing.assert_array_equal(bound["logits"], plain["logits"])
        past = {name: plain[present] for name, present in PAIRS.items()}
        start += length
    assert np.abs(plain["logits"]).max() > 0


def test_results_are_not_overwritten_by_the_next_run(decoder: PartSession) -> None:
    state = decoder.new_state(PAIRS, 1, 16)
    first = decoder.run(step(0, 3), state)["logits"]
    kept = first.copy()
    assert not np.array_equal(decoder.run(step(3, 1), state)["logits"], kept)
    np.testing.assert_array_equal(first, kept)


def test_states_are_apart(decoder: PartSession) -> None:
    alone = decoder.new_state(PAIRS, 1, 16)
    decoder.run(step(0, 3), alone)
    expected = decoder.run(step(3, 1), alone)["logits"]
    one, other = decoder.new_state(PAIRS, 1, 16), decoder.new_state(PAIRS, 1, 16)
    decoder.run(step(0, 3), one)
    decoder.run(step(50, 3) | {"position_ids": np.arange(3)[None]}, other)
    np.testing.assert_array_equal(decoder.run(step(3, 1), one)["logits"], expected)


def test_grown_state_keeps_its_content(decoder: PartSession) -> None:
    roomy, growing = decoder.new_state(PAIRS, 2, 24), decoder.new_state(PAIRS, 2, 4)
    for state in (roomy, growing):
        decoder.run(step(0, 4, 2), state)
    growing.grow(9)
    assert growing.capacity == 9
    for start, length in ((4, 4), (8, 1)):
        a, b = (decoder.run(step(start, length, 2), state)["logits"].astype(np.float32) for state in (roomy, growing))
        np.testing.assert_allclose(a, b, atol=2e-3 if decoder.part.inputs["inputs_embeds"].dtype == "float16" else 1e-5)
    growing.grow(24)
    a, b = (decoder.run(step(9, 15, 2), state)["logits"].astype(np.float32) for state in (roomy, growing))
    np.testing.assert_allclose(a, b, atol=2e-3 if decoder.part.inputs["inputs_embeds"].dtype == "float16" else 1e-5)
    empty = decoder.new_state(PAIRS, 2, 24)
    assert np.abs(decoder.run(step(9, 15, 2), empty)["logits"] - a).max() > 1e-2, "what was stored does not matter"


def test_growing_does_not_hold_the_whole_state_twice(decoder: PartSession) -> None:
    tracemalloc.start()
    try:
        state = decoder.new_state(PAIRS, 8, 2000)
        whole, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        state.grow(2001)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert whole > 4e6, "the state is traced"
    assert peak < 1.5 * whole  # one of its four tensors twice, not all of them


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.pop("position_ids"), "takes the inputs inputs_embeds, position_ids, last_token_index"),
        (lambda f: f.update(input_ids=np.zeros((1, 3), np.int64)), "it was given input_ids, inputs_embeds"),
        (lambda f: f.clear(), "it was given none"),
        (
            lambda f: f.update(inputs_embeds=np.zeros((1, 3, 63), np.float32)),
            r"takes 'inputs_embeds' as .*64\]; it was given \[1, 3, 63\]",
        ),
        (lambda f: f.update(inputs_embeds=np.zeros((3, 64), np.float32)), r"'inputs_embeds' .* it was given \[3, 64\]"),
        (lambda f: f.update(position_ids=np.zeros((1, 2), np.int64)), r"'position_ids' .* it was given \[1, 2\]"),
        (lambda f: f.update(last_token_index=np.zeros(2, np.int64)), r"'last_token_index' .* it was given \[2\]"),
        (
            lambda f: f.update({"past_key_values.0.key": np.zeros((1, 4, 16, 16), np.float32)}),
            "it was given .*past_key_values.0.key",
        ),
    ],
)
def test_wrong_feeds_are_refused(bundle: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
    decoder = opened(bundle, "decoder")
    state = decoder.new_state(PAIRS, 1, 16)
    decoder.run(step(0, 3), state)  # what was bound before must not be taken in place of what is missing now
    feeds: dict[str, Any] = step(3, 3)
    change(feeds)
    with pytest.raises(BundleError, match=f"The part decoder.*{said}"):
        decoder.run(feeds, state)


def test_missing_state_is_refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"past_key_values\.0\.key"):
        opened(bundle, "decoder").run(step(0, 3))


@pytest.mark.parametrize(
    ("part", "feeds"),
    [
        ("embed_tokens", {"input_ids": np.array([[10**6]])}),
        ("decoder", step(15, 3)),
        ("decoder", step(0, 1, batch=2)),
        ("decoder", step(0, 1) | {"last_token_index": np.array([7])}),
    ],
    ids=["an id beyond the vocabulary", "positions beyond the cache", "more rows than the cache", "a row that is not there"],
)
def test_what_only_the_graph_can_tell(bundle: Path, part: str, feeds: dict[str, np.ndarray]) -> None:
    session = opened(bundle, part)
    state: State | None = session.new_state(PAIRS, 1, 16) if part == "decoder" else None
    with pytest.raises(BundleError, match=f"part {part}"):
        session.run(feeds, state)
    if state:  # and it can be used again
        assert np.isfinite(session.run(step(0, 2), state)["logits"]).all()


def test_feeds_are_cast_and_made_contiguous(llava: Callable[[str], Any]) -> None:
    session = opened(llava("clip-llama").export("fp16"), "projector")
    features = np.random.default_rng(0).standard_normal((1, 16, 32))
    expected = session.run({"vision_features": features.astype(np.float16)})["image_features"]
    assert expected.dtype == np.float16
    for given in (features, features.astype(np.float32), np.asfortranarray(features), features[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(session.run({"vision_features": given})["image_features"], expected)


# -------------------------------------------------------------------------------------- memory

CROSS = [f"cross_key_values.{i}.{w}" for i in range(2) for w in ("key", "value")]


@pytest.fixture(scope="module")
def reader(tiny: Callable[[str], Any]) -> PartSession:
    """A decoder that reads cross-attention keys and values; four layers, two of them with a gate."""
    return opened(tiny("flamingo-every-second").bundle, "decoder")


def rows(reader: PartSession, count: int, seed: int, batch: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {name: reader.part.inputs[name].shape for name in CROSS}
    return {name: rng.standard_normal((batch, int(s[1]), count, int(s[3])), np.float32) for name, s in shapes.items()}


def looking(reader: PartSession, length: int, start: int = 0, batch: int = 1) -> dict[str, np.ndarray]:
    width = int(reader.part.inputs["inputs_embeds"].shape[2])
    embeds = np.random.default_rng(start).standard_normal((batch, 3, width), np.float32)
    positions = np.broadcast_to(start + np.arange(3), (batch, 3))
    mask = np.random.default_rng(9).random((batch, 3, length)) < 0.7
    last = np.full(batch, 2)
    return {"inputs_embeds": embeds, "position_ids": positions, "last_token_index": last, "cross_attention_mask": mask}


def state_of(reader: PartSession, batch: int = 1) -> State:
    pairs = {f"past_key_values.{i}.{w}": f"present.{i}.{w}" for i in range(4) for w in ("key", "value")}
    return reader.new_state(pairs, batch, 16)


@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_in_memory_is_what_is_fed(reader: PartSession, batch: int) -> None:
    """Rows come and go; the part reads those that are there, in one state from run to run."""
    memory, state, held = reader.new_memory(CROSS, batch), state_of(reader, batch), rows(reader, 0, 0, batch)
    assert (memory.length, memory.inputs) == (0, frozenset(CROSS))
    for number, (keep, more) in enumerate([(0, 4), (4, 2), (6, 0), (3, 0), (3, 5), (1, 1), (0, 2)]):
        memory.truncate(keep)
        held = {name: array[:, :, :keep] for name, array in held.items()}
        if more:
            added = rows(reader, more, number, batch)
            memory.append(added)
            held = {name: np.concatenate([array, added[name]], 2) for name, array in held.items()}
        assert memory.length == keep + more
        feeds = looking(reader, memory.length, batch=batch)
        found = reader.run(feeds, state, memory)
        assert set(found) == {"logits"}
        fed = reader.run(feeds | held, state_of(reader, batch))
        np.testing.assert_array_equal(found["logits"], fed["logits"])


def test_what_was_appended_is_a_copy(reader: PartSession) -> None:
    memory, given = reader.new_memory(CROSS, 1), rows(reader, 4, 0)
    memory.append(given)
    wanted = reader.run(looking(reader, 4), state_of(reader), memory)["logits"]
    for array in given.values():
        array[:] = 7
    np.testing.assert_array_equal(reader.run(looking(reader, 4), state_of(reader), memory)["logits"], wanted)


def test_two_memories_take_turns_in_one_state(reader: PartSession) -> None:
    state, memories = state_of(reader), [reader.new_memory(CROSS, 1) for _ in range(2)]
    for seed, memory in enumerate(memories):
        memory.append(rows(reader, 4, seed))
    alone = [reader.run(looking(reader, 4), state_of(reader), memory)["logits"] for memory in memories]
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    for number in (0, 1, 1, 0, 1):
        found = reader.run(looking(reader, 4), state, memories[number])["logits"]
        np.testing.assert_array_equal(found, alone[number])


def test_memory_outlives_a_state_that_grows(reader: PartSession) -> None:
    memory, growing, roomy = reader.new_memory(CROSS, 1), state_of(reader), state_of(reader)
    memory.append(rows(reader, 4, 0))
    roomy.grow(40)
    for start in (0, 3):
        found, wanted = (reader.run(looking(reader, 4, start), state, memory)["logits"] for state in (growing, roomy))
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        growing.grow(40 if start else 24)


def test_a_mask_of_another_length_is_refused(reader: PartSession) -> None:
    memory, state = reader.new_memory(CROSS, 1), state_of(reader)
    memory.append(rows(reader, 4, 0))
    reader.run(looking(reader, 4), state, memory)
    for length in (3, 5):
        with pytest.raises(BundleError, match=rf"'cross_attention_mask' .* it was given \[1, 3, {length}\]"):
            reader.run(looking(reader, length), state, memory)
    memory.truncate(2)
    with pytest.raises(BundleError, match="cross_attention_mask"):
        reader.run(looking(reader, 4), state, memory)
    with pytest.raises(BundleError, match=r"it was given .*cross_key_values\.0\.key"):
        reader.run(looking(reader, 2) | rows(reader, 2, 0), state, memory)
    with pytest.raises(BundleError, match=r"takes the inputs .*cross_key_values\.0\.key"):
        reader.run(looking(reader, 2), state)


# -------------------------------------------------------------------------------------- the choice


def test_unknown_backend(bundle: Path) -> None:
    part = Bundle.open(bundle, check_files=False).manifest.parts["projector"]
    with pytest.raises(InputError, match="no backend 'tpu'; there are tensorrt, cuda, cpu, and auto"):
        open_part(bundle / "onnx" / "projector.onnx", "projector", part, backend="tpu", threads=None)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this machine may have the GPU")
def test_gpu_that_is_not_there(bundle: Path) -> None:
    part, path = Bundle.open(bundle, check_files=False).manifest.parts["projector"], bundle / "onnx" / "projector.onnx"
    with pytest.raises(
        InputError, match=r"projector.*cuda: the installed onnxruntime has no CUDAExecutionProvider.*edgevlm\[gpu\]"
    ):
        open_part(path, "projector", part, backend="cuda", threads=None)
    _, choice = open_part(path, "projector", part, backend=None, threads=None)
    assert choice.chosen == "cpu"
    assert "no CUDAExecutionProvider" in choice.reasons["cuda"]


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0b" + b"\xff" * 100])
def test_broken_graph(bundle: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "projector.onnx"
    path.write_bytes(content)
    part = Bundle.open(bundle, check_files=False).manifest.parts["projector"]
    with pytest.raises(BundleError, match=r"cannot load the part projector .*projector\.onnx"):
        open_part(path, "projector", part, backend="cpu", threads=None)


def test_graph_without_its_weights(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "projector.onnx").write_bytes((bundle / "onnx" / "projector.onnx").read_bytes())
    part = Bundle.open(bundle, check_files=False).manifest.parts["projector"]
    with pytest.raises(BundleError, match="cannot load the part projector"):
        open_part(tmp_path / "projector.onnx", "projector", part, backend="cpu", threads=None)


def test_manifest_of_another_graph(bundle: Path) -> None:
    part = Bundle.open(bundle, check_files=False).manifest.parts["projector"]
    other = replace(part, inputs={"features": TensorInfo("float32", ("batch_size", "image_tokens", 32))})
    session, _ = open_part(bundle / "onnx" / "projector.onnx", "projector", other, backend="cpu", threads=1)
    with pytest.raises(BundleError, match="part projector"):
        session.run({"features": np.zeros((1, 16, 32), np.float32)})


@pytest.mark.parametrize("recipe", ["int8", "int4"])
@pytest.mark.parametrize("name", ["clip-llama", "blip2-opt-350m", "flamingo-every-second"])
def test_no_weight_is_dequantized_at_every_step(tiny: Callable[[str], Any], tmp_path: Path, name: str, recipe: str) -> None:
    """A quantized weight that is not fused with its product costs more than a float one: OPT's were, eightfold."""
    import onnx

    bundle = Bundle.open(tiny(name).export(recipe=recipe))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(bundle.part_path("decoder")), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert "MatMulNBits" in operators
    assert "DequantizeLinear" not in operators
