"""What people look at: the tables of the command line. rich is imported when there is something to print."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from .bundle import Bundle, Manifest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .boxes import Box
    from .engines.build import Built
    from .vlm import Seen

__all__ = ["describe_box", "describe_picture", "describe_seen", "make_console", "print_engines", "print_parts", "print_report"]


def make_console(stderr: bool = False) -> Any:
    """A rich console that is wide enough for the tables where it is not a terminal."""
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with 1; `main` knows better
            raise

    return PipedConsole(stderr=stderr, highlight=False, width=None if sys.stdout.isatty() else 140)


def describe_seen(seen: Seen) -> str:
    """What became of a picture, in a line."""
    frames = f"{seen.frames} frames of " if seen.frames > 1 else ""
    change = "shown as they are" if seen.frames > 1 else "shown as it is"
    if (seen.shown_width, seen.shown_height) != (seen.width, seen.height):
        change = f"resized to {seen.shown_width} x {seen.shown_height}"
    limit = ", over the pixel limit" if seen.limited else ""
    return f"{frames}{seen.width} x {seen.height}{limit}, {change}: {seen.tokens:,} tokens"


def describe_box(box: Box) -> str:
    """What an answer points at, in a line."""
    return f"{box.label or 'box'} from ({box.x1:.0f}, {box.y1:.0f}) to ({box.x2:.0f}, {box.y2:.0f})"


def describe_picture(manifest: Manifest) -> str:
    """What a picture costs."""
    image, patches = manifest.image, manifest.patches
    if patches:
        side = patches.size * patches.merge
        return f"a token for every {side} x {side} pixels ({image.token})"
    return f"{image.places} tokens{' a tile' * bool(manifest.image_options)} ({image.token or 'in front of the text'})"


def print_parts(bundle: Bundle, console: Any, *, shapes: bool = False) -> None:
    """The parts of a bundle; with `shapes`, what goes in and comes out."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title=str(bundle.folder), title_justify="left")
    for column in ("part", "nodes", "MB", "weights"):
        table.add_column(column, justify="right" if column in ("nodes", "MB") else "left")
    if shapes:
        table.add_column("inputs → outputs", overflow="fold")
    manifest = bundle.manifest
    for name, part in manifest.parts.items():
        weights = ", ".join(f"{dtype} {size / 1e6:,.2f}" for dtype, size in part.weights.items() if size >= 0.01 * part.size)
        row = [name, str(part.nodes), f"{part.size / 1e6:,.2f}", weights]
        if shapes:
            row.append(escape(f"{_describe(part.inputs)} → {_describe(part.outputs)}"))
        table.add_row(*row)
    total = sum(part.size for part in manifest.parts.values())
    table.add_row(
        "[bold]all", str(sum(p.nodes for p in manifest.parts.values())), f"{total / 1e6:,.2f}", f"computes in {manifest.dtype}"
    )
    console.print(table)


def _describe(tensors: dict[str, Any]) -> str:
    shown = [f"{n} {t.dtype}[{', '.join(map(str, t.shape))}]" for n, t in tensors.items() if "." not in n]
    hidden = len(tensors) - len(shown)
    return ", ".join([*shown, f"{hidden} keys and values"] if hidden else shown)


def print_engines(engines: Sequence[Built], console: Any) -> None:
    """What `build` made, or found up to date."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("part", "MB", "precision", "for", "shapes", "seconds", ""):
        table.add_column(column, justify="right" if column in ("MB", "seconds") else "left")
    for engine in engines:
        record, key = engine.record, engine.record.key
        shapes = ", ".join(profile.name for profile in key.profiles if profile.shapes) or "fixed"
        done = f"built: {engine.why}" if engine.why else "up to date"
        table.add_row(
            engine.part, f"{record.size / 1e6:,.2f}", key.precision, "+".join(key.capabilities), shapes,
            f"{record.seconds:.1f}", escape(done),
        )  # fmt: skip
    console.print(table)
    if engines:
        console.print(escape(f"{engines[0].path.parent} ({engines[0].record.key.flavour} {engines[0].record.key.version})"))


def print_report(report: Any, console: Any) -> None:
    """The tables of `verify`."""
    from rich.markup import escape
    from rich.table import Table

    parts = Table(
        box=None, pad_edge=False, header_style="bold", title=f"{report.bundle} against {report.against}", title_justify="left"
    )
    for column in ("part", "weights", "max abs diff", "largest value", "cosine", ""):
        parts.add_column(column, justify="left" if column in ("part", "weights", "") else "right")
    verdict = {True: "[green]ok[/]", False: "[red]MISSED[/]"}
    for check in report.parts:
        parts.add_row(
            check.part, check.kind, f"{check.max_abs:.1e}", f"{check.peak:.2f}", f"{check.cosine:.6f}", verdict[check.passed]
        )
    cases = Table(box=None, pad_edge=False, header_style="bold", title="end to end", title_justify="left")
    for column in ("case", "prompt", "max abs diff of logits", "cosine", "same choice", "equal greedy tokens", ""):
        cases.add_column(column, justify="left" if column in ("case", "") else "right")
    for case in report.sequences:
        cases.add_row(
            case.case, f"{case.prompt_tokens}", f"{case.max_abs:.1e}", f"{case.cosine:.6f}", f"{100 * case.top1:.1f} %",
            f"{case.same_tokens} of {case.tokens}", verdict[case.passed],
        )  # fmt: skip
    console.print(parts, "", cases, "")
    for note in report.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")
    if report.failures:
        console.print(f"[red]missed:[/] {', '.join(report.failures)}")
    elif report.kind in ("int8", "int4"):
        console.print("Within the limits for quantized weights; the numbers are the drift from the float model.")
    else:
        console.print("All within the limits.")
