"""Families of vision-language models, one file each, named as the user types them.

A family says how a checkpoint is split into parts, how the bundle describes it, and how the runtime turns a picture
into embeddings. It imports torch only inside the functions that the workshop calls.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..bundle import Manifest
from ..errors import UnsupportedModelError

__all__ = ["Family", "PartSpec", "aliases", "family_by_name", "family_for_config"]

RunPart = Callable[[str, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class PartSpec:
    """One part to trace: a torch module and what goes in and comes out.

    `inputs` maps each input's name to its dimensions (an int, or a name where it is dynamic) and dtype as numpy names
    it, `outputs` likewise, in the order of the module's arguments and results.
    """

    name: str
    module: Any
    inputs: Mapping[str, tuple[tuple[int | str, ...], str]]
    outputs: Mapping[str, tuple[tuple[int | str, ...], str]]


class Family(Protocol):
    """What each file in this package offers at module level."""

    ARCHITECTURES: tuple[str, ...]
    ALIASES: Mapping[str, str]
    PARTS: tuple[str, ...]

    # the workshop
    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raises UnsupportedModelError, naming what is not covered and what is."""

    def build_model(self, folder: Path) -> Any:
        """The transformers model for the configuration in `folder`, without its weights."""

    def part_specs(self, model: Any, dtype: str) -> list[PartSpec]:
        """The parts of a model, to be computed in `dtype`."""

    def weight_name(self, name: str) -> str:
        """One name for a weight, whichever layout (of parameter or checkpoint) it is given in."""

    def describe(self, folder: Path, config: Any, dtype: str) -> Manifest:
        """What the runtime must know of the checkpoint; parts and files are filled in by the export."""

    # the robot
    def embed_image(self, run: RunPart, pixel_values: np.ndarray) -> np.ndarray:
        """float `[3, H, W]` of one picture → `[places, hidden]`, through the parts."""


def _modules() -> dict[str, Any]:
    names = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "decoder"]
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def aliases() -> dict[str, str]:
    """Short names and the Hub ids they stand for."""
    return {alias: target for module in _modules().values() for alias, target in module.ALIASES.items()}


def family_by_name(name: str) -> Family:
    """The family of a manifest."""
    modules = _modules()
    if name not in modules:
        raise UnsupportedModelError(
            f"The bundle's family is {name!r}; this EdgeVLM knows {', '.join(sorted(modules))}. Use a newer EdgeVLM, or export "
            "the checkpoint again."
        )
    return modules[name]


def family_for_config(config: Mapping[str, Any]) -> tuple[str, Family]:
    """The family that covers a checkpoint's `config.json`."""
    wanted = [str(a) for a in config.get("architectures") or []]
    known: list[str] = []
    for name, module in _modules().items():
        known += module.ARCHITECTURES
        if set(wanted) & set(module.ARCHITECTURES):
            module.check_config(config)
            return name, module
    asked = " / ".join(wanted) or f"model_type {config.get('model_type')!r} without 'architectures'"
    raise UnsupportedModelError(f"The checkpoint's architecture is {asked}; supported are {', '.join(sorted(known))}.")
