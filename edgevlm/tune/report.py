"""What a tuning found: a recipe file, a table, JSON, and a page that opens from disk without a network."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import OutputError
from ..evaluation.plots import Panel, draw_rows
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
            path.write_text(text, encoding="utf-8", errors="replace")
        except OSError as exc:
            raise OutputError(f"{path} cannot be written: {exc.strerror}.") from exc
    return paths


def describe_tuned(tuned: Tuned) -> str:
    """The result in some lines."""
    asked = f"{tuned.questions:,} questions of {tuned.suite}"
    if tuned.chosen is None:
        return f"Nothing can be changed within {tuned.max_drop:g} points of float on {asked}: everything stays float."
    chosen, (low, high) = tuned.chosen, tuned.chosen.interval
    lines = [
        f"Weights of {chosen.size / 1e6:,.2f} MB, {_share(chosen.size, tuned.size)} of float's; an answer of {ANSWER} tokens "
        f"in {chosen.latency:,.1f} ms, {_share(chosen.latency, chosen.float_latency)} of float's.",
        f"{tuned.metric} {chosen.score:.1f} on {asked}, a drop of {_plain(chosen.drop)}"
        + (f" (95 % from {_signed(low)} to {_signed(high)})" if math.isfinite(low + high) else "")
        + f"; {tuned.max_drop:g} was allowed.",
    ]
    if high > tuned.max_drop:
        lines.append("These questions do not rule out a drop above the limit; more of them would tell more.")
    return "\n".join(lines)


def _plain(value: float) -> str:
    return _signed(value).removeprefix("+")


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


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

_COLUMNS = ("step", "score", "drop", "95 %", "worse", "better", "MB", "first token, ms", "tokens/s", "answer, ms", "float's")


def _cells(step: Step) -> tuple[str, ...]:
    if step.error:
        return (step.name, *[""] * (len(_COLUMNS) - 2), "not possible")
    low, high = step.interval
    return (
        step.name, f"{step.score:.1f}", _signed(step.drop),
        f"{_signed(low)} to {_signed(high)}" if math.isfinite(low + high) else "–", f"{step.lost:,}", f"{step.won:,}",
        f"{step.size / 1e6:,.2f}", f"{step.first_token:,.1f}", f"{step.tokens_per_second:,.0f}", f"{step.latency:,.1f}",
        f"{step.float_latency:,.1f}",
    )  # fmt: skip


def _all_steps(tuned: Tuned) -> list[Step]:
    """The combinations last."""
    return [*tuned.steps, *tuned.combined]


def _impossible(tuned: Tuned) -> dict[str, list[str]]:
    """Names of the steps that could not be made, by the reason."""
    found: dict[str, list[str]] = {}
    for step in _all_steps(tuned):
        if step.error:
            found.setdefault(step.error, []).append(step.name)
    return found


def print_tuned(tuned: Tuned, console: Any) -> None:
    """Every step, and the result."""
    from rich.markup import escape
    from rich.table import Table

    title = f"{tuned.suite}, {tuned.questions:,} questions; float: {tuned.metric} {tuned.score:.1f}, {tuned.size / 1e6:,.2f} MB"
    table = Table(box=None, pad_edge=False, header_style="bold", title=escape(title), title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "step" else "right")
    for step in _all_steps(tuned):
        table.add_row(*map(escape, _cells(step)), style="bold" if step is tuned.chosen else None)
    console.print(table)
    for reason, names in _impossible(tuned).items():
        console.print(escape(f"Not possible: {'; '.join(names)}. {reason}"), style="dim", highlight=False)
    console.print()
    console.print(escape(describe_tuned(tuned)), highlight=False)


# ----------------------------------------------------------------------------------------------------- page

_STYLE = """
tr.chosen td, tr.chosen th { background: var(--panel); font-weight: 700; }
tbody th { font-weight: normal; white-space: nowrap; max-width: none; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.8rem 1rem; overflow: auto; }
figure svg { min-width: 46rem; max-width: 60rem; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def _page(tuned: Tuned) -> str:
    style = (Path(__file__).parent.parent / "assets" / "evaluation" / "report.css").read_text(encoding="utf-8")
    said, name = html.escape, html.escape(tuned.source)
    parts = [
        f"<p>{said(tuned.suite)}, {tuned.questions:,} questions. Float: {said(tuned.metric)} {tuned.score:.1f}, "
        f"{tuned.size / 1e6:,.2f} MB. Target: {tuned.target}.</p>",
        f"<p><strong>{said(describe_tuned(tuned)).replace(chr(10), '<br>')}</strong></p>",
        _figure(tuned),
        "<h2 id='steps'>Steps</h2>",
        "<p>Each changes one group of the float model's weights; the last ones combine them. A drop is in points, on the same "
        "questions as float; worse and better count questions.</p>",
        _table(tuned),
        *(
            f"<p class='quiet'>Not possible: {said('; '.join(names))}. {said(why)}</p>"
            for why, names in _impossible(tuned).items()
        ),
        "<h2>Order of the changes</h2>" + _moves(tuned),
        f"<h2>Recipe</h2><pre>{said(recipe_to_toml(tuned.recipe))}</pre>",
    ]
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><meta name="color-scheme" content="light dark">'
        f"<title>Tuning of {name}</title><style>{style}{_STYLE}</style></head>\n"
        f"<body><header><h1>Tuning of {name}</h1></header>\n"
        + "\n".join(["<main>", *parts, "</main>"])
        + f"\n<footer><p class='quiet'>Made by EdgeVLM {__version__}. This page fetches nothing.</p></footer></body></html>\n"
    )


def _table(tuned: Tuned) -> str:
    head = "".join(f"<th scope='col'{_right(number)}>{column}</th>" for number, column in enumerate(_COLUMNS))
    rows = []
    for step in _all_steps(tuned):
        first, *rest = map(html.escape, _cells(step))
        mark = " class='chosen'" if step is tuned.chosen else ""
        cells = "".join(f"<td class='number'>{cell}</td>" for cell in rest)
        rows.append(f"<tr{mark}><th scope='row'>{first}</th>{cells}</tr>")
    return (
        "<div class='wide' role='region' aria-labelledby='steps' tabindex='0'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _right(column: int) -> str:
    return " class='number'" if column else ""


def _moves(tuned: Tuned) -> str:
    if not tuned.moves:
        return "<p>No change saves anything.</p>"
    entries = "".join(
        f"<li>{html.escape(move.group)} as {html.escape(move.candidate)}: saves {_amount(move.saved, tuned.target)} for "
        f"{_plain(move.cost)} points</li>"
        for move in tuned.moves
    )
    return f"<p>By what they save for a lost point, each on top of those before.</p><ol>{entries}</ol>"


def _amount(saved: float, target: str) -> str:
    return f"{saved:,.1f} ms" if target == "latency" else f"{saved / 1e6:,.2f} MB"


def _figure(tuned: Tuned) -> str:
    """What every step loses and saves."""
    steps = [step for step in _all_steps(tuned) if not step.error]
    if not steps:
        return ""
    latency = tuned.target == "latency"
    saved = [step.faster if latency else (tuned.size - step.size) / 1e6 for step in steps]
    svg = draw_rows(
        [step.name for step in steps],
        ["bundle" if step.group else "torch" for step in steps],
        [
            Panel("points lost", [step.drop for step in steps], [step.interval for step in steps], limit=tuned.max_drop),
            Panel(f"saved in an answer of {ANSWER} tokens, ms" if latency else "saved, MB", saved, bars=True),
        ],
        title="What every step loses and saves; the table has the numbers.", name="cost",
    )  # fmt: skip
    return (
        "<figure><div class='wide' role='region' aria-label='Plot: what every step loses and saves' tabindex='0'>"
        f"{svg}</div><figcaption>Blue: one group changed. Orange: several together. Bars beside a point are 95 % intervals, "
        f"the dashed line is the limit of {tuned.max_drop:g}.</figcaption></figure>"
    )
