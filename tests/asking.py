"""A loaded model under observation: what its parts are given, and what its tokens are chosen from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevlm.models import family_for_config
from edgevlm.prompt import ChatTemplate, Prompt, PromptBuilder, Tokenizer, normalize_request
from edgevlm.vlm import VLM, Reply


def picture(seed: int, width: int = 41, height: int = 33) -> Image.Image:
    """Blocks of colour, so that resizing leaves something to see."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def load(folder: Path, *, endless: bool = True, **options: Any) -> VLM:
    """A new model; `endless` ones do not stop by themselves, so that there is something to compare."""
    vlm = VLM.load(folder, threads=1, **options)
    if endless:
        vlm._stop = frozenset()
    return vlm


def watch(vlm: VLM, part: str) -> list[dict[str, np.ndarray]]:
    """What the part is given from now on, run by run."""
    session, runs = vlm._sessions[part], []
    run = session.run

    def watched(feeds: dict[str, np.ndarray], *held: Any) -> dict[str, np.ndarray]:
        runs.append(dict(feeds))
        return run(feeds, *held)

    session.run = watched  # type: ignore[method-assign]
    return runs


def logits_of(vlm: VLM, **asked: Any) -> tuple[Reply, np.ndarray]:
    """A reply, and what each of its tokens was chosen from, `[tokens, vocabulary]`.

    Tiny random models often give one answer to two pictures; their logits tell the pictures apart.
    """
    session, seen = vlm._sessions["decoder"], []
    run = session.run

    def watched(feeds: dict[str, np.ndarray], *held: Any) -> dict[str, np.ndarray]:
        out = run(feeds, *held)
        seen.append(out["logits"][0, 0].astype(np.float64))
        return out

    session.run = watched  # type: ignore[method-assign]
    try:
        reply = vlm.generate(**asked)
    finally:
        session.run = run  # type: ignore[method-assign]
    return reply, np.stack(seen[-len(reply.tokens) :])  # a prompt in several chunks has several before the first token


def differ(first: np.ndarray, second: np.ndarray) -> float:
    """How far the logits before the first token are apart."""
    return float(np.abs(first[0] - second[0]).max())


def image_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image", "image": image}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


class Runs:
    """How often each part ran since the last look."""

    def __init__(self, vlm: VLM) -> None:
        self._lists = {part: watch(vlm, part) for part in vlm._sessions}

    def __call__(self) -> dict[str, int]:
        counts = {part: len(runs) for part, runs in self._lists.items() if runs}
        for runs in self._lists.values():
            runs.clear()
        return counts


@contextmanager
def failing(vlm: VLM, part: str, after: int = 0) -> Iterator[None]:
    """The part raises KeyboardInterrupt, as an interrupt from the keyboard would, once it ran `after` times."""
    session, ran = vlm._sessions[part], 0
    run = session.run

    def interrupted(*given: Any) -> dict[str, np.ndarray]:
        nonlocal ran
        ran += 1
        if ran > after:
            raise KeyboardInterrupt
        return run(*given)

    session.run = interrupted  # type: ignore[method-assign]
    try:
        yield
    finally:
        session.run = run  # type: ignore[method-assign]


def prompts_of(checkpoint: Path, template: str | None = None) -> Callable[..., Prompt]:
    """Builds prompts as a model of this checkpoint would, which need not be exported for it."""
    from transformers import AutoConfig

    _, family = family_for_config(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    manifest = family.describe(checkpoint, AutoConfig.from_pretrained(checkpoint), "float32")
    tokenizer, image = Tokenizer.from_folder(checkpoint), manifest.image
    chat = ChatTemplate(template, tokenizer.names) if template else ChatTemplate.from_folder(checkpoint, tokenizer.names)
    reader = Tokenizer.from_folder(checkpoint / "qformer_tokenizer") if manifest.instruction_length else None
    builder = PromptBuilder(tokenizer, chat, image.token, image.token_id, lambda _: (1, 1, image.places), reader)
    return lambda *asked, **more: family.build_prompt(builder, manifest, normalize_request(*asked, **more))
