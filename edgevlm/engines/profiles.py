"""The shapes that an engine is built for: from a part's dynamic dimensions to TensorRT's optimization profiles.

A decoder has two profiles: `prefill` for the chunks of a prompt, `decode` for up to eight tokens at once. (One of exactly one
token would make TensorRT-RTX keep a second copy of float16 weights.) Every other part has one. It knows the names that the
bundle gives to dimensions, and nothing of TensorRT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..bundle import Manifest, Part
from ..errors import InputError

__all__ = ["CHUNK", "DECODE", "Limits", "Profile", "Range", "limits_for", "profiles_for"]

#: Rows of a prompt that go through the decoder at once, as the runtime cuts it.
CHUNK = 256
#: Rows that the decode profile takes at most.
DECODE = 8
#: Pictures beside a text, where the model reads them there: a question with its own, and as many examples.
_PICTURES = 10
_DEFAULT_CAPACITY = 4096

Range = tuple[int, int, int]
"""The smallest, the most usual and the largest size of a dimension."""


@dataclass(frozen=True)
class Profile:
    """One optimization profile: for each input with a dynamic dimension its smallest, usual and largest shape."""

    name: str
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Limits:
    """What an engine is built for at most: positions of the KV cache, places that a picture takes, rows of a chunk."""

    capacity: int
    visual_tokens: int
    batch: int = 1
    chunk: int = CHUNK


def limits_for(
    manifest: Manifest, *, capacity: int | None = None, visual_tokens: int | None = None, most_tokens: int | None = None
) -> Limits:
    """What was asked for, or the defaults: the context length up to 4,096, and what a picture may take of it.

    `most_tokens` is the most that the bundle's own preprocessing makes of a picture, where it has such a limit. Raises
    InputError for what the model cannot have.
    """
    if capacity is None:
        capacity = min(manifest.context_length, _DEFAULT_CAPACITY)
    if isinstance(capacity, bool) or not isinstance(capacity, int) or not 2 <= capacity <= manifest.context_length:
        raise InputError(
            f"The capacity asked for is {capacity!r}; it is 2 to {manifest.context_length:,}, this model's context length."
        )
    least = max(1, manifest.image.places)
    if visual_tokens is None:
        beside = manifest.cross_attention is not None and manifest.cross_attention.source == "images"
        visual_tokens = max(least, min(most_tokens or capacity, capacity)) if not beside else least
    if isinstance(visual_tokens, bool) or not isinstance(visual_tokens, int) or visual_tokens < least:
        raise InputError(f"The visual tokens asked for are {visual_tokens!r}; a picture takes {least} in this model at least.")
    return Limits(capacity, visual_tokens)


def profiles_for(name: str, part: Part, manifest: Manifest, limits: Limits) -> tuple[Profile, ...]:
    """The profiles of a part; one without shapes where nothing is dynamic. Raises InputError for an unknown dimension."""
    usual = _ranges(manifest, limits)
    if name != "decoder":
        # Tiles of a picture go through what sees nothing but the picture side by side.
        text = {"input_ids", "inputs_embeds"} & set(part.inputs)
        tiles = 1 if text else max(1, limits.visual_tokens // max(1, manifest.image.places)) if manifest.image_options else 1
        return (_profile("all", part, usual | {"batch_size": (1, 1, max(limits.batch, tiles))}),)
    chunk = min(limits.chunk, limits.capacity)
    return (
        _profile("prefill", part, usual | {"sequence_length": (1, chunk, chunk)}),
        _profile("decode", part, usual | {"sequence_length": (1, 1, min(DECODE, limits.capacity))}),
    )


def _ranges(manifest: Manifest, limits: Limits) -> dict[str, Range]:
    image, patches, cross = manifest.image, manifest.patches, manifest.cross_attention
    tokens, capacity = limits.visual_tokens, limits.capacity
    window = patches.window if patches and patches.window else 1
    rows = cross.places if cross and cross.source == "images" else image.places or tokens
    read = rows * _PICTURES if cross and cross.source == "images" else capacity
    instruction = manifest.instruction_length or 1
    return {
        "batch_size": (1, limits.batch, limits.batch),
        "sequence_length": (1, min(CHUNK, capacity), capacity),
        "capacity": (capacity, capacity, capacity),
        "image_tokens": (1, rows, rows),
        "cross_length": (1, min(rows, read), read),
        "source_length": (1, min(CHUNK, capacity), capacity),
        "instruction_length": (1, min(32, instruction), instruction),
        "frames": (1, 1, 1),
        "places": (1, tokens, tokens),
        # A picture one place high has the most windows; a square one has them full.
        "windows": (1, max(1, math.ceil(tokens / window**2)), math.ceil(tokens / window)),
    }


def _profile(name: str, part: Part, ranges: Mapping[str, Range]) -> Profile:
    shapes = {}
    for tensor, info in part.inputs.items():
        if unknown := [d for d in info.shape if isinstance(d, str) and d not in ranges]:
            raise InputError(
                f"The input {tensor!r} has the dynamic dimension {unknown[0]!r}, of which no size is known; known are "
                f"{', '.join(ranges)}."
            )
        if any(isinstance(d, str) for d in info.shape):
            low, usual, high = (tuple(ranges[d][i] if isinstance(d, str) else d for d in info.shape) for i in range(3))
            shapes[tensor] = (low, usual, high)
    return Profile(name, shapes)
