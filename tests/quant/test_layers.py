"""What calibration makes of the layers of a part: the same function until it is rounded, no operator more, smaller errors."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from recorded import graphs_of, record, relative, run
from tinies import Tiny

pytest.importorskip("torch")
from edgevlm.bundle import Bundle
from edgevlm.calibration import load_calibration
from edgevlm.errors import RecipeError, WeightsError
from edgevlm.graphs import load_graph
from edgevlm.quant import calibrate, layers
from edgevlm.quant.calibrate import Shelf
from edgevlm.quant.fold import weight_of
from edgevlm.quant.layers import Prepared, block_of, prepare_layers
from edgevlm.quant.quantize import check_recipe, quantize_bundle, quantize_graph
from edgevlm.quant.recipe import Recipe, Rule, load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = (
    "clip-llama", "blip2-opt-350m", "flamingo-every-second", "internvl-qwen2", pytest.param("qwen-vl", marks=pytest.mark.slow),
    pytest.param("blip2-t5-tied", marks=pytest.mark.slow), pytest.param("qwen2.5-vl-windows", marks=pytest.mark.slow),
)  # fmt: skip
EVERYWHERE = {
    "awq": Recipe("awq", (Rule("int4", algorithm="awq"),)),
    "gptq": Recipe("gptq", (Rule("int4", algorithm="gptq"),)),
    "awq-gptq": Recipe("awq-gptq", (Rule("int4", algorithm="awq-gptq"),)),
    "int3": Recipe("int3", (Rule("int3", algorithm="awq", block_size=0),)),
    "w8a8": Recipe("w8a8", (Rule("w8a8"),)),
}
every_recipe = pytest.mark.parametrize("recipe", EVERYWHERE.values(), ids=EVERYWHERE)


def prepare(model: ir.Model, part: str, recipe: Recipe, feeds: Sequence[Any], folder: Path) -> Prepared:
    (folder / "shelf").mkdir(exist_ok=True)
    return prepare_layers(model, part, recipe, feeds, Shelf(folder / "shelf", smallest=1024), lambda *_: None)


def quantized(model: ir.Model, part: str, recipe: Recipe, feeds: Sequence[Any], folder: Path) -> Prepared:
    """Rewrites the graph."""
    prepared = prepare(model, part, recipe, feeds, folder)
    quantize_graph(model, part, recipe, prepared)
    return prepared


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Prepared]]:
    """Folds what calibration would fold into a graph, and rounds nothing; how many weights that changed, and the rest."""
    kept: dict[str, Any] = {}
    monkeypatch.setattr(layers, "_round", lambda layer, *_: kept.update({layer.weight.name: layer.weight.const_value}))

    def fold(model: ir.Model, part: str, recipe: Recipe, feeds: Sequence[Any], folder: Path) -> tuple[int, Prepared]:
        kept.clear()
        prepared = prepare(model, part, recipe, feeds, folder)
        changed = 0
        for name, tensor in kept.items():
            value = model.graph.initializers[name]
            changed += value.const_value is not tensor
            value.const_value = tensor
        return changed, prepared

    return fold


# --------------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize("kind", ["awq", "w8a8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_folding_changes_nothing(
    tiny: Callable[[str], Tiny], folded: Callable[..., tuple[int, Prepared]], name: str, kind: str, tmp_path: Path
) -> None:
    bundle, changed = tiny(name).bundle, {}
    for part, model in graphs_of(bundle):
        feeds = record(bundle)[part]
        wanted = run(model, feeds, tmp_path)
        changed[part], _ = folded(model, part, EVERYWHERE[kind], feeds, tmp_path)
        for found, exact in zip(run(model, feeds, tmp_path), wanted, strict=True):
            for output, array in exact.items():
                if not output.startswith("present."):  # whose values are divided with their channels
                    assert relative(found[output], array) < 1e-4, (part, output)
    assert changed["decoder"] >= 8
    assert changed["vision_encoder"] >= 5


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["awq", "gptq", "awq-gptq"])
def test_the_graph_is_that_of_rounding_to_nearest(tiny: Callable[[str], Tiny], name: str, kind: str, tmp_path: Path) -> None:
    bundle, plain = tiny(name).bundle, Recipe("rtn", (Rule("int4"),))
    for part, model in graphs_of(bundle):
        nearest = model.clone()
        quantize_graph(nearest, part, plain)
        prepared = quantized(model, part, EVERYWHERE[kind], record(bundle)[part], tmp_path)
        assert [node.op_type for node in model.graph] == [node.op_type for node in nearest.graph]
        shapes = [{n: (v.shape, v.dtype) for n, v in m.graph.initializers.items()} for m in (model, nearest)]
        assert shapes[0] == shapes[1], part
        assert {layer["weight"] for layer in prepared.layers} == set(prepared.weights)
        assert prepared.activations == prepared.caches == {}


@every_recipe
@pytest.mark.parametrize("name", FAMILIES)
def test_errors_are_smaller(tiny: Callable[[str], Tiny], name: str, recipe: Recipe, tmp_path: Path) -> None:
    bundle, found = tiny(name).bundle, []
    for part, model in graphs_of(bundle):
        found += prepare(model, part, recipe, record(bundle)[part], tmp_path).layers
    assert len({(layer["part"], layer["weight"]) for layer in found}) == len(found) > 20
    errors, nearest = ([layer[key] for layer in found] for key in ("relative_error", "relative_error_nearest"))
    assert 0 < np.mean(errors) <= np.mean(nearest)
    # Layers that share factors may gain at the cost of one of them; SmoothQuant's share is not even searched.
    most = 2.5 if recipe.name == "w8a8" else 1.6
    assert max(error / plain for error, plain in zip(errors, nearest, strict=True) if plain) < most
    assert all(layer["rows"] > 0 and layer["method"] == recipe.rules[0].method for layer in found)


# ----------------------------------------------------------------------------------- eight bits twice


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_has_its_pair(tiny: Callable[[str], Tiny], name: str, tmp_path: Path) -> None:
    """In front of it, with a scale of its own; nothing else in the graph is rounded."""
    bundle, recipe = tiny(name).bundle, Recipe("r", (Rule("int8", weights="*o_proj*", optional=True), Rule("w8a8")))
    for part, model in graphs_of(bundle):
        linear = {node: weight for node in model.graph if (weight := weight_of(node)) is not None}
        eight = [node for node, weight in linear.items() if recipe.rule_for(part, weight.name or "").method == "w8a8"]
        weights = set(linear.values())
        prepared = quantized(model, part, recipe, record(bundle)[part], tmp_path)
        assert prepared.activations.keys() == {node.name for node in eight}
        after = Counter(node.op_type for node in model.graph)
        assert after["QuantizeLinear"] == len(eight)
        assert after["DequantizeLinear"] == len(eight) + len(weights)
        for node in linear:
            widen = node.inputs[0].producer()  # type: ignore[union-attr]
            if node not in eight:
                assert widen is None or widen.op_type != "DequantizeLinear"
                continue
            assert widen is not None
            assert widen.op_type == "DequantizeLinear"
            narrow = widen.inputs[0].producer()  # type: ignore[union-attr]
            assert narrow is not None
            assert narrow.op_type == "QuantizeLinear"
            scale = narrow.inputs[1].const_value.numpy()  # type: ignore[union-attr]
            assert float(scale) == pytest.approx(prepared.activations[node.name or ""], rel=1e-6)


# -------------------------------------------------------------------------------- what is said of errors


def norm_and_two(dtype: str, gain: Any = 1.0) -> tuple[ir.Model, list[Mapping[str, np.ndarray]]]:
    """A norm that two linear layers read, and rows of which some numbers are loud."""
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
    g ({dtype}[n, 64] x) => ({dtype}[n, 40] y, {dtype}[n, 24] z) <{dtype}[n, 64] h, {dtype}[64] g> {{
        h = RMSNormalization(x, g)
        y = MatMul(h, v)
        z = MatMul(h, w)
    }}"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    rng, kind = np.random.default_rng(0), np.dtype(np.float32 if dtype == "float" else np.float16)
    loud = np.where(np.arange(64) % 20 == 7, 12, 1)
    arrays = {"v": rng.standard_normal((64, 40)), "w": rng.standard_normal((64, 24)), "g": np.ones(64) * gain}
    for node in model.graph:
        node.name = f"{node.inputs[1].name}_layer"  # type: ignore[union-attr]
    for node in model.graph:
        name = node.inputs[1].name or ""  # type: ignore[union-attr]
        array = arrays[name].astype(kind)
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(kind)
        model.graph.register_initializer(value)
        node.replace_input_with(1, value)
    return model, [{"x": (rng.standard_normal((60, 64)) * loud).astype(kind)} for _ in range(2)]


@every_recipe
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_the_errors_in_the_report(recipe: Recipe, dtype: str, tmp_path: Path) -> None:
    """What the rounded graph makes of the calibration rows, beside what the float graph makes of them."""
    model, feeds = norm_and_two(dtype)
    nearest, method = model.clone(), recipe.rules[0].method
    exact = run(model, feeds, tmp_path)
    prepared = quantized(model, "decoder", recipe, feeds, tmp_path)
    found = run(model, feeds, tmp_path)
    wide = 1e-4 if dtype == "float" else 3e-3
    for layer in prepared.layers:
        output = {"v": "y", "w": "z"}[layer["weight"]]
        ours, wanted = (np.concatenate([one[output] for one in outs]) for outs in (found, exact))
        assert relative(ours, wanted) == pytest.approx(layer["relative_error"], rel=0.02, abs=wide)
        assert layer["rows"] == 120
    if method == "int4":
        quantize_graph(nearest, "decoder", Recipe("rtn", (Rule("int4"),)))
        plain = run(nearest, feeds, tmp_path)
        for layer in prepared.layers:
            output = {"v": "y", "w": "z"}[layer["weight"]]
            ours, wanted = (np.concatenate([one[output] for one in outs]) for outs in (plain, exact))
            assert relative(ours, wanted) == pytest.approx(layer["relative_error_nearest"], rel=0.02, abs=wide)
            assert layer["relative_error"] < layer["relative_error_nearest"]
    assert {layer["weight"] for layer in prepared.layers} == {"v", "w"}


@pytest.mark.parametrize("kind", ["awq", "w8a8"])
@pytest.mark.parametrize(("gains", "heights"), [((300, 1e-2), (1e-2, 30)), ((1e-3, 1e-4), (9000, 9000))])
def test_half_precision_is_not_left(
    kind: str, gains: tuple[float, float], heights: tuple[float, float], tmp_path: Path
) -> None:
    """What the factors make larger, inputs or weights, stays within float16."""
    loud = np.arange(64) % 20 == 7
    model, feeds = norm_and_two("float16", np.where(loud, *gains))
    for value in (model.graph.initializers[name] for name in "vw"):
        rows = np.where(loud, *heights)[:, None]
        value.const_value = ir.tensor((value.const_value.numpy() * rows).astype(np.float16), name=value.name)  # type: ignore[union-attr]
    exact = run(model, feeds, tmp_path)
    quantized(model, "decoder", EVERYWHERE[kind], feeds, tmp_path)
    for found, wanted in zip(run(model, feeds, tmp_path), exact, strict=True):
        for name in wanted:
            assert np.isfinite(found[name]).all()
            assert relative(found[name], wanted[name]) < 0.3


def test_a_weight_that_two_layers_share(tmp_path: Path) -> None:
    model, feeds = norm_and_two("float")
    first, second = [node for node in model.graph if node.op_type == "MatMul"]
    second.replace_input_with(1, first.inputs[1])
    second.outputs[0].shape = first.outputs[0].shape
    del model.graph.initializers["w"]
    exact = run(model, feeds, tmp_path)
    prepared = quantized(model, "decoder", EVERYWHERE["awq"], feeds, tmp_path)
    assert list(prepared.weights) == ["v"]
    for found, wanted in zip(run(model, feeds, tmp_path), exact, strict=True):
        assert 0 < relative(found["z"], wanted["z"]) < 0.2
        np.testing.assert_array_equal(found["y"], found["z"])


def test_layers_with_different_rules_share_factors(tmp_path: Path) -> None:
    """One is rounded knowing its input, the other stays as it is, and gets what the norm lost."""
    model, feeds = norm_and_two("float")
    exact = run(model, feeds, tmp_path)
    quantized(model, "decoder", Recipe("r", (Rule("int4", weights="v", algorithm="awq"),)), feeds, tmp_path)
    assert (model.graph.initializers["g"].const_value.numpy() != 1).any()  # type: ignore[union-attr]
    for found, wanted in zip(run(model, feeds, tmp_path), exact, strict=True):
        assert 0.001 < relative(found["y"], wanted["y"]) < 0.2
        assert relative(found["z"], wanted["z"]) < 1e-5


# ------------------------------------------------------------------------------------------- in pieces


@every_recipe
@pytest.mark.parametrize("name", ["clip-llama", pytest.param("blip2-opt-350m", marks=pytest.mark.slow)])
def test_in_pieces(
    tiny: Callable[[str], Tiny], name: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of a few layers fold less, and come out about as well."""
    bundle = tiny(name).bundle
    for part in ("vision_encoder", "decoder"):
        feeds, errors, told = record(bundle)[part], [], []
        for most in (1 << 30, 12_000):
            monkeypatch.setattr(calibrate, "SEGMENT_BYTES", most)
            model = dict(graphs_of(bundle))[part]
            exact = run(model, feeds, tmp_path)
            steps: list[tuple[int, int]] = []
            folder = tmp_path / part / str(most)
            folder.mkdir(parents=True)
            shelf = Shelf(folder, smallest=64)
            prepared = prepare_layers(model, part, recipe, feeds, shelf, lambda n, of, steps=steps: steps.append((n, of)))
            told.append(steps)
            quantize_graph(model, part, recipe, prepared)
            for found, wanted in zip(run(model, feeds, tmp_path), exact, strict=True):
                first = next(iter(wanted))
                assert 0 < relative(found[first], wanted[first]) < (0.6 if recipe.name == "int3" else 0.35), (part, most)
            errors.append(np.mean([layer["relative_error"] for layer in prepared.layers]))
        assert told[0] == [(0, 1)]
        assert len(told[1]) > 2
        assert told[1] == [(n, len(told[1])) for n in range(len(told[1]))]
        assert errors[1] == pytest.approx(errors[0], rel=0.3)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


@pytest.mark.parametrize("recipe", ["int4", "int4-gptq", "w8a8"])
def test_the_same_samples_give_the_same_bytes(tiny: Callable[[str], Tiny], recipe: str, tmp_path: Path) -> None:
    bundle, made = tiny("clip-llama").bundle, []
    for number, seed in enumerate((3, 3, 4)):
        quantize_bundle(bundle, tmp_path / str(number), recipe, calibration=load_calibration(samples=3, seed=seed))
        made.append(digests(tmp_path / str(number)))
    assert made[0] == made[1]
    different = {name for name in made[0] if made[0][name] != made[2][name]}
    part = "vision_encoder" if recipe == "w8a8" else "decoder"
    assert different >= {f"onnx/{part}.onnx_data", "reports/quantization.json", "edgevlm.json"}
    assert not different & {"onnx/embed_tokens.onnx_data", "tokenizer.json"}


# ---------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("rules", [(Rule("float"),), (Rule("int4", algorithm="awq"),)], ids=["float", "awq"])
@pytest.mark.parametrize("name", ["clip-llama", "flamingo-every-second"])
def test_caches(
    tiny: Callable[[str], Tiny], folded: Callable[..., tuple[int, Prepared]], rules: Any, name: str, tmp_path: Path
) -> None:
    """The loudest that each channel gets, as the folded graph writes it."""
    bundle, recipe = tiny(name).bundle, Recipe("r", rules, "int8")
    for part, model in graphs_of(bundle):
        feeds = record(bundle)[part]
        changed, prepared = folded(model, part, recipe, feeds, tmp_path)
        assert bool(changed) == (rules[0].method != "float" and part not in ("projector", "cross_kv"))
        caches = prepared.caches
        if part != "decoder":
            assert caches == {}
            continue
        # What is recorded has an empty cache, as long as the sample.
        outs = run(model, feeds, tmp_path)
        wanted = {
            output: np.max([np.abs(out[output]).max((0, 2)) for out in outs], 0) for output in outs[0] if "present." in output
        }
        assert {cache.replace("past_key_values", "present") for cache in caches} == wanted.keys()
        for cache, peak in caches.items():
            np.testing.assert_allclose(peak, wanted[cache.replace("past_key_values", "present")], rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------------------------- refused


@every_recipe
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_weight_is_named(tiny: Callable[[str], Tiny], recipe: Recipe, bad: float, tmp_path: Path) -> None:
    bundle = tiny("clip-llama").bundle
    model = dict(graphs_of(bundle))["decoder"]
    name = "language_model.layers.1.self_attn.k_proj.weight"
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = np.array(value.const_value.numpy())
    array[-1, 3] = bad
    value.const_value = ir.tensor(array, name=name)
    with pytest.raises(WeightsError, match=rf"The weight {name} of the part decoder has NaN or infinite values"):
        prepare(model, "decoder", recipe, record(bundle)["decoder"], tmp_path)


@every_recipe
def test_what_becomes_infinite_is_named(recipe: Recipe, tmp_path: Path) -> None:
    model, feeds = norm_and_two("float", np.where(np.arange(64) == 3, np.nan, 1))
    with pytest.raises(RecipeError, match="What calibration saw enter the weight v of the part decoder has NaN or infinite"):
        prepare(model, "decoder", recipe, feeds, tmp_path)


def test_nothing_reached_a_layer(tmp_path: Path) -> None:
    model, _ = norm_and_two("float")
    with pytest.raises(RecipeError, match=r"No calibration sample reached the weight v of the part decoder\. Give samples"):
        prepare(model, "decoder", EVERYWHERE["awq"], [{"x": np.zeros((0, 64), np.float32)}], tmp_path)


@pytest.mark.parametrize("algorithm", ["rtn", "awq"])
def test_a_block_that_a_weight_cannot_fill(tiny: Callable[[str], Tiny], algorithm: str, tmp_path: Path) -> None:
    """Known before any work is done."""
    bundle = tiny("clip-llama").bundle
    graphs = {part: load_graph(bundle / "onnx" / f"{part}.onnx") for part in ("vision_encoder", "decoder")}
    recipe = Recipe("r", (Rule("int4", "decoder", "*.down_proj.*", 64), Rule("int4", "*", "*", 64, algorithm)))
    said = (
        r"The weight vision_tower\S+ of the part vision_encoder has 32 inputs, fewer than the 64 of a block that the recipe "
        r"asks for\. Give it a rule of its own with a smaller block_size \(0: one scale a channel\), or leave it float\."
    )
    with pytest.raises(RecipeError, match=said):
        check_recipe(recipe, graphs)
    told: list[str] = []
    with pytest.raises(RecipeError, match=said):
        quantize_bundle(bundle, tmp_path / "out", recipe, calibration=load_calibration(samples=1), stage=told.append)
    assert (told, list(tmp_path.iterdir())) == ([], [])
    check_recipe(Recipe("r", (Rule("int4", "decoder", "*", 64, algorithm),)), graphs)


def test_a_cache_that_cannot_be_of_eight_bits(tiny: Callable[[str], Tiny]) -> None:
    """Known before any work is done; parts without a cache do not matter."""
    graphs, recipe = dict(graphs_of(tiny("clip-llama").bundle)), Recipe("r", (Rule("float"),), "int8")
    check_recipe(recipe, graphs)
    scatter = next(node for node in graphs["decoder"].graph if node.op_type == "TensorScatter")
    graphs["decoder"].graph.insert_before(scatter, ir.Node("", "Neg", [scatter.inputs[0]], name="neg"))
    with pytest.raises(RecipeError, match=r"past_key_values\.0\.key is read by .*Neg.*not by one TensorScatter"):
        check_recipe(recipe, graphs)
    check_recipe(Recipe("r", (Rule("float"),)), graphs)


@pytest.mark.parametrize(("size", "block"), [(None, 32), (0, 20), (16, 16)])
def test_blocks_of_a_narrow_weight(size: int | None, block: int) -> None:
    weight = ir.Value(name="w", const_value=ir.tensor(np.ones((20, 4), np.float32)))
    assert block_of(Rule("int4", block_size=size), "decoder", weight) == block


def test_calibrated_layers_need_samples(tiny: Callable[[str], Tiny]) -> None:
    graphs = dict(graphs_of(tiny("clip-llama").bundle))
    with pytest.raises(RecipeError, match=r"\(int4, awq\) looks at calibration samples; there are none"):
        quantize_graph(graphs["decoder"], "decoder", load_recipe("int4"))
    with pytest.raises(RecipeError, match="Calibration saw nothing of the KV cache"):
        quantize_graph(graphs["decoder"], "decoder", Recipe("r", (Rule("float"),), "int8"))


def test_the_manifest_of_an_untouched_part(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """A recipe for the decoder alone leaves other parts as they are, byte for byte."""
    bundle = tiny("clip-llama").bundle
    recipe = Recipe("r", (Rule("int4", "decoder", "*.mlp.*", algorithm="awq"),))
    quantize_bundle(bundle, tmp_path / "out", recipe, calibration=load_calibration(samples=2))
    before, after = digests(bundle), digests(tmp_path / "out")
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed == {"onnx/decoder.onnx", "onnx/decoder.onnx_data", "edgevlm.json", "reports/quantization.json"}
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest.recipe is not None
    assert manifest.recipe["calibration"]["samples"] == 2
