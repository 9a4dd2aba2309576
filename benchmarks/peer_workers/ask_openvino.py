"""OpenVINO GenAI: the language model in INT4 in blocks of 32, the rest as optimum-intel compresses it (INT8 weights)."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from peer_workers.common import Answer, Job, Settings, call, main, peak_of

TITLE = "OpenVINO GenAI, INT4"
#: Newer transformers are refused for Qwen2-VL.
REQUIREMENTS = ("optimum-intel[openvino]==2.2.0", "openvino-genai==2026.4.1.0", "transformers==5.0.0", "pillow")
#: It wants torchvision, which has no build for processors alone and fails on import; nothing here needs it.
UNWANTED = ("torchvision",)


def prepare(checkpoint: Path, decoder: Path, output: Path) -> None:
    tool = Path(sys.executable).parent / "optimum-cli"
    options = ["--weight-format", "int4", "--group-size", "32", "--sym", "--ratio", "1.0"]
    call(tool, "export", "openvino", "-m", checkpoint, "--task", "image-text-to-text", *options, output)


class OpenVINO:
    sees = True

    def __init__(self, settings: Settings) -> None:
        import openvino_genai

        self.genai = openvino_genai
        self.pipe = openvino_genai.VLMPipeline(settings.folder, "CPU", INFERENCE_NUM_THREADS=settings.threads)
        self.versions = {"openvino-genai": version("openvino-genai")}

    def ask(self, job: Job) -> Answer:
        import numpy as np
        import openvino
        from PIL import Image

        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = job.new_tokens, True, False
        config.apply_chat_template = False
        extra = {}
        if job.picture:
            extra["images"] = [openvino.Tensor(np.array(Image.open(job.picture).convert("RGB"))[None])]
        metrics = self.pipe.generate(job.prompt, generation_config=config, **extra).perf_metrics
        first, vision = metrics.get_ttft().mean, metrics.get_prepare_embeddings_duration().mean
        rate = 1e3 / metrics.get_tpot().mean if job.new_tokens > 1 else None
        return Answer(
            first_token=first, tokens_per_second=rate, vision=vision, prefill=first - vision,
            prompt_tokens=metrics.get_num_input_tokens(), tokens=metrics.get_num_generated_tokens(),
        )  # fmt: skip

    def peak(self) -> int:
        return peak_of()

    def close(self) -> None:
        del self.pipe


if __name__ == "__main__":
    main(prepare, OpenVINO)
