"""Boxes in an answer's text, in pixels of the picture: what Qwen-VL (arXiv 2308.12966, section 2.2.1) writes as

    <ref>the cat</ref><box>(536,509),(588,602)</box>          two opposite corners
    <ref>EXIT</ref><quad>(10,20),(60,22),(60,40),(9,38)</quad>       four corners of a line of text

with coordinates in thousandths of the picture's width and height. It knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Box", "read_boxes"]

_POINT = r"\s*\(\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*\)\s*"
_SHAPE = re.compile(rf"<box>{_POINT},{_POINT}</box>|<quad>{_POINT},{_POINT},{_POINT},{_POINT}</quad>")
_LABEL = re.compile(r"<ref>((?:(?!</?ref>).)*)</ref>", re.DOTALL)
_NUMBER = re.compile(r"\s*Picture\s+(\d+)\b\s*:?\s*")


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, from its upper left corner (x1, y1) to its lower right one (x2, y2), of the picture number
    `image`, counted from 0 over the whole prompt.

    `label` is what the answer calls it, "" where it does not say. `corners` are the four points of a `<quad>`, in the order
    of the answer, around which the rectangle lies; empty for a `<box>`.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""
    image: int = 0
    corners: tuple[tuple[float, float], ...] = ()


def read_boxes(text: str, sizes: Sequence[tuple[int, int]]) -> tuple[Box, ...]:
    """The boxes in `text` in their order, for pictures of these sizes (width, height).

    A box belongs to the `<ref>` right before it, or before the box before it, and to the last picture, unless that `<ref>`
    begins with "Picture N:" and there is such a picture. Corners may come in any order. What is not well formed, or lies
    outside of the picture (over 1000), is no box; without a picture there is none.
    """
    boxes: list[Box] = []
    end, label = 0, ""
    for match in _SHAPE.finditer(text) if sizes else ():
        between = text[end : match.start()]
        labels = list(_LABEL.finditer(between))
        if labels and not between[labels[-1].end() :].strip():
            label = labels[-1][1].strip()
        elif between.strip():
            label = ""
        end = match.end()
        numbers = [int(number) for number in match.groups() if number is not None]
        if max(numbers) > 1000:
            continue
        number, name = _picture(label, len(sizes))
        width, height = sizes[number]
        points = tuple((x / 1000 * width, y / 1000 * height) for x, y in zip(numbers[::2], numbers[1::2], strict=True))
        (x1, *_, x2), (y1, *_, y2) = (sorted(values) for values in zip(*points, strict=True))
        boxes.append(Box(x1, y1, x2, y2, name, number, points if len(points) == 4 else ()))
    return tuple(boxes)


def _picture(label: str, count: int) -> tuple[int, str]:
    """Number of the picture that a label speaks of, from 0, and the label without it."""
    match = _NUMBER.match(label)
    if match is None or not 1 <= int(match[1]) <= count:
        return count - 1, label
    return int(match[1]) - 1, label[match.end() :]
