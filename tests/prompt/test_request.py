"""Requests in every form, and those that are none."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from chatting import PICTURE, SYSTEM, turn

from edgevlm.errors import PromptError
from edgevlm.prompt import ImagePart, Message, TextPart, Video, normalize_request


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "neither"),
        ({"prompt": "x", "messages": [SYSTEM]}, "not both"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "list of pictures and strings"),
        ({"prompt": PICTURE}, "list of pictures and strings"),
        ({"prompt": ["x", PICTURE], "images": [PICTURE]}, "leave images= out"),
        ({"prompt": [SYSTEM]}, "messages="),
        ({"prompt": ["x", None]}, r"prompt\[1\]"),
        ({"prompt": "x", "images": [["cat.png"]]}, r"images\[0\].*picture object"),
        ({"prompt": "x", "images": PICTURE}, "list of pictures"),
        ({"messages": [SYSTEM], "images": [PICTURE]}, "part of its message"),
        ({"messages": []}, "at least one message"),
        ({"messages": ["x"]}, r"messages\[0\]"),
        ({"messages": [SYSTEM, {"content": "x"}]}, r"messages\[1\] has no role"),
        ({"messages": [SYSTEM, {"role": "user"}]}, r"messages\[1\] has no content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"messages\[0\].content\[0\].*None"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": [PICTURE]}]}]}, "picture object"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "expected a string"),
        ({"messages": [{"role": "user", "content": [{"type": "movie", "movie": 1}]}]}, "'movie'.*text, image and video"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"content\[0\] is a str"),
        ({"prompt": "x", "images": [[PICTURE, PICTURE]]}, r"frames of a film as edgevlm\.Video\(frames, fps\)"),
        (
            {"messages": [turn("user"), {"role": "user", "content": [{"type": "video", "video": []}]}]},
            r"messages\[1\]\.content\[0\]: the video has no frame; give one picture at least",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "the frames of a video are None; .*list of pictures",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": [PICTURE], "fps": None}]}]}, "fps is None"),
        (
            {"messages": [SYSTEM, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            r"messages\[1\].*image_url.*\"image\": picture",
        ),
    ],
)
def test_requests_that_are_none(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(PromptError, match=match):
        normalize_request(**arguments)


@pytest.mark.parametrize("fps", [0, -1, -0.5, float("nan"), float("inf"), True, "2", None, 1j])
def test_a_film_without_a_speed_is_refused(fps: Any) -> None:
    with pytest.raises(PromptError, match=re.escape(f"fps is {fps!r}; expected a number above 0")):
        Video([PICTURE], fps)


@pytest.mark.parametrize("frames", [None, "film.mp4", b"bytes", {"0": PICTURE}, PICTURE, np.zeros((2, 4, 4, 3), np.uint8), 7])
def test_a_film_is_a_list_of_pictures(frames: Any) -> None:
    with pytest.raises(PromptError, match=f"the frames of a video are a {type(frames).__name__}|are None"):
        Video(frames)


def test_normalised_form() -> None:
    request = normalize_request("x", [b"png"])
    assert isinstance(request.messages[0].content[0], ImagePart)
    assert request.messages[0].content[1] == TextPart("x")
    assert request.images == (b"png",)
    assert normalize_request(messages=[{"role": "user", "content": "x"}]).messages == (
        Message("user", (TextPart("x"),), plain=True),
    )


def test_a_request_without_its_pictures() -> None:
    listed = normalize_request(["a", PICTURE, "b", PICTURE])
    bare = listed.without_images()
    assert bare.images == ()
    assert bare.messages == (Message("user", (TextPart("a"), TextPart("b"))),)
    assert (bare.listed, bare.prompt) == (True, None)
    assert len(listed.images) == 2, "the request itself keeps them"
    asked = normalize_request("x", [PICTURE]).without_images()
    assert (asked.prompt, asked.listed, asked.messages) == ("x", False, (Message("user", (TextPart("x"),)),))
    chat = normalize_request(
        messages=[turn("user", PICTURE), {"role": "assistant", "content": "y"}, turn("user", "z", PICTURE)]
    )
    assert [message.role for message in chat.without_images().messages] == ["user", "assistant", "user"]
    assert [message.content for message in chat.without_images().messages] == [(), (TextPart("y"),), (TextPart("z"),)]
    assert chat.without_images().messages[1].plain
