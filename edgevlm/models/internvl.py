"""InternVL (Chen et al. 2024, arXiv 2412.05271 for 2.5, 2504.10479 for 3): InternViT over tiles, pixel shuffle, an MLP, a
language model.

`InternVLForConditionalGeneration` of transformers, with Qwen2, Qwen3, Llama or Mistral decoders, and the layout that
InternVL's own code publishes (`InternVLChatModel`, see `internvl_chat.py`), read into the same model. A picture is cut into
tiles by its aspect ratio, each of which takes as many places; with more than one the whole picture follows as a tile.

Parts: `vision_encoder` (a batch of tiles), `projector` (pixel shuffle inside), `embed_tokens`, `decoder`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle import ImageTokens, Manifest
from ..errors import UnsupportedModelError, WeightsError
from . import internvl_chat, llava

if TYPE_CHECKING:
    from ..prompt import Prompt, PromptBuilder, Request
    from . import PartSpec, Rows, RunPart

ARCHITECTURES = ("InternVLForConditionalGeneration", internvl_chat.ARCHITECTURE)
ALIASES = {"internvl": "OpenGVLab/InternVL3-1B-hf"}

PARTS = ("vision_encoder", "projector", "embed_tokens", "decoder")
PICTURES = (0, None)

DECODERS = (*llava.DECODERS, "qwen3")
#: The rotary scaling of most published checkpoints.
DYNAMIC = "dynamic"


# ----------------------------------------------------------------------------------------- the workshop


def check_config(config: Mapping[str, Any]) -> None:
    chat = internvl_chat.is_chat(config)
    text = (config.get("llm_config" if chat else "text_config")) or {}
    if chat:
        internvl_chat.check_config(config)
    elif (decoder := text.get("model_type", "qwen2")) not in DECODERS:
        raise UnsupportedModelError(
            f"InternVL with the decoder {decoder!r} is not supported; supported are {', '.join(DECODERS)}."
        )
    if _scaling(text) != DYNAMIC:
        llava.check_rotary(text)
    option = "select_layer" if chat else "vision_feature_layer"
    layer, layers = config.get(option, -1), (config.get("vision_config") or {}).get("num_hidden_layers", 48 if chat else 24)
    if not isinstance(layer, int):
        raise UnsupportedModelError(f"{option} = {layer!r} is not supported; one layer is.")
    if not -layers - 1 <= layer <= layers:
        raise UnsupportedModelError(f"{option} = {layer}, and the vision tower has {layers} layers: {-layers - 1} to {layers}.")


def _scaling(text: Mapping[str, Any]) -> str:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return str(rope.get("rope_type", rope.get("type", "default")))


def build_model(folder: Path) -> Any:
    from transformers import InternVLForConditionalGeneration

    config = _read_config(folder)
    rope = config.text_config.rope_parameters
    if rope["rope_type"] == DYNAMIC:
        # Its angles change beyond the context length only, which no bundle reaches; the model would look while it is traced.
        config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return _with_norms(InternVLForConditionalGeneration(config))


def _read_config(folder: Path) -> Any:
    from transformers import InternVLConfig

    config = _read(folder / "config.json")
    if internvl_chat.is_chat(config):
        return internvl_chat.read_config(folder, config)
    return InternVLConfig.from_pretrained(folder)


def _with_norms(model: Any) -> Any:
    """InternVL's own code gives the norms of queries and keys the tower's epsilon; transformers knows one only."""
    for layer in model.model.vision_tower.encoder.layer:
        for norm in (layer.attention.q_norm, layer.attention.k_norm):
            if hasattr(norm, "variance_epsilon"):
                norm.variance_epsilon = model.config.vision_config.layer_norm_eps
    return model


def weight_name(name: str) -> str:
    # As for LLaVA, transformers moved the language model one level up after the first checkpoints.
    return llava.weight_name(name)


def split_weight(config: Mapping[str, Any], name: str, shape: Sequence[int]) -> Mapping[str, Rows | None]:
    if internvl_chat.is_chat(config):
        return internvl_chat.split_weight(config, name, shape)
    return {weight_name(name): None}


def bundle_files(folder: Path) -> Mapping[str, str]:
    config = _read(folder / "config.json")
    return internvl_chat.bundle_files(folder, config) if internvl_chat.is_chat(config) else {}


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
    text = config.text_config
    places = _read(folder / "processor_config.json").get("image_seq_length", image_places(config))
    if places != image_places(config):
        raise UnsupportedModelError(
            f"processor_config.json gives a tile {places} places; the model makes {image_places(config)} of it."
        )
    token, before, after = _picture_tokens(folder, config)
    return Manifest(
        family="internvl",
        dtype=dtype,
        kv_cache=llava.kv_cache(text, dtype),
        context_length=text.max_position_embeddings,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        image=ImageTokens(token, config.image_token_id, places, (before,), (after,)),
        # InternVLProcessor asks for tiles, whatever the image processor's file says.
        image_options={"crop_to_patches": True},
    )


def _picture_tokens(folder: Path, config: Any) -> tuple[str, int, int]:
    """The text of the token that stands for a picture, and the ids before and behind its places."""
    from . import added_token, token_number

    if internvl_chat.is_chat(_read(folder / "config.json")):
        before, after = internvl_chat.token_numbers(folder, internvl_chat.BEFORE, internvl_chat.AFTER)
        return internvl_chat.IMAGE, before, after
    names = _names(folder)
    around = [names.get(f"{which}_image_token", text) for which, text in (("start", "<img>"), ("end", "</img>"))]
    return added_token(folder, config.image_token_id), token_number(folder, around[0]), token_number(folder, around[1])


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

    config = _read(folder / "config.json")
    if internvl_chat.is_chat(config):
        return _load_chat(folder, config)
    return InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def _load_chat(folder: Path, config: Mapping[str, Any]) -> Any:
    import torch
    from safetensors import safe_open
    from transformers import InternVLForConditionalGeneration
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.no_grad():
        model = _with_norms(InternVLForConditionalGeneration(_read_config(folder)))
        model.tie_weights()
        missing = {weight_name(name): parameter for name, parameter in model.named_parameters()}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for published in file.keys():  # noqa: SIM118 - not a mapping
                    tensor = file.get_tensor(published)
                    for name, rows in split_weight(config, published, tensor.shape).items():
                        if name in missing:
                            missing.pop(name).copy_(tensor if rows is None else rows.of(tensor))
    if missing:
        raise WeightsError(f"{folder} lacks {len(missing)} weights, {next(iter(missing))!r} among them.")
    return model


class _Processor:
    """transformers' InternVLProcessor needs torchvision for films; its image processor and tokenizer do not.

    `marks` are the tokens before, for and behind a place, of which a tile has `places`.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, marks: Sequence[str], places: int) -> None:
        self.image_processor, self.tokenizer, self.marks, self.places = image_processor, tokenizer, marks, places


def load_processor(folder: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    config = _read(folder / "config.json")
    if internvl_chat.is_chat(config):
        marks = internvl_chat.BEFORE, internvl_chat.IMAGE, internvl_chat.AFTER
        pictures = GotOcr2ImageProcessorPil(**internvl_chat.image_processor(config))
        return _Processor(pictures, internvl_chat.tokenizer(folder), marks, image_places(_read_config(folder)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    marks = tokenizer.start_image_token, tokenizer.context_image_token, tokenizer.end_image_token
    places = _read(folder / "processor_config.json").get("image_seq_length", 256)
    return _Processor(GotOcr2ImageProcessorPil.from_pretrained(folder), tokenizer, marks, places)


def process(processor: Any, request: Request, text: str) -> Mapping[str, np.ndarray]:
    (before, image, after), made = processor.marks, {}
    pieces = text.split(image)
    written = pieces[0]
    if request.images:
        batch = processor.image_processor(list(request.images), crop_to_patches=True, return_tensors="np")
        made["pixel_values"] = batch["pixel_values"]
        for piece, tiles in zip(pieces[1:], batch["num_patches"], strict=True):
            written += f"{before}{image * (processor.places * int(tiles))}{after}{piece}"
    return {"input_ids": processor.tokenizer(written, return_tensors="np")["input_ids"][0], **made}


def reference_inputs(model: Any, prompt: Prompt, pixel_values: np.ndarray) -> Mapping[str, Any]:
    return llava.reference_inputs(model, prompt, pixel_values)
