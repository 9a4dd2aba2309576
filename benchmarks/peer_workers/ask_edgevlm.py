"""EdgeVLM, as it comes: the recipe `int4-rtn`, no options."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from peer_workers.common import Answer, Job, Settings, call, main, peak_of

TITLE = "EdgeVLM, INT4"
#: Nothing: it runs where the benchmark runs.
REQUIREMENTS: tuple[str, ...] = ()


def prepare(checkpoint: Path, decoder: Path, output: Path) -> None:
    edgevlm = [sys.executable, "-m", "edgevlm"]
    call(*edgevlm, "export", "--model", checkpoint, "--quantize", "int4-rtn", "--output", output)


class EdgeVLM:
    sees = True

    def __init__(self, settings: Settings) -> None:
        from edgevlm.vlm import VLM

        self.vlm = VLM.load(settings.folder, capacity=settings.capacity, threads=settings.threads)
        self.versions = {name: version(name) for name in ("edgevlm", "onnxruntime")}

    def ask(self, job: Job) -> Answer:
        from PIL import Image

        pictures = [Image.open(job.picture).convert("RGB")] if job.picture else []
        reply = self.vlm.generate(job.question, images=pictures, max_new_tokens=job.new_tokens, ignore_stop=True)
        times = reply.timings
        return Answer(
            first_token=times.first_token, tokens_per_second=times.tokens_per_second if job.new_tokens > 1 else None,
            vision=times.vision, prefill=times.prefill, prompt_tokens=times.prompt_tokens, tokens=job.new_tokens,
        )  # fmt: skip

    def peak(self) -> int:
        return peak_of()

    def close(self) -> None:
        self.vlm.close()


if __name__ == "__main__":
    main(prepare, EdgeVLM)
