"""Make of a TopK or BatchTopK run a JumpReLU run of the same l0: a table, and a run directory with conversion.json."""

from argparse import SUPPRESS

from xlc_ray.cluster import cli
from xlc_ray.cluster.convert import convert
from xlc_ray.evaluation.convert import conversion_table

options = cli.Options()
options.add_argument("--out", default="", metavar="DIR", help="a new directory")
options.add_argument("--per-feature", action="store_true", help="a threshold a feature, from what it kept")
options.add_argument("--fold", action="store_true", help="normalisation and decoder norms into the weights")
options.add_argument("--target-l0", type=float, default=SUPPRESS, metavar="X", help="another l0 than the run's")
options.add_argument(
    "--tolerance", type=float, default=SUPPRESS, metavar="T", help="how far l0 may be off, over all groups"
)


def main(run: str, changes: dict, **how) -> None:
    print(conversion_table(convert(run, changes=changes, **how)))


if __name__ == "__main__":
    cli.run_on(main, __doc__, options)
