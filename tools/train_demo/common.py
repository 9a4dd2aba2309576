"""What the demo models share: words, pictures, questions as token rows, and a training loop that can be stopped.

Seeded and resumable: every step draws its data from (seed, stage, step, rank), and a checkpoint is written every few
hundred steps, so a run that was stopped goes on where it was. Two single-threaded processes with averaged gradients
are faster here than one process with two threads, because the operators are small.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from edgevlm.scenes import (
    COLOURS,
    KINDS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    SceneObject,
    ask,
    ask_all,
    render_mask,
    render_scene,
    sample_scene,
)

SIDE, PATCH, CAMERA = 72, 12, 224  # pixels: what the tower sees, one patch, what the scene is drawn at
GRID = SIDE // PATCH
MEAN, STD = (0.45, 0.42, 0.40), (0.25, 0.25, 0.25)
BINS = 24  # coordinates in written scenes
QUESTIONS = 8  # a picture and step: they share the picture's tokens
AUXILIARY = 0.3  # weight of what only keeps an earlier lesson alive
POINTING = 0.5


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int  # pictures (or written scenes) a step, over all processes
    rate: float
    fall: int | None = None  # steps over which the rate falls, where the stage ends before that
    scored: bool = True  # whether the model can answer questions about pictures yet


# ------------------------------------------------------------------------------------------------ tokenizer


def write_scene(scene: Scene, rng: random.Random) -> str:
    """The scene in words, for a decoder that has no eyes yet."""
    objects = list(scene.objects)
    rng.shuffle(objects)
    return ", ".join(f"a {o.size} {o.colour} {o.shape} at {int(o.x * BINS)} {int(o.y * BINS)}" for o in objects)


def corpus(turns: tuple[str, ...], opening: str, scenes: int = 3000) -> list[str]:
    """All that the model will read, turn by turn, so that every word becomes one token."""
    lines = [" ".join(str(n) for n in range(BINS))]
    for seed in range(scenes):
        scene = sample_scene(seed)
        lines.append(f"{opening}{write_scene(scene, random.Random(seed))}")
        for question in ask_all(scene):
            for text in (question.text, question.text[0].lower() + question.text[1:]):
                lines += [turn.format(question=text, answer=question.answer) for turn in turns]
    return lines


def build_tokenizer(
    turns: tuple[str, ...] = ("USER: \n{question} ASSISTANT: {answer}", "USER: {question} ASSISTANT: {answer}"),
    opening: str = "USER: ",
    extra: dict[str, str] | list[str] | None = None,
) -> PreTrainedTokenizerFast:
    """Byte-fallback BPE with Llama's word boundaries, so that it takes any text."""
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = words
    lines = corpus(turns, opening)
    learner.train_from_iterator(
        [*lines, *(line.removeprefix(opening) for line in lines[:4000])] + [opening.strip()] * 10,
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
        extra_special_tokens={"image_token": "<image>"} if extra is None else extra,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


# ----------------------------------------------------------------------------------------------------- data


def draw_range(job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    first, count = job
    pixels = np.empty((count, SIDE, SIDE, 3), np.uint8)
    labels = np.empty((count, GRID * GRID), np.uint8)
    for i in range(count):
        scene = sample_scene(first + i)
        pixels[i] = np.asarray(render_scene(scene, CAMERA).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        labels[i] = patch_labels(render_mask(scene, SIDE), PATCH)
    return pixels, labels


def patch_labels(mask: np.ndarray, patch: int) -> np.ndarray:
    """Which object each patch of a picture shows, row by row: the one with the most pixels in it, if they are a sixth."""
    rows, columns = mask.shape[0] // patch, mask.shape[1] // patch
    pixels = mask.reshape(rows, patch, columns, patch).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    area = np.stack([(pixels == number).sum(1) for number in range(1, 5)], 1)
    return np.where(area.max(1) >= patch * patch // 6, area.argmax(1) + 1, 0).astype(np.uint8)


def describe_objects(scenes: list[Scene]) -> np.ndarray:
    """`[scenes, 5, 5]`: colour, shape, size (0: none) and centre, from -1 to 1 over the picture. Row 0 is the table."""
    objects = np.zeros((len(scenes), 5, 5), np.float32)
    for i, scene in enumerate(scenes):
        for n, o in enumerate(scene.objects, 1):
            named = (COLOURS.index(o.colour), SHAPES.index(o.shape), SIZES.index(o.size))
            objects[i, n] = (*(number + 1 for number in named), *centre(scene, o))
    return objects


def centre(scene: Scene, o: SceneObject) -> tuple[float, float]:
    """Where an object is, from -1 to 1 over the picture."""
    return 2 * o.x / scene.width - 1, 2 * o.y / scene.height - 1


class Pictures:
    """Drawn once into the work folder, memory-mapped from there."""

    def __init__(self, folder: Path, split: str, count: int) -> None:
        self.first = SPLITS[split].start
        self.pixels = np.load(folder / f"{split}-{count}-pixels.npy", mmap_mode="r")
        self.labels = np.load(folder / f"{split}-{count}-labels.npy")
        self.scenes = [sample_scene(self.first + i) for i in range(count)]
        self.objects = describe_objects(self.scenes)

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


# ------------------------------------------------------------------------------------------------ questions


@dataclass
class Rows:
    """Token rows `[B, S]`. `segments`: a token sees those of its own and of segment 0; `numbers`: which question it is of."""

    ids: Tensor
    positions: Tensor
    segments: Tensor
    numbers: Tensor
    labels: Tensor  # the token that comes next, -100 where it is not to be learnt
    kinds: list[list[str]]  # of each question
    points: Tensor  # [N, 5]: row, column, 0 at a noun or 1 where the answer begins, and what `Pointer` teaches there
    shown: Tensor | None = None  # which of the row's pictures a token sees, -1: none

    def mask(self) -> Tensor:
        length = self.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        together = (self.segments[:, None, :] == 0) | (self.segments[:, None, :] == self.segments[:, :, None])
        return (causal & together)[:, None]


def pad(rows: list[list[int]], value: int) -> Tensor:
    width = (max(map(len, rows)) + 7) // 8 * 8
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


NOUNS = (*SHAPES, "object")


def referents(scene: Scene, text: str) -> list[SceneObject]:
    """The objects that a question names, in its order: "the red ball", "the cube", "the blue object"."""
    found = []
    for adjective, noun in re.findall(rf"\bthe (?:(\w+) )?({'|'.join(NOUNS)})\b", text):
        fits = [o for o in scene.objects if noun in (o.shape, "object") and adjective in ("", o.colour, o.size)]
        if len(fits) != 1:
            return []
        found += fits
    return found


class Pointer(nn.Module):
    """Teaches a decoder where to look, and is thrown away afterwards.

    "Is the red ball left of the cube?" has two objects to find and one comparison to make, and as long as one of the
    three fails, the answer is a coin and teaches nothing: demo/llava needed 3,000 steps to get over that.
    Here the state at every noun, half-way up, has to say where its object is, and the state where the answer begins,
    one layer later, how far the two are from each other (or, asked for a place, where the object is).
    """

    def __init__(self, width: int, depths: tuple[int, int] = (2, 3)) -> None:
        super().__init__()
        self.depths = depths
        self.noun = nn.Linear(width, 2)
        self.answer = nn.Linear(width, 2)

    def loss(self, states: tuple[Tensor, ...], points: Tensor) -> Tensor:
        """`states`: those behind each layer, the embeddings first."""
        loss = torch.zeros(())
        for which, (head, depth) in enumerate(zip((self.noun, self.answer), self.depths, strict=True)):
            chosen = points[points[:, 2] == which]
            guess = head(states[depth][chosen[:, 0].long(), chosen[:, 1].long()])
            loss = loss + (guess - chosen[:, 3:]).abs().mean()
        return loss


class Dialogue:
    """Questions as token rows. Rows share the scene; each question sees only itself, or all before it (`chained`).

    The wording here is LLaVA's; other models override `prefix`, `head` and `tail`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.encode = functools.lru_cache(200_000)(lambda text: self._encode(tokenizer, text))
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        self.open = self.encode("<s>USER: ")
        self.eos = tokenizer.eos_token_id
        self.nouns = {self.encode(f" {noun}")[0] for noun in NOUNS}

    @staticmethod
    def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
        # "</s>" in front keeps the first word from getting the mark that only the start of a text has.
        if text.startswith("<s>"):
            return list(tokenizer(text.removeprefix("<s>")).input_ids)
        return list(tokenizer("</s>" + text, add_special_tokens=False).input_ids)[1:]

    def prefix(self, scene: Scene, rng: random.Random, written: bool) -> list[int]:
        if written:
            return [*self.encode(f"<s>USER: {write_scene(scene, rng)}"), *self.encode("\n")]
        return [*self.open, *[self.image] * (GRID * GRID), *self.encode("\n")]

    def head(self, text: str, later: bool) -> list[int]:
        """The question, up to where the answer begins; `later`: in a dialogue that has begun."""
        return self.encode(f"USER: {text} ASSISTANT:") if later else self.encode(f"{text} ASSISTANT:")

    def tail(self, answer: str) -> tuple[list[int], list[int]]:
        """What follows the question in the row, and what is to be predicted from its end on."""
        tokens = [*self.encode(f" {answer}"), self.eos]
        return tokens, tokens

    def point(self, scene: Scene, kind: str, text: str, head: list[int]) -> list[tuple[int, int, float, float]]:
        """Where in a question's tokens something is to be pointed at: column, 0 or 1, and the target."""
        named = [centre(scene, o) for o in referents(scene, text)]
        columns = [i for i, token in enumerate(head) if token in self.nouns]
        if not named or len(named) != len(columns):
            return []
        points = [(column, 0, *centre) for column, centre in zip(columns, named, strict=True)]
        if kind == "position":
            points.append((len(head) - 1, 1, *named[0]))
        elif kind == "relation":
            points.append((len(head) - 1, 1, named[0][0] - named[1][0], named[0][1] - named[1][1]))
        return points

    def pose(self, scene: Scene, rng: random.Random, caption: bool) -> tuple[str, str, str] | None:
        """A question to learn from: its kind, text and answer. None where the draw allows none."""
        kind = KINDS[-1] if caption else rng.choice(KINDS[:-1])
        if rng.random() < 0.35:  # two hops need the most practice
            kind = rng.choice(("relation", "position", "count"))
        question = ask(scene, kind, rng)
        if question is None:
            return None
        text = question.text
        if rng.random() < 0.1:
            text = text[0].lower() + text[1:]
        return question.kind, text, question.answer

    def rows(
        self,
        scenes: list[Scene],
        rng: random.Random,
        questions: int,
        written: bool,
        chained: bool,
        fixed: list[list[Any]] | None = None,
    ) -> Rows:
        ids, positions, segments, numbers, labels, kinds, points = [], [], [], [], [], [], []
        for number, scene in enumerate(scenes):
            prefix = self.prefix(scene, rng, written)
            row, place = list(prefix), list(range(len(prefix)))
            segment, asking, label = [0] * len(prefix), [0] * len(prefix), [-100] * len(prefix)
            asked: list[str] = []
            todo = [(q.kind, q.text, q.answer) for q in fixed[number]] if fixed else []
            while len(asked) < (len(fixed[number]) if fixed else questions):
                question = todo.pop(0) if fixed else self.pose(scene, rng, not asked)
                if question is None:
                    continue
                kind, text, answer = question
                head = self.head(text, chained and bool(asked))
                tail, targets = self.tail(answer)
                points += [(number, len(row) + column, *rest) for column, *rest in self.point(scene, kind, text, head)]
                asked.append(kind)
                start = place[-1] + 1 if chained else len(prefix)
                length = len(head) + len(tail)
                row += head + tail
                place += range(start, start + length)
                segment += [0 if chained else len(asked)] * length
                asking += [len(asked)] * length
                label += ([-100] * (len(head) - 1) + targets + [-100] * length)[:length]
            ids.append(row)
            positions.append(place)
            segments.append(segment)
            numbers.append(asking)
            labels.append(label)
            kinds.append(asked)
        return Rows(
            pad(ids, 0), pad(positions, 0), pad(segments, -1), pad(numbers, 0), pad(labels, -100), kinds,
            torch.tensor(points).view(-1, 5),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ a tower's teacher


class Heads(nn.Module):
    """What a tower is taught with, thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, (len(COLOURS) + 1) + (len(SHAPES) + 1) + (len(SIZES) + 1))
        self.place = nn.Linear(width, 2)
        self.list = nn.Linear(width, len(COLOURS) * len(SHAPES))

    def patch_loss(self, features: Tensor, truth: Tensor) -> Tensor:
        """Every patch names the colour, shape, size and centre of the object that it shows."""
        widths = [len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1]
        guesses = self.patch(features).split(widths, -1)
        loss = sum(F.cross_entropy(g.flatten(0, 1), truth[..., i].long().flatten()) for i, g in enumerate(guesses))
        shown = truth[..., 0] > 0
        return loss + (self.place(features)[shown] - truth[..., 3:][shown]).abs().mean()

    def list_loss(self, pooled: Tensor, objects: np.ndarray) -> Tensor:
        """The CLS token lists the objects."""
        truth = np.zeros((len(objects), len(COLOURS) * len(SHAPES)), np.float32)
        row, column = np.nonzero(objects[..., 0])
        colour, shape = objects[row, column, 0] - 1, objects[row, column, 1] - 1
        truth[row, (colour * len(SHAPES) + shape).astype(int)] = 1
        return F.binary_cross_entropy_with_logits(self.list(pooled), torch.from_numpy(truth))


def grid_of_sines(width: int) -> Tensor:
    """Two-dimensional positions to start from: beside the patch embedding, the usual small random start is drowned."""
    angles = torch.arange(GRID)[:, None] * torch.exp(-torch.arange(width // 4) * math.log(50) / (width // 4 - 1))
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(-1, GRID, -1), line[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], -1).reshape(GRID * GRID, -1) * 0.5


# ------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Files:
    """A processor that cannot be built where torchvision is missing: its files are written one by one."""

    tokenizer: Any
    image_processor: Any
    chat_template: str
    about: dict[str, Any]  # processor_config.json

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        (folder / "processor_config.json").write_text(json.dumps(self.about, indent=2) + "\n", encoding="utf-8")


class Trainer(ABC):
    """The loop. A model says what it is made of (`build`), what it learns (`stages`, `chosen`, `loss`), how it answers
    (`look`, `read`), and what processor it is published with."""

    stages: ClassVar[tuple[Stage, ...]]
    keep: ClassVar[int] = 250  # steps from checkpoint to checkpoint
    aspects: ClassVar[tuple[str, ...]] = ()  # of scenes beside the square ones of `Pictures`
    store: ClassVar[Any] = None  # what draws pictures of these, and reads them back
    tokenizer: PreTrainedTokenizerFast
    dialogue: Dialogue
    model: PreTrainedModel
    heads: nn.Module
    states: tuple[Tensor, ...] = ()

    def __init__(self, arguments: argparse.Namespace, rank: int) -> None:
        self.arguments, self.rank, self.world = arguments, rank, arguments.processes
        self.work = Path(arguments.work) / arguments.model
        self.work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(arguments.seed)
        torch.set_flush_denormal(True)
        torch.set_num_threads(1 if self.world > 1 else os.cpu_count() or 1)
        self.build()
        self.pictures = Pictures(Path(arguments.work), "train", arguments.pictures)
        self.validation = Pictures(Path(arguments.work), "validation", arguments.validation)
        self.views, self.validation_views = (
            {aspect: self.store(Path(arguments.work), aspect, split, count) for aspect in self.aspects}
            for split, count in (("train", arguments.views), ("validation", arguments.validation))
        )
        self.features: np.ndarray | None = None

    @abstractmethod
    def build(self) -> None: ...

    @abstractmethod
    def chosen(self, stage: Stage) -> list[tuple[list[nn.Parameter], float]]:
        """What a stage trains, each with its share of the stage's rate."""

    def begin(self, stage: Stage, fresh: bool) -> None:  # noqa: B027 - most have nothing to do then
        """Called before a stage, also when it is taken up again (not `fresh`)."""

    @abstractmethod
    def loss(self, stage: Stage, step: int) -> Tensor: ...

    @abstractmethod
    def look(self, pictures: Pictures, index: np.ndarray) -> Tensor:
        """What the language model is given of the pictures."""

    @abstractmethod
    def read(self, rows: Rows, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits and targets at every labelled place. May leave the decoder's states in `states`, for a `Pointer`."""

    @abstractmethod
    def processor(self) -> Any:
        """What `save_pretrained` writes beside model and configuration."""

    # frozen towers
    def encode(self, pixels: Tensor) -> Tensor:
        """Features of a frozen tower, all tokens; for models that have one."""
        raise NotImplementedError(f"{type(self).__name__} has no frozen tower")

    def remember(self) -> None:
        """Every training picture goes through the frozen tower once; the features stay in the work folder."""
        weights = b"".join(v.numpy().tobytes() for v in self.tower.state_dict().values())
        name = f"features-{len(self.pictures.scenes)}-{hashlib.sha256(weights).hexdigest()[:12]}.npy"
        path, count = self.work / name, len(self.pictures.scenes)
        if not path.exists():
            part = path.with_suffix(".part")
            with torch.no_grad():
                shape = (count, *self.encode(self.pictures.batch(np.arange(1))).shape[1:])
                if self.rank == 0:
                    np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape)
                self.meet()
                store = np.lib.format.open_memmap(part, mode="r+")
                for first in range(self.rank * 250, count, self.world * 250):
                    index = np.arange(first, min(count, first + 250))
                    store[index] = self.encode(self.pictures.batch(index)).numpy()
                store.flush()
            self.meet()
            if self.rank == 0:
                part.replace(path)
            self.meet()
        self.features = np.load(path, mmap_mode="r")

    def recall(self, pictures: Pictures, index: np.ndarray) -> Tensor:
        if pictures is self.pictures and self.features is not None:
            return torch.from_numpy(self.features[index]).float()
        with torch.no_grad():
            return self.encode(pictures.batch(index))

    @property
    @abstractmethod
    def tower(self) -> Any: ...

    # data
    @classmethod
    def draw_pictures(cls, arguments: argparse.Namespace) -> None:
        """Draws what the model is trained and validated on into the work folder, where it is not there yet."""
        for split, count in (("train", arguments.pictures), ("validation", arguments.validation)):
            Pictures.draw(Path(arguments.work), split, count, arguments.processes)
        for aspect in cls.aspects:
            for split, count in (("train", arguments.views), ("validation", arguments.validation)):
                cls.store.draw(Path(arguments.work), aspect, split, count, arguments.processes)

    def draw(self, stage: Stage, step: int, per_row: int = 1) -> tuple[random.Random, np.ndarray]:
        """A step's source of chance, and its pictures."""
        rng = random.Random(f"{self.arguments.seed} {stage.name} {step} {self.rank}")
        share = stage.batch // self.world * per_row
        return rng, np.array(sorted(rng.randrange(len(self.pictures.scenes)) for _ in range(share)))

    # scores
    def examine(self, first: int, count: int) -> tuple[Rows, Tensor]:
        """Questions over validation scenes, and what the model is given of the pictures."""
        index = np.arange(first, min(len(self.validation.scenes), first + count))
        scenes = [self.validation.scenes[i] for i in index]
        fixed = [ask_all(scene) for scene in scenes]
        return self.dialogue.rows(scenes, random.Random(0), 0, False, False, fixed), self.look(self.validation, index)

    def score(self) -> dict[str, float]:
        """Exact match by kind on validation scenes."""
        return self.grade(self.examine(first, 50) for first in range(0, len(self.validation.scenes), 50))

    @torch.no_grad()
    def grade(self, examinations: Iterable[tuple[Rows, Tensor]]) -> dict[str, float]:
        """Exact match by kind. Teacher-forced: right at every place is what greedy decoding needs."""
        self.model.eval()
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        for rows, features in examinations:
            logits, targets = self.read(rows, features)
            hits = iter((logits.argmax(-1) == targets).tolist())
            where = rows.labels != -100
            for b, asked in enumerate(rows.kinds):
                flags: dict[int, bool] = {}
                for number in rows.numbers[b][where[b]].tolist():
                    flags[number] = flags.get(number, True) & next(hits)
                for n, kind in enumerate(asked, 1):
                    right[kind].append(flags[n])
        self.model.train()
        scores = {kind: round(100 * float(np.mean(hits)), 1) for kind, hits in right.items()}
        return {"all": round(float(np.mean(list(scores.values()))), 1), **scores}

    # the loop
    def parameters(self, stage: Stage) -> list[dict[str, Any]]:
        for parameter in [*self.model.parameters(), *self.heads.parameters()]:
            parameter.requires_grad_(False)
        groups = []
        for parameters, factor in self.chosen(stage):
            for matrix in (True, False):
                members = [p for p in parameters if (p.ndim > 1) == matrix]
                if not members:
                    continue
                groups.append({"params": members, "weight_decay": 0.05 if matrix else 0.0, "base": stage.rate * factor})
                for parameter in members:
                    parameter.requires_grad_(True)
        return groups

    def meet(self) -> None:
        if self.world > 1:
            dist.barrier()

    def average(self, parameters: list[nn.Parameter]) -> None:
        if self.world == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        flat /= self.world
        for p, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def run(self) -> None:
        checkpoint = self.work / "checkpoint.pt"
        done: dict[str, Any] = {"stage": 0, "step": 0}
        if checkpoint.exists():
            done = torch.load(checkpoint, weights_only=True)
            self.model.load_state_dict(done["model"])
            self.heads.load_state_dict(done["heads"])
        for number, stage in enumerate(self.stages):
            if number < done["stage"]:
                continue
            steps, fall = (max(1, round(n * self.arguments.scale)) for n in (stage.steps, stage.fall or stage.steps))
            optimizer = torch.optim.AdamW(self.parameters(stage), lr=stage.rate, betas=(0.9, 0.98))
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            first = 0
            if number == done["stage"] and done["step"]:
                first = done["step"]
                optimizer.load_state_dict(done["optimizer"])
            self.begin(stage, fresh=first == 0)
            began, average = time.monotonic(), None
            for step in range(first, steps):
                share = step / fall
                for group in optimizer.param_groups:
                    group["lr"] = (
                        group["base"] * min(1, (share + 1 / fall) / 0.04) * (0.485 * (1 + math.cos(math.pi * share)) + 0.03)
                    )
                loss = self.loss(stage, step)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
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
                if stage.scored and ((step + 1) % 500 == 0 or step + 1 == steps):
                    self.say(f"validation {json.dumps(self.score())}")
                if (step + 1) % self.keep == 0 or step + 1 == steps:
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
        self.save(staging)
        shutil.rmtree(output, ignore_errors=True)
        staging.rename(output)
        self.say(f"wrote {output}: {sum(f.stat().st_size for f in output.iterdir()) / 1e6:.1f} MB")

    def save(self, folder: Path) -> None:
        generation = self.model.generation_config
        generation.bos_token_id, generation.pad_token_id = self.tokenizer.bos_token_id, self.tokenizer.pad_token_id
        generation.eos_token_id = self.stops()
        self.model.half().save_pretrained(folder)
        self.processor().save_pretrained(folder)

    def stops(self) -> int | list[int]:
        """The tokens that end an answer."""
        return self.dialogue.eos


def worker(rank: int, kind: type[Trainer], arguments: argparse.Namespace) -> None:
    if arguments.processes > 1:
        store = f"tcp://127.0.0.1:{arguments.port}"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=arguments.processes)
    kind(arguments, rank).run()
    if arguments.processes > 1:
        dist.barrier()
        dist.destroy_process_group()
