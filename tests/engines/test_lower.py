"""The form for older TensorRT answers as the canonical one does, in operators that its parser has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

pytest.importorskip("torch")

from edgevlm.bundle import Bundle, Manifest, Part
from edgevlm.engines.build import prepare_part
from edgevlm.engines.lower import KNOWN, lower_graph
from edgevlm.engines.profiles import limits_for, profiles_for
from edgevlm.errors import EngineError
from edgevlm.graphs import load_graph, save_graph

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


def run(path: Path, feeds: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(outputs, feeds)


@pytest.mark.parametrize("recipe", [None, "int4"])
@pytest.mark.parametrize(
    "name",
    [
        "clip-llama", "clip-mistral-window", "blip2-opt", "blip2-t5", "instructblip-llama", "flamingo", "flamingo-no-resampler",
        "internvl-qwen2", "internvl-llama-rms", "qwen-vl", "qwen2-vl", "qwen2.5-vl", "qwen3-vl",
    ],
)  # fmt: skip
def test_every_part_answers_alike(name: str, recipe: str | None, tiny: Callable[[str], Any], tmp_path: Path) -> None:
    bundle = Bundle.open(tiny(name).export(recipe=recipe), check_files=False)
    manifest = bundle.manifest
    for part, info in manifest.parts.items():
        profiles = profiles_for(part, info, manifest, limits_for(manifest, capacity=CAPACITY))
        model = prepare_part(bundle, part, "fp32", profiles, lowered=True)
        assert {node.op_type for node in model.graph} <= KNOWN
        assert model.graph.opset_imports[""] <= 21
        save_graph(model, tmp_path / "old.onnx")
        outputs = list(info.outputs)
        for rows in (ROWS, 1):
            feeds = part_feeds(info, manifest, rows)
            found, want = run(tmp_path / "old.onnx", feeds, outputs), run(bundle.part_path(part), feeds, outputs)
            for output, a, b in zip(outputs, found, want, strict=True):
                # INT4 products are computed in eight bits by ONNX Runtime where it fuses them.
                scale = (1e-2 if recipe else 1e-5) * max(1.0, float(np.abs(b).max()))
                np.testing.assert_allclose(a, b, atol=scale, rtol=0, err_msg=f"{part} {output}")


@pytest.mark.parametrize("name", ["clip-llama", "blip2-t5", "flamingo", "qwen2.5-vl"])
def test_tensorrts_parser_takes_it(name: str, tiny: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    from edgevlm.engines.inspection import check_network, expected_of
    from edgevlm.engines.tensorrt import open_tensorrt

    tensorrt = open_tensorrt("tensorrt-rtx")
    bundle = Bundle.open(tiny(name).export(recipe="int4"), check_files=False)
    manifest = bundle.manifest
    for part, info in manifest.parts.items():
        profiles = profiles_for(part, info, manifest, limits_for(manifest, capacity=CAPACITY))
        model = prepare_part(bundle, part, "fp16", profiles, lowered=True)
        save_graph(model, tmp_path / "old.onnx")
        network = tensorrt.parse(tmp_path / "old.onnx", part)
        assert check_network(network, expected_of(model), part)["cache_updates"] == 0
        plan, _ = tensorrt.build(network, part, profiles, ["sm86"])
        assert len(memoryview(plan)) > 1000


def lowered(text: str) -> ir.Model:
    import onnx.parser

    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 24]> {text}'))
    lower_graph(model)
    return model


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("g (float[2] x) => (float[2] y) { [n] y = Swish(x) }", "TensorRT before 10.15 has no Swish, which the node n is."),
        (
            "g (float[1,2,4,8] q, float[1,2,4,8] k) => (float[1,2,4,8] y) { [n] y = Attention<is_causal=1>(q, k, k) }",
            "n is an Attention with a cache or causality of its own",
        ),
        (
            "g (float[1,2,4,8] x, float[1,4,2] c) => (float[1,2,4,8] y) { [n] y = RotaryEmbedding<interleaved=1>(x, c, c) }",
            "n is interleaved or partial",
        ),
        ("g (float[2,4] x, float[2,4] w) => (float[2,4] y) { [n] y = RMSNormalization<axis=0>(x, w) }", "The norm n is not over"),
        (
            "g (int8[1,2,4,8] p, int8[1,2,1,8] r, int64[1] i) => (int8[1,2,4,8] y) { [n] y = TensorScatter<axis=2>(p, r, i) }",
            "The KV cache p is int8",
        ),
    ],
)  # fmt: skip
def test_what_has_no_older_form_is_named(text: str, said: str) -> None:
    with pytest.raises(EngineError) as caught:
        lowered(text)
    assert said in str(caught.value)


def test_the_bound_of_integers(tmp_path: Path) -> None:
    model = lowered(
        "g (int64[3] x) => (int64[3] y) <int64 low = {1}, int64 high = {5}> { a = Clip(x, low, high) \n y = Clip(a, , high) }"
    )
    assert {node.op_type for node in model.graph} == {"Max", "Min"}
    save_graph(model, tmp_path / "x.onnx")
    (found,) = run(tmp_path / "x.onnx", {"x": np.array([-9, 3, 9])}, ["y"])
    assert found.tolist() == [1, 3, 5]


def test_the_canonical_graph_is_left_alone(tiny: Callable[[str], Any]) -> None:
    bundle = Bundle.open(tiny("clip-llama").bundle, check_files=False)
    before = bundle.part_path("decoder").read_bytes()
    prepare_part(bundle, "decoder", "fp16", profiles_for(
        "decoder", bundle.manifest.parts["decoder"], bundle.manifest, limits_for(bundle.manifest, capacity=32)
    ), lowered=True)  # fmt: skip
    assert bundle.part_path("decoder").read_bytes() == before
    assert {node.op_type for node in load_graph(bundle.part_path("decoder")).graph} >= {"Attention", "TensorScatter"}
