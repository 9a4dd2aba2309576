"""onnxruntime-genai: its builder's INT4 of the language model in blocks of 32, for processors. Text alone: the builder has no
LLaVA, so pictures are as many words."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from peer_workers.common import Answer, Clock, Job, Settings, call, main, peak_of

TITLE = "onnxruntime-genai, INT4 (text only)"
REQUIREMENTS = ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "transformers==5.24.0", "onnx", "onnx-ir")


def prepare(checkpoint: Path, decoder: Path, output: Path) -> None:
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    options = ["-p", "int4", "-e", "cpu", "-c", output.with_suffix(".cache"), "--extra_options", "int4_block_size=32"]
    call(*builder, "-i", decoder, "-o", output, *options)


class GenAI:
    sees = False

    def __init__(self, settings: Settings) -> None:
        import onnxruntime_genai

        self.genai, self.capacity = onnxruntime_genai, settings.capacity
        config = onnxruntime_genai.Config(settings.folder)
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": settings.threads}}}}
        config.overlay(json.dumps(options))
        self.model = onnxruntime_genai.Model(config)
        self.tokenizer = onnxruntime_genai.Tokenizer(self.model)
        self.versions = {"onnxruntime-genai": version("onnxruntime-genai")}

    def ask(self, job: Job) -> Answer:
        clock = Clock()
        tokens = self.tokenizer.encode(job.prompt)
        params = self.genai.GeneratorParams(self.model)
        length = len(tokens) + job.new_tokens
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self.genai.Generator(self.model, params)
        generator.append_tokens(tokens)
        for _ in range(job.new_tokens):
            generator.generate_next_token()
            clock.tick()
        return Answer(
            first_token=clock.first, tokens_per_second=clock.rate, prefill=clock.first, prompt_tokens=len(tokens),
            tokens=len(clock.times),
        )  # fmt: skip

    def peak(self) -> int:
        return peak_of()

    def close(self) -> None:
        del self.model


if __name__ == "__main__":
    main(prepare, GenAI)
