"""Runs, sweeps and jobs from another terminal: a table of them, their logs, and a way to stop them."""

from xlc_ray.cluster import cli
from xlc_ray.cluster.monitor import main, options

if __name__ == "__main__":
    cli.run_options(main, options())
