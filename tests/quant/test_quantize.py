"""Quantized bundles: the same bytes on either way, standard operators, fused where ONNX Runtime can, near the float model."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import load, logits_of, picture

pytest.importorskip("torch")
import onnx
import onnxruntime as ort

from edgevlm.bundle import Bundle
from edgevlm.calibration import CalibrationSet, Sample, load_calibration
from edgevlm.errors import BundleError, CalibrationError, IntegrityError, OutputError, RecipeError
from edgevlm.export.export import export_bundle
from edgevlm.quant import quantize
from edgevlm.quant.quantize import quantize_bundle
from edgevlm.quant.recipe import Recipe, Rule
from edgevlm.runtimes import open_part

MIXED = Recipe(
    "mixed",
    (
        Rule("float", "embed_tokens"), Rule("int4", "decoder", "*.self_attn.*", 32), Rule("int4", "decoder", "*.mlp.*", 16),
        Rule("int8", "vision_encoder", "*.mlp.*"),
    ),
)  # fmt: skip
PARTS = ["vision_encoder", "projector", "embed_tokens", "decoder"]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def proto(bundle: Path, part: str) -> onnx.ModelProto:
    return onnx.load(bundle / "onnx" / f"{part}.onnx", load_external_data=False)


@pytest.fixture(scope="module")
def quantized(llava: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A quantized copy of a configuration's bundle, made once."""
    made: dict[tuple[str, str, str], Path] = {}

    def make(name: str, recipe: str | Recipe, dtype: str = "fp32") -> Path:
        key = (name, recipe if isinstance(recipe, str) else recipe.name, dtype)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "bundle"
            quantize_bundle(llava(name).export(dtype), made[key], recipe)
        return made[key]

    return make


# --------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize(
    ("name", "recipe", "dtype"),
    [
        ("clip-llama", "int8", "fp32"), ("odd-widths", MIXED, "fp32"),
        ("clip-qwen2-tied", "int8", "fp32"), ("clip-mistral-window", "int4", "fp32"), ("clip-mistral-window", MIXED, "fp16"),
    ],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
@pytest.mark.usefixtures("traced_once")
def test_quantizing_on_export_gives_the_same_bytes(
    llava: Callable[[str], Any],
    quantized: Callable[..., Path],
    name: str,
    recipe: str | Recipe,
    dtype: str,
    tmp_path: Path,
) -> None:
    export_bundle(str(llava(name).checkpoint), tmp_path / "at-once", dtype=dtype, recipe=recipe)
    exported, later = contents(tmp_path / "at-once"), contents(quantized(name, recipe, dtype))
    assert exported.keys() == later.keys()
    assert [file for file in exported if exported[file] != later[file]] == []


def test_again_gives_the_same_bytes(llava: Callable[[str], Any], quantized: Callable[..., Path], tmp_path: Path) -> None:
    quantize_bundle(llava("clip-llama").bundle, tmp_path / "again", "int4")
    assert contents(tmp_path / "again") == contents(quantized("clip-llama", "int4"))


# ------------------------------------------------------------------------------------------------ form


@pytest.mark.parametrize("name", ["clip-llama", "odd-widths", "clip-qwen2-tied"])
@pytest.mark.parametrize("recipe", ["int8", "int4", MIXED], ids=lambda r: getattr(r, "name", r))
def test_form(llava: Callable[[str], Any], quantized: Callable[..., Path], name: str, recipe: str | Recipe) -> None:
    bundle = quantized(name, recipe)
    manifest = Bundle.open(bundle).manifest
    before = Bundle.open(llava(name).bundle).manifest
    assert manifest.recipe is not None
    assert manifest.recipe["name"] == getattr(recipe, "name", recipe)
    assert manifest.provenance == before.provenance
    for part in PARTS:
        path = bundle / "onnx" / f"{part}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        model = proto(bundle, part)
        assert {node.domain for node in model.graph.node} == {""}
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]
        assert manifest.parts[part].inputs == before.parts[part].inputs
        assert manifest.parts[part].outputs == before.parts[part].outputs
        assert not [i.name for i in model.graph.initializer if i.name.startswith("constant_") and ".scales" in i.name]
    assert {f for f in manifest.files if not f.startswith("onnx/")} == {f for f in before.files if not f.startswith("onnx/")}


def methods(bundle: Path, part: str) -> dict[str, set[int]]:
    """Each quantized weight of a part: the block size of its DequantizeLinear, 0 for one scale a channel, -1 for rows."""
    graph, found = proto(bundle, part).graph, {}
    types = {i.name: i.data_type for i in graph.initializer}
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "DequantizeLinear":
            assert len(node.input) == 2, "no zero point"
            int4 = types[node.input[0]] == onnx.TensorProto.INT4
            assert attributes["axis"] == (0 if int4 else 1)
            assert int4 == (attributes.get("block_size", 0) > 0)
            found[node.input[0]] = attributes.get("block_size", 0)
        if node.op_type == "Gather" and types.get(node.input[0]) == onnx.TensorProto.INT8:
            found[node.input[0]] = -1
    return found


def test_recipes_reach_the_weights_they_name(quantized: Callable[..., Path]) -> None:
    layers = [f"language_model.layers.{i}" for i in range(2)]
    attention = [f"{layer}.self_attn.{p}_proj.weight" for layer in layers for p in "qkvo"]
    mlp = [f"{layer}.mlp.{p}_proj.weight" for layer in layers for p in ("gate", "up", "down")]
    table = "language_model.embed_tokens.weight.rows.int8"
    int4, int8, mixed = (quantized("clip-llama", recipe) for recipe in ("int4", "int8", MIXED))
    assert methods(int4, "decoder") == {f"{w}.int4": 32 for w in attention + mlp} | {"lm_head.weight.int8": 0}
    assert methods(int8, "decoder") == {f"{w}.int8": 0 for w in [*attention, *mlp, "lm_head.weight"]}
    assert methods(mixed, "decoder") == {f"{w}.int4": 32 for w in attention} | {f"{w}.int4": 16 for w in mlp}
    assert methods(int4, "embed_tokens") == methods(int8, "embed_tokens") == {table: -1}
    assert methods(mixed, "embed_tokens") == methods(mixed, "projector") == {}
    vision = methods(mixed, "vision_encoder")
    assert vision
    assert all(".mlp." in name and block == 0 for name, block in vision.items())
    assert all(name.startswith("vision_tower.") for name in methods(int8, "vision_encoder"))
    sizes = [Bundle.open(b).manifest.parts["decoder"].size for b in (int4, int8)]
    assert sizes[0] < 0.75 * sizes[1]


def test_no_float_copy_is_left(quantized: Callable[..., Path]) -> None:
    graph = proto(quantized("clip-llama", "int8"), "decoder").graph
    read = {name for node in graph.node for name in node.input}
    assert {i.name for i in graph.initializer} <= read
    large = [i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT and np.prod(i.dims) > 1000]
    assert large == []


@pytest.mark.parametrize("recipe", ["int8", "int4"])
@pytest.mark.parametrize("name", ["clip-llama", "odd-widths"])
def test_onnxruntime_fuses_the_decoder(quantized: Callable[..., Path], tmp_path: Path, name: str, recipe: str) -> None:
    bundle = quantized(name, recipe)
    expected = Counter(node.op_type for node in proto(bundle, "decoder").graph.node)["DequantizeLinear"]
    assert expected == 15
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(bundle / "onnx" / "decoder.onnx"), options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node)
    assert counts["MatMulNBits"] == expected
    assert counts["DequantizeLinear"] == counts["MatMul"] == 0


# --------------------------------------------------------------------------------------------- numbers


def logits(bundle: Path) -> np.ndarray:
    manifest = Bundle.open(bundle).manifest
    session, _ = open_part(bundle / "onnx" / "decoder.onnx", "decoder", manifest.parts["decoder"], backend="cpu", threads=1)
    rng, kv = np.random.default_rng(0), manifest.kv_cache
    embeds = rng.standard_normal((1, 24, manifest.hidden_size), np.float32)
    feeds = {"inputs_embeds": embeds, "position_ids": np.arange(24)[None], "last_token_index": np.array([23])}
    past = {
        name: np.zeros((1, kv.heads, 24, kv.head_dim), np.float32)
        for name in manifest.parts["decoder"].inputs
        if "past" in name
    }
    return session.run(feeds | past)["logits"][0, 0].astype(np.float32)


@pytest.mark.parametrize(("recipe", "bound"), [("int8", 0.03), ("int4", 0.25), (MIXED, 0.25)], ids=["int8", "int4", "mixed"])
@pytest.mark.parametrize("name", ["clip-llama", "odd-widths", "clip-qwen2-tied", "clip-mistral-window"])
def test_decoder_is_near_the_float_one(
    llava: Callable[[str], Any], quantized: Callable[..., Path], name: str, recipe: str | Recipe, bound: float
) -> None:
    exact, found = logits(llava(name).bundle), logits(quantized(name, recipe))
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0 < error < bound


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_other_parts_are_near_the_float_ones(llava: Callable[[str], Any], quantized: Callable[..., Path], recipe: str) -> None:
    rng = np.random.default_rng(0)
    feeds = {
        "vision_encoder": {"pixel_values": rng.standard_normal((2, 3, 28, 28), np.float32)},
        "projector": {"vision_features": rng.standard_normal((2, 16, 32), np.float32)},
        "embed_tokens": {"input_ids": rng.integers(0, 300, (2, 9))},
    }

    def first_output(bundle: Path, part: str) -> np.ndarray:
        record = Bundle.open(bundle).manifest.parts[part]
        session, _ = open_part(bundle / record.file, part, record, backend="cpu", threads=1)
        return next(iter(session.run(feeds[part]).values()))

    for part in feeds:
        exact, found = (first_output(b, part) for b in (llava("clip-llama").bundle, quantized("clip-llama", recipe)))
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert 0 < error < 0.03, part


# ------------------------------------------------------------------------------------------ what is refused


def test_quantized_bundle_is_not_quantized_again(quantized: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="already quantized with the recipe 'int8'"):
        quantize_bundle(quantized("clip-llama", "int8"), tmp_path / "out", "int4")
    assert os.listdir(tmp_path) == []


def test_bad_requests(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="int8, int4"):
        quantize_bundle(bundle, tmp_path / "out", "int3")
    with pytest.raises(BundleError, match="does not exist"):
        quantize_bundle(tmp_path / "nowhere", tmp_path / "out", "int8")
    with pytest.raises(OutputError, match="exists"):
        quantize_bundle(bundle, tmp_path, "int8")
    damaged = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    with (damaged / "onnx" / "decoder.onnx_data").open("r+b") as file:
        file.write(b"\1")
    with pytest.raises(IntegrityError, match="onnx_data was changed"):
        quantize_bundle(damaged, tmp_path / "out", "int8")
    assert os.listdir(tmp_path) == ["damaged"]


def test_full_disk(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    save, written = quantize.save_graph, []

    def fills(model: Any, path: Path, progress: Any = None) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(model, path, progress)
        written.append(path)

    monkeypatch.setattr(quantize, "save_graph", fills)
    with pytest.raises(OutputError, match="disk is full"):
        quantize_bundle(bundle, replaced, "int8", force=True)
    assert os.listdir(tmp_path) == ["bundle"]
    assert Bundle.open(replaced).manifest.recipe is None


def test_a_bundle_may_replace_itself(bundle: Path, quantized: Callable[..., Path], tmp_path: Path) -> None:
    replaced = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    quantize_bundle(replaced, replaced, "int4", force=True)
    assert contents(replaced) == contents(quantized("clip-llama", "int4"))


# ------------------------------------------------------------------------------------- nothing is left behind


def few() -> CalibrationSet:
    return load_calibration(samples=2)


STAGES = [
    "running the calibration samples", "calibrating vision_encoder", "quantizing vision_encoder", "quantizing embed_tokens",
    "calibrating decoder", "quantizing decoder",
]  # fmt: skip
EVERYTHING = Recipe("everything", (Rule("w8a8", "vision_encoder"), Rule("int4", "decoder", algorithm="awq-gptq")), "int8")


@pytest.mark.parametrize("moment", STAGES)
def test_interrupted_while_it_calibrates(bundle: Path, tmp_path: Path, moment: str) -> None:
    told: list[str] = []

    def stage(what: str) -> None:
        told.append(what)
        if what == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_bundle(bundle, tmp_path / "out", EVERYTHING, calibration=few(), stage=stage)
    assert os.listdir(tmp_path) == []
    assert [what for what in told if what in STAGES] == STAGES[: STAGES.index(moment) + 1]


def test_interrupted_while_it_writes(bundle: Path, tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    def progress(*step: Any) -> None:
        seen.append(step)
        if len(seen) == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_bundle(bundle, tmp_path / "out", EVERYTHING, calibration=few(), progress=progress)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("after", [0, 5, 20])
def test_full_disk_while_it_calibrates(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    put, count = quantize.Shelf.put, 0

    def fills(shelf: Any, array: np.ndarray) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(shelf, array)

    monkeypatch.setattr(quantize.Shelf, "put", fills)
    with pytest.raises(OutputError, match=r"^The disk is full: writing .*out stopped with .* Nothing was left behind;"):
        quantize_bundle(bundle, tmp_path / "out", EVERYTHING, calibration=few())
    assert os.listdir(tmp_path) == []


def test_no_sample_reaches_a_part(bundle: Path, tmp_path: Path) -> None:
    blind = CalibrationSet("mine", [Sample([], "Hello", "world")], 0)
    with pytest.raises(CalibrationError, match=r"^No calibration sample reached the part vision_encoder"):
        quantize_bundle(bundle, tmp_path / "out", EVERYTHING, calibration=blind)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------- caches of eight bits


@pytest.mark.parametrize("rules", [(Rule("float"),), (Rule("int4", "decoder", algorithm="awq"),)], ids=["float", "awq"])
@pytest.mark.parametrize("name", ["clip-llama", "blip2-opt-350m", "qwen2.5-vl-windows"])
def test_cache_of_eight_bits(
    tiny: Callable[[str], Any], name: str, rules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model with a float cache, whatever its weights are, answers nearly alike."""
    bundle, found = tiny(name).bundle, {}
    for cache in ("float", "int8"):
        quantize_bundle(bundle, tmp_path / cache, Recipe("r", rules, cache), calibration=load_calibration(samples=6))
        tokens = iter([7, 11, 19, 23, 5, 8])
        monkeypatch.setattr("edgevlm.vlm.choose_token", lambda *_, tokens=tokens: next(tokens))
        vlm = load(tmp_path / cache)
        _, found[cache] = logits_of(vlm, prompt="How many cubes?", images=[picture(5)], max_new_tokens=6)
    manifest, floats = (Bundle.open(tmp_path / cache).manifest for cache in ("int8", "float"))
    assert (manifest.kv_cache.dtype, floats.kv_cache.dtype) == ("int8", "float32")
    assert manifest.kv_cache.bytes_per_token() * 4 == floats.kv_cache.bytes_per_token()
    assert (manifest.recipe or {})["kv_cache"] == "int8"
    assert found["int8"].shape == found["float"].shape
    error = np.linalg.norm(found["int8"] - found["float"], axis=1) / np.linalg.norm(found["float"], axis=1)
    assert (error > 0).all()
    assert (error < 0.08).all(), error


WITHOUT_TORCH = """
import sys

recipe, *more = sys.argv[3:]

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "onnxscript", "safetensors", "huggingface_hub", *more}:
            raise ModuleNotFoundError(f"{name} is not for the robot", name=name)

sys.meta_path.insert(0, Blocked())
from edgevlm.quant.quantize import quantize_bundle
quantize_bundle(sys.argv[1], sys.argv[2], recipe)
assert "torch" not in sys.modules
"""

# Forks a process for every moment at which it is killed; a bundle that stood there stays.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path

from edgevlm.bundle import Bundle
from edgevlm.quant.quantize import quantize_bundle

source, output = Path(sys.argv[1]), Path(sys.argv[2])
began = time.monotonic()
quantize_bundle(source, output, "int8")
takes = time.monotonic() - began
for _ in range(8):
    child = os.fork()
    if not child:
        quantize_bundle(source, output, "int4", force=True)
        os._exit(0)
    time.sleep(random.uniform(0, takes))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if output.exists():
        Bundle.open(output)
quantize_bundle(source, output, "int4", force=True)
assert os.listdir(output.parent) == [output.name], os.listdir(output.parent)
"""


@pytest.mark.parametrize("asked", [("int4-rtn", "onnxruntime"), ("int4",)], ids=" without ".join)
def test_quantizing_needs_no_torch(
    bundle: Path, quantized: Callable[..., Path], asked: tuple[str, ...], tmp_path: Path
) -> None:
    """Nor a runtime, unless it calibrates."""
    command = [sys.executable, "-c", WITHOUT_TORCH, str(bundle), str(tmp_path / "out"), *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(quantized("clip-llama", asked[0]))


def test_killed_at_any_moment(bundle: Path, quantized: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "place" / "bundle"
    done = subprocess.run([sys.executable, "-c", KILLED, str(bundle), str(output)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert contents(output) == contents(quantized("clip-llama", "int4"))
