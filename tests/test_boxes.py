"""Boxes that an answer's text holds."""

from __future__ import annotations

import pytest

from edgevlm import Box, Reply, Seen, Timings
from edgevlm.boxes import read_boxes

ONE = [(200, 100)]


def test_coordinates_are_thousandths_of_the_picture() -> None:
    found = read_boxes("Here: <ref> the cat</ref><box>(536,509),(588,999)</box>.", [(640, 480)])
    assert found == (Box(0.536 * 640, 0.509 * 480, 0.588 * 640, 0.999 * 480, "the cat", 0),)
    assert read_boxes("<box>(0,0),(1000,1000)</box>", ONE) == (Box(0, 0, 200, 100),)


def test_a_label_holds_until_other_text_comes() -> None:
    text = "<ref>dogs</ref><box>(0,0),(10,10)</box> <box>(20,20),(30,30)</box> and <box>(40,40),(50,50)</box>"
    assert [box.label for box in read_boxes(text, ONE)] == ["dogs", "dogs", ""]
    assert [box.label for box in read_boxes("<ref>far</ref> is at <box>(1,1),(2,2)</box>", ONE)] == [""]
    assert [box.label for box in read_boxes("<ref>a</ref><ref>b\n</ref>\n<box>(1,1),(2,2)</box>", ONE)] == ["b"]
    assert [box.label for box in read_boxes("<ref>un<ref>closed</ref><box>(1,1),(2,2)</box>", ONE)] == ["closed"]


def test_corners_may_come_in_any_order_and_with_blanks() -> None:
    (box,) = read_boxes("<box> ( 900 , 100 ) , (100,\n800)</box>", ONE)
    assert box == Box(20, 10, 180, 80)


def test_a_quad_has_its_corners() -> None:
    (box,) = read_boxes("<ref>EXIT</ref><quad>(10,20),(60,22),(65,40),(5,38)</quad>", [(1000, 1000)])
    assert box == Box(5, 20, 65, 40, "EXIT", 0, ((10, 20), (60, 22), (65, 40), (5, 38)))


def test_the_picture_is_the_last_or_the_one_that_is_named() -> None:
    sizes = [(100, 100), (2000, 1000)]
    text = "<ref>Picture 1: the cup</ref><box>(500,500),(600,600)</box><ref>a cup</ref><box>(500,500),(600,600)</box>"
    first, second = read_boxes(text, sizes)
    assert first == Box(50, 50, 60, 60, "the cup", 0)
    assert second == Box(1000, 500, 1200, 600, "a cup", 1)
    assert [b.image for b in read_boxes("<ref>Picture 3: x</ref><box>(1,1),(2,2)</box>", sizes)] == [1]
    assert [b.label for b in read_boxes("<ref>Picture 3: x</ref><box>(1,1),(2,2)</box>", sizes)] == ["Picture 3: x"]


@pytest.mark.parametrize("text", [
    "", "no box", "<box>(1,2),(3,4)", "<box>(1,2)</box>", "<box>(1,2),(3)</box>", "<box>(a,2),(3,4)</box>", "(1,2),(3,4)",
    "<box>(1,2),(3,4),(5,6)</box>", "<box>(-1,2),(3,4)</box>", "<box>(1.5,2),(3,4)</box>", "<quad>(1,2),(3,4)</quad>",
    "<box>(1,2),(3,1001)</box>", "<box>(1,2),(3,99999999999999999999)</box>", "<box></box>", "<box>(1,2),(3,4)</quad>",
])  # fmt: skip
def test_what_is_malformed_is_no_box(text: str) -> None:
    assert read_boxes(text, ONE) == ()
    both = f"{text} <ref>it</ref><box>(10,10),(20,20)</box>"
    assert read_boxes(both, ONE) == (Box(2, 1, 4, 2, "it"),)


def test_without_a_picture_there_is_no_box() -> None:
    assert read_boxes("<box>(1,2),(3,4)</box>", []) == ()


def test_a_reply_knows_its_pictures() -> None:
    seen = (Seen(50, 80, 28, 28, 4), Seen(400, 200, 28, 28, 4))
    reply = Reply("<ref>it</ref><box>(250,500),(500,750)</box>", [1], "stop", Timings(), seen)
    assert reply.boxes == (Box(100, 100, 200, 150, "it", 1),)
    assert Reply("<box>(250,500),(500,750)</box>", [1], "stop", Timings()).boxes == ()
