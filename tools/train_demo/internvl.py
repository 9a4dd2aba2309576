"""InternVL: an InternViT tower over tiles, pixel shuffle, an MLP projector and a Qwen2 decoder, 2.2 M parameters.

InternVL (Chen et al. 2024, arXiv 2312.14238 and 2412.05271) cuts a picture into tiles by its aspect ratio and shows
them all to the same tower, and behind them the whole picture, squeezed to a square. A tile is 72 pixels, as demo/llava's
picture is, and pixel shuffle makes 36 places of its 144 patches, as many as demo/llava has patches. So this model begins
with demo/llava: its tower's layers, for patches of half their side, and its decoder, word by word.

    vision  tower and projector. Tower: every place names the colour, shape, size and centre of the object it shows,
            and how much its view is squeezed, on square pictures, tiles and squeezed pictures. Projector: on square
            pictures it has to write what demo/llava's writes. That is 36 vectors a picture to learn from and not one
            answer: after 500 steps demo/llava's decoder answers 97 of 100 questions through it.
    tune    the language model and the projector, over the frozen tower: questions over square, wide and tall pictures,
            in ChatML. Squeezed or cut, things are where they are not, so it is taught where to look
            (`common.Pointer`).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from chatml import END, START, Conversation, borrow_layers, borrow_words, build_tokenizer
from common import (
    GRID,
    MEAN,
    POINTING,
    QUESTIONS,
    SIDE,
    STD,
    Files,
    Heads,
    Pictures,
    Pointer,
    Rows,
    Stage,
    Trainer,
)
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from views import MOST_TILES, Views

from edgevlm.scenes import ask_all

FINE = 6  # pixels of a patch: four of them, shuffled together, are one place
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_model(tokenizer: Any, llava: Any) -> InternVLForConditionalGeneration:
    """`llava`: demo/llava, of whose tower and decoder it is begun."""
    vision = InternVLVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=[SIDE, SIDE],
        patch_size=[FINE, FINE], layer_scale_init_value=1.0, attention_bias=True,
    )  # fmt: skip
    theirs = llava.config.text_config
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=theirs.hidden_size, intermediate_size=theirs.intermediate_size,
        num_hidden_layers=theirs.num_hidden_layers, num_attention_heads=theirs.num_attention_heads,
        num_key_value_heads=theirs.num_key_value_heads, max_position_embeddings=2048, rms_norm_eps=theirs.rms_norm_eps,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=GRID * GRID, tie_word_embeddings=False,
    )  # fmt: skip
    model = InternVLForConditionalGeneration(config)
    borrow_tower(model.model.vision_tower, llava.model.vision_tower)
    borrow_layers(model.model.language_model, llava.model.language_model)
    return model


@torch.no_grad()
def borrow_tower(ours: Any, theirs: Any) -> None:
    """CLIP's layers, for patches of half its side: as if the picture were shown at twice its size.

    CLIP normalises its embeddings, this tower does not; what is to stay of that goes into the embeddings' size.
    """
    clip = getattr(theirs, "vision_model", theirs)
    scale = clip.pre_layrnorm.weight
    kernel = clip.embeddings.patch_embedding.weight
    positions = clip.embeddings.position_embedding.weight
    side = round((len(positions) - 1) ** 0.5)
    patches = positions[1:].T.reshape(1, -1, side, side)
    finer = ours.embeddings.patch_embeddings.patch_shape
    patches = F.interpolate(patches, size=finer, mode="bicubic").flatten(2).transpose(1, 2)
    ours.embeddings.patch_embeddings.projection.weight.copy_(4 * F.avg_pool2d(kernel, 2) * scale[:, None, None, None])
    ours.embeddings.patch_embeddings.projection.bias.copy_(clip.pre_layrnorm.bias)
    ours.embeddings.position_embeddings.copy_(torch.cat([positions[None, :1], patches], 1) * scale)
    ours.embeddings.cls_token.copy_(clip.embeddings.class_embedding * scale + clip.pre_layrnorm.bias)
    for layer, source in zip(ours.encoder.layer, clip.encoder.layers, strict=False):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.attention, name).load_state_dict(getattr(source.self_attn, name).state_dict())
        layer.attention.projection_layer.load_state_dict(source.self_attn.out_proj.state_dict())
        layer.layernorm_before.load_state_dict(source.layer_norm1.state_dict())
        layer.layernorm_after.load_state_dict(source.layer_norm2.state_dict())
        layer.mlp.load_state_dict(source.mlp.state_dict())


class Throwaway(nn.Module):
    """What the parts are taught with, thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.places = Heads(512)
        self.squeeze = nn.Linear(512, 1)
        self.pointer = Pointer(160)


class InternVL(Trainer):
    aspects = ("wide", "tall")
    store = Views
    stages = (
        Stage("vision", 950, 64, 1.2e-3, scored=False),
        Stage("tune", 700, 32, 1e-3),
    )
    dialogue: Conversation
    heads: Throwaway

    def build(self) -> None:
        names = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
        self.tokenizer = build_tokenizer([*names.values(), "<video>"], {**names, "video_token": "<video>"})
        self.dialogue = Conversation(self.tokenizer, f"{START}user\n<img>", "<IMG_CONTEXT>", "</img>\n")
        self.llava = LlavaForConditionalGeneration.from_pretrained(self.arguments.llava, dtype=torch.float32).eval()
        self.model = build_model(self.tokenizer, self.llava)
        words = AutoTokenizer.from_pretrained(self.arguments.llava)
        borrow_words(self.tokenizer, words, self.llava, self.model.model.language_model.embed_tokens, self.model.lm_head)
        self.heads = Throwaway()

    @property
    def tower(self) -> Any:
        return self.model.model.vision_tower

    def shuffle(self, pixels: Tensor) -> Tensor:
        """`[V, 36, 512]`: the tower's features, four patches to a place."""
        patches = self.tower(pixels).last_hidden_state[:, 1:]
        side = SIDE // FINE
        return self.model.model.pixel_shuffle(patches.reshape(-1, side, side, patches.shape[-1]), 0.5).flatten(1, 2)

    def project(self, features: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(features)

    def copy(self, pixels: Tensor) -> Tensor:
        """What demo/llava's projector writes of square pictures."""
        with torch.no_grad():
            seen = self.llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            return self.llava.model.multi_modal_projector(seen)

    def look(self, pictures: Pictures, index: np.ndarray) -> Tensor:
        return self.project(self.shuffle(pictures.batch(index)))

    def read(self, rows: Rows, features: Tensor | None) -> tuple[Tensor, Tensor]:
        assert features is not None
        language = self.model.model.language_model
        out = language(
            inputs_embeds=self.dialogue.insert(language.embed_tokens(rows.ids), features), attention_mask=rows.mask(),
            position_ids=rows.positions, use_cache=False, output_hidden_states=True,
        )  # fmt: skip
        hidden, self.states = out.last_hidden_state, out.hidden_states
        wanted = rows.labels != -100
        return self.model.lm_head(hidden[wanted]), rows.labels[wanted]

    def teach(self, features: Tensor, truth: Tensor, squeeze: Tensor) -> Tensor:
        """Labels of places, and how much their views are squeezed."""
        shown = truth[..., 0] > 0
        guess = self.heads.squeeze(features)[..., 0]
        return self.heads.places.patch_loss(features, truth) + (guess - squeeze[:, None])[shown].abs().mean()

    def see(self, stage: Stage, step: int) -> Tensor:
        rng, index = self.draw(stage, step)
        index = index[: len(index) * 3 // 8]
        pixels, truth = [self.pictures.batch(index)], [self.pictures.patch_truth(index)]
        squeeze = [torch.zeros(len(index))]
        for views in self.views.values():
            chosen = np.array([rng.randrange(len(views.scenes)) for _ in range(stage.batch // self.world * 5 // 16)])
            tile = np.array([rng.randrange(views.tiles[i]) if n % 2 else -1 for n, i in enumerate(chosen)])
            pixels.append(views.batch(views.number(chosen, tile)))
            truth.append(views.truth(chosen, tile))
            squeeze.append(views.squeeze(chosen, tile))
        features = self.shuffle(torch.cat(pixels))
        wanted = self.copy(pixels[0])
        written = F.mse_loss(self.project(features[: len(index)]), wanted) / wanted.var()
        return self.teach(features, torch.cat(truth), torch.cat(squeeze)) + 2 * written

    def loss(self, stage: Stage, step: int) -> Tensor:
        if stage.name == "vision":
            return self.see(stage, step)
        rng, index = self.draw(stage, step)
        index = index[: len(index) // 2]
        views = self.views[rng.choice(self.aspects)]
        tiles = random.Random(f"{stage.name} {step}").choice((2, 2, 3))  # the same in every process: they wait for each other
        fitting = np.flatnonzero(views.tiles == tiles)
        chosen = fitting[[rng.randrange(len(fitting)) for _ in index]]
        total = torch.zeros(())
        for scenes, number, pixels in (
            ([self.pictures.scenes[i] for i in index], 1, self.pictures.batch(index)),
            ([views.scenes[i] for i in chosen], tiles + 1, views.batch(views.all(chosen))),
        ):
            with torch.no_grad():
                features = self.shuffle(pixels)
            self.dialogue.places = number * GRID * GRID
            rows = self.dialogue.rows(scenes, rng, QUESTIONS, False, chained=rng.random() < 0.2)
            loss = F.cross_entropy(*self.read(rows, self.project(features).reshape(len(scenes), -1, 160)))
            total = total + loss + POINTING * self.heads.pointer.loss(self.states, rows.points)
        return total / 2

    @torch.no_grad()
    def score(self) -> dict[str, Any]:
        self.dialogue.places = GRID * GRID
        scores: dict[str, Any] = {"square": super().score()}
        for aspect, views in self.validation_views.items():
            scores[aspect] = self.grade(self.examine_views(views, tiles) for tiles in sorted(set(views.tiles)))
        return scores

    def examine_views(self, views: Views, tiles: int) -> tuple[Rows, Tensor]:
        index = np.flatnonzero(views.tiles == tiles)
        scenes = [views.scenes[i] for i in index]
        self.dialogue.places = (tiles + 1) * GRID * GRID
        rows = self.dialogue.rows(scenes, random.Random(0), 0, False, False, [ask_all(scene) for scene in scenes])
        features = self.project(self.shuffle(views.batch(views.all(index))))
        return rows, features.reshape(len(scenes), -1, 160)

    def chosen(self, stage: Stage) -> list[tuple[list[nn.Parameter], float]]:
        projector = list(self.model.model.multi_modal_projector.parameters())
        if stage.name == "vision":
            heads = [*self.heads.places.parameters(), *self.heads.squeeze.parameters()]
            return [([*self.tower.parameters(), *heads, *projector], 1.0)]
        language = [*self.model.model.language_model.parameters(), *self.model.lm_head.parameters()]
        return [([*language, *projector, *self.heads.pointer.parameters()], 1.0)]

    def processor(self) -> Files:
        images = GotOcr2ImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, image_mean=list(MEAN), image_std=list(STD), crop_to_patches=True,
            min_patches=1, max_patches=MOST_TILES,
        )  # fmt: skip
        about = {"processor_class": "InternVLProcessor", "image_seq_length": GRID * GRID}
        return Files(self.tokenizer, images, CHAT_TEMPLATE, about)
