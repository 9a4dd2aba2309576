"""What would make a model fit a device: smaller numbers, a shorter context, fewer visual tokens, sorted by what is lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import EdgeVLMError
from ..quant.recipe import RECIPES
from ..targets import Target
from .memory import Memory, predict_memory
from .outline import WIDTHS, Outline, PartOutline

__all__ = ["Option", "Request", "advise"]


@dataclass(frozen=True)
class Request:
    """What is asked of a model: positions of context, pictures and their size (width, height), the most places that one of them
    may take."""

    context: int
    images: int
    resolution: tuple[int, int] | None = None
    visual_tokens: int | None = None


@dataclass(frozen=True)
class Option:
    """A way to make it fit: what to change, what that loses, and the total then. `loss` sorts."""

    changes: tuple[str, ...]
    lost: str
    total: int
    loss: float
    fits: bool

    @property
    def change(self) -> str:
        return " and ".join(self.changes)


#: What each change loses, least first: a judgement from docs/recipes.md and the README's scores, not a measurement.
_KV, _INT8, _VISUAL, _INT4, _CAPACITY = 1.0, 2.0, 4.0, 3.0, 5.0


def advise(outline: Outline, target: Target, request: Request) -> list[Option]:
    """Ways that fit, those that lose least first; where none does, the one that comes nearest."""
    options = [o for o in _options(outline, target, request) if o is not None]
    fitting = [option for option in options if option.fits]
    if fitting:
        # What goes further than another way that fits loses more for nothing.
        fitting = [o for o in fitting if not any(set(other.changes) < set(o.changes) for other in fitting)]
        return sorted(fitting, key=lambda option: (option.loss, option.total))
    return sorted(options, key=lambda option: option.total)[:1]


def _options(outline: Outline, target: Target, request: Request) -> Iterator[Option | None]:
    for weights, weights_change, weights_loss, weights_lost in _recipes(outline):
        for cache, cache_change, cache_loss in _caches(weights):
            change = [text for text in (weights_change, cache_change) if text]
            lost = [text for text in (weights_lost, "keys and values in eight bits" if cache_change else "") if text]
            loss = weights_loss + cache_loss
            if change:
                yield _option(cache, target, request, change, lost, loss)
            yield from _smaller(cache, target, request, change, lost, loss)


def _recipes(outline: Outline) -> Iterator[tuple[Outline, str, float, str]]:
    yield outline, "", 0.0, ""
    if outline.recipe is not None:
        return
    for name, loss, lost in (("int8", _INT8, "hardly any accuracy"), ("int4", _INT4, "some accuracy (calibrated)")):
        if outline.weights:
            yield outline.under(RECIPES[name]), f"recipe {name}", loss, lost
        else:
            yield _requantized(outline, name), f"recipe {name}", loss, lost


def _requantized(outline: Outline, recipe: str) -> Outline:
    """About what a float bundle takes quantized: its manifest does not name its weights."""
    parts = {}
    for name, part in outline.parts.items():
        form = "int4" if recipe == "int4" and name in ("decoder", "text_encoder") else "int8"
        scales = outline.width / 32 if form == "int4" else 0.0
        table = int(part.tables / outline.width)
        stored = {form: int(part.linear * (WIDTHS[form] + scales)), "int8": int(part.head) + table}
        if form == "int8":
            stored = {"int8": int(part.linear + part.head) + table}
        largest = int(part.largest / outline.width)
        parts[name] = PartOutline(stored, table, largest, part.linear, part.head, "int8")
    return replace(outline, parts=parts, recipe=recipe)


def _caches(outline: Outline) -> Iterator[tuple[Outline, str, float]]:
    yield outline, "", 0.0
    kv = outline.manifest.kv_cache
    if kv.dtype != "int8" and outline.manifest.cross_attention is None and not outline.is_bundle:
        yield replace(outline, manifest=replace(outline.manifest, kv_cache=replace(kv, dtype="int8"))), "INT8 KV cache", _KV


def _smaller(
    outline: Outline, target: Target, request: Request, change: list[str], lost: list[str], loss: float
) -> Iterator[Option | None]:
    """A shorter context, and fewer visual tokens where a picture may take fewer."""
    sight = outline.look(request.images, request.resolution, request.visual_tokens)
    least = sight.places + 64
    for share in (0.75, 0.5, 0.25, 0.125):
        context = max(least, int(request.context * share) // 256 * 256)
        if context < request.context:
            text = f"context {context:,}"
            missing = f"{request.context - context:,} tokens of context"
            smaller = replace(request, context=context)
            option = _option(outline, target, smaller, [*change, text], [*lost, missing], loss + _CAPACITY * (2 - share))
            yield option
            if option is not None and option.fits:
                break
    if outline.manifest.patches is None and outline.processor.tiles is None:
        return
    each = sight.places // max(1, sight.images)
    for share in (2, 4, 8):
        fewer = replace(request, visual_tokens=each // share)
        text = f"{each // share:,} visual tokens a picture"
        yield _option(outline, target, fewer, [*change, text], [*lost, "detail in pictures"], loss + _VISUAL * share / 2)


def _option(
    outline: Outline, target: Target, request: Request, change: list[str], lost: list[str], loss: float
) -> Option | None:
    try:
        memory: Memory = predict_memory(
            outline, target, request.context, outline.look(request.images, request.resolution, request.visual_tokens)
        )
    except EdgeVLMError:  # fewer tokens than a picture takes at least
        return None
    return Option(tuple(change), ", ".join(lost), memory.total, loss, memory.fits)
