"""What every benchmark does with what it found: a table for people, or JSON for programs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", metavar="FILE", help="write the results; - for standard output, without the table")


def deliver(found: dict[str, Any], table: str, to: str | None) -> None:
    """Print the table, and write the file that `--json` names; with - print the JSON alone, on one line."""
    if to == "-":
        print(json.dumps(found))
        return
    print(table)
    if to:
        Path(to).write_text(json.dumps(found, indent=1) + "\n")
