"""From a question to token ids with places for the pictures, and from generated ids back to streamed text.

    request = normalize_request("What is on the table?", [picture])
    builder = PromptBuilder(Tokenizer.from_folder(folder), template, "<image>", 4, lambda index: 36)
    prompt = builder.build(request)                    # prompt.ids, prompt.places, prompt.text
    stream = TextStream(builder.tokenizer)             # stream.push(token_id) …, stream.finish()

For ordinary text the ids are those of the checkpoint's Hugging Face processor. Where a user's text spells a control
token ("</s>", "<image>"), it stays text: only the chat template can write control tokens.

The module does not know pixels, models or end-of-sequence ids: a picture is any object that is not a `str`, how many
places it takes is the caller's function, and when to stop is the generation configuration's business.
"""

from __future__ import annotations

import codecs
import json
import math
import numbers
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from edgevlm.errors import IntegrityError, ManifestError, PromptError

__all__ = [
    "ChatTemplate",
    "ImagePart",
    "Message",
    "Prompt",
    "PromptBuilder",
    "Request",
    "TextPart",
    "TextStream",
    "Tokenizer",
    "Video",
    "normalize_request",
]

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


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks answers for training; here the tags are transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain set

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A checkpoint's Jinja template, run in a sandbox as Hugging Face runs it.

    Sources: huggingface.co/docs/transformers/chat_templating_writing (whitespace, functions, filters).
    Raises `PromptError` with the template's own text where it has a syntax error or raises.
    """

    def __init__(self, source: str, variables: Mapping[str, str] | None = None) -> None:
        """`variables` are what the template knows by name: `bos_token`, `eos_token`, …"""
        self.source = source
        self.variables = dict(variables or {})
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        env.filters["tojson"] = _tojson
        env.globals.update(raise_exception=_raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
        try:
            self._template = env.from_string(source)
        except jinja2.TemplateSyntaxError as exc:
            raise PromptError(f"the chat template has a syntax error in line {exc.lineno}: {exc.message}") from exc

    @classmethod
    def from_folder(cls, folder: Path, variables: Mapping[str, str] | None = None) -> ChatTemplate | None:
        """Read the template of a checkpoint, None where it has none.

        Looks at chat_template.jinja, then for "chat_template" in chat_template.json, tokenizer_config.json and
        processor_config.json. Raises `IntegrityError` for unreadable files, `PromptError` for an unusable template.
        """
        file = folder / "chat_template.jinja"
        if file.is_file():
            try:
                return cls(file.read_text(encoding="utf-8"), variables)
            except (OSError, UnicodeDecodeError) as exc:
                raise IntegrityError(f"{file} cannot be read: {exc}; copy the checkpoint again") from exc
        for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
            found = _read_json(folder / name).get("chat_template")
            if isinstance(found, list):
                named = {str(x.get("name")): x.get("template") for x in found if isinstance(x, Mapping)}
                found = named.get("default")
                if found is None:
                    raise PromptError(f'{folder / name} has the chat templates {sorted(named)}, none is called "default"')
            if isinstance(found, str):
                return cls(found, variables)
        return None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        image_token: str = "<image>",
        disguise: Mapping[int, str] | None = None,
    ) -> str:
        """The prompt text. `disguise` replaces characters of the messages' texts, never of the template's own.

        A template that prints `content` as it stands gets a string, in which `image_token` lines stand for pictures.
        """
        accepts_list, accepts_string = self._accepts
        chat: list[dict[str, Any]] = []
        for message in messages:
            # The object itself stays outside the sandbox: templates ask whether there is a picture, never which.
            parts = [
                {"type": "text", "text": part.text.translate(disguise or {})}
                if isinstance(part, TextPart)
                else {"type": "video", "video": "film"}
                if isinstance(part.image, Video)
                else {"type": "image", "image": "picture"}
                for part in message.content
            ]
            content: str | list[dict[str, str]] = parts
            if accepts_string and (message.plain or not accepts_list):
                pictures = sum(part["type"] != "text" for part in parts)
                content = f"{image_token}\n" * pictures + "".join(part.get("text", "") for part in parts)
            chat.append({"role": message.role, "content": content})
        return self._run(chat, add_generation_prompt)

    @cached_property
    def _accepts(self) -> tuple[bool, bool]:
        """Whether the template reads content as a list of parts, and as a string: tried, since nothing declares it."""
        probe = "edgevlmprobe"
        answers = []
        for content in ([{"type": "text", "text": probe}], probe):
            try:
                text = self._run([{"role": "user", "content": content}], True)
            except PromptError:
                text = ""
            answers.append(probe in text and not re.search(r"""['"]type['"]\s*:""", text))
        return answers[0], answers[1]

    def _run(self, chat: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        known = {**self.variables, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(messages=chat, **known)
        except Exception as exc:  # a template is foreign code: it can fail in any way
            raise PromptError(f"the chat template refused these messages: {exc}") from exc


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja2's own filter escapes HTML characters, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise IntegrityError(f"{file} cannot be read as JSON: {exc}; copy the checkpoint again") from exc
    if not isinstance(found, dict):
        raise IntegrityError(f"{file} holds {_shown(found)}, expected a JSON object; copy the checkpoint again")
    return found


def _content(token: object) -> str | None:
    """A special token is written as a string or as an object with its flags."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) and found else None


class Tokenizer:
    """A checkpoint's `tokenizer.json`, with the facts that `tokenizer_config.json` adds to it."""

    def __init__(self, backend: Backend, names: Mapping[str, str] | None = None) -> None:
        """`names` maps `bos_token`, `eos_token`, … to their strings. Truncation and padding of `backend` are turned off."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.names = dict(names or {})

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Load from a checkpoint or bundle folder.

        Raises `IntegrityError` where tokenizer.json is missing or corrupt. Special tokens that only the configuration
        names are added. Whether a prompt begins with a BOS is tokenizer.json's post-processor alone: transformers 5
        disregards `add_bos_token` and `add_eos_token` where there is a tokenizer.json.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise IntegrityError(f"{file} is missing; save the checkpoint's processor with transformers >= 4.40 to get one")
        try:
            backend = Backend.from_file(str(file))
        except Exception as exc:  # the library raises plain Exception
            raise IntegrityError(f"{file} is not a tokenizer: {exc}; copy the checkpoint again") from exc
        config = _read_json(folder / "tokenizer_config.json")
        every = {**_read_json(folder / "special_tokens_map.json"), **config}
        names = {k: text for k, v in every.items() if k.endswith("_token") and (text := _content(v))}
        extra = every.get("extra_special_tokens") or every.get("additional_special_tokens") or ()
        if isinstance(extra, Mapping):
            names.update({k: text for k, v in extra.items() if (text := _content(v))})
            extra = ()
        added = {t.content for t in backend.get_added_tokens_decoder().values()}
        for _, flags in sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
            if isinstance(flags, Mapping) and (text := _content(flags)) and text not in added:
                known = ("single_word", "lstrip", "rstrip", "normalized", "special")
                backend.add_tokens([AddedToken(text, **{k: bool(flags[k]) for k in known if k in flags})])
        special = [*names.values(), *(text for token in extra if (text := _content(token)))]
        listed = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special if t not in listed])
        return cls(backend, names)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, in which control tokens are recognised; `add_special_tokens` adds what the post-processor has."""
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids that the tokenizer does not have are left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def id_of(self, name: str) -> int | None:
        """The id of `bos_token`, `eos_token`, … or None."""
        text = self.names.get(name)
        found = self.backend.token_to_id(text) if text else None
        return None if found is None else int(found)

    def control_tokens(self, source: str = "") -> dict[str, int]:
        """The tokens that steer a model: all special ones, and added ones that the template `source` writes.

        Other added tokens (runs of spaces, say) are ordinary text. So is the unknown token, which the model itself
        gives for any character it lacks.
        """
        model = self.backend.model
        unknown = self.names.get("unk_token") if isinstance(model, models.Unigram) else getattr(model, "unk_token", None)
        return {
            token.content: index
            for index, token in self.backend.get_added_tokens_decoder().items()
            if token.content != unknown and (token.special or (token.content.strip() and token.content in source))
        }


@dataclass(frozen=True)
class Prompt:
    """What goes into the model: ids with the image token repeated, and (start, length) of each picture in order.

    `text` is the prompt as written, with one image token per picture. `sees` says for each token which picture it looks
    at through cross-attention, -1 for none; None where pictures enter as embeddings. `instruction` are the ids of
    the instruction for models that look at a picture with it in mind. `grids` says how the places of each picture lie
    (layers or tiles, rows, columns), `rates` how many frames a second each film has, None for a picture. `positions`,
    int64 `[3, S]`, are what a decoder with positions in three directions is told; None for others.
    """

    ids: list[int]
    places: tuple[tuple[int, int], ...]
    text: str
    sees: tuple[int, ...] | None = None
    instruction: tuple[int, ...] = ()
    grids: tuple[tuple[int, int, int], ...] = ()
    rates: tuple[float | None, ...] = ()
    positions: np.ndarray | None = None


@dataclass
class PromptBuilder:
    """Ties template, tokenizer and image token together.

    `grid` says how the places of a picture lie, and so how many it takes: (layers or tiles, rows, columns). `around` are the
    ids before and behind them, `video` the token of films and its id. `instruction` is the tokenizer of the part that reads
    the instruction beside the picture, where there is one. Raises `ManifestError` where the tokenizer has another id for
    `image_token`, or none; the id -1 says that there is none.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    image_token: str
    image_token_id: int
    grid: Callable[[Any], tuple[int, int, int]]
    instruction: Tokenizer | None = None
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    video: tuple[str, int] | None = None
    _control: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        found = self.tokenizer.backend.token_to_id(self.image_token)
        if found != self.image_token_id and self.image_token_id >= 0:
            raise ManifestError(
                f"the image token {self.image_token!r} is declared with id {self.image_token_id}, tokenizer.json has "
                f"{'no such token' if found is None else f'id {found}'}; export the checkpoint again"
            )
        source = self.template.source if self.template else ""
        self._control = self.tokenizer.control_tokens(source)
        if self.image_token_id >= 0:
            self._control[self.image_token] = self.image_token_id
        if self.video:
            self._control[self.video[0]] = self.video[1]

    def build(self, request: Request, *, raw: bool = False, add_generation_prompt: bool = True) -> Prompt:
        """Ids and places for `request`.

        Without a chat template, or with `raw`, a string prompt is used as it stands: image tokens in it are the
        places, all control tokens work, and pictures without any place go before the text, one line each. A list
        prompt has a place where each picture stands, with nothing added. A chat needs a template.

        Raises `PromptError` where places and pictures differ in number, where the template fails, and where text of a
        message cannot be kept apart from control tokens.
        """
        text, ids = self.encode(request, raw=raw, add_generation_prompt=add_generation_prompt)
        return self.expand(text, ids, request.images)

    def with_template(self, template: ChatTemplate) -> PromptBuilder:
        """The same with another chat template."""
        return replace(self, template=template)

    def knows(self, token: str) -> bool:
        """Whether the tokenizer has a special token of this text."""
        return token in self.tokenizer.control_tokens()

    def encode(self, request: Request, *, raw: bool = False, add_generation_prompt: bool = True) -> tuple[str, list[int]]:
        """The prompt as text and as ids, each picture one image token; see `build`."""
        if raw or self.template is None:
            text = self._raw_text(request)
            return text, self.tokenizer.encode(text, add_special_tokens=not self._has_bos(text))
        return self._chat(self.template, request.messages, add_generation_prompt)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text alone; control tokens in it are text. Raises `PromptError` where they cannot be."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self._steering(ids):
            twin, _, origin = self._twin
            ids = list(twin.encode(text, add_special_tokens=False).ids)
            if origin.keys() & set(ids) or self._steering(ids):
                raise PromptError(self._unwritable())
        return ids

    def _raw_text(self, request: Request) -> str:
        if request.prompt is not None:
            if any(token and token in request.prompt for token in (self.image_token, self.video[0] if self.video else "")):
                return request.prompt
            return "".join(f"{self._token_of(image)}\n" for image in request.images) + request.prompt
        if len(request.messages) != 1 or request.messages[0].plain or request.messages[0].role != "user":
            reason = "raw was asked for" if self.template else "this checkpoint has no chat template"
            raise PromptError(f"{reason}, so a chat cannot be written down; give prompt= with the text as the model expects it")
        return "".join(p.text if isinstance(p, TextPart) else self._token_of(p.image) for p in request.messages[0].content)

    def _token_of(self, image: object) -> str:
        return self.video[0] if self.video and isinstance(image, Video) else self.image_token

    def _chat(self, template: ChatTemplate, messages: Sequence[Message], generation: bool) -> tuple[str, list[int]]:
        """Render and encode, such that control tokens come from the template alone.

        The template runs twice: on the messages, and on a disguise of them in which every character that occurs in a
        control token is swapped for an unused private one. Control tokens in the second rendering are the template's
        own, however it trims, splits or joins texts. If encoding the first gives just these, that is the answer, and
        Hugging Face's. Otherwise texts hold some: then the second rendering is encoded by a twin of the tokenizer
        that knows its control tokens under secret names only, so that borders around them merge as ever.
        """
        for index, message in enumerate(messages):
            if any(token in message.role for token in self._control):
                raise PromptError(f"messages[{index}] has a control token in its role {message.role!r}; use a plain name")
        text = template.render(messages, add_generation_prompt=generation, image_token=self.image_token)
        alphabet = sorted({c for token in self._control for c in token if not c.isspace()})  # spaces stay: templates trim
        used = {c for m in messages for part in m.content if isinstance(part, TextPart) for c in part.text}
        used.update(template.source, *template.variables.values())
        spare = (c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in used)
        disguise = dict(zip(map(ord, alphabet), spare, strict=False))
        if len(disguise) < len(alphabet):
            raise PromptError("the messages use every private character of Unicode's plane 15; leave those out")
        masked = template.render(messages, add_generation_prompt=generation, image_token=self.image_token, disguise=disguise)
        wanted = [self._control[token] for token in self._pattern.findall(masked)]
        add = not self._has_bos(masked)
        if self._steering(self.tokenizer.encode(text, add_special_tokens=False)) == wanted:
            return text, self.tokenizer.encode(text, add_special_tokens=add)
        unmask = {ord(private): chr(plain) for plain, private in disguise.items()}
        twin, aliases, origin = self._twin
        secret = self._pattern.sub(lambda match: aliases[match[0]], masked).translate(unmask)
        ids = [origin.get(i, i) for i in twin.encode(secret, add_special_tokens=False).ids]
        if self._steering(ids) != wanted:
            raise PromptError(self._unwritable())
        return masked.translate(unmask), [origin.get(i, i) for i in twin.encode(secret, add_special_tokens=add).ids]

    def _unwritable(self) -> str:
        return (
            "a message's text spells a control token that this tokenizer cannot write as text; remove it from the "
            f"text (control tokens: {', '.join(sorted(self._control)[:20])})"
        )

    def _has_bos(self, text: str) -> bool:
        bos = self.tokenizer.names.get("bos_token")
        return bos is not None and text.startswith(bos)

    def _steering(self, ids: Iterable[int]) -> list[int]:
        known = set(self._control.values())
        return [i for i in ids if i in known]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self._control, key=len, reverse=True))))  # the longest wins

    @cached_property
    def _twin(self) -> tuple[Backend, dict[str, str], dict[int, int]]:
        """The tokenizer with its control tokens renamed, the names, and the way back from its ids.

        `Tokenizer.encode_special_tokens` is no substitute: it hides the template's tokens along with the user's, and
        leaves added tokens visible that are not flagged special.
        """
        aliases = {t: "".join(chr(0x100000 + secrets.randbelow(0xFFFD)) for _ in range(8)) for t in self._control}
        state = json.loads(self.tokenizer.backend.to_str())
        for token in state["added_tokens"]:
            token["content"] = aliases.get(token["content"], token["content"])
        # In the model's vocabulary too: it may hold the whole string as a piece.
        vocab = state["model"]["vocab"]
        if isinstance(vocab, dict):
            state["model"]["vocab"] = {aliases.get(piece, piece): index for piece, index in vocab.items()}
        else:
            state["model"]["vocab"] = [[aliases.get(piece, piece), *rest] for piece, *rest in vocab]
        try:
            twin = Backend.from_str(json.dumps(state))
        except Exception as exc:  # the library raises plain Exception
            raise PromptError(f"text with control tokens cannot be shielded with this tokenizer: {exc}; remove them") from exc
        ids = {token: twin.token_to_id(alias) for token, alias in aliases.items()}
        return twin, aliases, {index: self._control[token] for token, index in ids.items() if index is not None}

    def expand(self, text: str, ids: list[int], pictures: Sequence[object]) -> Prompt:
        """Every image token becomes the places of its picture. Raises `PromptError` where their numbers differ."""
        wanted = {self.image_token_id: self.image_token} | ({self.video[1]: self.video[0]} if self.video else {})
        found = [token for token in ids if token in wanted]
        if len(found) != len(pictures):
            raise PromptError(
                f"the prompt has {len(found)} places for pictures ({', '.join(wanted.values())}), {len(pictures)} pictures "
                "were given; give one picture per place, and check that the chat template writes a place for each"
            )
        out: list[int] = []
        places: list[tuple[int, int]] = []
        grids: list[tuple[int, int, int]] = []
        rates = tuple(float(picture.fps) if isinstance(picture, Video) else None for picture in pictures)
        for token in ids:
            if token not in wanted:
                out.append(token)
                continue
            number = len(places)
            if (rates[number] is None) != (token == self.image_token_id):
                given = "picture" if rates[number] is None else "video"
                raise PromptError(f"place {number + 1} of the prompt is {wanted[token]}; a {given} was given for it")
            grids.append(self.grid(pictures[number]))
            length = math.prod(grids[-1])
            out += self.around[0]
            places.append((len(out), length))
            out += [token] * length
            out += self.around[1]
        return Prompt(out, tuple(places), text, grids=tuple(grids), rates=rates)


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable Latin-1 stands for itself, other bytes follow from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


_BYTES = _byte_of_character()
_FALLBACK_BYTE = re.compile(r"<0x..>", re.DOTALL)


class TextStream:
    """Ids in, text out, as soon as it is certain: the pieces add up to `Tokenizer.decode` of all ids.

    Each id costs a constant amount of work. `tokenizers.decoders.DecodeStream` does not serve: it has no flush, so an
    unfinished character is lost, and it gives text away that changes later (decoding byte-fallback "<0x41>" alone is
    "A", followed by "<0xFF>" it is two replacement characters). So a run of fallback bytes is held until it ends.
    Three ways, by the tokenizer's decoder: byte-level ones are an incremental UTF-8 decoder; SentencePiece-like ones
    are decoded token by token behind an anchor token, since they treat the first token in its own way; with any other
    decoder (WordPiece, CTC, …) the text comes at the end.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """A stream is for one answer."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._added = tokenizer.backend.get_added_tokens_decoder()
        steps = _decoder_steps(tokenizer.backend)
        self._utf8 = None
        if [step["type"] for step in steps] == ["ByteLevel"]:
            self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._anchor = _anchor(tokenizer) if _is_local(steps) else None
        self._started = False  # whether there was text: until then, the ids so far are decoded together
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that is now certain, "" while a character or the like is undecided."""
        token = self._tokenizer.backend.id_to_token(token_id)
        if token is None or (self._skip and token_id in self._added and self._added[token_id].special):
            return ""  # as decode does, before the decoder sees it
        if self._utf8 is not None:
            known = all(c in _BYTES for c in token)
            return self._utf8.decode(bytes(_BYTES[c] for c in token) if known else token.encode())
        self._held.append(token_id)
        if self._anchor is None or _FALLBACK_BYTE.fullmatch(token):
            return ""
        return self._release(self._anchor)

    def finish(self) -> str:
        """The rest."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        return self._release(self._anchor)

    def _release(self, anchor: tuple[int, str] | None) -> str:
        if not self._started or anchor is None:
            text = self._decode(self._held)
            if text:
                self._started, self._held = True, []
            return text
        text = self._decode([anchor[0], *self._held])[len(anchor[1]) :]
        self._held = []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def _decoder_steps(backend: Backend) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    steps = [json.loads(backend.decoder.__getstate__())]
    while any(step["type"] == "Sequence" for step in steps):
        steps = [inner for step in steps for inner in (step["decoders"] if step["type"] == "Sequence" else [step])]
    return steps


def _is_local(steps: list[dict[str, Any]]) -> bool:
    """Whether, after the first text, a token's text depends on no other than the fallback bytes next to it."""
    fused = False
    for step in steps:
        kind = step["type"]
        if kind not in ("Replace", "ByteFallback", "Fuse", "Metaspace", "Strip"):
            return False
        if fused and kind != "Fuse" and (kind != "Strip" or step["stop"]):
            return False  # works on the text as a whole, beyond its first characters
        fused = fused or kind == "Fuse"
    return True


def _anchor(tokenizer: Tokenizer) -> tuple[int, str] | None:
    """A token whose text is a plain word at the start, so that decoding behind it shows what others add."""
    added = tokenizer.backend.get_added_tokens_decoder()
    for index in range(tokenizer.backend.get_vocab_size()):
        token = tokenizer.backend.id_to_token(index)
        if token is not None and index not in added and token.isascii() and token.isalnum():
            text = tokenizer.decode([index])
            if text and text == text.strip():
                return index, text
    return None
