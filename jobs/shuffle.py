"""Write a store's rows anew in one global random order, the same for any number of workers; all sites together."""

from argparse import SUPPRESS

from xlc_ray.cluster import cli
from xlc_ray.cluster.session import output_path
from xlc_ray.cluster.shuffle import shuffle

options = cli.Options(description=__doc__)
options.add_argument("--store", required=True, metavar="DIR", dest="path", help="a complete store")
options.add_argument("--out", required=True, metavar="DIR", help="a new directory, for source.path")
options.add_argument("--seed", type=int, default=0, metavar="N", help="of the order (0)")
options.add_argument("--chunk-tokens", type=int, default=SUPPRESS, metavar="N", help="rows of a chunk (as there)")
options.add_argument("--workers", type=int, default=SUPPRESS, metavar="N", help="chunks at once (one a CPU)")


def main(out: str, **how) -> None:
    out = output_path(out)
    made = shuffle(out=out, **how)
    print(f"{made.tokens:,} rows of {len(made.sites)} sites in {len(made.chunks)} chunks at {out}")


if __name__ == "__main__":
    cli.run_options(main, options)
