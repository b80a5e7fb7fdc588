"""What a store or a run holds: sites, norms, outliers, rows with their text; wiring, checkpoints, metrics."""

# Not inspect.py: a script's directory comes first on Python's path, where it would hide the standard library's.

from argparse import SUPPRESS

from xlc_ray.cluster import cli
from xlc_ray.cluster.inspect import inspect

options = cli.Options(description=__doc__)
options.add_argument("path", metavar="STORE|RUN", help="a directory or URL")
options.add_argument("--verify", action="store_true", help="read every chunk and compare its checksum")
options.add_argument("--against", metavar="OTHER", help="compare statistics with another store's instead")
options.add_argument("--rows", type=int, default=SUPPRESS, metavar="N", help="rows drawn for the norms")
options.add_argument(
    "--shown", type=int, default=SUPPRESS, metavar="N", help="rows, and outliers, shown with their text"
)
options.add_argument("--tokenizer", metavar="NAME", help="a model's name or directory: text in place of token ids")


def main(path: str, **how) -> None:
    for line in inspect(path, **how):
        print(line)


if __name__ == "__main__":
    cli.run_options(main, options)
