"""The PyTorch model that a bundle is compared with: transformers, float32, on the CPU, untouched.

Needs the `export` extra. It knows nothing of bundles.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

__all__ = ["Reference"]


class Reference:
    """A checkpoint loaded by transformers."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.no_processor = ""
        try:
            self.processor = AutoProcessor.from_pretrained(folder)
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as exc:
            self.processor, self.no_processor = None, f"{type(exc).__name__}: {exc}"
        std = getattr(getattr(self.processor, "image_processor", None), "image_std", None) or [1.0]
        # One step of eight bits, in the units of the normalised picture.
        self.pixel_tolerance = 1 / 255 / float(np.min(std)) + 1e-6

    def process(self, text: str, pictures: list[Any]) -> tuple[list[int], np.ndarray]:
        """Token ids and pixel values `[pictures, 3, H, W]` for a rendered prompt."""
        batch = self.processor(text=text, images=pictures or None, return_tensors="pt")
        pixels = batch["pixel_values"].numpy() if pictures else np.empty((0, 3, 1, 1), np.float32)
        return batch["input_ids"][0].tolist(), pixels

    def run_module(self, module: torch.nn.Module, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """The first result of a part's module."""
        count = len(inspect.signature(module.forward).parameters)
        with torch.no_grad():
            out = module(*(torch.from_numpy(np.ascontiguousarray(array)) for array in list(feeds.values())[:count]))
        return np.asarray(out.numpy())

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Logits `[vocabulary]` behind embeddings `[S, hidden]`."""
        with torch.no_grad():
            hidden = self.model.model.language_model(inputs_embeds=torch.from_numpy(rows[None])).last_hidden_state
            return np.asarray(self.model.lm_head(hidden[0, -1]).numpy())

    def generate(self, ids: list[int], pixel_values: np.ndarray, tokens: int) -> tuple[list[int], np.ndarray]:
        """Greedy tokens, not stopping at the end token, and the logits before each, `[tokens, vocabulary]`."""
        pixels = {"pixel_values": torch.from_numpy(pixel_values)} if len(pixel_values) else {}
        out = self.model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), **pixels,
            max_new_tokens=tokens, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True,
            temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
        )  # fmt: skip
        return out.sequences[0, len(ids) :].tolist(), torch.stack(out.logits)[:, 0].float().numpy()
