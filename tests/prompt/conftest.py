"""Checkpoint folders with a tokenizer and a processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chatting import BACKENDS, LLAVA, NAMES


@pytest.fixture(scope="session", params=list(BACKENDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BACKENDS[request.param](), **NAMES)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(images, tokenizer, 14, "default", chat_template=LLAVA, num_additional_image_tokens=1)
    path: Path = tmp_path_factory.mktemp(request.param)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def processor(folder: Path) -> Any:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(images, PreTrainedTokenizerFast.from_pretrained(folder), 14, "default", num_additional_image_tokens=1)
