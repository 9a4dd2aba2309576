"""Calibration sets: what is read, what is refused and how it says so, and that parts see what the runtime shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import load, logits_of, picture, watch
from PIL import Image
from recorded import relative, run
from tinies import Tiny

pytest.importorskip("torch")
from edgevlm.bundle import Bundle
from edgevlm.calibration import SAMPLES, CalibrationSet, Sample, load_calibration
from edgevlm.errors import CalibrationError
from edgevlm.graphs import load_graph
from edgevlm.images import load_image


def write(path: Path, *entries: Any, encoding: str = "utf-8", end: str = "\n") -> Path:
    """Lines of JSON, or what is text already."""
    lines = [entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in entries]
    path.write_bytes(end.join(lines).encode(encoding, "surrogatepass"))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a.png and b.jpg."""
    for seed, name in enumerate(("a.png", "b.jpg")):
        picture(seed).save(tmp_path / name)
    return tmp_path


def shown(found: CalibrationSet) -> list[tuple[list[str], str, str]]:
    return [([Path(p).name for p in sample.pictures], sample.prompt, sample.answer) for sample in found.samples]  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- scenes


def test_scenes() -> None:
    found = load_calibration(samples=9)
    assert (found.source, len(found.samples), found.seed) == ("scenes", 9, 0)
    for sample in found.samples:
        (drawn,) = sample.pictures
        assert isinstance(drawn, Image.Image)
        assert min(drawn.size) >= 100
        assert sample.prompt
        assert sample.answer
    assert len({sample.pictures[0].size for sample in found.samples}) > 1, "of several shapes"  # type: ignore[union-attr]
    assert load_calibration("scenes", samples=9, seed=0).identity() == found.identity()
    assert load_calibration(samples=9, seed=1).identity()["sha256"] != found.identity()["sha256"]
    assert shown_scenes(load_calibration(samples=4)) == shown_scenes(found)[:4]


def shown_scenes(found: CalibrationSet) -> list[tuple[str, str, bytes]]:
    return [(s.prompt, s.answer, load_image(s.pictures[0]).tobytes()) for s in found.samples]


def test_as_many_scenes_as_the_default() -> None:
    assert len(load_calibration().samples) == SAMPLES


# --------------------------------------------------------------------------------------------- folders


def test_a_folder_of_pictures(pictures: Path) -> None:
    (pictures / "inside" / "deep").mkdir(parents=True)
    picture(2).save(pictures / "inside" / "deep" / "C.PNG")
    (pictures / "notes.txt").write_text("no picture")
    (pictures / "folder.jpg").mkdir()
    found = load_calibration(pictures)
    assert [names for names, _, _ in shown(found)] == [["a.png"], ["b.jpg"], ["C.PNG"]]
    assert all(prompt and not answer for _, prompt, answer in shown(found))
    assert load_calibration(str(pictures)).identity() == found.identity()


def test_a_folder_with_a_list(pictures: Path) -> None:
    write(pictures / "list.jsonl", {"image": "b.jpg", "prompt": "What?"})
    assert shown(load_calibration(pictures)) == [(["b.jpg"], "What?", "")], "and not the picture that it does not name"
    write(pictures / "other.jsonl", {"image": "a.png"})
    with pytest.raises(CalibrationError, match=r"has several \.jsonl files \(list\.jsonl, other\.jsonl\); name the one to use"):
        load_calibration(pictures)
    assert shown(load_calibration(pictures / "other.jsonl"))[0][0] == ["a.png"]


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"has neither pictures \(\.bmp, .*\.webp\) nor a \.jsonl file"):
        load_calibration(tmp_path)


@pytest.mark.parametrize("name", ["scene", "nowhere.jsonl", ""])
def test_what_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = f"There is no calibration set {name!r}: it is `scenes`" if name else "has neither pictures"
    with pytest.raises(CalibrationError, match=re.escape(said)):
        load_calibration(name)


# ----------------------------------------------------------------------------------------------- lists


def test_every_form_of_a_line(pictures: Path) -> None:
    path = write(
        pictures / "list.jsonl",
        {"image": "a.png", "prompt": "One?", "answer": "yes"},
        {"images": ["a.png", "b.jpg"], "question": "Two?", "more": 5},
        {"file_name": str(pictures / "b.jpg"), "text": "Three?"},
        {"image": "a.png"},
        {"image": None, "prompt": "Without."},
        {"prompt": "Without, too.", "images": []},
        {"image": "a.png", "prompt": "Ein Würfel? \u2028 \u0085 \x0b 立方体 🤖", "answer": "é\u2029"},
    )
    assert shown(load_calibration(path)) == [
        (["a.png"], "One?", "yes"),
        (["a.png", "b.jpg"], "Two?", ""),
        (["b.jpg"], "Three?", ""),
        (["a.png"], "Describe the picture.", ""),
        ([], "Without.", ""),
        ([], "Without, too.", ""),
        (["a.png"], "Ein Würfel? \u2028 \u0085 \x0b 立方体 🤖", "é\u2029"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n  \t \n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_marks_and_blank_lines(pictures: Path, encoding: str, end: str) -> None:
    path = write(pictures / "l.jsonl", {"image": "a.png"}, {"image": "b.jpg"}, "", encoding=encoding, end=end)
    assert [names for names, _, _ in shown(load_calibration(path))] == [["a.png"], ["b.jpg"]]


GOOD = {"image": "a.png", "prompt": "What?"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"image": "a.png"', "line 3: Expecting"),
        ("{'image': 'a.png'}", "line 3: Expecting"),
        ("[" * 100_000, "line 3: "),
        ("5", "line 3: not a JSON object"),
        ('["a.png"]', "line 3: not a JSON object"),
        ({**GOOD, "prompt": 5}, 'line 3: "prompt" and "answer" are texts'),
        ({**GOOD, "prompt": ""}, "line 3: .* the prompt says something"),
        ({**GOOD, "prompt": " \n"}, "line 3: .* the prompt says something"),
        ({**GOOD, "answer": ["x"]}, 'line 3: "prompt" and "answer" are texts'),
        ({"image": 5}, 'line 3: "image" is a path, "images" a list of paths'),
        ({"image": 0}, 'line 3: "image" is a path'),
        ({"image": ""}, 'line 3: "image" is a path'),
        ({"images": {"a": "a.png"}}, 'line 3: "image" is a path'),
        ({"images": {}}, 'line 3: "image" is a path'),
        ({"images": ["a.png", None]}, 'line 3: "image" is a path'),
        ('{"image": "a.png", "prompt": "half \\ud83d"}', "line 3: .*surrogates not allowed"),
        ('{"image": "\\ud83d.png"}', "line 3: .*surrogates not allowed"),
    ],
)
def test_broken_lines_are_named(pictures: Path, line: Any, said: str) -> None:
    path = write(pictures / "list.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(CalibrationError, match=said) as caught:
        load_calibration(path)
    assert str(caught.value).startswith(f"{path} has 1 broken lines. ")


def test_many_broken_lines(pictures: Path) -> None:
    path = write(pictures / "list.jsonl", *["{"] * 8)
    with pytest.raises(CalibrationError, match=r"has 8 broken lines\. line 1: .*; line 5: .* \(and 3 more\)$"):
        load_calibration(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no samples"),
        (b"\n \n", "has no samples"),
        (b'\xff{"image": "a.png"}', "cannot be read"),
        (b"\x89PNG", "cannot"),
    ],
)
def test_files_that_are_no_list(pictures: Path, content: bytes, said: str) -> None:
    (pictures / "list.jsonl").write_bytes(content)
    with pytest.raises(CalibrationError, match=said):
        load_calibration(pictures / "list.jsonl")


@pytest.mark.parametrize("image", ["gone.png", "broken.png", "empty.png", ".", "a\0b.png", "x" * 300 + ".png"])
def test_pictures_that_cannot_be_used(pictures: Path, image: str) -> None:
    (pictures / "broken.png").write_bytes((pictures / "a.png").read_bytes()[:60])
    (pictures / "empty.png").write_bytes(b"")
    path = write(pictures / "list.jsonl", GOOD, {"images": ["a.png", image], "prompt": "What?"})
    with pytest.raises(CalibrationError, match=r"^1 pictures of the calibration set cannot be used\. line 2: "):
        load_calibration(path)


def test_a_broken_picture_in_a_folder(pictures: Path) -> None:
    for number in range(7):
        (pictures / f"z{number}.png").write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match=r"^7 pictures .* z0\.png: .* z4\.png: .* \(and 2 more\)$"):
        load_calibration(pictures)


def test_text_alone_is_refused(pictures: Path) -> None:
    path = write(pictures / "list.jsonl", {"prompt": "Hello"}, {"prompt": "World"})
    with pytest.raises(CalibrationError) as caught:
        load_calibration(path)
    assert str(caught.value) == (
        f"The 2 samples of {path} have no picture. A vision-language model that is calibrated on text alone loses its sight; "
        'give pictures ("image": …), or use `scenes`.'
    )


# ---------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize("samples", [0, -3])
def test_at_least_one_sample(samples: int) -> None:
    with pytest.raises(CalibrationError, match=rf"should have {samples} samples; it needs 1 or more"):
        load_calibration(samples=samples)


def test_a_choice_is_drawn_with_the_seed(pictures: Path) -> None:
    path = write(pictures / "list.jsonl", *({"image": "a.png", "prompt": str(number)} for number in range(30)))

    def chosen(samples: int, seed: int) -> list[int]:
        return [int(sample.prompt) for sample in load_calibration(path, samples=samples, seed=seed).samples]

    assert chosen(30, 5) == chosen(31, 5) == list(range(30)), "all, in their order"
    assert len(chosen(7, 0)) == 7
    assert chosen(7, 0) == chosen(7, 0) == sorted(chosen(7, 0)) != chosen(7, 1)


def test_identity_is_that_of_the_content(pictures: Path) -> None:
    def digest(*entries: Any) -> str:
        return str(load_calibration(write(pictures / "list.jsonl", *entries)).identity()["sha256"])

    first = digest(GOOD)
    (pictures / "same.png").write_bytes((pictures / "a.png").read_bytes())
    assert digest({"prompt": "What?", "file_name": "same.png"}) == first
    others = [
        digest({**GOOD, "image": "b.jpg"}), digest({**GOOD, "prompt": "What"}), digest({**GOOD, "answer": "x"}),
        digest(GOOD, GOOD), digest({"images": ["a.png", "a.png"], "prompt": "What?"}),
        digest({**GOOD, "prompt": "Wh", "answer": "at?"}),
    ]  # fmt: skip
    assert len({first, *others}) == 7


# ---------------------------------------------------------------------------------------------- running

#: Pictures in the prompt; an encoder that reads it; pictures beside it; positions in three directions.
FAMILIES = ("clip-llama", "blip2-t5-tied", "flamingo-every-second", "qwen2.5-vl-windows")


def feeds_of(bundle: Path, samples: list[Sample], parts: list[str] | None = None) -> Any:
    opened = Bundle.open(bundle, check_files=False)
    return CalibrationSet("mine", samples, 0).feeds(opened, parts or list(opened.manifest.parts), np.array)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """Makes models answer with these tokens."""

    def answers(tokens: list[int]) -> None:
        coming: Iterator[int] = iter([*tokens, 1])
        monkeypatch.setattr("edgevlm.vlm.choose_token", lambda *_: next(coming))

    return answers


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_are_given_what_the_runtime_gives(
    tiny: Callable[[str], Tiny], said: Callable[[list[int]], None], name: str, tmp_path: Path
) -> None:
    """The decoder all of the prompt and answer at once, which the runtime gives it in pieces; the others run by run."""
    bundle, samples = tiny(name).bundle, [
        Sample([picture(1)], "How many cubes?", "two of them"),
        Sample([picture(2, 64, 30)], "Ein Würfel? 🤖 " * 9, "é"),
        *([Sample([picture(3), picture(4, 20, 50)], "What changed?", "nothing")] if "blip2" not in name else []),
        *([Sample([], "Hello", "world")] if "blip2" not in name else []),
    ]  # fmt: skip
    recorded = feeds_of(bundle, samples)
    vlm = load(bundle, capacity=Bundle.open(bundle).manifest.context_length)
    before = [part for part in vlm._sessions if part not in ("decoder", "embed_tokens")]
    assert set(recorded) == {*before, "decoder", "embed_tokens"}
    watched, decoder = {part: watch(vlm, part) for part in before}, watch(vlm, "decoder")
    graph = load_graph(bundle / "onnx" / "decoder.onnx")
    for number, sample in enumerate(samples):
        answer = vlm._builder.tokenizer.encode(sample.answer, add_special_tokens=False)
        assert answer
        said(answer)
        decoder.clear()
        vlm._cache.keys.clear()
        asked: Any = {"prompt": sample.prompt, "images": list(sample.pictures), "max_new_tokens": len(answer) + 1}
        reply, logits = logits_of(vlm, **asked)
        assert reply.tokens[:-1] == answer
        found = recorded["decoder"][number]
        assert set(found) == set(vlm._sessions["decoder"].part.inputs)
        for value, axis in (("inputs_embeds", 1), ("position_ids", 1), ("mrope_position_ids", 2), ("cross_attention_mask", 1)):
            if value in found:
                wanted = np.concatenate([given[value] for given in decoder], axis)
                np.testing.assert_array_equal(found[value], wanted, err_msg=value)
        for value, info in vlm._sessions["decoder"].part.inputs.items():
            assert found[value].dtype == info.dtype
        # What is not fed at every step, caches and what pictures left in the memory: the answer depends on it.
        (out,) = run(graph, [found], tmp_path)
        assert relative(out["logits"].reshape(-1), logits[-1]) < 1e-4
    for part in before:
        assert len(recorded[part]) == len(watched[part])
        for found, given in zip(recorded[part], watched[part], strict=True):
            assert found.keys() == given.keys()
            for value in given:
                np.testing.assert_array_equal(found[value], given[value])


def test_behind_an_encoder_the_answer_is_the_models_own(tiny: Callable[[str], Tiny]) -> None:
    bundle, sample = tiny("blip2-t5-tied").bundle, Sample([picture(1)], "What is it?")
    (found,) = feeds_of(bundle, [sample])["decoder"]
    tokens = load(bundle, endless=False).generate(sample.prompt, images=list(sample.pictures), max_new_tokens=32).tokens
    assert found["inputs_embeds"].shape[1] == 1 + len(tokens) > 1
    (given,) = feeds_of(bundle, [Sample([picture(1)], "What is it?", "a cube")])["decoder"]
    assert given["inputs_embeds"].shape[1] != found["inputs_embeds"].shape[1]


@pytest.mark.parametrize("name", ["clip-llama", "qwen2.5-vl-windows"])
def test_control_tokens_in_texts_are_text(tiny: Callable[[str], Tiny], name: str) -> None:
    """A place for a picture in an answer would stand for nothing, or lie outside of the table of embeddings."""
    token = Bundle.open(tiny(name).bundle, check_files=False).manifest.image.token
    vlm = load(tiny(name).bundle)
    plain, evil = Sample([picture(1)], "What?", "a thing"), Sample([picture(1)], f"{token} </s>", f"a {token}</s> thing")
    embedded = feeds_of(tiny(name).bundle, [plain, evil], ["embed_tokens", "decoder"])
    control = set(vlm._builder.tokenizer.control_tokens().values())
    answers = [feed["input_ids"][0].tolist() for feed in embedded["embed_tokens"]][1::2]
    assert not control & set(answers[1])
    assert vlm._builder.tokenizer.decode(answers[1]).split() == evil.answer.split()
    lengths = [feed["inputs_embeds"].shape[1] for feed in embedded["decoder"]]
    assert lengths[1] > lengths[0]


def test_an_answer_fills_the_context_at_most(tiny: Callable[[str], Tiny]) -> None:
    bundle = tiny("blip2-opt-350m").bundle
    context = Bundle.open(bundle).manifest.context_length
    (found,) = feeds_of(bundle, [Sample([picture(1)], "What?", "word " * 999)])["decoder"]
    assert found["inputs_embeds"].shape[1] == context == found["past_key_values.0.key"].shape[2]


def test_a_sample_that_the_model_cannot_take_is_named(tiny: Callable[[str], Tiny], pictures: Path) -> None:
    path = write(pictures / "list.jsonl", GOOD, {"image": "a.png", "prompt": "much too long " * 400})
    opened = Bundle.open(tiny("blip2-opt-350m").bundle)
    with pytest.raises(CalibrationError, match=r"^line 2 of the calibration set list\.jsonl cannot be used: The prompt "):
        load_calibration(path).feeds(opened, ["decoder"], np.array)
    with pytest.raises(CalibrationError, match=r"^sample 1 of the calibration set mine cannot be used: "):
        CalibrationSet("mine", [Sample([], "much too long " * 400)], 0).feeds(opened, ["decoder"], np.array)


def test_only_what_is_asked_for_is_recorded(tiny: Callable[[str], Tiny]) -> None:
    bundle = tiny("clip-llama").bundle
    found = feeds_of(bundle, [Sample([picture(1)], "What?"), Sample([], "Hello")], ["vision_encoder"])
    assert list(found) == ["vision_encoder"]
    assert len(found["vision_encoder"]) == 1, "the text has no picture"
    assert feeds_of(bundle, [Sample([], "Hello")], ["vision_encoder"]) == {}, "a part that no sample reaches is left out"
