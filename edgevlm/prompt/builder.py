"""Ids for a request, with places for its pictures."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from ..errors import ManifestError, PromptError
from .request import Message, Request, TextPart, Video
from .template import ChatTemplate
from .tokenizer import Tokenizer

__all__ = ["Prompt", "PromptBuilder"]


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
