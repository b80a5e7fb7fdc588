"""Failures injected into real jobs on a Ray cluster of several nodes, and what becomes of the runs.

    python tests/cluster/faults.py [--json FILE] [--only NAME …]

prints a table, and writes a list of {case, failure, recovered, parameters_equal, seconds_to_recover, steps_lost}, and
error, where a case did not come to its end: the others are tried all the same.
seconds_to_recover: from the failure to the first step (chunk) made after it, the starts of processes included.
steps_lost: steps that were made again. parameters_equal: to 1e-9, in float64, with a run in one process that nothing
disturbed; of generation: the bytes of all chunk files. Cases in ON_HOSTS need root, and are left out without it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.util.state.exception import RayStateApiException

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script it must find the tests' other modules

from tests.cluster import hosts
from tests.cluster.cases import CASES, ON_HOSTS
from tests.cluster.hosts import Hosts
from tests.cluster.nodes import Nodes
from tests.cluster.stage import Outcome, Stage

KINDS: dict[str, type[Nodes]] = {"nodes": Nodes, "hosts": Hosts}
"""Clusters, by their name."""

FAILURES = (AssertionError, RuntimeError, OSError, LookupError, ValueError, subprocess.SubprocessError, RayError,
            RayStateApiException)  # fmt: skip
"""What a case may end with. Mistakes of users and waits that were too long are a ValueError and an OSError."""


def possible() -> list[str]:
    """The cases that this machine allows."""
    return [name for name in CASES if name not in ON_HOSTS or hosts.allowed()]


def happened(names: list[str], nodes: type[Nodes]) -> Iterator[dict[str, Any]]:
    """The lines of some cases, on a cluster of theirs."""
    with tempfile.TemporaryDirectory(prefix="faults") as folder, closing(Stage(Path(folder), nodes)) as stage:
        for name in names:
            try:
                yield {"case": name} | asdict(CASES[name](stage))
            except FAILURES:
                failed = Outcome(name, recovered=False, parameters_equal=False, seconds_to_recover=0.0, steps_lost=0)
                yield {"case": name} | asdict(failed) | {"error": traceback.format_exc()}
            stage.nodes.end_jobs()


def on_clusters(names: list[str], file: Path) -> None:
    """Write the lines of all these cases: each kind of cluster in a process of its own."""
    file.write_text("[]")
    for apart, kind in ((), "nodes"), (hosts.APART, "hosts"):
        if chosen := [name for name in names if (name in ON_HOSTS) == (kind == "hosts")]:
            command = [*apart, sys.executable, __file__, "--on", kind, "--json", str(file), "--only", *chosen]
            subprocess.run(command, check=True)


def main() -> None:
    """Run the cases and show the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", metavar="FILE", help="write the table there too", type=Path)
    options.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help=", ".join(CASES))
    options.add_argument("--on", choices=KINDS, help="run the cases in this process, and add them to FILE")
    given = options.parse_args()
    if given.on:
        for line in happened(given.only, KINDS[given.on]):
            print(json.dumps(line), flush=True)
            given.json.write_text(json.dumps([*json.loads(given.json.read_text()), line], indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        file = given.json or Path(folder, "table.json")
        on_clusters(given.only or possible(), file)
        found = json.loads(file.read_text())
    print("\n| failure | recovered after | steps made again | parameters equal |\n|---|---|---|---|")
    for o in found:
        after = f"{o['seconds_to_recover']:.0f} s" if o["recovered"] else "not"
        print(f"| {o['failure']} | {after} | {o['steps_lost']} | {'yes' if o['parameters_equal'] else 'no'} |")
    sys.exit(0 if all(o["recovered"] and o["parameters_equal"] for o in found) else 1)


if __name__ == "__main__":
    main()
