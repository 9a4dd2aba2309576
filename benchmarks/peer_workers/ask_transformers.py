"""transformers in bfloat16 with torch's scaled_dot_product_attention."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peer_workers.common import Answer, Clock, Job, Settings, main, peak_of

TITLE = "transformers, bf16"
REQUIREMENTS = ("transformers==5.24.0", "pillow", "accelerate")


def prepare(checkpoint: Path, decoder: Path, output: Path) -> None:
    output.symlink_to(checkpoint.resolve(), target_is_directory=True)


class Transformers:
    sees, compiled = True, False

    def __init__(self, settings: Settings) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        torch.set_num_threads(settings.threads)
        self.torch = torch
        self.processor = AutoProcessor.from_pretrained(settings.folder)
        self.model = AutoModelForImageTextToText.from_pretrained(settings.folder, dtype=torch.bfloat16).eval()
        self.model.generation_config.eos_token_id = None
        self.options: dict[str, Any] = {"do_sample": False}
        if self.compiled:
            from transformers import CompileConfig, StaticCache

            config = CompileConfig(fullgraph=False, mode="default", dynamic=False)
            config._compile_all_devices = True  # what otherwise is for accelerators alone
            # One cache for all questions: another size would be compiled anew.
            cache = StaticCache(config=self.model.config.get_text_config(), max_cache_len=settings.capacity)
            self.options |= {"past_key_values": cache, "compile_config": config}
        self.began = self.seen = 0.0
        tower = next(module for name, module in self.model.named_modules() if name.endswith(("vision_tower", "visual")))
        tower.register_forward_pre_hook(lambda *_: setattr(self, "began", time.perf_counter()))
        tower.register_forward_hook(lambda *_: setattr(self, "seen", 1e3 * (time.perf_counter() - self.began)))
        self.versions = {name: version(name) for name in ("transformers", "torch")}

    def ask(self, job: Job) -> Answer:
        from PIL import Image

        picture = Image.open(job.picture).convert("RGB") if job.picture else None
        clock, self.seen = Clock(), 0.0
        text = job.prompt
        if picture is None:
            inputs = self.processor.tokenizer(text, return_tensors="pt")
        else:
            inputs = self.processor(images=[picture], text=text, return_tensors="pt")
            inputs["pixel_values"] = inputs["pixel_values"].to(self.torch.bfloat16)

        class Streamer:
            prompt = True

            def put(self, tokens: Any) -> None:
                if not self.prompt:
                    clock.tick()
                self.prompt = False

            def end(self) -> None: ...

        with self.torch.inference_mode():
            if self.compiled:
                self.options["past_key_values"].reset()
            self.model.generate(**inputs, max_new_tokens=job.new_tokens, streamer=Streamer(), **self.options)
        return Answer(
            first_token=clock.first, tokens_per_second=clock.rate, vision=self.seen, prefill=clock.first - self.seen,
            prompt_tokens=inputs["input_ids"].shape[1], tokens=len(clock.times),
        )  # fmt: skip

    def peak(self) -> int:
        return peak_of()

    def close(self) -> None:
        del self.model


if __name__ == "__main__":
    main(prepare, Transformers)
