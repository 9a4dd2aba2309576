"""The runtime: a bundle is loaded, a picture and a question go in, an answer comes out. Free of torch.

    vlm = VLM.load("bundle", capacity=2048)
    reply = vlm.generate("How many cubes?", images=[image])
    for piece in vlm.stream("Describe the scene.", images=[image]): print(piece.text, end="")

It stitches the parts together; what is special about a family is in its file under `models/`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .boxes import Box, read_boxes
from .bundle import Bundle, Manifest
from .errors import CapacityError, DeviceError, ImageError, InputError, ManifestError, PromptError
from .generate import Decoder, PrefixCache, Sampling, choose_token
from .images import ImageProcessor, PixelRange, image_digest, load_image
from .models import Embedded, family_by_name, parts_needed
from .prompt import ChatTemplate, Prompt, PromptBuilder, Request, TextStream, Tokenizer, Video, normalize_request
from .runtimes import (
    Asked,
    Choice,
    Device,
    DeviceFrame,
    Model,
    PartSession,
    Rows,
    Tensor,
    ask,
    frame_of,
    open_part,
)

__all__ = ["VLM", "Piece", "Reply", "Seen", "Stream", "Timings"]

#: Pictures whose features are kept, newest first. One of LLaVA-1.5-7B takes 9 MB.
_KEPT_PICTURES = 8
_FRAMES = itertools.count()


@dataclass
class Timings:
    """What a call spent, in milliseconds, and what it did not have to do again."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    first_token: float = 0.0
    """From the call to the first token: preprocessing, vision, prefill."""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Prompt positions whose keys and values were still there from the last call."""
    reused_images: int = 0
    """Pictures whose features were still there."""
    decoded_tokens: int = 0
    """Tokens that `decode` covers: all but the first, which comes out of the prefill."""

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding; 0 where the answer had one token."""
        return 1e3 * self.decoded_tokens / self.decode if self.decode else 0.0


@dataclass(frozen=True)
class Piece:
    """A piece of an answer: the text that became certain, and the token that brought it (None: the rest at the end)."""

    text: str
    token: int | None


@dataclass(frozen=True)
class Seen:
    """What became of a picture, or of each frame of a film: its size in pixels, the size that the model was shown, and the
    places that it took in the prompt, all frames together. `limited`: it had more pixels than the model, or the budget of
    visual tokens, allows."""

    width: int
    height: int
    shown_width: int
    shown_height: int
    tokens: int
    frames: int = 1
    limited: bool = False


@dataclass(frozen=True)
class Reply:
    """An answer. `tokens` are the generated ids without the stop token, `pictures` what was seen of each picture.

    `finish_reason`: `stop` (the model ended it), `length` (`max_new_tokens`), `capacity` (the KV cache is full), `closed`
    (the stream was closed before its end), `error` (it raised one).
    """

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings
    pictures: tuple[Seen, ...] = ()

    @property
    def boxes(self) -> tuple[Box, ...]:
        """What the answer points at, in pixels of the pictures as they were given (Qwen-VL's `<box>` and `<quad>`).

        `text` keeps their marks: a later turn of the chat needs them.
        """
        return read_boxes(self.text, [(picture.width, picture.height) for picture in self.pictures])


class Stream(Iterator[Piece]):
    """The pieces of an answer as they are decoded; when it is through, `reply` holds the whole.

    The model serves one answer at a time, so a stream that is left halfway should be closed.
    """

    def __init__(self, pieces: Generator[Piece, None, None], result: dict[str, Any], timings: Timings) -> None:
        self._pieces, self._result, self._timings = pieces, result, timings

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the answer where it is; `reply` then has what there is, with `finish_reason` "closed"."""
        self._pieces.close()

    @property
    def reply(self) -> Reply:
        """The whole answer; reads the rest of the stream first."""
        for _ in self._pieces:
            pass
        return Reply(timings=self._timings, **self._result)


@dataclass
class _Features:
    """Picture features by content, the most recently used ones."""

    kept: OrderedDict[Hashable, Embedded] = field(default_factory=OrderedDict)

    def get(self, digest: Hashable) -> Embedded | None:
        if digest in self.kept:
            self.kept.move_to_end(digest)
        return self.kept.get(digest)

    def put(self, digest: Hashable, features: Embedded) -> None:
        self.kept[digest] = features
        while len(self.kept) > _KEPT_PICTURES:
            self.kept.popitem(last=False)


@dataclass
class View:
    """One picture of a request, and the instruction that it is looked at with, where the model does so."""

    digest: str
    instruction: tuple[int, ...]
    known: dict[Hashable, Embedded] = field(default_factory=dict)
    pixel_values: Any = None

    @property
    def key(self) -> Hashable:
        """Stands for what enters the decoder."""
        return (self.digest, self.instruction) if self.instruction else self.digest


@dataclass(frozen=True)
class _Feed:
    """A prompt as the decoder takes it. See `PrefixCache` for keys; `key` gives that of a token of the answer, by the token
    and its number.

    `blocks` and `visible` (bool `[positions, cross_length]`) are for cross-attention, `turns`, int64 `[3, positions]`, for
    rotary positions in three directions.
    """

    keys: Sequence[Hashable]
    rows: Callable[[int, int], Tensor]
    key: Callable[[int, int], Hashable]
    blocks: Sequence[tuple[Hashable, Callable[[], Mapping[str, Tensor]]]] = ()
    visible: np.ndarray | None = None
    turns: np.ndarray | None = None

    def turn(self, number: int) -> np.ndarray | None:
        """The rotary position `[3]` of token `number` of the answer: each goes on behind the prompt's last one, as `generate`
        of transformers has it (a film's time may be further)."""
        return None if self.turns is None else self.turns[:, -1] + 1 + number


class VLM:
    """A loaded vision-language model. Calls may come from several threads; they are served one after the other."""

    def __init__(
        self,
        bundle: Bundle,
        sessions: Mapping[str, PartSession],
        backends: Mapping[str, Choice],
        capacity: int,
        processors: tuple[ImageProcessor, ImageProcessor | None],
        visual_tokens: int | None = None,
        model: Model | None = None,
    ) -> None:
        """Use `VLM.load`."""
        self.bundle, self.backends, self.capacity, self.visual_tokens = bundle, dict(backends), capacity, visual_tokens
        manifest = bundle.manifest
        self._sessions, self._model = sessions, model or Model()
        self._failed: DeviceError | None = None
        # What nobody closes is closed when nobody has it any more.
        weakref.finalize(self, self._model.close)
        self._closed = False
        self._family = family_by_name(manifest.family)
        self._processor, self._film_processor = processors
        tokenizer = Tokenizer.from_folder(bundle.folder)
        template = ChatTemplate.from_folder(bundle.folder, tokenizer.names)
        image = manifest.image
        instruction = Tokenizer.from_folder(bundle.folder / "qformer_tokenizer") if manifest.instruction_length else None
        self._builder = PromptBuilder(
            tokenizer, template, image.token, image.token_id, self._grid, instruction, (image.before, image.after),
            (manifest.video.token, manifest.video.token_id) if manifest.video else None,
        )  # fmt: skip
        self._stop = _stop_ids(bundle.folder, tokenizer)
        if sessions:
            decoder = Decoder(sessions["decoder"], manifest.kv_cache, capacity, cross=manifest.cross_attention)
            self._cache = PrefixCache(decoder)
        self._any_size = manifest.patches is not None or self._processor.tiles is not None
        self._reads_prompt = manifest.decoder_start_id is not None  # in an encoder, and the decoder has the answer alone
        self._features = _Features()
        self._lock = threading.Lock()
        self._serving: int | None = None

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        *,
        capacity: int | None = None,
        backend: Asked = None,
        threads: int | None = None,
        max_tiles: int | None = None,
        visual_tokens: int | None = None,
        check_files: bool = True,
        opener: Callable[..., tuple[PartSession, Choice]] = open_part,
    ) -> VLM:
        """Loads a bundle.

        `capacity` is the longest sequence in tokens, prompt and answer together; as a default the model's context
        length, at most 4,096. Memory for it is taken as it is needed. `backend` asks for `tensorrt`, `cuda` or
        `cpu` for every part, or for some (`{"decoder": "tensorrt"}`); others, and all with `auto`, get the best that works.
        `backends` tells which, and why not a better one. `threads`
        limits the cores of each part. `visual_tokens` is the most places that a picture (or a film) may take in the prompt,
        `max_tiles` the most tiles that it is cut into: fewer see less detail, sooner. `check_files` compares every file
        with its hash, large ones while parts are opened (about half a second a gigabyte). `opener` stands in for what opens
        the parts (calibration records there).

        Raises BundleError and its kinds, InputError, DeviceError, MissingDependencyError.
        """
        opened = Bundle.open(bundle, check_files=False)
        manifest = opened.manifest
        capacity = _check_capacity(capacity, manifest)
        if threads is not None and threads < 1:
            raise InputError(f"threads is {threads}; it is 1 or more.")
        sessions: dict[str, PartSession] = {}
        backends: dict[str, Choice] = {}
        model: Model | None = None
        try:
            with opened.comparing_hashes() if check_files else contextlib.nullcontext():
                missing = [p for p in parts_needed(family_by_name(manifest.family), manifest) if p not in manifest.parts]
                if missing:
                    raise ManifestError(
                        f"{opened.folder} is a {manifest.family} bundle without the part {', '.join(missing)}. "
                        "Export the checkpoint again."
                    )
                processors = _open_processors(opened, max_tiles, visual_tokens)
                asked = ask(backend, list(manifest.parts))
                most = processors[0].most_places(manifest.image.places)
                model = Model(opened, capacity, min(most, capacity) if most else None, threads, check_files)
                for name, part in manifest.parts.items():
                    path = opened.part_path(name)
                    sessions[name], backends[name] = opener(path, name, part, backend=asked[name], model=model)
                made = cls(opened, sessions, backends, capacity, processors, visual_tokens, model)
            return made
        except BaseException:
            _close(sessions, model)
            raise

    @classmethod
    def without_parts(cls, bundle: Bundle, *, capacity: int | None = None, visual_tokens: int | None = None) -> VLM:
        """What reads requests, and no more: the parts, which answer, are somebody else's. See `load`."""
        processors = _open_processors(bundle, None, visual_tokens)
        return cls(bundle, {}, {}, _check_capacity(capacity, bundle.manifest), processors, visual_tokens)

    def close(self) -> None:
        """Gives back the memory of all parts, also on the GPU. Waits for an answer under way; twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._features = _Features()
                self._cache = None  # type: ignore[assignment]
                _close(self._sessions, self._model)
                self._sessions = {}

    def __enter__(self) -> VLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompt: str | Sequence[object] | None = None,
        *,
        images: Sequence[object] | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        ignore_stop: bool = False,
    ) -> Reply:
        """Answers.

        A string `prompt` with `images`, a list of pictures and strings in their order, or chat `messages`. A picture is
        a PIL image, a uint8 array `[H, W, 3]` (also by DLPack, or on the GPU that the model is on: docs/gpu.md), a
        `pathlib.Path` (in `images` a string, too) or the bytes of a file; for models
        that take films, a `Video` stands wherever a picture may. Greedy unless `temperature` is above 0. `ignore_stop` goes
        on where the model would end (to measure).

        Raises ImageError, PromptError, CapacityError or InputError before any work is done.
        """
        return self.stream(
            prompt, images=images, messages=messages, max_new_tokens=max_new_tokens,
            temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, ignore_stop=ignore_stop,
        ).reply  # fmt: skip

    def stream(
        self,
        prompt: str | Sequence[object] | None = None,
        *,
        images: Sequence[object] | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        ignore_stop: bool = False,
    ) -> Stream:
        """As `generate`, piece by piece. The request is checked here; the work begins with the first piece."""
        called = time.perf_counter()
        sampling = Sampling(temperature, top_p, top_k, seed, max_new_tokens, ignore_stop)
        built, pictures = self._read_request(normalize_request(prompt, images, messages))
        timings = Timings(prompt_tokens=len(built.ids))
        seen = tuple(self._seen(picture) for picture in pictures)
        result: dict[str, Any] = {"text": "", "tokens": [], "finish_reason": "closed", "pictures": seen}
        views = []
        for picture in pictures:
            view = View(picture_digest(picture), built.instruction)
            # What is known now is held on to: other answers may push it out of the cache before this one has its turn.
            view.known = {key: kept for key in (view.digest, view.key) if (kept := self._features.kept.get(key)) is not None}
            view.pixel_values = None if view.known else self._pixels(picture)
            views.append(view)

        def pieces() -> Generator[Piece, None, None]:
            with self._turn():
                try:
                    for piece in self._decode(built, views, sampling, timings, result, called):
                        yield piece
                        self._serving = threading.get_ident()  # a stream may be handed to another thread
                except Exception as exc:
                    result["finish_reason"] = "error"
                    if isinstance(exc, DeviceError):
                        self._give_way(exc)
                    raise

        return Stream(pieces(), result, timings)

    def count_tokens(
        self,
        prompt: str | Sequence[object] | None = None,
        *,
        images: Sequence[object] | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
    ) -> int:
        """How long a request's prompt is, pictures included. Takes and raises what `generate` does."""
        return len(self._read_request(normalize_request(prompt, images, messages))[0].ids)

    # ------------------------------------------------------------------------------------------- inside

    def _read_request(self, request: Request) -> tuple[Prompt, list[Any]]:
        """The prompt, and the pictures as PIL has them."""
        pictures = [self._load(source) for source in request.images]
        built = self._family.build_prompt(self._builder, self.bundle.manifest, request.with_images(pictures))
        if len(built.ids) + 1 > self.capacity:
            visual = sum(length for _, length in built.places)
            smaller = f" Pictures take {visual} of them; visual_tokens bounds what one may take." if self._any_size else ""
            most = self.bundle.manifest.context_length
            larger = f", or load with a larger capacity (this model: up to {most})" if most > self.capacity else ""
            raise CapacityError(
                f"The prompt has {len(built.ids)} tokens ({len(pictures)} pictures included) and the answer needs one; "
                f"the model was loaded with a capacity of {self.capacity}. Shorten the prompt{larger}.{smaller}"
            )
        return built, pictures

    def _load(self, source: Any) -> Any:
        """A PIL picture, a `Video` of PIL pictures, or a frame on the GPU that is preprocessed already."""
        if not isinstance(source, Video):
            return self._load_picture(source)
        if self._film_processor is None:
            raise PromptError(
                f"a video was given, but a {self.bundle.manifest.family} model takes pictures only; give some of its frames "
                "as pictures"
            )
        frames = [self._load_picture(frame) for frame in source.frames]
        if any(isinstance(frame, DeviceFrame) for frame in frames):
            raise ImageError("the frames of a video are uint8 pictures; preprocessed ones on a GPU are taken by themselves")
        sizes = list(dict.fromkeys(frame.size for frame in frames))
        if len(sizes) > 1:
            shown = ", ".join(f"{w} x {h}" for w, h in sizes[:4])
            raise ImageError(f"the frames of the video have different sizes (width x height): {shown}; bring them to one size")
        return Video(frames, source.fps)

    def _load_picture(self, source: Any) -> Any:
        device = self._device
        found = frame_of(source, int(device.stream) if device else 0)
        if not isinstance(found, DeviceFrame):
            return load_image(found)
        if device is None:
            raise ImageError(
                "the frame lies on a GPU, and no part of this model does; give it as an array, or load with a GPU backend"
            )
        if not found.ready:
            with self._lock:  # what is resized is resized on the host
                return load_image(found.on(device).numpy())
        size = self.bundle.manifest.parts["vision_encoder"].inputs["pixel_values"].shape[-2:]
        if self._any_size or found.shape[1:] != size:
            wanted = "uint8 [height, width, 3]" if self._any_size else f"[3, {size[0]}, {size[1]}], or uint8 [height, width, 3]"
            raise ImageError(f"the frame on the GPU is {found.dtype} {list(found.shape)}; this model takes {wanted}")
        return found

    @property
    def _device(self) -> Device | None:
        """The GPU that parts of this model are on."""
        return next(iter(self._model.devices.values()), None)

    def _processor_for(self, picture: Any) -> tuple[ImageProcessor, Any, int]:
        """What preprocesses a picture, a picture (or frame) of its size, and how many layers of patches there are."""
        if not isinstance(picture, Video):
            return self._processor, picture, 1
        patches, count = self.bundle.manifest.patches, len(picture.frames)
        assert patches is not None
        assert self._film_processor is not None
        layers = -(-count // patches.temporal)
        processor = self._film_processor.for_frames(count)
        if self.visual_tokens is not None:
            if self.visual_tokens < layers:
                raise InputError(
                    f"visual_tokens is {self.visual_tokens}; the least that this model can see of {count} frames takes "
                    f"{layers}. Give fewer frames, or more tokens."
                )
            processor = processor.limit(places=0, visual_tokens=self.visual_tokens // layers)
        return processor, picture.frames[0], layers

    def _grid(self, picture: Any) -> tuple[int, int, int]:
        """Layers or tiles, rows and columns of the places that a picture takes."""
        image, patches = self.bundle.manifest.image, self.bundle.manifest.patches
        processor, frame, layers = self._processor_for(picture)
        if patches is None:
            return processor.count_tiles(frame.height, frame.width), 1, image.places
        height, width = processor.output_size(frame.height, frame.width)
        side = patches.size * patches.merge
        return layers, height // side, width // side

    def _pixels(self, picture: Any) -> Any:
        """float `[tiles or frames, 3, H, W]`."""
        processor, _, _ = self._processor_for(picture)
        if isinstance(picture, DeviceFrame):
            assert self._device is not None
            return picture.on(self._device)[None]
        if isinstance(picture, Video):
            return np.stack([processor(frame) for frame in picture.frames])  # type: ignore[arg-type]
        return processor.cut(picture)

    def _seen(self, picture: Any) -> Seen:
        processor, frame, _ = self._processor_for(picture)
        height, width = processor.output_size(frame.height, frame.width)
        rows, columns = processor.tile_grid(frame.height, frame.width)
        limit = processor.resize.most if isinstance(processor.resize, PixelRange) else None
        return Seen(
            frame.width, frame.height, width * columns, height * rows, math.prod(self._grid(picture)),
            len(picture.frames) if isinstance(picture, Video) else 1,
            limit is not None and frame.width * frame.height > limit,
        )  # fmt: skip

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One answer at a time: other threads wait, the thread that is in the middle of one would wait for itself."""
        if self._serving == threading.get_ident():
            raise InputError(
                "An answer of this model is still being streamed in this thread. Read it to its end, or close() it, first."
            )
        with self._lock:
            if self._closed:
                raise InputError("This model is closed; load it again.")
            if self._failed is not None:
                raise self._failed
            self._serving = threading.get_ident()
            try:
                yield
            finally:
                self._serving = None

    def _give_way(self, failure: DeviceError) -> None:
        """A GPU that is lost ends all; one whose memory is full gets back what can be made again."""
        if failure.lost:
            self._failed = failure
        self._features = _Features()
        self._cache.keys.clear()

    def _run(self, part: str, feeds: Mapping[str, Tensor]) -> Mapping[str, Any]:
        return self._sessions[part].run(feeds)

    def _see(self, view: View, timings: Timings) -> Embedded:
        """What enters the decoder of a picture, from the cache or through the parts."""
        began = time.perf_counter()
        manifest, found = self.bundle.manifest, self._recall(view, view.key)
        if found is not None:
            timings.reused_images += 1
            return found
        if not view.instruction:
            found = self._encode(view)
        else:
            encoded = self._recall(view, view.digest)
            timings.reused_images += encoded is not None
            encoded = self._encode(view) if encoded is None else encoded
            found = self._family.embed_image(self._run, manifest, encoded, view.instruction)
            self._features.put(view.key, found)
        timings.vision += 1e3 * (time.perf_counter() - began)
        return found

    def _recall(self, view: View, key: Hashable) -> Embedded | None:
        features = self._features.get(key)
        if features is None and key in view.known:
            features = view.known[key]
            self._features.put(key, features)
        return features

    def _encode(self, view: View) -> Embedded:
        assert view.pixel_values is not None
        encoded = self._family.encode_image(self._run, self.bundle.manifest, view.pixel_values)
        self._features.put(view.digest, encoded)
        return encoded

    def _embed(self, ids: Sequence[int]) -> Any:
        return self._run("embed_tokens", {"input_ids": np.array([ids], np.int64)})["inputs_embeds"][0]

    def _rows(self, prompt: Prompt, features: Sequence[Any], first: int, end: int) -> Rows:
        """Embeddings `[end - first, hidden]` of a part of the prompt, pictures in their places."""
        ids = prompt.ids[first:end]
        spans: list[tuple[int, int, Any]] = []
        for (start, length), feature in zip(prompt.places, features, strict=True):
            a, b = max(first, start), min(end, start + length)
            if a < b:
                spans.append((a - first, b - first, feature[a - start : b - start]))
                ids[a - first : b - first] = [0] * (b - a)  # the image token may lie outside of the embedding table
        words, blocks, at = self._embed(ids), [], 0
        for a, b, feature in spans:
            blocks += [words[at:a]] * (at < a) + [feature]
            at = b
        return Rows([*blocks, *[words[at:]] * (at < len(ids))])

    def _read(self, rows: Rows) -> Mapping[str, np.ndarray]:
        """A whole prompt `[S, hidden]` through the text encoder, as keys and values for the decoder."""
        feeds: dict[str, Tensor] = {"inputs_embeds": rows[None], "attention_mask": np.ones((1, len(rows)), bool)}
        return self._run("cross_kv", self._run("text_encoder", feeds))

    def _feed(self, prompt: Prompt, views: list[View], timings: Timings) -> _Feed:
        """What the decoder gets for a prompt: pictures within it, beside it, or all of it behind an encoder."""
        cross = self.bundle.manifest.cross_attention
        if cross and cross.source == "images":
            assert prompt.sees is not None
            seen = [views[number].key if number >= 0 else None for number in prompt.sees]
            column = np.repeat(np.arange(len(views)), cross.places)
            return _Feed(
                list(zip(prompt.ids, seen, strict=True)),
                lambda first, end: self._embed(prompt.ids[first:end]),
                lambda token, _: (token, seen[-1]),
                [(view.key, functools.partial(self._see, view, timings)) for view in views],  # type: ignore[misc]
                np.array(prompt.sees)[:, None] == column,
            )
        features = [self._see(view, timings) for view in views]
        keys: list[Hashable] = list(prompt.ids)
        for (start, length), view in zip(prompt.places, views, strict=True):
            keys[start : start + length] = [(view.key, i) for i in range(length)]

        def rows(first: int, end: int) -> Rows:
            return self._rows(prompt, features, first, end)

        if prompt.positions is not None:
            # Equal tokens behind equal ones may still be turned differently, as behind the same film at another speed.
            keys = list(zip(keys, *prompt.positions.tolist(), strict=True))
            last = prompt.positions[:, -1].tolist()
            return _Feed(keys, rows, lambda token, n: (token, *(p + 1 + n for p in last)), turns=prompt.positions)
        if not cross:
            return _Feed(keys, rows, lambda token, _: token)
        start_id = self.bundle.manifest.decoder_start_id
        assert start_id is not None
        whole = tuple(keys)
        read = (whole, lambda: self._read(rows(0, len(keys))))
        return _Feed(
            [(whole, start_id)], lambda *_: self._embed([start_id]), lambda token, _: (whole, token), [read],
            np.ones((1, len(keys)), bool),
        )  # fmt: skip

    def _decode(
        self, prompt: Prompt, views: list[View], sampling: Sampling, timings: Timings, result: dict[str, Any], called: float
    ) -> Iterator[Piece]:
        feed = self._feed(prompt, views, timings)
        began, seen = time.perf_counter(), timings.vision
        read = self._cache.decoder.remember(feed.blocks)
        if feed.visible is not None and not self._reads_prompt:
            timings.reused_images += len(feed.blocks) - read  # whose keys and values were still there
        logits, timings.reused_tokens = self._cache.prefill(feed.keys, feed.rows, feed.visible, feed.turns)
        if self._reads_prompt:
            timings.reused_tokens = 0 if read else len(prompt.ids)
        visible = None if feed.visible is None else feed.visible[-1]
        rng, text = sampling.generator(), TextStream(self._builder.tokenizer)
        token = choose_token(logits, sampling, rng)
        first_at = time.perf_counter()
        timings.prefill = 1e3 * (first_at - began) - (timings.vision - seen)
        timings.first_token = 1e3 * (first_at - called)
        tokens: list[int] = result["tokens"]
        while True:
            if token in self._stop and not sampling.ignore_stop:
                result["finish_reason"] = "stop"
                break
            tokens.append(token)
            piece = text.push(token)
            result["text"] += piece
            yield Piece(piece, token)
            if len(tokens) == sampling.max_new_tokens:
                result["finish_reason"] = "length"
                break
            if len(prompt.ids) + len(tokens) == self.capacity:
                result["finish_reason"] = "capacity"
                break
            step = time.perf_counter()
            number = len(tokens) - 1
            logits = self._cache.extend(feed.key(token, number), self._embed([token])[0], visible, feed.turn(number))
            token = choose_token(logits, sampling, rng)
            timings.decode += 1e3 * (time.perf_counter() - step)
            timings.decoded_tokens += 1
        rest = text.finish()
        result["text"] += rest
        if rest:
            yield Piece(rest, None)


def _close(sessions: Mapping[str, PartSession], model: Model | None) -> None:
    for session in sessions.values():
        session.close()
    if model is not None:
        model.close()


def picture_digest(picture: Any) -> str:
    """Stands for the pixels of a picture, or of all frames of a film. Nobody looks at a frame on a GPU: it is like no other."""
    if isinstance(picture, DeviceFrame):
        return f"frame {next(_FRAMES)}"
    if not isinstance(picture, Video):
        return image_digest(picture)
    return "video " + hashlib.blake2b("".join(map(picture_digest, picture.frames)).encode(), digest_size=32).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ManifestError(f"{path} is not JSON: {exc}. Export the checkpoint again.") from exc
    return content if isinstance(content, dict) else {}


def _preprocessor_config(folder: Path) -> dict[str, Any]:
    """`preprocessor_config.json`, or what newer checkpoints keep inside `processor_config.json`."""
    return _read_json(folder / "preprocessor_config.json") or _read_json(folder / "processor_config.json").get(
        "image_processor", {}
    )


def _film_config(folder: Path) -> dict[str, Any]:
    """That of the video processor, or, in checkpoints without one, the image processor's with its defaults."""
    found = _read_json(folder / "video_preprocessor_config.json") or _read_json(folder / "processor_config.json").get(
        "video_processor", {}
    )
    found = found or {k: v for k, v in _preprocessor_config(folder).items() if k != "image_processor_type"}
    return {**found, "image_processor_type": found.get("video_processor_type", "Qwen2VLVideoProcessor")}


def _check_capacity(capacity: int | None, manifest: Manifest) -> int:
    """What was asked for, or the default. Raises InputError."""
    if capacity is None:
        capacity = min(manifest.context_length, 4096)
    if not isinstance(capacity, int) or not 2 <= capacity <= manifest.context_length:
        raise InputError(
            f"The capacity asked for is {capacity!r}; it is 2 to {manifest.context_length}, this model's context length."
        )
    return capacity


def _open_processors(
    bundle: Bundle, max_tiles: int | None, visual_tokens: int | None
) -> tuple[ImageProcessor, ImageProcessor | None]:
    """Those of pictures and of films."""
    manifest = bundle.manifest
    processor = ImageProcessor.from_config({**_preprocessor_config(bundle.folder), **manifest.image_options})
    processor = processor.limit(places=manifest.image.places, max_tiles=max_tiles, visual_tokens=visual_tokens)
    _check_places(bundle, processor)
    film = ImageProcessor.from_config(_film_config(bundle.folder)) if manifest.video else None
    _check_places(bundle, film)
    return processor, film


def _check_places(bundle: Bundle, processor: ImageProcessor | None) -> None:
    """Raises ManifestError where the processor does not resize to whole places of the model's size."""
    patches = bundle.manifest.patches
    resize = processor.resize if processor else None
    if patches and processor and not (isinstance(resize, PixelRange) and resize.factor == patches.size * patches.merge):
        found = f"multiples of {resize.factor} pixels" if isinstance(resize, PixelRange) else "another kind of size"
        raise ManifestError(
            f"The image processor of {bundle.folder} resizes to {found}; a place of this model is {patches.size} x "
            f"{patches.merge} pixels wide (patch_size x merge_size). Save the processor that belongs to the checkpoint into "
            "its folder, and export it again."
        )


def _stop_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer: what `generate` in transformers stops at."""
    config = _read_json(folder / "config.json")
    for source in (_read_json(folder / "generation_config.json"), config, config.get("text_config", {})):
        stop = source.get("eos_token_id")
        if stop is not None:
            return frozenset(stop if isinstance(stop, list) else [stop])
    name = tokenizer.names.get("eos_token")
    found = tokenizer.backend.token_to_id(name) if name else None
    return frozenset([] if found is None else [found])
