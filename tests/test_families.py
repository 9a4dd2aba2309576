"""What holds for every family and every configuration: the bundle is the model, whatever its form and its weights.

A handful that has every mechanism once runs always, the others with the slow tests.
"""

from __future__ import annotations

import inspect
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import load, logits_of, picture
from tinies import Tiny
from tiny import BLIP2S, FLAMINGOS, INSTRUCTBLIPS, LLAVAS, TinyBlip2, TinyFlamingo, TinyInstructBlip, TinyLlava, load_tiny
from tiny_qwen2_vl import QWEN2_VLS, TinyQwen2VL
from tiny_qwen_vl import QWEN_VLS, TinyQwenVL

pytest.importorskip("torch")
import onnx

from edgevlm import models
from edgevlm.bundle import MANIFEST, Bundle, Manifest
from edgevlm.export.export import export_bundle
from edgevlm.models import Family
from edgevlm.quant.quantize import quantize_bundle
from edgevlm.verify import TOKENS, verify_bundle

#: Of LLaVA one: its own tests try all of it.
EVERY = {tiny.name: tiny for tiny in [LLAVAS[0], *BLIP2S, *INSTRUCTBLIPS, *FLAMINGOS, *QWEN_VLS, *QWEN2_VLS]}
#: What makes a difference to bytes and to half precision.
MECHANISMS = (
    "blip2-opt-350m", "blip2-t5-tied", "instructblip-llama", "flamingo-every-second", "flamingo-every-third", "qwen-vl",
    "qwen2.5-vl-windows",
)  # fmt: skip
#: OPT with narrow embeddings; T5 with a tied, scaled head; an instruction; gates every second layer; no resampler; modules
#: that transformers has not; windows of attention and positions in three directions.
ALWAYS = (
    "clip-llama", "blip2-opt-350m", "blip2-t5-tied", "instructblip-llama", "flamingo-every-second", "flamingo-every-third",
    "qwen-vl", "qwen2.5-vl-windows",
)  # fmt: skip
A, B = picture(1), picture(2, 30, 64)


def configurations(*always: str, of: Iterable[str] = EVERY) -> pytest.MarkDecorator:
    """Parametrises by every configuration; those not named are slow."""
    assert set(always) <= set(of) <= set(EVERY)
    return pytest.mark.parametrize(
        "name", [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in of]
    )


pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def graphs(bundle: Path) -> Iterator[tuple[str, onnx.ModelProto]]:
    for part, record in Bundle.open(bundle, check_files=False).manifest.parts.items():
        yield part, onnx.load(bundle / record.file, load_external_data=False)


# ---------------------------------------------------------------------------------------------- numbers


def cases_of(tiny: Any) -> set[str]:
    """What verification has to compare, in a context of 128 tokens and more."""
    cases = {"one picture", "wide picture", "short prompt", "batch of 2: wide picture"}
    if isinstance(tiny, TinyBlip2):
        return cases
    if isinstance(tiny, TinyQwen2VL):
        cases |= {"tiny picture"} | ({"video", "video and picture"} if tiny.generation < 3 else set())
    return cases | {"two pictures", "no picture", "interleaved", "batch of 2: no picture"}


@configurations(*ALWAYS)
def test_a_float_bundle_is_the_model(tiny: Callable[[str], Tiny], name: str, tmp_path: Path) -> None:
    one = tiny(name)
    bundle = Path(shutil.copytree(one.bundle, tmp_path / "bundle"))
    report = verify_bundle(bundle, str(one.checkpoint))
    assert report.failures == []
    assert report.kind == "float32"
    cases = [check.case for check in report.sequences]
    assert cases_of(one.tiny) <= set(cases)
    assert sum(case.startswith("long prompt") for case in cases) == 1
    for case in report.sequences:
        assert (case.same_tokens, case.tokens, case.top1) == (TOKENS, TOKENS, 1.0), case
        assert case.max_abs < 1e-3, case
    assert [check.part for check in report.parts][-1] == "decoder"
    assert {check.part for check in report.parts} == set(Bundle.open(bundle).manifest.parts)
    for part in report.parts:
        assert part.max_abs < 1e-4, part
        assert part.peak > 0.1, part
    assert all("longer than the model's context" in note or "tokens for the Q-Former" in note for note in report.notes)


ASKED: dict[str, list[Any]] = {
    "one": [A, "How many cubes are there?"],
    "wide": [picture(3, 120, 31), "Où est l'étoile?"],
    "two": [A, "two", B, "How many?"],
    "neighbours": ["Look:", A, B, "What changed?"],
    "none": ["Is there a red cube?"],
    "ended": [A, "two</s>"],
}


#: Those that transformers has; tests/test_vlm.py compares more of LLaVA, tests/models/test_qwen2_vl.py of Qwen2-VL.
THEIRS = [name for name, one in EVERY.items() if name != LLAVAS[0].name and not isinstance(one, (TinyQwenVL, TinyQwen2VL))]


@configurations(*(name for name in MECHANISMS if name in THEIRS), of=THEIRS)
def test_the_tokens_are_those_of_transformers(tiny: Callable[[str], Tiny], name: str) -> None:
    """From the outside: its processor and its `generate` on one side, the runtime on the other."""
    import torch

    one = tiny(name)
    model, processor = load_tiny(one.checkpoint)
    model, ours = model.float(), load(one.bundle)
    for case, items in ASKED.items():
        images = [item for item in items if not isinstance(item, str)]
        if isinstance(one.tiny, TinyFlamingo):
            batch = processor(text=[items], return_tensors="pt")
        elif len(images) == 1:
            batch = processor(text=items[-1], images=images, return_tensors="pt")
        else:
            continue
        with torch.no_grad():
            out = model.generate(
                **batch, max_new_tokens=16, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True
            )
        scores = torch.stack(out.logits)[:, 0].numpy()
        reply, logits = logits_of(ours, prompt=items, max_new_tokens=16)
        assert reply.tokens == scores.argmax(-1).tolist(), case
        np.testing.assert_allclose(logits, scores, atol=1e-3, err_msg=case)
        assert reply.timings.prompt_tokens == batch["input_ids"].shape[1]


def near(bundle: Path, exact: Path, cosine: float) -> None:
    """The bundle answers, and what it chooses from is near what the exact one has."""
    ours, theirs = load(bundle), load(exact)
    for image in (A, B):
        asked: dict[str, Any] = {"prompt": "How many cubes?", "images": [image], "max_new_tokens": 6}
        reply, found = logits_of(ours, **asked)
        assert len(reply.tokens) == 6
        assert np.isfinite(found).all()
        wanted = logits_of(theirs, **asked)[1]
        first, second = found[0] - found[0].mean(), wanted[0] - wanted[0].mean()
        assert first @ second > cosine * np.linalg.norm(first) * np.linalg.norm(second)
        assert np.abs(found[0] - wanted[0]).max() > 0


@pytest.mark.parametrize("recipe", ["int8", "int4-rtn", "int4"])
@configurations(*ALWAYS[1:])
def test_quantized_bundles_answer(tiny: Callable[[str], Tiny], name: str, recipe: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    quantize_bundle(tiny(name).bundle, bundle, recipe)
    # AWQ leaves less error in every layer, but where no channel stands out chance decides about the sum: 0.65 to 0.9.
    near(bundle, tiny(name).bundle, {"int8": 0.98, "int4-rtn": 0.7, "int4": 0.5}[recipe])
    before, after = (Bundle.open(folder).manifest for folder in (tiny(name).bundle, bundle))
    for part, record in after.parts.items():
        weights = before.parts[part].weights.get("float32", 0)
        assert record.inputs == before.parts[part].inputs
        assert record.outputs == before.parts[part].outputs
        assert "int8" in record.weights or "int4" in record.weights or part == "projector", part
        assert ("int4" in record.weights) == (recipe.startswith("int4") and part in ("decoder", "text_encoder")), part
        # Patches are embedded by a convolution, which stays float: much of so small a tower.
        assert record.weights.get("float32", 0) < weights * (0.7 if part == "vision_encoder" else 0.5), part
    for part, proto in graphs(bundle):
        assert {node.domain for node in proto.graph.node} == {""}, part
        types = {i.name: i.data_type for i in proto.graph.initializer}
        biases = [i for i in types if "relative_attention_bias" in i]
        assert all(types[i] == onnx.TensorProto.FLOAT for i in biases)
        assert bool(biases) == (part in ("text_encoder", "decoder") and "t5" in name)


@configurations("flamingo-every-second", of=MECHANISMS)
def test_half_precision_is_near(tiny: Callable[[str], Tiny], name: str) -> None:
    one = tiny(name)
    half = one.export("fp16")
    manifest = Bundle.open(half).manifest
    assert (manifest.dtype, manifest.kv_cache.dtype) == ("float16", "float16")
    assert manifest.cross_attention is None or manifest.cross_attention.dtype == "float16"
    for part, record in manifest.parts.items():
        assert record.weights.get("float16", 0) > 10 * record.weights.get("float32", 0), part
        floats = {info.dtype for info in (record.inputs | record.outputs).values()} - {"int64", "bool"}
        assert floats == {"float16"}, part
    near(half, one.bundle, 0.999)


# ------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(("name", "recipe"), [
    ("flamingo-every-second", "int4"),
    *((name, "int8") if name == "blip2-t5-tied" else pytest.param(name, "int8", marks=pytest.mark.slow) for name in MECHANISMS),
])  # fmt: skip
def test_quantizing_on_export_gives_the_same_bytes(tiny: Callable[[str], Tiny], name: str, recipe: str, tmp_path: Path) -> None:
    """Of another trace, so that it says too that a trace does not depend on chance.

    A recipe that looks at samples, like int4, goes one way for all families: a float bundle, quantized as it would be later.
    """
    one = tiny(name)
    quantize_bundle(one.bundle, tmp_path / "later", recipe)
    export_bundle(str(one.checkpoint), tmp_path / "at-once", recipe=recipe)
    at_once, later = contents(tmp_path / "at-once"), contents(tmp_path / "later")
    assert at_once.keys() == later.keys()
    assert [file for file in at_once if at_once[file] != later[file]] == []


def test_the_same_checkpoint_gives_the_same_bytes(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Graphs of every mechanism are compared above, and float weights are written in one way."""
    one = tiny("instructblip-llama")
    export_bundle(str(one.checkpoint), tmp_path / "again")
    first, again = contents(one.bundle), contents(tmp_path / "again")
    assert first.keys() == again.keys()
    assert [file for file in first if first[file] != again[file]] == []


# -------------------------------------------------------------------------------------------------- form


@configurations(*ALWAYS)
def test_a_manifest_comes_back_as_it_was(tiny: Callable[[str], Tiny], name: str) -> None:
    one = tiny(name)
    text = (one.bundle / MANIFEST).read_text(encoding="utf-8")
    manifest = Manifest.from_json(text)
    assert manifest.to_json() == text
    assert Manifest.from_json(manifest.to_json()) == manifest == Bundle.open(one.bundle).manifest
    family = models.family_by_name(manifest.family)
    assert set(models.parts_needed(family, manifest)) <= set(manifest.parts)
    cross, decoder = manifest.cross_attention, manifest.parts["decoder"]
    read = {name for name in decoder.inputs if name.startswith("cross")}
    assert len(read) == (2 * cross.layers + 1 if cross else 0)
    if cross:
        assert read - {"cross_attention_mask"} == set(manifest.parts["cross_kv"].outputs)
    assert isinstance(one.tiny, TinyInstructBlip) == (manifest.instruction_length is not None)
    assert (manifest.decoder_start_id is not None) == ("t5" in name)
    for part in manifest.parts.values():
        assert part.file in manifest.files
    assert "resampler" in manifest.parts or not getattr(one.tiny, "resampler", False)


@configurations(*ALWAYS)
def test_graphs_are_standard_onnx(tiny: Callable[[str], Tiny], name: str) -> None:
    bundle = tiny(name).bundle
    for part, proto in graphs(bundle):
        onnx.checker.check_model(str(bundle / "onnx" / f"{part}.onnx"), full_check=True)
        assert {node.domain for node in proto.graph.node} == {""}, part
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 24)], part
        assert not proto.functions


#: Keys and values of cross-attention to what `cross_kv` reads; the Q-Former's own are not meant.
CROSS_KV = re.compile(r"(gated_cross_attn_layers\.\d+\.cross_attn\.[kv]_(proj|layer_norm)|EncDecAttention\.[kv])\.weight")


@configurations(*ALWAYS)
def test_keys_and_values_of_cross_attention_are_made_in_their_own_part(tiny: Callable[[str], Tiny], name: str) -> None:
    made: Counter[str] = Counter()
    for part, proto in graphs(tiny(name).bundle):
        made[part] += sum(bool(CROSS_KV.search(i.name)) for i in proto.graph.initializer)
    cross = Bundle.open(tiny(name).bundle, check_files=False).manifest.cross_attention
    norms = getattr(tiny(name).tiny, "norms", False)
    assert +made == ({"cross_kv": (3 if norms else 2) * cross.layers} if cross else {})


#: What the model has and an answer does not need: layers behind the one that is looked at, and a norm for the class token.
UNUSED = {
    TinyLlava: r"vision_tower\.",
    TinyFlamingo: r"model\.vision_model\.post_layernorm|rotary_emb\.inv_freq|position_ids",
    TinyBlip2: r"position_ids|rotary_emb\.inv_freq|vision_model\.post_layernorm",
    TinyQwen2VL: r"rotary_emb\.inv_freq",
    TinyQwenVL: r"attn_pool\.attn\.in_proj",  # three weights in one
}


@configurations(*ALWAYS)
def test_every_weight_has_its_place(tiny: Callable[[str], Tiny], name: str) -> None:
    from safetensors.torch import load_file

    one = tiny(name)
    family = models.family_by_name(Bundle.open(one.bundle, check_files=False).manifest.family)
    files = [load_file(path) for path in one.checkpoint.glob("*.safetensors")]
    stored = {family.weight_name(key): tensor for file in files for key, tensor in file.items()}
    used = {i.name.removesuffix(".transposed") for _, proto in graphs(one.bundle) for i in proto.graph.initializer} & set(
        stored
    )
    unused = next(pattern for kind, pattern in UNUSED.items() if isinstance(one.tiny, kind))
    left = {key for key in set(stored) - used if not re.search(unused, key)}
    # Older files hold what is tied under every name.
    tied = {key for key in left if any(stored[key].equal(stored[other]) for other in used)}
    assert left - tied == set()
    assert len(used) > 30


# ----------------------------------------------------------------------------------------------- protocol

#: Only families whose pictures are looked at with an instruction, and those with a layout of their own beside transformers'.
OPTIONAL = {"embed_image", "split_weight", "bundle_files"}


@pytest.mark.parametrize("family", models._modules())
def test_a_family_offers_the_whole_protocol(family: str) -> None:
    module = models.family_by_name(family)
    for name in Family.__annotations__:
        assert hasattr(module, name), name
    for name, method in inspect.getmembers(Family, inspect.isfunction):
        if name.startswith("_") or (name in OPTIONAL and not hasattr(module, name)):
            continue
        offered = getattr(module, name)
        wanted = list(inspect.signature(method).parameters.values())[1:]
        assert [p.name for p in inspect.signature(offered).parameters.values()] == [p.name for p in wanted], name
    fewest, most = module.PICTURES
    assert 0 <= fewest <= (most or fewest)
    assert {"embed_tokens", "decoder"} < set(module.PARTS)
    assert set(module.ALIASES.values()).isdisjoint(module.ALIASES)


def test_families_share_no_name() -> None:
    modules = models._modules()
    assert {"llava", "blip2", "flamingo"} <= set(modules)
    architectures = [a for module in modules.values() for a in module.ARCHITECTURES]
    assert len(architectures) == len(set(architectures))
    assert len(models.aliases()) == sum(len(module.ALIASES) for module in modules.values())
    for name in ("llava", "blip2", "flamingo"):
        for architecture in modules[name].ARCHITECTURES:
            assert models.family_for_config({"architectures": [architecture]})[0] == name
    assert {field.name for field in fields(Manifest)} >= {"cross_attention", "decoder_start_id", "instruction_length"}
