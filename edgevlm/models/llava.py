"""LLaVA (Liu et al. 2023; LLaVA-1.5: arXiv 2310.03744): a vision tower, an MLP projector, a language model.

`LlavaForConditionalGeneration` of transformers: CLIP or SigLIP tower; Llama, Mistral or Qwen2 decoder. Picture features
of one or several tower layers, with or without the class token, take the places of the `<image>` tokens.

Parts: `vision_encoder`, `projector`, `embed_tokens`, `decoder`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle import ImageTokens, KVCache, Manifest
from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from ..prompt import Prompt, PromptBuilder, Request
    from . import PartSpec, RunPart

ARCHITECTURES = ("LlavaForConditionalGeneration",)
ALIASES = {"llava": "llava-hf/llava-1.5-7b-hf", "llava-13b": "llava-hf/llava-1.5-13b-hf"}

PARTS = ("vision_encoder", "projector", "embed_tokens", "decoder")
PICTURES = (0, None)

TOWERS = ("clip_vision_model", "siglip_vision_model")
DECODERS = ("llama", "mistral", "qwen2")
#: Rotary scalings whose angles do not depend on the length of the sequence.
ROTARY = ("default", "linear", "llama3", "yarn")


# ----------------------------------------------------------------------------------------- the workshop


def check_config(config: Mapping[str, Any]) -> None:
    tower = config.get("vision_config", {}).get("model_type", TOWERS[0])
    decoder = config.get("text_config", {}).get("model_type", DECODERS[0])
    for what, is_, known in (("vision tower", tower, TOWERS), ("decoder", decoder, DECODERS)):
        if is_ not in known:
            raise UnsupportedModelError(f"LLaVA with the {what} {is_!r} is not supported; supported are {', '.join(known)}.")
    check_rotary(config.get("text_config", {}))


def check_rotary(text: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError where the angles would depend on the length of the sequence."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROTARY:
        raise UnsupportedModelError(f"Rotary scaling {kind!r} is not supported; supported are {', '.join(ROTARY)}.")


def build_model(folder: Path) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_pretrained(folder)
    return LlavaForConditionalGeneration(config)


def weight_name(name: str) -> str:
    # transformers renamed twice: `language_model.model.x` became `model.language_model.x`, and CLIP lost its inner level.
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


def _vision_encoder() -> type[Any]:
    import torch
    from torch import Tensor, nn

    class VisionEncoder(nn.Module):
        """pixel_values `[B, 3, H, W]` → features of the chosen layers, side by side, `[B, places, width]`."""

        def __init__(self, tower: nn.Module, layers: int | list[int], strategy: str) -> None:
            super().__init__()
            self.tower, self.first = tower, 1 if strategy == "default" else 0
            self.layers = [layers] if isinstance(layers, int) else list(layers)

        def forward(self, pixel_values: Tensor) -> Tensor:
            states = self.tower(pixel_values, output_hidden_states=True).hidden_states
            chosen = [states[layer][:, self.first :] for layer in self.layers]
            return chosen[0] if len(chosen) == 1 else torch.cat(chosen, -1)

    return VisionEncoder


def part_specs(model: Any, dtype: str) -> list[PartSpec]:
    from . import PartSpec, decoder_spec, embedding_spec
    from .decoder import CachedDecoder, Embedding

    config, body = model.config, model.model
    vision, text = config.vision_config, config.text_config
    layers = config.vision_feature_layer
    width = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
    places, hidden = image_places(config), text.hidden_size
    kv = kv_cache(text, dtype)
    pixels = ("batch_size", vision.num_channels, vision.image_size, vision.image_size)
    return [
        PartSpec(
            "vision_encoder",
            _vision_encoder()(body.vision_tower, layers, config.vision_feature_select_strategy),
            {"pixel_values": (pixels, dtype)},
            {"vision_features": (("batch_size", places, width), dtype)},
        ),
        PartSpec(
            "projector",
            body.multi_modal_projector,
            {"vision_features": (("batch_size", "image_tokens", width), dtype)},
            {"image_features": (("batch_size", "image_tokens", hidden), dtype)},
        ),
        embedding_spec(Embedding(body.language_model.embed_tokens), hidden, dtype),
        decoder_spec(CachedDecoder(body.language_model, model.lm_head, kv.layers), kv, None, hidden, text.vocab_size, dtype),
    ]


def image_places(config: Any) -> int:
    """How many `<image>` tokens one picture takes."""
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    has_class_token = config.vision_config.model_type == "clip_vision_model"
    return patches + has_class_token - (config.vision_feature_select_strategy == "default")


def kv_cache(text: Any, dtype: str) -> KVCache:
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return KVCache(layers=text.num_hidden_layers, heads=text.num_key_value_heads, head_dim=head_dim, dtype=dtype)


def describe(folder: Path, config: Any, dtype: str) -> Manifest:
    from . import added_token

    text = config.text_config
    return Manifest(
        family="llava",
        dtype=dtype,
        kv_cache=kv_cache(text, dtype),
        context_length=text.max_position_embeddings,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        image=ImageTokens(added_token(folder, config.image_token_id), config.image_token_id, image_places(config)),
    )


# -------------------------------------------------------------------------------------------- the robot


def build_prompt(builder: PromptBuilder, manifest: Manifest, request: Request) -> Prompt:
    return builder.build(request)


def encode_image(run: RunPart, manifest: Manifest, pixel_values: np.ndarray) -> np.ndarray:
    features = run("vision_encoder", {"pixel_values": pixel_values})["vision_features"]
    return run("projector", {"vision_features": features})["image_features"][0]


# ---------------------------------------------------------------------------------------- the reference


def load_reference(folder: Path) -> Any:
    import torch
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def process(processor: Any, request: Request, text: str) -> Mapping[str, np.ndarray]:
    batch = processor(text=text, images=list(request.images) or None, return_tensors="np")
    return {"input_ids": batch["input_ids"][0]} | ({"pixel_values": batch["pixel_values"]} if request.images else {})


def reference_inputs(model: Any, prompt: Prompt, pixel_values: np.ndarray) -> Mapping[str, Any]:
    import torch

    pixels = {"pixel_values": torch.from_numpy(pixel_values)} if len(pixel_values) else {}
    ids = torch.tensor([prompt.ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
