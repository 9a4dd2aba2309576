"""What the model is asked: messages of texts, pictures and films, in whatever form they are given."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import PromptError

__all__ = ["ImagePart", "Message", "Request", "TextPart", "Video", "normalize_request"]

_MESSAGE_FORM = (
    '{"role": "user", "content": "text"} or {"role": "user", "content": '
    '[{"type": "image", "image": picture}, {"type": "text", "text": "…"}]}'
)


@dataclass(frozen=True)
class TextPart:
    """A piece of what somebody wrote."""

    text: str


@dataclass(frozen=True, eq=False)  # by identity: comparing arrays has no single answer
class Video:
    """A film as a list of frames, pictures of one size, `fps` of them a second. It stands wherever a picture may.

    Raises `PromptError` where there is no frame, or no such speed.
    """

    frames: Sequence[object]
    fps: float = 2.0
    """As many as Qwen2-VL's own examples take."""

    def __post_init__(self) -> None:
        if isinstance(self.frames, (str, bytes, Mapping)) or not isinstance(self.frames, Sequence):
            raise PromptError(f"the frames of a video are {_shown(self.frames)}; expected a list of pictures")
        if not len(self.frames):
            raise PromptError("the video has no frame; give one picture at least")
        if isinstance(self.fps, bool) or not isinstance(self.fps, numbers.Real) or not 0 < self.fps < float("inf"):
            raise PromptError(f"the video's fps is {self.fps!r}; expected a number above 0, the frames a second")


@dataclass(frozen=True, eq=False)
class ImagePart:
    """A picture or a `Video`, whatever object it is."""

    image: object


@dataclass(frozen=True)
class Message:
    """One turn. `plain` says that the caller gave its content as a bare string, which templates may treat differently."""

    role: str
    content: tuple[TextPart | ImagePart, ...]
    plain: bool = False


@dataclass(frozen=True)
class Request:
    """What was asked, in one form. `prompt` is the string as it was given, where one was: see `PromptBuilder.build`."""

    messages: tuple[Message, ...]
    prompt: str | None = None
    listed: bool = False
    """Given as a list of pictures and strings."""

    @property
    def images(self) -> tuple[object, ...]:
        """The pictures in the order of their places."""
        return tuple(part.image for message in self.messages for part in message.content if isinstance(part, ImagePart))

    def with_images(self, images: Sequence[object]) -> Request:
        """The same with other pictures in their places, as many as there are."""
        left = iter(images)
        messages = []
        for message in self.messages:
            content = tuple(ImagePart(next(left)) if isinstance(part, ImagePart) else part for part in message.content)
            messages.append(replace(message, content=content))
        return replace(self, messages=tuple(messages))

    def without_images(self) -> Request:
        """The same texts, for models whose pictures have their places apart from the text."""
        kept = (tuple(part for part in message.content if isinstance(part, TextPart)) for message in self.messages)
        messages = tuple(replace(message, content=content) for message, content in zip(self.messages, kept, strict=True))
        return replace(self, messages=messages)


def normalize_request(
    prompt: str | Sequence[object] | None = None,
    images: Sequence[object] | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
) -> Request:
    """Bring the three ways of asking into one.

    `prompt` as a string is one user message, with `images` before the text; as a list it is one user message of
    pictures and strings in that order. `messages` is a chat. Raises `PromptError` where that is not what was given.
    """
    if (prompt is None) == (messages is None):
        raise PromptError("give either prompt or messages" + (", not both" if prompt is not None else "; neither was given"))
    if messages is not None:
        if images is not None:
            raise PromptError(f"images= goes with a prompt; in messages a picture is part of its message: {_MESSAGE_FORM}")
        if not isinstance(messages, (list, tuple)) or not messages:
            raise PromptError(f"messages is {_shown(messages)}; expected a list with at least one message: {_MESSAGE_FORM}")
        return Request(tuple(_message(f"messages[{i}]", message) for i, message in enumerate(messages)))
    if isinstance(prompt, str):
        if images is not None and not isinstance(images, (list, tuple)):
            raise PromptError(f"images is {_shown(images)}; expected a list of pictures, also for a single one")
        pictures = [_picture(f"images[{i}]", image) for i, image in enumerate(images or ())]
        if not prompt and not pictures:
            raise PromptError("the prompt is empty; give a text or a picture")
        return Request((Message("user", (*pictures, TextPart(prompt))),), prompt)
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise PromptError(f"prompt is {_shown(prompt)}; expected a string, or a list of pictures and strings")
    if images is not None:
        raise PromptError("prompt is a list, which holds its pictures itself: leave images= out, or give prompt as a string")
    parts = [TextPart(p) if isinstance(p, str) else _picture(f"prompt[{i}]", p) for i, p in enumerate(prompt)]
    return Request((Message("user", tuple(parts)),), listed=True)


def _message(where: str, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} is {_shown(message)}; expected {_MESSAGE_FORM}")
    unknown = sorted(str(key) for key in message.keys() - {"role", "content"})
    if unknown:
        raise PromptError(f"{where} has the keys {', '.join(unknown)}; only role and content are accepted: {_MESSAGE_FORM}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise PromptError(f'{where} has no role (found {_shown(role)}); use "user", "assistant" or "system"')
    if isinstance(content, str):
        return Message(role, (TextPart(content),), plain=True)
    if not isinstance(content, (list, tuple)):
        raise PromptError(f"{where} has no content (found {_shown(content)}); expected {_MESSAGE_FORM}")
    return Message(role, tuple(_part(f"{where}.content[{i}]", part) for i, part in enumerate(content)))


def _part(where: str, part: object) -> TextPart | ImagePart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind not in ("text", "image", "video"):
        found = f"of type {kind!r}" if isinstance(part, Mapping) else _shown(part)
        advice = ""
        if kind == "image_url":
            advice = '; nothing is downloaded here: open the picture and pass {"type": "image", "image": picture}'
        raise PromptError(f"{where} is {found}; accepted types are text, image and video, as in {_MESSAGE_FORM}{advice}")
    if kind == "image":
        return _picture(f'{where}["image"]', part.get("image"))
    if kind == "video":
        video = part.get("video")
        if isinstance(video, Video):
            return ImagePart(video)
        try:
            return ImagePart(Video(video, part.get("fps", 2.0)))  # type: ignore[arg-type]
        except PromptError as exc:
            raise PromptError(f"{where}: {exc}") from exc
    if not isinstance(part.get("text"), str):
        raise PromptError(f'{where} is of type text, its "text" is {_shown(part.get("text"))}; expected a string')
    return TextPart(part["text"])


def _picture(where: str, image: object) -> ImagePart:
    if isinstance(image, str):  # the path of a file; only in a prompt list a string is text
        return ImagePart(Path(image))
    # Lists and mappings are mistakes (a chat given as prompt, a nested list), never pictures.
    if image is None or isinstance(image, (list, tuple, Mapping)):
        advice = "pass a chat as messages=" if isinstance(image, Mapping) else "pass the picture object itself"
        if isinstance(image, (list, tuple)):
            advice += ", frames of a film as edgevlm.Video(frames, fps)"
        raise PromptError(f"{where} is {_shown(image)}, not a picture; {advice}")
    return ImagePart(image)


def _shown(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
