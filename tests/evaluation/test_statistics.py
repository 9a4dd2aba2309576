"""Intervals and tests against published examples, other packages' values, and simulation."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevlm.errors import InputError, MissingDependencyError
from edgevlm.evaluation import statistics
from edgevlm.evaluation.records import Item, Outcome, Picture, Subject
from edgevlm.evaluation.statistics import (
    Comparison,
    Interval,
    adjust_by_holm,
    compare_outcomes,
    compare_with_first,
    group_by_picture,
    mean_interval,
    top_score,
)
from edgevlm.scenes import sample_scene


def named(values: Sequence[float]) -> dict[str, float]:
    return {f"q{i}": float(value) for i, value in enumerate(values)}


def alone(scores: Mapping[str, float], each: int = 1) -> dict[str, int]:
    """Groups of `each` questions."""
    return {name: number // each for number, name in enumerate(scores)}


def outcome(name: str, scores: Mapping[str, float], suite: str = "s") -> Outcome:
    return Outcome(Subject(name, name, "bundle", 1), suite, {}, scores, {"accuracy": 0.0})


def pair(both: int, lost: int, won: int, neither: int) -> tuple[Outcome, Outcome]:
    """Two subjects by the four cells of their table."""
    first = named([1] * (both + lost) + [0] * (won + neither))
    second = named([1] * both + [0] * lost + [1] * won + [0] * neither)
    return outcome("first", first), outcome("second", second)


def compare(both: int, lost: int, won: int, neither: int) -> Comparison:
    first, second = pair(both, lost, won, neither)
    return compare_outcomes(first, second, alone(first.scores))


# ---------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [
        (5, 20, 0.08657146910143461, 0.49104587170795755),  # statsmodels 0.14, proportion_confint(…, method="beta")
        (0, 20, 0.0, 0.16843347098308534),
        (998, 1000, 0.9927941610885425, 0.9997576988831227),
        (1, 1, 0.025, 1.0),
        (1000, 1000, 0.025 ** (1 / 1000), 1.0),
    ],
)
def test_few_mistakes_or_few_hits_get_the_exact_interval(right: int, asked: int, low: float, high: float) -> None:
    scores = named([1] * right + [0] * (asked - right))
    found = mean_interval(scores, alone(scores))
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high))
    assert found.method == "Clopper-Pearson"


def test_many_questions_are_resampled() -> None:
    scores = named([1] * 850 + [0] * 150)
    found = mean_interval(scores, alone(scores))
    assert found.method == "bootstrap, BCa"
    reach = 196 * math.sqrt(0.85 * 0.15 / 1000)
    assert (found.low, found.high) == pytest.approx((85 - reach, 85 + reach), abs=0.25)
    assert found == mean_interval(scores, alone(scores)), "the same scores give the same interval"
    many = named(np.tile([1, 1, 1, 0], 501))
    assert mean_interval(many, alone(many)).method == "bootstrap, percentile"


def test_graded_scores_are_skewed_and_so_is_their_interval() -> None:
    scores = named([0.0] * 30 + [0.3, 0.6, 0.9, 1.0] * 3)
    found = mean_interval(scores, alone(scores))
    mean = 100 * np.mean(list(scores.values()))
    assert found.method == "bootstrap, BCa"
    assert 0 < mean - found.low < found.high - mean


@pytest.mark.parametrize("value", [0.3, 0.5, 2.5])
def test_equal_grades_say_nothing_about_their_spread(value: float) -> None:
    scores = named([value] * 50)
    found = mean_interval(scores, alone(scores), top=10.0)
    assert found.method == "none"
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert not found.known


def test_cider_of_nothing_right_is_no_share_of_right_answers() -> None:
    scores = named([0.0] * 50)
    assert mean_interval(scores, alone(scores), top=10.0).method == "none"
    assert mean_interval(scores, alone(scores)).method == "Clopper-Pearson"


def test_cider_is_not_taken_for_right_and_wrong() -> None:
    """Where all captions score nothing, the scores look like those of wrong answers."""
    nothing = [
        Outcome(Subject(name, name, "bundle", 1), "s", {}, named([0.0] * 50), {"CIDEr": 0.0}) for name in ("first", "second")
    ]
    found = compare_outcomes(*nothing, alone(nothing[0].scores))
    assert (found.mcnemar, found.interval.method, found.difference, found.p) == (None, "none", 0.0, 1.0)
    assert top_score(nothing[0]) == 10.0
    assert top_score(outcome("a", {})) == 1.0


def test_an_interval_of_few_graded_questions_is_students_and_stays_on_the_scale() -> None:
    scores = named([0.9, 1.0, 1.0, 0.3])
    found = mean_interval(scores, alone(scores))
    assert found.method == "Student's t"
    assert found.high == 100
    assert 0 < found.low < 50
    assert mean_interval(named([0.5]), {"q0": 0}).method == "none"


def test_questions_about_one_picture_count_as_much_as_they_tell() -> None:
    """Asking everything five times over tells nothing new."""
    once = named([1] * 60 + [0] * 15)
    five_times = {f"{name}-{i}": score for name, score in once.items() for i in range(5)}
    groups = {name: int(name[1:].split("-")[0]) for name in five_times}
    assert mean_interval(five_times, groups) == mean_interval(once, alone(once))
    independent = mean_interval(five_times, alone(five_times))
    grouped = mean_interval(five_times, groups)
    assert grouped.high - grouped.low > 1.9 * (independent.high - independent.low)


def test_exact_intervals_know_pictures_too() -> None:
    """Three pictures with all five answers wrong tell less than 15 wrong answers to 15 pictures."""
    together = named([0] * 15 + [1] * 485)
    groups = alone(together, 5)
    exact = mean_interval(together, groups)
    assert exact.method == "Clopper-Pearson"
    single = named([0] * 3 + [1] * 97)
    again = mean_interval(single, alone(single))
    assert (exact.low, exact.high) == pytest.approx((again.low, again.high), abs=0.4)


def test_one_picture_tells_as_much_as_one_question() -> None:
    scores = named([1] * 40)
    assert mean_interval(scores, dict.fromkeys(scores, 0)) == mean_interval(named([1]), {"q0": 0})
    mixed = named([1, 0] * 20)
    found = mean_interval(mixed, dict.fromkeys(mixed, 0))
    assert found.high - found.low > 70


def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty pictures with five questions each, where pictures differ in how hard they are."""
    monkeypatch.setattr(statistics, "RESAMPLES", 600)
    rng = np.random.default_rng(7)
    hits, naive, trials = 0, 0, 150
    for _ in range(trials):
        scores = named((rng.random((40, 5)) < rng.beta(1.6, 0.4, (40, 1))).ravel())
        by_picture, by_question = mean_interval(scores, alone(scores, 5)), mean_interval(scores, alone(scores))
        hits += by_picture.low <= 80 <= by_picture.high
        naive += by_question.low <= 80 <= by_question.high
    assert hits / trials > 0.9
    assert naive / trials < 0.85


@pytest.mark.parametrize("share", [0.5, 0.97, 0.998])
def test_intervals_of_independent_questions_hold_the_truth(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 600)
    rng = np.random.default_rng(11)
    found = [mean_interval(s, alone(s)) for s in (named(rng.random(120) < share) for _ in range(120))]
    assert np.mean([interval.low <= 100 * share <= interval.high for interval in found]) > 0.91


def test_scores_that_cannot_be_judged() -> None:
    with pytest.raises(InputError, match=r"no scores to judge: no question was answered"):
        mean_interval({}, {})
    with pytest.raises(InputError, match=r"1 scores are not finite numbers, those of q1\."):
        mean_interval(named([1.0, math.nan]), {"q0": 0, "q1": 1})
    with pytest.raises(InputError, match=r"2 scores belong to no question of the suite: q0, q1\."):
        mean_interval(named([1.0, 1.0]), {})


def test_scipy_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingDependencyError, match=r"need scipy, which is not installed .*edgevlm\[eval\]"):
        mean_interval(named([1.0, 0.0]), {"q0": 0, "q1": 1})


# --------------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize(
    ("cells", "p"),
    [
        ((794, 150, 86, 570), 3.7159361395713866e-05),  # Agresti, Categorical Data Analysis: approval ratings; by statsmodels
        ((1, 7, 1, 12), 0.0703125),  # airway reactivity before and after a transplant (Fagerland et al., 2013)
        ((10, 9, 0, 81), 0.00390625),
        ((50, 0, 0, 50), 1.0),
    ],
)
def test_mcnemars_exact_test(cells: tuple[int, int, int, int], p: float) -> None:
    found = compare(*cells)
    assert found.p == found.mcnemar == pytest.approx(p)
    assert (found.lost, found.won, found.questions) == (cells[1], cells[2], sum(cells))
    assert found.test == "McNemar, exact"
    assert found.significant == (p < 0.05)


def test_the_difference_of_few_discordant_pairs_is_tangos() -> None:
    found = compare(1, 7, 1, 12)
    assert found.difference == pytest.approx(-600 / 21)
    assert (found.interval.low, found.interval.high) == pytest.approx((-51.7, -2.6), abs=0.05)  # Fagerland et al., 2014
    assert found.interval.method == "Tango"
    other = compare(1, 1, 7, 12)
    assert (other.interval.low, other.interval.high) == pytest.approx((-found.interval.high, -found.interval.low))


def test_equal_answers_leave_room_for_a_difference() -> None:
    """With no discordant pair among n, Tango's interval ends at z² / (n + z²)."""
    found = compare(985, 0, 0, 15)
    z2 = 1.959964**2
    assert (found.interval.low, found.interval.high) == pytest.approx(
        (-100 * z2 / (1000 + z2), 100 * z2 / (1000 + z2)), rel=1e-5
    )
    assert (found.p, found.difference, found.significant) == (1.0, 0.0, False)


@pytest.mark.parametrize(("lost", "won"), [(3, 0), (0, 3), (1, 0)])
def test_where_every_answer_changed_the_interval_stays_within_100_points(lost: int, won: int) -> None:
    found = compare(0, lost, won, 0)
    assert -100 <= found.interval.low <= found.difference <= found.interval.high <= 100
    assert not found.significant


def test_many_discordant_pairs_are_resampled_pair_by_pair() -> None:
    found = compare(794, 150, 86, 570)
    assert found.interval.method == "bootstrap, BCa"
    # Wald's interval of the paired difference, Agresti: -0.04 with a standard error of 0.0095
    assert (found.interval.low, found.interval.high) == pytest.approx((-5.87, -2.13), abs=0.25)


def test_flipping_signs_of_single_questions_is_mcnemars_test() -> None:
    for lost, won in ((0, 5), (3, 9), (6, 6), (1, 2)):
        _, p = statistics._flip_signs(np.array([-1.0] * lost + [1.0] * won))
        assert p == pytest.approx(compare(5, lost, won, 5).p)


def test_graded_scores_are_compared_by_flipping_signs() -> None:
    """Darwin's plants, Fisher's randomization test (The Design of Experiments, section 21): 1,726 of 32,768 as extreme."""
    heights = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    crossed, selfed = named([0.5 + h / 200 for h in heights]), named([0.5] * 15)
    found = compare_outcomes(outcome("selfed", selfed), outcome("crossed", crossed), alone(selfed))
    assert found.p == pytest.approx(1726 / 32768, abs=0.008)
    assert (found.test, found.mcnemar, found.lost, found.won) == ("sign flips", None, 2, 13)
    assert found.difference == pytest.approx(np.mean(heights) / 2)
    assert found.interval.low < found.difference < found.interval.high
    seven = named(list(crossed.values())[:7])
    few = compare_outcomes(outcome("a", named([0.5] * 7)), outcome("b", seven), alone(seven))
    assert few.p * 2**7 == pytest.approx(round(few.p * 2**7)), "all sign patterns of so few are looked at"


def test_shared_pictures_weaken_a_difference() -> None:
    """One picture that costs eight questions is one piece of bad luck."""
    first, second = pair(72, 8, 0, 0)
    shared = {name: min(number, 72) for number, name in enumerate(first.scores)}
    found = compare_outcomes(first, second, shared)
    independent = compare_outcomes(first, second, alone(first.scores))
    assert independent.significant
    assert found.mcnemar == independent.mcnemar == independent.p < 0.01
    assert (found.test, found.p, found.significant) == ("sign flips", 1.0, False)
    assert found.groups == 73
    assert found.interval.low < independent.interval.low


def test_very_many_groups_have_a_normal_limit() -> None:
    rng = np.random.default_rng(3)
    moved = rng.choice([-1.0, 1.0], 6000, p=[0.53, 0.47])
    name, p = statistics._flip_signs(moved)
    assert name == "sign flips, normal limit"
    assert p == pytest.approx(statistics._mcnemar(int(np.sum(moved < 0)), int(np.sum(moved > 0))), rel=0.1)


def test_holms_adjustment() -> None:
    assert adjust_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # statsmodels, multipletests
    assert adjust_by_holm([0.5, 0.9]) == [1.0, 1.0]
    assert adjust_by_holm([0.2]) == [0.2]
    assert adjust_by_holm([]) == []


def test_all_are_compared_with_the_first_together() -> None:
    base = [1] * 90 + [0] * 10
    scores = [named(base), named([0] * 9 + base[9:]), named([0] * 6 + base[6:]), named(base)]
    found = compare_with_first([outcome(str(i), s) for i, s in enumerate(scores)], alone(scores[0]))
    assert [(c.first, c.second) for c in found] == [("0", "1"), ("0", "2"), ("0", "3")]
    assert [c.p for c in found] == pytest.approx([2 / 2**9, 2 / 2**6, 1.0])
    assert [c.adjusted for c in found] == pytest.approx([6 / 2**9, 4 / 2**6, 1.0])
    assert [c.significant for c in found] == [True, False, False]
    assert compare_with_first([outcome("0", scores[0])], alone(scores[0])) == []


def test_other_questions_are_not_compared() -> None:
    first, second = outcome("float", named([1] * 6)), outcome("int4", {"q0": 1.0, "q9": 0.0})
    with pytest.raises(
        InputError,
        match=r"float and int4 were asked different questions: 5 were put to float alone \(q1, q2, q3, …\), 1 to int4 alone "
        r"\(q9\)\. Only answers to the same questions can be compared",
    ):
        compare_outcomes(first, second, {f"q{i}": i for i in range(10)})
    with pytest.raises(InputError, match=r"float and int4 were asked different suites, scenes and pope\."):
        compare_outcomes(outcome("float", {"a": 1.0}, "scenes"), outcome("int4", {"a": 1.0}, "pope"), {"a": 0})


# ------------------------------------------------------------------------------------------------- groups


def item(name: str, *pictures: Picture) -> Item:
    return Item(name, "?", pictures, ("yes",))


def test_questions_that_share_a_picture_go_together() -> None:
    scene, same, wide = sample_scene(3), sample_scene(3), sample_scene(3, "wide")
    red, also_red, blue = (Image.new("RGB", (9, 9), colour) for colour in ("red", "red", "blue"))
    groups = group_by_picture(
        [
            item("file", Path("a/1.png")), item("other file", Path("b/1.png")), item("same file", Path("a/1.png")),
            item("scene", scene), item("same scene", same), item("wide scene", wide),
            item("red", red), item("also red", also_red), item("blue", blue),
            item("none"), item("none either"),
        ]
    )  # fmt: skip
    assert groups == {
        "file": 0, "other file": 1, "same file": 0, "scene": 2, "same scene": 2, "wide scene": 3,
        "red": 4, "also red": 4, "blue": 5, "none": 6, "none either": 7,
    }  # fmt: skip


def test_pictures_are_linked_through_other_questions() -> None:
    a, b, c, d = (Path(f"{name}.png") for name in "abcd")
    groups = group_by_picture([item("1", a), item("2", b), item("3", d), item("4", b, a), item("5", c, d), item("6", c)])
    assert groups["1"] == groups["2"] == groups["4"]
    assert groups["3"] == groups["5"] == groups["6"] != groups["1"]
    assert group_by_picture([]) == {}


def test_an_unknown_interval_says_so() -> None:
    assert not Interval(math.nan, math.nan, "none").known
    assert Interval(1.0, 2.0, "Tango").known
