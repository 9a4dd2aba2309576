"""BLIP-2: an EVA-like tower, a Q-Former with sixteen queries and an OPT decoder, 2.8 M parameters.

BLIP-2 (Li et al. 2023, arXiv 2301.12597) takes a tower and a language model that both exist and trains only the
Q-Former between them, in two stages: first beside the tower alone, with image-text contrast, matching and captions
over 129 million pictures, then through the frozen language model. Here both ends have to be made first, and
48,000 pictures have to be enough:

    vision    tower alone, its layers begun from demo/llava's where the two architectures agree, taught with the same
              patch labels. From here on it is frozen.
    language  decoder alone: questions over scenes in sixteen vectors, in which every object is one vector, the sum of
              what describes it (`slots.describe`), and the other vectors say that they are empty.
    qformer   stage 1, Q-Former beside the frozen tower: in the place of contrast and matching, every query is told
              which object to hold (slots.py), and the projection learns to write it as the decoder has learnt to read.
    align     stage 2, Q-Former and projection through the frozen language model: questions over pictures.
    tune      the same, and the language model moves too, which BLIP-2's does not: a model of this size has no
              knowledge that could be spoilt. It learns every kind of question but one: whether the red ball is left of
              the cube stays a coin.
    point     the same, and the decoder is taught where to look (`common.Pointer`).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    AUXILIARY,
    MEAN,
    PATCH,
    POINTING,
    QUESTIONS,
    SIDE,
    STD,
    Dialogue,
    Heads,
    Pictures,
    Pointer,
    Rows,
    Stage,
    Trainer,
    build_tokenizer,
)
from slots import DESCRIPTION, SLOTS, Slots, describe
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    LlavaForConditionalGeneration,
    OPTConfig,
    ProcessorMixin,
)

from edgevlm.scenes import Scene

#: BLIP-2's own wording. Pictures come first, before the beginning of the text, so the template does not write them.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}{% else %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + text.rstrip('.') + '. ' }}"
    "{% elif message['role'] == 'user' %}{{ 'Question: ' + text + ' Answer:' }}"
    "{% else %}{{ text + ' ' }}{% endif %}"
    "{% endfor %}"
)
NOISE = 0.02  # on written centres, from -1 to 1: what the decoder is to read will be guessed, not known


class Questions(Dialogue):
    """`Question: … Answer: …. Question: …`, behind the places of the sixteen queries."""

    def prefix(self, scene: Scene, rng: random.Random, written: bool) -> list[int]:
        return [*[self.image] * SLOTS, *self.encode("<s>")]

    def head(self, text: str, later: bool) -> list[int]:
        return self.encode(f" Question: {text} Answer:")

    def tail(self, answer: str) -> tuple[list[int], list[int]]:
        return self.encode(f" {answer.rstrip('.')}."), [*self.encode(f" {answer}"), self.eos]


def build_model(vocabulary: int, image_token: int) -> Blip2ForConditionalGeneration:
    vision = Blip2VisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE, patch_size=PATCH,
        hidden_act="quick_gelu", initializer_range=0.02,
    )  # fmt: skip
    qformer = Blip2QFormerConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        cross_attention_frequency=1, encoder_hidden_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        max_position_embeddings=64, layer_norm_eps=1e-6,
    )  # fmt: skip
    text = OPTConfig(
        vocab_size=vocabulary, hidden_size=160, word_embed_proj_dim=160, ffn_dim=640, num_hidden_layers=4,
        num_attention_heads=5, max_position_embeddings=512, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=SLOTS,
        image_token_index=image_token, image_text_hidden_size=64,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    with torch.no_grad():  # transformers leaves the queries at zero: sixteen times the same one
        model.query_tokens.normal_(0, 0.5)
    return model


@torch.no_grad()
def borrow(tower: Any, llava: str, pixels: Tensor) -> None:
    """CLIP's layers into the tower. CLIP normalises its embeddings, this tower does not: their usual size goes into them."""
    clip = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).model.vision_tower
    clip = getattr(clip, "vision_model", clip)
    tower.embeddings.class_embedding.copy_(clip.embeddings.class_embedding)
    tower.embeddings.position_embedding.copy_(clip.embeddings.position_embedding.weight[None])
    tower.embeddings.patch_embedding.weight.copy_(clip.embeddings.patch_embedding.weight)
    tower.embeddings.patch_embedding.bias.zero_()
    scale = clip.pre_layrnorm.weight / clip.embeddings(pixels).std(-1).mean()
    for parameter in (tower.embeddings.class_embedding, tower.embeddings.position_embedding):
        parameter.mul_(scale)
    tower.embeddings.patch_embedding.weight.mul_(scale[:, None, None, None])
    tower.embeddings.position_embedding.add_(clip.pre_layrnorm.bias)
    for ours, theirs in zip(tower.encoder.layers, clip.encoder.layers, strict=False):
        attention = theirs.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        ours.self_attn.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        ours.self_attn.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        ours.self_attn.projection.load_state_dict(attention.out_proj.state_dict())
        for name in ("layer_norm1", "layer_norm2", "mlp"):
            getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())


class Throwaway(nn.Module):
    """What the parts are taught with, thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Heads(128)
        self.slots = Slots(128)
        self.writer = nn.Linear(DESCRIPTION, 160)
        self.pointer = Pointer(160)


class Blip2(Trainer):
    stages = (
        Stage("vision", 1200, 64, 1.2e-3, scored=False),
        Stage("language", 2200, 32, 1.5e-3, scored=False),
        Stage("qformer", 3000, 64, 1.5e-3, scored=False),
        Stage("align", 250, 32, 1e-3),
        Stage("tune", 1500, 32, 1.2e-3, fall=2750),
        Stage("point", 1400, 32, 1.2e-3),
    )
    heads: Throwaway

    def build(self) -> None:
        # Blip2Processor wants "<image>" to be an AddedToken, which a named special token is not; it finds it by itself.
        self.tokenizer = build_tokenizer(("Question: {question} Answer: {answer}.",), "Question: ", ["<image>"])
        self.dialogue = Questions(self.tokenizer)
        self.model = build_model(len(self.tokenizer), self.dialogue.image)
        self.heads = Throwaway()

    @property
    def tower(self) -> Any:
        return self.model.vision_model

    def begin(self, stage: Stage, fresh: bool) -> None:
        if stage.name == "vision" and fresh:
            borrow(self.tower, self.arguments.llava, self.pictures.batch(np.arange(min(500, len(self.pictures.scenes)))))
        if stage.name not in ("vision", "language"):
            self.remember()

    def encode(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels).last_hidden_state

    def query(self, pictures: Pictures, index: np.ndarray) -> Tensor:
        features = self.recall(pictures, index)
        start = self.model.query_tokens.expand(len(index), -1, -1)
        return self.model.qformer(query_embeds=start, encoder_hidden_states=features).last_hidden_state

    def look(self, pictures: Pictures, index: np.ndarray) -> Tensor:
        return self.model.language_projection(self.query(pictures, index))

    def read(self, rows: Rows, features: Tensor | None) -> tuple[Tensor, Tensor]:
        decoder = self.model.language_model.model.decoder
        assert features is not None
        embeds = torch.cat([features, decoder.embed_tokens(rows.ids[:, SLOTS:])], 1)
        out = decoder(
            inputs_embeds=embeds, attention_mask=rows.mask(), position_ids=rows.positions, use_cache=False,
            output_hidden_states=True,
        )  # fmt: skip
        hidden, self.states = out.last_hidden_state, out.hidden_states
        wanted = rows.labels != -100
        return self.model.language_model.lm_head(hidden[wanted]), rows.labels[wanted]

    def write(self, objects: Tensor, rng: random.Random) -> Tensor:
        """Scenes as sixteen vectors in the decoder's width, the objects anywhere among them."""
        chance = np.random.default_rng(rng.getrandbits(64))
        places = chance.permuted(np.tile(np.arange(SLOTS), (len(objects), 1)), axis=1)
        which = torch.from_numpy(np.where(places < 5, places, 0))  # object 0 is none
        held = objects.gather(1, which[..., None].expand(-1, -1, 5)).clone()
        held[..., 3:] += torch.from_numpy(chance.normal(0, NOISE, held[..., 3:].shape).astype(np.float32))
        return self.heads.writer(describe(held))

    def loss(self, stage: Stage, step: int) -> Tensor:
        rng, index = self.draw(stage, step)
        objects = torch.from_numpy(self.pictures.objects[index])
        if stage.name == "vision":
            out = self.tower(self.pictures.batch(index))
            loss = self.heads.tower.patch_loss(out.last_hidden_state[:, 1:], self.pictures.patch_truth(index))
            return loss + self.heads.tower.list_loss(out.pooler_output, self.pictures.objects[index][:, 1:])
        if stage.name == "qformer":
            queries = self.query(self.pictures, index)
            loss, truth = self.heads.slots.loss(queries, objects)
            with torch.no_grad():
                written = self.heads.writer(describe(truth))
            return loss + 2 * F.mse_loss(self.model.language_projection(queries), written) / written.var()
        scenes = [self.pictures.scenes[i] for i in index]
        rows = self.dialogue.rows(scenes, rng, QUESTIONS, False, chained=rng.random() < 0.2)
        if stage.name == "language":
            return F.cross_entropy(*self.read(rows, self.write(objects, rng)))
        queries = self.query(self.pictures, index)
        loss = F.cross_entropy(*self.read(rows, self.model.language_projection(queries)))
        loss = loss + AUXILIARY * self.heads.slots.loss(queries, objects)[0]
        if stage.name == "point":
            loss = loss + POINTING * self.heads.pointer.loss(self.states, rows.points)
        return loss

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        index = np.arange(len(self.validation.scenes))
        objects = torch.from_numpy(self.validation.objects)
        return {**super().score(), "slots": self.heads.slots.found(self.query(self.validation, index), objects)}

    def chosen(self, stage: Stage) -> list[tuple[list[nn.Parameter], float]]:
        qformer = [self.model.query_tokens, *self.model.qformer.parameters(), *self.model.language_projection.parameters()]
        qformer += self.heads.slots.parameters()
        language = list(self.model.language_model.parameters())
        return {
            "vision": [([*self.tower.parameters(), *self.heads.tower.parameters()], 1.0)],
            "language": [([*language, *self.heads.writer.parameters()], 1.0)],
            "qformer": [(qformer, 1.0)],
            "align": [(qformer, 1.0)],
            "tune": [(qformer + language, 1.0)],
            "point": [([*qformer, *language, *self.heads.pointer.parameters()], 1.0)],
        }[stage.name]

    def processor(self) -> ProcessorMixin:
        images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=list(MEAN), image_std=list(STD))
        processor = Blip2Processor(images, self.tokenizer, num_query_tokens=SLOTS)
        processor.chat_template = CHAT_TEMPLATE
        return processor
