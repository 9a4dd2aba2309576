"""A checkpoint's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import IntegrityError, PromptError
from .request import Message, TextPart, Video
from .tokenizer import read_json

__all__ = ["ChatTemplate"]


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
            found = read_json(folder / name).get("chat_template")
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
