"""Scenes: the same seed gives the same scene, and every answer is the one that an independent reading of the words finds."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.scenes import (
    ASPECTS,
    COLOURS,
    KINDS,
    SHAPES,
    SIZES,
    SPLITS,
    Question,
    Scene,
    SceneObject,
    ask,
    ask_all,
    heldout_questions,
    render_mask,
    render_scene,
    sample_scene,
)

SEEDS = st.integers(0, 12_000_000)
ANY_ASPECT = st.sampled_from(list(ASPECTS))
NUMBER_WORDS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}


# The oracle: it knows English words and the objects, and nothing of how the questions are made.


def meant(scene: Scene, phrase: str) -> list[SceneObject]:
    """The objects that a phrase such as "large red cube", "red object" or "balls" fits."""
    found = list(scene.objects)
    for word in phrase.split():
        word = word if word in (*COLOURS, *SIZES) else word.removesuffix("s")
        assert word in (*COLOURS, *SIZES, *SHAPES, "object"), f"no such word: {word!r} in {phrase!r}"
        if word != "object":
            found = [o for o in found if word in (o.colour, o.size, o.shape)]
    return found


def the(scene: Scene, phrase: str) -> SceneObject:
    found = meant(scene, phrase)
    assert len(found) == 1, f"'the {phrase}' fits {len(found)} objects of scene {scene.seed}"
    return found[0]


def words(pattern: str, text: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, text)
    assert match, f"{text!r} is not of the form {pattern!r}"
    return match.groups()


def right_answer(scene: Scene, question: Question) -> str:
    text = question.text
    if question.kind == "existence":
        (phrase,) = words(r"(?:Is there|Do you see) a (\w+ \w+)\?", text)
        return "yes" if meant(scene, phrase) else "no"
    if question.kind == "colour":
        (phrase,) = words(r"What colou?r is the ([\w ]+)\?", text)
        return the(scene, phrase).colour
    if question.kind == "shape":
        (phrase,) = words(r"What shape is the ([\w ]+)\?", text)
        return the(scene, phrase).shape
    if question.kind == "size":
        (phrase,) = words(r"(?:What size|How big) is the ([\w ]+)\?", text)
        return the(scene, phrase).size
    if question.kind == "count":
        (phrase,) = words(r"How many ([\w ]+?)(?: are there| do you see)?\?", text)
        return {n: word for word, n in NUMBER_WORDS.items()}[len(meant(scene, phrase))]
    if question.kind == "relation":
        first, relation, second = words(r"Is the ([\w ]+?) (left of|right of|above|below) the ([\w ]+)\?", text)
        a, b = the(scene, first), the(scene, second)
        assert a != b
        dx, dy = (b.x - a.x) / scene.width, (b.y - a.y) / scene.height
        assert abs(dx if relation in ("left of", "right of") else dy) > 0.05, "too close to call"
        return "yes" if {"left of": dx > 0, "right of": dx < 0, "above": dy > 0, "below": dy < 0}[relation] else "no"
    if question.kind == "position":
        (phrase,) = words(r"Where is the ([\w ]+)\?", text)
        obj = the(scene, phrase)
        x, y = obj.x / scene.width, obj.y / scene.height
        assert min(abs(x - 0.5), abs(y - 0.5)) > 0.05, "too close to the middle"
        return ("top " if y < 0.5 else "bottom ") + ("left" if x < 0.5 else "right")
    assert question.kind == "caption"
    assert text in ("Describe the scene.", "What is in the picture?")
    rank = {word: place for place, word in enumerate((*COLOURS, *SHAPES))}
    said = [f"a {o.size} {o.colour} {o.shape}" for o in sorted(scene.objects, key=lambda o: (rank[o.colour], rank[o.shape]))]
    listed = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    return listed[0].upper() + listed[1:] + "."


@settings(max_examples=300, deadline=None)
@given(SEEDS, ANY_ASPECT)
def test_every_answer_is_right(seed: int, aspect: str) -> None:
    scene = sample_scene(seed, aspect)
    questions = ask_all(scene)
    assert questions, "a scene without any question"
    for question in questions:
        assert question.answer == right_answer(scene, question), question


@settings(max_examples=200, deadline=None)
@given(SEEDS, ANY_ASPECT, st.sampled_from(KINDS), st.integers(0, 2**32))
def test_every_drawn_question_is_unambiguous(seed: int, aspect: str, kind: str, draw: int) -> None:
    scene = sample_scene(seed, aspect)
    question = ask(scene, kind, random.Random(draw))
    if question is not None:
        assert question.kind == kind
        assert question.answer == right_answer(scene, question)


def test_the_oracle_notices_a_wrong_answer() -> None:
    scene = sample_scene(7)
    for question in ask_all(scene):
        other = "no" if question.answer == "yes" else "yes"
        assert right_answer(scene, Question(question.kind, question.text, other)) != other


@settings(max_examples=100, deadline=None)
@given(SEEDS, ANY_ASPECT)
def test_the_same_seed_gives_the_same_scene_and_questions(seed: int, aspect: str) -> None:
    assert sample_scene(seed, aspect) == sample_scene(seed, aspect)
    assert ask_all(sample_scene(seed, aspect)) == ask_all(sample_scene(seed, aspect))


def test_square_scenes_stay_what_they_are() -> None:
    """The shipped models were trained and scored on them."""
    digest = hashlib.sha256()
    for seed in (0, 1, 2, 11_000_000):
        scene = sample_scene(seed)
        assert (scene.width, scene.height) == (1.0, 1.0)
        assert scene == sample_scene(seed, "square")
        digest.update(repr([vars(o) for o in scene.objects]).encode())
        digest.update(repr(ask_all(scene)).encode())
    assert digest.hexdigest() == "a390e818df52016c396c39258ae8b0d02a18f92fdfa4623fc402e3b237e1ce22"


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_aspects_are_what_they_are_called(seed: int) -> None:
    wide, tall = sample_scene(seed, "wide"), sample_scene(seed, "tall")
    assert 1.5 <= wide.width <= 3.0
    assert 1.5 <= tall.height <= 3.0
    assert wide.height == tall.width == 1.0
    assert wide.pixels(224) == (round(224 * wide.width), 224)
    assert tall.pixels(224) == (224, round(224 * tall.height))


def test_things_are_all_over_a_wide_picture() -> None:
    places = [o.x / scene.width for scene in (sample_scene(seed, "wide") for seed in range(200)) for o in scene.objects]
    counts, _ = np.histogram(places, 4, (0, 1))
    assert counts.min() > 0.15 * len(places)


@settings(max_examples=100, deadline=None)
@given(SEEDS, ANY_ASPECT)
def test_a_scene_is_one_that_can_be_asked_about(seed: int, aspect: str) -> None:
    scene = sample_scene(seed, aspect)
    assert 1 <= len(scene.objects) <= 4
    assert len({(o.shape, o.colour) for o in scene.objects}) == len(scene.objects)
    for o in scene.objects:
        assert o.shape in SHAPES
        assert o.colour in COLOURS
        assert o.size in SIZES
        assert o.radius < o.x < scene.width - o.radius
        assert o.radius < o.y < scene.height - o.radius
    radii = {size: [o.radius for o in scene.objects if o.size == size] for size in SIZES}
    if all(radii.values()):
        assert max(radii["small"]) < min(radii["large"])


@settings(max_examples=12, deadline=None)
@given(SEEDS, ANY_ASPECT, st.sampled_from((1, 33, 112, 224)))
def test_the_same_seed_gives_the_same_picture(seed: int, aspect: str, size: int) -> None:
    scene = sample_scene(seed, aspect)
    picture = render_scene(scene, size)
    assert (picture.mode, picture.size) == ("RGB", scene.pixels(size))
    assert min(picture.size) == size
    assert picture.tobytes() == render_scene(sample_scene(seed, aspect), size).tobytes()


def test_other_seeds_give_other_pictures() -> None:
    assert len({render_scene(sample_scene(seed), 48).tobytes() for seed in range(20)}) == 20


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("size", [48, 224, 336])
def test_the_mask_shows_each_object_where_it_is(size: int, aspect: str) -> None:
    for seed in range(40):
        scene = sample_scene(seed, aspect)
        mask = render_mask(scene, size)
        assert (mask.shape[::-1], mask.dtype) == (scene.pixels(size), np.uint8)
        # Neighbours may hide a part of an object, never all of it.
        assert set(np.unique(mask)) == set(range(len(scene.objects) + 1))
        ys, xs = (np.indices(mask.shape) + 0.5) / size
        for number, obj in enumerate(scene.objects, 1):
            shown = mask == number
            away = np.hypot(xs - obj.x, ys - obj.y)[shown]
            assert away.max() <= 1.35 * obj.radius + 1.5 / size
        front = scene.objects[-1]
        assert mask[int(front.y * size), int(front.x * size)] == len(scene.objects)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_the_mask_agrees_with_the_picture(aspect: str) -> None:
    """Pixels of the mask have their object's colour: the channel pattern is that of its name."""
    patterns = {  # which channels are high
        "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "purple": (1, 0, 1), "white": (1, 1, 1),
    }  # fmt: skip
    seen = Counter()
    for seed in range(60):
        scene = sample_scene(seed, aspect)
        pixels, mask = np.asarray(render_scene(scene, 160), np.float64), render_mask(scene, 160)
        table = np.median(pixels[mask == 0], axis=0)
        for number, obj in enumerate(scene.objects, 1):
            inside = np.median(pixels[mask == number], axis=0)
            bright = inside / inside.max()
            if obj.colour == "white":
                assert bright.min() > 0.75, (seed, obj)
                assert inside.mean() > table.mean() + 30, (seed, obj)
            else:
                high = np.array(patterns[obj.colour], bool)
                assert inside[high].min() > 1.2 * inside[~high].max(), (seed, obj, inside)
            seen[obj.colour] += 1
    assert set(seen) == set(COLOURS)


def test_splits_share_no_scene() -> None:
    names = list(SPLITS)
    assert {"train", "validation", "test"} == set(names)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = SPLITS[first], SPLITS[second]
            assert a.stop <= b.start or b.stop <= a.start


@pytest.mark.parametrize(
    ("split", "aspect"), [("test", "square"), ("test", "wide"), ("test", "tall"), ("validation", "square")]
)
def test_held_out_questions_are_of_their_split_and_evenly_spread(split: str, aspect: str) -> None:
    drawn = list(heldout_questions(1000, split, aspect))
    assert Counter(question.kind for _, question in drawn) == dict.fromkeys(KINDS, 125)
    assert all(scene.seed in SPLITS[split] for scene, _ in drawn)
    assert all(scene == sample_scene(scene.seed, aspect) for scene, _ in drawn[:20])
    assert drawn == list(heldout_questions(1000, split, aspect))
    assert len({(scene.seed, question.text) for scene, question in drawn}) == 1000


@pytest.mark.parametrize("count", [0, 1, 11, 16])
def test_any_number_of_held_out_questions(count: int) -> None:
    drawn = Counter(question.kind for _, question in heldout_questions(count))
    assert sum(drawn.values()) == count
    assert max(drawn.values(), default=0) - min(drawn.values(), default=0) <= 1


@pytest.mark.parametrize("aspect", ASPECTS)
def test_the_answers_are_spread(aspect: str) -> None:
    """No kind has an answer that blind guessing would live on."""
    by_kind = {kind: Counter() for kind in KINDS}
    for _, question in heldout_questions(1000, aspect=aspect):
        by_kind[question.kind][question.answer] += 1
    for kind, answers in by_kind.items():
        assert len(answers) > 1
        assert answers.most_common(1)[0][1] < 0.7 * answers.total(), kind
