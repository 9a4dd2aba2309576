"""How fast bundles answer on this machine, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .scenes import render_scene, sample_scene
from .vlm import VLM

__all__ = ["measure_speed"]

_FIRST_SCENE = 11_900_000


def measure_speed(
    folders: Mapping[str, Path], rounds: int = 12, *, load: Callable[[Path], VLM] = VLM.load
) -> dict[str, dict[str, float]]:
    """Medians over new pictures, the bundles in turn; each has answered about another picture before."""
    names = ("vision", "prefill", "first_token", "tokens_per_second")
    models = {kind: load(folder) for kind, folder in folders.items()}
    taken: dict[str, list[Any]] = {kind: [] for kind in models}
    for number in range(rounds + 1):
        picture = render_scene(sample_scene(_FIRST_SCENE + number))
        for kind, vlm in models.items():
            reply = vlm.generate("Describe the scene.", images=[picture])
            if number:
                times = {name: getattr(reply.timings, name) for name in names}
                taken[kind].append(times | {"visual_tokens": sum(seen.tokens for seen in reply.pictures)})
    return {
        kind: {name: statistics.median(times[name] for times in every) for name in (*names, "visual_tokens")}
        for kind, every in taken.items()
    }
