"""A tiny model of any family with its bundles, made on first use and shared by the workers of pytest-xdist."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import (
    TinyBlip2,
    TinyFlamingo,
    TinyInternVL,
    TinyLlava,
    make_blip2,
    make_flamingo,
    make_internvl,
    make_llava,
)
from tiny_internvl_chat import TinyInternVLChat
from tiny_qwen2_vl import TinyQwen2VL
from tiny_qwen_vl import TinyQwenVL
from traces import traced_once


@dataclass(frozen=True)
class Tiny:
    """One tiny model under `folder`; what is asked for is made on first use."""

    tiny: TinyLlava | TinyBlip2 | TinyFlamingo | TinyInternVL | TinyInternVLChat | TinyQwen2VL | TinyQwenVL
    folder: Path

    @property
    def checkpoint(self) -> Path:
        path = self.folder / self.tiny.name
        with self._alone():
            if not path.exists():
                staged = self.folder / "unfinished"
                shutil.rmtree(staged, ignore_errors=True)
                _quiet_transformers()
                self._make(staged).rename(path)
        return path

    def _make(self, folder: Path) -> Path:
        if isinstance(self.tiny, TinyLlava):
            return make_llava(folder, self.tiny)
        if isinstance(self.tiny, TinyBlip2):
            return make_blip2(folder, self.tiny)
        if isinstance(self.tiny, TinyInternVL):
            return make_internvl(folder, self.tiny)
        if isinstance(self.tiny, (TinyInternVLChat, TinyQwen2VL, TinyQwenVL)):
            return self.tiny.make(folder)
        return make_flamingo(folder, self.tiny)

    @property
    def bundle(self) -> Path:
        """The fp32 export."""
        return self.export()

    def export(self, dtype: str = "fp32", recipe: Any = None) -> Path:
        """An export of the checkpoint, quantized behind it if there is a recipe; tests read it only.

        Quantizing on the way would give the same bytes (`test_families`), and trace the model again.
        """
        from edgevlm.export.export import export_bundle
        from edgevlm.quant.quantize import quantize_bundle

        name = recipe if isinstance(recipe, str) else getattr(recipe, "name", "float")
        path = self.folder / f"bundle-{dtype}-{name}"
        source = self.checkpoint if recipe is None else self.export(dtype)
        with self._alone():
            if path.exists():
                return path
            if recipe is not None:
                quantize_bundle(source, path, recipe)
            else:
                with traced_once():
                    export_bundle(str(source), path, dtype=dtype)
        return path

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
