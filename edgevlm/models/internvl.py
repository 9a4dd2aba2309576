"""InternVL (Chen et al. 2024, arXiv 2412.05271 for 2.5, 2504.10479 for 3): InternViT over tiles, pixel shuffle, an MLP, a
language model.

`InternVLForConditionalGeneration` of transformers, with Qwen2, Qwen3, Llama or Mistral decoders. A picture is cut into
tiles by its aspect ratio, each of which takes as many places; with more than one the whole picture follows as a tile.

Parts: `vision_encoder` (a batch of tiles), `projector` (pixel shuffle inside), `embed_tokens`, `decoder`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle import ImageTokens, Manifest
from ..errors import UnsupportedModelError
from . import llava

if TYPE_CHECKING:
    from ..prompt import Prompt, PromptBuilder, Request
    from . import PartSpec, RunPart

ARCHITECTURES = ("InternVLForConditionalGeneration",)
ALIASES = {"internvl": "OpenGVLab/InternVL3-1B-hf"}

PARTS = ("vision_encoder", "projector", "embed_tokens", "decoder")
PICTURES = (0, None)

DECODERS = (*llava.DECODERS, "qwen3")


# ----------------------------------------------------------------------------------------- the workshop


def check_config(config: Mapping[str, Any]) -> None:
    text = config.get("text_config") or {}
    decoder = text.get("model_type", "qwen2")
    if decoder not in DECODERS:
        raise UnsupportedModelError(
            f"InternVL with the decoder {decoder!r} is not supported; supported are {', '.join(DECODERS)}."
        )
    llava.check_rotary(text)
    if not isinstance(config.get("vision_feature_layer", -1), int):
        raise UnsupportedModelError(
            f"vision_feature_layer = {config['vision_feature_layer']!r} is not supported; one layer is."
        )


def build_model(folder: Path) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    return InternVLForConditionalGeneration(InternVLConfig.from_pretrained(folder))


def weight_name(name: str) -> str:
    # As for LLaVA, transformers moved the language model one level up after the first checkpoints.
    return llava.weight_name(name)


def part_specs(model: Any, dtype: str) -> list[PartSpec]:
    from . import PartSpec, decoder_spec, embedding_spec
    from .decoder import CachedDecoder, Embedding

    config, body = model.config, model.model
    vision, text = config.vision_config, config.text_config
    encoder, projector = _modules()
    kv = llava.kv_cache(text, dtype)
    height, width = vision.image_size
    tokens = (height // vision.patch_size[0]) * (width // vision.patch_size[1]) + (
        config.vision_feature_select_strategy != "default"
    )
    features = (("batch_size", tokens, vision.hidden_size), dtype)
    return [
        PartSpec(
            "vision_encoder",
            encoder(body.vision_tower, config.vision_feature_layer, config.vision_feature_select_strategy),
            {"pixel_values": (("batch_size", vision.num_channels, height, width), dtype)},
            {"vision_features": features},
        ),
        PartSpec(
            "projector",
            projector(body, config.downsample_ratio),
            {"vision_features": features},
            {"image_features": (("batch_size", image_places(config), text.hidden_size), dtype)},
        ),
        embedding_spec(Embedding(body.language_model.embed_tokens), text.hidden_size, dtype),
        decoder_spec(
            CachedDecoder(body.language_model, model.lm_head, kv.layers), kv, None, text.hidden_size, text.vocab_size, dtype
        ),
    ]


def _modules() -> tuple[type[Any], type[Any]]:
    from torch import Tensor, nn

    class VisionEncoder(nn.Module):
        """pixel_values `[tiles, 3, H, W]` → features of one layer, `[tiles, patches, width]`."""

        def __init__(self, tower: nn.Module, layer: int, strategy: str) -> None:
            super().__init__()
            self.tower, self.layer, self.first = tower, layer, 1 if strategy == "default" else 0
            # The positions fit the tile, so nothing is to be interpolated; the model would try while it is traced.
            embeddings: Any = tower.embeddings
            embeddings.interpolate_pos_encoding = lambda *_: embeddings.position_embeddings

        def forward(self, pixel_values: Tensor) -> Tensor:
            out = self.tower(pixel_values=pixel_values, output_hidden_states=self.layer != -1)
            states = out.last_hidden_state if self.layer == -1 else out.hidden_states[self.layer]
            return states[:, self.first :]

    class Projector(nn.Module):
        """vision_features `[tiles, patches, width]` → neighbours side by side, projected, `[tiles, places, hidden]`."""

        def __init__(self, body: Any, ratio: float) -> None:
            super().__init__()
            self.projector, self.shuffle, self.ratio = body.multi_modal_projector, body.pixel_shuffle, ratio

        def forward(self, vision_features: Tensor) -> Tensor:
            tiles, patches, width = vision_features.shape
            side = int(patches**0.5)
            shuffled = self.shuffle(vision_features.view(tiles, side, side, width), scale_factor=self.ratio)
            return self.projector(shuffled.flatten(1, 2))

    return VisionEncoder, Projector


def image_places(config: Any) -> int:
    """How many places one tile takes."""
    height, width = config.vision_config.image_size
    patches = (height // config.vision_config.patch_size[0]) * (width // config.vision_config.patch_size[1])
    return int(patches * config.downsample_ratio**2)


def describe(folder: Path, config: Any, dtype: str) -> Manifest:
    from . import added_token, token_number

    text = config.text_config
    names = _names(folder)
    before, after = (names.get(f"{which}_image_token", default) for which, default in (("start", "<img>"), ("end", "</img>")))
    places = _read(folder / "processor_config.json").get("image_seq_length", image_places(config))
    if places != image_places(config):
        raise UnsupportedModelError(
            f"processor_config.json gives a tile {places} places; the model makes {image_places(config)} of it."
        )
    return Manifest(
        family="internvl",
        dtype=dtype,
        kv_cache=llava.kv_cache(text, dtype),
        context_length=text.max_position_embeddings,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        image=ImageTokens(
            added_token(folder, config.image_token_id), config.image_token_id, places,
            (token_number(folder, before),), (token_number(folder, after),),
        ),
        # InternVLProcessor asks for tiles, whatever the image processor's file says.
        image_options={"crop_to_patches": True},
    )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _names(folder: Path) -> dict[str, str]:
    config = _read(folder / "tokenizer_config.json")
    extra = config.get("extra_special_tokens")
    every = {**config, **(extra if isinstance(extra, dict) else {})}
    return {k: v["content"] if isinstance(v, dict) else v for k, v in every.items() if k.endswith("_token") and v}


# -------------------------------------------------------------------------------------------- the robot


def build_prompt(builder: PromptBuilder, manifest: Manifest, request: Request) -> Prompt:
    return builder.build(request)


def encode_image(run: RunPart, manifest: Manifest, pixel_values: np.ndarray) -> np.ndarray:
    features = run("vision_encoder", {"pixel_values": pixel_values})["vision_features"]
    projected = run("projector", {"vision_features": features})["image_features"]
    return projected.reshape(-1, projected.shape[-1])


# ---------------------------------------------------------------------------------------- the reference


def load_reference(folder: Path) -> Any:
    import torch
    from transformers import InternVLForConditionalGeneration

    return InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def load_processor(folder: Path) -> Any:
    """transformers' InternVLProcessor needs torchvision for films; its image processor and tokenizer do not."""
    from transformers import AutoTokenizer
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    class Pair:
        image_processor = GotOcr2ImageProcessorPil.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_seq_length = _read(folder / "processor_config.json").get("image_seq_length", 256)

    return Pair()


def process(processor: Any, request: Request, text: str) -> Mapping[str, np.ndarray]:
    tokenizer, made = processor.tokenizer, {}
    pieces = text.split(tokenizer.context_image_token)
    written = pieces[0]
    if request.images:
        batch = processor.image_processor(list(request.images), crop_to_patches=True, return_tensors="np")
        made["pixel_values"] = batch["pixel_values"]
        for piece, tiles in zip(pieces[1:], batch["num_patches"], strict=True):
            places = tokenizer.context_image_token * (processor.image_seq_length * int(tiles))
            written += f"{tokenizer.start_image_token}{places}{tokenizer.end_image_token}{piece}"
    return {"input_ids": tokenizer(written, return_tensors="np")["input_ids"][0], **made}


def reference_inputs(model: Any, prompt: Prompt, pixel_values: np.ndarray) -> Mapping[str, Any]:
    return llava.reference_inputs(model, prompt, pixel_values)
