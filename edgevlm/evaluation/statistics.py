"""What a score is worth, and whether two subjects differ: confidence intervals, paired differences, tests.

Questions about one picture are not independent: a picture that is hard to see costs all of its questions at once. So what is
drawn, resampled and flipped here is the *group*, all questions that share a picture (directly, or through a third question).
Where every question has a picture of its own, a group is a question, and the methods are the textbook's.

Intervals of 95 %, for the mean score and for the difference of two subjects on the same questions:

1. The bootstrap over groups, `scipy.stats.bootstrap`, seeded. BCa, because scores near 100 % are skewed and percentiles alone
   are then too short on the long side; percentiles over `BCA_GROUPS` groups, where the skew has gone and BCa's jackknife, which
   is quadratic, has not.
2. Scores of 0 and 1 where fewer than `FEW` groups hold the rarer one: resampling cannot show what it has hardly seen (a run
   with no mistake would get an interval of no width). A score gets Clopper and Pearson's exact interval, at the effective
   sample size of the groups (Korn and Graubard, Survey Methodology 24, 1998); a difference gets Tango's score interval
   (Statistics in Medicine 17, 1998), at that size likewise. Where nothing varies, how far the questions of a group go together
   cannot be seen: they count as independent, but for Korn and Graubard's allowance for few groups.
3. Other scores in fewer than `FEW` groups: Student's t over groups.
4. Graded scores that are all the same have no interval, unless they all lie at an end of 0 to 1, where rule 2 still holds.

Tests, two-sided:

- Scores of 0 and 1: McNemar's, exact (the binomial over the questions that one got right and the other wrong) at any count; it
  never exceeds its level, unlike the chi-squared form, and it is what rule 2 below gives for groups of one.
- Where pictures are shared, or scores are graded: differences change sign at random, a group as a whole, which is what would
  happen if the names of the two subjects meant nothing. All sign patterns of up to 13 groups, 9,999 random ones of more,
  and the normal limit over `NORMAL_GROUPS`.

Several comparisons are adjusted together by Holm's method. The module knows scores and which pictures go together, no model.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import InputError, MissingDependencyError
from ..images import image_digest
from .records import Item, Outcome, Picture

__all__ = [
    "LEVEL",
    "Comparison",
    "Interval",
    "adjust_by_holm",
    "compare_outcomes",
    "compare_with_first",
    "group_by_picture",
    "mean_interval",
    "top_score",
]

LEVEL = 0.95
SEED = 20_240_229
RESAMPLES = 9_999
#: Fewer groups than this that differ from the rest are too few to resample.
FEW = 10
#: Up to here the bootstrap is BCa.
BCA_GROUPS = 2_000
#: Over this, sums of random signs are normal.
NORMAL_GROUPS = 5_000

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A confidence interval in points (100 times a score). Both ends are NaN, and `method` is "none", where the scores say
    nothing about their spread."""

    low: float
    high: float
    method: str

    @property
    def known(self) -> bool:
        return self.method != "none"


@dataclass(frozen=True)
class Comparison:
    """`second` against `first` on the same questions, which fall into `groups` by their pictures.

    `lost` and `won` count questions on which the second scored lower and higher. `difference` of the mean scores, second minus
    first, in points, with its `interval`. `p` is what to judge by, from `test`; `adjusted` is Holm's, over all comparisons made
    together. `mcnemar` is the p value of McNemar's exact test, for scores of 0 and 1 alone.
    """

    first: str
    second: str
    questions: int
    groups: int
    lost: int
    won: int
    difference: float
    interval: Interval
    test: str
    p: float
    adjusted: float
    mcnemar: float | None

    @property
    def significant(self) -> bool:
        return self.adjusted < 1 - LEVEL


# ------------------------------------------------------------------------------------------------- groups


def group_by_picture(items: Iterable[Item]) -> dict[str, int]:
    """The group of each item by its id, numbered in order of appearance: items that share a picture, or are linked by others
    that do. An item without pictures is a group of its own.

    Files are told apart by their path, scenes by what is in them, pictures by their pixels.
    """
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    ids = []
    for item in items:
        ids.append(item.id)
        for picture in item.pictures:
            parent[root(_identity(picture))] = root(("item", item.id))
    numbers: dict[Hashable, int] = {}
    return {name: numbers.setdefault(root(("item", name)), len(numbers)) for name in ids}


def _identity(picture: Picture) -> Hashable:
    if isinstance(picture, Path):
        return ("file", str(picture))
    if isinstance(picture, Image.Image):
        return ("pixels", image_digest(picture))
    return ("scene", picture)


def _sum_groups(ids: Sequence[str], values: Vector, groups: Mapping[str, int]) -> tuple[Vector, Vector]:
    """Sum of the values and number of the questions of each group."""
    numbers = np.unique([groups[name] for name in ids], return_inverse=True)[1]
    return np.bincount(numbers, weights=values).astype(np.float64), np.bincount(numbers).astype(np.float64)


# ---------------------------------------------------------------------------------------------- intervals


def mean_interval(scores: Mapping[str, float], groups: Mapping[str, int], *, top: float = 1.0) -> Interval:
    """The interval of 100 times the mean of `scores` (by item id, from 0 to `top`), whose items fall into `groups`.

    Raises `InputError` for no scores, NaN among them, or items without a group; `MissingDependencyError` without scipy.
    """
    ids, values = _values(scores, groups)
    sums, sizes = _sum_groups(ids, values, groups)
    if top == 1.0 and _is_binary(values) and min(np.count_nonzero(sums), np.count_nonzero(sums < sizes)) < FEW:
        return _exact_interval(sums, sizes)
    interval = _resample(sums, sizes)
    return replace(interval, low=max(interval.low, 0.0), high=min(interval.high, 100 * top)) if interval.known else interval


def _values(scores: Mapping[str, float], groups: Mapping[str, int]) -> tuple[list[str], Vector]:
    ids = list(scores)
    values = np.array([scores[name] for name in ids], dtype=np.float64)
    if not ids:
        raise InputError("There are no scores to judge: no question was answered.")
    if unknown := [name for name in ids if name not in groups]:
        raise InputError(f"{len(unknown):,} scores belong to no question of the suite: {_some(unknown)}.")
    if bad := [name for name, value in zip(ids, values, strict=True) if not math.isfinite(value)]:
        raise InputError(f"{len(bad):,} scores are not finite numbers, those of {_some(bad)}.")
    return ids, values


def _is_binary(values: Vector) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _resample(sums: Vector, sizes: Vector) -> Interval:
    """Rules 1, 3 and 4: the interval of sum over size, in points, when groups are drawn anew."""
    if len(sums) < 2 or np.ptp(sums / sizes) == 0:
        return Interval(math.nan, math.nan, "none")
    if len(sums) < FEW:
        return _student_interval(sums, sizes)
    stats = _scipy_stats()
    methods = (["BCa"] if len(sums) <= BCA_GROUPS else []) + ["percentile"]
    for method in methods:
        found = stats.bootstrap(
            (sums, sizes), lambda s, n, axis: s.sum(axis) / n.sum(axis), paired=True, vectorized=True, n_resamples=RESAMPLES,
            batch=max(1, 1_000_000 // len(sums)), confidence_level=LEVEL, method=method, rng=np.random.default_rng(SEED),
        ).confidence_interval  # fmt: skip
        if math.isfinite(found.low) and math.isfinite(found.high):
            return Interval(100 * float(found.low), 100 * float(found.high), f"bootstrap, {method}")
    raise AssertionError("percentiles of finite numbers are finite")


def _student_interval(sums: Vector, sizes: Vector) -> Interval:
    reach = _scipy_stats().t.ppf((1 + LEVEL) / 2, len(sums) - 1) * math.sqrt(_variance(sums, sizes))
    mean = sums.sum() / sizes.sum()
    return Interval(100 * float(mean - reach), 100 * float(mean + reach), "Student's t")


def _variance(sums: Vector, sizes: Vector) -> float:
    """Of sum over size, when groups are drawn (linearized)."""
    residuals = sums - sizes * (sums.sum() / sizes.sum())
    return float(len(sums) / (len(sums) - 1) * np.sum(residuals**2) / sizes.sum() ** 2)


def _effective_size(sums: Vector, sizes: Vector, spread: float) -> float:
    """As many independent questions would tell as much: their number over the design effect, and less where groups are few.
    `spread` is the variance of one question's value. One group tells as much as one question."""
    count, groups = float(sizes.sum()), len(sums)
    if groups in (1, count):
        return float(groups)
    variance = _variance(sums, sizes)
    effect = variance * (count - 1) / spread if spread > 0 and variance > 0 else 1.0
    t = _scipy_stats().t
    tail = (1 + LEVEL) / 2
    few = (t.ppf(tail, count - 1) / t.ppf(tail, groups - 1)) ** 2  # a variance from few groups is uncertain
    return float(min(count, few * count / effect))


def _exact_interval(sums: Vector, sizes: Vector) -> Interval:
    """Clopper and Pearson's, at the effective size of the groups."""
    beta, tail = _scipy_stats().beta, (1 - LEVEL) / 2
    share = float(sums.sum() / sizes.sum())
    count = _effective_size(sums, sizes, share * (1 - share))
    right = share * count
    low = beta.ppf(tail, right, count - right + 1) if share > 0 else 0.0
    high = beta.ppf(1 - tail, right + 1, count - right) if share < 1 else 1.0
    return Interval(100 * float(low), 100 * float(high), "Clopper-Pearson")


def _tango_interval(lost: float, won: float, count: float) -> Interval:
    """Of (won - lost) / count, by inverting the score test: `lost` and `won` of `count` pairs differ (Tango 1998)."""
    from scipy.optimize import brentq

    z = float(_scipy_stats().norm.ppf((1 + LEVEL) / 2))
    difference = (won - lost) / count

    def score(d: float) -> float:
        # The share of lost pairs that is likeliest under a difference d solves a share^2 + b share + c = 0.
        a, b, c = 2 * count, -won - lost + (2 * count - won + lost) * d, -lost * d * (1 - d)
        share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        return (won - lost - count * d) / math.sqrt(max(count * (2 * share + d * (1 - d)), 1e-300))

    edge = 1 - 1e-12
    low = brentq(lambda d: score(d) - z, -edge, difference) if score(-edge) > z else -1.0
    high = brentq(lambda d: score(d) + z, difference, edge) if score(edge) < -z else 1.0
    return Interval(100 * float(low), 100 * float(high), "Tango")


# --------------------------------------------------------------------------------------------- comparisons


def top_score(outcome: Outcome) -> float:
    """The best that an item can score: by CIDEr 10, by all other metrics 1."""
    return 10.0 if "cider" in next(iter(outcome.metrics), "").lower() else 1.0


def compare_with_first(outcomes: Sequence[Outcome], groups: Mapping[str, int]) -> list[Comparison]:
    """Every subject after the first against it, with p values adjusted by Holm's method. Raises as `compare_outcomes` does."""
    found = [compare_outcomes(outcomes[0], other, groups) for other in outcomes[1:]]
    adjusted = adjust_by_holm([comparison.p for comparison in found])
    return [replace(comparison, adjusted=p) for comparison, p in zip(found, adjusted, strict=True)]


def compare_outcomes(first: Outcome, second: Outcome, groups: Mapping[str, int]) -> Comparison:
    """Two subjects on the same questions.

    Raises `InputError` where they were not asked the same ones, or for scores as in `mean_interval`.
    """
    _check_same_questions(first, second)
    ids, before = _values(first.scores, groups)
    _, after = _values({name: second.scores[name] for name in ids}, groups)
    differences = after - before
    sums, _ = _sum_groups(ids, differences, groups)
    lost, won = int(np.sum(differences < 0)), int(np.sum(differences > 0))
    binary = top_score(first) == 1.0 and _is_binary(before) and _is_binary(after)
    mcnemar = _mcnemar(lost, won) if binary else None
    if mcnemar is not None and len(sums) == len(ids):
        test, p = "McNemar, exact", mcnemar
    else:
        test, p = _flip_signs(sums)
    return Comparison(
        first.subject.name, second.subject.name, len(ids), len(sums), lost, won, 100 * float(differences.mean()),
        _difference_interval(ids, differences, groups, binary), test, p, p, mcnemar,
    )  # fmt: skip


def _check_same_questions(first: Outcome, second: Outcome) -> None:
    names = f"{first.subject.name} and {second.subject.name}"
    remedy = "Only answers to the same questions can be compared: evaluate both with the same suite and number of questions."
    if first.suite != second.suite:
        raise InputError(f"{names} were asked different suites, {first.suite} and {second.suite}. {remedy}")
    missing = [name for name in first.scores if name not in second.scores]
    more = [name for name in second.scores if name not in first.scores]
    if missing or more:
        raise InputError(
            f"{names} were asked different questions: {len(missing):,} were put to {first.subject.name} alone"
            f"{_listed(missing)}, {len(more):,} to {second.subject.name} alone{_listed(more)}. {remedy}"
        )


def _difference_interval(ids: Sequence[str], differences: Vector, groups: Mapping[str, int], binary: bool) -> Interval:
    sums, sizes = _sum_groups(ids, differences, groups)
    if binary and np.count_nonzero(_sum_groups(ids, np.abs(differences), groups)[0]) < FEW:
        count = float(sizes.sum())
        share = _effective_size(sums, sizes, float(differences.var())) / count
        return _tango_interval(share * np.sum(differences < 0), share * np.sum(differences > 0), share * count)
    return _resample(sums, sizes)


def _mcnemar(lost: int, won: int) -> float:
    return float(_scipy_stats().binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0


def _flip_signs(sums: Vector) -> tuple[str, float]:
    """Name and p value of the test in which the groups' differences change sign at random."""
    stats, moved = _scipy_stats(), sums[np.abs(sums) > 1e-12]
    if len(moved) < 2:  # of none and one, every sign pattern is as extreme
        return "sign flips", 1.0
    if len(moved) > NORMAL_GROUPS:
        z = moved.sum() / math.sqrt(float(np.sum(moved**2)))
        return "sign flips, normal limit", float(2 * stats.norm.sf(abs(z)))
    found = stats.permutation_test(
        (moved,), lambda x, axis: x.sum(axis), permutation_type="samples", vectorized=True, n_resamples=RESAMPLES,
        batch=max(1, 1_000_000 // len(moved)), rng=np.random.default_rng(SEED),
    )  # fmt: skip
    return "sign flips", float(found.pvalue)


def adjust_by_holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the k-th smallest of m p values times m - k + 1, never below a smaller one's, at most 1."""
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _listed(names: Sequence[str]) -> str:
    return f" ({_some(names)})" if names else ""


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as exc:
        raise MissingDependencyError(
            f"Intervals and tests need scipy, which is not installed ({exc}). `pip install 'edgevlm[eval]'` brings it."
        ) from exc
    return stats
