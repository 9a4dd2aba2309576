"""What an evaluation is made of: items that are asked, answers, and what they come to. Data only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..scenes import Scene

__all__ = ["Answer", "Item", "Outcome", "Picture", "Subject"]

#: A file, a scene that is drawn when it is asked about, or the picture itself.
Picture = Path | Scene | Image.Image


@dataclass(frozen=True)
class Item:
    """One question. `id` is unique in its suite and stays the same from run to run; `references` are the right answers (one of
    an exact suite, ten of VQA, the captions of COCO); `kind` groups items in tables."""

    id: str
    prompt: str
    pictures: Sequence[Picture]
    references: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class Answer:
    """What a subject said to an item. `first_token` in milliseconds from the call, `seconds` for the whole answer. `reused`: a
    picture of it was just seen with another question, which a bundle need not look at again; first tokens come sooner then."""

    id: str
    text: str
    first_token: float
    seconds: float
    tokens: int
    reused: bool = False


@dataclass(frozen=True)
class Subject:
    """Who is asked: a bundle, or the PyTorch model (`kind` "bundle" or "torch"). `size`: bytes of its weights on disk."""

    name: str
    source: str
    kind: str
    size: int
    recipe: str = ""


@dataclass(frozen=True)
class Outcome:
    """A subject's answers to a suite, by item; `scores` of each item (0 to 1; CIDEr's go to 10); `metrics` of all, the one to
    judge by first, in the units that its literature uses (percent, CIDEr times 100)."""

    subject: Subject
    suite: str
    answers: Mapping[str, Answer]
    scores: Mapping[str, float]
    metrics: Mapping[str, float]
    by_kind: Mapping[str, float] = field(default_factory=dict)
