"""The runtime of BLIP-2, InstructBLIP and Flamingo: which parts run and which do not, and caches that change no answer."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import Runs, differ, failing, image_part, load, logits_of, picture, text_part, user
from tinies import Tiny

from edgevlm import generate as generate_module
from edgevlm import vlm as vlm_module
from edgevlm.bundle import MANIFEST, Bundle
from edgevlm.errors import CapacityError, ManifestError, PromptError
from edgevlm.vlm import VLM

FLAMINGO, T5, INSTRUCT, OPT = "flamingo-every-second", "blip2-t5-tied", "instructblip-llama", "blip2-opt-350m"
BOTH = pytest.param("instructblip-t5", marks=pytest.mark.slow)  # reads the instruction, and has an encoder
BARE = pytest.param("flamingo-every-third", marks=pytest.mark.slow)  # without a resampler
MODELS = [FLAMINGO, T5, INSTRUCT, OPT, BOTH, BARE]
A, B, C = picture(1), picture(2, 30, 64), picture(3)
STEP = {"embed_tokens": 1, "decoder": 1}


@pytest.fixture
def new(tiny: Callable[[str], Tiny]) -> Callable[..., VLM]:
    """A new model of a name."""
    return lambda name, **options: load(tiny(name).bundle, **options)


def same_as_new(vlm: VLM, **asked: Any) -> Any:
    """The reply, whose tokens and logits are those of a new model."""
    reply, logits = logits_of(vlm, **asked)
    wanted, scores = logits_of(load(vlm.bundle.folder), **asked)
    assert reply.tokens == wanted.tokens
    assert reply.text == wanted.text
    np.testing.assert_allclose(logits, scores, atol=1e-4)
    return reply


def seen_once(vlm: VLM) -> dict[str, int]:
    """The parts that a picture goes through, once each."""
    every = {"vision_encoder", "resampler", "qformer", "projector"}
    through = {part: 1 for part in vlm._sessions if part in every}
    return through | ({"cross_kv": 1} if vlm.bundle.manifest.family == "flamingo" else {})


def read_once(vlm: VLM) -> dict[str, int]:
    """The parts that a prompt goes through, and the first step of its answer."""
    encoder = {"text_encoder": 1, "cross_kv": 1, "embed_tokens": 2} if "text_encoder" in vlm._sessions else {}
    return STEP | encoder


# ---------------------------------------------------------------------------------------- which parts run


@pytest.mark.parametrize("name", MODELS)
def test_each_part_runs_once_and_a_step_touches_the_decoder_alone(new: Callable[..., VLM], name: str) -> None:
    vlm = new(name)
    runs = Runs(vlm)
    stream = vlm.stream("How many cubes?", images=[A], max_new_tokens=5)
    assert runs() == {}
    next(stream)
    assert runs() == seen_once(vlm) | read_once(vlm)
    for _ in range(4):
        next(stream)
        assert runs() == STEP
    assert len(stream.reply.tokens) == 5
    assert runs() == {}


@pytest.mark.parametrize("name", [FLAMINGO, T5, OPT, BARE])
def test_a_second_question_about_a_picture_does_not_look_again(new: Callable[..., VLM], name: str) -> None:
    vlm = new(name)
    first = vlm.generate("How many cubes are there?", images=[A], max_new_tokens=3)
    assert (first.timings.reused_images, first.timings.reused_tokens) == (0, 0)
    assert first.timings.vision > 0
    runs = Runs(vlm)
    second = vlm.generate("Where is the star?", images=[A.copy()], max_new_tokens=1)
    assert runs() == read_once(vlm)
    assert second.timings.reused_images == 1
    same_as_new(vlm, prompt="Where is the star?", images=[A], max_new_tokens=8)
    other = same_as_new(vlm, prompt="Where is the star?", images=[B], max_new_tokens=8)
    assert other.timings.reused_images == 0
    scores = [logits_of(vlm, prompt="Where is the star?", images=[image], max_new_tokens=1)[1] for image in (A, B)]
    assert differ(*scores) > 1e-2, "the picture does not matter"


@pytest.mark.parametrize("name", [INSTRUCT, BOTH])
def test_another_instruction_asks_the_qformer_again(new: Callable[..., VLM], name: str) -> None:
    vlm = new(name)
    runs = Runs(vlm)
    vlm.generate("How many cubes?", images=[A], max_new_tokens=1)
    assert runs() == seen_once(vlm) | read_once(vlm)
    second = vlm.generate("Where is the star?", images=[A], max_new_tokens=1)
    assert runs() == {"qformer": 1, "projector": 1} | read_once(vlm)
    assert second.timings.reused_images == 1
    assert second.timings.reused_tokens == 0, "its places hold something else"
    again = vlm.generate("How many cubes?", images=[A], max_new_tokens=1)
    assert runs() == read_once(vlm)
    assert again.timings.reused_images == 1
    for text in ("Where is the star?", "How many cubes?", "Hm"):
        same_as_new(vlm, prompt=text, images=[A], max_new_tokens=6)
    same_as_new(vlm, prompt="Hm", images=[B], max_new_tokens=6)


@pytest.mark.parametrize("name", [T5, BOTH])
def test_a_prompt_is_read_once(new: Callable[..., VLM], name: str) -> None:
    vlm = new(name)
    first = vlm.generate("How many cubes?", images=[A], max_new_tokens=6)
    assert first.timings.reused_tokens == 0
    runs = Runs(vlm)
    again = vlm.generate("How many cubes?", images=[A], max_new_tokens=6)
    assert runs() == {"embed_tokens": 6, "decoder": 6}
    assert again.tokens == first.tokens
    assert again.timings.reused_tokens == again.timings.prompt_tokens
    other = vlm.generate("How many balls?", images=[A], max_new_tokens=1)
    counts = runs()
    assert (counts["text_encoder"], counts["cross_kv"]) == (1, 1)
    assert other.timings.reused_tokens == 0
    # The first again: one prompt is kept, and it is another.
    same_as_new(vlm, prompt="How many cubes?", images=[A], max_new_tokens=6)
    same_as_new(vlm, prompt="How many cubes?", images=[B], max_new_tokens=6)


# ----------------------------------------------------------------------------------- pictures come and go


def rows_of(vlm: VLM) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in vlm._cache.decoder._memory._arrays.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [FLAMINGO, BARE])
def test_a_picture_in_a_later_turn_is_added_to_the_others(new: Callable[..., VLM], name: str) -> None:
    vlm = new(name)
    places = vlm.bundle.manifest.cross_attention.places  # type: ignore[union-attr]
    first = vlm.generate([A, "How many cubes?"], max_new_tokens=4)
    memory, before, runs = vlm._cache.decoder._memory, rows_of(vlm), Runs(vlm)
    assert memory is not None
    assert memory.length == places
    asked = [A, "How many cubes?", B, "And here?"]
    second = vlm.generate(asked, max_new_tokens=1)
    assert runs() == seen_once(vlm) | STEP
    assert memory.length == 2 * places
    assert second.timings.reused_tokens == first.timings.prompt_tokens
    for name_, rows in rows_of(vlm).items():
        np.testing.assert_array_equal(rows[:, :, :places], before[name_])
        assert np.abs(rows[:, :, places:] - before[name_]).max() > 1e-3
    same_as_new(vlm, prompt=asked, max_new_tokens=12)
    # Back to the first: nothing is looked at, and the second is gone.
    runs()
    same_as_new(vlm, prompt=asked[:2], max_new_tokens=12)
    assert set(runs()) == set(STEP)
    assert memory.length == places


FORMS: dict[str, list[Any]] = {
    "as before": [A, "How many cubes?", B, "And here?"],
    "the first exchanged": [C, "How many cubes?", B, "And here?"],
    "the last exchanged": [A, "How many cubes?", C, "And here?"],
    "in another order": [B, "How many cubes?", A, "And here?"],
    "without the first": [B, "And here?"],
    "without the last": [A, "How many cubes?"],
    "neighbours": [A, B, "What changed?"],
    "text in front": ["First of all, look.", A, "How many cubes?"],
    "no picture": ["Is there a red cube?"],
    "no picture, the same beginning": ["How many cubes?"],
    "one twice": [A, "and", A, "are the same?"],
    "an end of text between": [A, "two</s>", "nothing here", B, "How many?"],
    "an end of text at the end": [A, "two</s>"],
    "a picture at the end": ["Look:", A],
}


@pytest.mark.parametrize("name", [FLAMINGO, BARE])
def test_whatever_was_asked_before_the_answer_is_that_of_a_new_model(new: Callable[..., VLM], name: str) -> None:
    vlm = new(name)
    alone = {form: logits_of(new(name), prompt=asked, max_new_tokens=6) for form, asked in FORMS.items()}
    order = random.Random(0).sample([*FORMS, *FORMS], 2 * len(FORMS))
    reused = 0
    for form in order:
        reply, logits = logits_of(vlm, prompt=FORMS[form], max_new_tokens=6)
        assert reply.tokens == alone[form][0].tokens, form
        np.testing.assert_allclose(logits, alone[form][1], atol=1e-4, err_msg=form)
        reused += reply.timings.reused_tokens
    assert reused > 0
    scores = {form: logits for form, (_, logits) in alone.items()}
    assert differ(scores["as before"], scores["the first exchanged"]) > 1e-4, "an earlier picture does not matter"
    assert differ(scores["as before"], scores["the last exchanged"]) > 1e-2


@pytest.mark.parametrize("seed", range(2))
def test_at_random(new: Callable[..., VLM], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small feature cache, small chunks, streams that are closed halfway."""
    monkeypatch.setattr(vlm_module, "_KEPT_PICTURES", 2)
    monkeypatch.setattr(generate_module, "CHUNK", 7)
    monkeypatch.setattr(generate_module, "STEP", 16)
    rng = random.Random(seed)
    vlm = new(FLAMINGO)
    for _ in range(8):
        words = rng.sample(["How many cubes?", "And here?", "two</s>", "Look:", "star"], 3)
        asked: list[Any] = [part for word in words for part in [*rng.choices([A, B, C], k=rng.choice((0, 1, 1, 2))), word]]
        if rng.random() < 0.4:
            stream = vlm.stream(asked[::-1])
            for _ in range(rng.randrange(4)):
                next(stream)
            stream.close()
        same_as_new(vlm, prompt=asked, max_new_tokens=rng.choice((1, 5)))


def test_more_pictures_than_features_are_kept(new: Callable[..., VLM]) -> None:
    vlm, pictures = new(FLAMINGO), [picture(100 + i) for i in range(vlm_module._KEPT_PICTURES + 3)]
    asked: list[Any] = [part for image in pictures for part in (image, "one")]
    places = vlm.bundle.manifest.cross_attention.places  # type: ignore[union-attr]
    runs = Runs(vlm)
    same_as_new(vlm, prompt=asked, max_new_tokens=3)
    assert runs()["vision_encoder"] == len(pictures)
    assert vlm._cache.decoder.cross_length == len(pictures) * places
    same_as_new(vlm, prompt=[*asked, "two"], max_new_tokens=3)
    assert "vision_encoder" not in runs(), "the memory holds them all"
    same_as_new(vlm, prompt=[*asked, A, "two"], max_new_tokens=3)
    assert runs()["vision_encoder"] == 1
    same_as_new(vlm, prompt=asked[2:], max_new_tokens=3)  # the memory begins with another; some features are gone
    assert 0 < runs()["vision_encoder"] < len(pictures)


def test_a_chat_goes_on_where_it_was(new: Callable[..., VLM]) -> None:
    vlm = new(FLAMINGO)
    chat = [user(image_part(A), text_part("How many cubes are there?"))]
    first = vlm.generate(messages=chat, max_new_tokens=6)
    chat += [{"role": "assistant", "content": "two"}, user(text_part("And balls?"))]
    runs = Runs(vlm)
    second = vlm.generate(messages=chat, max_new_tokens=1)
    assert runs() == STEP
    assert second.timings.reused_tokens >= first.timings.prompt_tokens - 1
    chat += [{"role": "assistant", "content": "one"}, user(image_part(B), text_part("And here?"))]
    same_as_new(vlm, messages=chat, max_new_tokens=8)


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("name", [FLAMINGO, OPT])
def test_prefill_in_chunks_changes_nothing(
    new: Callable[..., VLM], name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"prompt": ["Look", A, "How many cubes?", B, "And here?"], "max_new_tokens": 6}
    if name == OPT:
        asked = {"prompt": "How many cubes are there? Answer:", "images": [A], "max_new_tokens": 6}
    whole, scores = logits_of(new(name), **asked)
    monkeypatch.setattr(generate_module, "CHUNK", chunk)
    reply, logits = logits_of(new(name), **asked)
    assert reply.tokens == whole.tokens
    np.testing.assert_allclose(logits, scores, atol=1e-4)


# -------------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize("name", MODELS)
def test_capacity(new: Callable[..., VLM], name: str) -> None:
    asked: dict[str, Any] = {"prompt": "How many cubes?", "images": [A], "max_new_tokens": 12}
    whole = new(name).generate(**asked)
    length = whole.timings.prompt_tokens
    tight = new(name, capacity=length)
    runs = Runs(tight)
    with pytest.raises(CapacityError, match=rf"\b{length} tokens.* capacity of {length}\b"):
        tight.stream(**asked)
    assert runs() == {}
    for room in (1, 4):
        vlm = new(name, capacity=length + room)
        for _ in range(2):
            reply = vlm.generate(**asked)
            assert (reply.finish_reason, reply.tokens) == ("capacity", whole.tokens[:room])
    assert new(name, capacity=length + 12).generate(**asked).finish_reason == "length"


@pytest.mark.parametrize("name", [OPT, FLAMINGO])
def test_the_whole_context_can_be_used(new: Callable[..., VLM], name: str) -> None:
    vlm = new(name)
    most = vlm.bundle.manifest.context_length
    text = "How many cubes are there? "
    count = next(n for n in range(1, 99) if _tokens(vlm, text * (n + 1)) > most - 8)
    reply = vlm.generate(text * count, images=[A], max_new_tokens=most)
    assert reply.finish_reason == "capacity"
    assert reply.timings.prompt_tokens + len(reply.tokens) == most


def _tokens(vlm: VLM, text: str) -> int:
    return len(vlm._builder.tokenizer.encode(text)) + 12


# ------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("name", MODELS)
def test_an_interruption_anywhere_leaves_a_model_that_works(new: Callable[..., VLM], name: str, tiny: Any) -> None:
    vlm = new(name)
    shots = vlm.bundle.manifest.family == "flamingo"
    first: Any = [A, "How many cubes?"]
    then: Any = [C, "Look", B, "And here?"] if shots else [B, "And here?"]
    wanted = [logits_of(new(name), prompt=asked, max_new_tokens=5) for asked in (first, then)]
    for part in vlm._sessions:
        for after in (0, 1, 3) if part in STEP else (0, 1) if shots else (0,):
            vlm._features.kept.clear()
            vlm.generate(first, max_new_tokens=2)
            with failing(vlm, part, after), pytest.raises(KeyboardInterrupt):
                vlm.generate(then, max_new_tokens=5)
            for asked, (reply, scores) in zip((first, then), wanted, strict=True):
                found, logits = logits_of(vlm, prompt=asked, max_new_tokens=5)
                assert found.tokens == reply.tokens, (part, after)
                np.testing.assert_allclose(logits, scores, atol=1e-4, err_msg=f"{part} {after}")


def test_an_error_in_the_middle_is_said_in_the_reply(new: Callable[..., VLM], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, part in ((FLAMINGO, "cross_kv"), (T5, "text_encoder")):
        vlm = new(name)

        def breaks(*_: Any) -> Any:
            raise RuntimeError("no more")

        stream = vlm.stream([A, "How many cubes?"])
        with monkeypatch.context() as patch:
            patch.setattr(vlm._sessions[part], "run", breaks)
            with pytest.raises(RuntimeError, match="no more"):
                next(stream)
        assert (stream.reply.finish_reason, stream.reply.tokens) == ("error", [])
        same_as_new(vlm, prompt=[A, "How many cubes?"], max_new_tokens=5)


@pytest.mark.parametrize("name", [FLAMINGO, T5, INSTRUCT])
def test_a_stream_closed_halfway(new: Callable[..., VLM], name: str) -> None:
    vlm = new(name)
    whole = new(name).generate([A, "How many cubes?"], max_new_tokens=8).tokens
    for read in (0, 1, 4):
        stream = vlm.stream([A, "How many cubes?"], max_new_tokens=8)
        for _ in range(read):
            next(stream)
        stream.close()
        assert (stream.reply.finish_reason, stream.reply.tokens) == ("closed", whole[:read])
        same_as_new(vlm, prompt=[B, "How many cubes?"], max_new_tokens=5)


@pytest.mark.parametrize("name", [FLAMINGO, T5, INSTRUCT])
def test_threads_get_the_answers_that_they_get_one_by_one(new: Callable[..., VLM], name: str) -> None:
    vlm = new(name)
    asked = [(text, picture(seed)) for text in ("How many?", "Describe the scene.") for seed in range(4)]
    # Drawn, not greedy: which token is drawn depends on every logit, so that a mixed-up picture shows.
    drawn = {"max_new_tokens": 12, "temperature": 2.0, "seed": 0}
    one = new(name)
    alone = [one.generate(text, images=[image], **drawn).tokens for text, image in asked]
    assert len(set(map(tuple, alone))) > len(asked) // 2
    got: dict[int, list[int]] = {}

    def serve(numbers: list[int]) -> None:
        for number in numbers:
            text, image = asked[number]
            got[number] = vlm.generate(text, images=[image], **drawn).tokens

    numbers = random.Random(0).sample(range(len(asked)), len(asked))
    threads = [threading.Thread(target=serve, args=(numbers[i::3],), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got.get(i) for i in range(len(asked))] == alone


def test_a_bad_prompt_is_refused_before_any_work(new: Callable[..., VLM]) -> None:
    for name, bad in ((FLAMINGO, [A, "<image>"]), (T5, ["How many?"]), (INSTRUCT, [A, "word " * 200]), (OPT, [A, B, "Hm"])):
        vlm = new(name)
        runs = Runs(vlm)
        with pytest.raises(PromptError):
            vlm.stream(bad)
        assert runs() == {}


@pytest.mark.parametrize("name", [FLAMINGO, T5])
def test_a_bundle_without_one_of_its_parts(tiny: Callable[[str], Tiny], name: str, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny(name).bundle, tmp_path / "bundle"))
    whole = (bundle / MANIFEST).read_text(encoding="utf-8")
    for part in sorted(set(json.loads(whole)["parts"]) - {"resampler"}):
        manifest = json.loads(whole)
        del manifest["parts"][part]
        (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(ManifestError, match=f"without the part {part}"):
            VLM.load(bundle)


def test_a_bundle_without_its_resampler(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny(FLAMINGO).bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    del manifest["parts"]["resampler"]
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ManifestError, match="without the part resampler"):
        VLM.load(bundle)


def test_what_a_bundle_says_of_its_memory(tiny: Callable[[str], Tiny]) -> None:
    def cross(name: str) -> Any:
        return Bundle.open(Path(tiny(name).bundle), check_files=False).manifest.cross_attention

    assert (cross(FLAMINGO).source, cross(T5).source, cross(T5).places) == ("images", "prompt", 0)
    assert cross(INSTRUCT) is cross(OPT) is None
