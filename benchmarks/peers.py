"""EdgeVLM beside what people would use instead, on this machine: OpenVINO GenAI, llama.cpp, onnxruntime-genai, transformers.

    python benchmarks/peers.py                                     # all peers at LLaVA's shape with a 0.5B decoder
    python benchmarks/peers.py --shape llava-1.5b --peer edgevlm openvino llama_cpp
    python benchmarks/peers.py --shape qwen2-vl-2b --side 896

Each peer gets an environment of its own from the package index (torch pinned first; llama.cpp is built from source) and makes
what it runs of the same checkpoint with random weights. Then the peers take turns, A B C A B C: a process is started, asked
once about a picture to warm up, then, each time with a new picture,

- a question of 64 tokens without a picture (decode at a short context),
- a question about a picture: vision, prefill, first token, decode,
- a second question about the same picture (first token),
- a long question about a picture, 1,500 tokens in all (prefill; decode at a long context),

and ends. Pictures are noise, so no cache knows them. Rounds in which other processes took more than 5 % of the cores are
repeated. Prints medians and spread, and each peer's as ratios to EdgeVLM's of the same round; writes `peers-SHAPE.json` and
`peers-SHAPE.png`. Environments (about 6 GB), models and results stay in the work folder, and what is there is not made again.
EdgeVLM is the one that is installed where this runs, with the extras `export` and `eval`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from peer_workers.common import Job, Settings
from peer_workers.shapes import SHAPES, make_checkpoint, prompt_of
from rich.console import Console
from rich.table import Table

from edgevlm.bench import FOREIGN_LIMIT, PATIENCE, Foreign, noise_picture
from edgevlm.errors import EdgeVLMError
from edgevlm.targets import measure_machine

HERE = Path(__file__).resolve().parent
PEERS = ("edgevlm", "openvino", "llama_cpp", "onnxruntime_genai", "transformers", "transformers_compiled")
TORCH = "torch==2.13.0"
#: Name → (title, unit, whether more is better)
COLUMNS = {
    "vision": ("vision", "ms", False),
    "prefill": ("prefill", "ms", False),
    "first": ("first token", "ms", False),
    "second": ("2nd question", "ms", False),
    "long_first": ("first token, long", "ms", False),
    "short_rate": ("decode, short", "tok/s", True),
    "rate": ("decode", "tok/s", True),
    "long_rate": ("decode, long", "tok/s", True),
    "start": ("process to ready", "s", False),
    "load": ("load", "s", False),
    "peak": ("peak", "MB", False),
    "disk": ("disk", "MB", False),
}
WARMING, SHORT, ABOUT, AGAIN, LONG = range(5)


class Failed(EdgeVLMError):
    """What a peer said last before it ended."""


@dataclass
class Row:
    """One peer's rounds. `failed` is why it has none."""

    peer: str
    title: str
    rounds: list[dict[str, float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    failed: str = ""
    disturbed: int = 0

    def median(self, column: str) -> float | None:
        values = [taken[column] for taken in self.rounds if column in taken]
        return statistics.median(values) if values else None


class Environment:
    """The virtual environment of a peer, and its worker in it."""

    def __init__(self, peer: str, work: Path) -> None:
        self.worker: ModuleType = importlib.import_module(f"peer_workers.ask_{peer}")
        self.name = f"peer_workers.ask_{peer}"
        self.folder = work / "environments" / getattr(self.worker, "ENVIRONMENT", peer)
        self.python = str(self.folder / "bin" / "python") if self.worker.REQUIREMENTS else sys.executable

    def install(self) -> None:
        if not self.worker.REQUIREMENTS:
            return
        wanted = [TORCH, *self.worker.REQUIREMENTS]
        done = self.folder / "installed.json"
        if not (done.exists() and json.loads(done.read_text(encoding="utf-8")) == wanted):
            _run([sys.executable, "-m", "venv", str(self.folder)])
            constraint = self.folder / "constraint.txt"  # nothing brings a torch with CUDA in
            constraint.write_text(TORCH, encoding="utf-8")
            pip = [self.python, "-m", "pip", "install", "-q", "-c", str(constraint)]
            _run([*pip, TORCH])
            _run([*pip, *self.worker.REQUIREMENTS])
            for package in getattr(self.worker, "UNWANTED", ()):
                _run([self.python, "-m", "pip", "uninstall", "-q", "-y", package])
            done.write_text(json.dumps(wanted), encoding="utf-8")
        _run([self.python, "-m", self.name, "install"], env=_environment())

    def prepare(self, checkpoint: Path, decoder: Path, output: Path) -> None:
        if output.exists():
            return
        unfinished = output.with_suffix(".part")
        _remove(unfinished)
        output.parent.mkdir(parents=True, exist_ok=True)
        _run([self.python, "-m", self.name, "prepare", *map(str, (checkpoint, decoder, unfinished))], env=_environment())
        unfinished.rename(output)


class Process:
    """A peer that runs."""

    def __init__(self, environment: Environment, settings: Settings) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        touch_memory()
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [environment.python, "-m", environment.name, "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            env=_environment() | {"OMP_NUM_THREADS": str(settings.threads)},
        )  # fmt: skip
        try:
            self.ready = self.tell(asdict(settings))
        except BaseException:
            self.close()
            raise
        self.start = time.perf_counter() - began

    def tell(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise Failed(_last_line(self.log.read().decode(errors="replace")))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.log.close()


def touch_memory(size: int = 4 << 30) -> None:
    """Takes memory and gives it back. A virtual machine's host takes back what lies free for a while, and whoever comes next
    waits for it: that would be whose turn it is, not how fast it loads."""
    with mmap.mmap(-1, size) as memory:
        for start in range(0, size, 4096):
            memory[start] = 1


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _run(command: Sequence[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=env, errors="replace")
    if done.returncode:
        raise Failed(_last_line(done.stderr or done.stdout))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it ended without a word"


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _size(folder: Path) -> int:
    files = (file for file in folder.resolve().rglob("*") if file.is_file() and file.parent.name != "reports")
    return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class Questions:
    """The jobs of a round. `short`, `middle` and `long` are how many tokens the prompts have, pictures included."""

    family: str
    side: int
    middle: int
    long: int
    new_tokens: int
    checkpoint: Path
    short: int = 64

    def jobs(self, seed: int, folder: Path, sees: bool) -> list[Job]:
        pictures = []
        for number in range(3):
            pictures.append(str(folder / f"{number}.png"))
            noise_picture(3 * seed + number, (self.side, self.side)).save(pictures[-1], compress_level=0)
        warm, about, long = pictures if sees else ("", "", "")
        return [
            self._job(self.middle, warm, seed, 16),
            self._job(self.short, "", seed, self.new_tokens),
            self._job(self.middle, about, seed, self.new_tokens),
            self._job(self.middle, about, seed, 1, end=" Why?"),
            self._job(self.long, long, seed, self.new_tokens),
        ]

    def _job(self, tokens: int, picture: str, seed: int, new_tokens: int, end: str = "") -> Job:
        start = f"{seed}: What is in this picture, and where?"  # without a picture, the number makes it new
        words = tokens - self._length(start, picture)
        question = start + " now" * max(0, words) + end
        return Job(question, *prompt_of(self.family, question, bool(picture)), picture, new_tokens)

    def _length(self, question: str, picture: str) -> int:
        from tokenizers import Tokenizer

        text = "".join(prompt_of(self.family, question, bool(picture)))
        length = len(Tokenizer.from_file(str(self.checkpoint / "tokenizer.json")).encode(text).ids)
        if not picture:
            return length
        return length - 1 + places_of(self.family, self.side)


def places_of(family: str, side: int) -> int:
    """Tokens of a picture."""
    return (side // 14) ** 2 if family == "llava" else round(side / 28) ** 2


def ask_round(environment: Environment, settings: Settings, questions: Questions, seed: int) -> tuple[dict[str, Any], float]:
    """One process; what it said, and what share of the cores others took."""
    foreign = Foreign()
    with tempfile.TemporaryDirectory() as folder:
        process = Process(environment, settings)
        try:
            jobs = questions.jobs(seed, Path(folder), process.ready["sees"])
            answers = [process.tell(asdict(job)) for job in jobs]
        finally:
            process.close()
    about = answers[ABOUT]
    taken = {
        "vision": about["vision"], "prefill": about["prefill"], "first": about["first_token"],
        "second": answers[AGAIN]["first_token"], "long_first": answers[LONG]["first_token"],
        "short_rate": answers[SHORT]["tokens_per_second"], "rate": about["tokens_per_second"],
        "long_rate": answers[LONG]["tokens_per_second"], "start": process.start, "load": process.ready["load"],
        "peak": answers[-1]["peak"] / 1e6, "disk": _size(Path(settings.folder)) / 1e6,
    }  # fmt: skip
    lengths = {name: answers[at]["prompt_tokens"] for name, at in (("short", SHORT), ("middle", ABOUT), ("long", LONG))}
    said = {"taken": {name: value for name, value in taken.items() if value is not None}, "lengths": lengths}
    return said | {"versions": process.ready["versions"]}, foreign.share()


def measure(args: argparse.Namespace, console: Console) -> list[Row]:
    family, _, side = SHAPES[args.shape]
    work: Path = args.work / args.shape
    checkpoint, decoder = work / "checkpoint", work / "decoder"
    if not (decoder.exists() and checkpoint.exists()):
        console.print(f"making a checkpoint of {args.shape}'s shape")
        for folder in (checkpoint, decoder):
            _remove(folder)
        try:
            make_checkpoint(args.shape, checkpoint, decoder)
        except BaseException:
            for folder in (checkpoint, decoder):
                _remove(folder)
            raise
    rows, environments = [], {}
    for peer in args.peer:
        environments[peer] = Environment(peer, args.work)
        rows.append(Row(peer, environments[peer].worker.TITLE))
        console.print(f"preparing {rows[-1].title}")
        try:
            environments[peer].install()
            environments[peer].prepare(checkpoint, decoder, work / peer)
        except Failed as error:
            rows[-1].failed = str(error)
            console.print(f"  not possible: {error}", markup=False)
    questions = Questions(family, args.side or side, args.prompt_tokens, args.context, args.new_tokens, checkpoint)
    for number in range(args.rounds):
        for row in rows:
            if row.failed:
                continue
            settings = Settings(str(work / row.peer), args.threads, args.context + args.new_tokens + 64)
            console.print(f"round {number + 1} of {args.rounds}: {row.title}")
            try:
                for attempt in range(PATIENCE + 1):
                    said, busy = ask_round(environments[row.peer], settings, questions, 1_000 * number + attempt)
                    if busy <= FOREIGN_LIMIT:
                        break
                    console.print(f"  others took {100 * busy:.0f} % of the cores")
            except Failed as error:
                row.failed = str(error)
                console.print(f"  not possible: {error}", markup=False)
                continue
            row.disturbed += busy > FOREIGN_LIMIT
            row.rounds.append(said["taken"])
            row.versions, row.prompt_tokens = said["versions"], said["lengths"]
    return rows


def ratios(row: Row, first: Row, column: str) -> list[float]:
    """Of `row` to `first`, round by round."""
    pairs = zip(row.rounds, first.rounds, strict=False)
    return [one[column] / other[column] for one, other in pairs if one.get(column) and other.get(column)]


def table_of(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title, unit, _ in COLUMNS.values():
        table.add_column(f"{title}\n{unit}", justify="right")
    for row in rows:
        if not row.rounds:
            table.add_row(row.title, "not possible")
            continue
        cells = []
        for column in COLUMNS:
            values = [taken[column] for taken in row.rounds if column in taken]
            cells.append(_spread(values) if values else "–")
        table.add_row(row.title, *cells)
        if row is not rows[0] and rows[0].rounds:
            compared = [ratios(row, rows[0], column) for column in COLUMNS]
            table.add_row(f"  / {rows[0].title}", *(f"{statistics.median(v):.2f}×" if v else "" for v in compared), style="dim")
    return table


def _spread(values: Sequence[float]) -> str:
    digits = 1 if statistics.median(values) < 100 else 0
    return f"{statistics.median(values):,.{digits}f}\n{min(values):,.{digits}f}–{max(values):,.{digits}f}"


def plot(rows: Sequence[Row], title: str, file: Path) -> None:
    """Bars of the medians with their spread, a panel a column."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.rounds]
    figure, axes = plt.subplots(3, 4, figsize=(15, 9), layout="constrained")
    for axis, (column, (name, unit, more)) in zip(axes.flat, COLUMNS.items(), strict=True):
        for place, row in enumerate(shown):
            values = [taken[column] for taken in row.rounds if column in taken]
            if not values:
                continue
            median = statistics.median(values)
            spread = [[median - min(values)], [max(values) - median]]
            axis.barh(place, median, xerr=spread, color="#1f6feb" if place == 0 else "#9aa4b2", capsize=3)
            axis.text(max(values), place, f" {median:,.{1 if median < 100 else 0}f}", va="center", fontsize=8)
        titles = [row.title for row in shown] if axis in axes[:, 0] else [""] * len(shown)
        axis.set_yticks(range(len(shown)), titles, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set_title(f"{name}, {unit} ({'more' if more else 'less'} is better)", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="EdgeVLM beside what people would use instead, on this machine.")
    parser.add_argument("--shape", choices=SHAPES, default="llava-0.5b")
    parser.add_argument("--side", type=int, help="pixels of a picture's side (default: the shape's)")
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=list(PEERS), help="others are compared with the first")
    parser.add_argument("--prompt-tokens", type=int, help="of the question, with its picture (default: that and 40)")
    parser.add_argument("--context", type=int, default=1_500, help="tokens of the long question (default: 1500)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each answer (default: 64)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("build/peers"), help="default: build/peers")
    parser.add_argument("--output", type=Path, help="where the results go (default: the work folder)")
    args = parser.parse_args()
    args.work = args.work.resolve()
    side = args.side or SHAPES[args.shape][2]
    args.prompt_tokens = args.prompt_tokens or places_of(SHAPES[args.shape][0], side) + 40
    console = Console()
    rows = measure(args, Console(stderr=True))
    bandwidth, float32 = measure_machine()
    name = f"peers-{args.shape}" + (f"-{side}" if args.side else "")
    title = f"{args.shape}, pictures of {side} pixels, {args.threads} threads, {args.rounds} rounds"
    console.width = max(console.width, 210)
    console.print(title)
    console.print(table_of(rows))
    for row in rows:
        versions = ", ".join(f"{package} {version}" for package, version in row.versions.items())
        if row.failed:
            console.print(f"{row.title}: not possible: {row.failed}", style="dim")
            continue
        note = f"; {row.disturbed} rounds disturbed" if row.disturbed else ""
        console.print(f"{row.title}: {versions}; prompts of {list(row.prompt_tokens.values())} tokens{note}", style="dim")
    console.print(f"the machine: {bandwidth / 1e9:.1f} GB/s, {float32 / 1e9:,.0f} GFLOPS in float32")
    output: Path = args.output or args.work
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "shape": args.shape, "side": side, "threads": args.threads, "new_tokens": args.new_tokens,
        "machine": {"bandwidth": bandwidth, "float32": float32, "processor": _processor()},
        "peers": [asdict(row) for row in rows],
    }  # fmt: skip
    (output / f"{name}.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    plot(rows, title, output / f"{name}.png")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
