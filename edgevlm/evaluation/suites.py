"""Suites: the questions of an evaluation, drawn as scenes or read from files in their published formats.

    scenes               held-out questions about drawn scenes, each with one right answer
    pope-scenes          POPE made of the same scenes: "Is there a red cube?", half of the answers "no"
    pope:FILE            POPE (Li et al., 2023), JSON lines: question_id, image, text, label
    vqa:FILE             VQA v2 (Goyal et al., 2017): the questions' JSON, with the annotations' beside it or named
    captions:FILE        COCO captions (Chen et al., 2015), captions_val2014.json
    FILE or jsonl:FILE   questions of your own, JSON lines

A question is put as it stands in the file. What a model was trained to be told besides (LLaVA's "Answer the question using a
single word or phrase.") is an instruction, and is given by whoever asks: it goes on a line of its own behind the question, or
says where the question stands ("Question: {question} Short answer:").

Everything is read and checked here, before any model is loaded. Items keep the order of their file, in which questions about
one picture stand together.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import InputError
from ..scenes import ASPECTS, COLOURS, SHAPES, SPLITS, Scene, heldout_questions, sample_scene
from .metrics import METRICS, VQA_LEAST
from .records import Item, Picture

__all__ = ["NEGATIVES", "SUITES", "Suite", "SuiteSpec", "load_suite", "pope_scenes"]

#: What can be asked, with what it is read from; the command line shows it.
SUITES = ("scenes", "pope-scenes", "pope:FILE", "vqa:FILE", "captions:FILE", "FILE.jsonl")
#: How POPE chooses what it asks for and is not there.
NEGATIVES = ("random", "popular", "adversarial")
#: What is said to a model that is shown a picture of a caption suite, unless an instruction says otherwise.
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
#: Questions of a drawn suite.
DRAWN = 1000
#: Training scenes whose objects say what is popular, and what goes together.
_COUNTED = 3000
#: Names that an error lists.
_SHOWN = 5


@dataclass(frozen=True)
class SuiteSpec:
    """What to ask, as plain data. `suite` as on the command line; `images` is the folder of the pictures, `annotations` the
    second file of VQA; `limit` keeps the first questions; `split` and `aspect` are those of drawn suites."""

    suite: str
    images: str | None = None
    annotations: str | None = None
    limit: int | None = None
    metric: str | None = None
    instruction: str | None = None
    split: str = "test"
    aspect: str = "square"


@dataclass(frozen=True)
class Suite:
    """Questions, the metric that scores their answers (one of `METRICS`), and how many tokens an answer may take unless it is
    said otherwise."""

    name: str
    metric: str
    items: tuple[Item, ...]
    longest: int

    @functools.cached_property
    def by_id(self) -> Mapping[str, Item]:
        return {item.id: item for item in self.items}

    @functools.cached_property
    def digest(self) -> str:
        """Stands for all questions, right answers and names of pictures, not for what is in the pictures."""
        told = [
            [i.id, i.prompt, list(i.references), i.kind, [p.name if isinstance(p, Path) else repr(p) for p in i.pictures]]
            for i in self.items
        ]
        return hashlib.blake2b(json.dumps([self.metric, told]).encode(), digest_size=16).hexdigest()


def load_suite(spec: SuiteSpec) -> Suite:
    """Reads and checks a suite.

    Raises InputError for an unknown suite, an option that it does not have, and a file that is missing, empty, broken (naming
    the lines) or gives an id twice, and where pictures are missing or are none (saying how many, naming some).
    """
    kind, _, file = spec.suite.partition(":")
    if kind not in _READERS:
        kind, file = _guess_kind(spec.suite)
    if kind not in _READERS:
        raise InputError(f"There is no suite {spec.suite!r}. A suite is one of {', '.join(SUITES)}.")
    if spec.limit is not None and spec.limit < 1:
        raise InputError(f"The limit is {spec.limit}; it is 1 or more questions.")
    if spec.metric is not None and spec.metric not in METRICS:
        raise InputError(f"There is no metric {spec.metric!r}; there are {', '.join(METRICS)}.")
    drawn = kind in ("scenes", "pope-scenes")
    if drawn == bool(file):
        told = f"{kind} is drawn and takes no file" if drawn else f"{kind} is read from a file"
        raise InputError(f"The suite {told}: write --suite {kind}{'' if drawn else ':FILE'}.")
    _check_options(spec, kind, drawn)
    suite = _READERS[kind](spec, Path(file).expanduser())
    _check_pictures(suite)
    return suite


def _guess_kind(text: str) -> tuple[str, str]:
    """A file by itself holds questions of the user's own."""
    if Path(text).expanduser().is_file() or text.endswith(".jsonl"):
        return "jsonl", text
    return text, ""


def _check_options(spec: SuiteSpec, kind: str, drawn: bool) -> None:
    if spec.split not in SPLITS:
        raise InputError(f"There is no split {spec.split!r} of the scenes; there are {', '.join(SPLITS)}.")
    if spec.aspect not in ASPECTS:
        raise InputError(f"There is no aspect {spec.aspect!r} of the scenes; there are {', '.join(ASPECTS)}.")
    has = {
        "images": not drawn,
        "annotations": kind == "vqa",
        "metric": kind == "jsonl",
        "split": drawn,
        "aspect": drawn,
    }
    given = [name for name in has if getattr(spec, name) != getattr(SuiteSpec, name)]
    if unfit := [name for name in given if not has[name]]:
        raise InputError(f"The suite {kind} has no option {', '.join(f'--{name}' for name in unfit)}.")


def _wording(spec: SuiteSpec) -> Callable[[str], str]:
    """A question as it is asked."""
    instruction = spec.instruction
    if not instruction:
        return lambda question: question
    if "{question}" in instruction:
        return lambda question: instruction.replace("{question}", question)
    return lambda question: f"{question}\n{instruction}"


# --------------------------------------------------------------------------------------------------- drawn


def _scenes(spec: SuiteSpec, _: Path) -> Suite:
    word, name = _wording(spec), _drawn_name("scenes", spec)
    items = [
        Item(f"{scene.seed}-{question.kind}", word(question.text), (scene,), (question.answer,), question.kind)
        for scene, question in heldout_questions(spec.limit or DRAWN, spec.split, spec.aspect)
    ]
    return Suite(name, "exact", tuple(items), 48)


def _pope_scenes(spec: SuiteSpec, _: Path) -> Suite:
    word, name = _wording(spec), _drawn_name("pope-scenes", spec)
    items = [
        Item(f"{scene.seed}-{thing.replace(' ', '-')}", word(f"Is there a {thing}?"), (scene,), (label,), strategy)
        for scene, strategy, thing, label in itertools.islice(pope_scenes(spec.split, spec.aspect), spec.limit or DRAWN)
    ]
    return Suite(name, "pope", tuple(items), 16)


def _drawn_name(kind: str, spec: SuiteSpec) -> str:
    default = SuiteSpec(kind)
    return "-".join([kind, *(getattr(spec, n) for n in ("split", "aspect") if getattr(spec, n) != getattr(default, n))])


def pope_scenes(split: str = "test", aspect: str = "square") -> Iterator[tuple[Scene, str, str, str]]:
    """Scene, strategy (one of `NEGATIVES`), thing and label, without end: POPE as its authors build it (section 5 and
    RUCAIBox/POPE), with a colour and a shape for an object.

    Of each scene up to three things that are there are asked for, each followed by one that is not: drawn from all things, the
    most frequent one in training scenes, or the one that most often stands beside the thing before. Scenes take the strategies
    in turn. No question comes twice.
    """
    everything = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    frequent, beside = _count_things(aspect)
    for seed, strategy in zip(SPLITS[split], itertools.cycle(NEGATIVES), strict=False):
        scene = sample_scene(seed, aspect)
        rng = random.Random(f"pope {aspect} {seed}")
        present = _things(scene)
        asked = set(present)
        for thing in rng.sample(present, min(3, len(present))):
            choices = {"random": [], "popular": frequent, "adversarial": beside[thing]}[strategy]
            absent = next((other for other in choices if other not in asked), None)
            if absent is None:
                absent = rng.choice([other for other in everything if other not in asked])
            asked.add(absent)
            yield scene, strategy, thing, "yes"
            yield scene, strategy, absent, "no"


def _things(scene: Scene) -> list[str]:
    return [f"{o.colour} {o.shape}" for o in scene.objects]


def _count_things(aspect: str) -> tuple[list[str], dict[str, list[str]]]:
    """All things by how often they are in training scenes, and by how often they are there beside each other thing."""
    everything = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    counts: Counter[str] = Counter()
    pairs: dict[str, Counter[str]] = {thing: Counter() for thing in everything}
    for seed in SPLITS["train"][:_COUNTED]:
        present = _things(sample_scene(seed, aspect))
        counts.update(present)
        for thing in present:
            pairs[thing].update(other for other in present if other != thing)

    def ordered(counted: Counter[str]) -> list[str]:
        return sorted(counted, key=lambda thing: (-counted[thing], everything.index(thing)))

    return ordered(counts), {thing: ordered(counted) for thing, counted in pairs.items()}


# --------------------------------------------------------------------------------------------------- files


class _Broken(Exception):
    """What is wrong with an entry of a file."""


def _pope(spec: SuiteSpec, file: Path) -> Suite:
    word, folder = _wording(spec), _image_folder(spec, file)

    def read(number: int, entry: Mapping[str, Any]) -> Item:
        label = _text(entry, "label").strip().lower()
        if label not in ("yes", "no"):
            raise _Broken(f"its label is {label!r}, neither yes nor no")
        return Item(_identity(entry, "question_id"), word(_text(entry, "text")), (folder / _text(entry, "image"),), (label,))

    return Suite(f"pope-{_name(file)}", "pope", _read_lines(file, read, spec.limit), 64)


def _own(spec: SuiteSpec, file: Path) -> Suite:
    word, folder, metrics = _wording(spec), _image_folder(spec, file), dict[str, int]()

    def read(number: int, entry: Mapping[str, Any]) -> Item:
        pictures = [folder / name for name in _texts(entry, ("image", "images"), needed=False)]
        answers = _texts(entry, ("answer", "answers"))
        metric = spec.metric or entry.get("metric", "exact")
        if metric not in METRICS:
            raise _Broken(f"its metric is {metric!r}; there are {', '.join(METRICS)}")
        if METRICS[metric].problem(answers):
            raise _Broken(METRICS[metric].problem(answers))
        metrics.setdefault(metric, number)
        kind = entry.get("kind", "")
        if not isinstance(kind, str):
            raise _Broken(f"its kind is {kind!r}, no string")
        questions = _texts(entry, ("question", "prompt"), empty=True)
        if len(questions) != 1:
            raise _Broken(f"it has {len(questions)} questions")
        name = _identity(entry, "id") if "id" in entry else str(number)
        return Item(name, word(questions[0]), tuple(pictures), tuple(answers), kind)

    items = _read_lines(file, read, spec.limit)
    if len(metrics) > 1:
        said = ", ".join(f"{metric} (line {line})" for metric, line in metrics.items())
        raise InputError(
            f"{file} asks for several metrics: {said}. A suite has one; choose it with --metric, or split the file."
        )
    return Suite(_name(file), next(iter(metrics)), items, 128)


def _vqa(spec: SuiteSpec, file: Path) -> Suite:
    word, folder = _wording(spec), _image_folder(spec, file)
    content = _read_json(file)
    questions = _entries(content, "questions", file)
    answers_file = _vqa_annotations(spec, file)

    def annotate(number: int, entry: Mapping[str, Any]) -> Item:
        name = _identity(entry, "question_id")
        given = entry.get("answers")
        if not isinstance(given, list) or not all(isinstance(a, dict) and isinstance(a.get("answer"), str) for a in given):
            raise _Broken("its answers are no list of objects with an answer")
        references = tuple(a["answer"] for a in given)
        if len(references) < VQA_LEAST:
            raise _Broken(METRICS["vqa"].problem(references))
        return Item(name, "", (), references, str(entry.get("answer_type", "")))

    answers = _entries(_read_json(answers_file), "annotations", answers_file)
    known = {item.id: item for item in _read_entries(answers_file, answers, annotate)}
    picture = _vqa_picture(content, folder)

    def read(number: int, entry: Mapping[str, Any]) -> Item:
        name = _identity(entry, "question_id")
        if name not in known:
            raise _Broken(f"question {name} has no answers in {answers_file.name}")
        image = _identity(entry, "image_id")
        return Item(name, word(_text(entry, "question")), (picture(image),), known[name].references, known[name].kind)

    return Suite(f"vqa-{_name(file)}", "vqa", _read_entries(file, questions, read, spec.limit), 32)


def _vqa_annotations(spec: SuiteSpec, file: Path) -> Path:
    """The file that is named, or the one that is published with the questions."""
    if spec.annotations:
        return Path(spec.annotations).expanduser()
    sibling = re.sub("_questions$", "_annotations", re.sub("^(v2_)?(OpenEnded|MultipleChoice)_", r"\1", file.stem))
    path = file.with_name(f"{sibling}.json")
    if path == file or not path.is_file():
        raise InputError(
            f"The answers to {file} are in a file of their own: give it as --annotations ({path.name} is not there)."
        )
    return path


def _vqa_picture(content: Mapping[str, Any], folder: Path) -> Callable[[str], Path]:
    """File of a picture by its number, as the data set's pictures are named (VQA's README): by `data_type`, `data_subtype`."""
    kind, subset = str(content.get("data_type", "mscoco")), str(content.get("data_subtype", "val2014"))
    prefix, suffix = (f"COCO_{subset}_", ".jpg") if kind == "mscoco" else (f"{kind}_{subset}_", ".png")

    def picture(number: str) -> Path:
        named = f"{prefix}{number.zfill(12)}{suffix}"
        # As unpacked, within their archive's folder, and as COCO has named them since 2017.
        names = (named, f"{subset}/{named}", f"{number.zfill(12)}{suffix}")
        return next((folder / name for name in names if (folder / name).is_file()), folder / named)

    return picture


def _captions(spec: SuiteSpec, file: Path) -> Suite:
    folder, content = _image_folder(spec, file), _read_json(file)
    prompt = CAPTION_PROMPT if spec.instruction is None else spec.instruction
    captions: dict[str, list[str]] = {}

    def annotate(number: int, entry: Mapping[str, Any]) -> Item:
        captions.setdefault(_identity(entry, "image_id"), []).append(_text(entry, "caption"))
        return Item(str(number), "", (), ())

    _read_entries(file, _entries(content, "annotations", file), annotate)

    def read(number: int, entry: Mapping[str, Any]) -> Item:
        name = _identity(entry, "id")
        if name not in captions:
            raise _Broken(f"picture {name} has no caption")
        return Item(name, prompt, (folder / _text(entry, "file_name"),), tuple(captions[name]))

    return Suite(
        f"captions-{_name(file)}", "cider", _read_entries(file, _entries(content, "images", file), read, spec.limit), 64
    )


_READERS: dict[str, Callable[[SuiteSpec, Path], Suite]] = {
    "scenes": _scenes,
    "pope-scenes": _pope_scenes,
    "pope": _pope,
    "vqa": _vqa,
    "captions": _captions,
    "jsonl": _own,
}


# ------------------------------------------------------------------------------------------------- reading


def _name(file: Path) -> str:
    return re.sub(r"[^\w.+-]+", "-", file.stem) or "questions"


def _image_folder(spec: SuiteSpec, file: Path) -> Path:
    folder = Path(spec.images).expanduser() if spec.images else file.parent
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; --images is the folder that holds the pictures.")
    return folder


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise InputError(f"{file} cannot be read: {exc.strerror}.") from exc
    except UnicodeDecodeError as exc:
        raise InputError(f"{file} is no UTF-8 text: {exc}.") from exc


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(_read_text(file))
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{file} is not JSON: {exc}.") from exc
    if not isinstance(content, dict):
        raise InputError(f"{file} holds {_kind_of(content)} where an object was expected.")
    return content


def _entries(content: Mapping[str, Any], name: str, file: Path) -> Sequence[Any]:
    found = content.get(name)
    if not isinstance(found, list):
        has = ", ".join(sorted(map(repr, content))[:_SHOWN]) or "nothing"
        raise InputError(f"{file} has no list {name!r}; it has {has}. Is it another file of the data set?")
    return found


Read = Callable[[int, Mapping[str, Any]], Item]


def _read_lines(file: Path, read: Read, limit: int | None) -> tuple[Item, ...]:
    """Items of a file of JSON lines; lines without anything on them are passed over."""
    lines = [(number, line) for number, line in enumerate(_read_text(file).split("\n"), 1) if line.strip()]

    def parsed() -> Iterator[tuple[int, Any]]:
        for number, line in lines:
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as exc:
                yield number, _Broken(f"not JSON: {exc}")

    return _collect(file, "line", parsed(), read, limit)


def _read_entries(file: Path, entries: Sequence[Any], read: Read, limit: int | None = None) -> tuple[Item, ...]:
    """Items of a list within a JSON file."""
    return _collect(file, "entry", enumerate(entries, 1), read, limit)


def _collect(file: Path, what: str, entries: Any, read: Read, limit: int | None) -> tuple[Item, ...]:
    """The first items of a file. All are looked at: what is broken is told at once, whatever the limit."""
    items: dict[str, tuple[int, Item]] = {}
    broken: list[str] = []
    for number, entry in entries:
        try:
            if isinstance(entry, _Broken):
                raise entry
            if not isinstance(entry, dict):
                raise _Broken(f"{_kind_of(entry)} where an object was expected")
            item = read(number, entry)
            if item.id in items:
                raise _Broken(f"the id {item.id} is that of {what} {items[item.id][0]}, too")
            items[item.id] = (number, item)
        except _Broken as exc:
            broken.append(f"{what} {number} ({exc})")
    if broken:
        more = f", and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise InputError(f"{file} has {len(broken)} broken {_plural(what, len(broken))}: {'; '.join(broken[:_SHOWN])}{more}.")
    if not items:
        raise InputError(f"{file} holds no questions.")
    return tuple(item for _, item in items.values())[:limit]


def _plural(what: str, count: int) -> str:
    return what if count == 1 else {"line": "lines", "entry": "entries"}[what]


def _kind_of(value: object) -> str:
    return {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _text(entry: Mapping[str, Any], name: str) -> str:
    if name not in entry:
        raise _Broken(f"no {name!r}")
    if not isinstance(entry[name], str) or not entry[name].strip():
        raise _Broken(f"its {name!r} is {entry[name]!r}, no text")
    return str(entry[name])


def _texts(entry: Mapping[str, Any], names: tuple[str, str], *, needed: bool = True, empty: bool = False) -> list[str]:
    """What stands under one of two names: a text, or several."""
    given = [name for name in names if name in entry]
    if len(given) != 1:
        if not given and not needed:
            return []
        raise _Broken(f"{'both' if given else 'neither'} {names[0]!r} {'and' if given else 'nor'} {names[1]!r}")
    value = entry[given[0]]
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, str) and (v.strip() or empty) for v in values) or (needed and not values):
        raise _Broken(f"its {given[0]!r} is {value!r}, no text")
    return list(values)


def _identity(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise _Broken(f"no {name!r}" if name not in entry else f"its {name!r} is {value!r}, neither a number nor a text")
    return str(value)


def _check_pictures(suite: Suite) -> None:
    """Raises InputError where files are missing, or are no pictures by their first bytes. Damage further in shows when a
    picture is asked about."""
    files: dict[Path, None] = {}
    for item in suite.items:
        files.update((picture, None) for picture in _files(item.pictures))
    missing = [path for path in files if not path.is_file()]
    if missing:
        named = ", ".join(map(str, missing[:_SHOWN])) + (", …" if len(missing) > _SHOWN else "")
        raise InputError(
            f"{len(missing):,} of the {len(files):,} pictures of {suite.name} are missing: {named}. Give the folder that holds "
            "them as --images; nothing is downloaded."
        )
    if unread := [path for path in files if not _is_picture(path)]:
        named = ", ".join(map(str, unread[:_SHOWN])) + (", …" if len(unread) > _SHOWN else "")
        raise InputError(
            f"{len(unread):,} of the {len(files):,} pictures of {suite.name} are none that Pillow can read: {named}. Replace "
            "them, or take their questions out of the file."
        )


def _is_picture(path: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of very large ones: what is too large is told when it is asked about
            Image.open(path).close()
    except Exception:  # a damaged file makes Pillow's parsers raise almost anything
        return False
    return True


def _files(pictures: Sequence[Picture]) -> Iterator[Path]:
    return (picture for picture in pictures if isinstance(picture, Path))
