"""What a model weighs, from its configuration files, is what its bundle weighs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tinies import Tiny
from tiny import BLIP2S, FLAMINGOS, INSTRUCTBLIPS, INTERNVLS, LLAVAS
from tiny_internvl_chat import INTERNVL_CHATS
from tiny_qwen2_vl import QWEN2_VLS
from tiny_qwen_vl import QWEN_VLS

pytest.importorskip("torch")

from edgevlm.bundle import Bundle
from edgevlm.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InputError,
    ManifestError,
    RecipeError,
    UnsupportedModelError,
)
from edgevlm.plan.outline import outline_bundle, outline_checkpoint, published
from edgevlm.plan.run import outline_model
from edgevlm.quant.quantize import quantize_bundle
from edgevlm.quant.recipe import Recipe, Rule

EVERY = [
    tiny.name for tiny in [*LLAVAS, *BLIP2S, *INSTRUCTBLIPS, *FLAMINGOS, *INTERNVLS, *INTERNVL_CHATS, *QWEN2_VLS, *QWEN_VLS]
]
#: One of each kind; the rest with the slow tests.
ALWAYS = {"blip2-t5-tied", "flamingo-every-second", "qwen2.5-vl-windows", QWEN_VLS[0].name}
#: Tables that the graph computes from constants are no parameters: positions, mostly. Tiny models consist of little else.
CONSTANTS = 40_000
#: Qwen-VL's graph resizes its positions by a matrix of patches × 256 numbers.
RESIZING = 4 * 64 * 256

#: How weights are quantized follows from the family, so one or two of each are enough.
QUANTIZED = ALWAYS | {group[0].name for group in (LLAVAS, BLIP2S, INSTRUCTBLIPS, INTERNVLS, INTERNVL_CHATS, QWEN2_VLS)}
CASES = [
    pytest.param(name, recipe, marks=[] if name in ALWAYS and (not recipe or "flamingo" in name) else pytest.mark.slow)
    for name in EVERY
    for recipe in (None, "int4-rtn")
    if not recipe or name in QUANTIZED
]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_a_checkpoint_weighs_what_its_bundle_weighs(
    tiny: Callable[[str], Tiny], name: str, recipe: str | None, tmp_path: Path
) -> None:
    made = tiny(name)
    outline = outline_model(str(made.checkpoint), recipe=recipe, dtype="fp32")
    folder = quantize_bundle(made.bundle, tmp_path / "bundle", recipe).folder if recipe else made.bundle
    manifest = Bundle.open(folder, check_files=False).manifest
    assert set(outline.parts) == set(manifest.parts)
    assert outline.manifest.kv_cache == manifest.kv_cache
    assert outline.manifest.context_length == manifest.context_length
    constants = CONSTANTS + (RESIZING if name.startswith("qwen-vl") else 0)
    for part, real in manifest.parts.items():
        assert outline.parts[part].size == pytest.approx(real.size, rel=0.03, abs=constants), part


@pytest.mark.parametrize("name", [LLAVAS[0].name, "flamingo-every-second", "qwen2.5-vl-windows"])
def test_a_bundle_and_its_checkpoint_have_one_outline(tiny: Callable[[str], Tiny], name: str) -> None:
    made = tiny(name)
    ours, theirs = outline_checkpoint(str(made.checkpoint), "float32"), outline_bundle(made.bundle)
    assert ours.decoder == theirs.decoder
    assert ours.vision == theirs.vision
    assert ours.look(1, (100, 80)) == theirs.look(1, (100, 80))
    for part in ours.parts:
        assert ours.parts[part].linear == pytest.approx(theirs.parts[part].linear, rel=0.03, abs=CONSTANTS / 4)
        assert ours.parts[part].tables == pytest.approx(theirs.parts[part].tables, rel=0.01)
    assert ours.parts["decoder"].head == pytest.approx(theirs.parts["decoder"].head, rel=0.02)


def test_a_bundle_is_exact(bundle: Path) -> None:
    manifest = Bundle.open(bundle, check_files=False).manifest
    outline = outline_bundle(bundle)
    for name, part in manifest.parts.items():
        floats = sum(size for form, size in part.weights.items() if not form.startswith("int64"))
        assert outline.parts[name].size == floats


def test_configuration_files_are_enough(checkpoint: Path, tmp_path: Path) -> None:
    whole = outline_checkpoint(str(checkpoint), "float32")
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, tmp_path / name)
    bare = outline_checkpoint(str(tmp_path), "float32")
    assert bare.parts == whole.parts
    assert bare.look(2, None) == whole.look(2, None)


@pytest.mark.parametrize("name", sorted(published()))
def test_published_models_have_the_parameters_they_are_named_after(name: str) -> None:
    outline = outline_checkpoint(name, "float16")
    parameters = sum(weight.count for weights in outline.weights.values() for weight in weights) / 1e9
    said = float(name.lower().rpartition("b-")[0].rpartition("-")[2])
    # Tied embeddings are there twice, and Qwen counts without the tower or with it as it likes.
    assert 0.85 * said < parameters < 1.7 * said


def test_published_llava_is_exactly_what_it_is_known_to_be() -> None:
    outline = outline_checkpoint("llava", "float16")
    weights = {name: sum(weight.count for weight in ws) for name, ws in outline.weights.items()}
    assert weights["decoder"] == 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 4096 * 32064
    assert weights["projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert outline.bytes_per_token == 2 * 32 * 4096 * 2
    assert outline.look(1, None).places == 576


def test_a_recipe_means_what_it_means_to_the_export(checkpoint: Path) -> None:
    outline = outline_checkpoint(str(checkpoint), "float32")
    one = outline.under(Recipe("one", (Rule("int4", "decoder", "*.mlp.down_proj.*"),)))
    assert 0 < one.parts["decoder"].stored["int4"] < outline.parts["decoder"].size / 8
    assert one.parts["vision_encoder"] == outline.parts["vision_encoder"]
    with pytest.raises(RecipeError, match="fits no weight"):
        outline.under(Recipe("none", (Rule("int4", "decoder", "*.no_such_layer.*"),)))


def test_int8_kv_cache_is_a_quarter_of_float32(checkpoint: Path) -> None:
    whole = outline_model(str(checkpoint), dtype="fp32").bytes_per_token
    assert outline_model(str(checkpoint), dtype="fp32", kv_cache="int8").bytes_per_token * 4 == whole
    assert outline_model(str(checkpoint), dtype="fp32", recipe="int8", kv_cache="int8").bytes_per_token * 4 == whole
    assert outline_model(str(checkpoint), dtype="fp16").bytes_per_token * 2 == whole


# --------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("resolution", "tokens", "places"),
    [
        ((1280, 960), None, 46 * 34),
        ((1280, 960), 256, 18 * 13),
        ((28, 28), None, 4),
        ((56, 56), None, 4),
        ((8000, 60), None, 572),
    ],
)
def test_places_follow_the_resolution(resolution: tuple[int, int], tokens: int | None, places: int) -> None:
    outline = _QWEN.get("o") or _QWEN.setdefault("o", outline_checkpoint("qwen2.5-vl", "float16"))
    assert outline.look(1, resolution, tokens).places == places
    assert outline.look(3, resolution, tokens).places == 3 * places


_QWEN: dict[str, object] = {}


def test_tiles_follow_the_shape(tiny: Callable[[str], Tiny]) -> None:
    outline = outline_checkpoint(str(tiny(INTERNVLS[0].name).checkpoint), "float32")
    side = outline.side
    assert side is not None
    one, wide = outline.look(1, side), outline.look(1, (3 * side[0], side[1]))
    assert one.tiles == 1
    assert wide.tiles > 1
    assert wide.places == wide.tiles * one.places


def test_images_for_a_model_with_fixed_ones(tiny: Callable[[str], Tiny]) -> None:
    outline = outline_checkpoint(str(tiny("blip2-opt-350m").checkpoint), "float32")
    for images in (0, 2):
        with pytest.raises(InputError, match=f"about {images} pictures; a blip2 model takes exactly 1"):
            outline.look(images, None)
    with pytest.raises(InputError, match="gives every picture"):
        outline.look(1, None, 8)


# ------------------------------------------------------------------------------------------- bad input


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"neither a folder here, nor an alias .*, nor a Hub id"):
        outline_model("no-such-thing")
    with pytest.raises(InputError, match=r"neither a bundle \(it has no edgevlm.json\) nor a checkpoint"):
        outline_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[1", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not JSON"):
        outline_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="holds no object"):
        outline_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["Nonsense"]}', encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="Nonsense; supported are"):
        outline_model(str(tmp_path))


def test_a_quantized_checkpoint_is_planned_as_a_bundle(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UnsupportedModelError, match="plan the bundle"):
        outline_model(str(tmp_path))


def test_any_size_needs_the_processors_file(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    shutil.copyfile(tiny("qwen2.5-vl-windows").checkpoint / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config.json"):
        outline_model(str(tmp_path))


def test_a_damaged_bundle_is_named(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    text = json.loads((tmp_path / "b" / "edgevlm.json").read_text(encoding="utf-8"))
    del text["parts"]["decoder"]
    (tmp_path / "b" / "edgevlm.json").write_text(json.dumps(text), encoding="utf-8")
    with pytest.raises(ManifestError, match="is a llava bundle without the part decoder"):
        outline_model(str(tmp_path / "b"))


def test_nf4_is_for_onnx_runtime_alone(checkpoint: Path) -> None:
    assert outline_model(str(checkpoint), recipe="nf4").onnxruntime_only
    assert not outline_model(str(checkpoint), recipe="int4").onnxruntime_only


def test_a_bundle_takes_no_recipe(bundle: Path) -> None:
    with pytest.raises(InputError, match="is a bundle, whose weights are what they are"):
        outline_model(str(bundle), recipe="int8")
