"""Flamingo, as the open Idefics has it: demo/llava's eyes and language model, frozen, and what lies between: 3.8 M parameters.

Flamingo (Alayrac et al. 2022, arXiv 2204.14198) shows a language model pictures without a single token for them: a
Perceiver resampler presses each picture into a few latents, and before every layer of the language model a new, gated
layer lets the text look at those of the last picture before it. The gates begin at zero, so training begins with the
language model as it was. Several pictures with their answers in front of a question make it a few-shot learner.

Tower (its first four layers, which are all that LLaVA reads), decoder, base embeddings and base head are
demo/llava's and stay as they are. New are the resampler, the gated layers and the rows of three more tokens.

    resampler  beside the frozen tower: every latent is told which object to hold (slots.py). Flamingo's resampler is
               taught by its language model alone, with two thousand million pictures.
    gates      resampler, gated layers and the three tokens: rows of pictures and questions, one to nine pictures
               long, in which every answer is learnt; so every prompt with none to eight examples before the question
               occurs. The latents keep their lesson, and the text is taught where to look (`common.Pointer`).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import AUXILIARY, MEAN, PATCH, POINTING, SIDE, STD, Dialogue, Pictures, Pointer, Rows, Stage, Trainer, pad
from slots import SLOTS, Slots
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from edgevlm.scenes import KINDS, Scene, ask_all

FAKE, IMAGE, END = ADDED = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
PICTURES = 9  # a row: eight examples and a question
#: How many pictures follow each other before a new text begins. One: a question without examples.
RUNS, RUN_WEIGHTS = (1, 2, 3, 5, 9), (8, 2, 2, 5, 3)
#: The text that IdeficsProcessor makes of ["USER:", picture, "\nquestion ASSISTANT: answer<end_of_utterance>USER:", …].
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER:' }}{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT:' }}{% endif %}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% set last = namespace(image=false) %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}"
    "{{ ('' if last.image else '<fake_token_around_image>') + '<image><fake_token_around_image>' }}"
    "{% elif part['type'] == 'text' %}{{ ('\n' if last.image else ' ') + part['text'] }}{% endif %}"
    "{% set last.image = part['type'] == 'image' %}"
    "{% endfor %}"
    "{% endif %}"
    "{{ '<end_of_utterance>' if message['role'] == 'assistant' else '\n' if message['role'] == 'system' else '' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def build_tokenizer(llava: str) -> PreTrainedTokenizerFast:
    """demo/llava's, so that the frozen embeddings fit, and three tokens more. Its own `<image>` is out of use."""
    described = json.loads((Path(llava) / "tokenizer.json").read_text(encoding="utf-8"))
    described["model"]["vocab"] = {
        "<reserved>" if name == IMAGE else name: number for name, number in described["model"]["vocab"].items()
    }
    for token in described["added_tokens"]:
        token["content"] = "<reserved>" if token["content"] == IMAGE else token["content"]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=list(ADDED),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_model(llava: str) -> IdeficsForVisionText2Text:
    source = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
    text, vision = source.config.text_config, source.config.vision_config
    config = IdeficsConfig(
        vocab_size=text.vocab_size, additional_vocab_size=len(ADDED), hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size, num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads, rms_norm_eps=text.rms_norm_eps, hidden_act=text.hidden_act,
        max_position_embeddings=text.max_position_embeddings, rope_parameters=text.rope_parameters,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, freeze_lm_head=True,
        cross_layer_interval=1, qk_layer_norms=True, alpha_initializer="zeros", alpha_type="float", use_resampler=True,
        vision_config={
            "embed_dim": vision.hidden_size, "intermediate_size": vision.intermediate_size, "image_size": SIDE,
            "patch_size": PATCH, "num_hidden_layers": vision.num_hidden_layers - 1,
            "num_attention_heads": vision.num_attention_heads, "hidden_act": vision.hidden_act,
        },
        perceiver_config={
            "use_resampler": True, "resampler_n_latents": SLOTS, "resampler_depth": 2, "resampler_n_heads": 4,
            "resampler_head_dim": 32, "qk_layer_norms_perceiver": True,
        },
    )  # fmt: skip
    model = IdeficsForVisionText2Text(config)
    inner, clip, decoder = model.model, source.model.vision_tower, source.model.language_model
    with torch.no_grad():
        # What transformers starts new layers with is a fifth of what keeps a signal its size; the gates are shut anyway.
        for module in [*inner.gated_cross_attn_layers.modules(), *inner.perceiver_resampler.modules()]:
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
        lost = inner.vision_model.load_state_dict(getattr(clip, "vision_model", clip).state_dict(), strict=False)
        lost_text = inner.load_state_dict(decoder.state_dict(), strict=False)
        model.lm_head.weight.copy_(source.lm_head.weight)
        # The end of an utterance is what the end of the text was.
        inner.embed_tokens.additional_embedding.weight[2] = decoder.embed_tokens.weight[2]
        model.lm_head.additional_fc.weight[2] = source.lm_head.weight[2]
    if lost.missing_keys or any(not name.startswith("encoder.layers.4.") for name in lost.unexpected_keys):
        raise ValueError(f"this is not the tower of demo/llava: {lost}")
    if lost_text.unexpected_keys:
        raise ValueError(f"this is not the decoder of demo/llava: {lost_text.unexpected_keys}")
    return model


@dataclass(frozen=True)
class Turn:
    picture: int | None  # which of the row's pictures it shows; None: it goes on with the last one
    kind: str
    text: str
    answer: str
    scene: Scene | None = None
    learnt: bool = True


class Interleaved(Dialogue):
    """Pictures in their places between the questions. A row holds several texts, which do not see each other."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        self.fake, self.image, self.end = tokenizer.convert_tokens_to_ids(list(ADDED))

    def lay(self, row: list[list[Turn]], marked: bool = False) -> tuple[list[Any], ...]:
        """Columns and points of a row of texts, as `stack` takes them. `marked`: the first word has the
        mark of a beginning, as it has when the tokenizer adds `<s>`; where the text itself says `<s>`, it has not."""
        ids: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        numbers: list[int] = []
        labels: list[int] = []
        shown: list[int] = []
        points: list[tuple[float, ...]] = []
        asked = 0
        for segment, turns in enumerate(row, 1):
            seen, start = -1, len(ids)
            for number, turn in enumerate(turns):
                if number:
                    head = self.encode("USER:")
                else:
                    head = self.encode("<s>USER:") if marked else [*self.encode("<s>"), *self.encode("USER:")]
                shown += [seen] * len(head)
                if turn.picture is None:
                    rest = self.encode(f"USER: {turn.text} ASSISTANT:")[len(self.encode("USER:")) :]
                else:
                    rest = [self.fake, self.image, self.fake, *self.encode("\n"), *self.encode(f"{turn.text} ASSISTANT:")]
                    shown.append(seen)
                    seen = turn.picture
                if turn.scene is not None:
                    for column, *target in self.point(turn.scene, turn.kind, turn.text, rest):
                        points.append((len(ids) + len(head) + column, *target))
                tail = [*self.encode(f" {turn.answer}"), self.end]
                length = len(head) + len(rest) + len(tail)
                shown += [seen] * (len(ids) + length - len(shown))
                asked += turn.learnt
                ids += [*head, *rest, *tail]
                targets = tail if turn.learnt else [-100] * len(tail)
                labels += [*[-100] * (length - len(tail) - 1), *targets, -100]
                numbers += [asked if turn.learnt else 0] * length
            positions += range(len(ids) - start)
            segments += [segment] * (len(ids) - start)
        return ids, positions, segments, numbers, labels, shown, points

    def stack(self, laid: list[tuple[list[Any], ...]], kinds: list[list[str]]) -> Rows:
        fillers = (0, 0, -1, 0, -100, -1)
        *columns, points = zip(*laid, strict=True)
        ids, positions, segments, numbers, labels, shown = (
            pad(list(column), filler) for column, filler in zip(columns, fillers, strict=True)
        )
        placed = torch.tensor([(row, *point) for row, found in enumerate(points) for point in found]).view(-1, 5)
        return Rows(ids, positions, segments, numbers, labels, kinds, placed, shown)

    def practise(self, scenes: list[Scene], rng: random.Random) -> Rows:
        """Training rows over `PICTURES` scenes each."""
        laid = []
        for first in range(0, len(scenes), PICTURES):
            run = rng.choices(RUNS, RUN_WEIGHTS)[0]
            row: list[list[Turn]] = []
            for number, scene in enumerate(scenes[first : first + PICTURES]):
                if number % run == 0:
                    row.append([])
                turns = rng.choices((1, 2, 3), (5, 3, 2))[0]
                while turns:
                    question = self.pose(scene, rng, caption=rng.random() < 0.15)
                    if question is None:
                        continue
                    new = all(turn.picture != number for turn in row[-1])
                    row[-1].append(Turn(number if new else None, *question, scene))
                    turns -= 1
            laid.append(self.lay(row, marked=rng.random() < 0.25))
        return self.stack(laid, [[] for _ in laid])


class Throwaway(nn.Module):
    """What the new layers are taught with, thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(128)
        self.pointer = Pointer(160)


class Flamingo(Trainer):
    stages = (
        Stage("resampler", 2000, 64, 1.5e-3, scored=False),
        Stage("gates", 3000, 12, 1.5e-3),  # rows of nine pictures
    )
    dialogue: Interleaved
    heads: Throwaway

    def build(self) -> None:
        self.tokenizer = build_tokenizer(self.arguments.llava)
        self.dialogue = Interleaved(self.tokenizer)
        self.model = build_model(self.arguments.llava)
        self.heads = Throwaway()

    @property
    def tower(self) -> Any:
        return self.model.model.vision_model

    def begin(self, stage: Stage, fresh: bool) -> None:
        self.remember()

    def encode(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels).last_hidden_state

    def look(self, pictures: Pictures, index: np.ndarray) -> Tensor:
        return self.model.model.perceiver_resampler(self.recall(pictures, index))

    def read(self, rows: Rows, features: Tensor | None) -> tuple[Tensor, Tensor]:
        assert features is not None
        assert rows.shown is not None
        latents = features.view(len(rows.ids), -1, *features.shape[1:])
        shown = F.one_hot(rows.shown + 1, latents.shape[1] + 1)[..., 1:]
        # Matrices in bfloat16, a fifth faster; what runs from layer to layer, weights and logits stay float32.
        with torch.autocast("cpu", torch.bfloat16, enabled=self.model.training):
            out = self.model.model(
                input_ids=rows.ids, attention_mask=rows.mask(), position_ids=rows.positions, perceiver_embeddings=latents,
                image_attention_mask=shown, use_cache=False, output_hidden_states=True,
            )  # fmt: skip
        hidden, self.states = out.last_hidden_state, out.hidden_states
        wanted = rows.labels != -100
        return self.model.lm_head(hidden[wanted].float()), rows.labels[wanted]

    def loss(self, stage: Stage, step: int) -> Tensor:
        rng, index = self.draw(stage, step, 1 if stage.name == "resampler" else PICTURES)
        latents = self.look(self.pictures, index)
        held = self.heads.slots.loss(latents, torch.from_numpy(self.pictures.objects[index]))[0]
        if stage.name == "resampler":
            return held
        rows = self.dialogue.practise([self.pictures.scenes[i] for i in index], rng)
        loss = F.cross_entropy(*self.read(rows, latents))
        return loss + POINTING * self.heads.pointer.loss(self.states, rows.points) + AUXILIARY * held

    def examine(self, first: int, count: int) -> tuple[Rows, Tensor]:
        index = np.arange(first, min(len(self.validation.scenes), first + count))
        laid, kinds = [], []
        for i in index:
            questions = ask_all(self.validation.scenes[i])
            laid.append(self.dialogue.lay([[Turn(0, q.kind, q.text, q.answer)] for q in questions]))
            kinds.append([q.kind for q in questions])
        return self.dialogue.stack(laid, kinds), self.look(self.validation, index)

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Without examples by kind; then, over all kinds, with four; then how well the latents hold their objects."""
        scores = super().score()
        self.model.eval()
        rng, shots, laid, seen, kinds = random.Random(0), 4, [], [], []
        for number, scene in enumerate(self.validation.scenes):
            turns: list[Turn] = []
            while len(turns) < shots:
                index = rng.randrange(len(self.pictures.scenes))
                question = self.dialogue.pose(self.pictures.scenes[index], rng, caption=rng.random() < 1 / len(KINDS))
                if question is not None:
                    seen.append(self.look(self.pictures, np.array([index])))
                    turns.append(Turn(len(turns), *question, learnt=False))
            questions = ask_all(scene)
            last = questions[number % len(questions)]
            seen.append(self.look(self.validation, np.array([number])))
            laid.append(self.dialogue.lay([[*turns, Turn(shots, last.kind, last.text, last.answer)]]))
            kinds.append([last.kind])
        rows = self.dialogue.stack(laid, kinds)
        logits, targets = self.read(rows, torch.cat(seen))
        row = (rows.labels != -100).nonzero()[:, 0]
        wrong = torch.zeros(len(laid)).index_add(0, row, (logits.argmax(-1) != targets).float())
        latents = self.look(self.validation, np.arange(len(laid)))
        self.model.train()
        return {
            **scores,
            "four shots": round(100 * float((wrong == 0).float().mean()), 1),
            "slots": self.heads.slots.found(latents, torch.from_numpy(self.validation.objects)),
        }

    def chosen(self, stage: Stage) -> list[tuple[list[nn.Parameter], float]]:
        inner = self.model.model
        resampler = [*inner.perceiver_resampler.parameters(), *self.heads.slots.parameters()]
        if stage.name == "resampler":
            return [(resampler, 1.0)]
        named = dict(inner.gated_cross_attn_layers.named_parameters())
        others = [*self.heads.pointer.parameters()]
        others += [inner.embed_tokens.additional_embedding.weight, self.model.lm_head.additional_fc.weight]
        # Behind a shut gate nothing else learns, and a gate is a single number: ten times the rate opens it in time.
        gates = [p for name, p in named.items() if "alpha" in name]
        return [(resampler + others + [p for name, p in named.items() if "alpha" not in name], 1.0), (gates, 10.0)]

    def stops(self) -> int | list[int]:
        return [2, self.dialogue.end]

    def processor(self) -> ProcessorMixin:
        images = IdeficsImageProcessorPil(image_size=SIDE, image_mean=list(MEAN), image_std=list(STD))
        processor = IdeficsProcessor(images, self.tokenizer, image_size=SIDE)
        processor.chat_template = CHAT_TEMPLATE
        return processor
