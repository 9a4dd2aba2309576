"""On a machine with a GPU: the shipped models on each backend, against the CPU: same answers, and how fast.

    python benchmarks/gpu.py [--models llava,blip2] [--backends tensorrt,cuda] [--questions 20] [--rounds 5] [--output gpu.json]

Every model is exported (FP32), engines are built for the GPU that is here, then each backend answers the same questions about
drawn scenes: tokens and the first token's logits are compared with the CPU's, and the backends are timed in turn, a new
picture each time. A backend that cannot run is a row that says why. Nothing here was run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.demo import MODELS
from edgevlm.engines.build import build_engines
from edgevlm.engines.target import local_gpu
from edgevlm.errors import EdgeVLMError
from edgevlm.export.export import export_bundle
from edgevlm.scenes import ask_all, render_scene, sample_scene
from edgevlm.vlm import VLM

REFERENCE = "cpu"
_FIRST_SCENE = 11_950_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--backends", default="tensorrt,cuda")
    parser.add_argument("--precision", default="fp16", help="of the engines")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    gpu = local_gpu()
    result: dict[str, Any] = {"gpu": gpu.name if gpu else None, "capability": gpu.capability if gpu else None, "models": {}}
    for name in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            result["models"][name] = measure(name, Path(folder) / "bundle", arguments)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.output}")
    return 0


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    export_bundle(f"demo/{name}", folder)
    backends, rows = arguments.backends.split(","), {}
    loaded: dict[str, VLM] = {REFERENCE: VLM.load(folder, backend=REFERENCE)}
    for backend in backends:
        try:
            if backend == "tensorrt":
                build_engines(folder, "local", precision=arguments.precision)
            loaded[backend] = VLM.load(folder, backend=backend)
        except EdgeVLMError as exc:
            rows[backend] = {"cannot": str(exc)}
            print(f"{name} {backend}: {exc}")
    answers = {backend: [ask(vlm, number) for number in range(arguments.questions)] for backend, vlm in loaded.items()}
    times: dict[str, list[Any]] = {backend: [] for backend in loaded}
    for number in range(arguments.rounds):
        for backend, vlm in loaded.items():  # in turn, so that all see the same weather
            times[backend].append(ask(vlm, arguments.questions + number).timings)
    for backend, vlm in loaded.items():
        same = [a.tokens == b.tokens for a, b in zip(answers[backend], answers[REFERENCE], strict=True)]
        rows[backend] = {
            "same answers": float(np.mean(same)),
            **{
                what: spread([getattr(t, what) for t in times[backend]])
                for what in ("vision", "prefill", "first_token", "tokens_per_second")
            },
        }
        print(name, backend, json.dumps(rows[backend]))
        vlm.close()
    return rows


def ask(vlm: VLM, number: int) -> Any:
    """About a scene of its own."""
    scene = sample_scene(_FIRST_SCENE + number)
    return vlm.generate(ask_all(scene)[0].text, images=[render_scene(scene)], max_new_tokens=32)


def spread(values: list[float]) -> list[float]:
    """Least, median, most."""
    return [round(f(values), 3) for f in (min, statistics.median, max)]


if __name__ == "__main__":
    raise SystemExit(main())
