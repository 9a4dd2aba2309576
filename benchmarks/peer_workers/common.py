"""What the workers of all peers have in common. Standard library and Pillow only: it runs in every peer's environment.

A worker is `python -m peer_workers.NAME` with

- `install`: does what pip cannot,
- `prepare CHECKPOINT DECODER OUTPUT`: makes of a Hugging Face checkpoint what the peer runs (`DECODER` is its language model
  alone),
- `run`: answers on standard output, one JSON object a line, what it is asked on standard input: first the settings, then jobs,
  until the input ends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO


@dataclass(frozen=True)
class Settings:
    """`folder` is what was prepared. `capacity` in tokens."""

    folder: str
    threads: int
    capacity: int


@dataclass(frozen=True)
class Job:
    """`prompt` is `before`, the picture, `after`; `question` is what of it a person wrote. `picture` is a file, or empty, and
    `mark` stands for it in a prompt."""

    question: str
    before: str
    mark: str
    after: str
    picture: str
    new_tokens: int

    @property
    def prompt(self) -> str:
        return self.before + self.mark + self.after


@dataclass(frozen=True)
class Answer:
    """Times in ms, rates in tokens a second; None is what the peer does not tell."""

    first_token: float
    tokens_per_second: float | None
    vision: float | None = None
    prefill: float | None = None
    prompt_tokens: int | None = None
    tokens: int = 0


class Peer(Protocol):
    #: Whether it answers about pictures.
    sees: bool
    #: Name → version
    versions: dict[str, str]

    def ask(self, job: Job) -> Answer: ...

    def peak(self) -> int:
        """Bytes that it held at most, resident."""

    def close(self) -> None: ...


class Clock:
    """When each token came."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.times: list[float] = []

    def tick(self) -> None:
        self.times.append(time.perf_counter())

    @property
    def first(self) -> float:
        """ms"""
        return 1e3 * (self.times[0] - self.began)

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first."""
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def call(*command: str | Path, **variables: str) -> None:
    """Runs a tool; where it fails, what it said last is what this process says last."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        sys.exit((done.stdout + done.stderr).strip() or f"{command[0]} failed without a word")


def peak_of(process: int | str = "self") -> int:
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


def main(
    prepare: Callable[[Path, Path, Path], None],
    load: Callable[[Settings], Peer],
    install: Callable[[], None] = lambda: None,
) -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    for name in ("checkpoint", "decoder", "output"):
        preparing.add_argument(name, type=Path)
    commands.add_parser("install")
    commands.add_parser("run")
    args = parser.parse_args()
    if args.command == "install":
        install()
    elif args.command == "prepare":
        prepare(args.checkpoint, args.decoder, args.output)
    else:
        _serve(load)


def _serve(load: Callable[[Settings], Peer]) -> None:
    # Libraries print what they like; answers have a channel of their own.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    settings = Settings(**json.loads(sys.stdin.readline()))
    began = time.perf_counter()
    peer = load(settings)
    try:
        _say(channel, {"load": time.perf_counter() - began, "sees": peer.sees, "versions": peer.versions})
        for line in sys.stdin:
            _say(channel, {**asdict(peer.ask(Job(**json.loads(line)))), "peak": peer.peak()})
    finally:
        peer.close()


def _say(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()
