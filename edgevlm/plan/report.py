"""What people and programs read of a plan: tables, JSON, and a plot of memory against context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, MissingDependencyError, OutputError
from .memory import predict_memory
from .run import Plan

__all__ = ["plan_record", "plot_memory", "print_plan", "print_targets"]

_PLOTS = (".png", ".svg", ".pdf")


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def print_plan(plan: Plan, console: Any) -> None:
    """The plan of one model on one device."""
    from rich.markup import escape
    from rich.table import Table

    outline, target, memory, sight = plan.outline, plan.target, plan.memory, plan.sight
    how = outline.recipe or "float"
    cache = outline.manifest.kv_cache.dtype
    pictures = _count(sight.images, "picture") + f", {sight.places:,} places" if sight.images else "no picture"
    size = f" ({sight.shown[0]} x {sight.shown[1]}, {_count(sight.tiles, 'tile')})" if sight.images else ""
    title = f"{escape(outline.name)} on {escape(target.name)}"
    console.print(f"[bold]{title}[/]")
    computes = f"{how}, computes in {outline.manifest.dtype}, KV cache {cache}"
    console.print(f"{computes}; context {plan.request.context:,}; {pictures}{size}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("memory", "GB", ""):
        table.add_column(column, justify="right" if column == "GB" else "left")
    stored = {f"weights of {name}": part for name, part in outline.parts.items()}
    for what, held in memory.rows():
        part = stored.get(what)
        forms = ", ".join(f"{form} {gigabytes(bytes_)}" for form, bytes_ in part.stored.items()) if part else ""
        table.add_row(what, gigabytes(held), f"stored: {forms}" if forms else "")
    table.add_row("[bold]answering[/]", f"[bold]{gigabytes(memory.answering)}[/]", "")
    table.add_row("peak while " + ("building an engine" if target.runs_on_gpu else "loading"), gigabytes(memory.building), "")
    verdict = "[green]fits[/]" if memory.fits else "[red]does not fit[/]"
    table.add_row("usable", gigabytes(memory.usable), f"{verdict}; {escape(target.usable_reason)}")
    console.print(table)
    if target.runs_on_gpu and memory.building > memory.usable:
        console.print("Its largest engine cannot be built there; build it on a larger machine of the same kind.")
    if target.runs_on_gpu and outline.onnxruntime_only:
        console.print("NF4 and FP4 weights run by ONNX Runtime alone; TensorRT takes int8 and int4.")
    console.print(_speed_text(plan))
    if plan.options:
        console.print("\n[bold]What would make it fit[/], what loses least first" if plan.options[0].fits else
                      "\n[bold]Nothing here makes it fit[/]; nearest comes")  # fmt: skip
        advice = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("change", "total GB", "what is lost"):
            advice.add_column(column, justify="right" if column == "total GB" else "left")
        for option in plan.options[:8]:
            advice.add_row(option.change, gigabytes(option.total), option.lost)
        console.print(advice)


def _speed_text(plan: Plan) -> str:
    speed = plan.speed
    if speed.decode is None:
        return "Speed: not predicted; the bandwidth of this device is not known."
    rate = f"{speed.tokens_per_second:,.1f} tokens/s behind {plan.request.context:,} tokens"
    first = speed.first_token
    if first is None:
        return f"Predicted: {rate}; the first token is not predicted, since the peak of this device is not known."
    seen = f" (pictures {1e3 * (speed.vision or 0):,.0f} ms)" if plan.sight.images else ""
    sure = "" if speed.calibrated else " Nothing was published of this kind of device that the prediction was checked against."
    return f"Predicted: first token of a prompt of {speed.prompt:,} after {1e3 * first:,.0f} ms{seen}; {rate}.{sure}"


def print_targets(plans: Sequence[Plan], console: Any) -> None:
    """One model on several devices."""
    from rich.table import Table

    first = plans[0]
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"{first.outline.name}", title_justify="left")
    for column in ("target", "", "GB", "usable GB", "first token ms", "tokens/s"):
        table.add_column(column, justify="left" if column in ("target", "") else "right")
    for plan in plans:
        speed = plan.speed
        ttft = "–" if speed.first_token is None else f"{1e3 * speed.first_token:,.0f}"
        rate = "–" if speed.tokens_per_second is None else f"{speed.tokens_per_second:,.1f}"
        verdict = "[green]fits[/]" if plan.memory.fits else "[red]no[/]"
        table.add_row(plan.target.id, verdict, gigabytes(plan.memory.total), gigabytes(plan.memory.usable), ttft, rate)
    console.print(table)


def plan_record(plan: Plan) -> dict[str, Any]:
    """As JSON has it: bytes and seconds."""
    outline, memory, speed, sight = plan.outline, plan.memory, plan.speed, plan.sight
    return {
        "model": outline.name,
        "family": outline.manifest.family,
        "target": plan.target.id,
        "recipe": outline.recipe or "float",
        "kv_cache": outline.manifest.kv_cache.dtype,
        "context": plan.request.context,
        "images": sight.images,
        "places": sight.places,
        "weights_stored": {name: dict(part.stored) for name, part in outline.parts.items()},
        "memory": {
            "weights": dict(memory.weights), "kv_cache": memory.kv_cache, "cross_attention": memory.cross_attention,
            "features": memory.features, "vision": memory.vision, "prefill": memory.prefill, "runtime": memory.runtime,
            "answering": memory.answering, "building": memory.building, "total": memory.total, "usable": memory.usable,
        },
        "fits": memory.fits,
        "speed": {
            "prompt": speed.prompt, "vision_seconds": speed.vision, "prefill_seconds": speed.prefill,
            "first_token_seconds": speed.first_token, "tokens_per_second": speed.tokens_per_second,
            "calibrated": speed.calibrated,
        },
        "options": [
            {"change": o.change, "lost": o.lost, "total": o.total, "fits": o.fits} for o in plan.options
        ],
        "sources": [{"title": s.title, "url": s.url, "date": s.date} for s in plan.target.sources],
    }  # fmt: skip


def plot_memory(plan: Plan, path: Path) -> Path:
    """Memory against context, as PNG, SVG or PDF. Raises InputError for another ending, MissingDependencyError without
    matplotlib, OutputError."""
    if path.suffix.lower() not in _PLOTS:
        raise InputError(f"The plot {str(path)!r} ends in {path.suffix or 'nothing'}; it is one of {', '.join(_PLOTS)}.")
    try:
        import matplotlib
    except ImportError as exc:
        raise MissingDependencyError(
            "Not installed: matplotlib, which draws the plot. `pip install 'edgevlm[eval]'` brings it."
        ) from exc
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    most = min(plan.outline.manifest.context_length, max(4 * plan.request.context, 4096))
    least = max(1, min(plan.sight.places + 1, most))
    contexts = sorted({least + round((most - least) * n / 64) for n in range(65)} | {plan.request.context})
    memories = [predict_memory(plan.outline, plan.target, n, plan.sight) for n in contexts]
    layers = {
        "weights": [sum(m.weights.values()) / 1e9 for m in memories],
        "runtime": [m.runtime / 1e9 for m in memories],
        "activations": [(m.vision + m.prefill + m.features) / 1e9 for m in memories],
        "KV cache": [(m.kv_cache + m.cross_attention) / 1e9 for m in memories],
    }
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.stackplot(contexts, *layers.values(), labels=list(layers))
    axes.axhline(plan.memory.usable / 1e9, color="black", linestyle="--", label=f"usable, {plan.target.id}")
    axes.axvline(plan.request.context, color="gray", linewidth=1, label=f"context {plan.request.context:,}")
    axes.set(xlabel="context, tokens", ylabel="memory, GB", title=f"{plan.outline.name}, {plan.outline.recipe or 'float'}")
    axes.set_xlim(contexts[0], contexts[-1])
    axes.legend(loc="upper left")
    try:
        figure.savefig(path, dpi=140)
    except OSError as exc:
        raise OutputError(f"The plot {path} cannot be written: {exc.strerror}.") from exc
    finally:
        plt.close(figure)
    return path
