"""What a tuning found: a recipe file, a table, JSON, and a page that opens from disk without a network."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..evaluation.plots import Point, draw_scatter
from ..quant.recipe import Recipe
from .run import ANSWER, Step, Tuned

__all__ = ["print_tuned", "recipe_to_toml", "write_tuned"]


def recipe_to_toml(recipe: Recipe, comment: str = "") -> str:
    """A recipe as a file that `load_recipe` reads."""
    described = recipe.to_dict()
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += [f"{key} = {_toml(value)}" for key, value in described.items() if key != "rules"]
    for rule in described["rules"]:
        lines += ["", "[[rules]]", *(f"{key} = {_toml(value)}" for key, value in rule.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    # JSON's strings, numbers, true and false are TOML's, too, but for DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def write_tuned(tuned: Tuned, folder: Path) -> tuple[Path, Path, Path]:
    """Writes `recipe.toml`, `tune.json` and `tune.html`. Raises OutputError, MissingDependencyError without matplotlib."""
    paths = folder / "recipe.toml", folder / "tune.json", folder / "tune.html"
    texts = recipe_to_toml(tuned.recipe, describe_tuned(tuned)), json.dumps(_as_json(tuned), indent=2) + "\n", _page(tuned)
    for path, text in zip(paths, texts, strict=True):
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as exc:
            raise OutputError(f"{path} cannot be written: {exc.strerror}.") from exc
    return paths


def describe_tuned(tuned: Tuned) -> str:
    """The result in some lines."""
    asked = f"{tuned.questions:,} questions of {tuned.suite}"
    if tuned.chosen is None:
        return f"Nothing can be changed within {tuned.max_drop:g} points of float on {asked}: everything stays float."
    chosen, (low, high) = tuned.chosen, tuned.chosen.interval
    spread = f" (95 %: {low:.1f} to {high:.1f})" if math.isfinite(low + high) else ""
    return (
        f"{tuned.metric} {chosen.score:.1f} on {asked}, {chosen.drop:.1f} points{spread} below float; allowed were "
        f"{tuned.max_drop:g}.\nWeights take {chosen.size / 1e6:,.2f} MB, {_share(chosen.size, tuned.size)} of float; an answer "
        f"of {ANSWER} tokens {chosen.latency:,.1f} ms, {_share(chosen.latency, chosen.float_latency)} of float."
    )


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def _as_json(tuned: Tuned) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    told = {f.name: getattr(tuned, f.name) for f in dataclasses.fields(tuned) if f.name not in ("groups", "recipe")}
    told["steps"], told["combined"] = ([dataclasses.asdict(one) for one in many] for many in (tuned.steps, tuned.combined))
    told["moves"] = [dataclasses.asdict(move) for move in tuned.moves]
    told["chosen"] = dataclasses.asdict(tuned.chosen) if tuned.chosen else None
    groups = {group.name: {"bytes": group.size, "weights": [w.name for w in group.weights]} for group in tuned.groups}
    return dict(plain({**told, "recipe": tuned.recipe.to_dict(), "groups": groups}))


# --------------------------------------------------------------------------------------------------- tables

_COLUMNS = ("step", "score", "drop", "95 %", "worse", "better", "MB", "first token ms", "tokens/s", "answer ms")


def _rows(tuned: Tuned) -> list[tuple[str, ...]]:
    """Cells of every step, the combinations last."""
    return [_cells(step) for step in (*tuned.steps, *tuned.combined)]


def _cells(step: Step) -> tuple[str, ...]:
    if step.error:
        return (step.name, *[""] * (len(_COLUMNS) - 2), "not possible")
    low, high = step.interval
    return (
        step.name, f"{step.score:.1f}", f"{step.drop:+.1f}", f"{low:+.1f} … {high:+.1f}" if math.isfinite(low + high) else "–",
        str(step.lost), str(step.won), f"{step.size / 1e6:,.2f}", f"{step.first_token:,.1f}", f"{step.tokens_per_second:,.0f}",
        f"{step.latency:,.1f} of {step.float_latency:,.1f}",
    )  # fmt: skip


def print_tuned(tuned: Tuned, console: Any) -> None:
    """Every step, and the result."""
    from rich.markup import escape
    from rich.table import Table

    title = f"{tuned.suite}, {tuned.questions:,} questions; float: {tuned.metric} {tuned.score:.1f}, {tuned.size / 1e6:,.2f} MB"
    table = Table(box=None, pad_edge=False, header_style="bold", title=escape(title), title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "step" else "right")
    chosen = (*tuned.steps, *tuned.combined).index(tuned.chosen) if tuned.chosen else -1
    for number, cells in enumerate(_rows(tuned)):
        table.add_row(*map(escape, cells), style="bold" if number == chosen else None)
    console.print(table, "", escape(describe_tuned(tuned)))


_STYLE = """
:root { color-scheme: light dark; --quiet: #777; --bundle: #1f6fb2; --torch: #c2571a }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .15em .7em; text-align: right }
td:first-child, th:first-child { text-align: left }
tr:nth-child(even) td { background: #8881 } tr.chosen td { font-weight: bold }
pre { background: #8881; padding: 1em; overflow: auto }
svg { max-width: 100%; height: auto }
"""


def _page(tuned: Tuned) -> str:
    rows = []
    for step, cells in zip((*tuned.steps, *tuned.combined), _rows(tuned), strict=True):
        mark = ' class="chosen"' if step is tuned.chosen else ""
        told = f' title="{html.escape(step.error)}"' if step.error else ""
        rows.append(f"<tr{mark}{told}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    moves = "".join(
        f"<li>{html.escape(move.group)} as {html.escape(move.candidate)}: saves {_amount(move.saved, tuned.target)} for "
        f"{move.cost:.2f} points</li>"
        for move in tuned.moves
    )
    summary = html.escape(describe_tuned(tuned)).replace("\n", "<br>")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Tuning of {html.escape(tuned.source)}</title><style>{_STYLE}</style></head><body>
<h1>Tuning of {html.escape(tuned.source)}</h1>
<p>{html.escape(tuned.suite)}, {tuned.questions:,} questions. Float: {html.escape(tuned.metric)} {tuned.score:.1f},
{tuned.size / 1e6:,.2f} MB. Target: {tuned.target}.</p>
<p><b>{summary}</b></p>
{_plot(tuned)}
<h2>Steps</h2>
<p>Each changes one group of the float model's weights; the last ones combine. Drops are points lost on the same questions.</p>
<table><tr>{"".join(f"<th>{column}</th>" for column in _COLUMNS)}</tr>
{chr(10).join(rows)}</table>
<h2>Order of the changes</h2><p>By what they save for a lost point.</p><ol>{moves}</ol>
<h2>Recipe</h2><pre>{html.escape(recipe_to_toml(tuned.recipe))}</pre>
</body></html>
"""


def _amount(saved: float, target: str) -> str:
    return f"{saved:,.1f} ms" if target == "latency" else f"{saved / 1e6:,.2f} MB"


def _plot(tuned: Tuned) -> str:
    """What every step saves against what it loses."""
    steps = [(step, "bundle") for step in tuned.steps if not step.error] + [(s, "torch") for s in tuned.combined if not s.error]
    if not steps:
        return ""
    latency = tuned.target == "latency"
    points = [
        Point(step.name, step.faster if latency else (tuned.size - step.size) / 1e6, step.drop, kind) for step, kind in steps
    ]
    saved = f"saved in an answer of {ANSWER} tokens, ms" if latency else "saved, MB"
    return draw_scatter(points, saved, "points lost", title="What every step saves and loses", name="steps")
