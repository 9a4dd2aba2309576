"""Writes docs/cli.md from the command line's own help, so that the two cannot differ.

python tools/cli_reference.py            # or: make docs
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from edgevlm.cli import build_parser

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"


def reference() -> str:
    """The page as it should be."""
    os.environ["COLUMNS"] = "110"
    parser = build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    lines = ["# Command line", "", "Written by `make docs` from the program's own help.", ""]
    for name, command in commands.items():
        lines += [f"## edgevlm {name}", "", "```text", command.format_help().rstrip(), "```", ""]
    lines += [
        "## Exit codes",
        "",
        "| code | meaning |",
        "|---|---|",
        "| 0 | done |",
        "| 1 | `verify`: a limit was missed, the table says where; `plan`: it does not fit |",
        "| 2 | the request cannot be served as it stands; the text says what to do |",
        "| 3 | a bug in EdgeVLM; `--debug` shows where |",
        "| 130 | interrupted with Ctrl-C; nothing was left but `eval`'s answers, `tune`'s steps, `build`'s whole engines |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
