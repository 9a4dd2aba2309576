"""Scores: exact match by kind, and answers that need no picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from edgevlm.evaluation.scene_scores import Score, blind_answers, score_answers, score_scenes
from edgevlm.scenes import ASPECTS, KINDS, Question, heldout_questions
from edgevlm.vlm import VLM, Reply, Timings


def test_exact_match_by_kind() -> None:
    count, size = Question("count", "How many?", "two"), Question("size", "How big?", "large")
    score = score_answers([(count, "two"), (count, " two\n"), (count, "Two"), (count, "two cubes"), (size, "large")])
    assert score == Score({"count": 2, "size": 1}, {"count": 4, "size": 1})
    assert (score.percent("count"), score.percent("size"), score.percent()) == (50.0, 100.0, 60.0)


def test_nothing_asked_is_no_score() -> None:
    assert math.isnan(score_answers([]).percent())


def test_right_answers_score_everything() -> None:
    held = list(heldout_questions(16))
    score = score_answers((question, question.answer) for _, question in held)
    assert (score.percent(), score.asked) == (100.0, dict.fromkeys(KINDS, 2))


@pytest.mark.parametrize("aspect", ASPECTS)
def test_blind_answers_are_better_than_nothing_and_far_from_right(aspect: str) -> None:
    held = list(heldout_questions(160, aspect=aspect))
    blind = list(blind_answers(held, scenes=300, aspect=aspect))
    assert [question for question, _ in blind] == [question for _, question in held]
    assert blind == list(blind_answers(held, scenes=300, aspect=aspect))
    score = score_answers(blind)
    assert 20 < score.percent() < 65
    assert score.percent("caption") < 20
    yes_or_no = {answer for question, answer in blind if question.kind == "existence"}
    assert yes_or_no <= {"yes", "no"}


def test_a_model_is_asked_every_question_about_its_picture(bundle: Path) -> None:
    """The random model knows nothing; what it is shown and asked is what counts here."""
    vlm, asked, steps = VLM.load(bundle, threads=1), [], []
    held = list(heldout_questions(8))
    answers = {question.text: question.answer for _, question in held[::2]}

    class Parrot:
        def generate(self, text: str, **options: Any) -> Any:
            reply = vlm.generate(text, images=options["images"], max_new_tokens=1)
            asked.append((text, options["images"][0].size))
            return type(reply)(answers.get(text, "?"), reply.tokens, reply.finish_reason, reply.timings)

    score = score_scenes(Parrot(), held, side=64, step=lambda: steps.append(1))  # type: ignore[arg-type]
    assert asked == [(question.text, (64, 64)) for _, question in held]
    assert len(steps) == sum(score.asked.values()) == 8
    assert sum(score.right.values()) == sum(question.answer == answers.get(question.text) for _, question in held) >= 4


def test_examples_come_before_the_question() -> None:
    """As earlier turns of a chat, each with its picture and its answer; the same ones whenever the question is asked."""
    held = list(heldout_questions(4))

    def chats(shots: int) -> list[Any]:
        given = []

        class Pupil:
            def generate(self, *, messages: Any, max_new_tokens: int) -> Any:
                given.append(messages)
                return Reply("yes", [], "stop", Timings())

        score_scenes(Pupil(), held, side=32, shots=shots)  # type: ignore[arg-type]
        return given

    asked = chats(2)
    for (_, question), turns in zip(held, asked, strict=True):
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
        for turn in turns[::2]:
            picture, text = turn["content"]
            assert picture["image"].size == (32, 32)
            assert text["type"] == "text"
        assert turns[-1]["content"][1]["text"] == question.text
        assert all(isinstance(turn["content"], str) and turn["content"] for turn in turns[1::2])

    def words(chat: Any) -> Any:
        return [turn["content"] if isinstance(turn["content"], str) else turn["content"][1]["text"] for turn in chat]

    assert [words(chat) for chat in chats(2)] == [words(chat) for chat in asked]
    assert len({tuple(words(chat)[:-1]) for chat in asked}) > 1
