"""Runs, sweeps and jobs from another terminal: a table of them, their logs, and a way to stop them.

Everything is read from the run directories and, where a cluster answers, from its dashboard: finished runs need none.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence

from xlc_ray import files
from xlc_ray.cluster import cli, control, runs
from xlc_ray.cluster.grafana import install
from xlc_ray.cluster.runs import Run
from xlc_ray.cluster.session import run_path
from xlc_ray.config import UserError
from xlc_ray.progress import duration

ADDRESS = "http://127.0.0.1:8265"
"""Where Ray's dashboard is unless somebody chose otherwise."""
JOBS = 10
"""Newest jobs of a cluster that are shown."""
COLUMNS: tuple[tuple[str, Callable[[dict], str]], ...] = (
    ("loss", lambda m: f"{m['loss']:.4g}"),
    ("ev", lambda m: f"{m['explained_variance']:.3f}"),
    ("l0", lambda m: f"{m['l0']:.1f}"),
    ("dead", lambda m: f"{m['dead_features']:.1%}"),
    ("tok/s", lambda m: f"{m['tokens_per_s']:,.0f}"),
)


def options() -> cli.Options:
    """The command line."""
    found = cli.Options(__doc__)
    found.add_argument("directory", nargs="?", default="runs", help="runs are looked for in it (default: runs)")
    found.add_argument("--watch", nargs="?", type=float, const=2.0, metavar="SECONDS", help="draw again and again")
    found.add_argument("--logs", metavar="NAME", help="print the logs of a run; with --watch follow them to its end")
    found.add_argument("--stop", metavar="NAME", help="interrupt a run; its checkpoints stay")
    found.add_argument("--address", metavar="URL", help=f"a cluster's dashboard, besides those of the runs ({ADDRESS})")
    found.add_argument(
        "--grafana", nargs="?", const="", metavar="DIR", help="write the Grafana dashboard beside Ray's, or into DIR"
    )
    return found


def main(
    directory: str,
    watch: float | None,
    logs: str | None,
    stop: str | None,
    address: str | None,
    grafana: str | None,
) -> None:
    """What the options ask for. Raises UserError."""
    if watch is not None and not 0 < watch < float("inf"):
        raise UserError(f"--watch: {watch:g} should be more than 0 seconds")
    where = run_path(directory)
    try:
        if grafana is not None:
            print(f"dashboard: {install(grafana)}")
        elif stop:
            print(control.stop(runs.pick(runs.find(where), stop)))
        elif logs:
            run = runs.pick(runs.find(where), logs)
            for line in control.log_lines(run, lambda: watch is not None and not runs.find(run.path)[0].over):
                print(line, flush=True)
        else:
            _show(where, address, watch)
    except KeyboardInterrupt:  # how one leaves a table that is drawn again and again
        return


def _show(directory: str, address: str | None, watch: float | None) -> None:
    """On a terminal that is watched, draw in place; elsewhere one table after another."""
    while True:
        text = report(directory, address)
        place, end = ("\x1b[H\x1b[J", "\n") if sys.stdout.isatty() else ("", "\n\n")
        print(f"{place if watch else ''}{text}", end=end if watch else "\n", flush=True)
        if watch is None:
            return
        time.sleep(watch)


def report(directory: str, address: str | None = None) -> str:
    """The table of runs, and below it the jobs of the clusters that answer. Raises UserError if `address` does not."""
    found = runs.find(directory)
    lines = table(found) if found else [f"no runs in {directory}"]
    named = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    others = {run.driver.dashboard for run in found if run.driver and not run.over}
    for url in dict.fromkeys([*([named] if named else []), *sorted(others), ADDRESS]):
        jobs = control.client(url)
        if jobs:
            lines += ["", f"jobs of {url}", *control.job_lines(jobs, JOBS)]
        elif url == address:
            raise UserError(f"--address: no cluster answers at {address}")
    return "\n".join(lines)


def table(found: Sequence[Run]) -> list[str]:
    """A line a run: trials below their sweep."""
    rows = [["run", "state", "step", *(name for name, _ in COLUMNS), "left", "age"]]
    for run in found:
        name = f"  {files.name(run.name)}" if run.trial else run.name
        values = [show(run.metrics) if run.metrics else "" for _, show in COLUMNS]
        rows.append([name, run.state, run.done, *values, _time(run.left), _time(run.age)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_line(row, widths) for row in rows] + [f"{run.name}: {run.error}" for run in found if run.error]


def _line(row: list[str], widths: list[int]) -> str:
    words = [word.ljust(w) if i < 2 else word.rjust(w) for i, (word, w) in enumerate(zip(row, widths, strict=True))]
    return "  ".join(words).rstrip()


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


if __name__ == "__main__":
    cli.run_options(main, options())
