"""`edgevlm verify`: a bundle against the PyTorch model it came from.

1. Preprocessing: token ids and pixel values against the checkpoint's own processor.
2. Part by part: the same input through the ONNX part and through the torch module it was traced from.
3. End to end, over several pictures and prompts: greedy tokens, and the logits behind every token of PyTorch's own
   answer (teacher forcing), so that one early difference does not hide the rest. A ragged batch of two is one case.

A float bundle must agree within rounding. For a quantized one the same numbers are its drift from the float model; the
limits there only catch what is broken, not what is lossy: `reports/parity.json` holds the numbers to judge by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .bundle import Bundle, CrossAttention, Part
from .errors import CheckpointError, PromptError
from .export.checkpoint import open_checkpoint
from .export.weights import float_folder
from .generate import Decoder
from .models import Family, family_for_config
from .prompt import Prompt, Video, normalize_request
from .scenes import render_scene, sample_scene
from .vlm import VLM, Timings, View

if TYPE_CHECKING:
    from .reference import Reference

__all__ = ["LIMITS", "Limit", "PartCheck", "Report", "SequenceCheck", "pixel_values_of", "verify_bundle"]

TOKENS = 64


@dataclass(frozen=True)
class Limit:
    """What a check may differ by: logits by `max_abs`, a part's outputs by `part_abs`, both relative to the reference's largest
    value where it is above 1 (logits of a float32 bundle: absolute), and cosine."""

    max_abs: float | None
    part_abs: float | None
    cosine: float
    tokens_equal: bool = False


#: By what the weights are: `float32`, `float16`, `int8`, `int4`.
LIMITS = {
    "float32": Limit(1e-3, 1e-4, 0.99999, tokens_equal=True),
    "float16": Limit(5e-2, 5e-2, 0.999),
    "int8": Limit(None, None, 0.98),
    "int4": Limit(None, None, 0.85),
}


@dataclass
class PartCheck:
    """One part on one input. `peak` is the reference's largest absolute value."""

    part: str
    kind: str
    max_abs: float
    peak: float
    cosine: float
    passed: bool


@dataclass
class SequenceCheck:
    """One case end to end. `same_tokens` counts the greedy tokens before the first difference, of `tokens`.

    `top1` is the share of positions, teacher-forced, at which both would choose the same token.
    """

    case: str
    prompt_tokens: int
    max_abs: float
    cosine: float
    top1: float
    same_tokens: int
    tokens: int
    passed: bool


@dataclass
class Report:
    """All checks of a bundle. `preprocessing` says what differed there, `notes` what could not be compared."""

    bundle: str
    against: str
    kind: str
    limits: dict[str, Any]
    preprocessing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list[PartCheck] = field(default_factory=list)
    sequences: list[SequenceCheck] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """What missed its limit, by name."""
        return [
            *self.preprocessing,
            *(f"part {check.part}" for check in self.parts if not check.passed),
            *(f"case {check.case}" for check in self.sequences if not check.passed),
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": not self.failures, "failures": self.failures}


def _cases(fewest: int, most: int | None, *, films: bool) -> Iterator[tuple[str, list[Any]]]:
    """Name, and pictures (odd sizes among them) and texts in their order, with as many pictures as the family takes."""
    pictures = [render_scene(sample_scene(20_000_000 + i), 160) for i in range(3)]
    wide, tall, small = pictures[1].resize((211, 97)), pictures[2].resize((61, 130)), pictures[0].resize((9, 7))
    cases: list[tuple[str, list[Any]]] = [
        ("one picture", [pictures[0], "Describe the scene."]),
        ("wide picture", [wide, "How many objects are there?"]),
        ("two pictures", [pictures[0], tall, "What changed?"]),
        ("no picture", ["Is there a red cube?"]),
        ("tiny picture", [small, "What colour is it?"]),
        ("interleaved", ["First a text.", pictures[1], "This is a scene.", tall, wide, "And these?"]),
        ("short prompt", [pictures[1], "What?"]),
        *((f"long prompt, {n} times", [pictures[2], "Where is the large green ball? " * n]) for n in (12, 6, 2)),
    ]
    if films:
        cases.insert(-4, ("video", [Video([p.resize((90, 70)) for p in (*pictures, wide, tall)], 0.25), "What happens?"]))
        cases.insert(-4, ("video and picture", ["A film:", Video([tall, tall.rotate(180)], 1.0), "a picture:", wide, "Same?"]))
    for name, items in cases:
        if fewest <= sum(not isinstance(item, str) for item in items) <= (len(items) if most is None else most):
            yield name, items


def verify_bundle(folder: str | Path, against: str, *, stage: Callable[[str], None] = lambda _: None) -> Report:
    """Checks the bundle in `folder` against the checkpoint `against`, on the CPU, and writes `reports/parity.json`.

    Raises BundleError, CheckpointError where the two do not belong together, and what loading them raises.
    """
    bundle = Bundle.open(folder)
    checkpoint = open_checkpoint(against)
    name, family = family_for_config(checkpoint.config)
    if name != bundle.manifest.family:
        raise CheckpointError(
            f"The bundle is of the family {bundle.manifest.family}, {against} of {name}; they cannot be compared."
        )
    from .reference import Reference

    stage("loading the PyTorch model")
    with float_folder(checkpoint, stage) as plain:
        reference = Reference(plain, family)
    theirs, ours = family.describe(checkpoint.folder, reference.model.config, bundle.manifest.dtype), bundle.manifest
    theirs = replace(theirs, kv_cache=replace(theirs.kv_cache, dtype=ours.kv_cache.dtype))  # which a recipe may change
    if any(
        getattr(theirs, what) != getattr(ours, what)
        for what in ("vocab_size", "hidden_size", "kv_cache", "cross_attention", "image", "video", "patches")
    ):
        raise CheckpointError(
            f"{against} has other dimensions than the bundle {folder}; it is not the checkpoint it came from."
        )
    vlm = VLM.load(folder, backend="cpu", check_files=False)
    kinds = {part: _kind(record) for part, record in bundle.manifest.parts.items()}
    worst = max(kinds.values(), key=list(LIMITS).index)
    report = Report(str(folder), against, worst, {kind: asdict(LIMITS[kind]) for kind in dict.fromkeys(kinds.values())})

    if reference.no_processor:
        report.notes.append(f"preprocessing was not compared, transformers cannot load the processor: {reference.no_processor}")
    prompts: list[_Prompt] = []
    for case, items in _cases(*family.PICTURES, films=bundle.manifest.video is not None):
        if prompts and "long" in case and "long" in prompts[-1].case:
            continue
        stage(f"preprocessing: {case}")
        try:
            prompt = _prepare(vlm, reference, case, items, report)
            too_long = len(prompt.built.ids) + TOKENS > bundle.manifest.context_length
        except PromptError as exc:
            report.notes.append(f"{case!r} was left out: {exc}")
            continue
        if too_long:
            report.notes.append(f"{case!r} was left out: it and {TOKENS} tokens are longer than the model's context")
        else:
            prompts.append(prompt)
    if len(prompts) < 2:
        raise CheckpointError(
            f"{against} has a context too short for prompts and {TOKENS} tokens; there is nothing to compare."
        )
    for prompt in prompts:
        stage(f"end to end: {prompt.case}")
        _check_sequence(vlm, reference, prompt, LIMITS[worst], report)
    stage("end to end: ragged batch")
    _check_batch(vlm, prompts[1], prompts[3 if len(prompts) > 3 else 0], LIMITS[worst], report)
    stage("parts")
    _check_parts(vlm, family, reference, prompts, kinds, report)
    bundle.report("parity", report.to_dict())
    return report


def _kind(part: Part) -> str:
    """By the narrowest weights; whether integers have a sign is all one."""
    if any("MatMulBnb4" in what for what in part.onnxruntime_only):  # whose codes are called uint8
        return "int4"
    kinds = {name.removeprefix("u") for name in part.weights}
    return next(kind for kind in ("int4", "int8", "float16", "float32") if kind in kinds)


@dataclass
class _Prompt:
    case: str
    built: Prompt
    views: list[View]  # with the bundle's own pixel values
    pixel_values: np.ndarray  # of all pictures, as the model takes them; the reference's processor's where there is one
    answer: list[int] = field(default_factory=list)  # PyTorch's greedy tokens
    logits: np.ndarray = field(default_factory=lambda: np.empty(0))  # [tokens, vocabulary], before each of them


def _prepare(vlm: VLM, reference: Reference, case: str, items: list[Any], report: Report) -> _Prompt:
    pictures = [item for item in items if not isinstance(item, str)]
    as_list = vlm.bundle.manifest.cross_attention is not None and vlm.bundle.manifest.cross_attention.source == "images"
    plain = isinstance(items[-1], str) and items[:-1] == pictures and not as_list
    request = normalize_request(items[-1], pictures) if plain else normalize_request(items)
    built = vlm._family.build_prompt(vlm._builder, vlm.bundle.manifest, request)
    ours = [vlm._pixels(picture) for picture in pictures]
    views = [View(f"{case} {i}", built.instruction, pixel_values=pixels) for i, pixels in enumerate(ours)]
    made = _Prompt(case, built, views, pixel_values_of(vlm, views))
    if reference.no_processor:
        return made
    theirs = reference.process(request, built.text)
    for name, mine in (("input_ids", built.ids), ("sees", built.sees), ("instruction_ids", built.instruction)):
        if name in theirs and theirs[name].tolist() != list(mine or ()):
            report.preprocessing.append(f"{name} of {case!r}")
    if "pixel_values" in theirs:
        pixels = theirs["pixel_values"]
        if pixels.shape != made.pixel_values.shape or np.abs(pixels - made.pixel_values).max() > reference.pixel_tolerance:
            report.preprocessing.append(f"pixel values of {case!r}")
        made.pixel_values = pixels
    return made


def pixel_values_of(vlm: VLM, views: list[View]) -> np.ndarray:
    """Pixel values of all pictures of a prompt, as the model in PyTorch takes them."""
    return _as_taken([_vision_inputs(vlm, view)["pixel_values"] for view in views])


def _vision_inputs(vlm: VLM, view: View) -> dict[str, np.ndarray]:
    """What the vision encoder takes of one picture: its pixel values, and with some families more."""
    assert view.pixel_values is not None
    make = getattr(vlm._family, "vision_inputs", lambda _, pixel_values: {"pixel_values": pixel_values})
    return make(vlm.bundle.manifest, view.pixel_values)


def _as_taken(pictures: list[np.ndarray]) -> np.ndarray:
    """Pixel values of several pictures as one array: tiles `[tiles, 3, H, W]`, or patches `[patches, numbers of a patch]` where
    pictures differ in size."""
    if not pictures:
        return np.empty((0, 3, 1, 1), np.float32)
    shapes = {picture.shape[1:] for picture in pictures}
    alike = len(shapes) == 1 and pictures[0].shape[1] == 3
    return np.concatenate(pictures if alike else [picture.reshape(-1, picture.shape[-1]) for picture in pictures])


def _pictures_apart(vlm: VLM, prompt: _Prompt) -> Iterator[dict[str, np.ndarray]]:
    """What the vision encoder takes of each picture of a prompt, with the prompt's patches."""
    left = prompt.pixel_values
    for view in prompt.views:
        feeds = _vision_inputs(vlm, view)
        shape = feeds["pixel_values"].shape
        rows = int(np.prod(shape[:-1]))
        yield feeds | {"pixel_values": left[:rows].reshape(shape)}
        left = left[rows:]


def _compare(part: str, kind: str, ours: np.ndarray, theirs: np.ndarray, *, logits: bool = False) -> PartCheck:
    limit = LIMITS[kind]
    max_abs, peak, cosine = _distance(ours, theirs)
    scale = 1.0 if logits and kind == "float32" else max(1.0, peak)
    allowed = limit.max_abs if logits else limit.part_abs
    passed = cosine >= limit.cosine and (allowed is None or max_abs <= allowed * scale)
    return PartCheck(part, kind, max_abs, peak, cosine, bool(passed))


def _distance(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.abs(a - b).max()), float(np.abs(b).max()), float(a @ b / norm) if norm else float(np.array_equal(a, b))


def _check_parts(
    vlm: VLM, family: Family, reference: Reference, prompts: list[_Prompt], kinds: dict[str, str], report: Report
) -> None:
    """Each part gets what the reference's parts before it gave, so that a difference is the part's own."""
    prompt = prompts[-1]
    manifest, built, cross = vlm.bundle.manifest, prompt.built, vlm.bundle.manifest.cross_attention
    specs = {spec.name: spec for spec in family.part_specs(reference.model, "float32")}
    worst: dict[str, PartCheck] = {}

    def check(name: str, known: dict[str, np.ndarray]) -> None:
        feeds = {entry: known[entry] for entry in specs[name].inputs}
        theirs, ours = reference.run_part(specs[name], feeds), vlm._run(name, feeds)
        known |= theirs
        checks = [_compare(name, kinds[name], ours[output], array) for output, array in theirs.items()]
        worst[name] = max([*checks, *filter(None, [worst.get(name)])], key=lambda check: (not check.passed, check.max_abs))

    if manifest.patches is None:  # all of one size: a batch
        seen = [{"pixel_values": np.concatenate([each.pixel_values for each in prompts if len(each.pixel_values)])}]
    else:
        seen = [known for each in prompts for known in _pictures_apart(vlm, each)]
    for known in seen:
        known["instruction_ids"] = np.array([built.instruction] * len(known["pixel_values"]), np.int64)
        for name, spec in specs.items():
            if set(spec.inputs) <= set(known):
                check(name, known)

    ids = np.array([built.ids])
    within = not (cross and cross.source == "images")  # whether pictures take places in the prompt
    for start, length in built.places if within else ():
        ids[:, start : start + length] = 0  # the image token may lie outside of the table
    known = {"input_ids": ids, "attention_mask": np.ones(ids.shape, bool)}
    for name in [name for name in specs if name not in worst and name != "decoder"]:
        check(name, known)
        if name == "embed_tokens" and within:
            rows = known["inputs_embeds"] = known["inputs_embeds"].copy()
            features = np.concatenate([each["image_features"].reshape(-1, rows.shape[-1]) for each in seen])
            features = features[len(features) - sum(length for _, length in built.places) :]
            for start, length in built.places:
                rows[0, start : start + length], features = features[:length], features[length:]
    rows, visible, blocks = known["inputs_embeds"], None, []
    if cross and cross.source == "images":
        last = len(seen[0]["pixel_values"]) - len(prompt.views)  # this prompt's pictures among all
        tensors = {name: array[last:] for name, array in seen[0].items() if name.startswith("cross_key_values")}
        visible = np.array(built.sees)[:, None] == np.repeat(np.arange(len(prompt.views)), cross.places)
    elif cross:
        tensors = {name: array for name, array in known.items() if name.startswith("cross_key_values")}
        start_id = {"input_ids": np.array([[manifest.decoder_start_id]])}
        rows, visible = reference.run_part(specs["embed_tokens"], start_id)["inputs_embeds"], np.ones((1, ids.shape[1]), bool)
    if cross:
        count = len(next(iter(tensors.values())))
        blocks = [(n, lambda n=n: {name: array[n : n + 1] for name, array in tensors.items()}) for n in range(count)]
    decoder = _decoder(vlm, rows.shape[1])
    decoder.remember(blocks)
    sight = None if visible is None else visible[None]
    turns = None if built.positions is None else built.positions[:, None]
    ours = decoder.forward(rows, np.array([0]), np.array([rows.shape[1] - 1]), sight, turns)[0]
    worst["decoder"] = _compare("decoder", kinds["decoder"], ours, prompt.logits[0], logits=True)
    report.parts.extend(worst[name] for name in specs)


def _decoder(vlm: VLM, capacity: int, batch: int = 1) -> Decoder:
    manifest = vlm.bundle.manifest
    return Decoder(vlm._sessions["decoder"], manifest.kv_cache, capacity, batch, manifest.cross_attention)


def _check_sequence(vlm: VLM, reference: Reference, prompt: _Prompt, limit: Limit, report: Report) -> None:
    prompt.logits = reference.generate(prompt.built, prompt.pixel_values, TOKENS)
    prompt.answer = prompt.logits.argmax(-1).tolist()
    forced = _answer(vlm, prompt, prompt.answer)
    own = _answer(vlm, prompt, None).argmax(-1).tolist()
    report.sequences.append(_judge(prompt.case, len(prompt.built.ids), forced, own, prompt, limit))


def _judge(case: str, length: int, forced: np.ndarray, own: list[int], prompt: _Prompt, limit: Limit) -> SequenceCheck:
    max_abs, peak, cosine = _distance(forced, prompt.logits)
    same = next((i for i, (a, b) in enumerate(zip(own, prompt.answer, strict=True)) if a != b), len(own))
    within = limit.max_abs is None or max_abs <= limit.max_abs * (1.0 if limit.tokens_equal else max(1.0, peak))
    passed = cosine >= limit.cosine and within and (same == len(own) or not limit.tokens_equal)
    top1 = float((forced.argmax(-1) == prompt.logits.argmax(-1)).mean())
    return SequenceCheck(case, length, max_abs, cosine, top1, same, len(own), bool(passed))


def _answer(vlm: VLM, prompt: _Prompt, forced: list[int] | None) -> np.ndarray:
    """Logits before each token of a given answer, or of the greedy one, `[tokens, vocabulary]`, one step at a time as in
    real decoding."""
    feed = vlm._feed(prompt.built, prompt.views, Timings())
    length = len(feed.keys)
    decoder = _decoder(vlm, length + TOKENS)
    decoder.remember(feed.blocks)
    seen = None if feed.visible is None else feed.visible[None]
    turns = None if feed.turns is None else feed.turns[:, None]
    logits = [decoder.forward(feed.rows(0, length)[None], np.array([0]), np.array([length - 1]), seen, turns)[0]]
    seen = None if seen is None else seen[:, -1:]
    while len(logits) < TOKENS:
        number = len(logits) - 1
        token = int(logits[-1].argmax()) if forced is None else forced[number]
        turn = feed.turn(number)
        turns = None if turn is None else turn[:, None, None]
        logits.append(decoder.forward(vlm._embed([token])[None], np.array([length + number]), np.array([0]), seen, turns)[0])
    return np.stack(logits)


def _check_batch(vlm: VLM, first: _Prompt, second: _Prompt, limit: Limit, report: Report) -> None:
    """Two prompts of different lengths in one right-padded batch must answer as they do alone."""
    pair, cross = (first, second), vlm.bundle.manifest.cross_attention
    feeds = [vlm._feed(p.built, p.views, Timings()) for p in pair]
    rows, visible, blocks = [np.asarray(feed.rows(0, len(feed.keys))) for feed in feeds], [feed.visible for feed in feeds], []
    if cross and cross.source == "prompt":
        features: list[list[Any]] = [[vlm._see(view, Timings()) for view in p.views] for p in pair]
        texts = [np.asarray(vlm._rows(p.built, f, 0, len(p.built.ids))) for p, f in zip(pair, features, strict=True)]
        mask = _padded([np.ones(len(text), bool) for text in texts])
        read = vlm._run("cross_kv", vlm._run("text_encoder", {"inputs_embeds": _padded(texts), "attention_mask": mask}))
        visible, blocks = [mask[:1], mask[1:]], [("both", lambda: read)]
    elif cross:
        made: Any = [[make() for _, make in feed.blocks] for feed in feeds]
        if any(made):
            blocks = [("both", lambda: _stacked(made, cross))]
    lengths = np.array([len(r) for r in rows])
    decoder = _decoder(vlm, int(lengths.max()) + TOKENS, batch=2)
    decoder.remember(blocks)
    seen = _padded([v for v in visible if v is not None]) if cross else None
    if seen is not None:
        seen = np.pad(seen, ((0, 0), (0, int(lengths.max()) - seen.shape[1]), (0, 0)))
    turns = [feed.turns.T for feed in feeds if feed.turns is not None]
    turned = _padded(turns).transpose(2, 0, 1) if turns else None
    forced = [decoder.forward(_padded(rows), np.array([0, 0]), lengths - 1, seen, turned)]
    seen = None if seen is None else np.stack([seen[n, length - 1 : length] for n, length in enumerate(lengths)])
    for i in range(TOKENS - 1):
        tokens = np.array([[p.answer[i]] for p in pair])
        step = vlm._run("embed_tokens", {"input_ids": tokens})["inputs_embeds"]
        turned = np.stack([turn for feed in feeds if (turn := feed.turn(i)) is not None], 1)[..., None] if turns else None
        forced.append(decoder.forward(step, lengths + i, np.array([0, 0]), seen, turned))
    for number, prompt in enumerate(pair):
        logits = np.stack([step[number] for step in forced])
        # Teacher-forced: while every choice agrees, it is the greedy answer.
        own = logits.argmax(-1).tolist()
        report.sequences.append(_judge(f"batch of 2: {prompt.case}", len(prompt.built.ids), logits, own, prompt, limit))


def _padded(arrays: list[np.ndarray]) -> np.ndarray:
    """Arrays of different lengths as one, zeros behind the shorter ones, in every axis."""
    shape = np.max([array.shape for array in arrays], axis=0)
    out = np.zeros((len(arrays), *shape), arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[tuple(slice(0, size) for size in array.shape)] = array
    return out


def _stacked(made: list[list[Mapping[str, np.ndarray]]], cross: CrossAttention) -> dict[str, np.ndarray]:
    """The pictures of each prompt behind one another, the prompts as a batch."""
    empty = np.zeros((cross.heads, 0, cross.head_dim), np.float32)
    names = next(iter(next(filter(None, made))[0:1]))
    return {name: _padded([np.concatenate([empty, *(t[name][0] for t in blocks)], 1) for blocks in made]) for name in names}
