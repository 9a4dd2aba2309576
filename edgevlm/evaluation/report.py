"""What an evaluation found, for people and programs: a table, JSON, and a page that opens from disk without a network.

All three show the same numbers, which `summarize` puts together once: `Outcome`s in, intervals and comparisons added by
`statistics`. The first subject is the one that all others are compared with.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import __version__
from ..errors import ImageError, InputError, OutputError
from ..images import load_image
from ..scenes import Scene, render_scene
from .plots import Point, draw_scatter
from .records import Item, Outcome, Picture, Subject
from .statistics import LEVEL, Comparison, Interval, compare_with_first, group_by_picture, mean_interval, top_score

__all__ = ["Kind", "Row", "Summary", "describe_comparison", "print_table", "summarize", "write_html", "write_json"]

#: Questions that the page shows, its pictures' longer side in pixels, how many of a question, and bytes of all together.
SHOWN = 200
SIDE = 320
PICTURES = 4
PICTURE_BYTES = 6_000_000
#: Characters of a text that the page shows.
TEXT = 2_000


@dataclass(frozen=True)
class Kind:
    """A subject's score on one kind of question, in points."""

    score: float
    interval: Interval
    questions: int


@dataclass(frozen=True)
class Row:
    """A subject and what it reached. `first_token`: milliseconds, the quartiles of answers to the first question about a
    picture; `seconds` of all its answers together."""

    number: int
    subject: Subject
    metrics: Mapping[str, float]
    interval: Interval
    kinds: Mapping[str, Kind]
    answers: int
    first_token: tuple[float, float, float]
    seconds: float
    tokens: int

    @property
    def score(self) -> float:
        return next(iter(self.metrics.values()))


@dataclass(frozen=True)
class Summary:
    """A suite put to subjects. `groups`: sets of questions that share no picture with another; `metric`: what to judge by."""

    suite: str
    metric: str
    questions: int
    groups: int
    kinds: Sequence[str]
    rows: Sequence[Row]
    comparisons: Sequence[Comparison] = field(default_factory=tuple)


def summarize(outcomes: Sequence[Outcome], items: Sequence[Item]) -> Summary:
    """Scores with intervals, and each subject compared with the first.

    Raises `InputError` for no outcomes, several suites, or subjects that were asked different questions;
    `MissingDependencyError` without scipy.
    """
    if not outcomes:
        raise InputError("There is nothing to report: no subject was evaluated.")
    if unscored := [outcome.subject.name for outcome in outcomes if not outcome.scores or not outcome.metrics]:
        raise InputError(f"There is nothing to report of {', '.join(unscored)}: no answer was scored.")
    groups = group_by_picture(items)
    comparisons = compare_with_first(outcomes, groups)
    kinds = {item.id: item.kind or "other" for item in items if item.id in outcomes[0].scores}
    named = {kind: None for outcome in outcomes for kind in outcome.by_kind}
    rows = [_row(number, outcome, kinds, named, groups) for number, outcome in enumerate(outcomes, 1)]
    asked = {groups[name] for name in outcomes[0].scores}
    metric = next(iter(outcomes[0].metrics))
    return Summary(outcomes[0].suite, metric, len(outcomes[0].scores), len(asked), list(named), rows, comparisons)


def _row(number: int, outcome: Outcome, kinds: Mapping[str, str], named: Mapping[str, None], groups: Mapping[str, int]) -> Row:
    top = top_score(outcome)
    found = {}
    for kind in named:
        scores = {name: score for name, score in outcome.scores.items() if kinds.get(name) == kind}
        if kind in outcome.by_kind and scores:
            found[kind] = Kind(outcome.by_kind[kind], mean_interval(scores, groups, top=top), len(scores))
    answers = list(outcome.answers.values())
    timed = [answer for answer in answers if math.isfinite(answer.first_token)]
    # A picture that was just seen is not looked at again: that is no time to the first token of a robot's next picture.
    waits = [answer.first_token for answer in timed if not answer.reused] or [answer.first_token for answer in timed]
    low, middle, high = (float(q) for q in np.quantile(waits, (0.25, 0.5, 0.75))) if waits else (math.nan,) * 3
    return Row(
        number, outcome.subject, outcome.metrics, mean_interval(outcome.scores, groups, top=top), found, len(answers),
        (low, middle, high), sum(answer.seconds for answer in answers), sum(answer.tokens for answer in answers),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- numbers


def _number(value: float, digits: int = 1) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else "–"


def _ends(interval: Interval) -> str:
    return f"{_number(interval.low)} to {_number(interval.high)}" if interval.known else "–"


def _size(subject: Subject) -> str:
    return _number(subject.size / 1e6, 2 if subject.size < 1e8 else 0) if subject.size else "–"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def describe_comparison(comparison: Comparison, comparisons: int = 1) -> tuple[str, str]:
    """What a comparison found, in words: the verdict, and what it rests on. `comparisons`: how many were made together."""
    c = comparison
    if c.significant:
        verdict = f"{c.second} is {'worse' if c.difference < 0 else 'better'} than {c.first}"
    else:
        verdict = f"{c.second}: no difference from {c.first} is shown"
    reach = f" (95 % from {_signed(c.interval.low)} to {_signed(c.interval.high)})" if c.interval.known else ""
    questions = _plural(c.questions, "question")
    if not c.lost + c.won:
        moved = f"Every one of {questions} has the same score"
    elif c.mcnemar is None:
        moved = f"Of {questions}, {c.lost:,} score lower and {c.won:,} higher"
    else:
        moved = f"Of {questions}, {c.lost:,} that were right are wrong, and {c.won:,} that were wrong are right"
    if not c.lost + c.won:
        return verdict, f"{_signed(c.difference)} points{reach}. {moved}."
    tests = [f"McNemar's exact test: {_p(c.mcnemar)}"] if c.mcnemar is not None else []
    if not c.test.startswith("McNemar"):
        unit = "picture" if c.groups < c.questions else "question"
        tests.append(f"flipping signs {unit} by {unit}: {_p(c.p)}")
    if comparisons > 1:
        tests.append(f"adjusted by Holm for {comparisons} comparisons: {_p(c.adjusted)}")
    return verdict, f"{_signed(c.difference)} points{reach}. {moved}. {'; '.join(tests)}."


def _note_on_comparisons(summary: Summary) -> str:
    note = "Where no difference is shown there may be one: the interval says how large."
    unsure = [c for c in summary.comparisons if not c.significant and c.interval.known]
    if any(c.interval.low > 0 or c.interval.high < 0 for c in unsure):
        note += (
            " An interval that leaves out 0 is no verdict: it stands for one comparison alone, while the test is adjusted for "
            "all of them, and exact for few differing answers."
        )
    return note


def _note_on_groups(summary: Summary) -> str:
    if summary.groups == summary.questions:
        return ""
    return (
        f"The {summary.questions:,} questions are about {_plural(summary.groups, 'separate picture')} (or sets of pictures "
        "that go together); intervals and tests take the pictures as what was drawn by chance."
    )


# --------------------------------------------------------------------------------------------------- table


def print_table(outcomes: Sequence[Outcome], items: Sequence[Item], console: Any) -> None:
    """The scores on a rich console, with intervals, by kind, and what the comparisons say. Raises as `summarize` does."""
    from rich.markup import escape
    from rich.table import Table

    summary = summarize(outcomes, items)
    title = f"{escape(summary.suite)}: {_plural(summary.questions, 'question')}"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column("")
    metrics = list(summary.rows[0].metrics)
    for column in (metrics[0], f"{100 * LEVEL:.0f} % interval", *metrics[1:], "weights MB", "first token ms", "tokens"):
        table.add_column(escape(column), justify="right")
    for row in summary.rows:
        values = [_number(row.metrics.get(name, math.nan)) for name in metrics]
        table.add_row(
            escape(row.subject.name), values[0], _ends(row.interval), *values[1:], _size(row.subject),
            _number(row.first_token[1]), _number(row.tokens / row.answers if row.answers else math.nan),
        )  # fmt: skip
    console.print(table)
    if len(summary.kinds) > 1:
        console.print("", _kind_table(summary))
    if summary.comparisons:
        console.print("", _comparison_table(summary))
        console.print(_note_on_comparisons(summary))
    if note := _note_on_groups(summary):
        console.print()
        console.print(note)


def _kind_table(summary: Summary) -> Any:
    """With a column for each subject or for each kind, whichever are fewer."""
    from rich.markup import escape
    from rich.table import Table

    title = f"{escape(summary.metric)} by kind"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    asked = {kind: next(row.kinds[kind].questions for row in summary.rows if kind in row.kinds) for kind in summary.kinds}
    cells = {
        (row.number, kind): _number(row.kinds[kind].score) if kind in row.kinds else "–"
        for row in summary.rows
        for kind in asked
    }
    table.add_column("")
    if len(summary.rows) <= len(asked):
        for column in ("questions", *(row.subject.name for row in summary.rows)):
            table.add_column(escape(column), justify="right", overflow="fold")
        for kind, questions in asked.items():
            table.add_row(escape(kind), f"{questions:,}", *(cells[row.number, kind] for row in summary.rows))
        return table
    for kind in asked:
        table.add_column(escape(kind), justify="right", overflow="fold")
    table.add_row("questions", *(f"{questions:,}" for questions in asked.values()))
    for row in summary.rows:
        table.add_row(escape(row.subject.name), *(cells[row.number, kind] for kind in asked))
    return table


def _comparison_table(summary: Summary) -> Any:
    from rich.markup import escape
    from rich.table import Table

    first, found = escape(summary.rows[0].subject.name), summary.comparisons
    mcnemar = any(c.mcnemar is not None for c in found)
    flipped = any(not c.test.startswith("McNemar") for c in found)
    adjusted = len(found) > 1
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"against {first}", title_justify="left")
    table.add_column("")
    for column in ("lost", "won", "points", f"{100 * LEVEL:.0f} % interval"):
        table.add_column(column, justify="right")
    for column, wanted in (("McNemar p", mcnemar), ("sign flips p", flipped), ("Holm p", adjusted)):
        if wanted:
            table.add_column(column, justify="right")
    table.add_column("")
    for c in found:
        ends = f"{_signed(c.interval.low)} to {_signed(c.interval.high)}" if c.interval.known else "–"
        verdict = ("[red]worse[/]" if c.difference < 0 else "[green]better[/]") if c.significant else "no difference shown"
        tests = [c.mcnemar] * mcnemar + [None if c.test.startswith("McNemar") else c.p] * flipped + [c.adjusted] * adjusted
        table.add_row(
            escape(c.second), f"{c.lost:,}", f"{c.won:,}", _signed(c.difference), ends,
            *("–" if p is None else _p(p).removeprefix("p = ").removeprefix("p ") for p in tests), verdict,
        )  # fmt: skip
    return table


# ---------------------------------------------------------------------------------------------------- JSON


def write_json(outcomes: Sequence[Outcome], items: Sequence[Item], path: Path) -> None:
    """Writes the numbers to `path`, whole or not at all. What is unknown is null. Scores, intervals, differences are in points.

        schema       1; a field that changes its meaning changes it
        edgevlm      version that wrote it
        suite        name of the suite
        metric       name of the metric to judge by, the first of each subject's `metrics`
        questions    asked of every subject; `groups`: separate sets of them by their pictures
        level        of all intervals, 0.95
        subjects     in the order given, each with
          name, source, kind ("bundle" or "torch"), recipe, size (bytes of weights, null where unknown)
          metrics      by name, in the units of the literature
          interval     {low, high, method} of the first metric
          by_kind      by kind: {score, interval, questions}
          answers      how many
          first_token_ms  {lower_quartile, median, upper_quartile}, over questions whose pictures it had not just seen
          seconds      of all answers together; `tokens` likewise
        comparisons  of each later subject with the first:
          first, second (names), first_number, second_number (places in `subjects`, from 1)
          questions, groups
          lost, won    questions on which the second scored lower, and higher
          difference   of the mean scores, second minus first, with its `interval`
          test, p      what to judge by; `adjusted`: p by Holm's method over all comparisons; `mcnemar`: p of McNemar's exact
                       test, null for graded scores
          significant  whether `adjusted` is below 1 - level

    Raises as `summarize` does, and `OutputError` where `path` cannot be written.
    """
    summary = summarize(outcomes, items)
    content = {
        "schema": 1,
        "edgevlm": __version__,
        "suite": summary.suite,
        "metric": summary.metric,
        "questions": summary.questions,
        "groups": summary.groups,
        "level": LEVEL,
        "subjects": [_subject_as_json(row) for row in summary.rows],
        "comparisons": [_comparison_as_json(c, number) for number, c in enumerate(summary.comparisons, 2)],
    }
    _write(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _interval_as_json(interval: Interval) -> dict[str, Any]:
    return {"low": _finite(interval.low), "high": _finite(interval.high), "method": interval.method}


def _subject_as_json(row: Row) -> dict[str, Any]:
    subject = row.subject
    return {
        "name": subject.name,
        "source": subject.source,
        "kind": subject.kind,
        "recipe": subject.recipe,
        "size": subject.size or None,
        "metrics": {name: _finite(value) for name, value in row.metrics.items()},
        "interval": _interval_as_json(row.interval),
        "by_kind": {
            name: {"score": _finite(kind.score), "interval": _interval_as_json(kind.interval), "questions": kind.questions}
            for name, kind in row.kinds.items()
        },
        "answers": row.answers,
        "first_token_ms": dict(zip(("lower_quartile", "median", "upper_quartile"), map(_finite, row.first_token), strict=True)),
        "seconds": _finite(row.seconds),
        "tokens": row.tokens,
    }


def _comparison_as_json(c: Comparison, number: int) -> dict[str, Any]:
    return {
        "first": c.first,
        "second": c.second,
        "first_number": 1,
        "second_number": number,
        "questions": c.questions,
        "groups": c.groups,
        "lost": c.lost,
        "won": c.won,
        "difference": c.difference,
        "interval": _interval_as_json(c.interval),
        "test": c.test,
        "p": c.p,
        "adjusted": c.adjusted,
        "mcnemar": c.mcnemar,
        "significant": c.significant,
    }


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and what is no Unicode (half of a surrogate pair, in an answer) as a question mark."""
    staged = path.with_name(f".{path.name[:64]}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.write_bytes(text.encode("utf-8", "replace"))
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as exc:
        raise OutputError(f"{path} cannot be written: {exc.strerror or exc}") from exc


# ---------------------------------------------------------------------------------------------------- page


def write_html(outcomes: Sequence[Outcome], items: Sequence[Item], path: Path) -> None:
    """Writes a page to `path` that needs nothing else: no network, no other file, and, but for its filters, no script.

    It holds the table, plots of the score against size and against time to the first token, the comparisons in words, and the
    answers that changed: questions to which a subject gave another answer than the first subject, those whose scores changed
    most in front. Of these it shows `SHOWN`, with pictures until they come to `PICTURE_BYTES`, and says how many are left out.

    Raises as `summarize` does, and `OutputError` where `path` cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    summary = summarize(outcomes, items)
    changed = _changed_items(outcomes, items)
    cards, pictures_left_out = _cards(outcomes, changed[:SHOWN])
    folder = Path(__file__).parent.parent / "assets" / "evaluation"
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "ends": _ends, "plural": _plural}
    script, style = ((folder / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    page = environment.get_template("report.html").render(
        summary=summary, level=f"{100 * LEVEL:.0f}", plots=list(_plots(summary)), size=_size, note=_note_on_groups(summary),
        note_on_comparisons=_note_on_comparisons(summary),
        comparisons=[describe_comparison(c, len(summary.comparisons)) for c in summary.comparisons],
        methods=sorted({row.interval.method for row in summary.rows} - {"none"}),
        changed=len(changed), cards=cards, left_out=len(changed) - len(cards), pictures_left_out=pictures_left_out,
        script=script, style=style, script_digest=_digest(script), version=__version__,
    )  # fmt: skip
    _write(path, page)


def _digest(text: str) -> str:
    """Of the one script that the page lets run, as its security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _plots(summary: Summary) -> Iterator[dict[str, Any]]:
    """What the page shows of each plot: its SVG, and the subjects that it lacks because their place on x is unknown."""
    sizes = {row.number: row.subject.size / 1e6 or math.nan for row in summary.rows}
    waits = {row.number: row.first_token[1] for row in summary.rows}
    for name, what, label, places, bars in (
        ("size", "size", "weights, MB", sizes, False),
        ("wait", "time to the first token", "median time to the first token, ms", waits, True),
    ):
        rows = [row for row in summary.rows if math.isfinite(places[row.number])]
        points = [
            Point(
                f"{row.number} {row.subject.name}", places[row.number], row.score, row.subject.kind,
                (row.first_token[0], row.first_token[2]) if bars else None,
                (row.interval.low, row.interval.high) if row.interval.known else None,
            )
            for row in rows
        ]  # fmt: skip
        title = f"{summary.metric} against {what} of {_plural(len(rows), 'subject')}; the table has the numbers."
        yield {
            "svg": draw_scatter(points, label, summary.metric, title=title, name=name) if points else "",
            "what": what,
            "bars": bars,
            "lacking": [f"{row.number} {row.subject.name}" for row in summary.rows if row not in rows],
        }


@dataclass(frozen=True)
class _Said:
    """An answer, and the subjects that gave it, as (number, name). `change`: of the score against the first subject's."""

    text: str
    score: float
    change: float
    subjects: Sequence[tuple[int, str]]

    @property
    def verdict(self) -> str:
        return {0.0: "wrong", 1.0: "right"}.get(self.score, f"scores {self.score:.2f}")


@dataclass(frozen=True)
class _Card:
    """A question as the page shows it. `pictures` are data URIs, `missing` says what became of others; `references` with how
    often each was given; `changes`: "lost" and "won"."""

    item: Item
    kind: str
    prompt: str
    pictures: Sequence[str]
    missing: Sequence[str]
    references: Sequence[str]
    said: Sequence[_Said]
    changes: Sequence[str]


def _changed_items(outcomes: Sequence[Outcome], items: Sequence[Item]) -> list[Item]:
    first = outcomes[0]

    def change(item: Item) -> float:
        return max(abs(other.scores[item.id] - first.scores[item.id]) for other in outcomes[1:])

    def text(outcome: Outcome, item: Item) -> str:
        return outcome.answers[item.id].text.strip()

    asked = [item for item in items if all(item.id in outcome.answers and item.id in outcome.scores for outcome in outcomes)]
    changed = [item for item in asked if any(text(other, item) != text(first, item) for other in outcomes[1:])]
    return sorted(changed, key=change, reverse=True)


def _cards(outcomes: Sequence[Outcome], items: Sequence[Item]) -> tuple[list[_Card], int]:
    """The cards, and how many pictures they go without because they came to too many bytes."""
    cards, room, left_out = [], PICTURE_BYTES, 0
    for item in items:
        pictures, missing = [], []
        for picture in item.pictures[:PICTURES]:
            try:
                data = _data_uri(picture)
            except ImageError as exc:
                missing.append(str(exc))
                continue
            if len(data) > room:
                left_out += 1
                continue
            room -= len(data)
            pictures.append(data)
        if more := len(item.pictures) - PICTURES:
            missing += [f"{_plural(more, 'more picture')}"] * (more > 0)
        said = _said(outcomes, item)
        changes = ["lost"] * any(s.change < 0 for s in said) + ["won"] * any(s.change > 0 for s in said)
        cards.append(
            _Card(item, item.kind or "other", _cut(item.prompt), pictures, missing, _counted(item.references), said, changes)
        )
    return cards, left_out


def _said(outcomes: Sequence[Outcome], item: Item) -> list[_Said]:
    """Answers in the order of the first subject that gave each."""
    found: dict[tuple[str, float], list[tuple[int, str]]] = {}
    for number, outcome in enumerate(outcomes, 1):
        key = (outcome.answers[item.id].text.strip(), outcome.scores[item.id])
        found.setdefault(key, []).append((number, outcome.subject.name))
    before = outcomes[0].scores[item.id]
    return [_Said(_cut(text), score, score - before, subjects) for (text, score), subjects in found.items()]


def _counted(references: Sequence[str]) -> list[str]:
    counts = Counter(references)
    return [_cut(text) + (f" ({count} times)" if count > 1 else "") for text, count in counts.items()]


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]} … ({_plural(len(text) - TEXT, 'more character')})"


def _data_uri(picture: Picture) -> str:
    """A JPEG of at most `SIDE` pixels a side. Raises `ImageError` where there is no picture any more."""
    image = render_scene(picture, SIDE // 2) if isinstance(picture, Scene) else load_image(picture)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
