"""How much memory exporting a checkpoint of 7B size takes, and how fast the result answers.

    python benchmarks/export_memory.py                       # LLaVA-1.5: 14 GB of checkpoint, 5 GB of bundle; removed then
    python benchmarks/export_memory.py --family qwen2.5-vl   # 17 GB of checkpoint, 6 GB of bundle
    python benchmarks/export_memory.py --scale tiny          # the same steps within a minute

1. Writes a checkpoint of the real architecture at real size with random weights. Names and shapes are those of the
   transformers model, built without storage; values go to disk in pieces, so this takes no memory either.
2. Exports and quantizes it with `python -m edgevlm export`, and samples the anonymous memory of that process (`RssAnon`
   and `VmSwap` in /proc/PID/status) every 20 ms. Anonymous memory is what a machine must have: pages of the mapped
   checkpoint, which the peak of resident memory (`VmHWM`) counts as well, are given back when they are needed elsewhere.
3. Loads the bundle in a process of its own and asks it one question about a picture.

Prints a table and writes `export_memory.json` into the work folder. Linux only. Exit codes: 0 within the limit; 1 the
export took more anonymous memory than `--limit-gb`; 2 it could not be measured; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

SAMPLE_SECONDS = 0.02
#: Values of the block that all weights are cut from; a prime, so that no row of a matrix repeats the one above it.
BLOCK_VALUES = 4_194_301
IMAGE_TOKEN, PAD_TOKEN = 32000, 32001
#: numpy's and safetensors' names.
DTYPES = {"fp16": ("float16", "F16"), "bf16": ("bfloat16", "BF16"), "fp32": ("float32", "F32")}
#: Recipe → the most bytes that a bundle's graphs, which compute in float32, take for each parameter.
RECIPES = {"int4": 0.8, "int8": 1.1, "float": 4.0}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: From number 151,643 on, in this order.
CHATML_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
FIRST_SPECIAL = 151643

IMPORTS = "import edgevlm.export.trace, edgevlm.export.passes; from transformers import LlavaForConditionalGeneration"

ANSWER = """
import json, sys, time
from edgevlm import VLM
from edgevlm.scenes import render_scene, sample_scene
began = time.perf_counter()
vlm = VLM.load(sys.argv[1], check_files=True)
loaded = time.perf_counter() - began
picture = render_scene(sample_scene(0), int(sys.argv[3])).resize((int(sys.argv[3]), int(sys.argv[4])))
reply = vlm.generate("How many cubes are there?", images=[picture], max_new_tokens=int(sys.argv[2]))
timings = reply.timings
print(json.dumps({
    "load_seconds": loaded, "first_token_ms": timings.first_token, "vision_ms": timings.vision, "prefill_ms": timings.prefill,
    "prompt_tokens": timings.prompt_tokens, "tokens": len(reply.tokens), "tokens_per_second": timings.tokens_per_second,
    "finish_reason": reply.finish_reason, "backends": {part: choice.chosen for part, choice in vlm.backends.items()},
}))
"""


class MeasurementError(Exception):
    """Why nothing can be measured; the text says what to do."""


@dataclass(frozen=True)
class Scale:
    """The widths and depths of a model; everything else is as in LLaVA-1.5-7B or Qwen2.5-VL-7B. `image` is the side of a
    picture that the tower takes, of LLaVA; `kv_heads` and `vocabulary` are Qwen's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    image: int
    projection: int
    shard_bytes: int
    kv_heads: int = 4
    vocabulary: int = 152064


_REAL = Scale(4096, 11008, 32, 32, 1024, 4096, 24, 16, 336, 768, 5_000_000_000)
SCALES = {
    "7b": _REAL,
    "wide": Scale(4096, 11008, 2, 32, 1024, 4096, 2, 16, 336, 768, 500_000_000),  # the largest tensors, a tenth of the size
    "tiny": Scale(128, 256, 2, 4, 64, 128, 2, 4, 56, 64, 5_000_000),
}
QWEN_SCALES = {
    "7b": Scale(3584, 18944, 28, 28, 1280, 3420, 32, 16, 0, 0, 4_000_000_000),
    "wide": Scale(3584, 18944, 2, 28, 1280, 3420, 2, 16, 0, 0, 500_000_000),
    "tiny": Scale(128, 256, 2, 4, 64, 128, 2, 4, 0, 0, 50_000_000, kv_heads=2),
}


# ------------------------------------------------------------------------------------------ the checkpoint


def make_config(scale: Scale, dtype: str) -> Any:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=scale.vision_hidden, intermediate_size=scale.vision_intermediate, num_hidden_layers=scale.vision_layers,
        num_attention_heads=scale.vision_heads, image_size=scale.image, patch_size=14, projection_dim=scale.projection,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=scale.hidden, intermediate_size=scale.intermediate, num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads, num_key_value_heads=scale.heads, max_position_embeddings=4096, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, pad_token_id=PAD_TOKEN, tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=(scale.image // 14) ** 2,
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"], dtype=getattr(torch, DTYPES[dtype][0]),
    )  # fmt: skip


def make_qwen_config(scale: Scale, dtype: str) -> Any:
    import torch
    from transformers import Qwen2_5_VLConfig

    layers = scale.vision_layers
    vision = {
        "depth": layers, "hidden_size": scale.vision_hidden, "intermediate_size": scale.vision_intermediate,
        "num_heads": scale.vision_heads, "out_hidden_size": scale.hidden, "tokens_per_second": 2,
        "fullatt_block_indexes": [n for n in range(layers) if n % 8 == 7] or [layers - 1],
    }  # fmt: skip
    text = {
        "vocab_size": scale.vocabulary, "hidden_size": scale.hidden, "intermediate_size": scale.intermediate,
        "num_hidden_layers": scale.layers, "num_attention_heads": scale.heads, "num_key_value_heads": scale.kv_heads,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": False, "eos_token_id": FIRST_SPECIAL + 2,
        "bos_token_id": FIRST_SPECIAL, "pad_token_id": FIRST_SPECIAL,
        "rope_scaling": {"type": "mrope", "mrope_section": [n * scale.hidden // scale.heads // 128 for n in (16, 24, 24)]},
    }  # fmt: skip
    number = {name: FIRST_SPECIAL + place for place, name in enumerate(CHATML_SPECIAL)}
    return Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, tie_word_embeddings=False,
        image_token_id=number["<|image_pad|>"], video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"], vision_end_token_id=number["<|vision_end|>"],
        architectures=["Qwen2_5_VLForConditionalGeneration"], dtype=getattr(torch, DTYPES[dtype][0]),
    )  # fmt: skip


#: transformers has renamed its modules since these checkpoints were made.
LLAVA_NAMES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
QWEN_NAMES = {"model.language_model.": "model.", "model.visual.": "visual.", "lm_head.": "lm_head."}


def weight_shapes(config: Any, renamed: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """The weights' shapes under the names that the checkpoints on the Hub have."""
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    return {_hub_name(name, renamed): tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _hub_name(name: str, renamed: dict[str, str]) -> str:
    for new, old in renamed.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise MeasurementError(f"The installed transformers calls a weight {name!r}; this benchmark knows no such place.")


def write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: str, shard_bytes: int, console: Console) -> int:
    """Writes safetensors files and their index; returns their bytes. Format: https://github.com/huggingface/safetensors#format"""
    import ml_dtypes

    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bf16" else DTYPES[dtype][0])
    normal = np.random.default_rng(0).standard_normal(BLOCK_VALUES, np.float32)
    block = (normal * np.float32(0.02)).astype(stored).view(np.uint8).data
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * stored.itemsize
        if filled and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    total = sum(math.prod(shape) for shape in shapes.values()) * stored.itemsize

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    position = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("writing the checkpoint", total=total)
        for file_name, shard in zip(names, shards, strict=True):
            with (folder / file_name).open("wb", buffering=0) as file:
                file.write(_header(shard, stored.itemsize, DTYPES[dtype][1]))
                for name, shape in shard.items():
                    left = math.prod(shape) * stored.itemsize
                    if len(shape) == 1 and name.endswith(".weight"):  # a norm
                        _write_all(file, np.ones(shape, stored).view(np.uint8).data)
                        bars.advance(task, left)
                        continue
                    while left:
                        piece = block[position : position + left]
                        _write_all(file, piece)
                        position = (position + len(piece)) % len(block)
                        left -= len(piece)
                        bars.advance(task, len(piece))
                os.fsync(file.fileno())  # or the disk would be busy with it during the export
    index = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return sum((folder / name).stat().st_size for name in names)


def _header(shard: dict[str, tuple[int, ...]], width: int, dtype: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.items():
        end = offset + math.prod(shape) * width
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_all(file: Any, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]


def write_companions(folder: Path, config: Any) -> None:
    """Configuration, tokenizer and processor: what an export needs beside weights."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import GenerationConfig, LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    # Characters and bytes, then reserved names up to the number that LLaVA-1.5 gives to the picture token.
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    pieces += [f"<reserved_{number}>" for number in range(len(pieces), IMAGE_TOKEN)]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"}, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    side = config.vision_config.image_size
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    LlavaProcessor(
        image_processor=images, tokenizer=wrapped, patch_size=config.vision_config.patch_size, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", image_token="<image>", chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=PAD_TOKEN).save_pretrained(folder)


def write_qwen_companions(folder: Path, config: Any) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [f"<reserved_{number}>" for number in range(len(pieces), FIRST_SPECIAL)]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CHATML_SPECIAL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=FIRST_SPECIAL + 2, pad_token_id=FIRST_SPECIAL).save_pretrained(folder)


@dataclass(frozen=True)
class Model:
    """How a checkpoint of a family is made, and the picture (width, height) that its bundle is asked about."""

    scales: dict[str, Scale]
    config: Callable[[Scale, str], Any]
    names: dict[str, str]
    companions: Callable[[Path, Any], None]
    picture: tuple[int, int]


FAMILIES = {
    "llava": Model(SCALES, make_config, LLAVA_NAMES, write_companions, (336, 336)),
    "qwen2.5-vl": Model(QWEN_SCALES, make_qwen_config, QWEN_NAMES, write_qwen_companions, (1280, 960)),
}


# ----------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Usage:
    """What a process took. `peak_at_seconds` is when its anonymous memory was largest."""

    seconds: float
    peak_anonymous_bytes: int
    peak_resident_bytes: int
    peak_at_seconds: float


def watch(
    arguments: Sequence[str],
    output: Path,
    what: str,
    *,
    errors: Path | None = None,
    each: Callable[[float, int], None] = lambda seconds, anonymous: None,
) -> Usage:
    """Runs Python with `arguments`, its standard output in `output`, and samples its memory until it ends.

    Its standard error is left as it is, or goes into `errors`. `each` is told every sample: the seconds so far and the bytes of
    anonymous memory.
    """
    with output.open("wb") as stdout, errors.open("wb") if errors else contextlib.nullcontext() as stderr:
        # In a session of its own, so that Ctrl-C reaches this process alone, which then ends the other one.
        process = subprocess.Popen([sys.executable, *arguments], stdout=stdout, stderr=stderr, start_new_session=True)
    began = time.perf_counter()
    anonymous, resident, at = 0, 0, 0.0
    try:
        while process.poll() is None:
            now = _memory(process.pid)
            each(time.perf_counter() - began, now[0])
            if now[0] > anonymous:
                anonymous, at = now[0], time.perf_counter() - began
            resident = max(resident, now[1])
            time.sleep(SAMPLE_SECONDS)
    finally:
        seconds = time.perf_counter() - began
        _end(process)
    if process.returncode:
        raise MeasurementError(f"{what} ended with exit code {process.returncode}; its message is above.")
    return Usage(seconds, anonymous, resident, at)


def _memory(pid: int) -> tuple[int, int]:
    """Anonymous memory now, and the peak of resident memory so far, in bytes."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:  # it has just ended
        return 0, 0
    found = {name: 1024 * int(size) for name, size in re.findall(r"^(RssAnon|VmSwap|VmHWM):\s+(\d+) kB$", status, re.MULTILINE)}
    return found.get("RssAnon", 0) + found.get("VmSwap", 0), found.get("VmHWM", 0)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def machine() -> dict[str, Any]:
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": pages,
        "system": f"{platform.system()} {platform.release()}",
    }


def packages() -> dict[str, str]:
    names = ("edgevlm", "numpy", "onnx-ir", "onnxscript", "torch", "transformers")
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


# ------------------------------------------------------------------------------------------- the run


def measure(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Takes the three steps inside the empty `folder`."""
    model = FAMILIES[options.family]
    scale = model.scales[options.scale]
    config = model.config(scale, options.dtype)
    shapes = weight_shapes(config, model.names)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    expected = parameters * {"fp16": 2, "bf16": 2, "fp32": 4}[options.dtype]
    check_disk(folder, expected, int(parameters * RECIPES[options.recipe]))

    checkpoint, bundle, output = folder / "checkpoint", folder / "bundle", folder / "output.txt"
    checkpoint.mkdir()
    began = time.perf_counter()
    model.companions(checkpoint, config)
    size = write_weights(checkpoint, shapes, options.dtype, scale.shard_bytes, console)
    written = time.perf_counter() - began
    console.print(f"checkpoint: {parameters:,} parameters, {size / 1e9:.2f} GB, written in {written:.0f} s")

    imports = watch(["-c", IMPORTS], output, "Importing torch and transformers")
    command = ["-m", "edgevlm", "export", "--model", str(checkpoint), "--output", str(bundle)]
    if options.recipe != "float":
        command += ["--quantize", options.recipe]
    export = watch(command, output, "The export")
    console.print(output.read_text(encoding="utf-8"), markup=False, end="")
    bundle_size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    asked = [str(number) for number in (options.tokens, *model.picture)]
    run = watch(["-c", ANSWER, str(bundle), *asked], output, "Loading the bundle and answering")
    answer = json.loads(output.read_text(encoding="utf-8"))

    limit = int(options.limit_gb * 1e9)
    return {
        "family": options.family,
        "scale": options.scale,
        "recipe": options.recipe,
        "machine": machine(),
        "packages": packages(),
        "checkpoint": {
            "dtype": options.dtype, "parameters": parameters, "bytes": size, "seconds": written,
            "shards": len(list(checkpoint.glob("*.safetensors"))),
        },
        "imports": asdict(imports),
        "export": asdict(export) | {"bundle_bytes": bundle_size},
        "run": asdict(run) | answer,
        "limit_bytes": limit,
        "within_limit": export.peak_anonymous_bytes <= limit,
    }  # fmt: skip


def check_disk(folder: Path, checkpoint: int, bundle: int) -> None:
    needed, free = checkpoint + bundle + 100_000_000, shutil.disk_usage(folder).free
    if free < needed:
        raise MeasurementError(
            f"{folder} has {free / 1e9:.1f} GB free; the checkpoint needs {checkpoint / 1e9:.1f} GB and the bundle up to "
            f"{bundle / 1e9:.1f} GB. Make room, give a --work on another disk, or take a smaller --scale."
        )


def print_table(result: dict[str, Any], console: Console) -> None:
    checkpoint, imports, export, run = (result[step] for step in ("checkpoint", "imports", "export", "run"))
    size = f"{checkpoint['parameters'] / 1e9:.2f} G parameters"
    title = f"{result['family']} {result['scale']}: {size}, {checkpoint['dtype']} to {result['recipe']}"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for column in ("step", "seconds", "peak anonymous GB", "peak resident GB", "on disk GB", ""):
        table.add_column(column, justify="left" if column in ("step", "") else "right")

    def add(step: str, seconds: float, usage: dict[str, Any] | None, disk: int | None, remark: str = "") -> None:
        peaks = [f"{usage[key] / 1e9:.2f}" if usage else "" for key in ("peak_anonymous_bytes", "peak_resident_bytes")]
        table.add_row(step, f"{seconds:,.1f}", *peaks, f"{disk / 1e9:.2f}" if disk is not None else "", remark)

    add("write the checkpoint", checkpoint["seconds"], None, checkpoint["bytes"], f"{checkpoint['shards']} files")
    add("import torch and transformers", imports["seconds"], imports, None, "part of every export")
    verdict = "[green]within[/]" if result["within_limit"] else "[red]over[/]"
    remark = f"{verdict} the limit of {result['limit_bytes'] / 1e9:.2f} GB; peak after {export['peak_at_seconds']:.0f} s"
    add("export and quantize", export["seconds"], export, export["bundle_bytes"], remark)
    first = f"first token behind {run['prompt_tokens']:,} after {run['first_token_ms']:,.0f} ms"
    remark = f"loaded in {run['load_seconds']:.1f} s; {first}, {run['tokens_per_second']:.1f} tokens/s"
    add("load and answer", run["seconds"], run, None, remark)
    console.print(table)


# ------------------------------------------------------------------------------------------ command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    purpose = "Measures the memory of an export at the size of a 7B model."
    parser = argparse.ArgumentParser(description=purpose, allow_abbrev=False)
    add = parser.add_argument
    add("--work", type=Path, default=Path("build/export-memory"), help="where it writes (default: build/export-memory)")
    add("--family", choices=FAMILIES, default="llava", help="whose checkpoint (default: llava)")
    add("--scale", choices=SCALES, default="7b", help="7b: real size; wide: its widths, two layers; tiny (default: 7b)")
    add("--dtype", choices=DTYPES, default="fp16", help="dtype of the checkpoint (default: fp16)")
    add("--recipe", choices=RECIPES, default="int4", help="how the export quantizes; float: not at all (default: int4)")
    add("--tokens", type=int, default=16, metavar="N", help="length of the answer (default: 16)")
    add("--limit-gb", type=float, default=1.5, metavar="GB", help="anonymous memory that the export may take (default: 1.5)")
    add("--keep", action="store_true", help="leave checkpoint and bundle in the work folder")
    return parser.parse_args(argv)


@contextlib.contextmanager
def scratch(folder: Path, keep: bool) -> Iterator[Path]:
    """A new folder that is removed afterwards, whatever happens."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError as exc:
        raise MeasurementError(f"{folder} is left from an earlier run. Remove it, or give another --work.") from exc
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def run_measured(
    options: argparse.Namespace,
    name: str,
    record: str,
    measure: Callable[[argparse.Namespace, Path, Console], dict[str, Any]],
    print_table: Callable[[dict[str, Any], Console], None],
) -> int:
    """Measures inside the folder `name` of the work folder, which is removed then; prints the result, and writes it into the
    work folder as `record`. Returns the exit code."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up as after Ctrl-C
    try:
        if not Path("/proc/self/status").is_file():
            raise MeasurementError("This needs Linux: memory is read from /proc.")
        with scratch(options.work / name, options.keep) as folder:
            result = measure(options, folder, console)
    except (MeasurementError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted" + ("" if options.keep else "; nothing was left behind"), file=sys.stderr)
        return 130
    (options.work / record).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result, console)
    return 0 if result["within_limit"] else 1


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    name = f"{options.family}-{options.scale}-{options.dtype}-{options.recipe}"
    return run_measured(options, name, "export_memory.json", measure, print_table)


if __name__ == "__main__":
    sys.exit(main())
