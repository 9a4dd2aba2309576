"""Procedural table-top scenes with questions that have exactly one right answer.

A scene is a handful of coloured objects on a table, drawn by Pillow from a seed: the same seed gives the same
objects, picture and questions on every machine. It serves as training, calibration and evaluation data where no
data set can be downloaded.

    >>> scene = sample_scene(seed=7)
    >>> picture = render_scene(scene, 224)          # PIL image, RGB
    >>> for question in ask_all(scene): print(question.text, question.answer)

Coordinates are in units of the picture's shorter side, x to the right and y downwards: a square scene is the unit
square. Scenes may also be wide or tall (`ASPECTS`), drawn from the same seeds. The module knows nothing of models.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

__all__ = [
    "ASPECTS",
    "COLOURS",
    "KINDS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "Question",
    "Scene",
    "SceneObject",
    "ask",
    "ask_all",
    "heldout_questions",
    "render_mask",
    "render_scene",
    "sample_scene",
]

SHAPES = ("cube", "ball", "cone", "star")
SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
KINDS = ("existence", "colour", "shape", "size", "count", "relation", "position", "caption")
NUMBERS = ("zero", "one", "two", "three", "four")

#: How much longer the longer side is, at least and at most, by the name of a scene's aspect.
ASPECTS = {"square": (1.0, 1.0), "wide": (1.5, 3.0), "tall": (1.5, 3.0)}

#: Seeds by purpose. `validation` may be used to choose something, `test` never.
SPLITS = {
    "train": range(10_000_000),
    "validation": range(10_000_000, 11_000_000),
    "test": range(11_000_000, 12_000_000),
}

_RGB = {
    "red": (205, 45, 40),
    "green": (45, 160, 60),
    "blue": (45, 80, 205),
    "yellow": (230, 205, 50),
    "purple": (140, 55, 165),
    "white": (235, 235, 235),
}
_TABLES = ((120, 95, 70), (105, 105, 110), (140, 120, 95), (85, 95, 100))
_RADIUS = {"small": (0.086, 0.110), "large": (0.148, 0.180)}
#: Centres are at least this share of the summed radii apart: neighbours may hide a part of each other, never all.
_SPACING = 0.82
#: Closer than this share of the side to the middle line, or to each other along an axis, nobody would call it left or right.
_MARGIN_POSITION = 0.0625
_MARGIN_RELATION = 0.094


@dataclass(frozen=True)
class SceneObject:
    """One object: its centre and radius (in units of the picture's shorter side) and rotation (radians)."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    rotation: float


@dataclass(frozen=True)
class Scene:
    """Objects from back to front; `seed` also fixes table, light and noise of the picture. The shorter side is 1 long."""

    seed: int
    objects: tuple[SceneObject, ...]
    width: float = 1.0
    height: float = 1.0

    def pixels(self, size: int) -> tuple[int, int]:
        """Width and height of its picture, of which the shorter side has `size` pixels."""
        return round(self.width * size), round(self.height * size)


@dataclass(frozen=True)
class Question:
    """A question about a scene, its kind (one of `KINDS`) and its only right answer."""

    kind: str
    text: str
    answer: str


def sample_scene(seed: int, aspect: str = "square") -> Scene:
    """Draws one to four objects, no two of the same shape and colour, on a table of an aspect (one of `ASPECTS`)."""
    rng = random.Random(f"scene {seed}" if aspect == "square" else f"{aspect} scene {seed}")
    width = height = 1.0
    if aspect != "square":
        longer = rng.uniform(*ASPECTS[aspect])
        width, height = (longer, 1.0) if aspect == "wide" else (1.0, longer)
    wanted = rng.choices((1, 2, 3, 4), (1, 2, 3, 3))[0]
    objects: list[SceneObject] = []
    for _ in range(200):
        if len(objects) == wanted:
            break
        shape, colour, size = rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIZES)
        # Equal shapes and colours side by side make counting and referring worth asking about.
        if objects and rng.random() < 0.35:
            shape = objects[-1].shape
        if objects and rng.random() < 0.2:
            colour = objects[-1].colour
        radius = rng.uniform(*_RADIUS[size])
        x, y = (rng.uniform(radius + 0.016, side - radius - 0.016) for side in (width, height))
        rotation = rng.uniform(-0.25, 0.25)
        if any((o.shape, o.colour) == (shape, colour) for o in objects):
            continue
        if any(math.hypot(x - o.x, y - o.y) < _SPACING * (radius + o.radius) for o in objects):
            continue
        objects.append(SceneObject(shape, colour, size, x, y, radius, rotation))
    return Scene(seed, tuple(objects), width, height)


# ------------------------------------------------------------------------------------------------ pictures


def _outline(obj: SceneObject) -> list[tuple[float, float]]:
    """The corners of a cube, cone or star."""
    r = obj.radius
    if obj.shape == "cube":
        k = 0.88 * r
        points = [(-k, -k), (k, -k), (k, k), (-k, k)]
    elif obj.shape == "cone":
        points = [(0.0, -r), (0.95 * r, 0.85 * r), (-0.95 * r, 0.85 * r)]
    else:
        arms = [(1.08 * r if i % 2 == 0 else 0.45 * r, i * math.pi / 5) for i in range(10)]
        points = [(arm * math.sin(angle), -arm * math.cos(angle)) for arm, angle in arms]
    cos, sin = math.cos(obj.rotation), math.sin(obj.rotation)
    return [(obj.x + a * cos - b * sin, obj.y + a * sin + b * cos) for a, b in points]


def _between(a: tuple[float, float], b: tuple[float, float], share: float) -> tuple[float, float]:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share


def _disc(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    return [(x - radius, y - radius), (x + radius, y + radius)]


def render_scene(scene: Scene, size: int = 224) -> Image.Image:
    """The scene as an RGB picture, `size` pixels on its shorter side, with shadows, shading, uneven light and sensor noise."""
    rng = random.Random(f"picture {scene.seed}")
    width, height = scene.pixels(size)
    scale = 2 * size  # drawn twice as large, then averaged: Pillow's shapes have no smooth edges

    def px(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * scale, y * scale) for x, y in points]

    brightness = rng.randint(-12, 12)
    table = tuple(channel + brightness for channel in rng.choice(_TABLES))
    canvas = Image.new("RGB", (2 * width, 2 * height), table)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(2, 5)):  # the grain of the table
        y, shade = rng.random() * scene.height, rng.randint(-10, 10)
        grain = tuple(channel + shade for channel in table)
        end = (scene.width, y + rng.uniform(-0.06, 0.06))
        draw.line(px([(0, y), end]), grain, max(1, round(rng.uniform(0.006, 0.026) * size)))

    for obj in scene.objects:
        x, y, r = obj.x, obj.y, obj.radius
        colour = tuple(max(0, min(255, channel + rng.randint(-18, 18))) for channel in _RGB[obj.colour])
        dark = tuple(int(0.7 * channel) for channel in colour)
        light = tuple(min(255, int(1.15 * channel + 15)) for channel in colour)
        shadow = tuple(int(0.75 * channel) for channel in table)
        draw.ellipse(px([(x - r, y + 0.55 * r), (x + 1.1 * r, y + 1.1 * r)]), shadow)
        if obj.shape == "ball":
            draw.ellipse(px(_disc(x, y, r)), colour)
            draw.ellipse(px(_disc(x - 0.35 * r, y - 0.35 * r, 0.35 * r)), light)
            continue
        corners = _outline(obj)
        draw.polygon(px(corners), colour)
        if obj.shape == "cube":  # the side face
            draw.polygon(
                px([corners[1], corners[2], _between(corners[2], corners[3], 0.25), _between(corners[1], corners[0], 0.25)]),
                dark,
            )
        elif obj.shape == "cone":
            draw.polygon(px([corners[0], corners[1], _between(corners[1], corners[2], 1 / 3)]), dark)

    pixels = np.asarray(canvas.reduce(2), np.float32)
    across, down = (np.linspace(-1, 1, side, dtype=np.float32) for side in (width, height))
    light_field = 1 + rng.uniform(-0.12, 0.12) * across[None, :] + rng.uniform(-0.12, 0.12) * down[:, None]
    noise = np.random.default_rng(scene.seed).standard_normal((height, width, 1), dtype=np.float32)
    pixels = pixels * light_field[..., None] * rng.uniform(0.88, 1.1) + noise * rng.uniform(1, 6)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def render_mask(scene: Scene, size: int) -> np.ndarray:
    """Which object each pixel of the picture shows: uint8 `[height, width]`, 0 is the table, `n` is `scene.objects[n - 1]`."""
    mask = Image.new("L", scene.pixels(size), 0)
    draw = ImageDraw.Draw(mask)
    for number, obj in enumerate(scene.objects, 1):
        if obj.shape == "ball":
            draw.ellipse([(a * size, b * size) for a, b in _disc(obj.x, obj.y, obj.radius)], number)
        else:
            draw.polygon([(a * size, b * size) for a, b in _outline(obj)], number)
    return np.asarray(mask)


# ----------------------------------------------------------------------------------------------- questions


def _describe(obj: SceneObject) -> str:
    return f"{obj.size} {obj.colour} {obj.shape}"


def _refer(obj: SceneObject, scene: Scene, rng: random.Random) -> str:
    """A phrase that fits this object of the scene and no other."""
    phrases = [f"{obj.colour} {obj.shape}"]
    if sum(o.shape == obj.shape for o in scene.objects) == 1:
        phrases.append(obj.shape)
    if sum(o.colour == obj.colour for o in scene.objects) == 1:
        phrases.append(f"{obj.colour} object")
    return rng.choice(phrases)


def _ask_existence(scene: Scene, obj: SceneObject, rng: random.Random) -> Question:
    by_size = rng.random() < 0.3
    present = rng.random() < 0.5

    def things(o: SceneObject) -> tuple[str, str]:
        return (o.size if by_size else o.colour), o.shape

    have = {things(o) for o in scene.objects}
    adjective, shape = things(obj)
    if not present:
        adjectives = SIZES if by_size else COLOURS
        missing = [(a, s) for a in adjectives for s in SHAPES if (a, s) not in have]
        # Half right is the hard case: the colour is there on another shape, or the shape in another colour.
        near = [(a, s) for a, s in missing if a == adjective or s == shape]
        adjective, shape = rng.choice(near or missing)
    stem = rng.choice(("Is there a", "Is there a", "Do you see a"))
    return Question("existence", f"{stem} {adjective} {shape}?", "yes" if present else "no")


def _ask_colour(scene: Scene, obj: SceneObject, rng: random.Random) -> Question | None:
    word = rng.choice(("colour", "colour", "color"))
    if sum(o.shape == obj.shape for o in scene.objects) == 1:
        return Question("colour", f"What {word} is the {obj.shape}?", obj.colour)
    if sum((o.shape, o.size) == (obj.shape, obj.size) for o in scene.objects) == 1:
        return Question("colour", f"What {word} is the {obj.size} {obj.shape}?", obj.colour)
    return None


def _ask_shape(scene: Scene, obj: SceneObject, rng: random.Random) -> Question | None:
    if sum(o.colour == obj.colour for o in scene.objects) > 1:
        return None
    return Question("shape", f"What shape is the {obj.colour} object?", obj.shape)


def _ask_size(scene: Scene, obj: SceneObject, rng: random.Random) -> Question:
    stem = rng.choice(("What size is", "What size is", "How big is"))
    return Question("size", f"{stem} the {_refer(obj, scene, rng)}?", obj.size)


def _ask_count(scene: Scene, obj: SceneObject, rng: random.Random) -> Question:
    what = rng.random()
    if what < 0.2:
        things, number = "objects", len(scene.objects)
    elif what < 0.7:
        shape = obj.shape if rng.random() < 0.8 else rng.choice(SHAPES)
        things, number = f"{shape}s", sum(o.shape == shape for o in scene.objects)
    else:
        colour = obj.colour if rng.random() < 0.8 else rng.choice(COLOURS)
        things, number = f"{colour} objects", sum(o.colour == colour for o in scene.objects)
    tail = rng.choice((" are there?", " are there?", " do you see?", "?"))
    return Question("count", f"How many {things}{tail}", NUMBERS[number])


def _ask_relation(scene: Scene, obj: SceneObject, rng: random.Random) -> Question | None:
    others = [o for o in scene.objects if o is not obj]
    if not others:
        return None
    other = rng.choice(others)
    relation = rng.choice(("left of", "right of", "above", "below"))
    across = relation in ("left of", "right of")
    distance = (other.x - obj.x) / scene.width if across else (other.y - obj.y) / scene.height
    if abs(distance) < _MARGIN_RELATION:
        return None
    holds = (distance > 0) == (relation in ("left of", "above"))
    text = f"Is the {_refer(obj, scene, rng)} {relation} the {_refer(other, scene, rng)}?"
    return Question("relation", text, "yes" if holds else "no")


def _ask_position(scene: Scene, obj: SceneObject, rng: random.Random) -> Question | None:
    dx, dy = obj.x / scene.width - 0.5, obj.y / scene.height - 0.5
    if min(abs(dx), abs(dy)) < _MARGIN_POSITION:
        return None
    answer = f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"
    return Question("position", f"Where is the {_refer(obj, scene, rng)}?", answer)


def _ask_caption(scene: Scene, obj: SceneObject, rng: random.Random) -> Question:
    # In the order of COLOURS, then SHAPES, so that one sentence is the right one.
    ordered = sorted(scene.objects, key=lambda o: (COLOURS.index(o.colour), SHAPES.index(o.shape)))
    phrases = [f"a {_describe(o)}" for o in ordered]
    sentence = ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]
    text = rng.choice(("Describe the scene.", "Describe the scene.", "What is in the picture?"))
    return Question("caption", text, f"A{sentence[1:]}.")


_ASK = {
    "existence": _ask_existence,
    "colour": _ask_colour,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "relation": _ask_relation,
    "position": _ask_position,
    "caption": _ask_caption,
}


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """One random question of a kind, or None where the draw has no unambiguous answer (draw again)."""
    return _ASK[kind](scene, rng.choice(scene.objects), rng)


def ask_all(scene: Scene, tries: int = 10) -> list[Question]:
    """One question of each kind that the scene allows, always the same ones for the same scene."""
    rng = random.Random(f"questions {scene.seed}")
    drawn = (next(filter(None, (ask(scene, kind, rng) for _ in range(tries))), None) for kind in KINDS)
    return [question for question in drawn if question is not None]


def heldout_questions(count: int = 1000, split: str = "test", aspect: str = "square") -> Iterator[tuple[Scene, Question]]:
    """`count` questions over the scenes of a split and an aspect, as many of each kind as of any other.

    Pass a multiple of `len(KINDS)` (8) to have exactly equal shares; a remainder goes to the kinds named first.
    """
    left = {kind: count // len(KINDS) + (position < count % len(KINDS)) for position, kind in enumerate(KINDS)}
    for seed in SPLITS[split]:
        if not any(left.values()):
            return
        scene = sample_scene(seed, aspect)
        for question in ask_all(scene):
            if left[question.kind]:
                left[question.kind] -= 1
                yield scene, question
