"""Trains the models that EdgeVLM ships as demos, or scores them.

    python tools/train_demo --model llava    --work build/demo
    python tools/train_demo --model internvl --work build/demo
    python tools/train_demo --model internvl --score --aspect square wide tall

demo/llava comes first: the others begin with parts of it, or of demo/internvl, which begins with it. A run that was
stopped goes on where it was. What a model learns in which stage, and why, is told in its own file.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch.multiprocessing
from common import Trainer, worker

from edgevlm.scenes import ASPECTS

MODELS = {
    "llava": "Llava",
    "blip2": "Blip2",
    "flamingo": "Flamingo",
    "internvl": "InternVL",
    "qwen2-vl": "Qwen2VL",
    "qwen-vl": "QwenVLTrainer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="llava")
    parser.add_argument("--work", default="build/demo", help="pictures, shared by all; checkpoint and log in a folder a model")
    parser.add_argument("--output", help="the finished Hugging Face folder (default: edgevlm/assets/demo/MODEL)")
    parser.add_argument("--llava", default="edgevlm/assets/demo/llava", help="the LLaVA whose parts the others begin with")
    parser.add_argument("--internvl", default="edgevlm/assets/demo/internvl", help="the same, for the two of the Qwen kind")
    parser.add_argument("--pictures", type=int, default=48_000)
    parser.add_argument("--views", type=int, default=12_000, help="wide pictures, and as many tall ones")
    parser.add_argument("--validation", type=int, default=150)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--port", type=int, default=29_511, help="loopback port on which the processes meet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of each stage's steps, to try the script out")
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--score", action="store_true", help="score the folder at --output with transformers instead")
    scoring.add_argument("--split", choices=("validation", "test"), default="test")
    scoring.add_argument("--questions", type=int, default=1000)
    scoring.add_argument("--aspect", choices=ASPECTS, nargs="+", default=["square"], help="of the pictures")
    scoring.add_argument("--shots", type=int, nargs="+", default=[0], help="worked examples before each question (Flamingo)")
    arguments = parser.parse_args()
    arguments.output = arguments.output or f"edgevlm/assets/demo/{arguments.model}"
    if arguments.score:
        from score import score

        score(arguments)
        return
    kind: type[Trainer] = getattr(importlib.import_module(arguments.model.replace("-", "_")), MODELS[arguments.model])
    Path(arguments.work).mkdir(parents=True, exist_ok=True)
    kind.draw_pictures(arguments)
    if arguments.processes == 1:
        worker(0, kind, arguments)
    else:
        torch.multiprocessing.spawn(worker, (kind, arguments), arguments.processes)  # type: ignore[attr-defined, no-untyped-call]


if __name__ == "__main__":
    main()
