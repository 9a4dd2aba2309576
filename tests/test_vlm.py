"""The runtime from the outside: the same tokens as transformers, and caches that never change an answer."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import differ, image_part, load, logits_of, picture, text_part, user, watch
from PIL import Image
from tinies import Tiny
from tiny import LLAVAS, TinyLlava

from edgevlm import generate as generate_module
from edgevlm import vlm as vlm_module
from edgevlm.bundle import Bundle, seal
from edgevlm.errors import CapacityError, ImageError, InputError, ManifestError, PromptError
from edgevlm.vlm import VLM, Reply

TOKENS = 64


def copy_of(bundle: Path, folder: Path, **changes: Any) -> Path:
    """A bundle in which each NAME.json is replaced by a value, edited by a function, or removed (None), sealed anew."""
    shutil.copytree(bundle, folder)
    for name, change in changes.items():
        path = folder / f"{name}.json"
        if callable(change):
            content = json.loads(path.read_text(encoding="utf-8"))
            change(content)
            path.write_text(json.dumps(content), encoding="utf-8")
        elif change is None:
            path.unlink()
        else:
            path.write_text(json.dumps(change), encoding="utf-8")
    seal(folder, Bundle.open(bundle, check_files=False).manifest)
    return folder


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> VLM:
    """One model for tests to which it does not matter what was asked before."""
    return load(bundle)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A checkpoint without a chat template."""
    return Tiny(TinyLlava("no-template", template=False), tmp_path_factory.mktemp("plain"))


# ------------------------------------------------------------------------------------------- transformers

A, B = picture(1), picture(2, 30, 64)


LATER = [
    {"role": "user", "content": [text_part("Hello.")]},
    {"role": "assistant", "content": [text_part("Hello, what shall I look at?")]},
    user(image_part(B), text_part("How many cubes are there?")),
]
SYSTEM = [
    {"role": "system", "content": [text_part("Answer in one word.")]},
    user(image_part(A), text_part("What colour is the large cube?")),
]
#: What EdgeVLM is asked, and the chat that is the same for transformers.
ASKED: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "one picture": (
        {"prompt": "How many cubes are there?", "images": [A]},
        [user(image_part(A), text_part("How many cubes are there?"))],
    ),
    "two pictures": (
        {"prompt": "What changed?", "images": [A, B]},
        [user(image_part(A), image_part(B), text_part("What changed?"))],
    ),
    "no picture": ({"prompt": "Is there a red cube?"}, [user(text_part("Is there a red cube?"))]),
    "picture in a later turn": ({"messages": LATER}, LATER),
    "interleaved": (
        {"prompt": ["Look at ", A, " and at ", B, ". What changed?"]},
        [user(text_part("Look at "), image_part(A), text_part(" and at "), image_part(B), text_part(". What changed?"))],
    ),
    "system message": ({"messages": SYSTEM}, SYSTEM),
    "text beyond ASCII": (
        {"prompt": "Où est l'étoile — 左? 🤖", "images": [B]},
        [user(image_part(B), text_part("Où est l'étoile — 左? 🤖"))],
    ),
}  # fmt: skip


def transformers_model(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def transformers_answer(model: Any, batch: Any, **options: Any) -> tuple[list[int], np.ndarray]:
    """Its greedy tokens, and the logits before each, `[tokens, vocabulary]`."""
    out = model.generate(
        **batch, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return out.sequences[0, batch["input_ids"].shape[1] :].tolist(), np.stack([step[0].numpy() for step in out.logits])


@pytest.mark.parametrize("name", [tiny.name for tiny in LLAVAS])
def test_the_tokens_are_those_of_transformers(llava: Callable[[str], Tiny], name: str) -> None:
    ours = load(llava(name).bundle)
    model, processor = transformers_model(llava(name).checkpoint)
    for case, (asked, chat) in ASKED.items():
        batch = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        wanted, scores = transformers_answer(model, batch, eos_token_id=None)
        reply, logits = logits_of(ours, **asked, max_new_tokens=TOKENS)
        assert reply.timings.prompt_tokens == batch["input_ids"].shape[1], case
        assert len(wanted) == TOKENS
        assert reply.tokens == wanted, case
        assert np.abs(logits - scores).max() < 1e-3, case
        assert reply.finish_reason == "length"
        assert reply.text == processor.tokenizer.decode(wanted, skip_special_tokens=True), case
    # The comparison would notice another picture.
    seen = [logits_of(ours, prompt="How many?", images=[image], max_new_tokens=1)[1] for image in (A, B)]
    assert differ(*seen) > 1e-2


def test_without_a_chat_template_the_prompt_is_used_as_it_stands(plain: Tiny) -> None:
    ours = load(plain.bundle)
    model, processor = transformers_model(plain.checkpoint)
    text = "USER: <image>\nHow many cubes? <image> ASSISTANT:"
    batch = processor(text=text, images=[A, B], return_tensors="pt")
    reply, logits = logits_of(ours, prompt=text, images=[A, B], max_new_tokens=TOKENS)
    wanted, scores = transformers_answer(model, batch, eos_token_id=None)
    assert reply.tokens == wanted
    assert np.abs(logits - scores).max() < 1e-3
    # Pictures without any place go before the text, one line each.
    before, written = (logits_of(ours, prompt=p, images=[A], max_new_tokens=8)[1] for p in ("Hm?", "<image>\nHm?"))
    np.testing.assert_allclose(before, written, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "images"), [("<image> <image> Which?", 1), ("<image> Which?", 2), ("<image> Which?", 0), ("Which? <image>", 3)]
)
def test_without_a_chat_template_places_and_pictures_must_match(plain: Tiny, text: str, images: int) -> None:
    ours = load(plain.bundle)
    runs = [watch(ours, part) for part in ours._sessions]
    with pytest.raises(PromptError, match=str(images)):
        ours.generate(text, images=[A] * images)
    with pytest.raises(PromptError, match="template"):
        ours.generate(messages=LATER)
    assert not any(runs)


# ---------------------------------------------------------------------------------------------- stopping


def test_the_stop_token_ends_the_answer_and_is_not_in_it(llava: Callable[[str], Tiny], tmp_path: Path) -> None:
    """The checkpoint's own stop token, with transformers stopping at the same place."""
    tiny = llava(LLAVAS[0].name)
    chat, question = [user(image_part(A), text_part("How many?"))], {"prompt": "How many?", "images": [A]}
    endless = load(tiny.bundle).generate(**question, max_new_tokens=TOKENS).tokens
    stop = next(t for t in endless[8:] if t not in endless[:8])
    model, processor = transformers_model(tiny.checkpoint)
    batch = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    theirs, _ = transformers_answer(model, batch, eos_token_id=stop)
    ours = load(copy_of(tiny.bundle, tmp_path / "b", generation_config={"eos_token_id": stop}), endless=False)
    reply = ours.generate(**question, max_new_tokens=TOKENS)
    assert theirs[-1] == stop
    assert reply.tokens == theirs[:-1] == endless[: endless.index(stop)]
    assert reply.finish_reason == "stop"
    assert reply.timings.decoded_tokens == len(reply.tokens)  # the stop token, too, had to be decoded


STOP_AT = 10


@pytest.fixture(scope="module")
def never(vlm: VLM) -> tuple[list[int], int]:
    """A long answer, and a token in it that is new at its place, some way in."""
    tokens = vlm.generate("How many?", images=[A], max_new_tokens=TOKENS).tokens
    return tokens, next(t for i, t in enumerate(tokens) if i >= STOP_AT and t not in tokens[:i])


def removed(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content.pop(path[-1], None)

    return change


def test_where_the_stop_ids_come_from(bundle: Path, never: tuple[list[int], int], tmp_path: Path) -> None:
    tokens, stop = never
    names = {i: t for t, i in json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"].items()}

    def config_with(place: str | None, value: Any) -> Callable[[dict[str, Any]], None]:
        def change(content: dict[str, Any]) -> None:
            content.pop("eos_token_id", None)
            content["text_config"].pop("eos_token_id", None)
            if place == "top":
                content["eos_token_id"] = value
            elif place == "text":
                content["text_config"]["eos_token_id"] = value

        return change

    def named(content: dict[str, Any]) -> None:
        content["eos_token"] = names[stop]

    unused = next(i for i in range(5, 100) if i not in tokens)
    cases: dict[str, dict[str, Any]] = {
        "generation_config, a number": {"generation_config": {"eos_token_id": stop}},
        "generation_config, a list": {"generation_config": {"eos_token_id": [unused, stop]}},
        "first generation_config": {"generation_config": {"eos_token_id": stop}, "config": config_with("top", tokens[0])},
        "generation_config without it": {"generation_config": {}, "config": config_with("top", stop)},
        "config": {"generation_config": None, "config": config_with("top", [stop])},
        "config of the decoder": {"generation_config": None, "config": config_with("text", stop)},
        "tokenizer": {"generation_config": None, "config": config_with(None, None), "tokenizer_config": named},
    }
    for number, (case, changes) in enumerate(cases.items()):
        reply = load(copy_of(bundle, tmp_path / str(number), **changes), endless=False).generate(
            "How many?", images=[A], max_new_tokens=TOKENS
        )
        assert (reply.finish_reason, reply.tokens) == ("stop", tokens[: tokens.index(stop)]), case


def test_an_answer_that_stops_at_once_is_empty(bundle: Path, never: tuple[list[int], int], tmp_path: Path) -> None:
    changed = copy_of(bundle, tmp_path / "b", generation_config={"eos_token_id": never[0][0]})
    stream = load(changed, endless=False).stream("How many?", images=[A])
    assert list(stream) == []
    assert (stream.reply.text, stream.reply.tokens, stream.reply.finish_reason) == ("", [], "stop")
    assert stream.reply.timings.first_token > 0


# ----------------------------------------------------------------------------------------------- pictures


def test_every_form_of_a_picture_is_the_same_picture(vlm: VLM, tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    A.save(path)
    forms: list[Any] = [A, np.asarray(A), str(path), path, path.read_bytes()]
    # In a list, where a string is text, a path is a Path; elsewhere all are taken.
    asked: list[dict[str, Any]] = [
        *({"prompt": "How many?", "images": [form]} for form in forms),
        *({"prompt": [form, "How many?"]} for form in forms if not isinstance(form, str)),
        *({"messages": [user(image_part(form), text_part("How many?"))]} for form in forms),
    ]
    first, other = (logits_of(load(vlm.bundle.folder), prompt="How many?", images=[p], max_new_tokens=16)[1] for p in (A, B))
    assert differ(first, other) > 1e-2
    for request in asked:
        reply, logits = logits_of(load(vlm.bundle.folder), **request, max_new_tokens=16)
        assert reply.timings.reused_images == 0
        np.testing.assert_allclose(logits, first, atol=1e-4)
    # And the cache knows them as the same.
    vlm.generate("How many?", images=[A], max_new_tokens=1)
    assert all(vlm.generate(**request, max_new_tokens=1).timings.reused_images == 1 for request in asked)


def png_header(width: int, height: int) -> bytes:
    """A file that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def cut_png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    return buffer.getvalue()[:900]


BAD_PICTURES = {
    "text": b"this is not a picture",
    "empty": b"",
    "one pixel high": np.zeros((1, 300, 3), np.uint8),
    "no pixels": np.zeros((0, 5, 3), np.uint8),
    "floats": np.zeros((8, 8, 3), np.float32),
    "two channels": np.zeros((8, 8, 2), np.uint8),
    "decompression bomb": png_header(60_000, 60_000),
    "cut short": cut_png(),
    "no file": Path("no-such-picture.png"),
    "a folder": Path("."),
    "a number": 7,
}


@pytest.mark.parametrize("bad", BAD_PICTURES.values(), ids=BAD_PICTURES.keys())
def test_what_is_no_picture_is_refused_before_any_work(bundle: Path, bad: Any) -> None:
    vlm = load(bundle)
    runs = [watch(vlm, part) for part in vlm._sessions]
    with pytest.raises(ImageError, match=r".{20}"):
        vlm.stream("How many?", images=[A, bad])
    assert not any(runs)
    assert len(vlm.generate("How many?", images=[A], max_new_tokens=4).tokens) == 4


def test_both_layouts_of_the_preprocessing_configuration(llava: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Older checkpoints have `preprocessor_config.json`, with plain numbers as sizes; newer ones a part of another file."""
    bundle = llava(LLAVAS[0].name).bundle
    new = json.loads((bundle / "processor_config.json").read_text())["image_processor"]
    old = {
        "feature_extractor_type": "CLIPFeatureExtractor", "do_resize": True, "do_center_crop": True, "do_normalize": True,
        "size": LLAVAS[0].side, "crop_size": LLAVAS[0].side, "resample": 3,
        "image_mean": new["image_mean"], "image_std": new["image_std"],
    }  # fmt: skip
    older = copy_of(bundle, tmp_path / "old", preprocessor_config=old, processor_config=None)
    assert not (bundle / "preprocessor_config.json").exists()
    asked: dict[str, Any] = {"prompt": "How many?", "images": [B], "max_new_tokens": 16}
    _, wanted = logits_of(load(bundle), **asked)
    np.testing.assert_allclose(logits_of(load(older), **asked)[1], wanted, atol=1e-4)
    squeezed = old | {"do_center_crop": False, "size": {"height": LLAVAS[0].side, "width": LLAVAS[0].side}}
    other = copy_of(bundle, tmp_path / "other", preprocessor_config=squeezed)  # the file of its own goes first
    assert differ(logits_of(load(other), **asked)[1], wanted) > 1e-2


# ---------------------------------------------------------------------------------------------- streaming


def test_the_pieces_are_the_answer(vlm: VLM) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(vlm.bundle.folder / "tokenizer.json"))
    for question in ("How many?", "Describe the scene.", "Where is the star?"):
        stream = vlm.stream(question, images=[A], max_new_tokens=TOKENS)
        pieces = list(stream)
        reply = stream.reply
        assert "".join(piece.text for piece in pieces) == reply.text
        assert [piece.token for piece in pieces if piece.token is not None] == reply.tokens
        assert reply.text == tokenizer.decode(reply.tokens, skip_special_tokens=True)
        assert reply.tokens == vlm.generate(question, images=[A], max_new_tokens=TOKENS).tokens
        assert list(stream) == []


def test_the_reply_after_a_part_of_the_stream_is_the_whole(vlm: VLM) -> None:
    whole = vlm.generate("How many?", images=[A], max_new_tokens=20)
    stream = vlm.stream("How many?", images=[A], max_new_tokens=20)
    begun = [next(stream).token for _ in range(3)]
    assert begun == whole.tokens[:3]
    assert (stream.reply.tokens, stream.reply.text, stream.reply.finish_reason) == (whole.tokens, whole.text, "length")


def test_a_stream_closed_halfway_leaves_a_model_that_works(bundle: Path) -> None:
    vlm = load(bundle)
    whole = load(bundle).generate("How many?", images=[A], max_new_tokens=20)
    stream = vlm.stream("How many?", images=[A], max_new_tokens=20)
    read = [next(stream) for _ in range(5)]
    stream.close()
    assert list(stream) == []
    assert stream.reply.finish_reason == "closed"
    assert stream.reply.tokens == whole.tokens[:5]
    assert stream.reply.text == "".join(piece.text for piece in read)
    assert vlm.generate("How many?", images=[A], max_new_tokens=20).tokens == whole.tokens


def test_a_stream_that_was_never_read(vlm: VLM) -> None:
    stream = vlm.stream("How many?", images=[A])
    stream.close()
    assert (stream.reply.tokens, stream.reply.text, stream.reply.finish_reason) == ([], "", "closed")
    assert stream.reply.timings.first_token == 0
    assert len(vlm.generate("How many?", max_new_tokens=3).tokens) == 3


def test_a_forgotten_stream_does_not_block(bundle: Path) -> None:
    vlm = load(bundle)
    next(vlm.stream("How many?", images=[A]))
    assert len(vlm.generate("How many?", max_new_tokens=3).tokens) == 3


def test_a_second_answer_in_the_thread_of_an_open_stream_is_refused(vlm: VLM) -> None:
    whole = vlm.generate("How many?", images=[A], max_new_tokens=12)
    stream = vlm.stream("How many?", images=[A], max_new_tokens=12)
    next(stream)
    with pytest.raises(InputError, match="close"):
        vlm.generate("Describe the scene.", images=[B])
    assert stream.reply.tokens == whole.tokens  # the first is none the worse
    assert len(vlm.generate("Describe the scene.", images=[B], max_new_tokens=5).tokens) == 5


def test_another_thread_waits_for_an_open_stream(vlm: VLM) -> None:
    first = vlm.generate("How many?", images=[A], max_new_tokens=12)
    second = vlm.generate("Describe the scene.", images=[B], max_new_tokens=12)
    stream = vlm.stream("How many?", images=[A], max_new_tokens=12)
    next(stream)
    got: list[Reply] = []
    other = threading.Thread(
        target=lambda: got.append(vlm.generate("Describe the scene.", images=[B], max_new_tokens=12)), daemon=True
    )
    other.start()
    other.join(0.3)
    assert other.is_alive()
    assert not got
    assert stream.reply.tokens == first.tokens
    other.join(30)
    assert got[0].tokens == second.tokens


def test_threads_get_the_answers_that_they_get_one_by_one(bundle: Path) -> None:
    vlm = load(bundle)
    asked = [(text, picture(seed)) for text in ("How many?", "Describe the scene.") for seed in range(6)]
    # Drawn, not greedy: which token is drawn depends on every logit, so that a mixed-up picture shows.
    drawn = {"max_new_tokens": 24, "temperature": 2.0, "seed": 0}
    alone = [load(bundle).generate(text, images=[image], **drawn).tokens for text, image in asked]
    assert len(set(map(tuple, alone))) > len(asked) // 2
    got: dict[int, list[int]] = {}
    order = random.Random(0)

    def serve(numbers: list[int]) -> None:
        for number in numbers:
            text, image = asked[number]
            got[number] = vlm.generate(text, images=[image], **drawn).tokens

    numbers = order.sample(range(len(asked)), len(asked))
    threads = [threading.Thread(target=serve, args=(numbers[i::4],), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[i] for i in range(len(asked))] == alone


# ------------------------------------------------------------------------------------------------- caches


def test_a_second_question_about_a_picture_does_not_look_again(bundle: Path) -> None:
    vlm = load(bundle)
    looks, rows = watch(vlm, "vision_encoder"), watch(vlm, "decoder")
    places = vlm.bundle.manifest.image.places

    first = vlm.generate("How many cubes are there?", images=[A], max_new_tokens=1)
    assert len(looks) == 1
    assert first.timings.reused_images == 0
    assert first.timings.reused_tokens == 0
    assert first.timings.vision > 0
    assert sum(feeds["inputs_embeds"].shape[1] for feeds in rows) == first.timings.prompt_tokens

    rows.clear()
    second = vlm.generate("Where is the star?", images=[A.copy()], max_new_tokens=1)
    assert len(looks) == 1
    assert second.timings.reused_images == 1
    assert second.timings.reused_tokens >= places
    computed = sum(feeds["inputs_embeds"].shape[1] for feeds in rows)
    assert computed == second.timings.prompt_tokens - second.timings.reused_tokens
    assert computed < second.timings.prompt_tokens - places

    rows.clear()
    again = vlm.generate("Where is the star?", images=[A], max_new_tokens=1)
    assert [feeds["inputs_embeds"].shape[1] for feeds in rows] == [1]  # the last row gives the logits
    assert again.timings.reused_tokens == again.timings.prompt_tokens - 1
    assert again.tokens == second.tokens

    other = vlm.generate("Where is the star?", images=[B], max_new_tokens=1)
    assert len(looks) == 2
    assert other.timings.reused_images == 0
    assert other.timings.reused_tokens < 1 + places  # not the places of another picture


def test_the_same_picture_twice_in_a_prompt_is_looked_at_once(bundle: Path) -> None:
    vlm = load(bundle)
    looks = watch(vlm, "vision_encoder")
    assert vlm.generate("What changed?", images=[A, A], max_new_tokens=1).timings.reused_images == 1
    assert len(looks) == 1


def test_a_conversation_goes_on_where_it_was(bundle: Path) -> None:
    """The answer itself is in the cache, too, when the next turn quotes it."""
    vlm = load(bundle)
    question = user(image_part(A), text_part("How many cubes are there?"))
    first = vlm.generate(messages=[question], max_new_tokens=6)
    chat = [question, {"role": "assistant", "content": first.text}, user(text_part("And balls?"))]
    second = vlm.generate(messages=chat, max_new_tokens=6)
    assert second.timings.reused_tokens >= first.timings.prompt_tokens
    assert second.tokens == load(bundle).generate(messages=chat, max_new_tokens=6).tokens


@pytest.mark.parametrize("seed", range(3))
def test_a_warm_model_answers_as_a_new_one(bundle: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was asked before, closed halfway, or pushed out of the cache: the answer is that of a new model."""
    monkeypatch.setattr(vlm_module, "_KEPT_PICTURES", 2)
    monkeypatch.setattr(generate_module, "CHUNK", 24)
    rng = random.Random(seed)
    warm, known = load(bundle), {}
    pictures = [picture(1), picture(2, 30, 64), picture(3)]
    prompts = ["How many?", "How many cubes are there?", "How many cubes are there in the picture on the left?", "Hm"]
    reused = 0
    for _ in range(15):
        prompt, images = rng.choice(prompts), tuple(rng.choices(range(3), k=rng.choice((0, 1, 1, 1, 2))))
        length, sampled = rng.choice((1, 5, 30)), rng.choice((None, None, 7))
        options = {"temperature": 0.8, "seed": sampled} if sampled else {}
        asked = {"images": [pictures[i] for i in images], "max_new_tokens": length, **options}
        if rng.random() < 0.25:
            stream = warm.stream(rng.choice(prompts), images=[pictures[rng.randrange(3)]])
            for _ in range(rng.randrange(4)):
                next(stream)
            stream.close()
        reply, logits = logits_of(warm, prompt=prompt, **asked)
        case = (prompt, images, length, sampled)
        if case not in known:
            known[case] = logits_of(load(bundle), prompt=prompt, **asked)
        wanted, scores = known[case]
        assert (reply.tokens, reply.text) == (wanted.tokens, wanted.text), case
        np.testing.assert_allclose(logits, scores, atol=1e-4, err_msg=str(case))
        reused += reply.timings.reused_tokens
    assert reused > 0


def test_pictures_pushed_out_between_asking_and_reading(bundle: Path) -> None:
    """A stream is checked when it is made and works when it is read; what it counted on may be gone by then."""
    vlm = load(bundle)
    drawn = {"max_new_tokens": 24, "temperature": 2.0, "seed": 0}
    wanted = vlm.generate("How many?", images=[A], **drawn).tokens
    stream = vlm.stream("How many?", images=[A], **drawn)
    for seed in range(100, 101 + vlm_module._KEPT_PICTURES):
        vlm.generate("How many?", images=[picture(seed)], max_new_tokens=1)
    assert stream.reply.tokens == wanted


# --------------------------------------------------------------------------------------- length and memory


@pytest.mark.parametrize("chunk", [7, 64])
def test_prefill_in_chunks_changes_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    text = "Where is the large green ball, left of the star? " * 60
    monkeypatch.setattr(generate_module, "CHUNK", 10_000)
    vlm = load(bundle)
    rows = watch(vlm, "decoder")
    whole, scores = logits_of(vlm, prompt=text, images=[A, B], max_new_tokens=TOKENS)
    assert whole.timings.prompt_tokens > 3 * 256
    assert rows[0]["inputs_embeds"].shape[1] == whole.timings.prompt_tokens
    monkeypatch.undo()
    for size in (generate_module.CHUNK, chunk):
        monkeypatch.setattr(generate_module, "CHUNK", size)
        vlm = load(bundle)
        rows = watch(vlm, "decoder")
        reply, logits = logits_of(vlm, prompt=text, images=[A, B], max_new_tokens=TOKENS)
        assert reply.tokens == whole.tokens
        np.testing.assert_allclose(logits, scores, atol=1e-3)
        assert max(feeds["inputs_embeds"].shape[1] for feeds in rows) == size


def test_a_long_prompt_takes_memory_for_its_cache_only(bundle: Path) -> None:
    """In a process of its own, whose peak is known: 1,800 tokens against 300."""
    code = """
import sys
from edgevlm import generate
from edgevlm.vlm import VLM

generate.CHUNK = int(sys.argv[2])

def peak():
    return next(1024 * int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))

def ask(tokens):
    vlm = VLM.load(sys.argv[1], threads=1)
    unit = len(vlm._builder.tokenizer.encode("ball ball", add_special_tokens=False)) - len(
        vlm._builder.tokenizer.encode("ball", add_special_tokens=False))
    reply = vlm.generate("ball " * ((tokens - 30) // unit), max_new_tokens=2)
    assert abs(reply.timings.prompt_tokens - tokens) < 60, reply.timings
    return peak()

ask(300)
print(*(ask(tokens) for tokens in (300, 1800)))
"""

    def growth(chunk: int) -> int:
        command = [sys.executable, "-c", code, str(bundle), str(chunk)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        short, long = map(int, out.split())
        return long - short

    kv = Bundle.open(bundle, check_files=False).manifest.kv_cache
    # Old and new cache while it grows, and what one chunk's attention looks back at: scores and weights in float32.
    scores = 2 * generate_module.CHUNK * 2048 * LLAVAS[0].heads * 4
    allowed = 2 * 2048 * kv.bytes_per_token() + scores + 8_000_000
    assert growth(generate_module.CHUNK) < allowed
    assert growth(10_000) > allowed  # in one piece, the attention alone would take more


def test_a_prompt_beyond_the_capacity_is_refused_before_any_work(bundle: Path) -> None:
    vlm = load(bundle, capacity=40)
    runs = [watch(vlm, part) for part in vlm._sessions]
    length = load(bundle).generate("How many? " * 20, images=[A], max_new_tokens=1).timings.prompt_tokens
    with pytest.raises(CapacityError, match=rf"\b{length}\b.*\b40\b"):
        vlm.stream("How many? " * 20, images=[A])
    assert not any(runs)
    assert len(vlm.generate("Hm", max_new_tokens=2).tokens) == 2


def test_an_answer_ends_where_the_capacity_does(bundle: Path) -> None:
    whole = load(bundle).generate("How many?", images=[A], max_new_tokens=20)
    length = whole.timings.prompt_tokens
    for room in (1, 2, 7):
        reply = load(bundle, capacity=length + room).generate("How many?", images=[A], max_new_tokens=20)
        assert reply.finish_reason == "capacity"
        assert reply.tokens == whole.tokens[:room]
    assert load(bundle, capacity=length + 20).generate("How many?", images=[A], max_new_tokens=20).finish_reason == "length"
    with pytest.raises(CapacityError):
        load(bundle, capacity=length).generate("How many?", images=[A], max_new_tokens=1)


def test_the_capacity_may_be_the_context_length(bundle: Path) -> None:
    most = Bundle.open(bundle, check_files=False).manifest.context_length
    assert load(bundle, capacity=most).capacity == load(bundle).capacity == most


@pytest.mark.parametrize("capacity", [-1, 0, 1, 2049, 1_000_000, 100.5])
def test_a_capacity_out_of_range_is_refused(bundle: Path, capacity: Any) -> None:
    with pytest.raises(InputError, match="2048"):
        load(bundle, capacity=capacity)


@pytest.mark.parametrize(("options", "named"), [({"backend": "tpu"}, "cpu"), ({"backend": "cuda"}, "cuda")])
def test_a_backend_that_is_not_there_is_refused(bundle: Path, options: dict[str, Any], named: str) -> None:
    if options["backend"] == "cuda":
        onnxruntime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this machine may have a GPU that works")
    with pytest.raises(InputError, match=named):
        VLM.load(bundle, **options)


def test_no_threads_are_refused(bundle: Path) -> None:
    with pytest.raises(InputError, match="threads"):
        VLM.load(bundle, threads=0)


@pytest.mark.parametrize("number", [0, -1, True, 1.5, None, "8"])
def test_a_length_that_is_none_is_refused(vlm: VLM, number: Any) -> None:
    with pytest.raises(InputError, match="max_new_tokens"):
        vlm.stream("How many?", max_new_tokens=number)


# ----------------------------------------------------------------------------------------- text and choice


@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_written_image_token_stays_text(bundle: Path, images: int) -> None:
    vlm = load(bundle)
    builder, given = vlm._builder, []
    build = builder.build
    object.__setattr__(builder, "build", lambda request: given.append(build(request)) or given[-1])
    reply = vlm.generate("What does <image> mean, and </s>?", images=[A, B][:images], max_new_tokens=4)
    image, (prompt,) = vlm.bundle.manifest.image, given
    assert prompt.ids.count(image.token_id) == images * image.places
    assert 2 not in prompt.ids  # </s>
    assert builder.tokenizer.decode(prompt.ids).count("<image> mean, and </s>?") == 1
    assert len(reply.tokens) == 4


def test_sampling_is_repeatable(vlm: VLM) -> None:
    def tokens(**options: Any) -> list[int]:
        return vlm.generate("Describe the scene.", images=[A], max_new_tokens=24, **options).tokens

    greedy = tokens()
    assert tokens(temperature=0.0) == tokens(temperature=0.0, seed=3) == greedy
    assert tokens(temperature=5.0, top_k=1) == greedy
    assert tokens(temperature=5.0, top_p=1e-9) == greedy
    drawn = [tokens(temperature=1.0, seed=seed) for seed in range(5)]
    assert drawn == [tokens(temperature=1.0, seed=seed) for seed in range(5)]
    assert len(set(map(tuple, drawn))) == 5
    assert tokens(temperature=1.0, seed=0, top_p=0.3) != drawn[0]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.1}, {"temperature": 1.0, "top_k": 0}, {"top_p": 0.5}, {"top_k": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_choice_that_makes_no_sense_is_refused(vlm: VLM, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"temperature|top_p|top_k"):
        vlm.stream("How many?", **options)


@pytest.mark.parametrize(
    "asked",
    [{}, {"prompt": ""}, {"prompt": "a", "messages": LATER}, {"prompt": []}, {"prompt": "a", "images": A}, {"messages": []}],
)
def test_a_request_without_form_is_refused(vlm: VLM, asked: dict[str, Any]) -> None:
    with pytest.raises(PromptError):
        vlm.stream(**asked)


# ------------------------------------------------------------------------------------------ other weights


@pytest.mark.parametrize(("dtype", "recipe"), [("fp16", None), ("fp32", "int8"), ("fp32", "int4"), ("fp16", "int4")])
def test_smaller_weights_run_from_end_to_end(
    llava: Callable[[str], Tiny], bundle: Path, dtype: str, recipe: str | None
) -> None:
    folder = llava(LLAVAS[0].name).export(dtype, recipe)
    warm = load(folder)
    answers = []
    for image, text in itertools.product((A, B), ("How many?", "Describe the scene.")):
        reply = warm.generate(text, images=[image], max_new_tokens=16)
        assert len(reply.tokens) == 16
        answers.append(tuple(reply.tokens))
        _, logits = logits_of(warm, prompt=text, images=[image], max_new_tokens=1)
        _, exact = logits_of(load(bundle), prompt=text, images=[image], max_new_tokens=1)
        cosine = float(logits[0] @ exact[0] / np.linalg.norm(logits[0]) / np.linalg.norm(exact[0]))
        assert cosine > {None: 0.999, "int8": 0.98, "int4": 0.8}[recipe]
    new = load(folder).generate("Describe the scene.", images=[B], max_new_tokens=16)
    assert tuple(new.tokens) == answers[-1]


def test_the_runtime_needs_no_torch(bundle: Path, tmp_path: Path) -> None:
    """In a process that cannot import it, nor anything else of the workshop."""
    A.save(tmp_path / "a.png")
    code = """
import sys
for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub", "ml_dtypes"):
    sys.modules[name] = None
from edgevlm.vlm import VLM
print(*VLM.load(sys.argv[1], threads=1).generate("How many?", images=[sys.argv[2]], max_new_tokens=8).tokens)
"""
    command = [sys.executable, "-c", code, str(bundle), str(tmp_path / "a.png")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}).stdout
    wanted = load(bundle, endless=False).generate("How many?", images=[A], max_new_tokens=8).tokens
    assert list(map(int, out.split())) == wanted


def test_a_bundle_without_one_of_its_parts(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "edgevlm.json").read_text())
    del manifest["parts"]["projector"]
    (copy / "edgevlm.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="without the part projector"):
        VLM.load(copy)
