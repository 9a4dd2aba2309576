"""Metrics against values worked out by hand from the rules of each benchmark's own code."""

from __future__ import annotations

import sys

import pytest

from edgevlm.errors import MissingDependencyError
from edgevlm.evaluation.metrics import (
    METRICS,
    is_exact,
    mean_by_kind,
    normalize_vqa,
    read_yes_no,
    score_vqa,
    tokenize_caption,
)
from edgevlm.evaluation.records import Item


def items(*references: tuple[str, ...], kind: str = "") -> list[Item]:
    return [Item(str(n), "?", (), refs, kind) for n, refs in enumerate(references)]


def scored(metric: str, asked: list[Item], *answers: str) -> tuple[list[float], dict[str, float]]:
    texts = {item.id: answer for item, answer in zip(asked, answers, strict=True)}
    scores = METRICS[metric].score(asked, texts)
    assert list(scores) == [item.id for item in asked]
    return list(scores.values()), METRICS[metric].summarize(asked, texts, scores)


# --------------------------------------------------------------------------------------------------- words


def test_exact() -> None:
    assert is_exact(" two\n", ["two"])
    assert is_exact("zwei", ["two", "zwei"])
    assert not is_exact("Two", ["two"])
    assert not is_exact("two cubes", ["two"])
    assert scored("exact", items(("a",), ("b",), ("c",)), "a", "B", " c")[1] == {"exact match": pytest.approx(200 / 3)}


@pytest.mark.parametrize(
    ("answer", "holds"),
    [("It is a Red, cube!", True), ("a redcube", False), ("cube red", False), ("", False), ("ROT: RED  CUBE", True)],
)
def test_contains_whole_words(answer: str, holds: bool) -> None:
    assert scored("contains", items(("red cube",)), answer)[0] == [float(holds)]


def test_contains_ignores_references_without_words() -> None:
    assert scored("contains", items(("…", "ÉTÉ")), "en été")[0] == [1.0]
    assert scored("contains", items(("…",)), "en été")[0] == [0.0]


def test_means_by_kind() -> None:
    asked = [Item("1", "?", (), ("a",), "x"), Item("2", "?", (), ("a",), "y"), Item("3", "?", (), ("a",), "x")]
    assert mean_by_kind(asked, {"1": 1.0, "2": 0.0, "3": 0.5}) == {"x": 75.0, "y": 0.0}
    assert mean_by_kind(items(("a",)), {"0": 1.0}) == {}


# ---------------------------------------------------------------------------------------------------- POPE


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("yes", "yes"), ("Yes, there is a dog.", "yes"), ("no", "no"), ("No", "no"), ("No, there is no dog.", "no"),
        ("There is not, as far as I see", "no"), ("Yes. There is no cat.", "yes"), ("nothing", "yes"), ("NO", "yes"),
        ("", "yes"), (" no\n", "no"), ("no,", "no"), ("I do not know", "no"),
    ],
)  # fmt: skip
def test_answers_are_read_as_pope_reads_them(answer: str, said: str) -> None:
    assert read_yes_no(answer) == said


def test_pope_by_a_confusion_table() -> None:
    """Three hits, one false alarm, two misses, four right noes."""
    labels = ["yes"] * 3 + ["no"] * 1 + ["yes"] * 2 + ["no"] * 4
    answers = ["yes"] * 4 + ["no"] * 6
    scores, metrics = scored("pope", items(*((label,) for label in labels)), *answers)
    assert scores == [1.0] * 3 + [0.0] * 3 + [1.0] * 4
    assert metrics == pytest.approx(
        {"accuracy": 70.0, "precision": 75.0, "recall": 60.0, "F1": 100 * 2 * 0.75 * 0.6 / 1.35, "yes ratio": 40.0}
    )
    assert next(iter(metrics)) == "accuracy"


def test_pope_of_one_answer_to_everything() -> None:
    half = items(("yes",), ("no",))
    _, never = scored("pope", half, "no", "no")
    assert never == {"accuracy": 50.0, "precision": 0.0, "recall": 0.0, "F1": 0.0, "yes ratio": 0.0}
    _, always = scored("pope", half, "yes", "yes")
    assert always == pytest.approx({"accuracy": 50.0, "precision": 50.0, "recall": 100.0, "F1": 200 / 3, "yes ratio": 100.0})


# ----------------------------------------------------------------------------------------------------- VQA


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Yes.", "yes"),
        ("The dog", "dog"),
        ("an apple and a pear", "apple and pear"),
        ("two", "2"), ("None", "0"), ("ten", "10"), ("eleven", "eleven"),
        ("dont", "don't"), ("don't", "don't"), ("Dont know", "don't know"), ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"), ("ows'at", "ows'at"), ("'owsat", "'owsat"), ("'ows'at", "'ow's'at"),
        ("red/blue", "red blue"),  # a mark between letters becomes a blank,
        ("red / blue", "red blue"),  # beside a blank it goes, and the blanks become one
        ("black-and-white", "black and white"),
        ("black -and-white", "black andwhite"),  # one such dash beside a blank, and all dashes go
        ("1,000", "1000"),  # a comma between digits: all marks go, not this one alone
        ("1,000 (about)", "1000 about"),
        ("3.5", "3.5"), ("p.m.", "pm"), ("no. 5", "no 5"), (".5", ".5"),
        ("a\nthe\ttwo ", "2"), ("", ""), ("The", ""), ("what's up?", "what's up"), ("Größe: 2", "größe: 2"),
    ],
)  # fmt: skip
def test_vqa_normalisation(text: str, normal: str) -> None:
    assert normalize_vqa(text) == normal


def test_vqa_accuracy_over_ten_answers() -> None:
    """Each of the ten is left out once. Of k that agree, k times min(1, (k - 1) / 3) and 10 - k times min(1, k / 3)."""
    for agree, score in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)):
        references = ["cat"] * agree + [f"animal{n}" for n in range(10 - agree)]
        assert score_vqa("Cat", references) == pytest.approx(score)


def test_vqa_compares_what_was_written_where_all_wrote_the_same() -> None:
    """As in vqaEval.py, which normalises nothing then."""
    assert score_vqa("yes", ["yes"] * 10) == 1.0
    assert score_vqa(" yes\n", ["yes "] * 10) == 1.0
    assert score_vqa("Yes", ["yes"] * 10) == 0.0
    assert score_vqa("Yes.", ["yes"] * 9 + ["no"]) == 1.0
    assert score_vqa("two", ["2"] * 9 + ["3"]) == 1.0


def test_vqa_merges_answers_that_read_the_same() -> None:
    assert score_vqa("2", ["two", "2", "Two.", "a two"] + ["3"] * 6) == 1.0
    assert score_vqa("3", ["two", "2", "Two.", "a two"] + ["3"] * 6) == 1.0


# --------------------------------------------------------------------------------------------------- CIDEr


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man, riding a wave.", "a man riding a wave"),
        ("It isn't the man's dog!", "it is n't the man 's dog"),
        ("black-and-white photo -- 3.5 m", "black-and-white photo 3.5 m"),
        ("U.S. flag (red)", "u.s. flag -lrb- red -rrb-"),
        ("He said \"hi\"; we're off...", "he said hi we 're off"),
        ("I cannot see 1,000 sheep & cows", "i can not see 1,000 sheep & cows"),
        ("’s", "s"), ("!!!", ""), ("Straße über café", "straße über café"), ("the dogs' bowl", "the dogs bowl"),
    ],
)  # fmt: skip
def test_captions_in_tokens(caption: str, tokens: str) -> None:
    assert tokenize_caption(caption) == tokens


CAPTIONS = [
    ("a man rides a horse on the beach", "a person riding a brown horse near the sea"),
    ("two cats sleep on a red couch", "a pair of cats asleep on the sofa"),
    ("a plate of pasta with tomato sauce", "some spaghetti and sauce on a white plate"),
]


def test_cider_of_right_wrong_and_no_captions() -> None:
    asked = items(*CAPTIONS)
    right, metrics = scored("cider", asked, *(first for first, _ in CAPTIONS))
    assert metrics == {"CIDEr": pytest.approx(100 * sum(right) / 3)}
    assert all(4 < score <= 10 for score in right)
    wrong, _ = scored("cider", asked, *(CAPTIONS[(n + 1) % 3][0] for n in range(3)))
    assert max(wrong) < 0.5
    assert scored("cider", asked, "", "…", "!")[0] == [0.0, 0.0, 0.0]
    near, _ = scored("cider", asked, *("A man rides a horse.", "Two cats on a couch!", "A plate of pasta"))
    assert all(wrong[n] < near[n] < right[n] for n in range(3))


def test_cider_of_a_caption_that_is_its_only_reference() -> None:
    """Its n-grams, of all four lengths, are those of the reference: 10, unless they are in all captions there are."""
    asked = items(("a red cube stands here",), ("some green ball lies there",))
    assert scored("cider", asked, "A red cube stands here.", "nothing of it")[0] == pytest.approx([10.0, 0.0])
    assert scored("cider", items(("a red cube",)), "a red cube")[0] == [0.0]


def test_cider_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)
    with pytest.raises(MissingDependencyError, match=r"edgevlm\[eval\]"):
        scored("cider", items(("a",)), "a")


def test_what_a_metric_cannot_use() -> None:
    assert METRICS["pope"].problem(["yes"]) == ""
    assert "neither yes nor no" in METRICS["pope"].problem(["maybe"])
    assert "neither yes nor no" in METRICS["pope"].problem(["yes", "no"])
    assert METRICS["vqa"].problem(["a"] * 4) == ""
    assert "3 answers" in METRICS["vqa"].problem(["a"] * 3)
    assert "no word" in METRICS["cider"].problem(["a dog", "…"])
    assert METRICS["exact"].problem(["anything"]) == ""
