"""Who is asked: bundles and PyTorch models answer the same, and are told apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from asking import load, picture
from PIL import Image
from tinies import Tiny
from tiny import BLIP2S, FLAMINGOS, INSTRUCTBLIPS, INTERNVLS, LLAVAS
from tiny_qwen2_vl import QWEN2_VLS
from tiny_qwen_vl import QWEN_VLS

from edgevlm.errors import BundleError, CapacityError, CheckpointError, ImageError, InputError, PromptError
from edgevlm.evaluation.records import Item
from edgevlm.evaluation.subjects import Settings, describe_subjects, digest_subject, file_name, open_subject
from edgevlm.scenes import sample_scene

LLAVA = LLAVAS[0].name
SETTINGS = Settings(max_new_tokens=6, threads=1, side=48)
FAMILIES = (LLAVAS, BLIP2S, INSTRUCTBLIPS, FLAMINGOS, INTERNVLS, QWEN2_VLS, QWEN_VLS)
PAIRED = [every[0].name for every in FAMILIES] + [next(one.name for one in BLIP2S if "t5" in one.name)]


def items(prompts: tuple[str, ...]) -> list[Item]:
    """One picture each: scenes, photographs of odd sizes."""
    pictures = [sample_scene(11_000_001), picture(1), sample_scene(11_000_002, "wide"), picture(2, 31, 90)]
    return [Item(str(n), prompt, (pictures[n % 4],), ("yes",)) for n, prompt in enumerate(prompts)]


PROMPTS = ("How many cubes?", "Is there a red ball?", "Où est la boule ? 🙂", "Describe the scene.", "How many cubes?")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PAIRED)
def test_bundle_and_pytorch_model_say_the_same(tiny: Callable[[str], Tiny], name: str) -> None:
    ours, theirs = (open_subject(str(source), SETTINGS) for source in (tiny(name).bundle, tiny(name).checkpoint))
    for item in items(PROMPTS):
        a, b = ours.ask(item), theirs.ask(item)
        assert (a.id, a.text, a.tokens) == (b.id, b.text, b.tokens)
        assert a.tokens <= 6
        for answer in (a, b):
            assert 0 < answer.first_token <= 1e3 * answer.seconds


@pytest.mark.usefixtures("one_thread")
def test_both_stop_where_an_answer_ends(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """A token that a model says later than others ends its answers from now on: both say those before it."""
    item = Item("1", "How many cubes?", (picture(3),), ("two",))
    vlm = load(tiny(LLAVA).bundle)
    tokens = vlm.generate(item.prompt, images=[picture(3)], max_new_tokens=48).tokens
    last = next(token for token in tokens if tokens.index(token) > 0)
    checkpoint, bundle = tmp_path / "model", tmp_path / "bundle"
    shutil.copytree(tiny(LLAVA).checkpoint, checkpoint)
    shutil.copytree(tiny(LLAVA).bundle, bundle)
    for folder in (checkpoint, bundle):
        path = folder / "generation_config.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps(known | {"eos_token_id": last}), encoding="utf-8")
    manifest = json.loads((bundle / "edgevlm.json").read_text(encoding="utf-8"))
    manifest["files"].pop("generation_config.json", None)
    (bundle / "edgevlm.json").write_text(json.dumps(manifest), encoding="utf-8")
    answers = [open_subject(str(folder), Settings(48, threads=1)).ask(item) for folder in (checkpoint, bundle)]
    assert [answer.tokens for answer in answers] == [tokens.index(last)] * 2
    assert answers[0].text == answers[1].text


@pytest.mark.usefixtures("one_thread")
def test_several_pictures_and_none(tiny: Callable[[str], Tiny]) -> None:
    asked = [
        Item("none", "Is there a red cube?", (), ("no",)),
        Item("two", "What changed?", (picture(4), picture(5, 20, 70)), ("nothing",)),
    ]
    ours, theirs = (open_subject(str(source), SETTINGS) for source in (tiny(LLAVA).bundle, tiny(LLAVA).checkpoint))
    for item in asked:
        assert ours.ask(item).text == theirs.ask(item).text


def test_a_picture_that_was_just_seen_is_marked(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Its first token comes sooner, which no comparison of speeds should take for the model's."""
    model, path = open_subject(str(tiny(LLAVA).bundle), SETTINGS), tmp_path / "a.png"
    picture(6).save(path)
    asked = [("1", path), ("2", path), ("3", sample_scene(7)), ("4", sample_scene(7)), ("5", sample_scene(8))]
    answers = [model.ask(Item(name, f"Question {name}?", (shown,), ("",))) for name, shown in asked]
    assert [answer.reused for answer in answers] == [False, True, False, True, False]


def test_what_cannot_be_asked(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    model = open_subject(str(tiny(BLIP2S[0].name).bundle), SETTINGS)
    with pytest.raises(PromptError):
        model.ask(Item("1", "What?", (), ("",)))
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        model.ask(Item("1", "What?", (tmp_path / "broken.jpg",), ("",)))
    small = [open_subject(str(p), Settings(capacity=16)) for p in (tiny(LLAVA).bundle, tiny(LLAVA).checkpoint)]
    for model in small:
        with pytest.raises(CapacityError, match="capacity of 16"):
            model.ask(Item("1", "word " * 40, (), ("",)))


def test_an_answer_ends_where_the_cache_does(tiny: Callable[[str], Tiny]) -> None:
    item = Item("1", "Is there a red cube?", (), ("",))
    for source in (tiny(LLAVA).bundle, tiny(LLAVA).checkpoint):
        assert open_subject(str(source), Settings(capacity=32, threads=1)).ask(item).tokens < 32


# ------------------------------------------------------------------------------------------------ describing


def test_subjects_are_described_without_loading(tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.vlm.VLM.load", None)
    float_, int8, model = describe_subjects(
        [str(tiny(LLAVA).bundle), str(tiny(LLAVA).export(recipe="int8")), str(tiny(LLAVA).checkpoint)]
    )
    assert [s.kind for s in (float_, int8, model)] == ["bundle", "bundle", "torch"]
    assert (float_.recipe, int8.recipe, model.recipe) == ("", "int8", "")
    assert 0 < int8.size < float_.size
    assert model.size == (tiny(LLAVA).checkpoint / "model.safetensors").stat().st_size
    assert (float_.name, model.name) == (tiny(LLAVA).bundle.name, tiny(LLAVA).checkpoint.name)


def test_folders_of_one_name_are_told_apart(bundle: Path, tmp_path: Path) -> None:
    for place in ("one/int4", "two/int4", "two/x/int4"):
        shutil.copytree(bundle, tmp_path / place)
    sources = [str(tmp_path / place) for place in ("one/int4", "two/int4", "two/x/int4")]
    assert [s.name for s in describe_subjects(sources)] == ["one/int4", "two/int4", "x/int4"]
    assert [s.name for s in describe_subjects(sources[:1])] == ["int4"]
    with pytest.raises(InputError, match="asked twice"):
        describe_subjects([sources[0], f"{tmp_path}/one/../one/int4"])
    with pytest.raises(InputError, match="Nobody"):
        describe_subjects([])


def test_names_as_files() -> None:
    assert file_name("demo/llava") == "demo-llava"
    assert file_name("build/größe 4") == "build-größe-4"
    assert file_name("../..") == "unnamed"


def test_a_shipped_model_keeps_its_name() -> None:
    assert describe_subjects(["demo/llava"])[0].name == "demo/llava"


def test_what_is_no_subject(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder here"):
        describe_subjects([str(bundle), str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        describe_subjects([str(tmp_path / "empty")])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "edgevlm.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError):
        describe_subjects([str(broken)])


def test_the_digest_is_that_of_the_content(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    copied = tmp_path / "elsewhere"
    shutil.copytree(tiny(LLAVA).checkpoint, copied)
    before = digest_subject(str(copied))
    assert before == digest_subject(str(tiny(LLAVA).checkpoint))
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert digest_subject(str(copied)) != before
    assert digest_subject(str(tiny(LLAVA).bundle)) != digest_subject(str(tiny(LLAVA).export(recipe="int8")))


def test_pictures_are_pictures(tmp_path: Path) -> None:
    from edgevlm.evaluation.subjects import open_picture

    Image.new("L", (30, 20)).save(tmp_path / "grey.png")
    assert open_picture(tmp_path / "grey.png", 64).mode == "RGB"
    assert open_picture(sample_scene(5, "tall"), 64).width == 64
