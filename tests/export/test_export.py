"""Exported graphs: their form for every configuration, and their numbers against transformers' own modules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import LLAVAS

pytest.importorskip("torch")
import onnx
import onnxruntime as ort
import torch
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from edgevlm.bundle import Bundle
from edgevlm.errors import ExportError, UnsupportedModelError
from edgevlm.export.export import export_bundle
from edgevlm.models import llava as family

PARTS = ["vision_encoder", "projector", "embed_tokens", "decoder"]
NAMES = [tiny.name for tiny in LLAVAS]
PREFIXES = {
    "vision_encoder": ("vision_tower.",),
    "projector": ("multi_modal_projector.",),
    "embed_tokens": ("language_model.embed_tokens.weight",),
    "decoder": ("language_model.", "lm_head.weight"),
}


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, llava: Callable[[str], Any]) -> Any:
    """Every configuration in turn."""
    return llava(request.param)


@lru_cache(maxsize=2)
def reference(checkpoint: Path) -> Any:
    """transformers' model in float32 with its plainest attention."""
    return LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


@lru_cache(maxsize=8)
def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(bundle: Path, part: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The first output of a part."""
    return session(bundle / "onnx" / f"{part}.onnx").run(None, feeds)[0]


def part_graphs(bundle: Path) -> Iterator[tuple[str, onnx.GraphProto]]:
    for part in PARTS:
        yield part, onnx.load(bundle / "onnx" / f"{part}.onnx", load_external_data=False).graph


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# ---------------------------------------------------------------------------------------------- form


def test_parts_and_checker(model: Any) -> None:
    manifest = Bundle.open(model.bundle).manifest
    assert sorted(manifest.parts) == sorted(PARTS)
    assert (manifest.family, manifest.dtype, manifest.recipe) == ("llava", "float32", None)
    for part in PARTS:
        onnx.checker.check_model(str(model.bundle / "onnx" / f"{part}.onnx"), full_check=True)


def test_only_standard_operators_of_opset_24(model: Any) -> None:
    for part in PARTS:
        proto = onnx.load(model.bundle / "onnx" / f"{part}.onnx", load_external_data=False)
        assert {node.domain for node in proto.graph.node} == {""}
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 24)]
        assert not proto.functions


def test_initializers_are_the_checkpoints_weights(model: Any) -> None:
    stored: set[str] = set()
    for path in model.checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            stored |= {family.weight_name(key) for key in file.keys()}  # noqa: SIM118
    tied = {"lm_head.weight"} if model.tiny.tied else set()
    used: set[str] = set()
    for part, graph in part_graphs(model.bundle):
        names = {entry.name for entry in graph.initializer if not entry.name.startswith("constant_")}
        assert names <= stored | tied
        assert all(name.startswith(PREFIXES[part]) for name in names), part
        used |= names
    language = {name for name in stored | tied if name.startswith(("language_model.", "lm_head.", "multi_modal_projector."))}
    assert language <= used
    assert {name for name in stored if ".layers.0." in name} <= used


def test_weights_lie_beside_their_graph(model: Any) -> None:
    for part, graph in part_graphs(model.bundle):
        external = [e for e in graph.initializer if e.data_location == onnx.TensorProto.EXTERNAL]
        assert {p.value for e in external for p in e.external_data if p.key == "location"} == {f"{part}.onnx_data"}
        assert (model.bundle / "onnx" / f"{part}.onnx_data").is_file()
        assert all(e.ByteSize() < 512 for e in graph.initializer), "a large weight is inside the graph file"


def test_attention_has_a_bool_mask_and_no_kv_lengths(model: Any) -> None:
    graph = dict(part_graphs(model.bundle))["decoder"]
    attention = [node for node in graph.node if node.op_type == "Attention"]
    assert len(attention) == 2
    boolean = {v.name for v in graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.BOOL}
    producers = {out: node for node in graph.node for out in node.output}
    for node in attention:
        assert len(node.input) == 4  # neither past_key, past_value nor nonpad_kv_seqlen
        mask = node.input[3]
        assert mask in boolean or producers[mask].op_type in {"LessOrEqual", "GreaterOrEqual", "And", "Less", "Greater"}
        assert {a.name for a in node.attribute} == {"scale"}
        assert [producers[name].op_type for name in node.input[1:3]] == ["TensorScatter", "TensorScatter"]
    for node in dict(part_graphs(model.bundle))["vision_encoder"].node:
        assert node.op_type != "Attention" or len(node.input) == 3


def test_cache_is_scattered_along_its_positions(model: Any) -> None:
    graph = dict(part_graphs(model.bundle))["decoder"]
    scatters = [node for node in graph.node if node.op_type == "TensorScatter"]
    assert [node.input[0] for node in scatters] == [f"past_key_values.{i}.{w}" for i in range(2) for w in ("key", "value")]
    for node in scatters:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["axis"] == 2
        assert attributes.get("mode", b"linear") == b"linear"
        assert len(node.input) == 3


def test_names_and_dynamic_dimensions(model: Any) -> None:
    tiny = model.tiny
    kv = ("batch_size", tiny.kv_heads, "capacity", tiny.head_dim)
    config = reference(model.checkpoint).config
    layers = len(tiny.layer) if isinstance(tiny.layer, list) else 1
    places = (tiny.side // tiny.patch) ** 2 + (tiny.tower == "clip") - (tiny.strategy == "default")
    rows = ("batch_size", "sequence_length")
    past = {f"past_key_values.{i}.{w}": kv for i in range(2) for w in ("key", "value")}
    declared: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "vision_encoder": (
            {"pixel_values": ("batch_size", 3, tiny.side, tiny.side)},
            {"vision_features": ("batch_size", places, 32 * layers)},
        ),
        "projector": (
            {"vision_features": ("batch_size", "image_tokens", 32 * layers)},
            {"image_features": ("batch_size", "image_tokens", tiny.hidden)},
        ),
        "embed_tokens": ({"input_ids": rows}, {"inputs_embeds": (*rows, tiny.hidden)}),
        "decoder": (
            {"inputs_embeds": (*rows, tiny.hidden), "position_ids": rows, "last_token_index": ("batch_size",), **past},
            {
                "logits": ("batch_size", 1, config.text_config.vocab_size),
                **{name.replace("past_key_values", "present"): shape for name, shape in past.items()},
            },
        ),
    }
    manifest = Bundle.open(model.bundle, check_files=False).manifest
    for part, graph in part_graphs(model.bundle):
        found = [
            {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
            for values in (graph.input, graph.output)
        ]
        assert tuple(found) == declared[part]
        assert [list(f) for f in found] == [list(d) for d in declared[part]], "their order"
        recorded = manifest.parts[part]
        assert {name: info.shape for name, info in recorded.inputs.items()} == declared[part][0]
        assert {name: info.shape for name, info in recorded.outputs.items()} == declared[part][1]
        assert recorded.nodes == len(graph.node)
    assert manifest.image.places == places
    assert (manifest.kv_cache.layers, manifest.kv_cache.heads, manifest.kv_cache.head_dim) == (2, tiny.kv_heads, tiny.head_dim)


def test_no_shape_arithmetic_is_left_in_the_decoder(model: Any) -> None:
    operators = [node.op_type for node in dict(part_graphs(model.bundle))["decoder"].node]
    assert operators.count("Shape") <= 2
    assert operators.count("RMSNormalization") == 5
    assert operators.count("RotaryEmbedding") == 4
    assert "Transpose" in operators
    assert "Identity" not in operators


# ------------------------------------------------------------------------------- numbers: vision side


@pytest.mark.parametrize("batch", [1, 3])
def test_vision_and_projector_are_transformers(model: Any, batch: int) -> None:
    tiny, torch_model = model.tiny, reference(model.checkpoint)
    pixels = random(batch, 3, tiny.side, tiny.side)
    with torch.no_grad():
        states = torch_model.model.vision_tower(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
        chosen = [states[layer] for layer in (tiny.layer if isinstance(tiny.layer, list) else [tiny.layer])]
        if tiny.strategy == "default":
            chosen = [state[:, 1:] for state in chosen]
        expected = torch.cat(chosen, -1)
        projected = torch_model.model.multi_modal_projector(expected)
        whole = torch_model.model.get_image_features(
            pixel_values=torch.from_numpy(pixels), vision_feature_layer=tiny.layer, vision_feature_select_strategy=tiny.strategy
        )
        whole = getattr(whole, "pooler_output", whole)
    features = run(model.bundle, "vision_encoder", {"pixel_values": pixels})
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-4, rtol=0)
    embeddings = run(model.bundle, "projector", {"vision_features": expected.numpy()})
    np.testing.assert_allclose(embeddings, projected.numpy(), atol=1e-4, rtol=0)
    # The two together are what transformers puts in the places of a picture.
    together = run(model.bundle, "projector", {"vision_features": features})
    np.testing.assert_allclose(together, torch.stack(list(whole)).numpy(), atol=1e-4, rtol=0)


def test_embeddings_are_the_table_itself(model: Any) -> None:
    table = reference(model.checkpoint).model.language_model.embed_tokens.weight.detach().numpy()
    ids = np.random.default_rng(1).integers(0, len(table), (2, 7))
    np.testing.assert_array_equal(run(model.bundle, "embed_tokens", {"input_ids": ids}), table[ids])


# ----------------------------------------------------------------------------------- numbers: decoder


class DecoderGraph:
    """The decoder's graph, fed with its own cache from step to step."""

    def __init__(self, bundle: Path, capacity: int, batch: int = 1) -> None:
        self.session = session(bundle / "onnx" / "decoder.onnx")
        inputs = self.session.get_inputs()
        self.dtype = np.float16 if "float16" in inputs[0].type else np.float32
        self.past = {
            i.name: np.zeros((batch, i.shape[1], capacity, i.shape[3]), self.dtype) for i in inputs if i.name.startswith("past")
        }

    def __call__(self, embeds: np.ndarray, start: Sequence[int], last: Sequence[int]) -> np.ndarray:
        """Logits `[B, vocabulary]` of the rows `last`."""
        positions = np.array(start)[:, None] + np.arange(embeds.shape[1])
        feeds = {"inputs_embeds": embeds.astype(self.dtype), "position_ids": positions, "last_token_index": np.array(last)}
        logits, *present = self.session.run(None, feeds | self.past)
        self.past = dict(zip(self.past, present, strict=True))
        return logits[:, 0]


def expected_logits(model: Any, embeds: np.ndarray) -> np.ndarray:
    """transformers' logits `[S, vocabulary]` for one row `[S, hidden]`, without a cache."""
    torch_model = reference(model.checkpoint)
    with torch.no_grad():
        hidden = torch_model.model.language_model(
            inputs_embeds=torch.from_numpy(embeds[None]), use_cache=False
        ).last_hidden_state
        return torch_model.lm_head(hidden)[0].numpy()


LENGTH = 40  # longer than the sliding window of the one configuration that has one


@pytest.mark.parametrize("capacity", [LENGTH, LENGTH + 17])
@pytest.mark.parametrize("chunks", [[40], [9, 1, 16, 14], [1] * 40], ids=["whole", "chunked", "by-token"])
def test_prefill_is_transformers(model: Any, chunks: list[int], capacity: int) -> None:
    embeds = random(LENGTH, model.tiny.hidden)
    expected = expected_logits(model, embeds)
    decoder, done = DecoderGraph(model.bundle, capacity), 0
    for size in chunks:
        logits = decoder(embeds[None, done : done + size], [done], [size - 1])
        done += size
        np.testing.assert_allclose(logits[0], expected[done - 1], atol=1e-4, rtol=0)
    assert np.abs(expected[-1] - expected[0]).max() > 0.1, "the prompt does not matter"


def test_logits_come_from_the_row_asked_for(model: Any) -> None:
    embeds = random(12, model.tiny.hidden, seed=2)
    expected = expected_logits(model, embeds)
    for row in (0, 5, 11):
        logits = DecoderGraph(model.bundle, 12)(embeds[None], [0], [row])
        np.testing.assert_allclose(logits[0], expected[row], atol=1e-4, rtol=0)


def test_ragged_batch_is_each_row_alone(model: Any) -> None:
    lengths, more, hidden = (9, 5), 18, model.tiny.hidden
    rows = [random(length + more, hidden, seed=10 + i) for i, length in enumerate(lengths)]
    expected = [expected_logits(model, row) for row in rows]
    padded = 100 * random(2, max(lengths), hidden, seed=12)  # rubbish behind the end of the shorter row
    for row, length, target in zip(rows, lengths, padded, strict=True):
        target[:length] = row[:length]
    decoder = DecoderGraph(model.bundle, 32, batch=2)
    logits = decoder(padded, [0, 0], [length - 1 for length in lengths])
    for step in range(more):
        for i, length in enumerate(lengths):
            np.testing.assert_allclose(
                logits[i], expected[i][length - 1 + step], atol=1e-4, rtol=0, err_msg=f"row {i}, step {step}"
            )
        places = [length + step for length in lengths]
        logits = decoder(np.stack([row[place][None] for row, place in zip(rows, places, strict=True)]), places, [0, 0])


@pytest.mark.parametrize(("name", "seen"), [("clip-mistral-window", False), ("clip-llama", True)])
def test_what_lies_behind_the_window_is_not_seen(llava: Callable[[str], Any], name: str, seen: bool) -> None:
    bundle = llava(name).bundle
    embeds = random(1, LENGTH, 64)
    changed = embeds.copy()
    changed[0, 0] += 1  # two layers of a window of 12 reach back 22 places, not 39
    first, second = (DecoderGraph(bundle, LENGTH)(rows, [0], [LENGTH - 1]) for rows in (embeds, changed))
    assert (np.abs(first - second).max() > 1e-5) == seen


# --------------------------------------------------------------------------------------- other widths


@pytest.mark.parametrize("name", ["clip-llama", "clip-mistral-window"])
def test_fp16_is_close_to_fp32(llava: Callable[[str], Any], name: str) -> None:
    model = llava(name)
    half = model.export("fp16")
    manifest = Bundle.open(half).manifest
    assert (manifest.dtype, manifest.kv_cache.dtype) == ("float16", "float16")
    for part in manifest.parts.values():
        weights = {dtype: size for dtype, size in part.weights.items() if dtype.startswith("float")}
        assert weights.get("float16", 0) > 10 * weights.get("float32", 0), part.file
    embeds = random(1, LENGTH, model.tiny.hidden)
    wide, narrow = (DecoderGraph(b, LENGTH)(embeds, [0], [LENGTH - 1]).astype(np.float32) for b in (model.bundle, half))
    assert 0 < np.abs(wide - narrow).max() < 2e-2 * np.abs(wide).max()
    pixels = random(1, 3, model.tiny.side, model.tiny.side)
    wide = run(model.bundle, "projector", {"vision_features": run(model.bundle, "vision_encoder", {"pixel_values": pixels})})
    features = run(half, "vision_encoder", {"pixel_values": pixels.astype(np.float16)})
    narrow = run(half, "projector", {"vision_features": features}).astype(np.float32)
    assert 0 < np.abs(wide - narrow).max() < 2e-2 * np.abs(wide).max()


def test_checkpoints_are_what_their_names_say(llava: Callable[[str], Any]) -> None:
    """The configurations above do cover sharded, half-width and newly named checkpoints."""
    assert len(list(llava("clip-qwen2-tied").checkpoint.glob("*.safetensors"))) > 1
    for name, dtype in (("clip-mistral-window", "BF16"), ("clip-qwen2-tied", "F16"), ("clip-llama", "F32")):
        with safe_open(next(llava(name).checkpoint.glob("*.safetensors")), framework="numpy") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {dtype}  # noqa: SIM118
    with safe_open(llava("siglip-qwen2").checkpoint / "model.safetensors", framework="numpy") as file:
        assert any(key.startswith("model.language_model.") for key in file.keys())  # noqa: SIM118


def test_the_same_checkpoint_gives_the_same_bytes_and_progress_is_told(llava: Callable[[str], Any], tmp_path: Path) -> None:
    stages: list[str] = []
    tensors: list[tuple[str, int, int, int]] = []
    model = llava("clip-llama")
    bundle = export_bundle(
        str(model.checkpoint), tmp_path / "again", stage=stages.append, progress=lambda *t: tensors.append(t)
    )
    assert digests(tmp_path / "again") == digests(model.bundle)
    assert [s for s in stages if s.startswith("writing")] == [f"writing {part}" for part in PARTS]
    assert [s for s in stages if s.startswith("tracing")] == [f"tracing {part}" for part in PARTS]
    sizes = {name: size for name, _, _, size in tensors}
    vocabulary = bundle.manifest.vocab_size
    assert sizes["language_model.embed_tokens.weight"] == sizes["lm_head.weight"] == 4 * 64 * vocabulary
    assert all(0 <= index < total for _, index, total, _ in tensors)


def test_unknown_dtype_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="fp32, fp16"):
        export_bundle(str(checkpoint), tmp_path / "out", dtype="fp8")


def test_foreign_operators_are_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.export.passes.lower_linear.run", lambda model: None)
    with pytest.raises(ExportError, match="edgevlm"):
        export_bundle(str(checkpoint), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
