"""Trains the LLaVA that EdgeVLM ships: a CLIP tower, a two-layer MLP projector and a Llama decoder, 2.4 M parameters.

    python tools/train_demo.py --work build/demo --output edgevlm/assets/demo/llava

It goes the way LLaVA went (Liu et al. 2023, "Visual Instruction Tuning", section 4.2): both towers first learn
something on their own, then the projector alone aligns them, then projector and language model learn to answer.

    vision    CLIP tower alone: every patch names the colour, shape, size and place of the object it shows, and the
              CLS token lists the objects.
    language  decoder alone: questions over scenes that are written out as text.
    align     stage 1, everything frozen but the projector: questions over pictures.
    tune      stage 2, projector and decoder, and at half their rate the tower, which keeps its patch labels as a
              second loss. (LLaVA freezes its tower, which 400 million pictures have taught; this one has seen
              48,000.)

Seeded and resumable: every step draws its data from (seed, stage, step, rank), and a checkpoint is written every few
hundred steps, so a run that was stopped goes on where it was. Two single-threaded processes with averaged gradients
are faster here than one process with two threads, because the operators are small.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from edgevlm.scenes import COLOURS, KINDS, SHAPES, SIZES, SPLITS, Scene, ask, ask_all, render_mask, render_scene, sample_scene

SIDE, PATCH, CAMERA = 72, 12, 224  # pixels: what the tower sees, one patch, what the scene is drawn at
GRID = SIDE // PATCH
MEAN, STD = (0.45, 0.42, 0.40), (0.25, 0.25, 0.25)
BINS = 24  # coordinates in written scenes
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


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int  # pictures (or written scenes) a step, over all processes
    rate: float


STAGES = (
    Stage("vision", 3200, 64, 1.5e-3),
    Stage("language", 1300, 32, 1.5e-3),
    Stage("align", 300, 32, 1.5e-3),
    Stage("tune", 6200, 32, 1.2e-3),
)
QUESTIONS = 8  # a picture and step: they share the picture's tokens
AUXILIARY = 0.3


# ------------------------------------------------------------------------------------------------ tokenizer


def write_scene(scene: Scene, rng: random.Random) -> str:
    """The scene in words, for a decoder that has no eyes yet."""
    objects = list(scene.objects)
    rng.shuffle(objects)
    return ", ".join(f"a {o.size} {o.colour} {o.shape} at {int(o.x * BINS)} {int(o.y * BINS)}" for o in objects)


def corpus(scenes: int = 3000) -> list[str]:
    """All that the model will read, turn by turn, so that every word becomes one token."""
    lines = [" ".join(str(n) for n in range(BINS))]
    for seed in range(scenes):
        scene = sample_scene(seed)
        lines.append(f"USER: {write_scene(scene, random.Random(seed))}")
        for question in ask_all(scene):
            for text in (question.text, question.text[0].lower() + question.text[1:]):
                lines.append(f"USER: \n{text} ASSISTANT: {question.answer}")
                lines.append(f"USER: {text} ASSISTANT: {question.answer}")
    return lines


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-fallback BPE with Llama's word boundaries, so that it takes any text."""
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = words
    lines = corpus()
    learner.train_from_iterator(
        [*lines, *(line.removeprefix("USER: ") for line in lines[:4000])] + ["USER:"] * 10,
        trainers.BpeTrainer(vocab_size=2000, show_progress=False),
    )
    learnt = json.loads(learner.to_str())["model"]
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    names = special + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(learnt["vocab"], key=learnt["vocab"].get)
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


# ---------------------------------------------------------------------------------------------------- model


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
    # Two-dimensional sines to start from: beside the patch embedding, the usual small random start is drowned.
    width = 128 // 4
    angles = torch.arange(GRID)[:, None] * torch.exp(-torch.arange(width) * math.log(50) / (width - 1))
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(-1, GRID, -1), line[None].expand(GRID, -1, -1)
    table = torch.cat([rows, columns], -1).reshape(GRID * GRID, -1) * 0.5
    with torch.no_grad():
        parameter = next(p for n, p in model.named_parameters() if n.endswith("position_embedding.weight"))
        parameter[1:] = table
    return model


class Heads(nn.Module):
    """What the tower is taught with, thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, (len(COLOURS) + 1) + (len(SHAPES) + 1) + (len(SIZES) + 1))
        self.place = nn.Linear(width, 2)
        self.list = nn.Linear(width, len(COLOURS) * len(SHAPES))


# ----------------------------------------------------------------------------------------------------- data


def draw_range(job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    first, count = job
    pixels = np.empty((count, SIDE, SIDE, 3), np.uint8)
    labels = np.empty((count, GRID * GRID), np.uint8)
    for i in range(count):
        scene = sample_scene(first + i)
        pixels[i] = np.asarray(render_scene(scene, CAMERA).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        mask = render_mask(scene, SIDE).reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
        area = np.stack([(mask == number).sum(1) for number in range(1, 5)], 1)
        labels[i] = np.where(area.max(1) >= PATCH * PATCH // 6, area.argmax(1) + 1, 0)
    return pixels, labels


class Pictures:
    """Drawn once into the work folder, memory-mapped from there."""

    def __init__(self, folder: Path, split: str, count: int) -> None:
        self.first = SPLITS[split].start
        self.pixels = np.load(folder / f"{split}-{count}-pixels.npy", mmap_mode="r")
        self.labels = np.load(folder / f"{split}-{count}-labels.npy")
        self.scenes = [sample_scene(self.first + i) for i in range(count)]
        objects = np.zeros((count, 5, 5), np.float32)  # row 0: the table
        for i, scene in enumerate(self.scenes):
            for n, o in enumerate(scene.objects, 1):
                objects[i, n] = (
                    COLOURS.index(o.colour) + 1, SHAPES.index(o.shape) + 1, SIZES.index(o.size) + 1, 2 * o.x - 1, 2 * o.y - 1,
                )  # fmt: skip
        self.objects = objects

    @staticmethod
    def draw(folder: Path, split: str, count: int, processes: int) -> None:
        if (folder / f"{split}-{count}-labels.npy").exists():
            return
        jobs = [(SPLITS[split].start + a, min(500, count - a)) for a in range(0, count, 500)]
        with torch.multiprocessing.get_context("fork").Pool(processes) as pool:
            parts = pool.map(draw_range, jobs, 1)
        np.save(folder / f"{split}-{count}-pixels.npy", np.concatenate([p for p, _ in parts]))
        np.save(folder / f"{split}-{count}-labels.npy", np.concatenate([q for _, q in parts]))

    def batch(self, index: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(self.pixels[index]).permute(0, 3, 1, 2).float() / 255
        return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

    def patch_truth(self, index: np.ndarray) -> Tensor:
        """`[B, patches, 5]`: colour, shape, size (0: table), and the object's centre."""
        return torch.from_numpy(self.objects[index][np.arange(len(index))[:, None], self.labels[index]])


class Dialogue:
    """Questions as token rows. Rows share the scene; each question sees only itself, or all before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.encode = functools.lru_cache(200_000)(lambda text: self._encode(tokenizer, text))
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        self.open = self.encode("<s>USER: ")
        self.eos = tokenizer.eos_token_id

    @staticmethod
    def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
        # "</s>" in front keeps the first word from getting the mark that only the start of a text has.
        if text.startswith("<s>"):
            return list(tokenizer(text.removeprefix("<s>")).input_ids)
        return list(tokenizer("</s>" + text, add_special_tokens=False).input_ids)[1:]

    def rows(
        self,
        scenes: list[Scene],
        rng: random.Random,
        questions: int,
        written: bool,
        chained: bool,
        fixed: list[list[Any]] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[list[str]]]:
        """ids, positions, segments, labels `[B, S]`, and the kind of each question."""
        ids, positions, segments, labels, kinds = [], [], [], [], []
        for number, scene in enumerate(scenes):
            if written:
                prefix = [*self.encode(f"<s>USER: {write_scene(scene, rng)}"), *self.encode("\n")]
            else:
                prefix = [*self.open, *[self.image] * (GRID * GRID), *self.encode("\n")]
            row, place, segment, label, asked = (
                list(prefix),
                list(range(len(prefix))),
                [0] * len(prefix),
                [-100] * len(prefix),
                [],
            )
            todo = list(fixed[number]) if fixed else []
            while len(asked) < (len(fixed[number]) if fixed else questions):
                kind = KINDS[-1] if not asked else rng.choice(KINDS[:-1])
                if not fixed and rng.random() < 0.35:  # two hops need the most practice
                    kind = rng.choice(("relation", "position", "count"))
                question = todo.pop(0) if fixed else ask(scene, kind, rng)
                if question is None:
                    continue
                text = question.text
                if not fixed and rng.random() < 0.1:
                    text = text[0].lower() + text[1:]
                head = self.encode(f"USER: {text} ASSISTANT:") if chained and asked else self.encode(f"{text} ASSISTANT:")
                tail = [*self.encode(f" {question.answer}"), self.eos]
                asked.append(question.kind)
                start = place[-1] + 1 if chained else len(prefix)
                row += head + tail
                place += range(start, start + len(head) + len(tail))
                segment += [0 if chained else len(asked)] * (len(head) + len(tail))
                label += [-100] * (len(head) - 1) + tail + [-100]
            ids.append(row), positions.append(place), segments.append(segment), labels.append(label), kinds.append(asked)
        width = (max(map(len, ids)) + 7) // 8 * 8

        def pad(rows: list[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (width - len(row)) for row in rows])

        return pad(ids, 0), pad(positions, 0), pad(segments, -1), pad(labels, -100), kinds


# ------------------------------------------------------------------------------------------------- training


class Trainer:
    def __init__(self, arguments: argparse.Namespace, rank: int) -> None:
        self.arguments, self.rank, self.world = arguments, rank, arguments.processes
        self.work = Path(arguments.work)
        torch.manual_seed(arguments.seed)
        torch.set_flush_denormal(True)
        torch.set_num_threads(1 if self.world > 1 else os.cpu_count() or 1)
        self.tokenizer = build_tokenizer()
        self.dialogue = Dialogue(self.tokenizer)
        self.model = build_model(len(self.tokenizer), self.dialogue.image)
        self.heads = Heads(128)
        self.pictures = Pictures(self.work, "train", arguments.pictures)
        self.validation = Pictures(self.work, "validation", arguments.validation)

    # the three parts of the model
    @property
    def tower(self) -> nn.Module:
        return self.model.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        return self.model.model.multi_modal_projector

    @property
    def language(self) -> nn.Module:
        return self.model.model.language_model

    def see(self, pictures: Pictures, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Patch features as LLaVA takes them (layer -2, no CLS), and the pooled CLS."""
        out = self.tower(pictures.batch(index), output_hidden_states=True)
        return out.hidden_states[-2][:, 1:], out.pooler_output

    def patch_loss(self, features: Tensor, index: np.ndarray) -> Tensor:
        truth = self.pictures.patch_truth(index)
        widths = [len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1]
        guesses = self.heads.patch(features).split(widths, -1)
        loss = sum(F.cross_entropy(g.flatten(0, 1), truth[..., i].long().flatten()) for i, g in enumerate(guesses))
        shown = truth[..., 0] > 0
        return loss + (self.heads.place(features)[shown] - truth[..., 3:][shown]).abs().mean()

    def list_loss(self, pooled: Tensor, index: np.ndarray) -> Tensor:
        objects = self.pictures.objects[index][:, 1:]
        truth = np.zeros((len(index), len(COLOURS) * len(SHAPES)), np.float32)
        row, column = np.nonzero(objects[..., 0])
        colour, shape = objects[row, column, 0] - 1, objects[row, column, 1] - 1
        truth[row, (colour * len(SHAPES) + shape).astype(int)] = 1
        return F.binary_cross_entropy_with_logits(self.heads.list(pooled), torch.from_numpy(truth))

    def read(self, rows: tuple[Tensor, ...], features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits and targets at every labelled place."""
        ids, positions, segments, labels = rows[:4]
        embeds = self.language.embed_tokens(ids)
        if features is not None:
            start = len(self.dialogue.open)
            embeds = torch.cat([embeds[:, :start], self.projector(features), embeds[:, start + GRID * GRID :]], 1)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        together = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        hidden = self.language(
            inputs_embeds=embeds, attention_mask=(causal & together)[:, None], position_ids=positions, use_cache=False
        ).last_hidden_state
        wanted = labels != -100
        return self.model.lm_head(hidden[wanted]), labels[wanted]

    def loss(self, stage: Stage, step: int) -> Tensor:
        seed = f"{self.arguments.seed} {stage.name} {step} {self.rank}"
        rng = random.Random(seed)
        share = stage.batch // self.world
        index = np.array(sorted(rng.randrange(len(self.pictures.scenes)) for _ in range(share)))
        if stage.name == "vision":
            features, pooled = self.see(self.pictures, index)
            return self.patch_loss(features, index) + self.list_loss(pooled, index)
        scenes = [self.pictures.scenes[i] for i in index]
        chained = rng.random() < 0.2
        rows = self.dialogue.rows(scenes, rng, QUESTIONS, stage.name == "language", chained)
        features = None if stage.name == "language" else self.see(self.pictures, index)[0]
        loss = F.cross_entropy(*self.read(rows, features))
        if stage.name == "tune":
            loss = loss + AUXILIARY * self.patch_loss(features, index)
        return loss

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Exact match by kind on validation scenes. Teacher-forced: right at every place is what greedy decoding needs."""
        self.model.eval()
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        count = len(self.validation.scenes)
        for first in range(0, count, 50):
            index = np.arange(first, min(count, first + 50))
            scenes = [self.validation.scenes[i] for i in index]
            rows = self.dialogue.rows(scenes, random.Random(0), 0, False, False, [ask_all(scene) for scene in scenes])
            logits, targets = self.read(rows, self.see(self.validation, index)[0])
            hits = iter((logits.argmax(-1) == targets).tolist())
            where = rows[3] != -100
            for b, asked in enumerate(rows[4]):
                flags: dict[int, bool] = {}
                for segment in rows[2][b][where[b]].tolist():
                    flags[segment] = flags.get(segment, True) & next(hits)
                for n, kind in enumerate(asked, 1):
                    right[kind].append(flags[n])
        self.model.train()
        scores = {kind: round(100 * float(np.mean(hits)), 1) for kind, hits in right.items()}
        return {"all": round(float(np.mean(list(scores.values()))), 1), **scores}

    def parameters(self, stage: Stage) -> list[dict[str, Any]]:
        tower, heads = list(self.tower.parameters()), list(self.heads.parameters())
        chosen = {
            "vision": [(tower + heads, 1.0)],
            "language": [([*self.language.parameters(), *self.model.lm_head.parameters()], 1.0)],
            "align": [(list(self.projector.parameters()), 1.0)],
            "tune": [
                ([*self.language.parameters(), *self.model.lm_head.parameters(), *self.projector.parameters()], 1.0),
                (tower + heads, 0.5),
            ],
        }[stage.name]
        every = [*self.model.parameters(), *heads]
        for parameter in every:
            parameter.requires_grad_(False)
        groups = []
        for parameters, factor in chosen:
            for matrix in (True, False):
                members = [p for p in parameters if (p.ndim > 1) == matrix]
                groups.append({"params": members, "weight_decay": 0.05 if matrix else 0.0, "base": stage.rate * factor})
                for parameter in members:
                    parameter.requires_grad_(True)
        return groups

    def average(self, parameters: list[nn.Parameter]) -> None:
        if self.world == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        flat /= self.world
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def run(self) -> None:
        checkpoint = self.work / "checkpoint.pt"
        done: dict[str, Any] = {"stage": 0, "step": 0}
        if checkpoint.exists():
            done = torch.load(checkpoint, weights_only=True)
            self.model.load_state_dict(done["model"])
            self.heads.load_state_dict(done["heads"])
        for number, stage in enumerate(STAGES):
            if number < done["stage"]:
                continue
            steps = max(1, round(stage.steps * self.arguments.scale))
            optimizer = torch.optim.AdamW(self.parameters(stage), lr=stage.rate, betas=(0.9, 0.98))
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            first = 0
            if number == done["stage"] and done["step"]:
                first = done["step"]
                optimizer.load_state_dict(done["optimizer"])
            began, average = time.monotonic(), None
            for step in range(first, steps):
                share = step / steps
                for group in optimizer.param_groups:
                    group["lr"] = (
                        group["base"] * min(1, (share + 1 / steps) / 0.04) * (0.485 * (1 + math.cos(math.pi * share)) + 0.03)
                    )
                loss = self.loss(stage, step)
                optimizer.zero_grad()
                loss.backward()
                self.average(parameters)
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
                if self.rank:
                    continue
                if (step + 1) % 50 == 0 or step + 1 == steps:
                    pace = (time.monotonic() - began) / (step + 1 - first)
                    left = pace * (steps - step - 1) / 60
                    self.say(f"{stage.name} {step + 1}/{steps} loss {average:.4f} {pace:.2f} s/step, {left:.0f} min left")
                if stage.name != "vision" and stage.name != "language" and ((step + 1) % 500 == 0 or step + 1 == steps):
                    self.say(f"validation {json.dumps(self.score())}")
                if (step + 1) % 250 == 0 or step + 1 == steps:
                    last = step + 1 == steps
                    state = {
                        "stage": number + last, "step": 0 if last else step + 1, "model": self.model.state_dict(),
                        "heads": self.heads.state_dict(), "optimizer": optimizer.state_dict(),
                    }  # fmt: skip
                    torch.save(state, checkpoint.with_suffix(".part"))
                    checkpoint.with_suffix(".part").replace(checkpoint)
        if self.rank == 0:
            self.publish(Path(self.arguments.output))

    def say(self, line: str) -> None:
        print(line, flush=True)
        with (self.work / "log.txt").open("a") as log:
            log.write(line + "\n")

    def publish(self, output: Path) -> None:
        """The checkpoint as a Hugging Face folder, fp16."""
        staging = output.with_name(output.name + ".part")
        shutil.rmtree(staging, ignore_errors=True)
        self.model.eval()
        generation = self.model.generation_config
        generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = 1, 2, 0
        self.model.half().save_pretrained(staging)
        images = CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=list(MEAN), image_std=list(STD)
        )
        LlavaProcessor(
            image_processor=images, tokenizer=self.tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, image_token="<image>", chat_template=CHAT_TEMPLATE,
        ).save_pretrained(staging)  # fmt: skip
        shutil.rmtree(output, ignore_errors=True)
        staging.rename(output)
        self.say(f"wrote {output}: {sum(f.stat().st_size for f in output.iterdir()) / 1e6:.1f} MB")


def worker(rank: int, arguments: argparse.Namespace) -> None:
    if arguments.processes > 1:
        store = f"tcp://127.0.0.1:{arguments.port}"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=arguments.processes)
    Trainer(arguments, rank).run()
    if arguments.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", default="build/demo", help="pictures, checkpoint and log")
    parser.add_argument("--output", default="edgevlm/assets/demo/llava", help="the finished Hugging Face folder")
    parser.add_argument("--pictures", type=int, default=48_000)
    parser.add_argument("--validation", type=int, default=150)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--port", type=int, default=29_511, help="loopback port on which the processes meet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of each stage's steps, to try the script out")
    arguments = parser.parse_args()
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", arguments.pictures), ("validation", arguments.validation)):
        Pictures.draw(work, split, count, arguments.processes)
    if arguments.processes == 1:
        worker(0, arguments)
    else:
        torch.multiprocessing.spawn(worker, (arguments,), arguments.processes)


if __name__ == "__main__":
    main()
