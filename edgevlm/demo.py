"""`edgevlm demo`: the whole path on the shipped models, from checkpoint to scores, in a few minutes on two cores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bundle import MANIFEST, Bundle
from .errors import InputError, OutputError
from .evaluation.scene_scores import Score, blind_answers, score_answers, score_scenes
from .export.checkpoint import ASSETS
from .export.export import export_bundle
from .quant.quantize import quantize_bundle
from .scenes import KINDS, Question, heldout_questions, render_scene, sample_scene
from .speed import measure_speed
from .tables import print_report
from .verify import verify_bundle
from .vlm import VLM

__all__ = ["MODELS", "run_demo"]

#: Shipped models that were taught scenes of every aspect; the others take square ones.
ANY_ASPECT = ("internvl", "qwen-vl", "qwen2-vl")
MODELS = tuple(
    name for name in ("llava", "blip2", "flamingo", *ANY_ASPECT) if (ASSETS / "demo" / name / "config.json").is_file()
)
#: The float bundle, and recipes: `int4` is calibrated on training scenes, `int4-rtn` rounds to nearest.
BUNDLES = ("float", "int8", "int4", "int4-rtn")
SCENE = 11_000_067
QUESTIONS = ("How many balls are there?", "Is the red ball left of the yellow star?", "Describe the scene.")
SHOTS = (0, 4, 8)


def run_demo(output: Path, questions: int, console: Any, models: Sequence[str] = MODELS) -> None:
    """Exports, quantizes, verifies, asks and scores; leaves bundles, the picture and `summary.json` in `output`.

    Raises InputError for a model that is not shipped, OutputError where `output` holds something else.
    """
    from rich.progress import Progress
    from rich.table import Table

    unknown = [name for name in models if name not in MODELS]
    if unknown or not models:
        raise InputError(f"The shipped models are {', '.join(MODELS)}; {', '.join(unknown) or 'none'} was asked for.")
    _clear(output, models)
    folders = {(name, kind): output / f"{name}-{kind}" for name in models for kind in BUNDLES}
    console.print(f"[bold]1. Export[/] {', '.join(f'demo/{name}' for name in models)} to ONNX and quantize them")
    for name in models:
        export_bundle(f"demo/{name}", folders[name, "float"])
        for kind in BUNDLES[1:]:
            quantize_bundle(folders[name, "float"], folders[name, kind], kind)

    console.print("\n[bold]2. Verify[/] the float bundles against PyTorch")
    reports = {name: verify_bundle(folders[name, "float"], f"demo/{name}") for name in models}
    for report in reports.values():
        print_report(report, console)

    console.print("\n[bold]3. Ask[/] about a scene (milliseconds to the first token)")
    picture = render_scene(sample_scene(SCENE), 336)
    picture.save(output / "scene.png")
    for name in models:
        vlm = VLM.load(folders[name, "int4"])
        for text in QUESTIONS:
            reply = vlm.generate(text, images=[picture])
            console.print(f"   {name:<9} {text}  [bold]{reply.text.strip()}[/]   ({reply.timings.first_token:.0f} ms)")
    example = folders[models[0], "int4"]
    console.print(f"   The picture is {output / 'scene.png'}; ask more: edgevlm run {example} --image … --prompt …")

    console.print(f"\n[bold]4. Score[/] each on {questions} questions about scenes that no training has seen")
    heldout = list(heldout_questions(questions))
    stretched = [question for aspect in ("wide", "tall") for question in heldout_questions(questions // 2, aspect=aspect)]
    scores: dict[str, Score] = {"blind": score_answers(blind_answers(heldout))}
    aspects: dict[str, Score] = {"blind": _blind_aspects(questions // 2)}
    few_shot: dict[int, Score] = {}
    with Progress(console=console, transient=True) as bars:

        def score(folder: Path, title: str, shots: int = 0, asked: Any = heldout) -> Score:
            task = bars.add_task(title, total=len(asked))
            return score_scenes(VLM.load(folder), asked, shots=shots, step=lambda: bars.advance(task))

        for (name, kind), folder in folders.items():
            scores[f"{name} {kind}"] = score(folder, f"{name} {kind}")
            if name in ANY_ASPECT:
                aspects[f"{name} {kind}"] = score(folder, f"{name} {kind}, wide and tall", asked=stretched)
        if "flamingo" in models:
            few_shot[0] = scores["flamingo float"]
            for shots in SHOTS[1:]:
                few_shot[shots] = score(folders["flamingo", "float"], f"flamingo, {shots} shots", shots)
    console.print(_score_table("square scenes, %", scores, Table))
    if len(aspects) > 1:
        console.print(f"\n   {len(stretched)} questions about wide and tall scenes, 1.5 to 3 times as long as broad")
        console.print(_score_table("wide and tall, %", aspects, Table))
    if few_shot:
        shown = ", ".join(f"{shots} shots {result.percent():.1f} %" for shots, result in few_shot.items())
        console.print(f"   Flamingo, float, with examples before the question: {shown}")

    console.print("\n[bold]5. Side by side[/] on this machine (medians; the machine may be busy with other things)")
    speeds = measure_speed({f"{name} {kind}": folder for (name, kind), folder in folders.items()})
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("", "visual tokens", "weights MB", "exact match", "wide, tall", "vision ms", "prefill ms", "first token ms")
    for column in (*columns, "tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    for (name, kind), folder in folders.items():
        size = sum(part.size for part in Bundle.open(folder, check_files=False).manifest.parts.values()) / 1e6
        s, title = speeds[f"{name} {kind}"], f"{name} {kind}"
        stretch = f"{aspects[title].percent():.1f} %" if title in aspects else "–"
        table.add_row(
            title, f"{s['visual_tokens']:.0f}", f"{size:.2f}", f"{scores[title].percent():.1f} %", stretch,
            f"{s['vision']:.1f}", f"{s['prefill']:.1f}", f"{s['first_token']:.1f}", f"{s['tokens_per_second']:.0f}",
        )  # fmt: skip
    console.print(table)

    def percent(found: dict[str, Score]) -> dict[str, dict[str, float]]:
        return {name: {k: score.percent(k) for k in KINDS} | {"all": score.percent()} for name, score in found.items()}

    summary = {
        "scores": percent(scores),
        "wide_and_tall": percent(aspects),
        "few_shot": {str(shots): result.percent() for shots, result in few_shot.items()},
        "speed": speeds,
        "parity": {name: report.to_dict() for name, report in reports.items()},
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _clear(output: Path, models: Sequence[str]) -> None:
    """Only what an earlier demo left is replaced."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; give a folder as --output.")
    for folder in (output / f"{name}-{kind}" for name in models for kind in BUNDLES):
        if folder.exists() and not (folder / MANIFEST).is_file():
            raise OutputError(f"{folder} exists and is no bundle. Give another --output.")
        shutil.rmtree(folder, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)


def _blind_aspects(questions: int) -> Score:
    """What a model without eyes would reach on wide and tall scenes, half of each."""
    pairs: list[tuple[Question, str]] = []
    for aspect in ("wide", "tall"):
        pairs += blind_answers(heldout_questions(questions, aspect=aspect), aspect=aspect)
    return score_answers(pairs)


def _score_table(title: str, scores: dict[str, Score], table_class: Any) -> Any:
    table = table_class(box=None, pad_edge=False, header_style="bold")
    table.add_column(title)
    for kind in (*KINDS, "all"):
        table.add_column(kind, justify="right")
    for name, score in scores.items():
        table.add_row(name, *(f"{score.percent(kind):.1f}" for kind in KINDS), f"[bold]{score.percent():.1f}")
    return table
