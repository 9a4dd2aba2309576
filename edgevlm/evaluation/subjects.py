"""Who is asked: a bundle through the runtime, or the PyTorch model of a checkpoint, behind one small interface.

    for subject in describe_subjects(["build/llava-int4", "demo/llava"]):
        model = open_subject(subject.source, settings)
        model.ask(item).text

Both get the same prompts and pixel values, which are the runtime's (`verify` proves them equal to the checkpoint's own
processor), and decode greedily up to the tokens that end an answer. The PyTorch model is the family's reference: float32, on
the CPU, with transformers' `generate`; it needs the extra `export`.
"""

from __future__ import annotations

import functools
import hashlib
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from ..bundle import MANIFEST, Bundle
from ..errors import InputError
from ..images import image_digest, load_image
from ..models import Family, family_for_config
from ..prompt import TextStream, normalize_request
from ..scenes import Scene, render_scene
from ..vlm import VLM, View
from .records import Answer, Item, Picture, Subject

if TYPE_CHECKING:
    from ..export.checkpoint import Checkpoint

__all__ = [
    "Model",
    "Settings",
    "describe_subjects",
    "digest_subject",
    "file_name",
    "is_bundle",
    "open_picture",
    "open_subject",
]

#: Tokens of an answer, where neither the settings nor a suite say.
LONGEST = 128


@dataclass(frozen=True)
class Settings:
    """How every question is answered. `max_new_tokens` None: as many as the suite has. `side`: pixels of the shorter side of a
    drawn scene; the rest as in `VLM.load` and `VLM.generate`. The PyTorch model has no backend."""

    max_new_tokens: int | None = None
    capacity: int | None = None
    backend: str | None = None
    threads: int | None = None
    visual_tokens: int | None = None
    side: int = 224


class Model(Protocol):
    """A loaded subject."""

    def ask(self, item: Item) -> Answer:
        """The answer to one question. Raises what the runtime raises for a request that cannot be served."""


def is_bundle(source: str) -> bool:
    """Whether it is a bundle; what is none is a model, as `export --model` takes it."""
    return (Path(source).expanduser() / MANIFEST).is_file()


# ------------------------------------------------------------------------------------------------ describing


def describe_subjects(sources: Sequence[str]) -> list[Subject]:
    """Looks at bundles and checkpoints, without loading any. Names are unique: as much of a path as tells them apart.

    Raises InputError where one is given twice, and what opening a bundle or a checkpoint raises.
    """
    if not sources:
        raise InputError("Nobody is there to be asked; give a bundle or a model.")
    described = [_describe_bundle(source) if is_bundle(source) else _describe_model(source) for source in sources]
    names = _tell_apart([where for where, _ in described], sources)
    return [make(name) for name, (_, make) in zip(names, described, strict=True)]


_Described = tuple[tuple[tuple[str, ...], int], Callable[[str], Subject]]


def _describe_bundle(source: str) -> _Described:
    folder = Path(source).expanduser()
    manifest = Bundle.open(folder, check_files=False).manifest
    size = sum(part.size for part in manifest.parts.values())
    recipe = str((manifest.recipe or {}).get("name", ""))
    return (folder.resolve().parts, 1), lambda name: Subject(name, source, "bundle", size, recipe)


def _describe_model(source: str) -> _Described:
    checkpoint, _ = _open_model(source)
    size = sum(path.stat().st_size for path in {entry.path for entry in checkpoint.weights.values()})
    local = Path(source).expanduser()
    named = (
        (local.resolve().parts, 1) if local.is_dir() else (tuple(checkpoint.name.split("/")), checkpoint.name.count("/") + 1)
    )
    return named, lambda name: Subject(name, source, "torch", size)


def _open_model(source: str) -> tuple[Checkpoint, Family]:
    from ..export.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source)
    return checkpoint, family_for_config(checkpoint.config)[1]


def _tell_apart(places: Sequence[tuple[tuple[str, ...], int]], sources: Sequence[str]) -> list[str]:
    """Names of the last parts of each place, at least as many as is said there, and more where files would have one name."""
    depths = [least for _, least in places]
    while True:
        names = ["/".join(parts[-depth:]).replace("//", "/") for (parts, _), depth in zip(places, depths, strict=True)]
        files = [file_name(name) for name in names]
        same = [i for i, file in enumerate(files) if files.count(file) > 1]
        if not same:
            return names
        longer = [i for i in same if depths[i] < len(places[i][0])]
        if not longer:
            twice = ", ".join(dict.fromkeys(sources[i] for i in same))
            raise InputError(f"{twice} would be asked twice; give every bundle and model once.")
        for i in longer:
            depths[i] += 1


def file_name(name: str) -> str:
    """A subject's or a suite's name as that of a file."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "unnamed"


def digest_subject(source: str) -> str:
    """Stands for all that answers depend on: a bundle's manifest, which has the hashes of its files; a checkpoint's files."""
    digest = hashlib.blake2b(digest_size=16)
    if is_bundle(source):
        digest.update((Path(source).expanduser() / MANIFEST).read_bytes())
        return digest.hexdigest()
    from ..export.export import companion_files

    checkpoint, family = _open_model(source)
    for name, content in sorted(companion_files(family, checkpoint.folder).items()):
        digest.update(name.encode() + (content.read_bytes() if isinstance(content, Path) else content.encode()))
    for path in sorted({entry.path for entry in checkpoint.weights.values()}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- asking


def open_subject(source: str, settings: Settings) -> Model:
    """Loads a bundle, or the PyTorch model of a checkpoint. Raises what `VLM.load` and `open_checkpoint` raise."""
    return _BundleModel(source, settings) if is_bundle(source) else _TorchModel(source, settings)


def open_picture(picture: Picture, side: int) -> Image.Image:
    """A file or scene as a picture. Raises ImageError."""
    if isinstance(picture, Scene):
        return _drawn(picture, side)
    return load_image(picture)


@functools.lru_cache(maxsize=8)
def _drawn(scene: Scene, side: int) -> Image.Image:
    return render_scene(scene, side)


class _BundleModel:
    def __init__(self, source: str, settings: Settings) -> None:
        self._settings = settings
        self._vlm = VLM.load(
            Path(source).expanduser(), capacity=settings.capacity, backend=settings.backend, threads=settings.threads,
            visual_tokens=settings.visual_tokens,
        )  # fmt: skip

    def ask(self, item: Item) -> Answer:
        pictures = [open_picture(picture, self._settings.side) for picture in item.pictures]
        began = time.perf_counter()
        reply = self._vlm.generate(item.prompt, images=pictures, max_new_tokens=self._settings.max_new_tokens or LONGEST)
        seconds, timings = time.perf_counter() - began, reply.timings
        return Answer(item.id, reply.text, timings.first_token, seconds, len(reply.tokens), timings.reused_images > 0)


class _TorchModel:
    def __init__(self, source: str, settings: Settings) -> None:
        import torch

        from ..export.export import companion_files, write_companions
        from ..export.weights import float_folder
        from ..reference import Reference

        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._settings = settings
        checkpoint, family = _open_model(source)
        with float_folder(checkpoint) as plain:
            self._reference = Reference(plain, family)
        manifest = family.describe(checkpoint.folder, self._reference.model.config, "float32")
        with tempfile.TemporaryDirectory() as folder:
            write_companions(companion_files(family, checkpoint.folder), Path(folder))
            unsealed = Bundle(Path(folder), manifest)
            self._reader = VLM.without_parts(unsealed, capacity=settings.capacity, visual_tokens=settings.visual_tokens)

    def ask(self, item: Item) -> Answer:
        from ..verify import pixel_values_of

        pictures = [open_picture(picture, self._settings.side) for picture in item.pictures]
        began, reader = time.perf_counter(), self._reader
        prompt, loaded = reader._read_request(normalize_request(item.prompt, pictures))
        views = [View(image_digest(p), prompt.instruction, pixel_values=reader._pixels(p)) for p in loaded]
        text, tokens, first_token = TextStream(reader._builder.tokenizer), 0, 0.0
        said: list[str] = []

        def chosen(token: int) -> bool:
            nonlocal tokens, first_token
            first_token = first_token or 1e3 * (time.perf_counter() - began)
            if token in reader._stop:
                return True
            said.append(text.push(token))
            tokens += 1
            return False

        most = min(self._settings.max_new_tokens or LONGEST, reader.capacity - len(prompt.ids))
        self._reference.answer(prompt, pixel_values_of(reader, views), most, chosen)
        said.append(text.finish())
        return Answer(item.id, "".join(said), first_token, time.perf_counter() - began, tokens)
