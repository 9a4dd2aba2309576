"""`edgevlm verify`: a bundle against the PyTorch model it came from.

1. Preprocessing: token ids and pixel values against the checkpoint's own processor.
2. Part by part: the same input through the ONNX part and through the torch module it was traced from.
3. End to end, over several pictures and prompts: greedy tokens, and the logits behind every token of PyTorch's own
   answer (teacher forcing), so that one early difference does not hide the rest. A ragged batch of two is one case.

A float bundle must agree within rounding. For a quantized one the same numbers are its drift from the float model; the
limits there only catch what is broken, not what is lossy: `reports/parity.json` holds the numbers to judge by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import Bundle
from .errors import CheckpointError
from .export.checkpoint import open_checkpoint
from .generate import Decoder
from .models import family_for_config
from .prompt import Prompt, normalize_request
from .scenes import render_scene, sample_scene
from .vlm import VLM

__all__ = ["LIMITS", "Limit", "PartCheck", "Report", "SequenceCheck", "verify_bundle"]

TOKENS = 64


@dataclass(frozen=True)
class Limit:
    """What a check may differ by: `max_abs` relative to the reference's largest value (logits: absolute), and cosine."""

    max_abs: float | None
    cosine: float
    tokens_equal: bool = False


#: By what the weights are: `float32`, `float16`, `int8`, `int4`.
LIMITS = {
    "float32": Limit(1e-3, 0.99999, tokens_equal=True),
    "float16": Limit(5e-2, 0.999),
    "int8": Limit(None, 0.98),
    "int4": Limit(None, 0.85),
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


def _cases() -> Iterator[tuple[str, list[Any], str]]:
    """Name, pictures (odd sizes among them) and question."""
    pictures = [render_scene(sample_scene(20_000_000 + i), 160) for i in range(3)]
    yield "one picture", [pictures[0]], "Describe the scene."
    yield "wide picture", [pictures[1].resize((211, 97))], "How many objects are there?"
    yield "two pictures", [pictures[0], pictures[2].resize((61, 130))], "What changed?"
    yield "no picture", [], "Is there a red cube?"
    yield "long prompt", [pictures[2]], "Where is the large green ball? " * 12


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
    import torch

    from .reference import Reference

    stage("loading the PyTorch model")
    reference = Reference(checkpoint.folder)
    theirs, ours = family.describe(checkpoint.folder, reference.model.config, bundle.manifest.dtype), bundle.manifest
    if any(getattr(theirs, what) != getattr(ours, what) for what in ("vocab_size", "hidden_size", "kv_cache", "image")):
        raise CheckpointError(
            f"{against} has other dimensions than the bundle {folder}; it is not the checkpoint it came from."
        )
    vlm = VLM.load(folder, backend="cpu", check_files=False)
    kinds = {part: _kind(record.weights) for part, record in bundle.manifest.parts.items()}
    worst = max(kinds.values(), key=list(LIMITS).index)
    report = Report(str(folder), against, worst, {kind: asdict(LIMITS[kind]) for kind in dict.fromkeys(kinds.values())})

    if reference.no_processor:
        report.notes.append(f"preprocessing was not compared, transformers cannot load the processor: {reference.no_processor}")
    with torch.no_grad():
        prompts: list[_Prompt] = []
        for case, pictures, question in _cases():
            stage(f"preprocessing: {case}")
            prompt, differences = _prepare(vlm, reference, case, pictures, question)
            prompts.append(prompt)
            report.preprocessing += differences
        stage("parts")
        _check_parts(vlm, family, reference, prompts, kinds, report)
        for prompt in prompts:
            stage(f"end to end: {prompt.case}")
            _check_sequence(vlm, reference, prompt, LIMITS[worst], report)
        stage("end to end: ragged batch")
        _check_batch(vlm, prompts[1], prompts[3], LIMITS[worst], report)
    bundle.report("parity", report.to_dict())
    return report


def _kind(weights: dict[str, int]) -> str:
    return next(kind for kind in ("int4", "int8", "float16", "float32") if kind in weights)


@dataclass
class _Prompt:
    case: str
    ids: list[int]
    places: tuple[tuple[int, int], ...]
    pixel_values: np.ndarray  # [pictures, 3, H, W], of the reference's processor
    embeds: np.ndarray  # [S, hidden], of the bundle
    answer: list[int] = field(default_factory=list)  # PyTorch's greedy tokens
    logits: np.ndarray = field(default_factory=lambda: np.empty(0))  # [tokens, vocabulary], before each of them


def _prepare(vlm: VLM, reference: Any, case: str, pictures: list[Any], question: str) -> tuple[_Prompt, list[str]]:
    request = normalize_request(question, pictures)
    built = vlm._builder.build(request)
    ours = np.stack([vlm._processor(p) for p in pictures]) if pictures else np.empty((0, 3, 1, 1), np.float32)
    differences: list[str] = []
    if reference.no_processor:
        return _Prompt(case, built.ids, built.places, ours, _embeds(vlm, built, ours)), differences
    ids, theirs = reference.process(built.text, pictures)
    if ids != built.ids:
        differences.append(f"token ids of {case!r}")
    if pictures and (theirs.shape != ours.shape or float(np.abs(theirs - ours).max()) > reference.pixel_tolerance):
        differences.append(f"pixel values of {case!r}")
    return _Prompt(case, built.ids, built.places, theirs, _embeds(vlm, built, ours)), differences


def _embeds(vlm: VLM, prompt: Prompt, pixel_values: np.ndarray) -> np.ndarray:
    features = [vlm._family.embed_image(vlm._run, picture) for picture in pixel_values]
    return vlm._rows(prompt, features, 0, len(prompt.ids))


def _compare(part: str, kind: str, ours: np.ndarray, theirs: np.ndarray, *, logits: bool = False) -> PartCheck:
    limit = LIMITS[kind]
    max_abs, peak, cosine = _distance(ours, theirs)
    scale = 1.0 if logits and kind == "float32" else max(1.0, peak)
    passed = cosine >= limit.cosine and (limit.max_abs is None or max_abs <= limit.max_abs * scale)
    return PartCheck(part, kind, max_abs, peak, cosine, bool(passed))


def _distance(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.abs(a - b).max()), float(np.abs(b).max()), float(a @ b / norm) if norm else float(np.array_equal(a, b))


def _check_parts(vlm: VLM, family: Any, reference: Any, prompts: list[_Prompt], kinds: dict[str, str], report: Report) -> None:
    """Each part gets what the reference's parts before it gave, so that a difference is the part's own."""
    known = {
        "pixel_values": np.concatenate([p.pixel_values for p in prompts if len(p.pixel_values)]),
        "input_ids": np.array([prompts[-1].ids]),
    }
    for spec in family.part_specs(reference.model, "float32"):
        if spec.name == "decoder":
            continue
        feeds = {name: known[name] for name in spec.inputs}
        theirs = reference.run_module(spec.module, feeds)
        known[next(iter(spec.outputs))] = theirs
        ours = vlm._run(spec.name, feeds)[next(iter(spec.outputs))]
        report.parts.append(_compare(spec.name, kinds[spec.name], ours, theirs))
    rows = known["inputs_embeds"][0].copy()
    for (start, length), feature in zip(prompts[-1].places, known["image_features"][-len(prompts[-1].places) :], strict=True):
        rows[start : start + length] = feature
    ours = Decoder(vlm._sessions["decoder"], vlm.bundle.manifest.kv_cache, len(rows)).forward(
        rows[None], np.array([0]), np.array([len(rows) - 1])
    )
    report.parts.append(_compare("decoder", kinds["decoder"], ours[0], reference.decode(rows), logits=True))


def _check_sequence(vlm: VLM, reference: Any, prompt: _Prompt, limit: Limit, report: Report) -> None:
    prompt.answer, prompt.logits = reference.generate(prompt.ids, prompt.pixel_values, TOKENS)
    forced = _run_bundle(vlm, prompt, prompt.answer)
    own = _greedy(vlm, prompt)
    report.sequences.append(_judge(prompt.case, len(prompt.ids), forced, own, prompt, limit))


def _judge(case: str, length: int, forced: np.ndarray, own: list[int], prompt: _Prompt, limit: Limit) -> SequenceCheck:
    max_abs, peak, cosine = _distance(forced, prompt.logits)
    same = next((i for i, (a, b) in enumerate(zip(own, prompt.answer, strict=True)) if a != b), len(own))
    within = limit.max_abs is None or max_abs <= limit.max_abs * (1.0 if limit.tokens_equal else max(1.0, peak))
    passed = cosine >= limit.cosine and within and (same == len(own) or not limit.tokens_equal)
    top1 = float((forced.argmax(-1) == prompt.logits.argmax(-1)).mean())
    return SequenceCheck(case, length, max_abs, cosine, top1, same, len(own), bool(passed))


def _run_bundle(vlm: VLM, prompt: _Prompt, answer: list[int]) -> np.ndarray:
    """Logits before each token of a given answer, `[tokens, vocabulary]`, one step at a time as in real decoding."""
    decoder = Decoder(vlm._sessions["decoder"], vlm.bundle.manifest.kv_cache, len(prompt.ids) + TOKENS)
    length = len(prompt.ids)
    logits = [decoder.forward(prompt.embeds[None], np.array([0]), np.array([length - 1]))[0]]
    for i, token in enumerate(answer[:-1]):
        logits.append(decoder.forward(vlm._embed([token])[None], np.array([length + i]), np.array([0]))[0])
    return np.stack(logits)


def _greedy(vlm: VLM, prompt: _Prompt) -> list[int]:
    decoder = Decoder(vlm._sessions["decoder"], vlm.bundle.manifest.kv_cache, len(prompt.ids) + TOKENS)
    length = len(prompt.ids)
    logits = decoder.forward(prompt.embeds[None], np.array([0]), np.array([length - 1]))[0]
    tokens = [int(logits.argmax())]
    while len(tokens) < TOKENS:
        logits = decoder.forward(vlm._embed(tokens[-1:])[None], np.array([length + len(tokens) - 1]), np.array([0]))[0]
        tokens.append(int(logits.argmax()))
    return tokens


def _check_batch(vlm: VLM, first: _Prompt, second: _Prompt, limit: Limit, report: Report) -> None:
    """Two prompts of different lengths in one right-padded batch must answer as they do alone."""
    pair = (first, second)
    lengths = np.array([len(p.ids) for p in pair])
    rows = np.zeros((2, int(lengths.max()), first.embeds.shape[1]), np.float32)
    for row, prompt in zip(rows, pair, strict=True):
        row[: len(prompt.ids)] = prompt.embeds
    decoder = Decoder(vlm._sessions["decoder"], vlm.bundle.manifest.kv_cache, int(lengths.max()) + TOKENS, batch=2)
    forced = [decoder.forward(rows, np.array([0, 0]), lengths - 1)]
    for i in range(TOKENS - 1):
        tokens = np.array([[p.answer[i]] for p in pair])
        step = vlm._run("embed_tokens", {"input_ids": tokens})["inputs_embeds"]
        forced.append(decoder.forward(step, lengths + i, np.array([0, 0])))
    for number, prompt in enumerate(pair):
        logits = np.stack([step[number] for step in forced])
        # Teacher-forced: while every choice agrees, it is the greedy answer.
        own = logits.argmax(-1).tolist()
        report.sequences.append(_judge(f"batch of 2: {prompt.case}", len(prompt.ids), logits, own, prompt, limit))
