"""The three forms of a report: the same numbers in each, and a page that is whole, inert and readable whatever is in it."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm.errors import InputError, MissingDependencyError, OutputError
from edgevlm.evaluation import plots, report
from edgevlm.evaluation.plots import Panel, Point, draw_rows, draw_scatter
from edgevlm.evaluation.records import Answer, Item, Outcome, Picture, Subject
from edgevlm.evaluation.report import describe_comparison, print_table, summarize, write_html, write_json
from edgevlm.scenes import sample_scene
from edgevlm.tables import make_console

NASTY = (
    "<script>alert('1')</script><img src=x onerror=alert(2)> & \"quoted\" 'too' {{ 7 * 7 }} </style></title> 模型 \U0001f916 é"
)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser makes of a page: elements with what they lie in, and text by element. Tags must close what is open."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        shown = (text for tag, text in self.texts if tag not in ("script", "style"))
        return " ".join(" ".join(shown).split())


def make_items(count: int, kinds: Sequence[str] = ("colour", "count"), shared: int = 1) -> list[Item]:
    return [
        Item(f"q{i}", f"Question {i}?", (sample_scene(i // shared),), (f"right {i}",), kinds[i % len(kinds)])
        for i in range(count)
    ]


def make_outcome(
    name: str,
    items: Sequence[Item],
    wrong: Mapping[str, str] = {},
    *,
    size: int = 2_000_000,
    kind: str = "bundle",
    wait: float = 10,
) -> Outcome:
    """Right answers, but for the `wrong` ones."""
    texts = {item.id: wrong.get(item.id, item.references[0]) for item in items}
    scores = {item.id: float(texts[item.id] == item.references[0]) for item in items}
    by_kind: dict[str, list[float]] = {}
    for item in items:
        by_kind.setdefault(item.kind or "other", []).append(scores[item.id])
    return Outcome(
        Subject(name, f"/models/{name}", kind, size, "int4"), "scenes",
        {item.id: Answer(item.id, texts[item.id], wait + i % 5, 0.5, 3) for i, item in enumerate(items)},
        scores, {"exact match": 100 * float(np.mean(list(scores.values())))},
        {kind: 100 * float(np.mean(values)) for kind, values in by_kind.items()},
    )  # fmt: skip


def page(outcomes: Sequence[Outcome], items: Sequence[Item], folder: Path) -> Page:
    write_html(outcomes, items, folder / "report.html")
    return Page(folder / "report.html")


def printed(outcomes: Sequence[Outcome], items: Sequence[Item], width: int = 200) -> str:
    console = make_console()
    console.file, console.width = io.StringIO(), width
    print_table(outcomes, items, console)
    return str(console.file.getvalue())


def assert_whole(found: Page) -> None:
    """Nothing is fetched, nothing but the page's own script runs, names are one, and what refers to something finds it."""
    assert not re.search(r"https?:|//[a-z]", re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", found.source))
    for tag, attributes in found.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), tag
            if name in ("src", "href", "data", "action", "poster", "srcset"):
                assert value is not None
                assert value.startswith("#" if name == "href" else "data:image/jpeg;base64,")
    assert not {"iframe", "object", "embed", "link", "base", "foreignobject"} & {tag for tag, _ in found.elements}
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in found.elements:
        for name in ("aria-labelledby", "href", "for"):
            if name in attributes:
                assert set(str(attributes[name]).lstrip("#").split()) <= set(ids)
    used = re.findall(r"url\(#([^)]+)\)", found.source)
    assert set(used) <= set(ids)
    assert all(attributes.get("alt") for attributes in found.all("img"))
    assert len(found.all("h1")) == 1
    assert found.all("html") == [{"lang": "en"}]


# ---------------------------------------------------------------------------------------------------- page


def test_the_page_holds_all_that_there_is(tmp_path: Path) -> None:
    items = make_items(60, shared=3)
    outcomes = [
        make_outcome("float", items, {"q1": "a bit off"}, kind="torch", size=8_820_000),
        make_outcome("int4", items, {f"q{i}": "wrong" for i in range(0, 40, 2)}, size=1_940_000, wait=5),
    ]
    found = page(outcomes, items, tmp_path)
    assert_whole(found)
    assert "60 questions put to 2 subjects, judged by exact match." in found.text
    assert "about 20 separate pictures" in found.text
    assert "int4 is worse than float : −31.7 points" in found.text.replace("float:", "float :")
    assert "McNemar's exact test: p < 0.001; flipping signs picture by picture" in found.text
    assert "8.82" in found.text
    assert "1.94" in found.text
    assert "On 21 questions of 60, a subject gave another answer than float" in found.text
    assert len(found.all("img")) == len(found.all("article")) == 21
    assert len(found.all("svg")) == 2
    assert {a["data-kind"] for a in found.all("li") if "data-kind" in a} == {"colour", "count"}
    assert {a["data-change"] for a in found.all("li") if "data-kind" in a} == {"lost", "won"}
    for text in ("Question 0?", "right 0", "a bit off", "✓", "✗"):
        assert text in found.source
    headers = [text.strip() for tag, text in found.texts if tag == "th" and text.strip()]
    assert headers[:5] == ["subject", "exact match", "95 % interval", "weights, MB", "first token, ms"]


def test_pictures_are_small_jpegs(tmp_path: Path) -> None:
    picture = Image.effect_noise((1600, 900), 80).convert("RGB")
    picture.save(tmp_path / "large.png")
    items = [
        Item("file", "?", (tmp_path / "large.png",), ("a",), "k"),
        Item("memory", "?", (Image.new("RGBA", (50, 700), "red"),), ("a",), "k"),
        Item("scene", "?", (sample_scene(1, "wide"),), ("a",), "k"),
    ]
    found = page([make_outcome("a", items), make_outcome("b", items, {i.id: "x" for i in items})], items, tmp_path)
    sizes = []
    for attributes in found.all("img"):
        kind, _, data = str(attributes["src"]).partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            sizes.append(image.size)
    assert sizes[:2] == [(320, 180), (23, 320)]
    assert sizes[2][1] == 160
    assert sizes[2][0] in range(161, 321)


def test_an_answer_is_text_whatever_it_says(tmp_path: Path) -> None:
    """Script, markup, attributes, template syntax: all inert, in every place that holds something from outside."""
    items = [Item(f"q{i}{NASTY}", NASTY, (sample_scene(i),), (NASTY, "other"), f"<b>{NASTY}") for i in range(3)]
    first, second = make_outcome(NASTY, items), make_outcome(f"b{NASTY}", items, {item.id: f"{NASTY}!" for item in items})
    outcomes = [Outcome(o.subject, NASTY, o.answers, o.scores, {NASTY: 100.0}, o.by_kind) for o in (first, second)]
    found = page(outcomes, items, tmp_path)
    assert_whole(found)
    assert len(found.all("script")) == 1
    assert not found.all("b")
    assert "{{ 7 * 7 }}" in found.text
    assert NASTY.split("{{", maxsplit=1)[0].split("&")[0].strip() in found.text
    scripts = [text for tag, text in found.texts if tag == "script"]
    assert "alert" not in "".join(scripts)
    assert {a.get("data-kind") for a in found.all("li")} - {None} == {f"<b>{NASTY}"}
    assert "<script>alert('1')</script>" in printed(outcomes, items, width=400)


def test_only_the_pages_own_script_may_run(tmp_path: Path) -> None:
    items = make_items(4)
    found = page([make_outcome("a", items), make_outcome("b", items, {"q0": "x"})], items, tmp_path)
    policy = next(str(a["content"]) for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    script = "".join(text for tag, text in found.texts if tag == "script")
    assert "default-src 'none'" in policy
    assert f"script-src '{report._digest(script)}'" in policy


def test_without_script_everything_is_shown(tmp_path: Path) -> None:
    items = make_items(6)
    found = page([make_outcome("a", items), make_outcome("b", items, {"q0": "x", "q1": "y"})], items, tmp_path)
    hidden = [tag for tag, attributes in found.elements if "hidden" in attributes]
    assert hidden == ["form"], "the filter alone, which the script brings out"
    options = [text for tag, text in found.texts if tag == "option"]
    assert options[:3] == ["all", "colour", "count"]
    assert [a["aria-live"] for a in found.all("output")] == ["polite"]


def test_nothing_changed(tmp_path: Path) -> None:
    items = make_items(12)
    found = page([make_outcome("a", items), make_outcome("b", items)], items, tmp_path)
    assert_whole(found)
    assert "None: every subject gave the same answer as a to every question." in found.text
    assert "b: no difference from a is shown" in found.text
    assert "Every one of 12 questions has the same score." in found.text
    assert found.all("script") == found.all("img") == []


def test_an_interval_that_contradicts_its_test_is_explained(tmp_path: Path) -> None:
    items = make_items(400, shared=8)
    outcomes = [make_outcome("float", items), make_outcome("int3", items, {f"q{i}": "wrong" for i in range(0, 200, 40)})]
    said = "An interval that leaves out 0 is no verdict"
    comparison = summarize(outcomes, items).comparisons[0]
    assert comparison.interval.high < 0
    assert not comparison.significant
    assert said in page(outcomes, items, tmp_path).text
    assert said in printed(outcomes, items, width=400)
    assert said not in printed([outcomes[0], make_outcome("int8", items)], items, width=400)


def test_one_subject(tmp_path: Path) -> None:
    items = make_items(12)
    found = page([make_outcome("alone", items)], items, tmp_path)
    assert_whole(found)
    assert "12 questions put to 1 subject, judged by exact match." in found.text
    assert "Compared" not in found.text
    assert "Answers that changed" not in found.text
    assert len(found.all("svg")) == 2


def test_twelve_subjects(tmp_path: Path) -> None:
    items = make_items(40, kinds=("one", "two", "three"))
    outcomes = [make_outcome(f"subject {i}", items, {f"q{j}": f"{i}" for j in range(i)}, size=i * 10**6) for i in range(12)]
    found = page(outcomes, items, tmp_path)
    assert_whole(found)
    assert len(found.all("article")) == 11
    labels = [text for tag, text in found.texts if tag == "text"]
    assert {f"{i + 1} subject {i}" for i in range(12)} <= set(labels)
    assert "Not shown, as its size is not known: 1 subject 0." in found.text
    assert "adjusted by Holm for 11 comparisons" in found.text
    table = printed(outcomes, items)
    assert table.count("subject 11") == 3
    assert "Holm p" in table


def test_missing_sizes_and_times(tmp_path: Path) -> None:
    items = make_items(10)
    outcomes = [make_outcome("a", items, size=0, wait=math.nan), make_outcome("b", items, {"q0": "x"}, size=0, wait=math.nan)]
    found = page(outcomes, items, tmp_path)
    assert_whole(found)
    assert found.all("svg") == []
    assert found.text.count("is not known: 1 a, 2 b.") == 2
    write_json(outcomes, items, tmp_path / "r.json")
    subject = json.loads((tmp_path / "r.json").read_text())["subjects"][0]
    assert subject["size"] is None
    assert subject["first_token_ms"] == {"lower_quartile": None, "median": None, "upper_quartile": None}


def test_no_kinds_no_pictures_empty_answers_and_long_ones(tmp_path: Path) -> None:
    items = [Item("q1", "What?", (), ("a",)), Item("q2", "Which?", (), ()), Item("q3", "Why?", (), ("c", "c", "d"))]
    first = make_outcome("a", items[:1])
    answers = {"q1": "", "q2": "w" * 5000, "q3": "x\ud800y\x00z"}
    outcomes = [
        Outcome(
            Subject(name, name, "bundle", 1), "own", {i: Answer(i, t + name, 1.0, 1.0, 1) for i, t in answers.items()},
            dict.fromkeys(answers, score), {"accuracy": 100 * score},
        )
        for name, score in (("", 0.5), ("b", 0.25))
    ]  # fmt: skip
    found = page(outcomes, items, tmp_path)
    assert_whole(found)
    assert "nothing" in found.text
    assert "3,001 more characters" in found.text
    assert "c (2 times) · d" in found.text
    assert "none given" in found.text
    assert "scores 0.25" in found.text
    assert "by kind" not in found.text
    assert first.subject.size


def test_pictures_that_are_gone_are_named(tmp_path: Path) -> None:
    items = [Item("q", "?", (tmp_path / "gone.png",), ("a",), "k")]
    found = page([make_outcome("a", items), make_outcome("b", items, {"q": "x"})], items, tmp_path)
    assert_whole(found)
    assert "gone.png" in found.text
    assert found.all("img") == []


def test_the_page_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose scores changed come before those that only read differently; the rest is counted."""
    items = make_items(30)
    wrong = {f"q{i}": "right 0 " if i < 15 else "x" for i in range(30)}
    first, second = make_outcome("a", items), make_outcome("b", items, wrong)
    second = Outcome(
        second.subject, "scenes", second.answers, second.scores | {f"q{i}": 1.0 for i in range(15)}, {"exact match": 50.0}
    )
    monkeypatch.setattr(report, "SHOWN", 18)
    monkeypatch.setattr(report, "PICTURE_BYTES", 20_000)
    found = page([first, second], items, tmp_path)
    asked = [text for tag, text in found.texts if tag == "h3"]
    assert asked == [f"Question {i}?" for i in [*range(15, 30), 1, 2, 3]]
    assert "On 29 questions of 30" in found.text
    assert "The 18 whose scores changed most are shown, 11 are left out." in found.text
    pictures = sum(len(str(a["src"])) for a in found.all("img"))
    assert 0 < pictures <= 20_000
    assert f"{18 - len(found.all('img'))} pictures would have made this page too large and are left out." in found.text


def test_questions_about_many_pictures(tmp_path: Path) -> None:
    shown: tuple[Picture, ...] = tuple(sample_scene(i) for i in range(7))
    items = [Item("q", "?", shown, ("a",), "k")]
    found = page([make_outcome("a", items), make_outcome("b", items, {"q": "x"})], items, tmp_path)
    assert len(found.all("img")) == 4
    assert "3 more pictures" in found.text


# ------------------------------------------------------------------------------------------------- numbers


def test_json_has_what_its_description_says(tmp_path: Path) -> None:
    items = make_items(40, shared=2)
    outcomes = [make_outcome("float", items, kind="torch"), make_outcome("int4", items, {"q0": "x", "q1": "y", "q7": "z"})]
    write_json(outcomes, items, tmp_path / "new" / "results.json")
    found = json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8"))
    assert {k: v for k, v in found.items() if k not in ("subjects", "comparisons", "edgevlm")} == {
        "schema": 1, "suite": "scenes", "metric": "exact match", "questions": 40, "groups": 20, "level": 0.95,
    }  # fmt: skip
    first, second = found["subjects"]
    assert first["interval"] == {
        "low": pytest.approx(100 * 0.025 ** (1 / 36.6), abs=1),
        "high": 100,
        "method": "Clopper-Pearson",
    }
    assert second["metrics"] == {"exact match": 92.5}
    assert second["by_kind"]["colour"]["score"] == 95.0
    assert second["by_kind"]["colour"]["questions"] == 20
    assert second["by_kind"]["colour"]["interval"]["low"] < 95 < second["by_kind"]["colour"]["interval"]["high"]
    assert second["first_token_ms"] == {"lower_quartile": 11, "median": 12, "upper_quartile": 13}
    assert (second["seconds"], second["tokens"], second["answers"]) == (20, 120, 40)
    comparison = found["comparisons"][0]
    assert (comparison["first"], comparison["second"], comparison["second_number"]) == ("float", "int4", 2)
    assert (comparison["lost"], comparison["won"], comparison["difference"]) == (3, 0, -7.5)
    assert (comparison["mcnemar"], comparison["p"], comparison["significant"]) == (0.25, 0.5, False)
    described = set(re.findall(r"\b\w+\b", str(write_json.__doc__)))
    named = {*found, *first, *comparison, *first["interval"], *first["by_kind"]["colour"], *first["first_token_ms"]}
    assert named <= described


def test_first_tokens_are_those_of_new_pictures() -> None:
    items = make_items(6)
    outcome = make_outcome("a", items)
    answers = {
        k: Answer(k, a.text, 100.0 if i == 0 else 5.0, 1.0, 1, i > 0) for i, (k, a) in enumerate(outcome.answers.items())
    }
    fresh = Outcome(outcome.subject, "s", answers, outcome.scores, outcome.metrics)
    assert summarize([fresh], items).rows[0].first_token[1] == 100.0


def test_the_table_says_the_same(tmp_path: Path) -> None:
    items = make_items(40)
    outcomes = [make_outcome("[red]float[/]", items), make_outcome("int4", items, {f"q{i}": "x" for i in range(12)})]
    text = printed(outcomes, items)
    assert re.search(r"\[red\]float\[/\] +100\.0 +91\.2 to 100\.0 +2\.00 +12\.0 +3\.0", text)
    assert re.search(r"int4 +12 +0 +−30\.0 +−4\d\.\d to −1\d\.\d +< 0\.001 +worse", text)
    assert re.search(r"colour +20 +100\.0 +70\.0", text)
    assert "sign flips" not in text
    assert "pictures" not in text


def test_words_for_graded_scores() -> None:
    items = make_items(30)
    first, second = make_outcome("a", items), make_outcome("b", items)
    graded = {f"q{i}": 1.0 if i > 20 else 0.3 for i in range(30)}
    second = Outcome(second.subject, "scenes", second.answers, graded, {"accuracy": 51.0})
    summary = summarize([first, second], items)
    verdict, details = describe_comparison(summary.comparisons[0])
    assert verdict == "b is worse than a"
    assert "Of 30 questions, 21 score lower and 0 higher" in details
    assert "flipping signs question by question: p < 0.001." in details
    assert "McNemar" not in details


def test_nothing_to_report() -> None:
    with pytest.raises(InputError, match="no subject was evaluated"):
        summarize([], [])
    items = make_items(2)
    with pytest.raises(InputError, match="nothing to report of a: no answer was scored"):
        summarize([Outcome(Subject("a", "a", "bundle", 1), "s", {}, {}, {})], items)
    with pytest.raises(InputError, match="a and b were asked different questions"):
        summarize([make_outcome("a", items), make_outcome("b", items[:1])], items)


@pytest.mark.parametrize("write", [write_json, write_html])
def test_a_report_that_cannot_be_written(write: Any, tmp_path: Path) -> None:
    items = make_items(2)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written: "):
        write([make_outcome("a", items)], items, tmp_path / "file" / "report")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot be written: Is a directory"):
        write([make_outcome("a", items)], items, tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


# --------------------------------------------------------------------------------------------------- plots


def test_matplotlib_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    items = make_items(2)
    with pytest.raises(MissingDependencyError, match=r"need matplotlib, which is not installed .*edgevlm\[eval\]"):
        write_html([make_outcome("a", items)], items, tmp_path / "r.html")


def test_a_plot_takes_the_pages_colours_and_keeps_its_names_to_itself() -> None:
    points = [Point("1 $x^2$ & <b>", 1.0, 50.0, "torch", (0.5, 2.0), (40.0, 60.0)), Point("2 \x00\ud800", 300.0, 70.0)]
    svg = draw_scatter(points, "MB", "accuracy", title='A "title" <x>', name="size")
    assert svg == draw_scatter(points, "MB", "accuracy", title='A "title" <x>', name="size")
    assert "1 $x^2$ &amp; &lt;b&gt;" in svg
    assert 'A "title" &lt;x&gt;' in svg
    assert "var(--torch)" in svg
    assert "currentColor" in svg
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]|http|xmlns|<style|font-family", svg)
    assert all(name.startswith("size-") for name in re.findall(r'\bid="([^"]+)"', svg))
    svg.encode("utf-8")


def test_lines_to_names_of_one_height_do_not_cross() -> None:
    points = [Point(str(i), x, 50.0) for i, x in enumerate((3.0, 1.0, 2.0, 5.0, 4.0))]
    places = [0.3, 0.4, 0.5, 0.6, 0.7]
    order = plots._uncrossed([4, 3, 2, 1, 0], points, [0.5] * 5, places)
    assert sorted(order) == [0, 1, 2, 3, 4]
    lines = [((points[i].x, 0.5), (6.0, place)) for i, place in zip(order, places, strict=True)]
    for ((x1, y1), (x2, y2)), ((u1, v1), (u2, v2)) in itertools.combinations(lines, 2):
        for x in np.linspace(max(x1, u1) + 0.01, 5.99, 50):
            here = y1 + (x - x1) / (x2 - x1) * (y2 - y1)
            there = v1 + (x - u1) / (u2 - u1) * (v2 - v1)
            assert (here - there) * (y2 - v2) > 0 or abs(here - there) < 1e-9
    assert plots._uncrossed([1, 0], [Point("a", 1, 60.0), Point("b", 2, 50.0)], [0.1, 0.9], [0.1, 0.9]) == [1, 0]


def test_rows_are_drawn_in_order_with_their_names_in_full() -> None:
    labels = [f"a group of a rather long name, number {i}" for i in range(30)]
    panels = [
        Panel("points lost", [float(i) for i in range(29)] + [math.nan], [(i - 1.0, i + 1.0) for i in range(30)], limit=1.0),
        Panel("saved", [0.0] * 30, bars=True),
    ]
    svg = draw_rows(labels, ["bundle"] * 29 + ["torch"], panels, title="<rows>", name="cost")
    assert re.findall(r">(a group[^<]*)<", svg) == labels
    heights = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>a group', svg)]
    assert heights == sorted(heights)
    assert "points lost" in svg
    assert "var(--bundle)" in svg
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]|http|xmlns|<style|font-family|nan", svg)


@pytest.mark.parametrize("count", [1, 2, 12, 30])
def test_labels_do_not_lie_on_each_other(count: int) -> None:
    points = [Point(f"{i} name", 5.0 + i % 3, 98.0 + 0.01 * (i % 4), y_range=(97.0, 99.0)) for i in range(count)]
    svg = draw_scatter(points, "MB", "accuracy", title="t", name="n")
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>\d+ name<', svg))
    assert len(heights) == count
    assert all(b - a > 9.5 for a, b in itertools.pairwise(heights))


def test_places_are_spread_within_the_axes() -> None:
    assert plots._spread([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    assert plots._spread([0.98, 0.99, 1.0], 0.1) == pytest.approx([0.8, 0.9, 1.0])
    assert plots._spread([0.0, 0.0, 0.05], 0.1) == pytest.approx([0.0, 0.1, 0.2])
    assert plots._spread([], 0.1) == []


def test_long_names_keep_their_ends() -> None:
    assert plots._shorten("3 a-model-of-some-kind-int4-awq-g128") == "3 a-model-of…int4-awq-g128"
    assert plots._shorten("2 int4") == "2 int4"
