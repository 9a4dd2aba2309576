"""`edgevlm bench`: how fast a bundle answers here, how much memory it takes, how near that comes to what the machine can do.

Pictures are noise, each different from its first patch on, so that no cache of anybody's knows them. Every round asks about
new pictures, and then a second question about the same ones. A round in which other processes took more than 5 % of the cores
is asked again, a few times.

The limit of decoding is the memory: a token reads the decoder's weights and the KV cache once, and the bandwidth is measured
in the same run. That of the vision encoder and the prefill are the arithmetic units; how far their integer units are ahead of
their float32 ones depends on the processor, so what is given is the multiple of the float32 rate that was measured.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import __version__
from .bundle import Bundle
from .errors import InputError
from .plan.outline import Outline, Sight, outline_bundle
from .plan.speed import decoder_operations, token_bytes, vision_operations
from .runtimes import Asked
from .targets import measure_machine
from .vlm import VLM

__all__ = ["COLUMNS", "Bench", "Foreign", "Spread", "measure_bundle", "noise_picture", "peak_memory", "print_bench"]

FOREIGN_LIMIT = 0.05
#: A round is asked again at most so many times.
PATIENCE = 3
#: Name → (title, unit)
COLUMNS = {
    "vision": ("vision", "ms"),
    "prefill": ("prefill", "ms"),
    "first_token": ("first token", "ms"),
    "second_question": ("first token of a second question", "ms"),
    "tokens_per_second": ("decode", "tokens/s"),
}


@dataclass(frozen=True)
class Spread:
    """Of several rounds."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Bench:
    """What was measured. `load` in seconds, `memory` (the process's peak) and `disk` in bytes; `rates` of the machine and what
    was reached, per second: bytes of `bandwidth`, operations of `float32`."""

    bundle: str
    backends: dict[str, str]
    threads: int
    prompt_tokens: int
    new_tokens: int
    images: int
    size: tuple[int, int]
    times: dict[str, Spread]
    load: float
    memory: int
    disk: int
    rates: dict[str, float]
    shares: dict[str, float]
    disturbed: int
    """Rounds that count although other processes were busy."""
    machine: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Foreign:
    """What share of this process's cores other processes take, from /proc/stat; 0 where there is none."""

    def __init__(self) -> None:
        self._began = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        except OSError:
            return 0.0, 0.0, 0.0
        ticks = [int(value) for value in fields]
        times = os.times()
        own = (times.user + times.system + times.children_user + times.children_system) * os.sysconf("SC_CLK_TCK")
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], own

    def share(self) -> float:
        """Since this was made."""
        total, busy, own = (after - before for after, before in zip(self._read(), self._began, strict=True))
        return max(0.0, (busy - own) / total) if total > 0 else 0.0


def noise_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture `(width, height)` that nothing has seen before."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def peak_memory() -> int:
    """Bytes that this process held at most, resident."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def measure_bundle(
    folder: str | Path,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int = 64,
    images: int = 1,
    size: tuple[int, int] | None = None,
    rounds: int = 5,
    backend: Asked = None,
    threads: int | None = None,
    count: Callable[[str, int, int], None] = lambda *_: None,
) -> Bench:
    """Loads a bundle and asks it `rounds` times about `images` new pictures of `size` (width, height; as a default what the
    model takes). `prompt_tokens` is the least length of the prompt, pictures included.

    Raises InputError, and what loading and asking raise.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("images", images), ("rounds", rounds)):
        least = 2 if name == "new_tokens" else 0 if name == "images" else 1
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; it is {least} or more.")
    bundle = Bundle.open(folder, check_files=False)
    outline = outline_bundle(Path(folder))
    sight = outline.look(images, size)
    shown = size or (outline.side or sight.shown)
    began = time.perf_counter()
    with VLM.load(
        folder, capacity=_capacity(bundle, prompt_tokens, sight, new_tokens), backend=backend, threads=threads
    ) as vlm:
        load = time.perf_counter() - began
        question = _question(vlm, prompt_tokens, [noise_picture(0, shown)] * images)
        taken: dict[str, list[float]] = {name: [] for name in COLUMNS}
        seen = prompt = disturbed = 0
        for number in range(rounds + 1):
            for attempt in range(PATIENCE + 1):
                foreign, pictures = Foreign(), [noise_picture(seen + n, shown) for n in range(images)]
                seen += images
                first = vlm.generate(question, images=pictures, max_new_tokens=new_tokens, ignore_stop=True)
                second = vlm.generate(question + " Why?", images=pictures, max_new_tokens=1, ignore_stop=True)
                busy = foreign.share() > FOREIGN_LIMIT
                if not number or not busy or attempt == PATIENCE:
                    break
            prompt = first.timings.prompt_tokens
            count("measuring", number, rounds)
            if not number:  # the first round warms up
                continue
            disturbed += busy
            for name in COLUMNS:
                taken[name].append(second.timings.first_token if name == "second_question" else getattr(first.timings, name))
        backends = {name: choice.chosen for name, choice in vlm.backends.items()}
        memory = peak_memory()
    bandwidth, float32 = measure_machine()
    times = {name: Spread.of(values) for name, values in taken.items()}
    return Bench(
        bundle=str(folder), backends=backends, threads=threads or len(os.sched_getaffinity(0)), prompt_tokens=prompt,
        new_tokens=new_tokens, images=images, size=shown, times=times, load=load, memory=memory,
        disk=sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file() and file.parent.name != "reports"),
        rates={"bandwidth": bandwidth, "float32": float32},
        shares=_shares(outline, sight, times, prompt, new_tokens, bandwidth, float32),
        disturbed=disturbed,
        machine={
            "processor": _processor(), "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "python": platform.python_version(), "edgevlm": __version__, **_runtime_versions(),
        },
    )  # fmt: skip


def _capacity(bundle: Bundle, prompt_tokens: int | None, sight: Sight, new_tokens: int) -> int:
    wanted = max(prompt_tokens or 0, sight.places + 128) + new_tokens + 64
    return min(bundle.manifest.context_length, -(-wanted // 256) * 256)


def _question(vlm: VLM, prompt_tokens: int | None, pictures: Sequence[Any]) -> str:
    """A question that makes the prompt as long as that."""
    question = "What is in this picture, and where?"
    missing = (prompt_tokens or 0) - vlm.count_tokens(question, images=pictures)
    if missing <= 0:
        return question
    words, step = missing, missing
    while step:  # a word is a token in most tokenizers, and more in some
        length = vlm.count_tokens(question + " now" * words, images=pictures)
        step = (prompt_tokens or 0) - length if length < (prompt_tokens or 0) else 0
        words += step
    return question + " now" * words


def _shares(
    outline: Outline,
    sight: Sight,
    times: dict[str, Spread],
    prompt: int,
    new_tokens: int,
    bandwidth: float,
    float32: float,
) -> dict[str, float]:
    read = token_bytes(outline, prompt + new_tokens // 2, sight)
    shares = {"decode_of_bandwidth": times["tokens_per_second"].median * read / bandwidth}
    if times["prefill"].median:
        rate = decoder_operations(outline, prompt) / (times["prefill"].median / 1e3)
        shares["prefill_of_float32"] = rate / float32
    if times["vision"].median:
        shares["vision_of_float32"] = vision_operations(outline, sight) / (times["vision"].median / 1e3) / float32
    return shares


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _runtime_versions() -> dict[str, str]:
    from .runtimes.ort import onnxruntime

    return {"onnxruntime": onnxruntime().__version__}


def print_bench(bench: Bench, console: Any) -> None:
    """As tables for people."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title=escape(bench.bundle), title_justify="left")
    for column in ("", "median", "least", "most", "unit"):
        table.add_column(column, justify="left" if column in ("", "unit") else "right")
    for name, (title, unit) in COLUMNS.items():
        spread = bench.times[name]
        table.add_row(title, *(f"{value:,.1f}" for value in (spread.median, spread.least, spread.most)), unit)
    console.print(table, "")
    for line in _lines(bench):
        console.print(escape(line))


def _lines(bench: Bench) -> Iterator[str]:
    pictures = f"{bench.images} picture{'s' * (bench.images != 1)} of {bench.size[0]} x {bench.size[1]}"
    yield f"prompt of {bench.prompt_tokens:,} tokens, {pictures}; {bench.new_tokens} new tokens; {bench.threads} threads"
    yield "backends: " + ", ".join(f"{part} {name}" for part, name in bench.backends.items())
    yield (f"loaded in {bench.load:.1f} s; peak memory {bench.memory / 1e6:,.0f} MB; on disk {bench.disk / 1e6:,.0f} MB")
    share = bench.shares
    yield (
        f"decode reads at {100 * share['decode_of_bandwidth']:.0f} % of the {bench.rates['bandwidth'] / 1e9:.1f} GB/s that "
        "this machine's memory gave"
    )
    rates = [f"{part} {share[f'{part}_of_float32']:.1f}" for part in ("vision", "prefill") if f"{part}_of_float32" in share]
    if rates:
        yield f"times the float32 rate of {bench.rates['float32'] / 1e9:,.0f} GFLOPS: {', '.join(rates)}"
    if bench.disturbed:
        yield f"note: in {bench.disturbed} of the rounds other processes took over {100 * FOREIGN_LIMIT:.0f} % of the cores"
