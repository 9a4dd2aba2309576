"""Qwen-VL, the first generation: a ViT, a resampler of 36 queries and Qwen's decoder, 2.4 M parameters.

Qwen-VL (Bai et al. 2023, arXiv 2308.12966) squeezes every picture to a square, and a single layer of attention reads a
grid of queries from it. demo/internvl sees wide and tall pictures the same way, as the last of its tiles: its tower
and its decoder are what this model begins with, and its projector is the resampler's teacher.

    vision  tower and resampler, on square and on squeezed pictures: the tower has to see what demo/internvl's sees, though
            it has no first token and norms its patches, and every query has to say what the projector says of the
            four patches at its place.
    tune    the language model and the resampler: questions over square and squeezed pictures, and where to look
            (`common.Pointer`).
"""

from __future__ import annotations

import base64
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from chatml import END, START, SYSTEM, Conversation, borrow_tokens, learn_words
from common import GRID, MEAN, POINTING, QUESTIONS, SIDE, STD, Pictures, Pointer, Rows, Stage, Trainer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, InternVLForConditionalGeneration, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from views import Views

from edgevlm.models import qwen_vl
from edgevlm.models.qwen_vl_modules import PRETRAINED_GRID, QwenVL, VisionEncoder
from edgevlm.scenes import ask_all

FINE = 6  # pixels of a patch


def write_ranks(folder: Path) -> int:
    """`qwen.tiktoken`, the vocabulary as base64 of each token's bytes and its rank; returns how many there are."""
    vocabulary, _ = learn_words()
    byte = {character: number for number, character in bytes_to_unicode().items()}
    tokens = [bytes(byte[character] for character in token) for token in sorted(vocabulary, key=vocabulary.__getitem__)]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_text("".join(lines), encoding="ascii")
    return len(lines)


def build_tokenizer() -> tuple[PreTrainedTokenizerFast, int]:
    """The tokenizer that an export makes of the ranks, and their number."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = write_ranks(Path(folder))
        made = Tokenizer.from_str(qwen_vl.build_tokenizer(Path(folder)))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=qwen_vl.END_OF_TEXT), ranks


def describe(ranks: int, source: Any) -> dict[str, Any]:
    """`config.json`, in the sizes of demo/internvl."""
    theirs, seen = source.config.text_config, source.config.vision_config
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "vocab_size": ranks + len(qwen_vl.ADDED),
        "hidden_size": theirs.hidden_size,
        "intermediate_size": 2 * theirs.intermediate_size,
        "num_hidden_layers": theirs.num_hidden_layers,
        "num_attention_heads": theirs.num_attention_heads,
        "kv_channels": theirs.hidden_size // theirs.num_attention_heads,
        "seq_length": 2048,
        "max_position_embeddings": 8192,
        "layer_norm_epsilon": theirs.rms_norm_eps,
        "rotary_emb_base": theirs.rope_parameters["rope_theta"],
        "rotary_pct": 1.0,
        "no_bias": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "fp16": True,
        "bf16": False,
        "fp32": False,
        "visual": {
            "image_size": SIDE,
            "patch_size": FINE,
            "width": seen.hidden_size,
            "layers": seen.num_hidden_layers,
            "heads": seen.num_attention_heads,
            "mlp_ratio": seen.intermediate_size // seen.hidden_size,
            "output_dim": theirs.hidden_size,
            "n_queries": GRID * GRID,
            "image_start_id": ranks + qwen_vl.ADDED.index("<img>"),
        },
    }


@torch.no_grad()
def borrow_tower(ours: Any, theirs: Any, pixels: Tensor) -> None:
    """InternViT's layers. What it adds to every patch goes into the positions, and what the new norm takes from a patch's
    size goes back by its weight, as far as one number can."""
    ours.conv1.weight.copy_(theirs.embeddings.patch_embeddings.projection.weight)
    side = SIDE // FINE
    table = theirs.embeddings.position_embeddings[0, 1:] + theirs.embeddings.patch_embeddings.projection.bias
    table = F.interpolate(table.T.reshape(1, -1, side, side), size=(PRETRAINED_GRID, PRETRAINED_GRID), mode="bicubic")
    ours.positional_embedding.copy_(table[0].flatten(1).T)
    patches = theirs.embeddings(pixels)[:, 1:]
    ours.ln_pre.weight.fill_(float(patches.std(-1).mean()))
    ours.ln_pre.bias.copy_(patches.mean(-1).mean().expand_as(ours.ln_pre.bias))
    for block, layer in zip(ours.transformer.resblocks, theirs.encoder.layer, strict=True):
        attention, heads = layer.attention, layer.attention.num_heads
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        block.attn.in_proj.weight.copy_(torch.stack([p.weight.unflatten(0, (heads, -1)) for p in parts], 1).flatten(0, 2))
        block.attn.in_proj.bias.copy_(torch.stack([p.bias.unflatten(0, (heads, -1)) for p in parts], 1).flatten())
        block.ln_1.load_state_dict(layer.layernorm_before.state_dict())
        block.ln_2.load_state_dict(layer.layernorm_after.state_dict())
        block.mlp.c_fc.load_state_dict(layer.mlp.fc1.state_dict())
        for target, linear, scale in (
            (block.attn.out_proj, attention.projection_layer, layer.lambda_1),
            (block.mlp.c_proj, layer.mlp.fc2, layer.lambda_2),
        ):
            target.weight.copy_(linear.weight * scale[:, None])
            target.bias.copy_(linear.bias * scale)


@torch.no_grad()
def look_around(pool: Any) -> None:
    """Queries begin by reading what is at their own place. Of the positions only the faster angles tell neighbours from each
    other; next to them, what is read must not count in the choice of what to read."""
    quarter = pool.pos_embed.shape[1] // 4
    fast = (torch.arange(quarter) < quarter * 2 // 5).float().repeat(4)
    nn.init.normal_(pool.query, std=0.02)
    for linear in (pool.attn.query, pool.attn.key):
        linear.weight.copy_(torch.diag(6 * fast))
    for linear, size in ((pool.kv_proj, 1.0), (pool.attn.value, 10.0), (pool.attn.out_proj, 1.0)):
        nn.init.orthogonal_(linear.weight, size)
    for norm in (pool.ln_q, pool.ln_kv):
        norm.weight.fill_(0.1)


@torch.no_grad()
def borrow_layers(ours: Any, theirs: Any) -> None:
    """Qwen2's layers are Qwen's, with queries, keys and values apart."""
    for block, layer in zip(ours.h, theirs.layers, strict=True):
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        block.attn.c_attn.weight.copy_(torch.cat([part.weight for part in parts]))
        block.attn.c_attn.bias.copy_(torch.cat([part.bias for part in parts]))
        block.attn.c_proj.weight.copy_(attention.o_proj.weight)
        block.mlp.w1.weight.copy_(layer.mlp.up_proj.weight)
        block.mlp.w2.weight.copy_(layer.mlp.gate_proj.weight)
        block.mlp.c_proj.weight.copy_(layer.mlp.down_proj.weight)
        block.ln_1.weight.copy_(layer.input_layernorm.weight)
        block.ln_2.weight.copy_(layer.post_attention_layernorm.weight)
    ours.ln_f.weight.copy_(theirs.norm.weight)


class Throwaway(nn.Module):
    """What the parts are taught with, thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.pointer = Pointer(160)


class QwenVLTrainer(Trainer):
    aspects = ("wide", "tall")
    store = Views
    stages = (
        Stage("vision", 500, 64, 1.5e-3, scored=False),
        Stage("tune", 600, 32, 1e-3),
    )
    dialogue: Conversation
    heads: Throwaway
    model: QwenVL

    def build(self) -> None:
        self.tokenizer, ranks = build_tokenizer()
        before = f"{START}system\n{SYSTEM}{END}\n{START}user\nPicture 1: <img>"
        self.dialogue = Conversation(self.tokenizer, before, "<imgpad>", "</img>\n")
        self.dialogue.places = GRID * GRID
        self.source = InternVLForConditionalGeneration.from_pretrained(self.arguments.internvl, dtype=torch.float32).eval()
        self.config = describe(ranks, self.source)
        self.model = qwen_vl.model_from_config(self.config)
        visual = self.model.transformer.visual
        self.encoder = VisionEncoder(visual)
        look_around(visual.attn_pool)
        self.heads = Throwaway()

    def begin(self, stage: Stage, fresh: bool) -> None:
        if stage.name == "vision" and fresh:
            some = self.pictures.batch(np.arange(min(200, len(self.pictures.scenes))))
            borrow_tower(self.model.transformer.visual, self.source.model.vision_tower, some)
            borrow_layers(self.model.transformer, self.source.model.language_model)
            theirs = AutoTokenizer.from_pretrained(self.arguments.internvl)
            borrow_tokens(
                self.tokenizer, theirs, {"<imgpad>": "<IMG_CONTEXT>"},
                (self.model.transformer.wte.weight, self.source.get_input_embeddings().weight),
                (self.model.lm_head.weight, self.source.lm_head.weight),
            )  # fmt: skip

    @property
    def tower(self) -> Any:
        return self.encoder

    def see(self, pixels: Tensor) -> Tensor:
        """`[B, 144, 128]` of pictures normed as the other demo models norm them."""
        mean, std, new_mean, new_std = (
            torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD, qwen_vl.IMAGE_MEAN, qwen_vl.IMAGE_STD)
        )
        return self.encoder((pixels * std + mean - new_mean) / new_std)

    def sample(self, patches: Tensor) -> Tensor:
        visual = self.model.transformer.visual
        return visual.ln_post(visual.attn_pool(patches)) @ visual.proj

    def look(self, pictures: Pictures, index: np.ndarray) -> Tensor:
        return self.sample(self.see(pictures.batch(index)))

    def read(self, rows: Rows, features: Tensor | None) -> tuple[Tensor, Tensor]:
        assert features is not None
        transformer, mask = self.model.transformer, rows.mask()
        state = self.dialogue.insert(transformer.wte(rows.ids), features)
        positions, states = transformer.read_positions(rows.positions, state.dtype), [state]
        for block in transformer.h:
            state = block(state, positions, lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v, mask))
            states.append(state)
        self.states, wanted = tuple(states), rows.labels != -100
        return self.model.lm_head(transformer.ln_f(state[wanted])), rows.labels[wanted]

    def loss(self, stage: Stage, step: int) -> Tensor:
        rng, index = self.draw(stage, step)
        share = len(index) * 3 // 8
        index = index[:share]
        pixels, scenes = [self.pictures.batch(index)], [self.pictures.scenes[i] for i in index]
        for views in self.views.values():
            chosen = [rng.randrange(len(views.scenes)) for _ in range(stage.batch // self.world * 5 // 16)]
            pixels.append(views.batch(views.whole[chosen]))
            scenes += [views.scenes[i] for i in chosen]
        seen = torch.cat(pixels)
        if stage.name == "vision":
            source = self.source.model
            with torch.no_grad():
                wanted = source.vision_tower(seen).last_hidden_state[:, 1:]
                side = SIDE // FINE
                shuffled = source.pixel_shuffle(wanted.reshape(-1, side, side, wanted.shape[-1]), 0.5).flatten(1, 2)
                written = source.multi_modal_projector(shuffled)
            patches = self.see(seen)
            loss = F.mse_loss(patches, wanted) / wanted.var()
            return loss + 2 * F.mse_loss(self.sample(patches), written) / written.var()
        with torch.no_grad():
            patches = self.see(seen)
        rows = self.dialogue.rows(scenes, rng, QUESTIONS, False, chained=rng.random() < 0.2)
        loss = F.cross_entropy(*self.read(rows, self.sample(patches)))
        return loss + POINTING * self.heads.pointer.loss(self.states, rows.points)

    @torch.no_grad()
    def score(self) -> dict[str, Any]:
        scores: dict[str, Any] = {"square": super().score()}
        for aspect, views in self.validation_views.items():
            asked = [ask_all(scene) for scene in views.scenes]
            rows = self.dialogue.rows(views.scenes, random.Random(0), 0, False, False, asked)
            scores[aspect] = self.grade([(rows, self.sample(self.see(views.batch(views.whole))))])
        return scores

    def chosen(self, stage: Stage) -> list[tuple[list[nn.Parameter], float]]:
        transformer, visual = self.model.transformer, self.model.transformer.visual
        resampler = [p for name, p in visual.attn_pool.named_parameters() if name != "pos_embed"]
        resampler += [*visual.ln_post.parameters(), visual.proj]
        if stage.name == "vision":
            return [([*self.encoder.parameters(), *resampler], 1.0)]
        language = [*transformer.wte.parameters(), *transformer.h.parameters(), *transformer.ln_f.parameters()]
        return [([*language, *self.model.lm_head.parameters(), *resampler, *self.heads.pointer.parameters()], 1.0)]

    def save(self, folder: Path) -> None:
        """The files of a checkpoint, named and written as the published ones are; transformers has no such model."""
        folder.mkdir(parents=True)
        state = {name: value.detach().half().contiguous() for name, value in self.model.state_dict().items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        self.processor().save_pretrained(folder)

    def processor(self) -> Published:
        return Published(self.config)


@dataclass
class Published:
    """Configuration and tokenizer as they are published."""

    config: dict[str, Any]

    def save_pretrained(self, folder: Path) -> None:
        end = write_ranks(folder) + qwen_vl.ADDED.index(qwen_vl.END_OF_TEXT)
        generation = {
            "chat_format": "chatml",
            "eos_token_id": end,
            "pad_token_id": end,
            "max_new_tokens": 512,
        }
        tokenizer = {"model_max_length": 2048, "tokenizer_class": "QWenTokenizer"}
        for name, content in (
            ("config.json", self.config), ("generation_config.json", generation), ("tokenizer_config.json", tokenizer),
        ):  # fmt: skip
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
