"""Plots as SVG that is part of a page: it takes the page's colours, its text stays text, and it fetches nothing.

matplotlib draws; what is done to its output afterwards is what a file of its own needs and a page does not have: the XML head,
namespaces, metadata, and names that would clash with a second plot's.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import MissingDependencyError

__all__ = ["Panel", "Point", "draw_rows", "draw_scatter"]

#: Stand-ins that no other part of a plot uses, and what the page makes of them.
_COLOURS = {"#010101": "currentColor", "#020202": "var(--quiet)", "#030303": "var(--bundle)", "#040404": "var(--torch)"}
_TEXT, _QUIET, _BUNDLE, _TORCH = _COLOURS
_MARKS = {"bundle": ("o", _BUNDLE), "torch": ("s", _TORCH)}
_LABEL = 26


@dataclass(frozen=True)
class Point:
    """One subject. `x_range` and `y_range` are the ends of its error bars; `kind` as in `Subject`."""

    label: str
    x: float
    y: float
    kind: str = "bundle"
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


def draw_scatter(points: Sequence[Point], x_label: str, y_label: str, *, title: str, name: str) -> str:
    """An `<svg>` with every point labelled beside the axes, its label tied to it by a line; x begins at zero, and is
    logarithmic where it spans more than a factor of ten. `title` is what a screen reader says, `name` begins every id inside.

    Raises `MissingDependencyError` without matplotlib.
    """
    height = max(3.3, 0.9 + 0.25 * len(points))

    def draw(figure: Any) -> None:
        labels = 0.05 + 0.0128 * max(len(_shorten(point.label)) for point in points)
        bottom = 0.5 / height
        axes = figure.add_axes((0.11, bottom, 0.88 - labels, 0.97 - bottom), facecolor="none")
        _draw(axes, points, x_label, y_label)

    return _draw_svg(draw, (6.3, height), title, name)


@dataclass(frozen=True)
class Panel:
    """What is shown of every row, beside each other: `values`, with the ends of their intervals or as `bars` from zero. NaN is
    left empty. `limit`, where there is one, is marked."""

    label: str
    values: Sequence[float]
    ranges: Sequence[tuple[float, float]] = ()
    bars: bool = False
    limit: float = math.nan


def draw_rows(labels: Sequence[str], kinds: Sequence[str], panels: Sequence[Panel], *, title: str, name: str) -> str:
    """An `<svg>` with a row for each label, from the top, and two panels or so beside the labels. `kinds` as in `Point`,
    `title` and `name` as in `draw_scatter`, likewise what is raised."""
    width, height, head = 9.6, 0.75 + 0.24 * len(labels), 0.15
    left = (0.2 + 0.075 * max(map(len, labels))) / width
    each, bottom = (1 - left) / len(panels), 0.5 / height

    def draw(figure: Any) -> None:
        for number, panel in enumerate(panels):
            place = (left + number * each, bottom, each - 0.03, 1 - bottom - head / height)
            axes = figure.add_axes(place, facecolor="none")
            _draw_panel(axes, panel, kinds)
            axes.set_yticks(range(len(labels)), [_printable(label) for label in labels] if number == 0 else [])

    return _draw_svg(draw, (width, height), title, name)


def _draw_panel(axes: Any, panel: Panel, kinds: Sequence[str]) -> None:
    for row, (value, kind) in enumerate(zip(panel.values, kinds, strict=True)):
        mark, colour = _MARKS.get(kind, _MARKS["bundle"])
        if not math.isfinite(value):
            continue
        if panel.bars:
            axes.barh(row, value, height=0.6, color=colour)
        else:
            reach = _reach(value, panel.ranges[row] if panel.ranges else None)
            axes.errorbar(value, row, xerr=reach, fmt=mark, color=colour, markersize=5.5, elinewidth=1.2, capsize=2.5)
    axes.axvline(0, color=_QUIET, linewidth=0.8)
    if math.isfinite(panel.limit):
        axes.axvline(panel.limit, color=_TEXT, linewidth=1, linestyle="--")
    axes.set_ylim(len(panel.values) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.set_xlabel(panel.label)
    axes.tick_params(axis="y", length=0)
    axes.grid(color=_QUIET, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_svg(draw: Callable[[Any], None], inches: tuple[float, float], title: str, name: str) -> str:
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise MissingDependencyError(
            f"Plots need matplotlib, which is not installed ({exc}). `pip install 'edgevlm[eval]'` brings it."
        ) from exc
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "text.color": _TEXT, "axes.labelcolor": _TEXT,
        "axes.edgecolor": _QUIET, "xtick.color": _QUIET, "ytick.color": _QUIET, "xtick.labelcolor": _TEXT,
        "ytick.labelcolor": _TEXT, "text.parse_math": False, "axes.formatter.use_mathtext": False,
    }  # fmt: skip
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in a script that the measuring font lacks; the page's has it
        figure = Figure(figsize=inches, facecolor="none")
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(file.getvalue(), title, name)


def _draw(axes: Any, points: Sequence[Point], x_label: str, y_label: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    for point in points:
        mark, colour = _MARKS.get(point.kind, _MARKS["bundle"])
        axes.errorbar(
            point.x, point.y, xerr=_reach(point.x, point.x_range), yerr=_reach(point.y, point.y_range), fmt=mark, color=colour,
            markersize=6.5, elinewidth=1.3, capsize=3,
        )  # fmt: skip
    xs = [x for point in points for x in (point.x, *(point.x_range or ()))]
    if min(xs) > 0 and max(xs) > 10 * min(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if max(xs) < 200 * min(xs) else (1.0,)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(min(xs) / 1.25, max(xs) * 1.25)
    else:
        axes.set_xlim(0, 1.08 * max(xs) or 1.0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    ys = [y for point in points for y in (point.y, *(point.y_range or ()))]
    room = 0.07 * (max(ys) - min(ys)) or 1.0
    axes.set_ylim(min(ys) - room, max(ys) + room)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color=_QUIET, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _label(axes, points)


def _label(axes: Any, points: Sequence[Point]) -> None:
    """Names in the margin, in the order of the points' heights and as close to them as names fit."""
    bottom, top = axes.get_ylim()
    order = sorted(range(len(points)), key=lambda i: (points[i].y, -i))
    wanted = [(points[i].y - bottom) / (top - bottom) for i in order]
    heights = _spread(wanted, min(0.075, 1 / max(1, len(points) - 1)))
    for index, height in zip(_uncrossed(order, points, wanted, heights), heights, strict=True):
        point = points[index]
        axes.annotate(
            _shorten(point.label), (point.x, point.y), (1.04, height), textcoords="axes fraction", va="center", fontsize=9.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _QUIET, "lw": 0.6, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 5},
        )  # fmt: skip


def _uncrossed(order: Sequence[int], points: Sequence[Point], wanted: Sequence[float], places: Sequence[float]) -> list[int]:
    """The order with points of one height changed round: the further left one is, the further from it its name stands, so
    that no line crosses another."""
    found: list[int] = []
    for height in dict.fromkeys(points[i].y for i in order):
        own = [at for at, index in enumerate(order) if points[index].y == height]
        from_left = sorted((order[at] for at in own), key=lambda i: points[i].x)
        farthest_first = sorted(own, key=lambda at: -abs(places[at] - wanted[at]))
        placed = dict(zip(farthest_first, from_left, strict=True))
        found += [placed[at] for at in own]
    return found


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places from 0 to 1 in the same order, at least `gap` apart, near the wanted ones."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + gap) if places else place)
    highest = 1.0
    for index in reversed(range(len(places))):
        places[index] = highest = min(places[index], highest)
        highest -= gap
    return places


def _reach(value: float, ends: tuple[float, float] | None) -> list[list[float]] | None:
    return [[max(0.0, value - ends[0])], [max(0.0, ends[1] - value)]] if ends and all(map(math.isfinite, ends)) else None


def _shorten(text: str) -> str:
    """In at most `_LABEL` characters: names mostly differ at their ends."""
    text = _printable(text)
    return text if len(text) <= _LABEL else f"{text[: _LABEL // 2 - 1]}…{text[-_LABEL // 2 :]}"


def _inline(svg: str, title: str, name: str) -> str:
    root = ET.fromstring(svg[svg.index("<svg") :])
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            key: _attribute(key, value, name)
            for key, value in ((key.rpartition("}")[2], value) for key, value in element.attrib.items())
        }
    for defs in [d for d in root if d.tag == "defs" and d.find("style") is not None]:  # it would hold for the whole page
        root.remove(defs)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title"}
    said = ET.Element("title", id=f"{name}-title")
    said.text = _printable(title)
    root.insert(0, said)
    return ET.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, name: str) -> str:
    """With ids of this plot's own, the page's colours and its typeface."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-")
    for stand_in, colour in _COLOURS.items():
        value = value.replace(stand_in, colour)
    value = re.sub(r"font: (?:\w+ )*([\d.]+px) [^;]*", r"font-size: \1", re.sub(r"font-family: [^;]*;? ?", "", value))
    return value.replace("url(#", f"url(#{name}-")


def _printable(text: str) -> str:
    """What XML can hold."""
    return "".join(c if c.isprintable() else " " for c in text)
