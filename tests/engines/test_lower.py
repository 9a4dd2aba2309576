"""The form for older TensorRT answers as the canonical one does, in operators that its parser has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from engine_parts import CAPACITY, INT4, ROWS, part_feeds, run_part

pytest.importorskip("torch")

from edgevlm.bundle import Bundle
from edgevlm.engines.build import prepare_part
from edgevlm.engines.lower import KNOWN, lower_graph
from edgevlm.engines.profiles import limits_for, profiles_for
from edgevlm.errors import EngineError
from edgevlm.graphs import load_graph, save_graph
from edgevlm.quant.quantize import quantize_bundle
from edgevlm.quant.recipe import Recipe


@pytest.mark.parametrize("recipe", [None, INT4], ids=["float", "int4"])
@pytest.mark.parametrize(
    "name",
    [
        "clip-llama", "clip-mistral-window", "blip2-opt", "blip2-t5", "instructblip-llama", "flamingo", "flamingo-no-resampler",
        "internvl-qwen2", "internvl-llama-rms", "qwen-vl", "qwen2-vl", "qwen2.5-vl", "qwen3-vl",
    ],
)  # fmt: skip
def test_every_part_answers_alike(name: str, recipe: Recipe | None, tiny: Callable[[str], Any], tmp_path: Path) -> None:
    bundle = Bundle.open(tiny(name).bundle, check_files=False)
    if recipe is not None:
        bundle = quantize_bundle(bundle.folder, tmp_path / "quantized", recipe)
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
            found, want = run_part(tmp_path / "old.onnx", feeds, outputs), run_part(bundle.part_path(part), feeds, outputs)
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
    bundle = quantize_bundle(tiny(name).bundle, tmp_path / "int4", INT4)
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
        ("g (float[2,4] x, float[2,4] w) => (float[2,4] y) { [n] y=RMSNormalization<axis=0>(x, w) }", "The norm n is not over"),
        (
            "g (int8[1,2,4,8] p, int8[1,2,1,8] r, int64[1] i) => (int8[1,2,4,8] y) { y = TensorScatter<axis=2>(p, r, i) }",
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
    (found,) = run_part(tmp_path / "x.onnx", {"x": np.array([-9, 3, 9])}, ["y"])
    assert found.tolist() == [1, 3, 5]


def test_the_canonical_graph_is_left_alone(tiny: Callable[[str], Any]) -> None:
    bundle = Bundle.open(tiny("clip-llama").bundle, check_files=False)
    before = bundle.part_path("decoder").read_bytes()
    prepare_part(bundle, "decoder", "fp16", profiles_for(
        "decoder", bundle.manifest.parts["decoder"], bundle.manifest, limits_for(bundle.manifest, capacity=32)
    ), lowered=True)  # fmt: skip
    assert bundle.part_path("decoder").read_bytes() == before
    assert {node.op_type for node in load_graph(bundle.part_path("decoder")).graph} >= {"Attention", "TensorScatter"}
