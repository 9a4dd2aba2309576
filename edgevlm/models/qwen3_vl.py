"""Qwen3-VL (Bai et al. 2025, arXiv 2511.21631): Qwen2-VL's tower with learnt positions beside the rotary ones, and features of
several of its layers, added to the first layers of the decoder (DeepStack, Meng et al. 2024, arXiv 2406.04334).

`Qwen3VLForConditionalGeneration` of transformers, pictures; films, whose frames have their times written between them,
are not supported yet.

Parts: as Qwen2-VL's. What belongs to one place travels together: a row of the embeddings is `1 + deep layers` rows of the
hidden size side by side, zeros behind those of text, and the decoder takes it apart.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle import ImageTokens, Manifest, PatchGrid
from . import llava, qwen2_vl

if TYPE_CHECKING:
    from ..prompt import Prompt, PromptBuilder, Request
    from . import PartSpec, RunPart

ARCHITECTURES = ("Qwen3VLForConditionalGeneration",)
ALIASES = {"qwen3-vl": "Qwen/Qwen3-VL-2B-Instruct"}

PARTS = qwen2_vl.PARTS
PICTURES = qwen2_vl.PICTURES


# ----------------------------------------------------------------------------------------- the workshop


check_config = qwen2_vl.check_config
weight_name = qwen2_vl.weight_name


def build_model(folder: Path) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_pretrained(folder))


def part_specs(model: Any, dtype: str) -> list[PartSpec]:
    from . import PartSpec, decoder_spec, embedding_spec
    from .decoder import ATTENTION

    config, body = model.config, model.model
    vision, text = config.vision_config, config.text_config
    encoder, reference, embedding, decoder = _modules()
    kv, grid = llava.kv_cache(text, dtype), _patch_grid(vision)
    square = grid.merge * grid.merge
    patch = vision.in_channels * grid.temporal * grid.size * grid.size
    wide = _width(config)
    return [
        PartSpec(
            "vision_encoder",
            (encoder if vision._attn_implementation == ATTENTION else reference)(body.visual),
            {
                "pixel_values": (("frames", "places", square, patch), dtype),
                "position_ids": (("places", square, 2), "int64"),
                "learnt_index": (("places", square, 4), "int64"),
                "learnt_weight": (("places", square, 4), "float32"),
            },
            {"image_features": (("frames", "places", wide), dtype)},
        ),
        embedding_spec(embedding(body.language_model.embed_tokens, wide - text.hidden_size), wide, dtype),
        decoder_spec(
            decoder(body.language_model, model.lm_head, kv.layers, mrope=True),
            kv, None, wide, text.vocab_size, dtype, mrope=True,
        ),
    ]  # fmt: skip


def _modules() -> tuple[type[Any], ...]:
    import torch
    from torch import Tensor, nn

    from .decoder import CachedDecoder, Embedding, NewRows, StaticCache

    encoder, reference = qwen2_vl.encoders()

    class VisionEncoder(encoder):  # type: ignore[misc, valid-type]
        """As Qwen2-VL's; learnt_index and learnt_weight `[places, patches of a place, 4]` say between which learnt positions
        each patch lies."""

        def embed(self, pixel_values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            x = super().embed(pixel_values)
            learnt = self.tower.pos_embed(index.flatten(0, 1)) * weight.flatten(0, 1).unsqueeze(-1)
            return x + learnt.sum(1).to(x.dtype)

        def merge(self, merger: Any, x: Tensor, places: Any) -> Tensor:
            if merger.use_postshuffle_norm:
                normed = merger.norm(x.view(x.shape[0], places, -1))
            else:
                normed = merger.norm(x).view(x.shape[0], places, -1)
            return merger.linear_fc2(merger.act_fn(merger.linear_fc1(normed)))

        def look_deep(self, number: int, x: Tensor, places: Any) -> list[Tensor]:
            layers = list(self.tower.deepstack_visual_indexes)
            return [self.merge(self.tower.deepstack_merger_list[layers.index(number)], x, places)] if number in layers else []

    class Reference(reference):  # type: ignore[misc, valid-type]
        def read(self, out: Any) -> Tensor:
            return torch.cat([out.pooler_output, *out.deepstack_features], -1)

    class WideEmbedding(Embedding):
        """input_ids int64 `[B, S]` → `[B, S, hidden + blank]`, zeros behind."""

        def __init__(self, table: nn.Module, blank: int) -> None:
            super().__init__(table)
            self.blank = blank

        def forward(self, input_ids: Tensor) -> Tensor:
            return nn.functional.pad(super().forward(input_ids), (0, self.blank))

    class DeepDecoder(CachedDecoder):
        """Takes a row apart: what enters, and what is added behind each of the first layers."""

        def hidden_states(self, inputs_embeds: Tensor, position_ids: Tensor, cache: StaticCache) -> Tensor:
            model: Any = self.language_model
            rows, *deep = torch.split(inputs_embeds, model.config.hidden_size, -1)
            # transformers picks the pictures' rows with a mask of bools, whose count a graph cannot know; zeros do the same.
            model._deepstack_process = lambda hidden, _, features: hidden + features
            model.rotary_emb.recomposition_frequencies = _interleave(model.rotary_emb)
            return model(
                inputs_embeds=rows, position_ids=position_ids, past_key_values=NewRows(), use_cache=True, edgevlm_cache=cache,
                visual_pos_masks=None, deepstack_visual_embeds=deep,
            ).last_hidden_state  # fmt: skip

    def _interleave(rotary: Any) -> Any:
        """Which of time, height and width turns which pair of channels: transformers writes in place, here it is chosen."""
        pairs = torch.arange(rotary.inv_freq.shape[-1])
        turned = [(pairs % 3 == axis) & (pairs < 3 * rotary.mrope_section[axis]) for axis in (1, 2)]
        axes = torch.stack([~(turned[0] | turned[1]), *turned]).float()

        def recompose(angles: Tensor) -> Tensor:  # [3, B, S, pairs]
            chosen = (angles * axes[:, None, None]).sum(0)
            return torch.cat((chosen, chosen), -1)

        return recompose

    return VisionEncoder, Reference, WideEmbedding, DeepDecoder


def _patch_grid(vision: Any) -> PatchGrid:
    side = int(vision.num_position_embeddings**0.5)
    return PatchGrid(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, learnt=side)


def _width(config: Any) -> int:
    """Numbers of a row of embeddings."""
    return int(config.text_config.hidden_size * (1 + len(config.vision_config.deepstack_visual_indexes)))


def describe(folder: Path, config: Any, dtype: str) -> Manifest:
    from . import added_token

    text = config.text_config
    return Manifest(
        family="qwen3_vl",
        dtype=dtype,
        kv_cache=llava.kv_cache(text, dtype),
        context_length=text.max_position_embeddings,
        hidden_size=_width(config),
        vocab_size=text.vocab_size,
        image=ImageTokens(added_token(folder, config.image_token_id), config.image_token_id, 0),
        patches=_patch_grid(config.vision_config),
    )


# -------------------------------------------------------------------------------------------- the robot


def build_prompt(builder: PromptBuilder, manifest: Manifest, request: Request) -> Prompt:
    prompt = builder.build(request)
    return replace(prompt, positions=qwen2_vl.rope_positions(prompt, manifest))


def encode_image(run: RunPart, manifest: Manifest, pixel_values: np.ndarray) -> np.ndarray:
    return run("vision_encoder", vision_inputs(manifest, pixel_values))["image_features"][0]


def vision_inputs(manifest: Manifest, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
    """What the vision encoder takes for a picture `[1, 3, H, W]`, whose sides are whole places."""
    feeds = qwen2_vl.vision_inputs(manifest, pixel_values)
    assert manifest.patches is not None
    return feeds | learnt_positions(feeds["position_ids"], manifest.patches.learnt)


def learnt_positions(position_ids: np.ndarray, side: int) -> dict[str, np.ndarray]:
    """Between which of the `side` by `side` learnt positions a patch lies, and how near to each: the table is stretched
    over the picture, corner to corner. Source: `get_vision_interpolation_indices_and_weights` of transformers."""
    axes = []
    for positions in np.moveaxis(position_ids, -1, 0):
        at = positions.astype(np.float32) * np.float32(side - 1) / np.float32(max(positions.max(), 1))
        low = np.floor(at).astype(np.int64)
        share = at - low.astype(np.float32)
        axes.append((np.stack([low, np.minimum(low + 1, side - 1)], -1), np.stack([1 - share, share], -1)))
    (rows, row_weights), (columns, column_weights) = axes
    index = rows[..., :, None] * side + columns[..., None, :]
    weight = row_weights[..., :, None] * column_weights[..., None, :]
    shape = (*position_ids.shape[:2], 4)
    return {"learnt_index": index.reshape(shape), "learnt_weight": weight.reshape(shape).astype(np.float32)}


# ---------------------------------------------------------------------------------------- the reference


def load_reference(folder: Path) -> Any:
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


load_processor = qwen2_vl.load_processor
process = qwen2_vl.process
reference_inputs = qwen2_vl.reference_inputs
