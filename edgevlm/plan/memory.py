"""How much memory a model takes on a device: while parts are loaded (or engines built), and while it answers.

Two ways to run it, each with constants that were measured:

- on the CPU by ONNX Runtime (`local`), where the peak of a process is predicted. Calibrated on LLaVA with a 0.5B decoder and on
  the shipped models; `benchmarks/plan_memory.py` measures again, and docs/planning.md says how far the prediction is off.
- as TensorRT engines, where the memory is the GPU's. `RUNTIME_GPU` follows from the GPU memory that NVIDIA publishes for Qwen3
  of four sizes on AGX Orin; it was not measured with engines of EdgeVLM's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..generate import CHUNK, STEP
from ..targets import Target
from .outline import Outline, PartOutline, Sight, Stack

__all__ = ["Memory", "predict_memory"]

_MIB = 1 << 20
#: A Python process with ONNX Runtime, tokenizers and Pillow that has answered once, without weights.
RUNTIME_CPU = 82 * _MIB
#: CUDA, TensorRT and the workspaces of an engine.
RUNTIME_GPU = int(0.75e9)
#: What a tokenizer takes for each byte of its file (151,643 entries with their merges: 11 MB, and 101 MB in memory).
TOKENIZER = 9.2
#: Bytes held for a byte of stored weights after loading. ONNX Runtime repacks weights for its kernels: float32 in place of the
#: file's pages; four and eight bits into new buffers, while the allocator keeps what was freed; float16 becomes float32.
HELD = {"float32": 1.0, "float16": 2.5, "int8": 2.0, "int4": 1.75, "uint8": 1.0}
#: Of a layer larger than this, the allocator gives freed memory back to the system: one copy stays.
LARGE = 32 * _MIB
_LARGE_HELD = {"float16": 2.0}
#: Scores and their softmax, where attention is not one kernel.
SCORE_COPIES = {"cpu": 2, "gpu": 1}
#: Rows of activations of the inner width, and of the outer one, that live at once.
INNER_ROWS, OUTER_ROWS = 2, 6
#: Queries of Qwen2-VL's whole-frame attention go through in blocks.
_ROW_BLOCKS = 8
_KEPT_PICTURES = 8
#: While an engine is built: the graph's weights, the builder's copy and the plan.
BUILD_COPIES = 3


@dataclass(frozen=True)
class Memory:
    """Bytes. `weights` by part, as they are held; the rest by what it is. `building` is the peak while parts are loaded (CPU),
    which counts, or while the largest engine is built, which may happen elsewhere."""

    weights: Mapping[str, int]
    kv_cache: int
    cross_attention: int
    features: int
    vision: int
    prefill: int
    runtime: int
    building: int
    usable: int
    building_counts: bool

    @property
    def total(self) -> int:
        """The most that it takes at any moment."""
        return max(self.answering, self.building if self.building_counts else 0)

    @property
    def answering(self) -> int:
        held = sum(self.weights.values()) + self.runtime
        return held + self.kv_cache + self.cross_attention + self.features + self.vision + self.prefill

    @property
    def fits(self) -> bool:
        return self.total <= self.usable

    def rows(self) -> Iterator[tuple[str, int]]:
        """What there is to show, in order."""
        yield from ((f"weights of {part}", size) for part, size in self.weights.items())
        yield "KV cache", self.kv_cache
        if self.cross_attention:
            yield "keys and values of cross-attention", self.cross_attention
        if self.features:
            yield "pictures kept", self.features
        yield "vision activations", self.vision
        yield "prefill activations", self.prefill
        yield "runtime", self.runtime


def predict_memory(outline: Outline, target: Target, context: int, sight: Sight) -> Memory:
    """What a model takes at `context` positions, prompt and answer together, with the pictures of `sight` in the prompt."""
    cpu = not target.runs_on_gpu
    weights = {name: _held(part, outline, context) if cpu else part.size for name, part in outline.parts.items()}
    rows = min(-(-context // STEP) * STEP, max(context, outline.manifest.context_length)) if cpu else context
    answers = outline.manifest.decoder_start_id is not None  # the prompt went into an encoder
    cache = outline.bytes_per_token * (min(rows, STEP) if answers else rows)
    cross = outline.cross_bytes_per_row * _cross_rows(outline, context, sight)
    runtime = RUNTIME_CPU if cpu else RUNTIME_GPU
    if target.unified_memory:
        runtime += int(TOKENIZER * outline.tokenizer)
    return Memory(
        weights=weights,
        kv_cache=cache,
        cross_attention=cross,
        features=_features(outline, sight),
        vision=_vision(outline, sight, cpu=cpu),
        prefill=_prefill(outline, rows, cpu=cpu),
        runtime=runtime,
        building=_loading(outline, weights, runtime) if cpu else _building(outline),
        usable=target.usable,
        building_counts=cpu,
    )


def _held(part: PartOutline, outline: Outline, context: int) -> int:
    """Bytes of a part's weights after ONNX Runtime has loaded it; of a table, which stays in its file, the pages read."""
    total = 0.0
    large = part.largest if part.largest > LARGE else 0
    most = max(part.stored, key=lambda form: part.stored[form])
    for form, stored in part.stored.items():
        size = stored - (part.tables if form == most else 0)
        alone = large if form == part.largest_form else 0
        total += max(0, size - alone) * HELD[form] + min(alone, size) * _LARGE_HELD.get(form, 1.0)
    if part.tables:
        page = 4096
        row = part.tables / max(1, outline.manifest.vocab_size)
        total += min(part.tables, context * (row + page))
    return int(total)


def _loading(outline: Outline, weights: Mapping[str, int], runtime: int) -> int:
    """The last part is loaded beside all others, and its largest layer is there twice for a moment."""
    last = outline.parts["decoder"]
    twice = last.largest * _LARGE_HELD.get(last.largest_form, 1.0) if last.largest > LARGE else 0
    return int(sum(weights.values()) + twice + runtime)


def _building(outline: Outline) -> int:
    return BUILD_COPIES * max(part.size for part in outline.parts.values()) + RUNTIME_GPU


def _cross_rows(outline: Outline, context: int, sight: Sight) -> int:
    cross = outline.manifest.cross_attention
    if cross is None:
        return 0
    return context if cross.source == "prompt" else max(1, sight.images) * cross.places


def _features(outline: Outline, sight: Sight) -> int:
    """The pictures that the runtime remembers: their features, or their keys and values."""
    kept, cross = min(sight.images, _KEPT_PICTURES), outline.manifest.cross_attention
    if not kept:
        return 0
    if cross is not None and cross.source == "images":
        return kept * cross.places * outline.cross_bytes_per_row
    return kept * math.ceil(sight.places / sight.images) * outline.manifest.hidden_size * outline.width


def _vision(outline: Outline, sight: Sight, *, cpu: bool) -> int:
    if not sight.images:
        return 0
    stack = outline.vision
    blocks = _ROW_BLOCKS if outline.manifest.patches else 1
    scores = stack.heads * math.ceil(sight.patches / blocks) * sight.patches * SCORE_COPIES["cpu" if cpu else "gpu"]
    numbers = scores + sight.patches * _row(stack)
    return sight.batch * numbers * outline.width


def _prefill(outline: Outline, positions: int, *, cpu: bool) -> int:
    stack, chunk = outline.decoder, min(CHUNK, positions)
    scores = stack.heads * chunk * positions * SCORE_COPIES["cpu" if cpu else "gpu"]
    return (scores + chunk * _row(stack) + outline.manifest.vocab_size) * outline.width


def _row(stack: Stack) -> int:
    return INNER_ROWS * stack.inner + OUTER_ROWS * stack.width
