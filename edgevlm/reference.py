"""The PyTorch model that a bundle is compared with: as its family publishes it, float32, on the CPU, untouched.

Needs the `export` extra. It knows nothing of bundles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, GenerationConfig, StoppingCriteriaList

from .models import Family, PartSpec
from .prompt import Prompt, Request

__all__ = ["Reference"]


class Reference:
    """A checkpoint loaded by the family's own torch code."""

    def __init__(self, folder: Path, family: Family) -> None:
        self._family = family
        self.model = family.load_reference(folder).eval()
        self.no_processor = ""
        try:
            self.processor = getattr(family, "load_processor", AutoProcessor.from_pretrained)(folder)
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as exc:
            self.processor, self.no_processor = None, f"{type(exc).__name__}: {exc}"
        std = getattr(getattr(self.processor, "image_processor", None), "image_std", None) or [1.0]
        # One step of eight bits, in the units of the normalised picture.
        self.pixel_tolerance = 1 / 255 / float(np.min(std)) + 1e-6
        for module in self.model.modules():  # the language model inside may have one of its own
            if getattr(module, "generation_config", None) is not None:
                module.generation_config = _greedy(module.generation_config)

    def process(self, request: Request, text: str) -> Mapping[str, np.ndarray]:
        """See `Family.process`."""
        return self._family.process(self.processor, request, text)

    def run_part(self, spec: PartSpec, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A part's outputs, by its module."""
        with torch.no_grad():
            arguments = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in spec.inputs]
            out = spec.module(*arguments)
        outputs = out if isinstance(out, tuple) else (out,)
        return {name: np.asarray(value.numpy()) for name, value in zip(spec.outputs, outputs, strict=True)}

    def generate(self, prompt: Prompt, pixel_values: np.ndarray, tokens: int) -> np.ndarray:
        """Logits `[tokens, vocabulary]` before each of the greedy tokens, which are their largest; it does not stop at an
        end token."""
        with torch.no_grad():
            out = self.model.generate(
                **self._family.reference_inputs(self.model, prompt, pixel_values), max_new_tokens=tokens, do_sample=False,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        return np.asarray(torch.stack(out.logits)[:, 0].float().numpy())

    def answer(self, prompt: Prompt, pixel_values: np.ndarray, tokens: int, chosen: Callable[[int], bool]) -> None:
        """Up to so many greedy tokens: `chosen` is given each of them as it comes, and says whether it is the last."""

        def stop(ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            return torch.tensor([chosen(int(ids[0, -1]))])

        with torch.no_grad():
            self.model.generate(
                **self._family.reference_inputs(self.model, prompt, pixel_values), max_new_tokens=tokens, do_sample=False,
                stopping_criteria=StoppingCriteriaList([stop]),
            )  # fmt: skip


def _greedy(config: Any) -> GenerationConfig:
    """Nothing that would change the model's own choice, and no end."""
    kept = {name: getattr(config, name, None) for name in ("bos_token_id", "pad_token_id", "decoder_start_token_id")}
    return GenerationConfig(eos_token_id=None, **{**kept, "pad_token_id": kept["pad_token_id"] or 0})
