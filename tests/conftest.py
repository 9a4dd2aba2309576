"""Tiny checkpoints and their bundles, made once and shared by all tests (and by the workers of pytest-xdist)."""

from __future__ import annotations

import fcntl
import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tinies import Tiny
from tiny import BLIP2S, FLAMINGOS, INSTRUCTBLIPS, INTERNVLS, LLAVAS
from tiny_internvl_chat import INTERNVL_CHATS
from tiny_qwen2_vl import QWEN2_VLS
from tiny_qwen_vl import QWEN_VLS
from traces import remembering

# Before anything imports them: no network, no progress bars, no advice.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
# Tracing makes millions of objects that live on; Python would look through all of them again and again.
gc.set_threshold(100_000, 50, 50)


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """The tiny model of a name in the lists of `tiny`, of any family."""
    shared = shared_folder(tmp_path_factory)
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


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The float bundle of a shipped model; tests read it only."""
    shared = shared_folder(tmp_path_factory) / "shipped"

    @functools.cache
    def exported(name: str) -> Path:
        from edgevlm.export.export import export_bundle

        shared.mkdir(exist_ok=True)
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (shared / name).exists():
                export_bundle(f"demo/{name}", shared / name)
        return shared / name

    return exported


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that export, and not to see what a trace looks like; see `traces`."""
    from edgevlm.export import trace

    monkeypatch.setattr(trace, "trace_part", remembering(trace.trace_part))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors are not worth the threads of PyTorch."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
