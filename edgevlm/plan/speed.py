"""How fast a model answers on a device, from the roofline: what must be read, by the bandwidth; what must be multiplied, by the
peak; each times the share of it that a well-made runtime was seen to reach.

The shares are calibrated on what NVIDIA publishes of TensorRT Edge-LLM 0.10.0 for text models (Qwen3 of 0.6B to 8B, INT4 and
NVFP4, 2,048 tokens; https://nvidia.github.io/TensorRT-Edge-LLM/0.10.0/user_guide/performance/performance-benchmarks.html, read
2026-11-24), and for pictures on the vision encoder of Qwen3-VL-2B there. They are those of NVIDIA's own kernels: what EdgeVLM's
engines reach may be less. docs/planning.md compares predictions for Qwen3-VL and Qwen2.5-VL with what is published of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..generate import CHUNK
from ..targets import Target
from .outline import Outline, Sight

__all__ = ["Speed", "decoder_operations", "predict_speed", "token_bytes", "vision_operations"]


@dataclass(frozen=True)
class Shares:
    """Of a device: the share of its bandwidth that decoding reaches, seconds of each layer that are not reading, and the share
    of its peak that products of many rows reach, by the form of the weights."""

    bandwidth: float
    layer: float
    products: Mapping[str, float]


#: By compute capability.
SHARES = {
    "8.7": Shares(0.84, 50e-6, {"float16": 0.56, "int8": 0.56, "int4": 0.56}),
    "11.0": Shares(0.93, 40e-6, {"float16": 0.28, "int8": 0.28, "int4": 0.17, "fp4": 0.26}),
    "12.1": Shares(0.89, 40e-6, {"float16": 0.46, "int8": 0.46, "int4": 0.62, "fp4": 0.33}),
}
#: For devices that nothing was published of: those of the nearest kind, and no more than an assumption.
ASSUMED = Shares(0.8, 50e-6, {"float16": 0.5, "int8": 0.5, "int4": 0.5})
#: ONNX Runtime on a CPU, against what NumPy reaches there: a rough guess from one run of LLaVA with a 0.5B decoder on two busy
#: cores, not a calibration.
CPU = Shares(0.6, 300e-6, {"float32": 0.9, "float16": 0.8, "int8": 0.9, "int4": 0.8})


@dataclass(frozen=True)
class Speed:
    """Seconds, None where the device's bandwidth or peak is not known. `prompt` is the tokens that `prefill` is for, `decode`
    one token behind a full context. `calibrated`: whether the shares were measured on this kind of device."""

    vision: float | None
    prefill: float | None
    decode: float | None
    prompt: int
    calibrated: bool

    @property
    def first_token(self) -> float | None:
        """Seconds to the first token: pictures and prompt."""
        return None if self.vision is None or self.prefill is None else self.vision + self.prefill

    @property
    def tokens_per_second(self) -> float | None:
        return 1 / self.decode if self.decode else None


def predict_speed(
    outline: Outline,
    target: Target,
    context: int,
    sight: Sight,
    *,
    prompt: int | None = None,
    compute: str | None = None,
    chunk: int = CHUNK,
) -> Speed:
    """For a prompt of `prompt` tokens, pictures included (128 of text without), and one more token behind `context` positions.
    The prompt goes through in chunks, each of which reads the weights. `compute` names another type that products are made in
    (`fp4`)."""
    shares = SHARES.get(target.compute_capability or "", ASSUMED if target.runs_on_gpu else CPU)
    calibrated = target.compute_capability in SHARES
    tokens = min(context, prompt if prompt is not None else sight.places + 128)
    peak = target.flops.get(compute or ("fp16" if target.runs_on_gpu else "fp32"))
    rate = target.bandwidth * shares.bandwidth if target.bandwidth else None
    vision = prefill = decode = None
    decoder = outline.parts["decoder"]
    read = decoder.size - decoder.tables
    if rate:
        decode = token_bytes(outline, context, sight) / rate + outline.decoder.layers * shares.layer
    if rate and peak:
        share = shares.products.get(compute or _form(decoder.stored), min(shares.products.values()))
        products = max(decoder_operations(outline, tokens) / (peak * share), -(-tokens // chunk) * read / rate)
        prefill = products + outline.decoder.layers * shares.layer
    seen = target.flops.get("fp16" if target.runs_on_gpu else "fp32")
    if seen:
        share = shares.products["float16" if target.runs_on_gpu else "float32"]
        vision = vision_operations(outline, sight) / (seen * share)
    return Speed(vision, prefill, decode, tokens, calibrated)


def token_bytes(outline: Outline, context: int, sight: Sight) -> int:
    """What a token behind `context` positions reads: weights, keys and values."""
    decoder, cross = outline.parts["decoder"], outline.manifest.cross_attention
    rows = context * outline.bytes_per_token
    if cross is not None:
        rows += outline.cross_bytes_per_row * (context if cross.source == "prompt" else sight.images * cross.places)
    return decoder.size - decoder.tables + rows


def _form(stored: Mapping[str, int]) -> str:
    return max(stored, key=lambda form: stored[form])


def decoder_operations(outline: Outline, tokens: int) -> float:
    """Products of every row with every weight, but of the last alone with the output layer; and attention, each row with half
    of the others in the mean."""
    part, stack = outline.parts["decoder"], outline.decoder
    attention = 4 * stack.layers * stack.heads * stack.head_dim * tokens * tokens / 2
    return 2 * part.linear * tokens + 2 * part.head + attention


def vision_operations(outline: Outline, sight: Sight) -> float:
    """Products of what comes before the decoder."""
    if not sight.images:
        return 0.0
    stack = outline.vision
    total = 0.0
    for name, part in outline.parts.items():
        if name in ("decoder", "embed_tokens", "text_encoder"):
            continue
        places = max(1, sight.places // max(1, sight.tiles))
        merged = _merger(outline, part.linear) if name == "vision_encoder" else 0
        rows = sight.patches if name in ("vision_encoder", "resampler") else places
        total += 2.0 * ((part.linear - merged) * rows + merged * places) * sight.tiles
    return total + 4.0 * stack.whole * stack.width * sight.patches**2 * sight.tiles


def _merger(outline: Outline, linear: int) -> int:
    """Of Qwen2-VL and later: how many weights of the tower see places instead of patches."""
    if outline.manifest.patches is None:
        return 0
    named = sum(w.count for w in outline.weights.get("vision_encoder", ()) if w.kind == "linear" and "merger" in w.name)
    if named:
        return named
    stack = outline.vision
    gated = 3 if outline.manifest.patches.window else 2
    return max(0, linear - stack.layers * (4 * stack.width**2 + gated * stack.width * stack.inner))
