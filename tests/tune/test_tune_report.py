"""What a tuning found, as text and as a page: whole, inert, and the same numbers in both."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from edgevlm.errors import OutputError
from edgevlm.quant.recipe import Recipe, Rule
from edgevlm.tables import make_console
from edgevlm.tune.choice import Move
from edgevlm.tune.report import describe_tuned, print_tuned, write_tuned
from edgevlm.tune.run import Step, Tuned

NASTY = "<script>alert('1')</script> & \"quoted\" [bold]é模型[/]"
RECIPE = Recipe("tuned", (Rule("int4", "decoder"),))


def step(name: str, drop: float, size: int, group: str = "", error: str = "") -> Step:
    if error:
        return Step(name, RECIPE.to_dict(), group, "int4", error=error)
    return Step(
        name, RECIPE.to_dict(), group, "int4" if group else "", 90 - drop, drop, (drop - 1.5, drop + 2.25), 1_234, 5, 0.01,
        size, 12.5, 100.0, 162.5, 200.0, 3.0,
    )  # fmt: skip


def tuned(**changes: object) -> Tuned:
    steps = [
        step("decoder as int4", 0.5, 6_000_000, "decoder"),
        step("vision_encoder as int4", -0.04, 9_000_000, "vision_encoder"),
        step(f"projector as {NASTY}", 0, 0, "projector", error=f"too small: {NASTY}"),
    ]
    both = step("the best 2 together", 0.75, 5_000_000)
    moves = [Move("vision_encoder", "int4", 1e6, 0.0), Move("decoder", "int4", 4e6, 0.5)]
    made = Tuned(NASTY, "scenes", "exact match", 1_000, "size", 1.0, 90.0, 10_000_000, steps, moves, [both], both, RECIPE)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_in_words() -> None:
    said = describe_tuned(tuned())
    assert "Weights of 5.00 MB, 50 % of float's; an answer of 16 tokens in 162.5 ms, 81 % of float's." in said
    assert "exact match 89.2 on 1,000 questions of scenes, a drop of 0.8 (95 % from −0.8 to +3.0); 1 was allowed." in said
    assert "do not rule out a drop above the limit" in said
    assert "rule out" not in describe_tuned(tuned(max_drop=3.0))
    unknown = dataclasses.replace(step("x", 0.0, 1), interval=(math.nan, math.nan))
    assert "a drop of 0.0; 1 was allowed" in describe_tuned(tuned(chosen=unknown))
    assert describe_tuned(tuned(chosen=None)).startswith("Nothing can be changed within 1 points of float")


def test_the_table_shows_every_step_and_why_one_is_missing() -> None:
    console = make_console()
    console.file, console.width = io.StringIO(), 400
    print_tuned(tuned(), console)
    said = console.file.getvalue()
    for row in ("decoder as int4", "vision_encoder as int4", "the best 2 together"):
        assert row in said
    assert f"projector as {NASTY}" in said
    assert f"Not possible: projector as {NASTY}. too small: {NASTY}" in said
    assert "1,234" in said
    assert not re.search(r"[-−+]0\.0\b", said), "neither plus nor minus nothing"


@pytest.mark.parametrize("target", ["size", "latency"])
def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path: Path, target: str) -> None:
    _, _, path = write_tuned(tuned(target=target), tmp_path)
    page = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|//[a-z]|<(script|link|img|iframe)|url\((?!#)", page)
    assert page.count("<svg") == 1
    assert page.count("<tr") == 1 + 4
    assert page.count("class='chosen'") == 1
    assert "Not possible: projector as &lt;script&gt;" in page
    assert ("saved in an answer of 16 tokens, ms" if target == "latency" else "saved, MB") in page
    for label in ("decoder as int4", "vision_encoder as int4", "the best 2 together"):
        assert page.count(f">{label}<") == 2, "in the plot and in the table, in full"


def test_the_page_of_nothing(tmp_path: Path) -> None:
    none = tuned(steps=[], combined=[], moves=[], chosen=None, recipe=Recipe("tuned", (Rule("float"),)))
    recipe, data, page = write_tuned(none, tmp_path)
    assert "everything stays float" in page.read_text(encoding="utf-8")
    assert "<svg" not in page.read_text(encoding="utf-8")
    assert json.loads(data.read_text(encoding="utf-8"))["chosen"] is None
    assert "everything stays float" in recipe.read_text(encoding="utf-8")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"recipe\.toml cannot be written: No such file"):
        write_tuned(tuned(), tmp_path / "nowhere")
