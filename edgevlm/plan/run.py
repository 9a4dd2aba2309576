"""`edgevlm plan`: a model or bundle, a device and a request go in; memory, time and advice come out."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError
from ..quant.recipe import Recipe, load_recipe
from ..targets import Target
from .advice import Option, Request, advise
from .memory import Memory, predict_memory
from .outline import Outline, Sight, is_bundle, outline_bundle, outline_checkpoint
from .speed import Speed, predict_speed

__all__ = ["Plan", "outline_model", "parse_resolution", "plan", "plan_targets"]

DTYPES = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True)
class Plan:
    """What a model takes on a device. `options` are there where it does not fit."""

    outline: Outline
    target: Target
    request: Request
    sight: Sight
    memory: Memory
    speed: Speed
    options: tuple[Option, ...] = ()


def parse_resolution(text: str | None) -> tuple[int, int] | None:
    """`1280x960` as (1280, 960). Raises InputError."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", text)
    if not found or not 0 < int(found[1]) <= 32768 or not 0 < int(found[2]) <= 32768:
        raise InputError(f"The resolution {text!r} is not WIDTHxHEIGHT in pixels, each 1 to 32,768: 1280x960, say.")
    return int(found[1]), int(found[2])


def outline_model(
    model: str, *, recipe: str | Recipe | None = None, kv_cache: str | None = None, dtype: str = "fp16"
) -> Outline:
    """The outline of a bundle's folder, or of a model under a recipe (`float` or None: as it computes).

    Raises InputError where a recipe is given for a bundle, and what outlines and recipes raise.
    """
    folder = Path(model).expanduser()
    if is_bundle(folder):
        if recipe not in (None, "float") or kv_cache not in (None, "float"):
            raise InputError(
                f"{model} is a bundle, whose weights are what they are; a recipe or another KV cache is for a model. Plan the "
                "checkpoint it came from."
            )
        return outline_bundle(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{model} is neither a bundle (it has no edgevlm.json) nor a checkpoint (it has no config.json).")
    chosen = load_recipe(recipe) if recipe not in (None, "float") else None
    outline = outline_checkpoint(model, DTYPES[dtype])
    if chosen is not None:
        return outline.under(chosen, kv_cache=kv_cache)
    if kv_cache == "int8":
        kept = replace(outline.manifest.kv_cache, dtype="int8")
        return replace(outline, manifest=replace(outline.manifest, kv_cache=kept))
    return outline


def plan(outline: Outline, target: Target, request: Request) -> Plan:
    """Raises InputError for a context or a number of pictures that the model does not take."""
    _check(outline, request)
    sight = outline.look(request.images, request.resolution, request.visual_tokens)
    if sight.places + 1 > request.context and outline.manifest.decoder_start_id is None:
        raise InputError(
            f"{request.images} pictures take {sight.places:,} places, and the context asked for is {request.context:,}. Give a "
            "larger context, fewer or smaller pictures, or fewer visual tokens."
        )
    memory = predict_memory(outline, target, request.context, sight)
    speed = predict_speed(outline, target, request.context, sight)
    options = () if memory.fits else tuple(advise(outline, target, request))
    return Plan(outline, target, request, sight, memory, speed, options)


def plan_targets(outline: Outline, targets: list[Target], request: Request) -> list[Plan]:
    """The same request on several devices, without advice."""
    _check(outline, request)
    sight = outline.look(request.images, request.resolution, request.visual_tokens)
    return [
        Plan(
            outline, target, request, sight, predict_memory(outline, target, request.context, sight),
            predict_speed(outline, target, request.context, sight),
        )
        for target in targets
    ]  # fmt: skip


def _check(outline: Outline, request: Request) -> None:
    most = outline.manifest.context_length
    if not 1 <= request.context <= most:
        raise InputError(
            f"The context asked for is {request.context:,}; it is 1 to {most:,}, the context length of {outline.name}."
        )
    if request.images < 0:
        raise InputError(f"The number of images is {request.images}; it is 0 or more.")
