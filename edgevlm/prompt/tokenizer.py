"""A checkpoint's tokenizer, and generated ids as text that streams."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from ..errors import IntegrityError

__all__ = ["TextStream", "Tokenizer", "read_json"]


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
        config = read_json(folder / "tokenizer_config.json")
        every = {**read_json(folder / "special_tokens_map.json"), **config}
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


def _content(token: object) -> str | None:
    """A special token is written as a string or as an object with its flags."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) and found else None


def read_json(file: Path) -> dict[str, Any]:
    """A file's object, empty where there is no file. Raises IntegrityError."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise IntegrityError(f"{file} cannot be read as JSON: {exc}; copy the checkpoint again") from exc
    if not isinstance(found, dict):
        raise IntegrityError(f"{file} holds a {type(found).__name__}, expected a JSON object; copy the checkpoint again")
    return found


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
