"""Calibration sets: pictures with prompts, run through a bundle's own parts, so that each is calibrated on what it receives.

    scenes                  pictures that the package draws, with questions and answers
    FOLDER                  every picture in it, with a plain request; or, where it has one `.jsonl` file, what that says
    FILE.jsonl              a line each: {"image": "a.jpg", "prompt": "What is this?", "answer": "A cup."}

`images` may hold several, `file_name`, `question` and `text` are understood too, `answer` may be missing. Calibrating a
vision-language model on text alone breaks it for pictures, so a set without any is refused. Films are not understood.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .bundle import Bundle, Part
from .errors import CalibrationError, ImageError, InputError
from .images import load_image
from .prompt import normalize_request
from .runtimes import Choice, Memory, PartSession, State, Tensor, open_part
from .scenes import ASPECTS, SPLITS, ask_all, render_scene, sample_scene
from .vlm import VLM, Timings, View, picture_digest

__all__ = ["SAMPLES", "CalibrationSet", "Sample", "load_calibration"]

#: As many samples as a set gives, unless told otherwise. AWQ's authors used 128 texts of 512 tokens; a sample with a picture is
#: some 600 tokens long.
SAMPLES = 64
#: Pixels of the shorter side of a scene.
_SIDE = 224
_PROMPTS = ("Describe the picture.", "What is in the picture?", "What is happening here?")
_PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
#: Of an answer that the model has to give first, at most as many tokens.
_ANSWER = 32


@dataclass(frozen=True)
class Sample:
    """What the model is shown: pictures, a request, and the answer it should be able to give (or ""). `name` is for errors."""

    pictures: Sequence[Path | Image.Image]
    prompt: str
    answer: str = ""
    name: str = ""


@dataclass(frozen=True)
class CalibrationSet:
    """Samples, where they come from, and a hash of all they hold."""

    source: str
    samples: Sequence[Sample]
    seed: int

    def identity(self) -> Mapping[str, Any]:
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(json.dumps([sample.prompt, sample.answer, len(sample.pictures)]).encode())
            for picture in sample.pictures:
                digest.update(picture_digest(load_image(picture)).encode())
        return {
            "source": self.source, "samples": len(self.samples), "seed": self.seed, "sha256": digest.hexdigest(),
        }  # fmt: skip

    def feeds(
        self, bundle: Bundle, parts: Sequence[str], shelf: Callable[[np.ndarray], Any]
    ) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """What each of the parts is run with, sample by sample. Raises CalibrationError where the model cannot take one."""
        recorded: _Record = {part: [] for part in parts}
        # Behind an encoder the decoder has the answer alone, which it has to give first where a sample has none.
        closed = bundle.manifest.decoder_start_id is None or all(sample.answer for sample in self.samples)
        opener = _recorder(recorded, shelf, closed=closed)
        vlm = VLM.load(bundle.folder, capacity=bundle.manifest.context_length, check_files=False, opener=opener)
        for number, sample in enumerate(self.samples, 1):
            try:
                feeds = _decoder_feeds(vlm, sample)
            except InputError as exc:
                where = sample.name or f"sample {number}"
                raise CalibrationError(f"{where} of the calibration set {self.source} cannot be used: {exc}") from exc
            if "decoder" in recorded:
                recorded["decoder"].append({name: shelf(array) for name, array in feeds.items()})
        return {part: feeds for part, feeds in recorded.items() if feeds}


def load_calibration(source: str | Path = "scenes", *, samples: int = SAMPLES, seed: int = 0) -> CalibrationSet:
    """A calibration set by name, file or folder, of at most `samples`, drawn with `seed` where there are more.

    Raises CalibrationError.
    """
    if samples < 1:
        raise CalibrationError(f"The calibration should have {samples} samples; it needs 1 or more.")
    if str(source) == "scenes":
        return CalibrationSet("scenes", list(_scene_samples(samples, seed)), seed)
    path = Path(source)
    if path.is_dir():
        listed = sorted(path.glob("*.jsonl"))
        if len(listed) > 1:
            raise CalibrationError(
                f"{path} has several .jsonl files ({', '.join(f.name for f in listed)}); name the one to use."
            )
        found = _listed_samples(listed[0]) if listed else _bare_samples(path)
    elif path.is_file():
        found = _listed_samples(path)
    else:
        raise CalibrationError(
            f"There is no calibration set {str(source)!r}: it is `scenes`, a .jsonl file, or a folder of pictures."
        )
    if len(found) > samples:
        found = [found[number] for number in sorted(random.Random(seed).sample(range(len(found)), samples))]
    if not any(sample.pictures for sample in found):
        raise CalibrationError(
            f"The {len(found)} samples of {path} have no picture. A vision-language model that is calibrated on text alone "
            'loses its sight; give pictures ("image": …), or use `scenes`.'
        )
    _require_pictures(found)
    return CalibrationSet(path.name, found, seed)


def _scene_samples(samples: int, seed: int) -> Iterator[Sample]:
    rng = random.Random(f"calibration {seed}")
    aspects = [*ASPECTS, "square"]
    for number in range(samples):
        scene = sample_scene(rng.choice(SPLITS["train"]), aspects[number % len(aspects)])
        question = rng.choice(ask_all(scene))
        yield Sample([render_scene(scene, _SIDE)], question.text, question.answer, f"scene {number + 1}")


def _bare_samples(folder: Path) -> list[Sample]:
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES and path.is_file())
    if not pictures:
        raise CalibrationError(f"{folder} has neither pictures ({', '.join(sorted(_PICTURES))}) nor a .jsonl file.")
    return [Sample([path], _PROMPTS[number % len(_PROMPTS)], name=path.name) for number, path in enumerate(pictures)]


def _listed_samples(path: Path) -> list[Sample]:
    found: list[Sample] = []
    broken: list[str] = []
    try:
        # Not `splitlines`, which cuts at characters that JSON has within texts. Windows begins files with a mark.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as exc:
        raise CalibrationError(f"{path} cannot be read: {exc}.") from exc
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(replace(_sample_from(json.loads(line), path.parent), name=f"line {number}"))
        except (ValueError, RecursionError) as exc:
            broken.append(f"line {number}: {exc}")
    if broken:
        more = f" (and {len(broken) - 5} more)" if len(broken) > 5 else ""
        raise CalibrationError(f"{path} has {len(broken)} broken lines. {'; '.join(broken[:5])}{more}")
    if not found:
        raise CalibrationError(f"{path} has no samples.")
    return found


def _sample_from(entry: Any, folder: Path) -> Sample:
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    images = entry.get("images", entry.get("image", entry.get("file_name")))
    images = [] if images is None else [images] if isinstance(images, str) else images
    prompt = next((entry[key] for key in ("prompt", "question", "text") if key in entry), _PROMPTS[0])
    answer = entry.get("answer", "")
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise ValueError('"image" is a path, "images" a list of paths')
    if not isinstance(prompt, str) or not isinstance(answer, str) or not prompt.strip():
        raise ValueError('"prompt" and "answer" are texts, and the prompt says something')
    "".join([prompt, answer, *images]).encode()  # half of a character, as "\ud83d" alone is
    return Sample([folder / image for image in images], prompt, answer)


def _require_pictures(samples: Sequence[Sample]) -> None:
    bad = []
    for sample in samples:
        for picture in sample.pictures:
            try:
                load_image(picture)
            except ImageError as exc:
                bad.append(f"{sample.name}: {exc}")
    if bad:
        more = f" (and {len(bad) - 5} more)" if len(bad) > 5 else ""
        raise CalibrationError(f"{len(bad)} pictures of the calibration set cannot be used. {' '.join(bad[:5])}{more}")


# ------------------------------------------------------------------------------------------ recording


#: What parts were given, run by run.
_Record = dict[str, list[Mapping[str, Any]]]


class _Recorded(PartSession):
    """Runs a part, and keeps what it was given."""

    def __init__(self, inner: PartSession, kept: list[Mapping[str, Any]], shelf: Callable[[np.ndarray], Any]) -> None:
        super().__init__(inner.name, inner.part)
        self._inner, self._kept, self._shelf = inner, kept, shelf

    def new_state(self, pairs: Mapping[str, str], batch: int, capacity: int) -> State:
        return self._inner.new_state(pairs, batch, capacity)

    def new_memory(self, names: Sequence[str], batch: int) -> Memory:
        return self._inner.new_memory(names, batch)

    def _run(self, feeds: dict[str, np.ndarray], state: State | None, memory: Memory | None) -> dict[str, np.ndarray]:
        self._kept.append({name: self._shelf(array) for name, array in feeds.items()})
        return self._inner.run(feeds, state, memory)


class _NoState(State):
    def __init__(self, names: Sequence[str], capacity: int) -> None:
        self.inputs, self.capacity = frozenset(names), capacity

    def grow(self, capacity: int) -> None:
        self.capacity = capacity


class _Closed(PartSession):
    """A decoder that stays closed: its layers are run one by one later, and the whole may not fit in memory."""

    def new_state(self, pairs: Mapping[str, str], batch: int, capacity: int) -> State:
        return _NoState(list(pairs), capacity)

    def new_memory(self, names: Sequence[str], batch: int) -> Memory:
        return _NoMemory(names)

    def _run(self, feeds: dict[str, np.ndarray], state: State | None, memory: Memory | None) -> dict[str, np.ndarray]:
        raise AssertionError("the decoder is not run while samples are recorded")


class _NoMemory(Memory):
    def __init__(self, names: Sequence[str]) -> None:
        self.inputs, self.length = frozenset(names), 0

    def truncate(self, length: int) -> None: ...

    def append(self, *blocks: Mapping[str, Tensor]) -> None: ...


def _recorder(
    recorded: _Record, shelf: Callable[[np.ndarray], Any], *, closed: bool
) -> Callable[..., tuple[PartSession, Choice]]:
    def open_recorded(path: Path, name: str, part: Part, **options: Any) -> tuple[PartSession, Choice]:
        if name == "decoder" and closed:
            return _Closed(name, part), Choice("none")
        session, choice = open_part(path, name, part, **options)
        kept = recorded.get(name)
        return (session if kept is None or name == "decoder" else _Recorded(session, kept, shelf)), choice

    return open_recorded


def _decoder_feeds(vlm: VLM, sample: Sample) -> dict[str, np.ndarray]:
    """Runs the parts before the decoder; what the decoder would be run with for the whole prompt and answer at once."""
    manifest = vlm.bundle.manifest
    request = normalize_request(sample.prompt, list(sample.pictures), None)
    built, pictures = vlm._read_request(request)
    views = [View(picture_digest(p), built.instruction, pixel_values=vlm._pixels(p)) for p in pictures]
    feed = vlm._feed(built, views, Timings())
    answer = vlm._builder.encode_plain(sample.answer) if sample.answer else []
    if not answer and manifest.decoder_start_id is not None:
        answer = vlm.generate(sample.prompt, images=list(sample.pictures), max_new_tokens=_ANSWER).tokens
    length = len(feed.keys)
    answer = answer[: vlm.capacity - length]
    rows = np.concatenate([feed.rows(0, length), *([vlm._embed(answer)] if answer else [])])
    total = len(rows)
    part = manifest.parts["decoder"]
    feeds: dict[str, np.ndarray] = {
        "inputs_embeds": rows[None],
        "position_ids": np.arange(total)[None],
        "last_token_index": np.array([total - 1]),
    }
    if feed.turns is not None:
        turns = [feed.turns, *(turn[:, None] for n in range(len(answer)) if (turn := feed.turn(n)) is not None)]
        feeds["mrope_position_ids"] = np.concatenate(turns, 1)[:, None]
    if manifest.cross_attention:
        visible = feed.visible if feed.visible is not None else np.zeros((length, 0), bool)
        visible = np.concatenate([visible, np.repeat(visible[-1:], total - length, 0)])
        blocks = [make() for _, make in feed.blocks]
        for name in (n for n in part.inputs if n.startswith("cross_key_values.")):
            shape = [1 if isinstance(d, str) else d for d in part.inputs[name].shape]
            feeds[name] = np.concatenate([block[name] for block in blocks], 2) if blocks else np.zeros(shape)
        feeds["cross_attention_mask"] = visible[None] if blocks else np.zeros((1, total, 1), bool)
    for name, info in part.inputs.items():
        if name.startswith("past_key_values."):
            shape = [{"batch_size": 1, "capacity": total}.get(d, 1) if isinstance(d, str) else d for d in info.shape]
            # An empty cache of a large model takes a large part of a gigabyte: one zero says as much.
            feeds[name] = np.broadcast_to(np.zeros((), info.dtype), shape)
        else:
            feeds[name] = np.ascontiguousarray(feeds[name], info.dtype)
    return {name: feeds[name] for name in part.inputs}
