"""How near the speed that `edgevlm plan` predicts comes to what NVIDIA publishes: a table, predicted beside published.

    python benchmarks/plan_speed.py            # seconds; extra `export`, no network, no GPU

Published: TensorRT Edge-LLM 0.10.0, "Performance Benchmarks" (https://nvidia.github.io/TensorRT-Edge-LLM/0.10.0/user_guide/
performance/performance-benchmarks.html, read 2026-11-24): JetPack 7.2, batch 1, prefill of 2,048 tokens, decoding behind 2,048
tokens, the vision encoder's time for pictures of 265 tokens (349 for Qwen2.5-VL), and on Orin the GPU memory. INT4 is AWQ in
blocks of 128 with an output layer in FP16, the vision encoder FP16. NVFP4 has a scale for 16 weights: as many bytes as blocks
of 32 with scales in FP16, which stand for it here. Prints Markdown.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from edgevlm.plan.memory import predict_memory
from edgevlm.plan.outline import Outline, Sight, outline_checkpoint
from edgevlm.plan.speed import predict_speed
from edgevlm.quant.recipe import Recipe, Rule
from edgevlm.targets import find_target


@dataclass(frozen=True)
class Row:
    """Published: milliseconds, tokens a second, milliseconds, MB; None where the page has no such figure."""

    model: str
    form: str
    target: str
    prefill: float
    decode: float
    vision: float
    memory: int | None = None


PUBLISHED = [
    Row("Qwen3-VL-2B", "int4", "orin-nano-8gb", 1017.0, 32.3, 141.3, 4486),
    Row("Qwen3-VL-2B", "int4", "orin-nx-16gb", 760.3, 52.6, 77.1, 4533),
    Row("Qwen3-VL-4B", "int4", "orin-nx-16gb", 1740.8, 29.4, 77.4, 6023),
    Row("Qwen3-VL-8B", "int4", "orin-nx-16gb", 3106.2, 17.4, 110.5, 8929),
    Row("Qwen3-VL-2B", "int4", "agx-orin-64gb", 298.4, 88.7, 36.2, 4554),
    Row("Qwen3-VL-4B", "int4", "agx-orin-64gb", 757.7, 50.8, 36.5, 6076),
    Row("Qwen3-VL-8B", "int4", "agx-orin-64gb", 1388.1, 30.6, 53.0, 9004),
    Row("Qwen3-VL-2B", "int4", "agx-thor", 145.3, 135.3, 11.7),
    Row("Qwen3-VL-4B", "int4", "agx-thor", 364.4, 76.3, 11.8),
    Row("Qwen3-VL-8B", "int4", "agx-thor", 662.2, 46.2, 15.7),
    Row("Qwen3-VL-2B", "fp4", "agx-thor", 28.0, 136.0, 11.4),
    Row("Qwen3-VL-4B", "fp4", "agx-thor", 62.2, 72.9, 11.6),
    Row("Qwen3-VL-8B", "fp4", "agx-thor", 104.5, 44.4, 15.7),
    Row("Qwen2.5-VL-7B", "fp4", "agx-thor", 83.1, 59.2, 23.4),
    Row("Qwen3-VL-2B", "int4", "gb10", 98.0, 133.9, 0.0),
    Row("Qwen3-VL-4B", "int4", "gb10", 226.1, 73.6, 0.0),
    Row("Qwen3-VL-8B", "int4", "gb10", 380.9, 42.4, 0.0),
    Row("Qwen2.5-VL-7B", "fp4", "gb10", 167.8, 51.9, 0.0),
]
BLOCKS = {"int4": 128, "fp4": 32}
CONTEXT, CAPACITY = 2048, 2200


def published_form(outline: Outline, form: str) -> Outline:
    """The weights as NVIDIA's export has them."""
    head = Rule("float", "decoder", "*lm_head*", optional=True)
    return outline.under(Recipe(form, (head, Rule("int4", "decoder", block_size=BLOCKS[form]))))


def main() -> int:
    outlines: dict[str, Outline] = {}
    print("| model | weights | device | prefill ms | decode tokens/s | vision ms | GPU memory MB |")
    print("|---|---|---|---|---|---|---|")
    for row in PUBLISHED:
        whole = outlines.get(row.model) or outline_checkpoint(f"Qwen/{row.model}-Instruct", "float16")
        outlines[row.model] = whole
        outline, target = published_form(whole, row.form), find_target(row.target)
        places = 349 if row.model.startswith("Qwen2.5") else 265
        sight = Sight(1, 1, 1, 4 * places, places, (0, 0))
        compute = "fp4" if row.form == "fp4" else None
        speed = predict_speed(outline, target, CONTEXT, sight, prompt=CONTEXT, compute=compute, chunk=CONTEXT)
        assert speed.prefill is not None
        assert speed.vision is not None
        assert speed.tokens_per_second is not None
        memory = predict_memory(outline, target, CAPACITY, sight).answering / 1e6
        cells = [
            compare(1e3 * speed.prefill, row.prefill, 0), compare(speed.tokens_per_second, row.decode, 1),
            compare(1e3 * speed.vision, row.vision, 1), compare(memory, row.memory, 0),
        ]  # fmt: skip
        name = {"int4": "INT4", "fp4": "NVFP4"}[row.form]
        print(f"| {row.model} | {name} | {row.target} | {' | '.join(cells)} |")
    return 0


def compare(predicted: float, published: float | None, digits: int) -> str:
    if not published:
        return "–"
    return f"{predicted:,.{digits}f} / {published:,.{digits}f} ({100 * (predicted / published - 1):+.0f} %)"


if __name__ == "__main__":
    sys.exit(main())
