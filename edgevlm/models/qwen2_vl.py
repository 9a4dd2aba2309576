"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191) and Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923): pictures at any
resolution, films, rotary positions in three directions.

`Qwen2VLForConditionalGeneration` and `Qwen2_5_VLForConditionalGeneration` of transformers. A picture is resized to whole
places, cut into patches, and every `merge` by `merge` patches become one place in the prompt. Two frames of a film make
one layer of patches; a picture is a film of two equal frames.

Parts: `vision_encoder` (patches to places, one layer of frames at a time), `embed_tokens`, `decoder`.

The vision graph is the same for every size: where each patch lies, and which patches share a window (2.5), are inputs that
the runtime counts out. Frames are a batch, so attention over a whole frame needs no mask, and the queries go through it in
`ROW_BLOCKS` blocks, which bounds the attention scores: a picture of 1280 by 960 pixels has 6,256 patches and, with sixteen
heads, 2.5 GB of them at once otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle import ImageTokens, Manifest, PatchGrid
from ..errors import UnsupportedModelError
from . import llava

if TYPE_CHECKING:
    from ..prompt import Prompt, PromptBuilder, Request
    from . import PartSpec, RunPart

ARCHITECTURES = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
ALIASES = {"qwen2-vl": "Qwen/Qwen2-VL-2B-Instruct", "qwen2.5-vl": "Qwen/Qwen2.5-VL-3B-Instruct"}

PARTS = ("vision_encoder", "embed_tokens", "decoder")
PICTURES = (0, None)

ROW_BLOCKS = 8


# ----------------------------------------------------------------------------------------- the workshop


def check_config(config: Mapping[str, Any]) -> None:
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "mrope":  # what the first checkpoints call the default with sections
        llava.check_rotary(text)
    for name in ("patch_size", "temporal_patch_size", "spatial_merge_size"):
        if not isinstance(vision.get(name, 2), int):
            raise UnsupportedModelError(f"{name} = {vision[name]!r} is not supported; one whole number is.")


def build_model(folder: Path) -> Any:
    model, config = _classes(folder)
    return model(config.from_pretrained(folder))


def _classes(folder: Path) -> tuple[Any, Any]:
    import transformers

    asked = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    name = next(name for name in ARCHITECTURES if name in asked)
    return getattr(transformers, name), getattr(transformers, name.replace("ForConditionalGeneration", "Config"))


def weight_name(name: str) -> str:
    # Before transformers 4.52 the tower was `visual` beside a `model` that was the language model alone.
    name = llava.weight_name(name)
    return re.sub(r"^(layers|embed_tokens|norm)\.", r"language_model.\1.", name)


def part_specs(model: Any, dtype: str) -> list[PartSpec]:
    from . import PartSpec, decoder_spec, embedding_spec
    from .decoder import ATTENTION, CachedDecoder, Embedding

    config, body = model.config, model.model
    vision, text = config.vision_config, config.text_config
    kv, grid = llava.kv_cache(text, dtype), _patch_grid(vision)
    traced, reference = encoders()
    module = traced if vision._attn_implementation == ATTENTION else reference
    square = grid.merge * grid.merge
    patch = vision.in_channels * grid.temporal * grid.size * grid.size
    windows: dict[str, tuple[tuple[int | str, ...], str]] = {}
    if grid.window:
        windows = {
            "window_index": (("windows", grid.window * grid.window * square), "int64"),
            "window_place": (("places", square), "int64"),
        }
    return [
        PartSpec(
            "vision_encoder",
            module(body.visual),
            {
                "pixel_values": (("frames", "places", square, patch), dtype),
                "position_ids": (("places", square, 2), "int64"),
                **windows,
            },
            {"image_features": (("frames", "places", text.hidden_size), dtype)},
        ),
        embedding_spec(Embedding(body.language_model.embed_tokens), text.hidden_size, dtype),
        decoder_spec(
            CachedDecoder(body.language_model, model.lm_head, kv.layers, mrope=True),
            kv, None, text.hidden_size, text.vocab_size, dtype, mrope=True,
        ),
    ]  # fmt: skip


def encoders() -> tuple[type[Any], type[Any]]:
    """The vision encoder as it is traced, and as transformers itself runs it."""
    import torch
    from torch import Tensor, nn
    from torch.onnx.ops import symbolic

    from .decoder import attention_node

    class VisionEncoder(nn.Module):
        """pixel_values `[frames, places, patches of a place, numbers of a patch]`, position_ids (row, column)
        `[places, patches of a place, 2]` → `[frames, places, hidden]`.

        With windows: window_index `[windows, patches of a window]` (which patch; -1: none) and window_place `[places, patches
        of a place]`, where each patch stands among all windows' patches.
        """

        def __init__(self, tower: Any) -> None:
            super().__init__()
            self.tower, self.heads = tower, tower.config.num_heads
            self.whole = set(getattr(tower, "fullatt_block_indexes", range(len(tower.blocks))))

        def forward(self, pixel_values: Tensor, position_ids: Tensor, *tables: Tensor) -> Tensor:
            frames, places = pixel_values.shape[:2]
            x = self.embed(pixel_values, *tables)
            turns = position_ids.flatten(0, 1).unsqueeze(-1).float() * self.tower.rotary_pos_emb.inv_freq
            turns = turns.flatten(1).unsqueeze(0).expand(frames, -1, -1)
            cos, sin = turns.cos().to(x.dtype), turns.sin().to(x.dtype)
            deep = []
            for number, block in enumerate(self.tower.blocks):
                attention, normed = block.attn, block.norm1(x)
                split = attention.qkv(normed).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
                query, key, value = split.unbind(0)
                query, key = (
                    symbolic("RotaryEmbedding", [t, cos, sin], dtype=t.dtype, shape=t.shape, version=23) for t in (query, key)
                )
                if number in self.whole:
                    seen = self.see_all(query, key, value, attention.scaling)
                else:
                    seen = self.see_window(query, key, value, attention.scaling, *tables)
                x = x + attention.proj(seen.transpose(1, 2).flatten(2))
                x = x + block.mlp(block.norm2(x))
                deep += self.look_deep(number, x, places)
            return torch.cat([self.merge(self.tower.merger, x, places), *deep], -1)

        def embed(self, pixel_values: Tensor, *_: Tensor) -> Tensor:
            """`[frames, patches, width]`. A convolution whose stride is its size is a product over patches already cut."""
            kernel = self.tower.patch_embed.proj
            return nn.functional.linear(pixel_values.flatten(1, 2), kernel.weight.flatten(1), kernel.bias)

        def merge(self, merger: Any, x: Tensor, places: Any) -> Tensor:
            """`[frames, places, hidden]`: the patches of a place side by side, projected."""
            return merger.mlp(merger.ln_q(x).view(x.shape[0], places, -1))

        def look_deep(self, number: int, x: Tensor, places: Any) -> list[Tensor]:
            """What is handed on from behind block `number`, for models that look there too."""
            return []

        def see_all(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            """`[frames, heads, patches, D]` each. Blocks are of one size, so the last may repeat the last row."""
            rows = query.shape[2]
            size = (rows + ROW_BLOCKS - 1) // ROW_BLOCKS
            index = torch.minimum(torch.arange(ROW_BLOCKS * size), torch.tensor(rows - 1))
            blocks = query.index_select(2, index).view(*query.shape[:2], ROW_BLOCKS, size, -1).unbind(2)
            return torch.cat([attention_node(block, key, value, None, scale) for block in blocks], 2)[:, :, :rows]

        def see_window(
            self, query: Tensor, key: Tensor, value: Tensor, scale: float, window_index: Tensor, place: Tensor
        ) -> Tensor:
            windows, patches = window_index.shape
            frames, heads = query.shape[:2]
            index = torch.maximum(window_index, torch.tensor(0)).flatten()

            def gather(x: Tensor) -> Tensor:  # windows become a batch
                return x.index_select(2, index).view(frames, heads, windows, patches, -1).transpose(1, 2).flatten(0, 1)

            # The operator wants a row of the mask for each query.
            shown = (window_index >= 0).view(1, windows, 1, 1, patches).expand(frames, -1, -1, patches, -1).flatten(0, 1)
            seen = attention_node(gather(query), gather(key), gather(value), shown, scale)
            seen = seen.view(frames, windows, heads, patches, -1).transpose(1, 2).flatten(2, 3)
            return seen.index_select(2, place.flatten())

    class Reference(nn.Module):
        """The same through transformers' own forward, which finds positions and windows by itself."""

        def __init__(self, tower: Any) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, pixel_values: Tensor, position_ids: Tensor, *_: Tensor) -> Tensor:
            frames, places = pixel_values.shape[:2]
            rows, columns = (position_ids.flatten(0, 1).amax(0) + 1).tolist()
            patches = pixel_values.flatten(0, 2)
            out = self.tower(patches, grid_thw=torch.tensor([[frames, rows, columns]]))
            return self.read(out).view(frames, places, -1)

        def read(self, out: Any) -> Tensor:
            return out.pooler_output

    return VisionEncoder, Reference


def _patch_grid(vision: Any) -> PatchGrid:
    window = getattr(vision, "window_size", 0) // vision.spatial_merge_size // vision.patch_size
    whole = getattr(vision, "fullatt_block_indexes", None)
    return PatchGrid(
        vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size,
        0 if whole is None or set(range(vision.depth)) <= set(whole) else window,
        float(getattr(vision, "tokens_per_second", 0)),
    )  # fmt: skip


def describe(folder: Path, config: Any, dtype: str) -> Manifest:
    from . import added_token

    text = config.text_config
    return Manifest(
        family="qwen2_vl",
        dtype=dtype,
        kv_cache=llava.kv_cache(text, dtype),
        context_length=text.max_position_embeddings,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        image=ImageTokens(added_token(folder, config.image_token_id), config.image_token_id, 0),
        video=ImageTokens(added_token(folder, config.video_token_id), config.video_token_id, 0),
        patches=_patch_grid(config.vision_config),
    )


# -------------------------------------------------------------------------------------------- the robot


def build_prompt(builder: PromptBuilder, manifest: Manifest, request: Request) -> Prompt:
    prompt = builder.build(request)
    return replace(prompt, positions=rope_positions(prompt, manifest))


def rope_positions(prompt: Prompt, manifest: Manifest) -> np.ndarray:
    """int64 `[3, S]`: time, height and width of every token (section 2.1 of the paper; `get_rope_index` of transformers).

    Text counts on in all three directions from behind a picture's longer side.
    """
    assert manifest.patches is not None
    out = np.empty((3, len(prompt.ids)), np.int64)
    done = reached = 0
    for (start, length), (frames, rows, columns), fps in zip(prompt.places, prompt.grids, prompt.rates, strict=True):
        out[:, done:start] = reached + np.arange(start - done)
        reached += start - done
        step = np.float32(1)
        if fps and manifest.patches.tokens_per_second:  # 2.5 counts time, 2 counts layers of frames
            step = np.float32(manifest.patches.tokens_per_second) * np.float32(manifest.patches.temporal / fps)
        time = (np.arange(frames, dtype=np.float32) * step).astype(np.int64)
        axes = np.meshgrid(time, np.arange(rows), np.arange(columns), indexing="ij")
        out[:, start : start + length] = np.stack(axes).reshape(3, -1) + reached
        done, reached = start + length, reached + max(rows, columns)
    out[:, done:] = reached + np.arange(len(prompt.ids) - done)
    return out


def encode_image(run: RunPart, manifest: Manifest, pixel_values: np.ndarray) -> np.ndarray:
    feeds = vision_inputs(manifest, pixel_values)
    layers = feeds.pop("pixel_values")
    # One at a time: memory does not grow with the length of a film.
    rows = [run("vision_encoder", {"pixel_values": layer[None], **feeds})["image_features"][0] for layer in layers]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def vision_inputs(manifest: Manifest, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
    """What the vision encoder takes for frames `[T, 3, H, W]`, whose sides are whole places."""
    grid = manifest.patches
    assert grid is not None
    height, width = pixel_values.shape[2] // grid.size, pixel_values.shape[3] // grid.size
    feeds = {"pixel_values": cut_patches(pixel_values, grid), "position_ids": patch_positions(height, width, grid.merge)}
    if grid.window:
        feeds |= window_tables(height // grid.merge, width // grid.merge, grid)
    return feeds


def cut_patches(pixel_values: np.ndarray, grid: PatchGrid) -> np.ndarray:
    """Frames `[T, C, H, W]` → `[T / temporal, places, patches of a place, C · temporal · size · size]`; the last frame is
    repeated until the layers are full. Source: `patchify` of Qwen2-VL's image and video processors."""
    missing = -len(pixel_values) % grid.temporal
    if missing:
        pixel_values = np.concatenate([pixel_values, np.repeat(pixel_values[-1:], missing, 0)])
    frames, channels, height, width = pixel_values.shape
    rows, columns = height // grid.size // grid.merge, width // grid.size // grid.merge
    cut = pixel_values.reshape(
        frames // grid.temporal, grid.temporal, channels, rows, grid.merge, grid.size, columns, grid.merge, grid.size
    ).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return cut.reshape(frames // grid.temporal, rows * columns, grid.merge * grid.merge, -1)


def patch_positions(height: int, width: int, merge: int) -> np.ndarray:
    """int64 `[places, patches of a place, 2]`: row and column of every patch of a frame of `height` by `width` patches."""
    both = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    blocks = both.reshape(height // merge, merge, width // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(-1, merge * merge, 2).astype(np.int64)


def window_tables(rows: int, columns: int, grid: PatchGrid) -> dict[str, np.ndarray]:
    """Windows over `rows` by `columns` places (section 2.1.1 of the paper): those at the right and lower edge are smaller."""
    side, square = grid.window, grid.merge * grid.merge
    high, wide = -(-rows // side), -(-columns // side)
    places = np.full((high * side, wide * side), -1, np.int64)
    places[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    windows = places.reshape(high, side, wide, side).transpose(0, 2, 1, 3).reshape(high * wide, side * side, 1)
    index = np.where(windows >= 0, windows * square + np.arange(square), -1).reshape(high * wide, -1)
    place = np.empty(rows * columns * square, np.int64)
    place[index[index >= 0]] = np.flatnonzero(index >= 0)
    return {"window_index": index, "window_place": place.reshape(-1, square)}


# ---------------------------------------------------------------------------------------- the reference


def load_reference(folder: Path) -> Any:
    import torch

    return _classes(folder)[0].from_pretrained(folder, dtype=torch.float32)


def load_processor(folder: Path) -> Any:
    """transformers' Qwen2VLProcessor needs torchvision for films; its image processor and tokenizer do not."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Pair:
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_token_id = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("image_token_id", 151655)

    return Pair()


def process(processor: Any, request: Request, text: str) -> Mapping[str, np.ndarray]:
    if any(hasattr(picture, "frames") for picture in request.images):
        return {}  # films want torchvision
    pixels, written = {}, text
    if request.images:
        batch = processor.image_processor(list(request.images), return_tensors="np")
        pixels = {"pixel_values": batch["pixel_values"]}
        token = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
        first, *pieces = text.split(token)
        places = batch["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2
        written = first + "".join(token * int(n) + piece for n, piece in zip(places, pieces, strict=True))
    return {"input_ids": processor.tokenizer(written, return_tensors="np")["input_ids"][0], **pixels}


def reference_inputs(model: Any, prompt: Prompt, pixel_values: np.ndarray) -> Mapping[str, Any]:
    import torch

    config, ids = model.config, torch.tensor([prompt.ids])
    merge = config.vision_config.spatial_merge_size
    made: dict[str, Any] = {}
    first = 0
    kinds = [prompt.ids[start] == config.video_token_id for start, _ in prompt.places]
    for film, (frames, rows, columns) in zip(kinds, prompt.grids, strict=True):
        end = first + frames * rows * columns * merge * merge
        pixels, grid = ("pixel_values_videos", "video_grid_thw") if film else ("pixel_values", "image_grid_thw")
        made.setdefault(pixels, []).append(torch.from_numpy(np.ascontiguousarray(pixel_values[first:end])))
        made.setdefault(grid, []).append(torch.tensor([[frames, rows * merge, columns * merge]]))
        first = end
    made = {name: torch.cat(tensors) for name, tensors in made.items()}
    types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    seconds = {}
    if "video_grid_thw" in made and hasattr(config.vision_config, "tokens_per_second"):
        rates = [rate for rate in prompt.rates if rate]
        seconds = {"second_per_grid_ts": torch.tensor([config.vision_config.temporal_patch_size / rate for rate in rates])}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **made, **seconds}
