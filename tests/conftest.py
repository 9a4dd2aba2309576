"""Tiny checkpoints and their bundles, made once and shared by all tests (and by the workers of pytest-xdist)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import (
    BLIP2S,
    FLAMINGOS,
    INSTRUCTBLIPS,
    INTERNVLS,
    LLAVAS,
    TinyBlip2,
    TinyFlamingo,
    TinyInternVL,
    TinyLlava,
    make_blip2,
    make_flamingo,
    make_internvl,
    make_llava,
)
from tiny_internvl_chat import INTERNVL_CHATS, TinyInternVLChat
from tiny_qwen2_vl import QWEN2_VLS, TinyQwen2VL
from tiny_qwen_vl import QWEN_VLS, TinyQwenVL

# Before anything imports them: no network, no progress bars, no advice.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"


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
        """An export of the checkpoint; tests read it only."""
        from edgevlm.export.export import export_bundle

        name = recipe if isinstance(recipe, str) else getattr(recipe, "name", "float")
        checkpoint, path = self.checkpoint, self.folder / f"bundle-{dtype}-{name}"
        with self._alone():
            if not path.exists():
                export_bundle(str(checkpoint), path, dtype=dtype, recipe=recipe)
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


Llava = Tiny  # what the tests call it that need a LLaVA


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """The tiny model of a name in the lists of `tiny`, of any family."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    every = [*LLAVAS, *BLIP2S, *INSTRUCTBLIPS, *FLAMINGOS, *INTERNVLS, *INTERNVL_CHATS, *QWEN2_VLS, *QWEN_VLS]
    known = {one.name: Tiny(one, shared / "tiny" / one.name) for one in every}
    assert len(known) == len(every)
    return known.__getitem__


@pytest.fixture(scope="session")
def llava(tiny: Callable[[str], Tiny]) -> Callable[[str], Tiny]:
    """The tiny LLaVA of a name in `tiny.LLAVAS`."""
    return tiny


@pytest.fixture(scope="session")
def checkpoint(tiny: Callable[[str], Tiny]) -> Path:
    """The checkpoint of the first LLaVA; copy it to change it."""
    return tiny(LLAVAS[0].name).checkpoint


@pytest.fixture(scope="session")
def bundle(tiny: Callable[[str], Tiny]) -> Path:
    """The fp32 export of `checkpoint`; copy it to change it."""
    return tiny(LLAVAS[0].name).bundle


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors are not worth the threads of PyTorch."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
