"""Suites: what is asked, and what is said where a file cannot be asked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from asking import picture

from edgevlm.errors import InputError
from edgevlm.evaluation.records import Item
from edgevlm.evaluation.suites import CAPTION_PROMPT, NEGATIVES, SuiteSpec, load_suite, pope_scenes
from edgevlm.scenes import KINDS, SPLITS, Scene, heldout_questions


def load(suite: object, **options: Any) -> tuple[Item, ...]:
    return load_suite(SuiteSpec(str(suite), **options)).items


def refused(suite: object, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_suite(SuiteSpec(str(suite), **options))
    return str(caught.value)


def write_lines(path: Path, *entries: Any) -> Path:
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries), encoding="utf-8")
    return path


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "val2014"
    folder.mkdir()
    for number in (1, 2, 310196):
        picture(number).save(folder / f"COCO_val2014_{number:012d}.jpg")
    return folder


# --------------------------------------------------------------------------------------------------- drawn


def test_scenes_are_the_held_out_questions() -> None:
    suite = load_suite(SuiteSpec("scenes", limit=40))
    assert (suite.name, suite.metric) == ("scenes", "exact")
    held = list(heldout_questions(40))
    assert [(i.prompt, i.references, i.kind, i.pictures) for i in suite.items] == [
        (question.text, (question.answer,), question.kind, (scene,)) for scene, question in held
    ]
    assert len({i.id for i in suite.items}) == 40
    assert len(load("scenes")) == 1000
    assert Counter(i.kind for i in load("scenes")) == dict.fromkeys(KINDS, 125)


def test_a_smaller_limit_asks_some_of_the_same() -> None:
    few, more = load("scenes", limit=24), load("scenes", limit=80)
    assert {i.id: i for i in few}.items() <= {i.id: i for i in more}.items()


def test_splits_and_aspects_of_scenes() -> None:
    wide = load_suite(SuiteSpec("scenes", limit=8, split="validation", aspect="wide"))
    assert wide.name == "scenes-validation-wide"
    for item in wide.items:
        (scene,) = item.pictures
        assert isinstance(scene, Scene)
        assert scene.seed in SPLITS["validation"]
        assert scene.width > 1.4
    assert "train, validation, test" in refused("scenes", split="exam")
    assert "square, wide, tall" in refused("scenes", aspect="round")


@pytest.mark.parametrize("aspect", ["square", "tall"])
def test_pope_of_scenes_asks_what_is_there_and_what_is_not(aspect: str) -> None:
    items = load("pope-scenes", limit=600, aspect=aspect)
    assert Counter(i.references for i in items) == {("yes",): 300, ("no",): 300}
    assert {i.kind for i in items} == set(NEGATIVES)
    assert len({i.id for i in items}) == 600
    for item in items:
        (scene,) = item.pictures
        assert isinstance(scene, Scene)
        thing = item.prompt.removeprefix("Is there a ").removesuffix("?")
        assert (thing in {f"{o.colour} {o.shape}" for o in scene.objects}) == (item.references == ("yes",))
    for strategy in NEGATIVES:
        labels = Counter(i.references[0] for i in items if i.kind == strategy)
        assert abs(labels["yes"] - labels["no"]) <= 1
    assert items[:100] == load("pope-scenes", limit=100, aspect=aspect)


def test_negatives_of_pope_are_chosen_as_said() -> None:
    """The popular one is the same for most scenes; the adversarial one shares shape or colour with what it stands beside."""
    absent: dict[str, list[tuple[str, str]]] = {strategy: [] for strategy in NEGATIVES}
    before = ""
    for number, (_, strategy, thing, label) in enumerate(pope_scenes()):
        if label == "no":
            absent[strategy].append((before, thing))
        before = thing
        if number == 900:
            break
    most = {
        strategy: Counter(thing for _, thing in found).most_common(1)[0][1] / len(found) for strategy, found in absent.items()
    }
    assert most["popular"] > 0.35 > 0.2 > most["random"]
    alike = {
        strategy: sum(bool(set(a.split()) & set(b.split())) for a, b in found) / len(found)
        for strategy, found in absent.items()
    }
    assert alike["adversarial"] > alike["random"] + 0.2


# ---------------------------------------------------------------------------------------------------- POPE


def pope(path: Path, **changes: Any) -> Path:
    line = {
        "question_id": 1,
        "image": "COCO_val2014_000000310196.jpg",
        "text": "Is there a snowboard in the image?",
        "label": "yes",
    }
    return write_lines(
        path, line, "", {**line, "question_id": 2, "text": "Is there a car in the image?", "label": "no", **changes}
    )


def test_pope_as_it_is_published(tmp_path: Path, images: Path) -> None:
    file = pope(tmp_path / "coco_pope_random.json")
    suite = load_suite(SuiteSpec(f"pope:{file}", images=str(images)))
    assert (suite.name, suite.metric) == ("pope-coco_pope_random", "pope")
    photo = images / "COCO_val2014_000000310196.jpg"
    assert suite.items == (
        Item("1", "Is there a snowboard in the image?", (photo,), ("yes",)),
        Item("2", "Is there a car in the image?", (photo,), ("no",)),
    )


def test_wording(tmp_path: Path, images: Path) -> None:
    file = f"pope:{pope(tmp_path / 'p.json')}"
    word = "Answer the question using a single word or phrase."
    question = "Is there a snowboard in the image?"
    assert load(file, images=str(images), instruction=word)[0].prompt == f"{question}\n{word}"
    formed = load(file, images=str(images), instruction="Question: {question} Short answer:")[0].prompt
    assert formed == f"Question: {question} Short answer:"
    assert load("scenes", limit=8, instruction="Say {it}.")[0].prompt.endswith("?\nSay {it}.")


def test_missing_pictures_are_counted_and_named(tmp_path: Path, images: Path) -> None:
    lines = [{"question_id": n, "image": f"{n // 2}.jpg", "text": "?", "label": "no"} for n in range(40)]
    lines.append({"question_id": 99, "image": "COCO_val2014_000000000001.jpg", "text": "?", "label": "no"})
    said = refused(f"pope:{write_lines(tmp_path / 'p.json', *lines)}", images=str(images))
    assert said.startswith("20 of the 21 pictures of pope-p are missing: ")
    assert f"{images}/0.jpg, {images}/1.jpg" in said
    assert said.count(".jpg") == 5
    assert "--images" in said
    assert "is no folder" in refused(f"pope:{tmp_path / 'p.json'}", images=str(tmp_path / "nowhere"))
    assert len(load(f"pope:{pope(images / 'beside.json')}")) == 2  # the pictures are where the file is


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"label": "maybe"}, "line 3 (its label is 'maybe', neither yes nor no)"),
        ({"image": None}, "line 3 (its 'image' is None, no text)"),
        ({"text": " "}, "line 3 (its 'text' is ' ', no text)"),
        ({"question_id": 1}, "line 3 (the id 1 is that of line 1, too)"),
        ({"question_id": None}, "line 3 (its 'question_id' is None, neither a number nor a text)"),
        ({"question_id": True}, "line 3 (its 'question_id' is True, neither"),
    ],
)
def test_broken_lines_of_pope(tmp_path: Path, images: Path, changes: dict[str, Any], complaint: str) -> None:
    said = refused(f"pope:{pope(tmp_path / 'p.json', **changes)}", images=str(images))
    assert "has 1 broken line: " in said
    assert complaint in said


def test_many_broken_lines_are_named(tmp_path: Path) -> None:
    good = {"question": "?", "answer": "a"}
    file = write_lines(tmp_path / "q.jsonl", good, "{", "[1]", good, '"text"', "nul", '{"question": "?"}', "7", "{}", good)
    said = refused(file)
    assert said.startswith(f"{file} has 7 broken lines: line 2 (not JSON: ")
    for part in (
        "line 3 (a list where an object",
        "line 5 (a string where",
        "line 6 (not JSON",
        "line 7 (neither 'answer' nor",
    ):
        assert part in said
    assert said.endswith(", and 2 more.")
    assert "has 7 broken lines" in refused(file, limit=1)  # whatever the limit


# ----------------------------------------------------------------------------------------------------- VQA


def vqa(folder: Path, count: int = 10, **content: Any) -> Path:
    questions = [
        {"image_id": 310196, "question": "What is it?", "question_id": 310196000},
        {"image_id": 1, "question": "Is it?", "question_id": 1001},
    ]
    annotations = [
        {
            "question_id": q["question_id"], "image_id": q["image_id"], "question_type": "what", "answer_type": kind,
            "multiple_choice_answer": "x",
            "answers": [{"answer": f"{kind} {n}", "answer_confidence": "yes", "answer_id": n} for n in range(1, count + 1)],
        }
        for q, kind in zip(reversed(questions), ("yes/no", "other"), strict=True)
    ]  # fmt: skip
    kind = {"data_type": "mscoco", "data_subtype": "val2014", "task_type": "Open-Ended", "questions": questions, **content}
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    return write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", kind)


def test_vqa_as_it_is_published(tmp_path: Path, images: Path) -> None:
    file = vqa(tmp_path)
    suite = load_suite(SuiteSpec(f"vqa:{file}", images=str(images)))
    assert (suite.name, suite.metric) == ("vqa-v2_OpenEnded_mscoco_val2014_questions", "vqa")
    first, second = suite.items
    assert first == Item(
        "310196000",
        "What is it?",
        (images / "COCO_val2014_000000310196.jpg",),
        tuple(f"other {n}" for n in range(1, 11)),
        "other",
    )
    assert (second.kind, second.pictures) == ("yes/no", (images / "COCO_val2014_000000000001.jpg",))
    # the folder above, and the names of 2017
    assert load(f"vqa:{file}", images=str(tmp_path))[0].pictures == first.pictures
    (tmp_path / "2017").mkdir()
    for number in (1, 310196):
        picture(number).save(tmp_path / "2017" / f"{number:012d}.jpg")
    assert load(f"vqa:{file}", images=str(tmp_path / "2017"))[1].pictures == (tmp_path / "2017" / "000000000001.jpg",)


def test_vqa_annotations_under_another_name(tmp_path: Path, images: Path) -> None:
    file = vqa(tmp_path)
    moved = (tmp_path / "v2_mscoco_val2014_annotations.json").rename(tmp_path / "answers.json")
    assert "--annotations (v2_mscoco_val2014_annotations.json is not there)" in refused(f"vqa:{file}", images=str(images))
    assert len(load(f"vqa:{file}", images=str(images), annotations=str(moved))) == 2
    assert "has no list 'annotations'; it has 'data_subtype'" in refused(
        f"vqa:{file}", images=str(images), annotations=str(file)
    )


def test_vqa_that_does_not_fit(tmp_path: Path, images: Path) -> None:
    assert "entry 1 (it has 3 answers" in refused(f"vqa:{vqa(tmp_path, 3)}", images=str(images))
    other = {"questions": [{"image_id": 1, "question": "?", "question_id": 5}]}
    assert "entry 1 (question 5 has no answers in v2_mscoco_val2014_annotations.json)" in refused(
        f"vqa:{vqa(tmp_path, **other)}", images=str(images)
    )
    assert "abstract_v002_val2015_000000310196.png" in refused(
        f"vqa:{vqa(tmp_path, data_type='abstract_v002', data_subtype='val2015')}", images=str(images)
    )


# ------------------------------------------------------------------------------------------------ captions


def captions(path: Path) -> Path:
    return write_json(
        path,
        {
            "images": [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in (1, 2)],
            "annotations": [
                {"image_id": 2, "id": 7, "caption": "A cat."}, {"image_id": 1, "id": 8, "caption": "A dog."},
                {"image_id": 2, "id": 9, "caption": "One cat"},
            ],
        },
    )  # fmt: skip


def test_captions_as_they_are_published(tmp_path: Path, images: Path) -> None:
    file = f"captions:{captions(tmp_path / 'captions_val2014.json')}"
    suite = load_suite(SuiteSpec(file, images=str(images)))
    assert (suite.name, suite.metric) == ("captions-captions_val2014", "cider")
    assert suite.items[1] == Item("2", CAPTION_PROMPT, (images / "COCO_val2014_000000000002.jpg",), ("A cat.", "One cat"))
    assert [i.prompt for i in load(file, images=str(images), instruction="", limit=1)] == [""]


def test_captions_that_lack_some(tmp_path: Path, images: Path) -> None:
    file = captions(tmp_path / "c.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    content["images"].append({"id": 3, "file_name": "COCO_val2014_000000310196.jpg"})
    write_json(file, content)
    assert "entry 3 (picture 3 has no caption)" in refused(f"captions:{file}", images=str(images))


# ----------------------------------------------------------------------------------------------- your own


def test_questions_of_ones_own(tmp_path: Path, images: Path) -> None:
    file = write_lines(
        tmp_path / "shelf check.jsonl",
        {"id": "a-1", "image": "val2014/COCO_val2014_000000000001.jpg", "question": "Ist das Regal leer?", "answer": "ja"},
        {"images": [str(images / "COCO_val2014_000000000001.jpg"), "val2014/COCO_val2014_000000000002.jpg"],
         "prompt": "Changed?", "answers": ["no", "nothing"], "kind": "pairs", "note": "passed over"},
        {"question": "", "answer": "x", "id": 7},
    )  # fmt: skip
    suite = load_suite(SuiteSpec(str(file)))
    assert (suite.name, suite.metric) == ("shelf-check", "exact")
    one, two = (images / f"COCO_val2014_{n:012d}.jpg" for n in (1, 2))
    assert suite.items == (
        Item("a-1", "Ist das Regal leer?", (one,), ("ja",)),
        Item("2", "Changed?", (one, two), ("no", "nothing"), "pairs"),
        Item("7", "", (), ("x",)),
    )
    assert load(f"jsonl:{file}") == suite.items
    assert load(file, limit=2) == suite.items[:2]


def test_the_metric_of_ones_own_questions(tmp_path: Path) -> None:
    line = {"question": "?", "answer": "yes"}
    file = write_lines(tmp_path / "q.jsonl", {**line, "metric": "pope"}, {**line, "metric": "pope"})
    assert load_suite(SuiteSpec(str(file))).metric == "pope"
    assert load_suite(SuiteSpec(str(file), metric="contains")).metric == "contains"
    mixed = write_lines(tmp_path / "m.jsonl", {**line, "metric": "pope"}, line)
    assert "pope (line 1), exact (line 2)" in refused(mixed)
    assert load_suite(SuiteSpec(str(mixed), metric="exact")).metric == "exact"
    assert "there are exact, contains, pope, vqa, cider" in refused(write_lines(tmp_path / "n.jsonl", {**line, "metric": "f1"}))
    assert "line 1 (it has 1 answers" in refused(file, metric="vqa")
    assert "no metric 'bleu'" in refused(file, metric="bleu")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"answer": "a"}, "neither 'question' nor 'prompt'"),
        ({"question": "?", "prompt": "?", "answer": "a"}, "both 'question' and 'prompt'"),
        ({"question": ["?", "??"], "answer": "a"}, "it has 2 questions"),
        ({"question": 5, "answer": "a"}, "its 'question' is 5, no text"),
        ({"question": "?", "answers": []}, "its 'answers' is [], no text"),
        ({"question": "?", "answers": ["a", 1]}, "no text"),
        ({"question": "?", "answer": "a", "kind": 3}, "its kind is 3, no string"),
        ({"question": "?", "answer": "a", "image": {"path": "x"}}, "no text"),
        ({"question": "?", "answer": "a", "id": []}, "its 'id' is []"),
    ],
)
def test_broken_lines_of_ones_own(tmp_path: Path, line: dict[str, Any], complaint: str) -> None:
    said = refused(write_lines(tmp_path / "q.jsonl", line))
    assert "line 1 (" in said
    assert complaint in said


def test_ids_given_and_counted_may_meet(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "q.jsonl", {"id": "2", "question": "?", "answer": "a"}, {"question": "!", "answer": "a"})
    assert "line 2 (the id 2 is that of line 1, too)" in refused(file)


# --------------------------------------------------------------------------------------------- bad requests


def test_what_is_no_suite(tmp_path: Path) -> None:
    assert "There is no suite 'coco'. A suite is one of scenes, pope-scenes, pope:FILE" in refused("coco")
    assert "no suite 'pop:x.json'" in refused("pop:x.json")
    assert "write --suite pope:FILE" in refused("pope")
    assert "takes no file: write --suite scenes" in refused("scenes:x.json")
    assert "cannot be read: No such file" in refused(tmp_path / "nothing.jsonl")
    assert "cannot be read: Is a directory" in refused(f"pope:{tmp_path}")
    assert "limit is 0" in refused("scenes", limit=0)


def test_options_that_a_suite_does_not_have(tmp_path: Path) -> None:
    assert "The suite scenes has no option --images, --metric." in refused("scenes", images=str(tmp_path), metric="exact")
    file = write_lines(tmp_path / "q.jsonl", {"question": "?", "answer": "a"})
    assert "no option --annotations, --split." in refused(file, annotations="x", split="validation")


def test_what_is_no_picture_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "good.png")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "nothing.png").write_bytes(b"")
    entries = [{"image": name, "question": "?", "answer": "a"} for name in ("good.png", "page.jpg", "nothing.png", "page.jpg")]
    said = refused(write_lines(tmp_path / "q.jsonl", *entries))
    assert said.startswith(f"2 of the 3 pictures of q are none that Pillow can read: {tmp_path / 'page.jpg'}, ")
    assert "good.png" not in said
    assert "take their questions out" in said


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf\r\n"])
def test_empty_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "q.jsonl").write_bytes(content)
    assert "holds no questions" in refused(tmp_path / "q.jsonl")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe{}")
    assert "no UTF-8 text" in refused(tmp_path / "q.jsonl")
    (tmp_path / "list.json").write_text("[]")
    assert "holds a list where an object was expected" in refused(f"captions:{tmp_path / 'list.json'}")
    (tmp_path / "cut.json").write_text('{"questions": [')
    assert "is not JSON" in refused(f"vqa:{tmp_path / 'cut.json'}")
    assert "has no list 'annotations'; it has nothing" in refused(f"captions:{write_json(tmp_path / 'e.json', {})}")


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    line = json.dumps({"question": "?", "answer": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}".encode())
    (tmp_path / "q:1.jsonl").write_bytes((tmp_path / "q.jsonl").read_bytes())
    assert load(tmp_path / "q:1.jsonl") == load(tmp_path / "q.jsonl")
    assert [i.references for i in load(tmp_path / "q.jsonl")] == [("a\u2028b",)] * 2


def test_the_digest_is_that_of_the_questions(tmp_path: Path, images: Path) -> None:
    file = pope(tmp_path / "p.json")
    first = load_suite(SuiteSpec(f"pope:{file}", images=str(images))).digest
    assert first == load_suite(SuiteSpec(f"pope:{file}", images=str(images))).digest
    assert first != load_suite(SuiteSpec(f"pope:{file}", images=str(images), instruction="Yes or no?")).digest
    assert first != load_suite(SuiteSpec(f"pope:{pope(file, label='yes')}", images=str(images))).digest
