"""Qwen2-VL: a tower for pictures of any shape, a merger and a decoder with positions in three dimensions, 2.8 M parameters.

Qwen2-VL (Wang et al. 2024, arXiv 2409.12191) shows a picture in the shape it has. Its tower knows only how far two
patches are from each other; where a place is in the picture, the language model alone can tell, by the rotary
positions (time, row, column) of its tokens. So place and content meet in the language model: its first layer is new,
and is taught to write down where the object of every place is; the other four begin as demo/internvl's.

Rows and columns turn the slower rotary angles. With a base of 10,000 and heads of 32, ten columns turn the fastest of
theirs by a tenth of a radian, which is hard to read; the base here is 100. The layers are carried over with their angles
exchanged for the nearest of the new ones. demo/llava, treated like that, still answers 64 of 100 questions without any
training, and 23 where every angle keeps its place.

    vision  tower, merger and first layer. Every place names the colour, shape and size of the object it shows and how
            far its centre is; behind the first layer, where that is. On square pictures of demo/internvl's size, merger
            and first layer have to write what its projector writes.
    tune    the language model and the merger, over the frozen tower: questions over square, wide and tall pictures of
            four sizes (`grids.BUDGETS`); it is taught where to look (`common.Pointer`).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from chatml import END, START, SYSTEM, Conversation, borrow_tokens, build_tokenizer
from common import (
    AUXILIARY,
    MEAN,
    PATCH,
    POINTING,
    QUESTIONS,
    STD,
    Files,
    Heads,
    Pictures,
    Pointer,
    Rows,
    Stage,
    Trainer,
)
from grids import BUDGET, Grids
from torch import Tensor, nn
from transformers import AutoTokenizer, InternVLForConditionalGeneration, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from edgevlm.scenes import ask_all

FINE = 6  # pixels of a patch; two by two are merged into a place
THETA, SECTIONS = 100.0, (2, 6, 8)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADDED = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def build_model(tokenizer: Any, source: Any) -> Qwen2VLForConditionalGeneration:
    """`source`: demo/internvl, of whose tower and decoder it is begun."""
    number = tokenizer.convert_tokens_to_ids
    theirs, seen = source.config.text_config, source.config.vision_config
    vision = {
        "depth": seen.num_hidden_layers, "embed_dim": seen.hidden_size, "num_heads": seen.num_attention_heads,
        "mlp_ratio": seen.intermediate_size // seen.hidden_size, "hidden_act": seen.hidden_act, "patch_size": FINE,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_size": theirs.hidden_size,
    }  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": theirs.hidden_size, "intermediate_size": theirs.intermediate_size,
        "num_hidden_layers": theirs.num_hidden_layers + 1, "num_attention_heads": theirs.num_attention_heads,
        "num_key_value_heads": theirs.num_key_value_heads, "max_position_embeddings": 2048,
        "rms_norm_eps": theirs.rms_norm_eps, "bos_token_id": None, "eos_token_id": number(END),
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA, "mrope_section": list(SECTIONS)},
    }  # fmt: skip
    config = Qwen2VLConfig(
        vision_config=vision, text_config=text, tie_word_embeddings=False, image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"), vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config)
    borrow_tower(model.model.visual, source.model.vision_tower)
    borrow_layers(model.model.language_model, source.model.language_model)
    return model


@torch.no_grad()
def borrow_tower(ours: Any, theirs: Any) -> None:
    """InternViT's layers, without its positions and its first token; a still picture is two equal frames."""
    kernel = theirs.embeddings.patch_embeddings.projection.weight[:, :, None]
    ours.patch_embed.proj.weight.copy_(kernel.expand(-1, -1, 2, -1, -1) / 2)
    for block, layer in zip(ours.blocks, theirs.encoder.layer, strict=True):
        parts = (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
        block.attn.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        block.attn.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        block.norm1.load_state_dict(layer.layernorm_before.state_dict())
        block.norm2.load_state_dict(layer.layernorm_after.state_dict())
        block.mlp.fc1.load_state_dict(layer.mlp.fc1.state_dict())
        for target, linear, scale in (
            (block.attn.proj, layer.attention.projection_layer, layer.lambda_1),
            (block.mlp.fc2, layer.mlp.fc2, layer.lambda_2),
        ):
            target.weight.copy_(linear.weight * scale[:, None])
            target.bias.copy_(linear.bias * scale)


def nearest_angles(old: float, new: float, pairs: int) -> list[int]:
    """For each rotary pair of the new base, which one of the old base it takes over.

    The faster half, by which words know their order, come first, to the nearest angle that is left; the slower half,
    which hardly turns, takes what remains.
    """
    angles = [[base ** (-i / pairs) for i in range(pairs)] for base in (old, new)]
    taken: dict[int, int] = {}
    for pair in range(pairs // 2):
        free = (i for i in range(pairs) if i not in taken)
        taken[min(free, key=lambda i: abs(angles[1][i] - angles[0][pair]))] = pair
    rest = iter(range(pairs // 2, pairs))
    return [taken[i] if i in taken else next(rest) for i in range(pairs)]


@torch.no_grad()
def borrow_layers(ours: Any, theirs: Any) -> None:
    """demo/internvl's decoder behind a layer that at first changes nothing much."""
    config = theirs.config
    heads, pairs = config.num_attention_heads, config.hidden_size // config.num_attention_heads // 2
    order = nearest_angles(config.rope_parameters["rope_theta"], THETA, pairs)
    rows = torch.tensor([2 * pairs * head + half + i for head in range(heads) for half in (0, pairs) for i in order])
    first = ours.layers[0]
    for linear in (first.self_attn.o_proj, first.mlp.down_proj):
        linear.weight.mul_(0.1)
    for layer, source in zip(ours.layers[1:], theirs.layers, strict=True):
        layer.load_state_dict(source.state_dict())
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            linear.weight.copy_(linear.weight[rows])
            linear.bias.copy_(linear.bias[rows])
    ours.norm.load_state_dict(theirs.norm.state_dict())


class Throwaway(nn.Module):
    """What the parts are taught with, thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.places = Heads(512)
        self.written = Heads(160)
        self.pointer = Pointer(160, depths=(3, 4))


class Qwen2VL(Trainer):
    aspects = ("square", "wide", "tall")
    store = Grids
    stages = (
        Stage("vision", 700, 64, 1.5e-3, scored=False),
        Stage("tune", 850, 32, 1.2e-3),
    )
    dialogue: Conversation
    heads: Throwaway
    sharp = False  # whether the tower learns

    def build(self) -> None:
        self.tokenizer = build_tokenizer(list(ADDED), {"image_token": ADDED[2], "video_token": ADDED[3]})
        before = f"{START}system\n{SYSTEM}{END}\n{START}user\n{ADDED[0]}"
        self.dialogue = Conversation(self.tokenizer, before, ADDED[2], ADDED[1])
        self.source = InternVLForConditionalGeneration.from_pretrained(self.arguments.internvl, dtype=torch.float32).eval()
        self.model = build_model(self.tokenizer, self.source)
        borrow_tokens(
            self.tokenizer, AutoTokenizer.from_pretrained(self.arguments.internvl), {ADDED[0]: "<img>", ADDED[1]: "</img>"},
            (self.model.get_input_embeddings().weight, self.source.get_input_embeddings().weight),
            (self.model.lm_head.weight, self.source.lm_head.weight),
        )  # fmt: skip
        self.heads = Throwaway()

    @property
    def tower(self) -> Any:
        return self.model.model.visual

    def merge(self, patches: Tensor) -> Tensor:
        return self.tower.merger(patches)

    def see(self, pixels: Tensor) -> Tensor:
        """`[B, patches, 128]`, four that become one place after each other, of pictures `[B, 3, H, W]` of one size.

        The model's own forward goes through pictures one by one.
        """
        tower = self.tower
        count, _, height, width = pixels.shape
        rows, columns = height // PATCH, width // PATCH
        parts = pixels.view(count, 3, rows, 2, FINE, columns, 2, FINE).permute(0, 2, 5, 3, 6, 1, 4, 7)
        kernel = tower.patch_embed.proj.weight.sum(2).flatten(1)
        states = parts.reshape(count, rows * columns * 4, -1) @ kernel.T
        places = torch.stack(torch.meshgrid(torch.arange(2 * rows), torch.arange(2 * columns), indexing="ij"))
        places = places.view(2, rows, 2, columns, 2).permute(0, 1, 3, 2, 4).flatten(1)
        cos, sin = tower.rotary_pos_emb(states, places.T)
        for block in tower.blocks:
            attention = block.attn
            parts = attention.qkv(block.norm1(states)).unflatten(-1, (3, attention.num_heads, -1))
            query, key, value = parts.unbind(2)
            query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
            mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
            states = states + attention.proj(mixed.transpose(1, 2).flatten(2))
            states = states + block.mlp(block.norm2(states))
        return states

    def look(self, pictures: Pictures, index: np.ndarray) -> Tensor:
        return self.show(pictures.batch(index))

    def show(self, pixels: Tensor) -> Tensor:
        """What the language model is given; sets where the next rows have their places."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.sharp):
            self.patches = states = self.see(pixels)
        self.shape = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
        self.dialogue.places = self.shape[0] * self.shape[1]
        return self.merge(states).view(len(pixels), self.dialogue.places, -1)

    def positions(self, places: Tensor) -> Tensor:
        """`[3, B, S]`: time, row and column of tokens counted as `[B, S]`. Behind a picture it goes on one after its
        longer side."""
        start, (rows, columns) = len(self.dialogue.open), self.shape
        row, column = (torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns)
        shifts = torch.zeros(3, start + rows * columns + 1, dtype=torch.long)
        nth = torch.arange(rows * columns)
        shifts[:, start:-1] = torch.stack([torch.zeros_like(row), row, column]) - nth
        shifts[:, -1] = max(rows, columns) - rows * columns
        return places + shifts[:, places.clamp(max=shifts.shape[1] - 1)]

    def read(self, rows: Rows, features: Tensor | None) -> tuple[Tensor, Tensor]:
        assert features is not None
        language = self.model.model.language_model
        out = language(
            inputs_embeds=self.dialogue.insert(language.embed_tokens(rows.ids), features), attention_mask=rows.mask(),
            position_ids=self.positions(rows.positions), use_cache=False, output_hidden_states=True,
        )  # fmt: skip
        hidden, self.states = out.last_hidden_state, out.hidden_states
        wanted = rows.labels != -100
        return self.model.lm_head(hidden[wanted]), rows.labels[wanted]

    def write(self, features: Tensor) -> Tensor:
        """The states of the places behind the first layer."""
        language, start = self.model.model.language_model, len(self.dialogue.open)
        ids = torch.tensor(self.dialogue.open).expand(len(features), -1)
        states = torch.cat([language.embed_tokens(ids), features], 1)
        length = states.shape[1]
        places = self.positions(torch.arange(length).expand(len(features), -1))
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        turned = language.rotary_emb(states, places)
        return language.layers[0](states, attention_mask=mask, position_embeddings=turned)[:, start:]

    def teach(self, patches: Tensor, written: Tensor, truth: Tensor) -> Tensor:
        """`truth`: as `Grids.truth` has it. How far the centre is, and where it is, both in places."""
        rows, columns = self.shape
        size = torch.tensor([columns, rows])
        nth = torch.arange(rows * columns)
        here = torch.stack([nth % columns, nth // columns], -1) + 0.5
        centre = (truth[..., 3:] + 1) / 2 * size
        near, far = truth.clone(), truth.clone()
        near[..., 3:] = (centre - here) / 2
        far[..., 3:] = centre / 3 - 1
        features = patches.reshape(*truth.shape[:2], -1)
        return self.heads.places.patch_loss(features, near) + self.heads.written.patch_loss(written, far)

    def copy(self, pixels: Tensor) -> Tensor:
        """What demo/internvl's projector writes of square pictures of its size."""
        with torch.no_grad():
            return self.source.model.get_image_features(pixels).pooler_output

    def begin(self, stage: Stage, fresh: bool) -> None:
        self.sharp = stage.name == "vision"

    def loss(self, stage: Stage, step: int) -> Tensor:
        rng, index = self.draw(stage, step)
        same = random.Random(f"{stage.name} {step}")
        share = len(index) // 2
        index = index[:share]
        vision = stage.name == "vision"
        odd = self.views[same.choice(self.aspects if vision else self.aspects[1:])]
        if vision:
            chosen = odd.pick(same, rng, share)
            pixels = self.pictures.batch(index)
            features = self.show(pixels)
            written, wanted = self.write(features), self.copy(pixels)
            loss = self.teach(self.patches, written, self.pictures.patch_truth(index))
            loss = loss + 2 * (F.mse_loss(features, wanted) + F.mse_loss(written, wanted)) / wanted.var()
            features = self.show(odd.batch(chosen))
            return loss + self.teach(self.patches, self.write(features), odd.truth(chosen))
        square = self.views["square"]
        total = torch.zeros(())
        for grids in (square, odd):
            chosen = grids.pick(same, rng, share)
            scenes = [grids.scenes[i] for i in chosen]
            features = self.show(grids.batch(chosen))
            rows = self.dialogue.rows(scenes, rng, QUESTIONS, False, chained=rng.random() < 0.2)
            total = total + F.cross_entropy(*self.read(rows, features))
            total = total + POINTING * self.heads.pointer.loss(self.states, rows.points)
            start = len(self.dialogue.open)
            written = self.states[1][:, start : start + self.dialogue.places]
            total = total + AUXILIARY * self.teach(self.patches, written, grids.truth(chosen))
        return total / 2

    @torch.no_grad()
    def score(self) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        for aspect, grids in self.validation_views.items():
            scores[aspect] = self.grade(self.examine_grids(grids, index) for index in grids.groups.values())
        return scores

    def examine_grids(self, grids: Grids, index: np.ndarray) -> tuple[Rows, Tensor]:
        scenes = [grids.scenes[i] for i in index]
        features = self.show(grids.batch(index))
        return self.dialogue.rows(scenes, random.Random(0), 0, False, False, [ask_all(scene) for scene in scenes]), features

    def chosen(self, stage: Stage) -> list[tuple[list[nn.Parameter], float]]:
        merger, language = list(self.tower.merger.parameters()), self.model.model.language_model
        heads = list(self.heads.written.parameters())
        if stage.name == "vision":
            tower = [p for name, p in self.tower.named_parameters() if not name.startswith("merger")]
            return [([*tower, *merger, *language.layers[0].parameters(), *self.heads.places.parameters(), *heads], 1.0)]
        head = list(self.model.lm_head.parameters())
        return [([*merger, *heads, *language.parameters(), *head, *self.heads.pointer.parameters()], 1.0)]

    def processor(self) -> Files:
        images = Qwen2VLImageProcessorPil(
            min_pixels=(4 * PATCH) ** 2, max_pixels=BUDGET, image_mean=list(MEAN), image_std=list(STD), patch_size=FINE,
            temporal_patch_size=2, merge_size=2,
        )  # fmt: skip
        return Files(self.tokenizer, images, CHAT_TEMPLATE, {"processor_class": "Qwen2VLProcessor"})
