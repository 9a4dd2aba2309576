"""Tiny checkpoints and their bundles, made once and shared by all tests (and by the workers of pytest-xdist)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tinies import Tiny
from tiny import BLIP2S, FLAMINGOS, INSTRUCTBLIPS, INTERNVLS, LLAVAS
from tiny_internvl_chat import INTERNVL_CHATS
from tiny_qwen2_vl import QWEN2_VLS
from tiny_qwen_vl import QWEN_VLS

# Before anything imports them: no network, no progress bars, no advice.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"


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
