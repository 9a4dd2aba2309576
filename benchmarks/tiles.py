"""How the number of tiles that a picture is cut into decides when the first token comes, at the size of InternVL3-1B.

    python benchmarks/tiles.py                   # 2 GB of checkpoint, 1 GB of bundle; half an hour on two cores
    python benchmarks/tiles.py --scale tiny      # the same steps within a minute

1. Writes a checkpoint of the real architecture at real size with random weights (InternViT-300M, 256 places a tile, a
   decoder of Qwen2-0.5B's shape) and exports it with a recipe.
2. Loads the bundle once for each limit (`VLM.load(…, max_tiles=N)`), each in a process of its own, whose peak of resident
   memory is its own as well.
3. Asks all of them in turn about one large picture, round by round; a picture's features are kept, so every round has
   another picture of the same size. The first round is smaller and does not count.

More than one tile brings the whole picture as a further one. Which grid is taken depends on the picture's aspect ratio: at
4:3, no grid of two tiles is nearer than one tile, so a limit of 2 costs what a limit of 1 does, and their ratio shows the
noise of the machine.

Prints medians with the quartiles' spread, ratios to the first limit round by round, and writes `tiles.json` into the work
folder. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cross_attention import ratios, shown, summed_up
from export_memory import MeasurementError, machine, packages, scratch, write_weights
from rich.console import Console
from rich.table import Table

TIMES = ("vision", "prefill", "first_token", "token")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{{ '<IMG_CONTEXT>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

#: Loads a bundle, then answers one question a line of its input: {"seed": …, "size": [width, height], "tokens": …}.
WORKER = """
import json, resource, sys
import numpy as np
from PIL import Image
from edgevlm import VLM
bundle, limit, capacity = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
vlm = VLM.load(bundle, max_tiles=limit, capacity=capacity, check_files=False)
vlm._stop = frozenset()  # every answer has its length
question, places = "What is on the table?", vlm.bundle.manifest.image.places
words = vlm.generate(question, max_new_tokens=1).timings.prompt_tokens
print(json.dumps({"loaded": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    blocks = np.random.default_rng(asked["seed"]).integers(0, 256, (12, 16, 3), np.uint8)
    picture = Image.fromarray(blocks).resize(asked["size"], Image.Resampling.BICUBIC)
    timings = vlm.generate(question, images=[picture], max_new_tokens=asked["tokens"]).timings
    print(json.dumps({
        "vision": timings.vision, "prefill": timings.prefill, "first_token": timings.first_token,
        "token": timings.decode / max(1, timings.decoded_tokens),
        "visual_tokens": (timings.prompt_tokens - words) // places * places,  # without those around them
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }), flush=True)
"""


@dataclass(frozen=True)
class Scale:
    """Widths and depths; everything else is as in InternVL3-1B."""

    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    side: int


SCALES = {
    "1b": Scale(1024, 4096, 24, 16, 896, 4864, 24, 14, 2, 151674, 448),
    "tiny": Scale(64, 128, 2, 4, 64, 128, 2, 4, 2, 512, 112),
}


def make_config(scale: Scale) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    vision = InternVLVisionConfig(
        hidden_size=scale.vision_hidden, intermediate_size=scale.vision_intermediate, num_hidden_layers=scale.vision_layers,
        num_attention_heads=scale.vision_heads, attention_bias=True, image_size=[scale.side] * 2, patch_size=[14, 14],
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=scale.vocabulary, hidden_size=scale.hidden, intermediate_size=scale.intermediate,
        num_hidden_layers=scale.layers, num_attention_heads=scale.heads, num_key_value_heads=scale.kv_heads,
        max_position_embeddings=32768, rope_theta=1e6, tie_word_embeddings=False,
    )  # fmt: skip
    return InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=256 + SPECIAL.index("<IMG_CONTEXT>"), tie_word_embeddings=False,
        image_seq_length=(scale.side // 28) ** 2, architectures=["InternVLForConditionalGeneration"],
    )  # fmt: skip


def write_checkpoint(folder: Path, scale: Scale, console: Console) -> int:
    """Writes a checkpoint with random weights; returns the number of its parameters."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    folder.mkdir()
    config = make_config(scale)
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    GotOcr2ImageProcessorPil(size={"height": scale.side, "width": scale.side}, crop_to_patches=True).save_pretrained(folder)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    write_weights(folder, shapes, "bf16", 4_000_000_000, console)
    return sum(math.prod(shape) for shape in shapes.values())


@contextmanager
def workers(bundle: Path, limits: Sequence[int], capacity: int) -> Iterator[dict[int, subprocess.Popen[str]]]:
    """A loaded model for each limit."""
    started: dict[int, subprocess.Popen[str]] = {}
    try:
        for limit in limits:
            command = [sys.executable, "-c", WORKER, str(bundle), str(limit), str(capacity)]
            # In process groups of their own, so that Ctrl-C reaches this process alone, which then ends the others.
            started[limit] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
            )
            print(f"loaded for {limit} tiles: {_read(started[limit])['loaded'] / 1e9:.2f} GB", file=sys.stderr, flush=True)
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def _read(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise MeasurementError(f"A model ended with exit code {process.wait()}; its message is above.")
    content: dict[str, Any] = json.loads(line)
    return content


def ask(process: subprocess.Popen[str], seed: int, size: Sequence[int], tokens: int) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"seed": seed, "size": list(size), "tokens": tokens}) + "\n")
    process.stdin.flush()
    return _read(process)


def measure(bundle: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    answers: dict[int, list[dict[str, Any]]] = {limit: [] for limit in options.tiles}
    places = json.loads((bundle / "edgevlm.json").read_text(encoding="utf-8"))["image"]["places"]
    capacity = places * (max(options.tiles) + 1) + 256
    with workers(bundle, options.tiles, capacity) as loaded:
        for limit in options.tiles:  # of one tile: what is allocated and packed at first
            ask(loaded[limit], 10_000, (448, 448), 2)
        for number in range(options.rounds):
            for limit in options.tiles:
                answers[limit].append(ask(loaded[limit], number, options.picture, options.tokens))
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    base = answers[options.tiles[0]]
    return [
        {
            "max_tiles": limit, "visual_tokens": taken[0]["visual_tokens"], "tiles": taken[0]["visual_tokens"] // places,
            "peak_bytes": max(answer["peak"] for answer in taken),
            **{name: summed_up([answer[name] for answer in taken]) for name in TIMES},
            **{f"{name}_ratio": ratios([a[name] for a in taken], [b[name] for b in base]) for name in TIMES},
        }
        for limit, taken in answers.items()
    ]  # fmt: skip


def print_table(result: Mapping[str, Any], console: Console) -> None:
    width, height = result["picture"]
    title = f"{result['scale']}, {result['recipe']}, a picture of {width} x {height}: milliseconds, and ratios to the first row"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    columns = ("max tiles", "tiles run", "places", "vision", "prefill", "first token", "ratio", "a token", "ratio", "peak GB")
    for column in columns:
        table.add_column(column, justify="right")
    for row in result["limits"]:
        table.add_row(
            str(row["max_tiles"]), str(row["tiles"]), str(row["visual_tokens"]), shown(row["vision"], 0),
            shown(row["prefill"], 0), shown(row["first_token"], 0), shown(row["first_token_ratio"], 2), shown(row["token"]),
            shown(row["token_ratio"], 2), f"{row['peak_bytes'] / 1e9:.2f}",
        )  # fmt: skip
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures tiles against the time to the first token.", allow_abbrev=False)
    parser.add_argument("--work", type=Path, default=Path("build/tiles"), help="default: build/tiles")
    parser.add_argument("--scale", choices=SCALES, default="1b")
    parser.add_argument("--recipe", choices=("int4", "int8", "float"), default="int4", help="default: int4")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 2, 4, 6, 12], help="limits (default: 1 2 4 6 12)")
    parser.add_argument("--picture", type=int, nargs=2, default=[1600, 1200], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, at least 3 (default: 5)")
    parser.add_argument("--tokens", type=int, default=9, help="length of an answer (default: 9)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON in place of the table")
    options = parser.parse_args(argv)
    if options.rounds < 3:  # quartiles of two would lie outside of them
        parser.error("--rounds must be 3 or more")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up as after Ctrl-C
    try:
        with scratch(options.work / options.scale, False) as folder:
            from edgevlm.export.export import export_bundle

            print("writing and exporting the checkpoint …", file=sys.stderr, flush=True)
            parameters = write_checkpoint(folder / "checkpoint", SCALES[options.scale], Console(stderr=True))
            recipe = None if options.recipe == "float" else options.recipe
            export_bundle(str(folder / "checkpoint"), folder / "bundle", recipe=recipe)
            limits = measure(folder / "bundle", options)
    except (MeasurementError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    result = {
        "scale": options.scale, "recipe": options.recipe, "parameters": parameters, "picture": options.picture,
        "rounds": options.rounds, "machine": machine(), "packages": packages(), "limits": limits,
    }  # fmt: skip
    (options.work / "tiles.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_table(result, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
