"""The command line: arguments in, library calls, tables and exit codes out. It computes nothing itself.

Exit codes: 0 done; 1 `verify` found a limit missed, or `plan` that it does not fit; 2 the request cannot be served as it stands
(the text says what to do); 3 a bug in EdgeVLM; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .bundle import Bundle
from .errors import EdgeVLMError, InputError, MissingDependencyError
from .tables import describe_box, describe_picture, describe_seen, make_console, print_engines, print_parts, print_report

__all__ = ["build_parser", "main"]


#: Set by Ctrl-C. The exception alone may be lost: Python prints and drops one that is raised inside a finaliser or the callback
#: of a weak reference, of which torch's tracer has many.
_interrupted = threading.Event()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        with _noting_interrupts():
            return int(arguments.command(arguments))
    except EdgeVLMError as exc:
        return _fail(arguments, 2, f"error: {exc}")
    except KeyboardInterrupt:
        return _fail(arguments, 130, _interruption(arguments))
    except BrokenPipeError:  # the reader (`head`, a closed pager) has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at exit
        return 0
    except Exception as exc:  # the last resort: a bug, reported as one
        if _interrupted.is_set():
            return _fail(arguments, 130, _interruption(arguments))
        return _fail(arguments, 3, f"internal error: {type(exc).__name__}: {exc}. This is a bug; --debug shows where.")


def _interruption(arguments: argparse.Namespace) -> str:
    return f"interrupted; {getattr(arguments, 'left', 'nothing was left behind')}"


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[None]:
    _interrupted.clear()
    before = signal.getsignal(signal.SIGINT)
    # Whoever has another handler, or runs this in a thread, decides for itself.
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: Any) -> None:
        _interrupted.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop_if_interrupted() -> None:
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _fail(arguments: argparse.Namespace, code: int, text: str) -> int:
    if arguments.debug:
        traceback.print_exc()
    print(f"edgevlm {arguments.name}: {text}", file=sys.stderr)
    return code


# ------------------------------------------------------------------------------------------- arguments


def build_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    from .quant.recipe import RECIPES

    recipes = ", ".join(RECIPES)
    parser = argparse.ArgumentParser(
        prog="edgevlm", description="Vision-language models from Hugging Face checkpoints to robots.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"edgevlm {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(command=function)
        return sub

    sub = command("export", _export, "Turn a Hugging Face checkpoint into a bundle.")
    sub.add_argument(
        "--model",
        required=True,
        help="alias (llava, blip2, flamingo, internvl, qwen-vl), Hub id, local folder, or shipped model (demo/llava)",
    )
    sub.add_argument("--output", required=True, type=Path, help="the bundle's folder")
    sub.add_argument("--dtype", default="fp32", choices=("fp32", "fp16"), help="what the graphs compute in (default: fp32)")
    sub.add_argument("--quantize", metavar="RECIPE", help=f"{recipes}, or a recipe file; quantizes on the way")
    _add_calibration(sub)
    sub.add_argument("--kv-cache", choices=("float", "int8"), help="what keys and values are kept in (default: the recipe's)")
    sub.add_argument("--force", action="store_true", help="replace a bundle that exists")

    sub = command("convert", _convert, "Turn pickled weights, as they are published, into a checkpoint that export takes.")
    sub.add_argument("--model", help="a checkpoint with pickled weights (Qwen-VL's are): alias, Hub id or folder")
    sub.add_argument("--weights", type=Path, help="OpenFlamingo's published state dict: checkpoint.pt, or safetensors")
    sub.add_argument("--vision", metavar="MODEL", help="folder or Hub id of the CLIP tower that these were trained on")
    sub.add_argument("--language", metavar="MODEL", help="folder or Hub id of their language model, Llama or MPT")
    sub.add_argument("--output", required=True, type=Path, help="the new checkpoint's folder")
    sub.add_argument(
        "--cross-attn-every-n-layers", type=int, metavar="N", help="compared with what follows from the weights, if given"
    )
    sub.add_argument(
        "--vision-post-layernorm", action="store_true", help="the weights were trained with open_clip 2.23 or newer"
    )

    sub = command("quantize", _quantize, "Make a quantized bundle from a float one (no torch needed).")
    sub.add_argument("bundle", type=Path, help="a float bundle")
    sub.add_argument("--recipe", required=True, help=f"{recipes}, or a recipe file (.toml, .json)")
    _add_calibration(sub)
    sub.add_argument("--kv-cache", choices=("float", "int8"), help="what keys and values are kept in (default: the recipe's)")
    sub.add_argument("--output", required=True, type=Path, help="the new bundle's folder")
    sub.add_argument("--force", action="store_true", help="replace a bundle that exists")

    sub = command("verify", _verify, "Compare a bundle with the PyTorch model it came from.")
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--against", required=True, metavar="MODEL", help="the checkpoint, as for export --model")
    sub.add_argument("--json", action="store_true", help="print the report as JSON")

    sub = command("build", _build, "Make TensorRT engines of a bundle's parts, for a GPU that need not be there.")
    sub.add_argument("bundle", type=Path)
    sub.add_argument(
        "--target", required=True, metavar="T",
        help="rtx-4090 and other RTX cards, rtx (30, 40 and 50 series in one plan), orin-nano-8gb and other Jetsons, or local",
    )  # fmt: skip
    sub.add_argument("--precision", default="fp16", metavar="P", help="what engines compute in: fp16 (default), bf16 or fp32")
    sub.add_argument(
        "--capacity", type=int, metavar="N",
        help="longest sequence in tokens, prompt and answer (default: the model's context length, at most 4096)",
    )  # fmt: skip
    sub.add_argument(
        "--max-visual-tokens", type=int, metavar="N",
        help="most tokens that a picture may take (default: what the bundle's preprocessing makes, within the capacity)",
    )  # fmt: skip
    sub.add_argument("--parts", metavar="A,B", help="these parts alone (default: all)")
    sub.add_argument("--force", action="store_true", help="try even where the memory is predicted not to suffice")
    sub.add_argument("--rebuild", action="store_true", help="build parts anew whose engines are up to date")

    sub = command("run", _run, "Ask a bundle about pictures.")
    sub.add_argument("bundle", type=Path)
    sub.add_argument(
        "--image", action="append", default=[], type=Path, metavar="PATH", help="a picture; may be given several times"
    )
    sub.add_argument(
        "--video", action="append", default=[], type=Path, metavar="PATH",
        help="a film, for models that take one: a folder of frames, or a file with several (GIF, WebP)",
    )  # fmt: skip
    sub.add_argument("--fps", type=float, default=2.0, metavar="N", help="frames a second of the films (default: 2)")
    sub.add_argument("--prompt", required=True, help="the question")
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    sub.add_argument("--temperature", type=float, metavar="T", help="sample at this temperature; greedy without")
    sub.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest tokens that reach P together")
    sub.add_argument("--seed", type=int, metavar="S", help="seed of the sampling")
    sub.add_argument("--capacity", type=int, metavar="N", help="longest sequence in tokens, prompt and answer")
    sub.add_argument("--max-tiles", type=int, metavar="N", help="most tiles that a picture is cut into")
    sub.add_argument("--visual-tokens", type=int, metavar="N", help="most tokens that a picture or film may take")
    sub.add_argument(
        "--backend", help="tensorrt, cuda or cpu for every part, or part=name,part=name; the best that works without"
    )
    sub.add_argument("--threads", type=int, metavar="N", help="cores to use")
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of the stream")

    sub = command("eval", _eval, "Ask bundles and models the same questions, score their answers, and compare them.")
    sub.add_argument(
        "subjects", nargs="+", metavar="BUNDLE|MODEL", help="bundles, and models as for export --model, side by side"
    )
    sub.add_argument(
        "--suite", required=True, metavar="S",
        help="scenes or pope-scenes (drawn), pope:FILE, vqa:FILE or captions:FILE (as published), or a .jsonl file of your own",
    )  # fmt: skip
    _add_suite(sub)
    sub.add_argument(
        "--output", type=Path, default=Path("build/eval"),
        help="a folder for each suite, with answers, results.json and report.html; a later run with the same goes on "
        "(default: build/eval)",
    )  # fmt: skip
    sub.add_argument("--force", action="store_true", help="throw away the answers that are there, and begin anew")
    sub.add_argument(
        "--backend",
        help="tensorrt, cuda or cpu for every part of the bundles, or part=name,part=name; the best that works without",
    )
    sub.add_argument("--threads", type=int, metavar="N", help="cores to use (with --engine ray: each worker)")
    sub.add_argument("--engine", choices=("local", "ray"), default="local", help="where the work is done (default: local)")
    sub.add_argument("--ray-address", metavar="HOST:PORT", help="a Ray cluster (default: RAY_ADDRESS, else this machine)")
    sub.add_argument("--workers", type=int, metavar="N", help="of Ray on this machine (default: one for every --threads cores)")
    sub.add_argument("--json", action="store_true", help="print the results as JSON")

    sub = command("tune", _tune, "Find the smallest or fastest recipe that costs no more accuracy than allowed.")
    sub.add_argument("model", metavar="MODEL|BUNDLE", help="a float bundle, or a model as for export --model")
    sub.add_argument("--max-drop", type=float, default=1.0, metavar="POINTS", help="points that may be lost (default: 1.0)")
    sub.add_argument("--suite", default="scenes", metavar="S", help="what is asked, as for eval (default: scenes)")
    sub.add_argument("--target", choices=("size", "latency"), default="size", help="what is made small (default: size)")
    _add_suite(sub)
    _add_calibration(sub)
    sub.add_argument(
        "--backend", help="tensorrt, cuda or cpu for every part, or part=name,part=name; the best that works without"
    )
    sub.add_argument("--threads", type=int, metavar="N", help="cores to use")
    sub.add_argument(
        "--output", type=Path, default=Path("build/tune"),
        help="steps, recipe.toml, its bundle and tune.html; a later run with the same goes on (default: build/tune)",
    )  # fmt: skip
    sub.add_argument("--force", action="store_true", help="throw away the steps that are there, and begin anew")

    sub = command("plan", _plan, "Predict memory and speed on a device, from configuration files or a bundle's manifest.")
    sub.add_argument("model", metavar="MODEL|BUNDLE", help="a bundle, or a model as for export --model; weights are not needed")
    sub.add_argument("--target", metavar="T", help="a device (orin-nano-8gb, rtx-4090, …) or local (default: local)")
    sub.add_argument("--all-targets", action="store_true", help="a table of all devices instead")
    sub.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer together (default: 4096 at most)")
    sub.add_argument("--images", type=int, default=1, metavar="N", help="pictures in the prompt (default: 1)")
    sub.add_argument("--resolution", metavar="WxH", help="their size in pixels, for models that take any (default: 1280x960)")
    sub.add_argument("--visual-tokens", type=int, metavar="N", help="most tokens that a picture may take")
    sub.add_argument("--recipe", metavar="R", help=f"{recipes}, float, or a recipe file (default: float)")
    sub.add_argument("--kv-cache", choices=("float", "int8"), help="what keys and values are kept in (default: the recipe's)")
    sub.add_argument("--dtype", choices=("fp32", "fp16"), help="what it computes in (default: fp16; on local, fp32)")
    sub.add_argument("--plot", type=Path, metavar="FILE", help="draw memory against context (.png, .svg, .pdf)")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("inspect", _inspect, "Show what is in a bundle.")
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--weights", action="store_true", help="list the float weights instead, by the names that recipes use")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("bench", _bench, "Measure how fast a bundle answers here, and how near that is to what the machine can do.")
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--prompt-tokens", type=int, metavar="N", help="least length of the prompt, pictures included")
    sub.add_argument("--new-tokens", type=int, default=64, metavar="N", help="length of each answer (default: 64)")
    sub.add_argument("--images", type=int, default=1, metavar="N", help="new pictures in each question (default: 1)")
    sub.add_argument("--resolution", metavar="WxH", help="their size in pixels (default: what the model takes)")
    sub.add_argument("--rounds", type=int, default=5, metavar="N", help="questions that count (default: 5)")
    sub.add_argument("--backend", metavar="B", help="as for run")
    sub.add_argument("--threads", type=int, metavar="N", help="cores that each part may use (default: all)")
    sub.add_argument("--json", action="store_true", help="print the record as JSON")

    sub = command("doctor", _doctor, "Show what this machine offers, what is missing, and how to get it.")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("demo", _demo, "Export, quantize, verify and score the shipped models.")
    sub.add_argument(
        "--model", action="append", metavar="NAME", help="a shipped model, as llava; may be given several times (default: all)"
    )
    sub.add_argument("--output", type=Path, default=Path("build/demo"), help="where the bundles go (default: build/demo)")
    sub.add_argument("--questions", type=int, default=1000, help="held-out questions to score on (default: 1000)")
    return parser


def _add_suite(sub: argparse.ArgumentParser) -> None:
    """What is asked, and how, of commands that score answers."""
    sub.add_argument("--images", metavar="DIR", help="the folder of the pictures (default: that of the suite's file)")
    sub.add_argument("--annotations", metavar="FILE", help="the answers to vqa:FILE, where they are not beside it")
    sub.add_argument("--limit", type=int, metavar="N", help="the first N questions (default: all of a file, 1000 of the drawn)")
    sub.add_argument(
        "--instruction", metavar="TEXT",
        help="said behind every question on a line of its own, or around {question}; the prompt of a caption",
    )  # fmt: skip
    sub.add_argument("--metric", metavar="M", help="of a file of your own: exact (default), contains, pope, vqa or cider")
    sub.add_argument("--split", default="test", help="of the drawn suites: train, validation or test (default: test)")
    sub.add_argument("--aspect", default="square", help="of the drawn suites: square, wide or tall (default: square)")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: by suite)")
    sub.add_argument("--capacity", type=int, metavar="N", help="longest sequence in tokens, prompt and answer")
    sub.add_argument("--visual-tokens", type=int, metavar="N", help="most tokens that a picture may take")


def _add_calibration(sub: argparse.ArgumentParser) -> None:
    """What recipes that look at samples get to see."""
    sub.add_argument(
        "--calibration", metavar="SET",
        help="what recipes that look at samples get to see: scenes (default), a folder of pictures, or a .jsonl file",
    )  # fmt: skip
    sub.add_argument("--samples", type=int, metavar="N", help="at most as many calibration samples (default: 64)")
    sub.add_argument("--seed", type=int, metavar="S", help="of the choice of samples (default: 0)")


# -------------------------------------------------------------------------------------------- commands


def _export(arguments: argparse.Namespace) -> int:
    with _extra("export"):
        from .export.export import export_bundle
    recipe = _recipe(arguments.quantize, arguments)
    calibration = _calibration(recipe, arguments)
    with _progress() as (stage, step):
        bundle = export_bundle(
            arguments.model, arguments.output, dtype=arguments.dtype, recipe=recipe, calibration=calibration,
            force=arguments.force, progress=step, stage=stage,
        )  # fmt: skip
    print_parts(bundle, make_console())
    return 0


def _recipe(name: str | None, arguments: argparse.Namespace) -> Any:
    """The recipe asked for, with what other flags change of it."""
    if name is None:
        given = [flag for flag in ("calibration", "samples", "seed", "kv_cache") if getattr(arguments, flag) is not None]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} is about quantization; give --quantize RECIPE with it.")
        return None
    from .quant.recipe import load_recipe

    recipe = load_recipe(name)
    return dataclasses.replace(recipe, kv_cache=arguments.kv_cache) if arguments.kv_cache else recipe


def _calibration(recipe: Any, arguments: argparse.Namespace) -> Any:
    given = [name for name in ("calibration", "samples", "seed") if getattr(arguments, name) is not None]
    if not given:
        return None
    if not recipe.calibrated:
        raise InputError(f"The recipe {recipe.name!r} looks at no samples; --{given[0]} says nothing to it.")
    from .calibration import SAMPLES, load_calibration

    samples = SAMPLES if arguments.samples is None else arguments.samples
    return load_calibration(arguments.calibration or "scenes", samples=samples, seed=arguments.seed or 0)


def _convert(arguments: argparse.Namespace) -> int:
    flamingo = {name: getattr(arguments, name) for name in ("weights", "vision", "language")}
    if bool(arguments.model) == any(flamingo.values()) or any(flamingo.values()) != all(flamingo.values()):
        raise InputError("give either --model, or --weights, --vision and --language (OpenFlamingo)")
    with _extra("export"):
        from .export.convert import convert_checkpoint
        from .export.convert_open_flamingo import convert_open_flamingo
    with _progress() as (stage, step):
        if arguments.model:
            folder = convert_checkpoint(arguments.model, arguments.output, progress=step, stage=stage)
        else:
            folder = convert_open_flamingo(
                **flamingo, output=arguments.output, cross_attn_every_n_layers=arguments.cross_attn_every_n_layers,
                vision_post_layernorm=arguments.vision_post_layernorm, progress=step, stage=stage,
            )  # fmt: skip
    print(f"{folder} is ready: edgevlm export --model {folder} --output …")
    return 0


def _quantize(arguments: argparse.Namespace) -> int:
    with _extra("quantize"):
        from .quant.quantize import quantize_bundle
    recipe = _recipe(arguments.recipe, arguments)
    calibration = _calibration(recipe, arguments)
    with _progress() as (stage, step):
        bundle = quantize_bundle(
            arguments.bundle, arguments.output, recipe, calibration=calibration, force=arguments.force, progress=step,
            stage=stage,
        )  # fmt: skip
    print_parts(bundle, make_console())
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    with _extra("export"):
        from .verify import verify_bundle
    with _progress() as (stage, _):
        report = verify_bundle(arguments.bundle, arguments.against, stage=stage)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_report(report, make_console())
    return 1 if report.failures else 0


def _build(arguments: argparse.Namespace) -> int:
    with _extra("quantize"):
        from .engines.build import build_engines
    arguments.left = "the engines that were through are kept; the same command goes on with the others"
    with _progress() as (stage, step):
        built = build_engines(
            arguments.bundle, arguments.target, precision=arguments.precision, capacity=arguments.capacity,
            visual_tokens=arguments.max_visual_tokens, parts=arguments.parts.split(",") if arguments.parts else None,
            force=arguments.force, rebuild=arguments.rebuild, stage=stage,
            progress=lambda share, what: step(what, int(100 * share), 100, None),
        )  # fmt: skip
    print_engines(built, make_console())
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from .generate import Sampling
    from .images import load_frames, load_image
    from .prompt import Video
    from .vlm import VLM

    # A large model takes a while to load; what is wrong with the request is said before.
    Sampling(arguments.temperature, arguments.top_p, None, arguments.seed, arguments.max_new_tokens)
    pictures: list[object] = [load_image(path) for path in arguments.image]
    pictures += [Video(load_frames(path), arguments.fps) for path in arguments.video]
    vlm = VLM.load(
        arguments.bundle, capacity=arguments.capacity, backend=arguments.backend, threads=arguments.threads,
        max_tiles=arguments.max_tiles, visual_tokens=arguments.visual_tokens,
    )  # fmt: skip
    stream = vlm.stream(
        arguments.prompt, images=pictures, max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed,
    )  # fmt: skip
    if not arguments.json:
        for piece in stream:
            print(piece.text, end="", flush=True)
        print()
    reply = stream.reply
    timings = reply.timings
    if arguments.json:
        speed = {"tokens_per_second": timings.tokens_per_second}
        backends = {part: dataclasses.asdict(c) | {"tried": c.tried} for part, c in vlm.backends.items()}
        more = speed | {"boxes": [dataclasses.asdict(box) for box in reply.boxes], "backends": backends}
        print(json.dumps(dataclasses.asdict(reply) | more, indent=2, ensure_ascii=False))
        return 0
    for box in reply.boxes:
        print(f"picture {box.image + 1}: {describe_box(box)}", file=sys.stderr)
    for number, seen in enumerate(reply.pictures, 1):
        print(f"picture {number}: {describe_seen(seen)}", file=sys.stderr)
    used: dict[str, list[str]] = {}
    for part, choice in vlm.backends.items():
        used.setdefault(choice.chosen, []).append(part)
    speed_text = f"{timings.tokens_per_second:.1f} tokens/s" if timings.decoded_tokens else "one token"
    ended = {"length": ", cut at --max-new-tokens", "capacity": ", cut because the KV cache is full"}.get(
        reply.finish_reason, ""
    )
    print(
        f"\nfirst token after {timings.first_token:.0f} ms (vision {timings.vision:.0f}, prefill {timings.prefill:.0f} for "
        f"{timings.prompt_tokens} tokens), {speed_text}, {len(reply.tokens)} tokens{ended}",
        file=sys.stderr,
    )
    print("; ".join(f"{backend}: {', '.join(parts)}" for backend, parts in used.items()), file=sys.stderr)
    passed: dict[tuple[str, str], list[str]] = {}
    for part, choice in vlm.backends.items():
        for passed_over, reason in choice.reasons.items():
            passed.setdefault((passed_over, reason), []).append(part)
    for (name, reason), parts in passed.items():
        which = "" if len(parts) == len(vlm.backends) else f" ({', '.join(parts)})"
        print(f"not on {name}{which}: {reason}", file=sys.stderr)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from .evaluation.subjects import Settings, is_bundle
    from .evaluation.suites import SuiteSpec

    spec = SuiteSpec(
        arguments.suite, arguments.images, arguments.annotations, arguments.limit, arguments.metric, arguments.instruction,
        arguments.split, arguments.aspect,
    )  # fmt: skip
    settings = Settings(
        arguments.max_new_tokens, arguments.capacity, arguments.backend, arguments.threads, arguments.visual_tokens
    )
    with _extra("eval"):
        from .evaluation.report import print_table, write_html, write_json
        from .evaluation.run import evaluate, folder_of
    if not all(map(is_bundle, arguments.subjects)):
        with _extra("export"):
            from . import reference  # noqa: F401 - what it needs is there
    engine = None
    if arguments.engine != "ray" and (arguments.workers is not None or arguments.ray_address is not None):
        raise InputError("--workers and --ray-address are for --engine ray.")
    if arguments.engine == "ray":
        with _extra("ray"):
            from .evaluation.ray_engine import make_ray_engine
        engine = make_ray_engine(arguments.ray_address, workers=arguments.workers)
    arguments.left = f"the answers so far are in {arguments.output}; the same command, without --force, goes on with them"
    with _counting() as (stage, step):
        suite, outcomes = evaluate(
            arguments.subjects, spec, arguments.output, settings, engine=engine, force=arguments.force, stage=stage, step=step
        )
    folder = folder_of(arguments.output, suite)
    results, page = folder / "results.json", folder / "report.html"
    write_json(outcomes, suite.items, results)
    write_html(outcomes, suite.items, page)
    if arguments.json:
        print(results.read_text(encoding="utf-8"), end="")
    else:
        print_table(outcomes, suite.items, make_console())
    print(f"{results} and {page} have more", file=sys.stderr)
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    from .evaluation.subjects import Settings, is_bundle
    from .evaluation.suites import SuiteSpec

    spec = SuiteSpec(
        arguments.suite, arguments.images, arguments.annotations, arguments.limit, arguments.metric, arguments.instruction,
        arguments.split, arguments.aspect,
    )  # fmt: skip
    settings = Settings(
        arguments.max_new_tokens, arguments.capacity, arguments.backend, arguments.threads, arguments.visual_tokens
    )
    with _extra("quantize"), _extra("eval"), contextlib.ExitStack() as extras:
        if not is_bundle(arguments.model):
            extras.enter_context(_extra("export"))
        from .calibration import SAMPLES, load_calibration
        from .tune.report import print_tuned, write_tuned
        from .tune.run import tune

        samples = SAMPLES if arguments.samples is None else arguments.samples
        calibration = load_calibration(arguments.calibration or "scenes", samples=samples, seed=arguments.seed or 0)
        arguments.left = f"the steps so far are in {arguments.output}; the same command goes on with them"
        with _counting() as (stage, step):
            tuned = tune(
                arguments.model, arguments.output, spec, max_drop=arguments.max_drop, target=arguments.target,
                settings=settings, calibration=calibration, force=arguments.force, stage=stage,
                step=lambda _, done, total: step("questions", done, total),
            )  # fmt: skip
        recipe, _, page = write_tuned(tuned, arguments.output)
    print_tuned(tuned, make_console())
    print(f"{recipe} is the recipe, {arguments.output / 'bundle'} its bundle; {page} has more", file=sys.stderr)
    return 0


def _print_weights(bundle: Bundle, *, as_json: bool) -> int:
    """A line for every weight that a recipe may quantize: part, name, kind, shape."""
    with _extra("quantize"):
        from .graphs import load_graph
        from .quant.quantize import quantizable
    if bundle.manifest.recipe is not None:
        raise InputError(
            f"{bundle.folder} is quantized already ({bundle.manifest.recipe.get('name')}); recipes name the weights of the "
            "float bundle that it came from."
        )
    found: dict[str, list[dict[str, Any]]] = {}
    for part in bundle.manifest.parts:
        graph = load_graph(bundle.part_path(part))
        linear, values = set(quantizable(graph, linear=True)), graph.graph.initializers
        found[part] = [
            {"name": name, "kind": "linear" if name in linear else "table", "shape": list(values[name].shape or ())}
            for name in quantizable(graph)
        ]
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    wide = max((len(part) for part in found), default=0)
    for part, weights in found.items():
        for weight in weights:
            print(f"{part:{wide}}  {weight['kind']:6}  {' x '.join(map(str, weight['shape'])):14}  {weight['name']}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from .plan.advice import Request
    from .plan.outline import is_bundle
    from .plan.report import plan_record, plot_memory, print_plan, print_targets
    from .plan.run import outline_model, parse_resolution, plan, plan_targets
    from .targets import LOCAL, find_target, load_targets, local_target

    if arguments.all_targets and (arguments.target or arguments.plot):
        raise InputError("--all-targets is about all of them; give no --target or --plot with it.")
    resolution = parse_resolution(arguments.resolution)
    name = arguments.target or LOCAL
    target = local_target(measure=True) if name == LOCAL else find_target(name)
    dtype = arguments.dtype or ("fp32" if target.kind == LOCAL and not arguments.all_targets else "fp16")
    needed = contextlib.nullcontext() if is_bundle(Path(arguments.model).expanduser()) else _extra("export")
    with needed:
        outline = outline_model(arguments.model, recipe=arguments.recipe, kv_cache=arguments.kv_cache, dtype=dtype)
    context = min(outline.manifest.context_length, 4096) if arguments.context is None else arguments.context
    request = Request(context, arguments.images, resolution, arguments.visual_tokens)
    if arguments.all_targets:
        plans = plan_targets(outline, [*load_targets().values()], request)
        if arguments.json:
            print(json.dumps([plan_record(made) for made in plans], indent=2))
        else:
            print_targets(plans, make_console())
        return 0 if any(made.memory.fits for made in plans) else 1
    made = plan(outline, target, request)
    if arguments.plot:
        plot_memory(made, arguments.plot)
    if arguments.json:
        print(json.dumps(plan_record(made), indent=2))
    else:
        print_plan(made, make_console())
    return 0 if made.memory.fits else 1


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import measure_bundle, print_bench
    from .plan.run import parse_resolution

    with _counting() as (_, count):
        made = measure_bundle(
            arguments.bundle, prompt_tokens=arguments.prompt_tokens, new_tokens=arguments.new_tokens, images=arguments.images,
            size=parse_resolution(arguments.resolution), rounds=arguments.rounds, backend=arguments.backend,
            threads=arguments.threads, count=count,
        )  # fmt: skip
    Bundle.open(arguments.bundle, check_files=False).report("bench", made.to_dict())
    if arguments.json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        print_bench(made, make_console())
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from .bundle import Bundle

    bundle = Bundle.open(arguments.bundle, check_files=False)
    if arguments.weights:
        return _print_weights(bundle, as_json=arguments.json)
    if arguments.json:
        print(bundle.manifest.to_json(), end="")
        return 0
    from rich.markup import escape

    manifest = bundle.manifest
    cross, cross_text = manifest.cross_attention, ""
    if cross:
        made = f"{cross.places} rows a picture" if cross.source == "images" else "one row a token of the prompt"
        cross_text = f"{cross.layers} layers, {cross.heads} heads of {cross.head_dim}, {made}"
    beyond = [f"{name} ({', '.join(p.onnxruntime_only)})" for name, p in manifest.parts.items() if p.onnxruntime_only]
    left_out = ((manifest.recipe or {}).get("checkpoint") or {}).get("left_out")
    console = make_console()
    print_parts(bundle, make_console(), shapes=True)
    facts = {
        "family": manifest.family,
        "computes in": manifest.dtype,
        "recipe": (manifest.recipe or {}).get("name", "none (float)"),
        **({"left float": f"{' and '.join(left_out)}, which the checkpoint quantizes too"} if left_out else {}),
        "context length": f"{manifest.context_length:,} tokens",
        "KV cache": f"{manifest.kv_cache.bytes_per_token() / 1e3:,.1f} kB a token ({manifest.kv_cache.layers} layers, "
        f"{manifest.kv_cache.heads} heads of {manifest.kv_cache.head_dim}, {manifest.kv_cache.dtype})",
        **{f"not on {name}": reason for name, reason in _lacking(bundle)},
        **({"not on TensorRT": "; ".join(beyond)} if beyond else {}),
        "picture": describe_picture(manifest),
        **(
            {"film": f"as pictures, {manifest.patches.temporal} frames a layer ({manifest.video.token})"}
            if manifest.video and manifest.patches
            else {}
        ),
        **({"cross-attention": cross_text} if cross_text else {}),
        "files": f"{len(manifest.files)}, {sum(f.size for f in manifest.files.values()) / 1e6:,.1f} MB",
        **{f"made with {k}" if k not in ("checkpoint", "architecture") else k: v for k, v in manifest.provenance.items()},
    }
    for name, value in facts.items():
        console.print(f"[bold]{name:>22}[/]  {escape(str(value))}")
    return 0


def _lacking(bundle: Any) -> Iterator[tuple[str, str]]:
    """Backends that cannot run a part of the bundle on any machine, and why."""
    from .runtimes import BACKENDS

    for backend in BACKENDS.values():
        for name, part in bundle.manifest.parts.items():
            if reason := backend.lacks(part):
                yield f"{backend.name}: {name}", reason


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import examine

    findings = examine()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return 0
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column)
    marks = {True: "[green]ok[/]", False: "[yellow]--[/]", None: ""}
    for finding in findings:
        table.add_row(marks[finding.ok], *map(escape, (finding.what, finding.found, finding.remedy)))
    make_console().print(table)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    with _extra("export"):
        from .demo import MODELS, run_demo
    run_demo(arguments.output, arguments.questions, make_console(), arguments.model or MODELS)
    return 0


# ---------------------------------------------------------------------------------------------- output


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Imports inside need an extra; where it is missing, the error names it."""
    from .doctor import missing_modules

    # Some are imported late, deep inside: all are looked for here, before any work.
    if missing := missing_modules(name):
        raise MissingDependencyError(
            f"Not installed: {', '.join(missing)}. `pip install 'edgevlm[{name}]'` brings what this command needs."
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        yield
        if name == "export":
            import torch  # noqa: F401
            from transformers.utils import logging

            logging.disable_progress_bar()
    except ImportError as exc:
        if (exc.name or "").startswith("edgevlm"):
            raise
        raise MissingDependencyError(
            f"The package {exc.name!r} is missing ({exc}). `pip install 'edgevlm[{name}]'` brings what this command needs."
        ) from exc


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int, int | None], None]]]:
    """A bar on stderr: what is being done, and over how many tensors (of so many bytes) or hundredths it is through. In a log,
    a line for each stage."""
    if not sys.stderr.isatty():

        def say(text: str) -> None:
            _stop_if_interrupted()
            print(f"{text} …", file=sys.stderr, flush=True)

        yield say, lambda *_: _stop_if_interrupted()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=make_console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=None, detail="")

        def stage(text: str) -> None:
            _stop_if_interrupted()
            bars.update(task, description=text, completed=0, total=None, detail="")

        def step(name: str, done: int, total: int, size: int | None) -> None:
            _stop_if_interrupted()
            detail = name if size is None else f"{name} ({size / 1e6:.1f} MB)"
            bars.update(task, completed=done + (size is not None), total=total, detail=detail)

        yield stage, step


@contextlib.contextmanager
def _counting() -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """A bar on stderr for each subject of an evaluation: how many questions are answered. In a log, a line for each tenth."""
    tenths: dict[str, int] = {}
    if not sys.stderr.isatty():

        def say(text: str) -> None:
            _stop_if_interrupted()
            print(f"{text} …", file=sys.stderr, flush=True)

        def count(name: str, done: int, total: int) -> None:
            _stop_if_interrupted()
            before = tenths.setdefault(name, 10 * done // total)
            if 10 * done // total > before:
                tenths[name] = 10 * done // total
                print(f"{name}: {done:,} of {total:,} answered", file=sys.stderr, flush=True)

        yield say, count
        return
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=make_console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}
        current = bars.add_task("starting", total=None)

        def stage(text: str) -> None:
            _stop_if_interrupted()
            bars.update(current, description=escape(text))

        def advance(name: str, done: int, total: int) -> None:
            _stop_if_interrupted()
            if name not in tasks:
                tasks[name] = bars.add_task(escape(name), total=total)
            bars.update(tasks[name], completed=done)

        yield stage, advance


if __name__ == "__main__":
    sys.exit(main())
