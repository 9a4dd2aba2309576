"""What a token costs whose decoder looks at pictures, at the layer shapes of IDEFICS-9B and of OPT-2.7B (in BLIP-2).

    python benchmarks/cross_attention.py                   # a few minutes, 3 GB of disk; removed when it is through
    python benchmarks/cross_attention.py --scale tiny      # the same steps within a minute

1. Flamingo: keys and values of the gated layers are made once a picture by the part `cross_kv` and kept. Beside it, in
   turn, the same graphs with `cross_kv` run at every step: what a decoder does that takes picture features as its input
   (transformers' own among them). Rows: how many features the gated layers see; a resampler makes 64 of any number.
2. BLIP-2: the decoder sees 32 queries of a picture, whatever its size. Beside it, in turn, the same decoder with as many
   rows as LLaVA would give it, one a patch.

Layers are cut to what fits (4, of which one is gated), weights are random, INT4 as the recipe says. Prints medians with
the quartiles' spread and ratios pair by pair, and writes `cross_attention.json` into the work folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from export_memory import MeasurementError, machine, packages, scratch, write_weights
from rich.console import Console
from rich.table import Table

TEXT = 20  # tokens of the question


@dataclass(frozen=True)
class Scale:
    hidden: int
    heads: int
    intermediate: int
    opt_hidden: int
    opt_intermediate: int
    vocabulary: int
    vision: int
    layers: int = 4


SCALES = {
    "real": Scale(4096, 32, 11008, 2560, 10240, 32000, 1280),
    "tiny": Scale(64, 4, 128, 64, 128, 500, 32),
}


def flamingo_config(scale: Scale) -> Any:
    from transformers import IdeficsConfig

    vision = {
        "embed_dim": scale.vision,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "intermediate_size": 2 * scale.vision,
    }
    return IdeficsConfig(
        vocab_size=scale.vocabulary, additional_vocab_size=3, hidden_size=scale.hidden, intermediate_size=scale.intermediate,
        num_hidden_layers=scale.layers, num_attention_heads=scale.heads, cross_layer_interval=scale.layers,
        vision_config=vision, qk_layer_norms=True, use_resampler=True, perceiver_config={"resampler_depth": 1},
    )  # fmt: skip


def blip2_config(scale: Scale) -> Any:
    from transformers import Blip2Config

    text = {
        "model_type": "opt", "hidden_size": scale.opt_hidden, "ffn_dim": scale.opt_intermediate, "vocab_size": scale.vocabulary,
        "num_hidden_layers": scale.layers, "num_attention_heads": scale.heads, "word_embed_proj_dim": scale.opt_hidden,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Blip2Config(text_config=text, vision_config=small, qformer_config=small | {"encoder_hidden_size": 64})


def open_parts(
    family_name: str, model_class: str, config: Any, wanted: Sequence[str], folder: Path, console: Console
) -> tuple[dict[str, Any], Any, Any]:
    """Sessions of the wanted parts with random weights, quantized to INT4; and what the manifest says of the caches."""
    import transformers

    from edgevlm.export.export import bind_weights
    from edgevlm.export.passes import canonical_graph
    from edgevlm.export.trace import build_fake, trace_part
    from edgevlm.graphs import part_record, save_graph
    from edgevlm.models import family_by_name
    from edgevlm.quant.quantize import quantize_graph
    from edgevlm.quant.recipe import load_recipe
    from edgevlm.runtimes import open_part
    from edgevlm.tensors import read_safetensors_index

    folder.mkdir()
    family = family_by_name(family_name)
    fake = build_fake(lambda: getattr(transformers, model_class)(config), "float32")
    specs = {spec.name: spec for spec in family.part_specs(fake.model, "float32") if spec.name in wanted}
    names = {fake.names[id(p)] for spec in specs.values() for p in spec.module.parameters()}
    shapes = {name: tuple(p.shape) for name, p in fake.model.named_parameters() if name in names}
    write_weights(folder, shapes, "fp16", 4_000_000_000, console)
    weights: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {family.weight_name(name): entry for name, entry in read_safetensors_index(file).items()}
    sessions = {}
    for name, spec in specs.items():
        graph = trace_part(fake, spec)
        canonical_graph(graph)
        bind_weights(graph, spec, family, weights, fake.tied)
        quantize_graph(graph, name, load_recipe("int4"))
        save_graph(graph, folder / f"{name}.onnx")
        sessions[name], _ = open_part(
            folder / f"{name}.onnx", name, part_record(graph, f"{name}.onnx"), backend="cpu", threads=None
        )
    text = config if family_name == "flamingo" else config.text_config
    cross = family.cross_attention(text, "float32")  # type: ignore[attr-defined]
    return sessions, family.kv_cache(text, "float32"), cross  # type: ignore[attr-defined]


def take_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way, one after the other, round by round; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:
                taken[name].append(1e3 * (time.perf_counter() - began))
    return taken


def summed_up(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    return summed_up([a / b for a, b in zip(over, under, strict=True)])


def measure_flamingo(
    sessions: Mapping[str, Any], kv: Any, cross: Any, rows: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    from edgevlm.generate import Decoder

    rng = np.random.default_rng(0)
    hidden = sessions["decoder"].part.inputs["inputs_embeds"].shape[2]
    width = sessions["cross_kv"].part.inputs["image_features"].shape[2]
    step = rng.standard_normal((1, 1, hidden), np.float32)
    decoder = Decoder(sessions["decoder"], kv, 256, cross=cross)
    decoder.forward(np.repeat(step, TEXT, 1), np.array([0]), np.array([TEXT - 1]))
    results = []
    for length in rows:
        features = rng.standard_normal((1, length, width), np.float32)
        visible = np.ones((1, 1, length), bool)

        def forward(visible: np.ndarray = visible) -> None:
            decoder.forward(step, np.array([TEXT]), np.array([0]), visible)

        def recompute(features: np.ndarray = features) -> None:
            made = sessions["cross_kv"].run({"image_features": features})
            decoder.remember([(object(), lambda: made)])
            forward()

        recompute()
        taken = take_turns({"kept": forward, "recomputed": recompute}, rounds)
        results.append(
            {"features": length, **{name: summed_up(values) for name, values in taken.items()},
             "ratio": ratios(taken["recomputed"], taken["kept"])}
        )  # fmt: skip
    return results


def measure_blip2(sessions: Mapping[str, Any], kv: Any, rows: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    from edgevlm.generate import CHUNK, Decoder

    rng = np.random.default_rng(0)
    hidden = sessions["decoder"].part.inputs["inputs_embeds"].shape[2]
    decoders = {length: Decoder(sessions["decoder"], kv, length + TEXT + 8) for length in rows}
    embeds = {length: rng.standard_normal((1, length + TEXT, hidden), np.float32) for length in rows}

    def prefill(length: int) -> None:
        for first in range(0, length + TEXT, CHUNK):
            chunk = embeds[length][:, first : first + CHUNK]
            decoders[length].forward(chunk, np.array([first]), np.array([chunk.shape[1] - 1]))

    def step(length: int) -> None:
        decoders[length].forward(embeds[length][:, :1], np.array([length + TEXT]), np.array([0]))

    first = take_turns({str(length): lambda length=length: prefill(length) for length in rows}, max(3, rounds // 5))  # type: ignore[misc]
    token = take_turns({str(length): lambda length=length: step(length) for length in rows}, rounds)  # type: ignore[misc]
    base = str(rows[0])
    return [
        {"rows": int(name), "prefill": summed_up(first[name]), "token": summed_up(token[name]),
         "prefill_ratio": ratios(first[name], first[base]), "token_ratio": ratios(token[name], token[base])}
        for name in first
    ]  # fmt: skip


def shown(value: Mapping[str, float], digits: int = 1) -> str:
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f}–{value['high']:.{digits}f})"


def print_tables(result: Mapping[str, Any], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", title="Flamingo: ms a token", title_justify="left")
    for column in ("features seen", "keys and values kept", "recomputed every step", "ratio"):
        table.add_column(column, justify="right")
    for row in result["flamingo"]:
        table.add_row(str(row["features"]), shown(row["kept"]), shown(row["recomputed"]), shown(row["ratio"], 2))
    console.print(table)
    table = Table(box=None, pad_edge=False, header_style="bold", title="BLIP-2's decoder: ms", title_justify="left")
    for column in ("rows of a picture", f"prefill with {TEXT} tokens of text", "ratio", "a token", "ratio"):
        table.add_column(column, justify="right")
    for row in result["blip2"]:
        cells = (shown(row["prefill"]), shown(row["prefill_ratio"], 2), shown(row["token"]), shown(row["token_ratio"], 2))
        table.add_row(str(row["rows"]), *cells)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures decoding with cross-attention.", allow_abbrev=False)
    parser.add_argument("--work", type=Path, default=Path("build/cross-attention"), help="default: build/cross-attention")
    parser.add_argument("--scale", choices=SCALES, default="real")
    parser.add_argument("--rounds", type=int, default=40, help="measurements of each (default: 40)")
    parser.add_argument("--features", type=int, nargs="+", default=[64, 257, 577, 1025, 2305], help="rows gated layers see")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 256, 576, 1024], help="rows a picture takes in the prompt")
    options = parser.parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    scale = SCALES[options.scale]
    try:
        with scratch(options.work / options.scale, False) as folder:
            print("building Flamingo …", file=sys.stderr, flush=True)
            parts, kv, cross = open_parts(
                "flamingo",
                "IdeficsForVisionText2Text",
                flamingo_config(scale),
                ("cross_kv", "decoder"),
                folder / "flamingo",
                console,
            )
            print("measuring Flamingo …", file=sys.stderr, flush=True)
            flamingo = measure_flamingo(parts, kv, cross, options.features, options.rounds)
            del parts
            print("building BLIP-2 …", file=sys.stderr, flush=True)
            parts, kv, _ = open_parts(
                "blip2", "Blip2ForConditionalGeneration", blip2_config(scale), ("decoder",), folder / "blip2", console
            )
            print("measuring BLIP-2 …", file=sys.stderr, flush=True)
            blip2 = measure_blip2(parts, kv, options.rows, options.rounds)
    except (MeasurementError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    result = {
        "scale": options.scale, "machine": machine(), "packages": packages(), "flamingo": flamingo, "blip2": blip2
    }  # fmt: skip
    (options.work / "cross_attention.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_tables(result, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
