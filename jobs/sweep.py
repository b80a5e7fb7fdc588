"""Train many dictionaries around one setting, cut short what is not worth its steps, and find the frontier."""

from xlc_ray.cluster import cli
from xlc_ray.cluster.sweep import dry_run, sweep
from xlc_ray.sweeps.table import summary

options = cli.Options()
options.add_argument("--config", metavar="FILE", help="the sweep's YAML, or a grid file of SAE-Interpretability")
options.add_argument("--resume", metavar="DIR", help="instead of --config: go on with the sweep in this directory")
options.add_argument(
    "--dry-run", dest="dry", action="store_true", help="print every trial's settings and workers, start nothing"
)
options.add_argument("--limit", type=int, metavar="N", help="only the first N trials")
options.add_argument("--local", action="store_true", help="one trial after another in this process, for debuggers")


def main(overrides, config, resume, dry, limit, local) -> None:
    if dry:
        for line in dry_run(config, overrides, limit, resume):
            print(line)
    else:
        found = sweep(config, overrides, limit=limit, resume=resume, local=local)
        print(summary(found))
        found.check()


if __name__ == "__main__":
    cli.run_sweep(main, __doc__, options)
