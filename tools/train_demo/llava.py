"""LLaVA: a CLIP tower, a two-layer MLP projector and a Llama decoder, 2.4 M parameters.

It goes the way LLaVA went (Liu et al. 2023, "Visual Instruction Tuning", section 4.2): both towers first learn
something on their own, then the projector alone aligns them, then projector and language model learn to answer.

    vision    CLIP tower alone: every patch names the colour, shape, size and place of the object it shows, and the
              CLS token lists the objects.
    language  decoder alone: questions over scenes that are written out as text.
    align     stage 1, everything frozen but the projector: questions over pictures.
    tune      stage 2, projector and decoder, and at half their rate the tower, which keeps its patch labels as a
              second loss. (LLaVA freezes its tower, which 400 million pictures have taught; this one has seen
              48,000.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    AUXILIARY,
    GRID,
    MEAN,
    PATCH,
    QUESTIONS,
    SIDE,
    STD,
    Dialogue,
    Heads,
    Pictures,
    Rows,
    Stage,
    Trainer,
    build_tokenizer,
    grid_of_sines,
)
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ProcessorMixin,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% elif message['role'] == 'user' %}{{ 'USER: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_model(vocabulary: int, image_token: int) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4, image_size=SIDE, patch_size=PATCH,
        projection_dim=128,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=160, intermediate_size=448, num_hidden_layers=4, num_attention_heads=5,
        num_key_value_heads=5, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=False, rms_norm_eps=1e-5,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=GRID * GRID, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        parameter = next(p for n, p in model.named_parameters() if n.endswith("position_embedding.weight"))
        parameter[1:] = grid_of_sines(128)
    return model


class Llava(Trainer):
    stages = (
        Stage("vision", 3200, 64, 1.5e-3, scored=False),
        Stage("language", 1300, 32, 1.5e-3, scored=False),
        Stage("align", 300, 32, 1.5e-3),
        Stage("tune", 6200, 32, 1.2e-3),
    )
    heads: Heads

    def build(self) -> None:
        self.tokenizer = build_tokenizer()
        self.dialogue = Dialogue(self.tokenizer)
        self.model = build_model(len(self.tokenizer), self.dialogue.image)
        self.heads = Heads(128)

    # the three parts of the model
    @property
    def tower(self) -> Any:
        return self.model.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        return self.model.model.multi_modal_projector

    @property
    def language(self) -> Any:
        return self.model.model.language_model

    def see(self, pictures: Pictures, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Patch features as LLaVA takes them (layer -2, no CLS), and the pooled CLS."""
        out = self.tower(pictures.batch(index), output_hidden_states=True)
        return out.hidden_states[-2][:, 1:], out.pooler_output

    def look(self, pictures: Pictures, index: np.ndarray) -> Tensor:
        return self.see(pictures, index)[0]

    def read(self, rows: Rows, features: Tensor | None) -> tuple[Tensor, Tensor]:
        embeds = self.language.embed_tokens(rows.ids)
        if features is not None:
            start = len(self.dialogue.open)
            embeds = torch.cat([embeds[:, :start], self.projector(features), embeds[:, start + GRID * GRID :]], 1)
        hidden = self.language(
            inputs_embeds=embeds, attention_mask=rows.mask(), position_ids=rows.positions, use_cache=False
        ).last_hidden_state
        wanted = rows.labels != -100
        return self.model.lm_head(hidden[wanted]), rows.labels[wanted]

    def loss(self, stage: Stage, step: int) -> Tensor:
        rng, index = self.draw(stage, step)
        truth = self.pictures.patch_truth(index)
        if stage.name == "vision":
            patches, pooled = self.see(self.pictures, index)
            return self.heads.patch_loss(patches, truth) + self.heads.list_loss(pooled, self.pictures.objects[index][:, 1:])
        scenes = [self.pictures.scenes[i] for i in index]
        chained = rng.random() < 0.2
        rows = self.dialogue.rows(scenes, rng, QUESTIONS, stage.name == "language", chained)
        features = None if stage.name == "language" else self.look(self.pictures, index)
        loss = F.cross_entropy(*self.read(rows, features))
        if stage.name == "tune" and features is not None:
            loss = loss + AUXILIARY * self.heads.patch_loss(features, truth)
        return loss

    def chosen(self, stage: Stage) -> list[tuple[list[nn.Parameter], float]]:
        tower, heads = list(self.tower.parameters()), list(self.heads.parameters())
        language = [*self.language.parameters(), *self.model.lm_head.parameters()]
        projector = list(self.projector.parameters())
        return {
            "vision": [(tower + heads, 1.0)],
            "language": [(language, 1.0)],
            "align": [(projector, 1.0)],
            "tune": [(language + projector, 1.0), (tower + heads, 0.5)],
        }[stage.name]

    def processor(self) -> ProcessorMixin:
        images = CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=list(MEAN), image_std=list(STD)
        )
        return LlavaProcessor(
            image_processor=images, tokenizer=self.tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, image_token="<image>", chat_template=CHAT_TEMPLATE,
        )  # fmt: skip
