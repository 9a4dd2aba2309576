"""Scores on scenes alone, for models that were trained on them: exact match by kind, with worked examples before a question,
and what a blind answer would reach."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..scenes import KINDS, SPLITS, Question, Scene, ask, ask_all, render_scene, sample_scene
from ..vlm import VLM
from .metrics import is_exact

__all__ = ["Score", "blind_answers", "score_answers", "score_scenes", "worked_examples"]

#: Scenes, from the first one of the split on, that the shipped models were trained on.
_TRAINED = 48_000


@dataclass(frozen=True)
class Score:
    """Right answers and questions, by kind."""

    right: dict[str, int]
    asked: dict[str, int]

    def percent(self, kind: str | None = None) -> float:
        """Exact match in percent, of one kind or of all questions."""
        right = self.right[kind] if kind else sum(self.right.values())
        asked = self.asked[kind] if kind else sum(self.asked.values())
        return 100 * right / asked if asked else float("nan")


def score_answers(pairs: Iterable[tuple[Question, str]]) -> Score:
    """Exact match, apart from blanks around the answer."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for question, answer in pairs:
        asked[question.kind] += 1
        right[question.kind] += is_exact(answer, [question.answer])
    return Score({kind: right[kind] for kind in asked}, dict(asked))


def score_scenes(
    vlm: VLM,
    questions: Iterable[tuple[Scene, Question]],
    *,
    side: int = 224,
    shots: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Score:
    """Asks a model about pictures of `side` pixels on their shorter side, one question at a time, greedily.

    With `shots`, as many training scenes with a question and its answer come before, as earlier turns of a chat; which
    ones depends on the question's number alone.
    """

    def answers() -> Iterable[tuple[Question, str]]:
        shown, picture = None, None
        for number, (scene, question) in enumerate(questions):
            if scene is not shown:
                shown, picture = scene, render_scene(scene, side)
            if shots:
                chat = [turn for example in worked_examples(number, shots) for turn in _turns(*example, side)]
                reply = vlm.generate(messages=[*chat, _ask(picture, question.text)], max_new_tokens=48)
            else:
                reply = vlm.generate(question.text, images=[picture], max_new_tokens=48)
            yield question, reply.text
            step()

    return score_answers(answers())


def worked_examples(number: int, shots: int) -> list[tuple[Scene, Question]]:
    """Scenes that the shipped models were trained on, each with a question of a kind drawn at random, for question `number`.
    More shots begin with the same ones."""
    examples: list[tuple[Scene, Question]] = []
    rng = random.Random(f"shots {number}")
    while len(examples) < shots:
        scene = sample_scene(SPLITS["train"].start + rng.randrange(_TRAINED))
        question = ask(scene, rng.choice(KINDS), rng)
        if question is not None:
            examples.append((scene, question))
    return examples


def _turns(scene: Scene, question: Question, side: int) -> list[dict[str, Any]]:
    return [_ask(render_scene(scene, side), question.text), {"role": "assistant", "content": question.answer}]


def _ask(picture: Any, text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}


def blind_answers(
    questions: Iterable[tuple[Scene, Question]], scenes: int = 3000, aspect: str = "square"
) -> Iterable[tuple[Question, str]]:
    """The most frequent answer to the same words over training scenes of an aspect, or, where they never came up, to that
    kind."""
    by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    order = list(SPLITS["train"][:scenes])
    random.Random(0).shuffle(order)
    for seed in order:
        for question in ask_all(sample_scene(seed, aspect)):
            by_text[question.text][question.answer] += 1
            by_kind[question.kind][question.answer] += 1
    for _, question in questions:
        known = by_text.get(question.text) or by_kind[question.kind]
        yield question, known.most_common(1)[0][0]
